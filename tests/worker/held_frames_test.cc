// Who holds frames, in which order, and for how long: leases of tables over all layer groups, idle
// appends, and calls whose restores fail.
#include <gtest/gtest.h>

#include <thread>

#include "kvstore/fault_injecting_page_store.h"
#include "tests/support/timing.h"
#include "tests/worker/model_host_fixture.h"

namespace pagetide {
namespace {

using testing::Eventually;

class HeldFramesTest : public ::testing::Test {
 protected:
  // A sequence of `tokens` whose pages are in the store only.
  static SequenceInfo StoredSequence(HostUnderTest& t, std::span<const uint32_t> tokens) {
    auto info = t.OpenAndFill(tokens);
    EXPECT_TRUE(info.ok()) << info.status();
    EXPECT_TRUE(t.host->EvictPages(0, t.Soon()).ok());
    EXPECT_EQ(t.host->Get(t.tenant, info->id)->resident_pages, 0u);
    return *info;
  }
  // Until `num_more` calls more than `before` have begun to wait for frames.
  static bool AreWaiting(HostUnderTest& t, uint64_t before, uint64_t num_more) {
    return Eventually([&] { return t.host->Counters().acquire_waits == before + num_more; });
  }

  // Rows that a table names, read in place, against what they must be.
  static void ExpectRows(HostUnderTest& t, const ModelHost::PinnedTable& table,
                         std::span<const uint32_t> tokens) {
    std::vector<uint64_t> rows(t.model->geometry().num_groups(), 0);
    for (const BlockTableEntry& entry : table.entries) {
      ASSERT_TRUE(entry.frame.has_value());
      EXPECT_GE(entry.pins, 1u);
      EXPECT_EQ(entry.first_row, rows[entry.group]);
      rows[entry.group] += entry.count;
      const GroupGeometry& geometry = t.model->geometry().group(entry.group);
      for (uint32_t layer = 0; layer < geometry.num_layers(); ++layer) {
        for (RowKind kind : {RowKind::kK, RowKind::kV}) {
          const std::vector<std::byte> expected =
              RowOracle::Rows(tokens, entry.first_row, entry.first_row + entry.count, entry.group,
                              layer, kind, geometry.row_bytes(kind));
          std::vector<std::byte> bytes(expected.size());
          const uint64_t at = t.host->FrameOffset(entry.group, *entry.frame) +
                              geometry.RowOffset(layer, kind, entry.first_slot);
          ASSERT_TRUE(t.host->pool().Read(at, bytes).ok());
          EXPECT_TRUE(bytes == expected)
              << "group " << entry.group << ", row " << entry.first_row << ", layer " << layer;
        }
      }
    }
    for (uint64_t n : rows) EXPECT_EQ(n, tokens.size());
  }
};

TEST_F(HeldFramesTest, ATableNamesTheFramesThatItPinsThoughTheSequenceChangedWhileItWaited) {
  HostUnderTest t({.num_groups = 2, .num_frames = 3});
  const std::vector<uint32_t> tokens = Tokens(0, 48);
  const SequenceInfo a = StoredSequence(t, tokens);
  const auto b = t.OpenAndFill(Tokens(500, 16));
  ASSERT_TRUE(b.ok());
  auto held = t.host->PinTable(t.tenant, b->id, t.Soon());  // one of three frames a group
  ASSERT_TRUE(held.ok()) << held.status();
  const uint64_t waits = t.host->Counters().acquire_waits;
  absl::StatusOr<ModelHost::PinnedTable> table;
  std::thread pin([&] { table = t.host->PinTable(t.tenant, a.id, t.Soon()); });
  EXPECT_TRUE(AreWaiting(t, waits, 1));
  EXPECT_TRUE(t.host->Rewind(t.tenant, {a.id, a.epoch, std::nullopt}, 20).ok());
  held->pages.reset();
  pin.join();
  ASSERT_TRUE(table.ok()) << table.status();
  EXPECT_EQ(table->info.length, 20u);
  EXPECT_EQ(table->info.revision, t.host->Get(t.tenant, a.id)->revision);
  const std::span<const uint32_t> kept = std::span(tokens).first(20);
  ExpectRows(t, *table, kept);
  // The pinned tail is not written on, whatever comes behind its rows.
  ASSERT_TRUE(t.host->Close(t.tenant, b->id, b->epoch).ok());
  const std::vector<uint32_t> longer = Concat({kept.begin(), kept.end()}, Tokens(900, 4));
  const auto now = t.host->Get(t.tenant, a.id);
  ASSERT_TRUE(now.ok());
  const auto appended = t.Append(*now, longer);
  EXPECT_TRUE(appended.ok()) << appended.status();
  ExpectRows(t, *table, kept);
}

// Each held the frame of one layer group and waited for that of the other.
TEST_F(HeldFramesTest, TwoThatPinAllGroupsOfTheirSequencesDoNotWaitForEachOther) {
  HostUnderTest t({.num_groups = 2, .num_frames = 1});
  const std::vector<uint32_t> tokens[] = {Tokens(0, 16), Tokens(500, 16), Tokens(900, 16)};
  const SequenceInfo a = StoredSequence(t, tokens[0]);
  const SequenceInfo b = StoredSequence(t, tokens[1]);
  const SequenceInfo c = StoredSequence(t, tokens[2]);
  auto rows = t.host->PinRows(t.tenant, c.id, 0, 0, 0, t.Soon());  // the one frame of group 0
  ASSERT_TRUE(rows.ok()) << rows.status();
  const uint64_t waits = t.host->Counters().acquire_waits;
  absl::StatusOr<ModelHost::PinnedTable> first, second;
  std::thread pin_first([&] { first = t.host->PinTable(t.tenant, a.id, t.Soon()); });
  EXPECT_TRUE(AreWaiting(t, waits, 1));
  std::thread pin_second([&] { second = t.host->PinTable(t.tenant, b.id, t.Soon()); });
  EXPECT_TRUE(AreWaiting(t, waits, 2));
  rows->reset();
  pin_first.join();
  ASSERT_TRUE(first.ok()) << first.status();
  ExpectRows(t, *first, tokens[0]);
  first->pages.reset();
  pin_second.join();
  ASSERT_TRUE(second.ok()) << second.status();
  ExpectRows(t, *second, tokens[1]);
}

TEST_F(HeldFramesTest, ATableOfNothingIsPinnedToo) {
  HostUnderTest t({.num_groups = 2});
  const auto open = t.host->Open(t.tenant, {}, {}, {});
  ASSERT_TRUE(open.ok());
  const auto table = t.host->PinTable(t.tenant, open->info.id, t.Soon());
  ASSERT_TRUE(table.ok()) << table.status();
  EXPECT_TRUE(table->entries.empty());
  const Tenant other{"other", DeriveTenantSalt("secret", "other")};
  EXPECT_EQ(GetReason(t.host->PinTable(other, open->info.id, t.Soon()).status()),
            "SEQUENCE_NOT_FOUND");
}

TEST_F(HeldFramesTest, AnAppendOfWhichNoRowsComeGivesItsFramesBack) {
  FakeClock clock;
  HostUnderTest t({.num_frames = 2, .clock = &clock});
  const std::vector<uint32_t> tokens = Tokens(0, 32);
  const auto open = t.host->Open(t.tenant, tokens, {}, {});
  ASSERT_TRUE(open.ok());
  const SequenceHandle handle{open->info.id, open->info.epoch, std::nullopt};
  const auto slot = t.host->BeginAppend(t.tenant, handle, "a", 0, tokens, {}, false,
                                        clock.MonotonicNow() + absl::Seconds(10));
  ASSERT_TRUE(slot.ok()) << slot.status();
  const auto pending = [&] {
    t.host->Tick();
    return t.host->Get(t.tenant, handle.id)->pending_tokens;
  };
  clock.Advance(absl::Seconds(59));
  EXPECT_EQ(pending(), 32u);
  // Rows put its end off.
  const GroupGeometry& geometry = t.model->geometry().group(0);
  const RowRun run{0, 0, RowKind::kK, 0, 32};
  const auto write = [&] {
    return t.host->WriteRows(
        t.tenant, handle.id, slot->pending_id, run, uint64_t{32} * geometry.k_row_bytes(),
        [](uint64_t, std::span<std::byte> dst) { std::memset(dst.data(), 1, dst.size()); });
  };
  ASSERT_TRUE(write().ok());
  clock.Advance(absl::Seconds(59));
  EXPECT_EQ(pending(), 32u);
  EXPECT_EQ(t.host->Usage()[0].free_frames, 0u);
  clock.Advance(absl::Seconds(1));
  EXPECT_EQ(pending(), 0u);
  EXPECT_EQ(t.host->Usage()[0].free_frames, 2u);
  EXPECT_EQ(GetReason(write()), "WRITE_NOT_OPEN");
  EXPECT_EQ(t.host->Counters().writes_expired, 1u);
}

TEST_F(HeldFramesTest, ACallUnderAnAppendWaitsToItsOwnDeadline) {
  HostUnderTest t({.num_frames = 2});
  const auto a = t.OpenAndFill(Tokens(0, 16));
  ASSERT_TRUE(a.ok());
  const auto b = t.host->Open(t.tenant, Tokens(500, 32), {}, {});
  ASSERT_TRUE(b.ok());
  auto rows = t.host->PinRows(t.tenant, a->id, 0, 0, 0, t.Soon());  // one of the two frames
  ASSERT_TRUE(rows.ok());
  const uint64_t waits = t.host->Counters().acquire_waits;
  const std::vector<uint32_t> two_pages = Tokens(500, 32);
  absl::StatusOr<PendingSlot> slot;
  std::thread append([&] {
    slot = t.host->BeginAppend(t.tenant, {b->info.id, b->info.epoch, std::nullopt}, "b", 0,
                               two_pages, {}, true, t.Soon());
  });
  EXPECT_TRUE(AreWaiting(t, waits, 1));
  const auto found = t.host->FindAppend(t.tenant, b->info.id, "b", t.In(absl::ZeroDuration()));
  EXPECT_TRUE(absl::IsDeadlineExceeded(found.status())) << found.status();
  rows->reset();
  append.join();
  EXPECT_TRUE(slot.ok()) << slot.status();
}

// It began the restore anew as soon as the store had refused, for as long as it lacked a frame.
TEST_F(HeldFramesTest, ACallInLineWhoseRestoreFailsLeavesTheLine) {
  MemoryPageStore memory;
  FaultInjectingPageStore store(&memory);
  HostUnderTest t({.num_frames = 2, .store = &store});
  const SequenceInfo a = StoredSequence(t, Tokens(0, 32));
  const auto b = t.OpenAndFill(Tokens(500, 16));
  ASSERT_TRUE(b.ok());
  auto held = t.host->PinRows(t.tenant, b->id, 0, 0, 0, t.Soon());  // one of the two frames
  ASSERT_TRUE(held.ok());
  t.host->Quiesce();
  store.FailWith(absl::UnavailableError("the store is away"));
  const uint64_t failed = store.num_failed();
  const auto rows = t.host->PinRows(t.tenant, a.id, 0, 0, 0, t.Soon());
  EXPECT_TRUE(absl::IsUnavailable(rows.status())) << rows.status();
  EXPECT_EQ(store.num_failed() - failed, 1u);
  // Nothing is left behind: the next call gets all.
  store.FailWith(absl::OkStatus());
  held->reset();
  EXPECT_TRUE(t.host->PinRows(t.tenant, a.id, 0, 0, 0, t.Soon()).ok());
}

}  // namespace
}  // namespace pagetide
