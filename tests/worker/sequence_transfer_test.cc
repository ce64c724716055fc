// Sequences between two hosts without a store: what moves, what does not, and what is refused.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "tests/worker/model_host_fixture.h"
#include "worker/sequence_transfer.h"

namespace pagetide {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr char kTarget[] = "10.0.0.7:7080";

SequenceHandle HandleOf(const SequenceInfo& info) {
  return {info.id, info.epoch, std::nullopt};
}
MonotonicTime Soon() {
  return HostUnderTest::Soon();
}
HostUnderTest::Setup Alone(uint32_t num_frames = 16, uint64_t incarnation = 7) {
  return {.num_frames = num_frames, .no_store = true, .incarnation = incarnation};
}
uint64_t FreeFrames(HostUnderTest& t) {
  uint64_t free = 0;
  for (const PoolUsage& pool : t.host->Usage()) free += pool.free_frames;
  return free;
}

using Change = std::function<void(uint32_t page, std::vector<std::byte>& body)>;

// Pushes what is wanted, each page in two parts, as `change` leaves it.
absl::Status PushAll(OutgoingSequence& from, IncomingSequence& to, const Change& change = nullptr) {
  return from.ReadPages(to.wanted(), Soon(),
                        [&](uint32_t page, std::span<const std::byte> bytes) -> absl::Status {
                          std::vector<std::byte> body(bytes.begin(), bytes.end());
                          if (change != nullptr) change(page, body);
                          const std::span<const std::byte> whole(body);
                          const auto first = to.Write(page, 0, whole.first(100));
                          if (!first.ok()) return first.status();
                          return to.Write(page, 100, whole.subspan(100)).status();
                        });
}

struct Sent {
  SequenceInfo info;
  uint64_t pushed = 0;
};
absl::StatusOr<Sent> SendTo(HostUnderTest& a, const SequenceInfo& info, HostUnderTest& b,
                            TransferKind kind) {
  auto from = TransfersOf(*a.host).BeginOutgoing(a.tenant, HandleOf(info), kind, kTarget, Soon());
  if (!from.ok()) return from.status();
  auto to = TransfersOf(*b.host).BeginIncoming(b.tenant, (*from)->plan(), Soon());
  if (!to.ok()) return to.status();
  const absl::Status pushed = PushAll(**from, **to);
  if (!pushed.ok()) return pushed;
  auto committed = (*to)->Commit();
  if (!committed.ok()) return committed.status();
  return Sent{committed->value_or(SequenceInfo()), (*to)->wanted().size()};
}

TEST(SequenceTransferTest, ACopyHasTheRowsAndSharesItsPagesWithPrompts) {
  HostUnderTest a(Alone()), b(Alone(16, 8));
  const std::vector<uint32_t> tokens = Tokens(0, 100);
  auto info = a.OpenAndFill(tokens);
  ASSERT_TRUE(info.ok()) << info.status();
  auto sent = SendTo(a, *info, b, TransferKind::kCopy);
  ASSERT_TRUE(sent.ok()) << sent.status();
  EXPECT_EQ(sent->pushed, 7u);
  EXPECT_EQ(sent->info.length, 100u);
  EXPECT_EQ(sent->info.canonical_length, 100u);
  EXPECT_EQ(sent->info.epoch, 1u);
  EXPECT_NE(sent->info.id, info->id);
  EXPECT_EQ(*b.WrongRows(sent->info.id, tokens), 0u);
  // It goes on there, and here.
  const std::vector<uint32_t> longer = Concat(tokens, Tokens(500, 40));
  auto on = b.Append(sent->info, longer);
  ASSERT_TRUE(on.ok()) << on.status();
  EXPECT_EQ(*b.WrongRows(on->id, longer), 0u);
  EXPECT_EQ(*a.WrongRows(info->id, tokens), 0u);
  ASSERT_TRUE(a.Append(*info, longer).ok());
  // Prompts find its full pages.
  PrefixReuse reuse;
  auto other = b.OpenAndFill(Concat(Tokens(0, 96), Tokens(900, 10)), &reuse);
  ASSERT_TRUE(other.ok()) << other.status();
  EXPECT_EQ(reuse.reused_tokens, 96u);
  EXPECT_EQ(b.host->Counters().checksum_failures, 0u);
}

TEST(SequenceTransferTest, OnlyWhatTheTargetLacksIsWanted) {
  HostUnderTest a(Alone()), b(Alone(16, 8));
  const std::vector<uint32_t> tokens = Tokens(0, 100);
  auto info = a.OpenAndFill(tokens);
  ASSERT_TRUE(info.ok()) << info.status();
  // The first three pages, and another fourth one.
  ASSERT_TRUE(b.OpenAndFill(Concat(Tokens(0, 48), Tokens(700, 16))).ok());
  const uint64_t free = FreeFrames(b);
  {
    auto from = TransfersOf(*a.host).BeginOutgoing(a.tenant, HandleOf(*info), TransferKind::kCopy,
                                                   "", Soon());
    ASSERT_TRUE(from.ok()) << from.status();
    auto to = TransfersOf(*b.host).BeginIncoming(b.tenant, (*from)->plan(), Soon());
    ASSERT_TRUE(to.ok()) << to.status();
    EXPECT_THAT(std::vector<uint32_t>((*to)->wanted().begin(), (*to)->wanted().end()),
                ElementsAre(3, 4, 5, 6));
    EXPECT_EQ((*to)->wanted_bytes(), 4 * b.model->geometry().group(0).page_bytes());
    EXPECT_EQ(FreeFrames(b), free - 4);
  }
  EXPECT_EQ(FreeFrames(b), free);
  auto sent = SendTo(a, *info, b, TransferKind::kCopy);
  ASSERT_TRUE(sent.ok()) << sent.status();
  EXPECT_EQ(sent->pushed, 4u);
  EXPECT_EQ(*b.WrongRows(sent->info.id, tokens), 0u);
  // Again: all but the tail is there, which has no name of its own.
  sent = SendTo(a, *info, b, TransferKind::kCopy);
  ASSERT_TRUE(sent.ok()) << sent.status();
  EXPECT_EQ(sent->pushed, 1u);
  EXPECT_EQ(*b.WrongRows(sent->info.id, tokens), 0u);
}

TEST(SequenceTransferTest, AMovedSequenceKeepsItsIdAndGetsTheNextEpoch) {
  HostUnderTest a(Alone()), b(Alone(16, 8));
  const std::vector<uint32_t> tokens = Tokens(0, 70);
  auto info = a.OpenAndFill(tokens);
  ASSERT_TRUE(info.ok()) << info.status();
  auto sent = SendTo(a, *info, b, TransferKind::kMove);
  ASSERT_TRUE(sent.ok()) << sent.status();
  EXPECT_EQ(sent->info.id, info->id);
  EXPECT_EQ(sent->info.epoch, info->epoch + 1);
  EXPECT_EQ(*b.WrongRows(info->id, tokens), 0u);
  // Whom it was open for there first has it.
  const auto twice = SendTo(a, *info, b, TransferKind::kMove);
  EXPECT_TRUE(absl::IsAlreadyExists(twice.status())) << twice.status();
  // Back again, under its own incarnation.
  ASSERT_TRUE(a.host->Close(a.tenant, info->id, info->epoch).ok());
  auto back = SendTo(b, sent->info, a, TransferKind::kMove);
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->info.id, info->id);
  EXPECT_EQ(back->info.epoch, info->epoch + 2);
  EXPECT_EQ(*a.WrongRows(info->id, tokens), 0u);
}

TEST(SequenceTransferTest, ASequenceThatIsBeingMovedIsReadAndNotChanged) {
  HostUnderTest a(Alone());
  const std::vector<uint32_t> tokens = Tokens(0, 40);
  const std::vector<uint32_t> longer = Tokens(0, 60);
  auto info = a.OpenAndFill(tokens);
  ASSERT_TRUE(info.ok()) << info.status();
  const auto refuses = [&](const absl::Status& status) {
    EXPECT_EQ(GetReason(status), error_reason::kSequenceMoved) << status;
    EXPECT_EQ(GetReasonMetadata(status, "address"), kTarget);
  };
  {
    auto from = TransfersOf(*a.host).BeginOutgoing(a.tenant, HandleOf(*info), TransferKind::kMove,
                                                   kTarget, Soon());
    ASSERT_TRUE(from.ok()) << from.status();
    refuses(a.Append(*info, longer).status());
    refuses(a.Step(*info, longer).status());
    refuses(a.host->Rewind(a.tenant, HandleOf(*info), 10).status());
    refuses(a.host->CloseUnchanged(a.tenant, HandleOf(*info)));
    refuses(a.host->Compact(a.tenant, HandleOf(*info), 100, false, Soon()).status());
    refuses(TransfersOf(*a.host)
                .BeginOutgoing(a.tenant, HandleOf(*info), TransferKind::kMove, kTarget, Soon())
                .status());
    // No number that a client could name ends it, nor does time.
    for (uint64_t id = 0; id < 1000; ++id) {
      ASSERT_TRUE(a.host->Abort(a.tenant, info->id, id).ok());
      ASSERT_FALSE(a.host->Commit(a.tenant, HandleOf(*info), id, {}).ok());
    }
    a.host->Tick();
    refuses(a.Append(*info, longer).status());
    EXPECT_EQ(*a.WrongRows(info->id, tokens), 0u);
    EXPECT_TRUE(a.host->Fork(a.tenant, HandleOf(*info), std::nullopt, Soon()).ok());
  }
  auto on = a.Append(*info, longer);
  ASSERT_TRUE(on.ok()) << on.status();
  EXPECT_EQ(*a.WrongRows(info->id, longer), 0u);
  // A hold that was kept ends by its number only.
  uint64_t hold = 0;
  {
    auto from = TransfersOf(*a.host).BeginOutgoing(a.tenant, HandleOf(*on), TransferKind::kMove,
                                                   kTarget, Soon());
    ASSERT_TRUE(from.ok()) << from.status();
    hold = (*from)->KeepHold();
  }
  TransfersOf(*a.host).EndHold(info->id, hold + 1);
  refuses(a.host->Rewind(a.tenant, HandleOf(*on), 10).status());
  TransfersOf(*a.host).EndHold(info->id, hold);
  EXPECT_TRUE(a.host->Rewind(a.tenant, HandleOf(*on), 10).ok());
  EXPECT_TRUE(a.host->Close(a.tenant, info->id, info->epoch).ok());
  a.host->Quiesce();
}

TEST(SequenceTransferTest, AHeldSequenceCanBeClosed) {
  HostUnderTest a(Alone());
  auto info = a.OpenAndFill(Tokens(0, 40));
  ASSERT_TRUE(info.ok()) << info.status();
  auto from = TransfersOf(*a.host).BeginOutgoing(a.tenant, HandleOf(*info), TransferKind::kMove,
                                                 kTarget, Soon());
  ASSERT_TRUE(from.ok()) << from.status();
  ASSERT_TRUE(a.host->Close(a.tenant, info->id, info->epoch).ok());
  EXPECT_FALSE(a.host->Has(info->id));
  from->reset();
  a.host->ClearCache(false);
  EXPECT_EQ(FreeFrames(a), 16u);
}

TEST(SequenceTransferTest, APageOfOtherBytesIsRefusedAndMayComeAgain) {
  HostUnderTest a(Alone()), b(Alone(16, 8));
  const std::vector<uint32_t> tokens = Tokens(0, 70);
  auto info = a.OpenAndFill(tokens);
  ASSERT_TRUE(info.ok()) << info.status();
  auto from = TransfersOf(*a.host).BeginOutgoing(a.tenant, HandleOf(*info), TransferKind::kCopy, "",
                                                 Soon());
  ASSERT_TRUE(from.ok()) << from.status();
  auto to = TransfersOf(*b.host).BeginIncoming(b.tenant, (*from)->plan(), Soon());
  ASSERT_TRUE(to.ok()) << to.status();
  for (const size_t at : {size_t{0}, size_t{99}, size_t{100}, size_t{700}}) {
    const absl::Status pushed =
        PushAll(**from, **to, [&](uint32_t page, std::vector<std::byte>& body) {
          if (page == 2) body[at] ^= std::byte{1};
        });
    EXPECT_TRUE(absl::IsDataLoss(pushed)) << pushed;
    EXPECT_EQ(GetReason(pushed), "PAGE_DAMAGED");
    EXPECT_EQ(GetReasonMetadata(pushed, "page"), "2");
  }
  EXPECT_EQ(b.host->Counters().checksum_failures, 4u);
  const auto early = (*to)->Commit();
  EXPECT_EQ(GetReason(early.status()), "PAGES_MISSING") << early.status();
  EXPECT_EQ(GetReasonMetadata(early.status(), "missing"), "3");
  EXPECT_EQ(GetReasonMetadata(early.status(), "first"), "2");
  EXPECT_EQ(b.host->Load().open_sequences, 0u);
  // Pages 0 and 1 are there: they are passed over, whatever comes.
  ASSERT_TRUE(PushAll(**from, **to, [&](uint32_t page, std::vector<std::byte>& body) {
                if (page < 2) body[0] ^= std::byte{1};
              }).ok());
  auto committed = (*to)->Commit();
  ASSERT_TRUE(committed.ok()) << committed.status();
  EXPECT_EQ(*b.WrongRows((*committed)->id, tokens), 0u);
}

TEST(SequenceTransferTest, BytesComeInOrderAndOnlyThoseAskedFor) {
  HostUnderTest a(Alone()), b(Alone(16, 8));
  auto info = a.OpenAndFill(Tokens(0, 40));
  ASSERT_TRUE(info.ok()) << info.status();
  ASSERT_TRUE(b.OpenAndFill(Tokens(0, 16)).ok());
  auto from = TransfersOf(*a.host).BeginOutgoing(a.tenant, HandleOf(*info), TransferKind::kCopy, "",
                                                 Soon());
  ASSERT_TRUE(from.ok()) << from.status();
  auto to = TransfersOf(*b.host).BeginIncoming(b.tenant, (*from)->plan(), Soon());
  ASSERT_TRUE(to.ok()) << to.status();
  const uint64_t page_bytes = (*from)->page_bytes(1);
  const std::vector<std::byte> bytes(page_bytes + 1);
  const std::span<const std::byte> some(bytes);
  const auto refuses = [&](uint32_t page, uint64_t offset, uint64_t count) {
    const auto written = (*to)->Write(page, offset, some.first(count));
    EXPECT_TRUE(absl::IsInvalidArgument(written.status())) << page << " " << offset << " " << count;
  };
  refuses(0, 0, 10);  // is here already
  refuses(3, 0, 10);  // there is none
  refuses(~uint32_t{0}, 0, 10);
  refuses(1, 10, 10);
  refuses(1, 0, 0);
  refuses(1, 0, page_bytes + 1);
  ASSERT_TRUE((*to)->Write(1, 0, some.first(10)).ok());
  refuses(1, 11, 10);
  refuses(1, ~uint64_t{0}, 10);
  refuses(2, 10, 10);
  refuses(1, 10, page_bytes - 9);
  ASSERT_TRUE((*to)->Write(1, 10, some.first(10)).ok());
  EXPECT_EQ((*to)->num_missing(), 2u);
}

TEST(SequenceTransferTest, FramesAreReservedAllOrNone) {
  HostUnderTest a(Alone()), b(Alone(8, 8));
  auto info = a.OpenAndFill(Tokens(0, 96));
  ASSERT_TRUE(info.ok()) << info.status();
  auto from = TransfersOf(*a.host).BeginOutgoing(a.tenant, HandleOf(*info), TransferKind::kCopy, "",
                                                 Soon());
  ASSERT_TRUE(from.ok()) << from.status();
  // Three frames are held by a sequence that has no store to go to.
  ASSERT_TRUE(b.OpenAndFill(Tokens(5000, 48)).ok());
  const auto reserve = [&](absl::Duration wait) {
    return TransfersOf(*b.host)
        .BeginIncoming(b.tenant, (*from)->plan(), HostUnderTest::In(wait))
        .status();
  };
  const absl::Status full = reserve(absl::Milliseconds(20));
  EXPECT_TRUE(absl::IsResourceExhausted(full)) << full;
  EXPECT_EQ(GetReason(full), error_reason::kPoolExhausted);
  EXPECT_EQ(GetReasonMetadata(full, "needed"), "6");
  EXPECT_EQ(GetReasonMetadata(full, "free"), "5");
  EXPECT_EQ(FreeFrames(b), 5u);
  HostUnderTest small(Alone(5, 9));
  const auto never = TransfersOf(*small.host).BeginIncoming(small.tenant, (*from)->plan(), Soon());
  EXPECT_EQ(GetReason(never.status()), error_reason::kPoolTooSmall) << never.status();
  EXPECT_EQ(FreeFrames(small), 5u);
}

TEST(SequenceTransferTest, OnlyRowsOfThisModelAndTenantComeIn) {
  HostUnderTest a(Alone());
  auto info = a.OpenAndFill(Tokens(0, 40));
  ASSERT_TRUE(info.ok()) << info.status();
  auto from = TransfersOf(*a.host).BeginOutgoing(a.tenant, HandleOf(*info), TransferKind::kCopy, "",
                                                 Soon());
  ASSERT_TRUE(from.ok()) << from.status();
  const TransferPlan& plan = (*from)->plan();
  HostUnderTest other_pages({.page_tokens = 32, .num_frames = 8, .no_store = true});
  HostUnderTest other_groups({.num_groups = 2, .num_frames = 8, .no_store = true});
  for (HostUnderTest* t : {&other_pages, &other_groups}) {
    const auto refused = TransfersOf(*t->host).BeginIncoming(t->tenant, plan, Soon());
    EXPECT_EQ(GetReason(refused.status()), "MODEL_MISMATCH") << refused.status();
    EXPECT_EQ(FreeFrames(*t), 8u * t->model->geometry().num_groups());
  }
  HostUnderTest b(Alone(8, 8));
  const Tenant other{"other", DeriveTenantSalt("secret", "other")};
  const auto refused = TransfersOf(*b.host).BeginIncoming(other, plan, Soon());
  EXPECT_TRUE(absl::IsInvalidArgument(refused.status())) << refused.status();
}

TEST(SequenceTransferTest, NothingOfAnotherTenantIsTakenForIts) {
  HostUnderTest a(Alone()), b(Alone(16, 8));
  const Tenant other{"other", DeriveTenantSalt("secret", "other")};
  auto info = a.OpenAndFill(Tokens(0, 48));
  ASSERT_TRUE(info.ok()) << info.status();
  // The same tokens of another tenant are here; and what the plan says is said as that tenant's.
  ASSERT_TRUE(b.OpenAndFill(Tokens(0, 48)).ok());
  auto from = TransfersOf(*a.host).BeginOutgoing(a.tenant, HandleOf(*info), TransferKind::kCopy, "",
                                                 Soon());
  ASSERT_TRUE(from.ok()) << from.status();
  TransferPlan plan = (*from)->plan();
  plan.state.tenant = other.name;
  auto to = TransfersOf(*b.host).BeginIncoming(other, plan, Soon());
  ASSERT_TRUE(to.ok()) << to.status();
  EXPECT_EQ((*to)->wanted().size(), 3u);
}

TEST(SequenceTransferTest, APlanThatCannotBeIsRefused) {
  HostUnderTest a({.num_groups = 2, .num_frames = 16, .no_store = true});
  HostUnderTest b({.num_groups = 2, .num_frames = 16, .no_store = true, .incarnation = 8});
  auto info = a.OpenAndFill(Tokens(0, 40));
  ASSERT_TRUE(info.ok()) << info.status();
  auto from = TransfersOf(*a.host).BeginOutgoing(a.tenant, HandleOf(*info), TransferKind::kCopy, "",
                                                 Soon());
  ASSERT_TRUE(from.ok()) << from.status();
  const auto refuses = [&](const std::function<void(TransferPlan&)>& change,
                           absl::string_view text) {
    TransferPlan plan = (*from)->plan();
    change(plan);
    const auto refused = TransfersOf(*b.host).BeginIncoming(b.tenant, std::move(plan), Soon());
    EXPECT_FALSE(refused.ok()) << text;
    EXPECT_THAT(std::string(refused.status().message()), HasSubstr(std::string(text)));
    EXPECT_EQ(FreeFrames(b), 32u);
  };
  ASSERT_EQ((*from)->plan().pages.size(), 6u);
  refuses([](TransferPlan& p) { p.state.groups[1][0].page = 0; }, "is of layer groups 0 and 1");
  refuses([](TransferPlan& p) { p.state.groups[1][0].page = 6; }, "names page 6 of 6");
  refuses([](TransferPlan& p) { p.pages.emplace_back(); }, "pages[6] is in no layer group");
  refuses([](TransferPlan& p) { p.pages[0].rows = 15; }, "pages[0].rows is 15");
  refuses([](TransferPlan& p) { p.pages[2].rows = 17; }, "pages[2].rows is 17");
  refuses([](TransferPlan& p) { p.pages[2].is_full = true; }, "of a full page");
  refuses([](TransferPlan& p) { p.state.groups[0][0].first_slot = ~uint32_t{0}; }, "");
  refuses([](TransferPlan& p) { p.state.groups[0].pop_back(); }, "ends at row 32 of 40");
  refuses([](TransferPlan& p) { p.state.tokens.resize((1 << 22) + 1); }, "");
  EXPECT_TRUE(TransfersOf(*b.host).BeginIncoming(b.tenant, (*from)->plan(), Soon()).ok());
}

TEST(SequenceTransferTest, PagesAloneGoIntoTheCache) {
  HostUnderTest a(Alone()), b(Alone(16, 8));
  const std::vector<uint32_t> tokens = Tokens(0, 70);
  auto info = a.OpenAndFill(tokens);
  ASSERT_TRUE(info.ok()) << info.status();
  auto sent = SendTo(a, *info, b, TransferKind::kPages);
  ASSERT_TRUE(sent.ok()) << sent.status();
  EXPECT_EQ(b.host->Load().open_sequences, 0u);
  EXPECT_EQ(FreeFrames(b), 12u);  // the tail has no key: nobody could find it
  PrefixReuse reuse;
  auto other = b.OpenAndFill(tokens, &reuse);
  ASSERT_TRUE(other.ok()) << other.status();
  EXPECT_EQ(reuse.reused_tokens, 64u);
  EXPECT_EQ(*b.WrongRows(other->id, tokens), 0u);
  EXPECT_EQ(b.host->ClearCache(false), 0u);
}

TEST(SequenceTransferTest, EveryKindOfLayerGroupComesWhole) {
  const auto model = MixedModel(8, 20, 5);
  HostUnderTest a({.num_frames = 64, .no_store = true, .model = model});
  HostUnderTest b({.num_frames = 64, .no_store = true, .incarnation = 8, .model = model});
  for (const uint32_t length : {1, 8, 30, 61}) {
    const std::vector<uint32_t> tokens = Tokens(1000 * length, length);
    auto info = a.OpenAndFill(tokens);
    ASSERT_TRUE(info.ok()) << info.status();
    ASSERT_EQ(*a.WrongHeld(info->id, tokens), 0) << length;
    auto sent = SendTo(a, *info, b, TransferKind::kMove);
    ASSERT_TRUE(sent.ok()) << sent.status();
    EXPECT_EQ(*b.WrongHeld(info->id, tokens), 0) << length;
    const std::vector<uint32_t> longer = Concat(tokens, Tokens(1000 * length + 500, 13));
    auto on = b.Append(sent->info, longer);
    ASSERT_TRUE(on.ok()) << on.status();
    EXPECT_EQ(*b.WrongHeld(info->id, longer), 0) << length;
    ASSERT_TRUE(b.host->Close(b.tenant, info->id, sent->info.epoch).ok());
    ASSERT_TRUE(a.host->Close(a.tenant, info->id, info->epoch).ok());
  }
  b.host->ClearCache(false);
  EXPECT_EQ(FreeFrames(b), 64u * model->geometry().num_groups());
}

TEST(SequenceTransferTest, AnEditedSequenceComesWithItsPositionsAndIsNotFound) {
  HostUnderTest a(Alone(32)), b(Alone(32, 8));
  const std::vector<uint32_t> tokens = Tokens(100, 70);
  auto info = a.OpenAndFill(tokens);
  ASSERT_TRUE(info.ok()) << info.status();
  const SequenceHandle handle = HandleOf(*info);
  const SequenceEdit edit = RemoveRangeEdit{info->number, {20, 30}};
  auto edited = a.host->Edit(a.tenant, {&handle, 1}, {&edit, 1});
  ASSERT_TRUE(edited.ok()) << edited.status();
  auto sent = SendTo(a, edited->infos.front(), b, TransferKind::kCopy);
  ASSERT_TRUE(sent.ok()) << sent.status();
  EXPECT_EQ(sent->info.length, 60u);
  EXPECT_EQ(sent->info.canonical_length, 20u);
  EXPECT_EQ(sent->info.end_position, 70);
  const auto bytes_of = [](HostUnderTest& t, SequenceId id) {
    std::string all;
    auto rows = t.host->PinRows(t.tenant, id, 0, 0, 0, Soon());
    EXPECT_TRUE(rows.ok()) << rows.status();
    for (uint32_t layer = 0; rows.ok() && layer < 2; ++layer) {
      for (const auto& run : (*rows)->Runs(layer, RowKind::kK)) {
        std::string bytes(run.num_bytes, '\0');
        EXPECT_TRUE(
            t.host->pool().Read(run.offset, std::as_writable_bytes(std::span<char>(bytes))).ok());
        all += bytes;
      }
    }
    return all;
  };
  EXPECT_EQ(bytes_of(b, sent->info.id), bytes_of(a, info->id));
  const auto contents = b.host->ReadContents(b.tenant, sent->info.id);
  ASSERT_TRUE(contents.ok()) << contents.status();
  EXPECT_EQ(contents->positions.at(19), 19);
  EXPECT_EQ(contents->positions.at(20), 30);
  PrefixReuse reuse;
  ASSERT_TRUE(b.OpenAndFill(contents->tokens, &reuse).ok());
  EXPECT_LE(reuse.reused_tokens, 20u);
}

TEST(SequenceTransferTest, PagesThatOnlyTheStoreOfTheSourceHasAreSentToo) {
  HostUnderTest a({.num_frames = 8}), b(Alone(16, 8));
  const std::vector<uint32_t> tokens = Tokens(0, 100);
  auto info = a.OpenAndFill(tokens);
  ASSERT_TRUE(info.ok()) << info.status();
  ASSERT_TRUE(a.host->EvictPages(0, Soon()).ok());
  ASSERT_EQ(FreeFrames(a), 8u);
  auto sent = SendTo(a, *info, b, TransferKind::kMove);
  ASSERT_TRUE(sent.ok()) << sent.status();
  EXPECT_EQ(*b.WrongRows(info->id, tokens), 0u);
}

TEST(SequenceTransferTest, ATailThatChangesWhileItIsCopiedIsSentAsItWas) {
  HostUnderTest a(Alone()), b(Alone(16, 8));
  const std::vector<uint32_t> tokens = Tokens(0, 40);
  auto info = a.OpenAndFill(tokens);
  ASSERT_TRUE(info.ok()) << info.status();
  auto from = TransfersOf(*a.host).BeginOutgoing(a.tenant, HandleOf(*info), TransferKind::kCopy, "",
                                                 Soon());
  ASSERT_TRUE(from.ok()) << from.status();
  // Its last rows are cut, and others take their slots.
  ASSERT_TRUE(a.host->Rewind(a.tenant, HandleOf(*info), 34).ok());
  const std::vector<uint32_t> other = Concat(Tokens(0, 34), Tokens(800, 30));
  auto again = a.host->Get(a.tenant, info->id);
  ASSERT_TRUE(a.Append(*again, other).ok());
  auto to = TransfersOf(*b.host).BeginIncoming(b.tenant, (*from)->plan(), Soon());
  ASSERT_TRUE(to.ok()) << to.status();
  ASSERT_TRUE(PushAll(**from, **to).ok());
  auto committed = (*to)->Commit();
  ASSERT_TRUE(committed.ok()) << committed.status();
  EXPECT_EQ(*b.WrongRows((*committed)->id, tokens), 0u);
  EXPECT_EQ(*a.WrongRows(info->id, other), 0u);
}

TEST(SequenceTransferTest, EveryFieldOfAPlanIsProven) {
  HostUnderTest a(Alone());
  auto info = a.OpenAndFill(Tokens(0, 40));
  ASSERT_TRUE(info.ok()) << info.status();
  auto from = TransfersOf(*a.host).BeginOutgoing(a.tenant, HandleOf(*info), TransferKind::kMove,
                                                 kTarget, Soon());
  ASSERT_TRUE(from.ok()) << from.status();
  const TransferPlan& plan = (*from)->plan();
  const std::string state = EncodeSessionState(plan.state);
  const Digest proof = ProveTransfer(plan, state, a.tenant.salt);
  EXPECT_EQ(ProveTransfer(plan, state, a.tenant.salt), proof);
  EXPECT_NE(ProveTransfer(plan, state, DeriveTenantSalt("secret", "other")), proof);
  EXPECT_NE(ProveTransfer(plan, state, DeriveTenantSalt("other", "default")), proof);
  EXPECT_NE(ProveTransfer(plan, state + "x", a.tenant.salt), proof);
  for (const std::function<void(TransferPlan&)>& change :
       std::vector<std::function<void(TransferPlan&)>>{
           [](TransferPlan& p) { p.kind = TransferKind::kCopy; },
           [](TransferPlan& p) { ++p.identity.epoch; },
           [](TransferPlan& p) { ++p.identity.id.number; },
           [](TransferPlan& p) { p.pages[1].ref.key.digest.bytes[31] ^= 1; },
           [](TransferPlan& p) { p.pages[1].ref.checksum.low ^= 1; },
           [](TransferPlan& p) { p.pages[1].ref.checksum.high ^= 1; },
           [](TransferPlan& p) { --p.pages[1].rows; },
           [](TransferPlan& p) { p.pages[1].is_full = false; },
           [](TransferPlan& p) { p.pages.pop_back(); },
           [](TransferPlan& p) { std::swap(p.pages[0], p.pages[1]); }}) {
    TransferPlan changed = plan;
    change(changed);
    EXPECT_NE(ProveTransfer(changed, state, a.tenant.salt), proof);
  }
}

}  // namespace
}  // namespace pagetide
