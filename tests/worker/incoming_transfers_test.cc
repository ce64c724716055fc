// The table of reserved transfers: whose they are, how they end, and that nothing of them is left.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/metrics.h"
#include "tests/worker/model_host_fixture.h"
#include "worker/incoming_transfers.h"

namespace pagetide {
namespace {

MonotonicTime Soon() {
  return HostUnderTest::Soon();
}

class IncomingTransfersTest : public ::testing::Test {
 protected:
  void SetUp() override {
    tokens_ = Tokens(0, 64);
    auto info = a_.OpenAndFill(tokens_);
    ASSERT_TRUE(info.ok()) << info.status();
    auto from = TransfersOf(*a_.host).BeginOutgoing(a_.tenant, {info->id, info->epoch, {}},
                                                    TransferKind::kCopy, "", Soon());
    ASSERT_TRUE(from.ok()) << from.status();
    from_ = *std::move(from);
  }
  absl::StatusOr<IncomingTransfers::Reserved> Reserve(absl::Duration ttl = absl::ZeroDuration()) {
    return transfers_.Reserve(b_.tenant, b_.host, from_->plan(), ttl, Soon());
  }
  // The first `count` pages that are wanted.
  absl::Status PushSome(IncomingTransfers::Push& push, const IncomingTransfers::Reserved& reserved,
                        size_t count) {
    return from_->ReadPages(
        std::span(reserved.wanted).first(count), Soon(),
        [&](uint32_t page, std::span<const std::byte> body) { return push.Write(page, 0, body); });
  }
  uint64_t FreeFrames() { return b_.host->Usage().front().free_frames; }
  double Metric(const std::string& name) {
    double sum = 0;
    for (const MetricSample& sample : metrics_.Snapshot()) {
      if (sample.name == name) sum += sample.value;
    }
    return sum;
  }

  HostUnderTest a_{{.num_frames = 16, .no_store = true}};
  HostUnderTest b_{{.num_frames = 16, .no_store = true, .incarnation = 8}};
  FakeClock clock_;
  InMemoryMetrics metrics_;
  IncomingTransfers transfers_{
      {.incarnation = 8, .max_open = 3, .max_open_of_tenant = 2}, &clock_, &metrics_};
  std::vector<uint32_t> tokens_;
  std::unique_ptr<OutgoingSequence> from_;
};

TEST_F(IncomingTransfersTest, ACommitIsAnsweredAgainAndCannotBeAborted) {
  auto reserved = Reserve();
  ASSERT_TRUE(reserved.ok()) << reserved.status();
  EXPECT_EQ(reserved->wanted.size(), 4u);
  EXPECT_EQ(reserved->ttl, absl::Seconds(10));
  bool is_repeat = false;
  EXPECT_EQ(GetReason(transfers_.Commit(b_.tenant, reserved->id, &is_repeat).status()),
            "PAGES_MISSING");
  {
    auto push = transfers_.BeginPush(b_.tenant, reserved->id);
    ASSERT_TRUE(push.ok()) << push.status();
    // One at a time.
    EXPECT_EQ(GetReason(transfers_.BeginPush(b_.tenant, reserved->id).status()), "TRANSFER_BUSY");
    EXPECT_EQ(GetReason(transfers_.Commit(b_.tenant, reserved->id, &is_repeat).status()),
              "TRANSFER_BUSY");
    ASSERT_TRUE(PushSome(**push, *reserved, 3).ok());
    EXPECT_EQ((*push)->num_missing(), 1u);
  }
  {
    auto push = transfers_.BeginPush(b_.tenant, reserved->id);
    ASSERT_TRUE(push.ok()) << push.status();
    ASSERT_TRUE(PushSome(**push, *reserved, 4).ok());
    EXPECT_EQ((*push)->received_pages(), 1u);
  }
  auto committed = transfers_.Commit(b_.tenant, reserved->id, &is_repeat);
  ASSERT_TRUE(committed.ok()) << committed.status();
  EXPECT_FALSE(is_repeat);
  EXPECT_EQ(*b_.WrongRows(committed->info->id, tokens_), 0u);
  EXPECT_EQ(transfers_.num_open(), 0u);
  auto again = transfers_.Commit(b_.tenant, reserved->id, &is_repeat);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_TRUE(is_repeat);
  EXPECT_EQ(again->info->id, committed->info->id);
  EXPECT_EQ(b_.host->Load().open_sequences, 1u);
  auto aborted = transfers_.Abort(b_.tenant, reserved->id);
  ASSERT_TRUE(aborted.ok()) << aborted.status();
  ASSERT_TRUE(aborted->has_value());
  EXPECT_EQ((*aborted)->info->id, committed->info->id);
  // Not for ever.
  clock_.Advance(absl::Minutes(21));
  ASSERT_TRUE(b_.host->Close(b_.tenant, committed->info->id, 1).ok());
  b_.host->ClearCache(false);
  auto next = Reserve();
  ASSERT_TRUE(next.ok()) << next.status();
  EXPECT_NE(next->id, reserved->id);
  {
    auto push = transfers_.BeginPush(b_.tenant, next->id);
    ASSERT_TRUE(PushSome(**push, *next, 4).ok());
  }
  ASSERT_TRUE(transfers_.Commit(b_.tenant, next->id, &is_repeat).ok());
  EXPECT_FALSE(transfers_.Abort(b_.tenant, reserved->id)->has_value());
  EXPECT_EQ(Metric("pagetide_transfer_ended_total"), 2);
  EXPECT_EQ(Metric("pagetide_transfer_received_pages_total"), 8);
}

TEST_F(IncomingTransfersTest, CopiesDoNotPushTheMemoryOfAMoveOut) {
  IncomingTransfers transfers({.incarnation = 8, .max_remembered = 2}, &clock_, &metrics_);
  bool is_repeat = false;
  uint64_t moved = 0;
  const auto commit = [&](TransferKind kind) -> absl::StatusOr<std::string> {
    TransferPlan plan = from_->plan();
    plan.kind = kind;
    if (kind == TransferKind::kMove) plan.identity = {{7, 1000 + ++moved}, 1};
    auto reserved = transfers.Reserve(b_.tenant, b_.host, plan, absl::ZeroDuration(), Soon());
    if (!reserved.ok()) return reserved.status();
    {
      auto push = transfers.BeginPush(b_.tenant, reserved->id);
      const absl::Status pushed = PushSome(**push, *reserved, reserved->wanted.size());
      if (!pushed.ok()) return pushed;
    }
    const absl::Status status = transfers.Commit(b_.tenant, reserved->id, &is_repeat).status();
    if (!status.ok()) return status;
    return reserved->id;
  };
  const auto move = commit(TransferKind::kMove);
  ASSERT_TRUE(move.ok()) << move.status();
  const auto copy = commit(TransferKind::kCopy);
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(commit(TransferKind::kPages).ok());
  EXPECT_TRUE(transfers.Abort(b_.tenant, *move)->has_value());
  EXPECT_FALSE(transfers.Abort(b_.tenant, *copy)->has_value());
  // No more moves than can be remembered; later there is room again.
  ASSERT_TRUE(commit(TransferKind::kMove).ok());
  EXPECT_EQ(GetReason(commit(TransferKind::kMove).status()), "TOO_MANY_TRANSFERS");
  EXPECT_TRUE(transfers.Abort(b_.tenant, *move)->has_value());
  clock_.Advance(absl::Minutes(21));
  EXPECT_TRUE(commit(TransferKind::kMove).ok());
  EXPECT_FALSE(transfers.Abort(b_.tenant, *move)->has_value());
}

TEST_F(IncomingTransfersTest, WhatNobodyPushesToExpires) {
  auto reserved = Reserve(absl::Seconds(3));
  ASSERT_TRUE(reserved.ok()) << reserved.status();
  EXPECT_EQ(FreeFrames(), 12u);
  EXPECT_EQ(Metric("pagetide_transfer_open"), 1);
  clock_.Advance(absl::Seconds(2));
  {
    auto push = transfers_.BeginPush(b_.tenant, reserved->id);
    ASSERT_TRUE(push.ok()) << push.status();
    clock_.Advance(absl::Seconds(2));
    ASSERT_TRUE(PushSome(**push, *reserved, 1).ok());  // puts the end off
    clock_.Advance(absl::Seconds(2));
    transfers_.Expire();
    EXPECT_EQ(transfers_.num_open(), 1u);
    clock_.Advance(absl::Seconds(1));
    transfers_.Expire();
    EXPECT_EQ(transfers_.num_open(), 0u);
    // Who pushes still has the frames, and is told.
    EXPECT_EQ(FreeFrames(), 12u);
    EXPECT_EQ(GetReason(PushSome(**push, *reserved, 2)), "TRANSFER_NOT_FOUND");
  }
  EXPECT_EQ(FreeFrames(), 16u);
  bool is_repeat = false;
  EXPECT_EQ(GetReason(transfers_.Commit(b_.tenant, reserved->id, &is_repeat).status()),
            "TRANSFER_NOT_FOUND");
  EXPECT_FALSE(transfers_.Abort(b_.tenant, reserved->id)->has_value());
  EXPECT_EQ(Metric("pagetide_transfer_open"), 0);
  EXPECT_EQ(Metric("pagetide_transfer_ended_total"), 1);
}

TEST_F(IncomingTransfersTest, AnAbortFreesTheFramesAndIsIdempotent) {
  auto reserved = Reserve();
  ASSERT_TRUE(reserved.ok()) << reserved.status();
  {
    auto push = transfers_.BeginPush(b_.tenant, reserved->id);
    ASSERT_TRUE(PushSome(**push, *reserved, 2).ok());
  }
  for (int i = 0; i < 2; ++i) {
    auto aborted = transfers_.Abort(b_.tenant, reserved->id);
    ASSERT_TRUE(aborted.ok()) << aborted.status();
    EXPECT_FALSE(aborted->has_value());
  }
  EXPECT_EQ(FreeFrames(), 16u);
  EXPECT_EQ(GetReason(transfers_.BeginPush(b_.tenant, reserved->id).status()),
            "TRANSFER_NOT_FOUND");
}

TEST_F(IncomingTransfersTest, AnotherTenantsTransferIsNotThere) {
  auto reserved = Reserve();
  ASSERT_TRUE(reserved.ok()) << reserved.status();
  const Tenant other{"other", DeriveTenantSalt("secret", "other")};
  bool is_repeat = false;
  EXPECT_EQ(GetReason(transfers_.BeginPush(other, reserved->id).status()), "TRANSFER_NOT_FOUND");
  EXPECT_EQ(GetReason(transfers_.Commit(other, reserved->id, &is_repeat).status()),
            "TRANSFER_NOT_FOUND");
  EXPECT_FALSE(transfers_.Abort(other, reserved->id)->has_value());
  EXPECT_EQ(transfers_.num_open(), 1u);
  {
    auto push = transfers_.BeginPush(b_.tenant, reserved->id);
    ASSERT_TRUE(PushSome(**push, *reserved, 4).ok());
  }
  ASSERT_TRUE(transfers_.Commit(b_.tenant, reserved->id, &is_repeat).ok());
  EXPECT_EQ(GetReason(transfers_.Commit(other, reserved->id, &is_repeat).status()),
            "TRANSFER_NOT_FOUND");
  EXPECT_FALSE(transfers_.Abort(other, reserved->id)->has_value());
}

TEST_F(IncomingTransfersTest, ThereAreOnlySoMany) {
  auto first = Reserve();
  auto second = Reserve();
  ASSERT_TRUE(first.ok() && second.ok()) << first.status() << second.status();
  EXPECT_EQ(FreeFrames(), 8u);
  const auto third = Reserve();
  EXPECT_TRUE(absl::IsResourceExhausted(third.status())) << third.status();
  EXPECT_EQ(GetReason(third.status()), "TOO_MANY_TRANSFERS");
  EXPECT_TRUE(GetRetryDelay(third.status()).has_value());
  ASSERT_TRUE(transfers_.Abort(b_.tenant, first->id).ok());
  EXPECT_TRUE(Reserve().ok());
  for (const absl::Duration ttl :
       {absl::Seconds(61), -absl::Seconds(1), absl::InfiniteDuration()}) {
    EXPECT_TRUE(absl::IsInvalidArgument(Reserve(ttl).status()));
  }
}

}  // namespace
}  // namespace pagetide
