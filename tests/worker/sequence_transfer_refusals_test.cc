// Transfers between two hosts that are refused: other bytes, no room, another model or tenant,
// plans that cannot be.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "tests/worker/sequence_transfer_fixture.h"

namespace pagetide {
namespace {

using ::testing::HasSubstr;

TEST(SequenceTransferRefusalsTest, APageOfOtherBytesIsRefusedAndMayComeAgain) {
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

TEST(SequenceTransferRefusalsTest, BytesComeInOrderAndOnlyThoseAskedFor) {
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

TEST(SequenceTransferRefusalsTest, FramesAreReservedAllOrNone) {
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

TEST(SequenceTransferRefusalsTest, OnlyRowsOfThisModelAndTenantComeIn) {
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

TEST(SequenceTransferRefusalsTest, NothingOfAnotherTenantIsTakenForIts) {
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

TEST(SequenceTransferRefusalsTest, APlanThatCannotBeIsRefused) {
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

TEST(SequenceTransferRefusalsTest, EveryFieldOfAPlanIsProven) {
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
