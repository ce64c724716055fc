#include "base/checksum.h"

#include <algorithm>
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

TEST(ChecksumTest, PiecesOfAnySizeGiveTheChecksumOfTheWhole) {
  const auto bytes = Random(300'001);
  std::mt19937 rng(5);
  for (int round = 0; round < 50; ++round) {
    ChecksumStream stream;
    for (size_t at = 0; at < bytes.size();) {
      const size_t n = std::min<size_t>(rng() % (round % 2 ? 300 : 70'000), bytes.size() - at);
      stream.Update(std::span(bytes).subspan(at, n));
      at += n;
      if (rng() % 64 == 0) {
        EXPECT_EQ(stream.Get(), ChecksumOf(std::span(bytes).first(at))) << at;
      }
    }
    EXPECT_EQ(stream.Get(), ChecksumOf(bytes));
  }
}

// A machine may have none of the extensions: then only the portable kernel runs here.
TEST(ChecksumTest, AllKernelsOfThisMachineAgree) {
  const auto bytes = Random(100'003);
  std::vector<const checksum_internal::Kernel*> kernels;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) kernels.push_back(&checksum_internal::Avx2Kernel());
  if (__builtin_cpu_supports("avx512f")) kernels.push_back(&checksum_internal::Avx512Kernel());
#endif
  for (size_t n : {0, 1, 3, 16, 128, 240, 241, 1024, 4097, 100'003}) {
    Checksum128 expected;
    checksum_internal::PortableKernel().hash(bytes.data(), n, &expected.low, &expected.high);
    EXPECT_EQ(ChecksumOf(std::span(bytes).first(n)), expected);
    for (const auto* kernel : kernels) {
      Checksum128 got;
      kernel->hash(bytes.data(), n, &got.low, &got.high);
      EXPECT_EQ(got, expected) << n;
    }
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
