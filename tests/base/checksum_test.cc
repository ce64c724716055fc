#include "base/checksum.h"

#include <random>
#include <set>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace pagetide {
namespace {

std::vector<std::byte> Random(size_t n) {
  std::mt19937 rng(static_cast<uint32_t>(n));
  std::vector<std::byte> bytes(n);
  for (std::byte& b : bytes) b = static_cast<std::byte>(rng());
  return bytes;
}

// XXH3-128 of no bytes, as the reference implementation prints it.
TEST(ChecksumTest, VectorOfTheEmptyInput) {
  EXPECT_EQ(ChecksumOf({}).ToHex(), "99aa06d3014798d86001c324468d497f");
}

// The sizes straddle XXH3's short-input paths and the copy's blocks of 64 KiB.
TEST(ChecksumTest, CopyingGivesTheSameBytesAndTheSameChecksum) {
  for (size_t n : {0, 1, 16, 17, 128, 129, 240, 241, 65535, 65536, 65537, 1000003}) {
    const auto from = Random(n);
    std::vector<std::byte> to(n);
    EXPECT_EQ(CopyWithChecksum(from, to), ChecksumOf(from)) << n;
    EXPECT_EQ(to, from) << n;
  }
}

TEST(ChecksumTest, EveryFlippedBitShows) {
  auto bytes = Random(97);
  std::set<std::string> seen = {ChecksumOf(bytes).ToHex()};
  for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    bytes[bit / 8] ^= std::byte{1} << (bit % 8);
    EXPECT_TRUE(seen.insert(ChecksumOf(bytes).ToHex()).second) << bit;
    bytes[bit / 8] ^= std::byte{1} << (bit % 8);
  }
}

}  // namespace
}  // namespace pagetide
