// FillingChecksum against the checksum of the filled frame, whatever the order of the writes.
#include "worker/filling_checksum.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

namespace pagetide {
namespace {

class Frame {
 public:
  explicit Frame(size_t num_bytes) : bytes_(num_bytes), random_(num_bytes) {}

  bool Begin(uint64_t offset, uint64_t n) { return checksum_.Claim(offset, n); }
  void End(uint64_t offset, uint64_t n, bool is_claimed) {
    const auto to = std::span(bytes_).subspan(offset, n);
    for (std::byte& b : to) b = static_cast<std::byte>(random_());
    if (is_claimed) {
      checksum_.Update(to.first(n / 2));
      checksum_.Update(to.subspan(n / 2));
    }
    checksum_.Release();
  }
  bool Write(uint64_t offset, uint64_t n) {
    const bool is_claimed = Begin(offset, n);
    End(offset, n, is_claimed);
    return is_claimed;
  }
  void ExpectRight() const { EXPECT_EQ(checksum_.Finish(bytes_), ChecksumOf(bytes_)); }

 private:
  std::vector<std::byte> bytes_;
  std::mt19937 random_;
  FillingChecksum checksum_;
};

TEST(FillingChecksumTest, RowsInTheOrderOfThePageAreHashedOnTheWay) {
  Frame frame(1000);
  for (uint64_t at = 0; at < 1000; at += 100) EXPECT_TRUE(frame.Write(at, 100));
  frame.ExpectRight();
}

TEST(FillingChecksumTest, AGapIsReadAtTheEnd) {
  Frame frame(1000);
  EXPECT_TRUE(frame.Write(0, 100));
  EXPECT_FALSE(frame.Write(200, 800));
  EXPECT_TRUE(frame.Write(100, 100));
  frame.ExpectRight();
}

TEST(FillingChecksumTest, RowsWrittenASecondTimeCount) {
  Frame frame(1000);
  EXPECT_TRUE(frame.Write(0, 500));
  EXPECT_FALSE(frame.Write(100, 100));
  EXPECT_TRUE(frame.Write(500, 500));
  frame.ExpectRight();
}

// The second writer's bytes are what the first one's would be taken for.
TEST(FillingChecksumTest, AWriterThatIsStillAtWorkKeepsOthersFromClaiming) {
  Frame frame(1000);
  const bool early = frame.Begin(500, 500);
  EXPECT_FALSE(early);
  EXPECT_FALSE(frame.Write(0, 1000));
  frame.End(500, 500, early);
  frame.ExpectRight();
}

TEST(FillingChecksumTest, AnyOrderOfOverlappingWritersGivesTheFramesChecksum) {
  for (uint32_t seed = 0; seed < 300; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    std::mt19937 random(seed);
    Frame frame(4096);
    struct Writer {
      uint64_t offset, n;
      bool is_claimed;
    };
    std::vector<Writer> open;
    uint64_t next = 0;
    for (int step = 0; step < 60; ++step) {
      if (random() % 2 && !open.empty()) {
        std::swap(open[random() % open.size()], open.back());
        frame.End(open.back().offset, open.back().n, open.back().is_claimed);
        open.pop_back();
        continue;
      }
      // Mostly in order, sometimes anywhere.
      const uint64_t offset = random() % 4 ? next : random() % 4096;
      const uint64_t n = std::min<uint64_t>(random() % 400, 4096 - offset);
      next = std::min<uint64_t>(offset + n, 4095);
      open.push_back({offset, n, frame.Begin(offset, n)});
    }
    for (const Writer& w : open) frame.End(w.offset, w.n, w.is_claimed);
    frame.ExpectRight();
  }
}

}  // namespace
}  // namespace pagetide
