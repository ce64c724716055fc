// Sequences between two hosts without a store: what moves, and what does not.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "tests/worker/sequence_transfer_fixture.h"
#include "tests/worker/watched_device.h"

namespace pagetide {
namespace {

using ::testing::ElementsAre;

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

TEST(SequenceTransferTest, AHeldSequenceIsClosedByItsMoveOnly) {
  HostUnderTest a(Alone());
  auto info = a.OpenAndFill(Tokens(0, 40));
  ASSERT_TRUE(info.ok()) << info.status();
  auto from = TransfersOf(*a.host).BeginOutgoing(a.tenant, HandleOf(*info), TransferKind::kMove,
                                                 kTarget, Soon());
  ASSERT_TRUE(from.ok()) << from.status();
  EXPECT_EQ(GetReason(a.host->Close(a.tenant, info->id, info->epoch)),
            error_reason::kSequenceMoved);
  EXPECT_TRUE(a.host->Has(info->id));
  EXPECT_FALSE(TransfersOf(*a.host).CloseMoved(a.tenant, info->id, info->epoch + 1).ok());
  ASSERT_TRUE(TransfersOf(*a.host).CloseMoved(a.tenant, info->id, info->epoch).ok());
  EXPECT_FALSE(a.host->Has(info->id));
  from->reset();
  a.host->ClearCache(false);
  EXPECT_EQ(FreeFrames(a), 16u);
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

TEST(SequenceTransferTest, ACopyOfASequenceThatIsAppendedToMeanwhileIsWhatItWas) {
  WatchedDevice device(/*has_host_view=*/true);
  HostUnderTest a({.num_groups = 2, .num_frames = 16, .no_store = true, .device = &device});
  HostUnderTest b({.num_groups = 2, .num_frames = 16, .no_store = true, .incarnation = 8});
  const std::vector<uint32_t> tokens = Tokens(0, 40);
  auto info = a.OpenAndFill(tokens);
  ASSERT_TRUE(info.ok()) << info.status();
  // The tail of the first group is being copied, that of the second is not yet described: both
  // fill up and get keys.
  const std::vector<uint32_t> longer = Concat(tokens, Tokens(800, 30));
  auto slot = a.host->BeginAppend(a.tenant, HandleOf(*info), "a", info->length,
                                  std::span(longer).subspan(info->length), {}, false, Soon());
  ASSERT_TRUE(slot.ok()) << slot.status();
  ASSERT_TRUE(a.WriteAll(*slot, longer).ok());
  absl::Status appended = absl::UnknownError("the device was not read");
  device.OnNextRead(
      [&] { appended = a.host->Commit(a.tenant, HandleOf(*info), slot->pending_id, {}).status(); });
  auto from = TransfersOf(*a.host).BeginOutgoing(a.tenant, HandleOf(*info), TransferKind::kCopy, "",
                                                 Soon());
  ASSERT_TRUE(from.ok()) << from.status();
  ASSERT_TRUE(appended.ok()) << appended;
  for (const TransferPage& page : (*from)->plan().pages) {
    EXPECT_EQ(page.rows, page.is_full ? 16u : 8u);
  }
  EXPECT_EQ(std::ranges::count((*from)->plan().pages, false, &TransferPage::is_full), 2);
  auto to = TransfersOf(*b.host).BeginIncoming(b.tenant, (*from)->plan(), Soon());
  ASSERT_TRUE(to.ok()) << to.status();
  const absl::Status pushed = PushAll(**from, **to);
  ASSERT_TRUE(pushed.ok()) << pushed;
  auto committed = (*to)->Commit();
  ASSERT_TRUE(committed.ok()) << committed.status();
  EXPECT_EQ(*b.WrongRows((*committed)->id, tokens), 0u);
  EXPECT_EQ(*a.WrongRows(info->id, longer), 0u);
}

}  // namespace
}  // namespace pagetide
