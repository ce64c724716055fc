// Tails whose rows another sequence references, while their owner writes behind those rows.
#include <gtest/gtest.h>

#include <span>
#include <string>
#include <utility>
#include <vector>

#include "tests/worker/model_host_fixture.h"
#include "tests/worker/watched_device.h"

namespace pagetide {
namespace {

SequenceHandle HandleOf(const SequenceInfo& info) {
  return {info.id, info.epoch, std::nullopt};
}

class SharedTailsTest : public ::testing::Test {
 protected:
  // A sequence that references rows [0, 10) of `from`.
  SequenceInfo CopyOf(const SequenceInfo& from) {
    const SequenceInfo to = t_.host->Open(t_.tenant, {}, {}, {})->info;
    const std::vector<SequenceHandle> both = {HandleOf(from), HandleOf(to)};
    const SequenceEdit copy = CopyRangeEdit{from.number, to.number, {0, 10}};
    const auto edited = t_.host->Edit(t_.tenant, both, {&copy, 1});
    EXPECT_TRUE(edited.ok()) << edited.status();
    return *t_.host->Get(t_.tenant, to.id);
  }
  std::string BytesOf(SequenceId id) {
    const GroupGeometry& geometry = t_.model->geometry().group(0);
    const auto rows = t_.host->PinRows(t_.tenant, id, 0, 0, 0, t_.Soon());
    EXPECT_TRUE(rows.ok()) << rows.status();
    if (!rows.ok()) return "";
    std::string all;
    for (uint32_t layer = 0; layer < geometry.num_layers(); ++layer) {
      for (RowKind kind : {RowKind::kK, RowKind::kV}) {
        for (const auto& run : (*rows)->Runs(layer, kind)) {
          std::string bytes(run.num_bytes, '\0');
          EXPECT_TRUE(
              t_.host->pool().Read(run.offset, std::as_writable_bytes(std::span(bytes))).ok());
          all += bytes;
        }
      }
    }
    return all;
  }
  void ExpectRestored(const SequenceInfo& info, uint64_t checkpoint) {
    const std::vector<uint32_t> other = Concat(Tokens(0, 10), Tokens(900, 5));
    ASSERT_TRUE(t_.Append(info, other).ok());
    EXPECT_EQ(*t_.WrongRows(info.id, other), 0u);
    const auto back = t_.host->RestoreCheckpoint(t_.tenant, HandleOf(info), checkpoint, t_.Soon());
    ASSERT_TRUE(back.ok()) << back.status();
    EXPECT_EQ(*t_.WrongRows(info.id, Tokens(0, 10)), 0u);
  }
  // While rows are written behind a tail that another sequence references, a checkpoint of that one
  // is taken. `is_sealed`: the tail is held by a checkpoint already, and the write goes to a copy.
  void CheckpointDuringAWrite(bool is_sealed) {
    const std::vector<uint32_t> tokens = Tokens(0, 30);
    const auto a = t_.OpenAndFill(std::span(tokens).first(10));
    ASSERT_TRUE(a.ok()) << a.status();
    if (is_sealed) {
      ASSERT_TRUE(t_.host->CreateCheckpoint(t_.tenant, HandleOf(*a), {}, t_.Soon()).ok());
    }
    const auto slot = t_.host->BeginAppend(t_.tenant, HandleOf(*a), "a", 10,
                                           std::span(tokens).subspan(10), {}, false, t_.Soon());
    ASSERT_TRUE(slot.ok()) << slot.status();
    const SequenceInfo b = CopyOf(*a);
    const auto checkpoint = t_.host->CreateCheckpoint(t_.tenant, HandleOf(b), {}, t_.Soon());
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    ASSERT_TRUE(t_.WriteAll(*slot, tokens).ok());
    const auto done = t_.host->Commit(t_.tenant, HandleOf(*a), slot->pending_id, {});
    ASSERT_TRUE(done.ok()) << done.status();
    EXPECT_EQ(*t_.WrongRows(a->id, tokens), 0u);
    EXPECT_EQ(*t_.WrongRows(b.id, Tokens(0, 10)), 0u);
    ExpectRestored(b, checkpoint->id);
    EXPECT_EQ(*t_.WrongRows(a->id, tokens), 0u);
    t_.host->Quiesce();
  }

  WatchedDevice device_;
  HostUnderTest t_{HostUnderTest::Setup{.device = &device_}};
};

// Rows that were copied to and fro stand twice in one page: more rows than a page has slots.
TEST_F(SharedTailsTest, AForkOfRowsThatStandTwiceInATailSharesIt) {
  const auto a = t_.OpenAndFill(Tokens(0, 10));
  ASSERT_TRUE(a.ok()) << a.status();
  const auto bystander = t_.OpenAndFill(Tokens(500, 64));
  ASSERT_TRUE(bystander.ok()) << bystander.status();
  const SequenceInfo b = CopyOf(*a);
  const std::vector<SequenceHandle> both = {HandleOf(*a), HandleOf(b)};
  const SequenceEdit back = CopyRangeEdit{b.number, a->number, {0, 10}, /*allow_overlap=*/true};
  const auto edited = t_.host->Edit(t_.tenant, both, {&back, 1});
  ASSERT_TRUE(edited.ok()) << edited.status();
  const std::string rows = BytesOf(a->id);
  const auto fork = t_.host->Fork(t_.tenant, HandleOf(*a), 20, t_.Soon());
  ASSERT_TRUE(fork.ok()) << fork.status();
  EXPECT_EQ(fork->copied_rows, 0u);
  EXPECT_EQ(BytesOf(fork->info.id), rows);
  EXPECT_EQ(BytesOf(a->id), rows);
  EXPECT_EQ(*t_.WrongRows(bystander->id, Tokens(500, 64)), 0u);
}

TEST_F(SharedTailsTest, ACheckpointOfOneSequenceDoesNotEndTheWriteOfAnother) {
  CheckpointDuringAWrite(/*is_sealed=*/false);
}

TEST_F(SharedTailsTest, ACheckpointOfOneSequenceDoesNotEndTheWriteToACopyOfATail) {
  CheckpointDuringAWrite(/*is_sealed=*/true);
}

TEST_F(SharedTailsTest, ACheckpointOfATailWhoseWriteWasAbortedSealsIt) {
  const std::vector<uint32_t> tokens = Tokens(0, 14);
  const auto a = t_.OpenAndFill(std::span(tokens).first(10));
  ASSERT_TRUE(a.ok()) << a.status();
  const auto slot = t_.host->BeginAppend(t_.tenant, HandleOf(*a), "a", 10,
                                         std::span(tokens).subspan(10), {}, false, t_.Soon());
  ASSERT_TRUE(slot.ok()) << slot.status();
  const SequenceInfo b = CopyOf(*a);
  const auto checkpoint = t_.host->CreateCheckpoint(t_.tenant, HandleOf(b), {}, t_.Soon());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  ASSERT_TRUE(t_.host->Abort(t_.tenant, a->id, slot->pending_id).ok());
  ASSERT_TRUE(t_.host->CreateCheckpoint(t_.tenant, HandleOf(b), {}, t_.Soon()).ok());
  ASSERT_TRUE(t_.Append(*a, tokens).ok());
  EXPECT_EQ(*t_.WrongRows(a->id, tokens), 0u);
  ExpectRestored(b, checkpoint->id);
  EXPECT_EQ(*t_.WrongRows(a->id, tokens), 0u);
  t_.host->Quiesce();
}

TEST_F(SharedTailsTest, ACheckpointWhileWritesAreBeingOpenedLeavesTheirTails) {
  // The first of two writes copies its tail, which takes place without the host's lock.
  const auto copied = t_.OpenAndFill(Tokens(1000, 5));
  ASSERT_TRUE(copied.ok()) << copied.status();
  CopyOf(t_.Append(*copied, Concat(Tokens(1000, 5), Tokens(1500, 5))).value());
  const std::vector<uint32_t> tokens = Tokens(0, 30);
  const auto a = t_.OpenAndFill(std::span(tokens).first(10));
  ASSERT_TRUE(a.ok()) << a.status();
  const std::vector<ReserveItem> items = {{HandleOf(*copied), 3}, {HandleOf(*a), 20}};
  SequenceInfo b;
  absl::StatusOr<CheckpointInfo> checkpoint;
  device_.OnNextCopy([&] {
    b = CopyOf(*a);
    checkpoint = t_.host->CreateCheckpoint(t_.tenant, HandleOf(b), {}, t_.Soon());
  });
  const auto slots = t_.host->Reserve(t_.tenant, items, absl::Seconds(60), false, t_.Soon());
  ASSERT_TRUE(slots.ok()) << slots.status();
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  ASSERT_TRUE(t_.WriteAll(slots->at(1), tokens).ok());
  const auto done = t_.host->Commit(t_.tenant, HandleOf(*a), slots->at(1).pending_id,
                                    std::span(tokens).subspan(10));
  ASSERT_TRUE(done.ok()) << done.status();
  EXPECT_EQ(*t_.WrongRows(a->id, tokens), 0u);
  ExpectRestored(b, checkpoint->id);
  t_.host->Quiesce();
}

}  // namespace
}  // namespace pagetide
