#include "kvstore/log_mark.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>

#include "tests/fault/faulty_disk.h"
#include "tests/kvstore/store_test_util.h"

namespace pagetide {
namespace {

class LogMarkTest : public ::testing::Test {
 protected:
  std::unique_ptr<LogMark> Open() {
    auto mark = LogMark::Open(path_, &disk_);
    EXPECT_TRUE(mark.ok()) << mark.status();
    return mark.ok() ? *std::move(mark) : nullptr;
  }
  void DamageSlot(uint64_t slot) { FlipFileBit(path_, (slot * LogMark::kSlotBytes + 10) * 8); }

  TempDir dir_;
  FaultyDisk disk_;
  const std::string path_ = dir_.path() + "/log.mark";
};

TEST_F(LogMarkTest, KeepsTheLastMark) {
  EXPECT_EQ(Open()->last().number, 0u) << "a new file";
  for (uint64_t n = 7; n < 12; ++n) {
    const auto mark = Open();
    ASSERT_TRUE(mark->Write({n, absl::FromUnixSeconds(static_cast<int64_t>(n))}).ok());
    EXPECT_EQ(mark->last().number, n);
    EXPECT_EQ(Open()->last().number, n);
    EXPECT_EQ(Open()->last().at, absl::FromUnixSeconds(static_cast<int64_t>(n)));
  }
}

TEST_F(LogMarkTest, ADamagedSlotLeavesTheMarkBefore) {
  ASSERT_TRUE(Open()->Write({4, absl::UnixEpoch()}).ok());  // into slot 0
  ASSERT_TRUE(Open()->Write({5, absl::UnixEpoch()}).ok());
  DamageSlot(1);
  EXPECT_EQ(Open()->last().number, 4u);
  ASSERT_TRUE(Open()->Write({6, absl::UnixEpoch()}).ok());
  EXPECT_EQ(Open()->last().number, 6u);
  DamageSlot(0);
  DamageSlot(1);
  EXPECT_EQ(Open()->last().number, 0u) << "none is better than a wrong one";
}

TEST_F(LogMarkTest, APowerCutDuringAWriteLeavesOneOfTheTwo) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    auto mark = Open();
    ASSERT_TRUE(disk_.SyncDir(dir_.path()).ok());
    const uint64_t before = mark->last().number;
    ASSERT_TRUE(mark->Write({before + 1, absl::UnixEpoch()}).ok());
    disk_.set_fail_syncs(true);
    // Of unknown outcome; the next goes to the same place, not over the last that is known.
    EXPECT_FALSE(mark->Write({before + 2, absl::UnixEpoch()}).ok());
    EXPECT_FALSE(mark->Write({before + 3, absl::UnixEpoch()}).ok());
    EXPECT_EQ(mark->last().number, before + 1);
    disk_.set_fail_syncs(false);
    disk_.CutPower();
    mark.reset();
    disk_.DropUnsynced(seed);
    EXPECT_GE(Open()->last().number, before + 1) << "seed " << seed;
  }
}

}  // namespace
}  // namespace pagetide
