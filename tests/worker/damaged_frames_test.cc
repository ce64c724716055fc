// Bytes that change in a frame, as a failing memory would change them: a spill finds it.
#include <gtest/gtest.h>

#include <functional>
#include <vector>

#include "kvstore/fault_injecting_page_store.h"
#include "tests/support/timing.h"
#include "tests/worker/model_host_fixture.h"
#include "tests/worker/watched_device.h"

namespace pagetide {
namespace {

using ::pagetide::testing::Eventually;

TEST(DamagedFramesTest, APageThatSomebodyReadsIsFoundOnceAndIsNobodysFromThenOn) {
  MemoryPageStore memory;
  FaultInjectingPageStore store(&memory);
  store.FailWith(absl::UnavailableError("the store is down"));
  HostUnderTest t({.num_frames = 4, .store = &store});
  const std::vector<uint32_t> tokens = Tokens(0, 40);  // two full pages and 8 rows
  const auto info = t.OpenAndFill(tokens);
  ASSERT_TRUE(info.ok()) << info.status();
  t.host->Quiesce();
  auto reader = t.host->PinRows(t.tenant, info->id, 0, 0, 0, t.Soon());
  ASSERT_TRUE(reader.ok()) << reader.status();
  const uint64_t at = (*reader)->Runs(0, RowKind::kK).front().offset;
  std::byte byte;
  ASSERT_TRUE(t.host->pool().Read(at + 3, {&byte, 1}).ok());
  byte ^= std::byte{1};
  ASSERT_TRUE(t.host->pool().Write(at + 3, {&byte, 1}).ok());

  store.FailWith(absl::OkStatus());
  ASSERT_TRUE(Eventually([&] { return !t.host->Load().is_store_degraded; }));
  for (int tick = 0; tick < 3; ++tick) {
    t.host->Tick();
    t.host->Quiesce();
  }
  EXPECT_EQ(t.host->Counters().checksum_failures, 1u);
  EXPECT_EQ(t.host->Counters().pages_written_through, 1u) << "the other page";
  EXPECT_EQ(t.host->Load().owed_pages, 0u);
  EXPECT_EQ(t.host->LookupPrefix(t.tenant, tokens, {}, {})->reused_tokens, 0u);
  const auto late = t.host->PinRows(t.tenant, info->id, 0, 0, 0, t.Soon());
  EXPECT_EQ(GetReason(late.status()), "PREFIX_LOST") << late.status();
  EXPECT_EQ(t.host->Get(t.tenant, info->id)->length, 0u);

  // The reader's frame is not given to others before it lets go.
  ASSERT_TRUE(t.OpenAndFill(Tokens(5000, 16)).ok());
  std::byte now;
  ASSERT_TRUE(t.host->pool().Read(at + 3, {&now, 1}).ok());
  EXPECT_EQ(now, byte);
  EXPECT_EQ(t.host->Usage().front().free_frames, 0u);
  reader = absl::CancelledError("lets go");
  EXPECT_EQ(t.host->Usage().front().free_frames, 2u) << "its frame and that of the 8 rows";
  t.host->Quiesce();
}

// The rows may have been computed from the damage: nobody else may find them.
TEST(DamagedFramesTest, RowsComputedOverAPageThatWasFoundDamagedGetNoKey) {
  MemoryPageStore memory;
  FaultInjectingPageStore store(&memory);
  store.FailWith(absl::UnavailableError("the store is down"));
  HostUnderTest t({.num_frames = 12, .store = &store});
  const std::vector<uint32_t> tokens = Tokens(0, 64);
  const std::span<const uint32_t> prefix = std::span(tokens).first(32);
  const auto info = t.OpenAndFill(prefix);
  ASSERT_TRUE(info.ok()) << info.status();
  t.host->Quiesce();
  auto slot = t.host->BeginAppend(t.tenant, {info->id, info->epoch, std::nullopt}, "a", 32,
                                  std::span(tokens).subspan(32), {}, /*pin_prefix=*/true, t.Soon());
  ASSERT_TRUE(slot.ok()) << slot.status();
  uint64_t at = 0;
  {
    auto rows = t.host->PinRows(t.tenant, info->id, 0, 0, 0, t.Soon());
    ASSERT_TRUE(rows.ok()) << rows.status();
    at = (*rows)->Runs(0, RowKind::kK).front().offset;
  }
  std::byte byte;
  ASSERT_TRUE(t.host->pool().Read(at + 3, {&byte, 1}).ok());
  byte ^= std::byte{1};
  ASSERT_TRUE(t.host->pool().Write(at + 3, {&byte, 1}).ok());
  store.FailWith(absl::OkStatus());
  ASSERT_TRUE(Eventually([&] {
    t.host->Tick();
    return t.host->Counters().checksum_failures == 1;
  }));
  ASSERT_TRUE(t.WriteAll(*slot, tokens).ok());
  const auto committed =
      t.host->Commit(t.tenant, {info->id, info->epoch, std::nullopt}, slot->pending_id, {});
  ASSERT_TRUE(committed.ok()) << committed.status();

  // Another one computes the lost page anew, and with it all that hangs on it could be found.
  const auto again = t.OpenAndFill(prefix);
  ASSERT_TRUE(again.ok()) << again.status();
  t.host->Quiesce();
  EXPECT_EQ(t.host->LookupPrefix(t.tenant, tokens, {}, {})->reused_tokens, 32u);
  const auto num_stored = [&] { return memory.GetStats(MonotonicTime::InfiniteFuture())->pages; };
  EXPECT_TRUE(Eventually([&] {
    t.host->Tick();
    t.host->Quiesce();
    return num_stored() >= 2;
  }));
  EXPECT_EQ(num_stored(), 2u) << "the prefix, and nothing that hangs on it";
  const auto late = t.host->PinRows(t.tenant, info->id, 0, 0, 0, t.Soon());
  EXPECT_EQ(GetReason(late.status()), "PREFIX_LOST") << late.status();
}

// Rows that are copied out of a page while a spill finds it damaged must not become rows of a good
// page.
class DamagedCopyTest : public ::testing::Test {
 protected:
  // A sequence of two full pages, which the store was never sent, and 8 rows.
  SequenceHandle Fill() {
    store_.FailWith(absl::UnavailableError("the store is down"));
    const auto info = t_.OpenAndFill(Tokens(0, 40));
    EXPECT_TRUE(info.ok()) << info.status();
    t_.host->Quiesce();
    return {info->id, info->epoch, std::nullopt};
  }
  // At the next copy the first page's bytes change, and the store takes pages again.
  void DamageDuringTheNextCopy(SequenceId id) {
    const auto rows = t_.host->PinRows(t_.tenant, id, 0, 0, 0, t_.Soon());
    ASSERT_TRUE(rows.ok()) << rows.status();
    const uint64_t at = (*rows)->Runs(0, RowKind::kK).front().offset;
    device_.OnNextCopy([this, at] {
      std::byte byte;
      ASSERT_TRUE(t_.host->pool().Read(at + 3, {&byte, 1}).ok());
      byte ^= std::byte{1};
      ASSERT_TRUE(t_.host->pool().Write(at + 3, {&byte, 1}).ok());
      store_.FailWith(absl::OkStatus());
      ASSERT_TRUE(Eventually([&] {
        t_.host->Tick();
        return t_.host->Counters().checksum_failures == 1;
      }));
    });
  }

  MemoryPageStore memory_;
  FaultInjectingPageStore store_{&memory_};
  WatchedDevice device_;
  HostUnderTest t_{HostUnderTest::Setup{.num_frames = 8, .store = &store_, .device = &device_}};
};

TEST_F(DamagedCopyTest, ACompactionTellsWhatWasLost) {
  SequenceHandle handle = Fill();
  const uint64_t number = t_.host->Get(t_.tenant, handle.id)->number;
  const SequenceEdit edit = RemoveRangeEdit{number, {3, 8}};
  const auto edited = t_.host->Edit(t_.tenant, {&handle, 1}, {&edit, 1});
  ASSERT_TRUE(edited.ok()) << edited.status();
  DamageDuringTheNextCopy(handle.id);
  const auto compacted = t_.host->Compact(t_.tenant, handle, 1000, false, t_.Soon());
  EXPECT_EQ(GetReason(compacted.status()), "PREFIX_LOST") << compacted.status();
  EXPECT_EQ(t_.host->Get(t_.tenant, handle.id)->length, 0u);
  t_.host->Quiesce();
}

TEST_F(DamagedCopyTest, AWriteBehindACopiedTailTellsWhatWasLost) {
  const SequenceHandle handle = Fill();
  ASSERT_TRUE(t_.host->Rewind(t_.tenant, handle, 10).ok());
  DamageDuringTheNextCopy(handle.id);
  const auto slot =
      t_.host->BeginAppend(t_.tenant, handle, "a", 10, Tokens(700, 5), {}, false, t_.Soon());
  EXPECT_EQ(GetReason(slot.status()), "PREFIX_LOST") << slot.status();
  EXPECT_EQ(t_.host->Get(t_.tenant, handle.id)->length, 0u);
  t_.host->Quiesce();
}

}  // namespace
}  // namespace pagetide
