// Compression of page bodies: golden bytes (docs/store_format.md), round trips over data types and
// sizes, and every kind of damage.
#include "kvstore/page_body_codec.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "kernels/convert.h"

namespace pagetide {
namespace {

using kernels::KvType;

std::vector<std::byte> Bytes(absl::string_view text) {
  const auto* first = reinterpret_cast<const std::byte*>(text.data());
  return {first, first + text.size()};
}

// Normal numbers of a few magnitudes, as the channels of K rows are.
std::vector<std::byte> Rows(KvType type, size_t elements, uint64_t seed) {
  std::mt19937_64 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(elements);
  for (size_t i = 0; i < elements; ++i) x[i] = normal(rng) * (i % 64 == 5 ? 8.0f : 0.5f);
  std::vector<std::byte> out(
      static_cast<size_t>(kernels::EncodedBytes(type, static_cast<int64_t>(elements))));
  kernels::NarrowFromF32(type, x.data(), static_cast<int64_t>(elements), out.data());
  return out;
}

std::vector<std::byte> Noise(size_t bytes, uint64_t seed) {
  std::mt19937_64 rng(seed);
  std::vector<std::byte> out(bytes);
  for (std::byte& b : out) b = static_cast<std::byte>(rng());
  return out;
}

std::vector<std::byte> Encoded(const std::vector<std::byte>& raw,
                               PageCompression compression = PageCompression::kZstd) {
  PageBodyEncoder encoder(compression);
  const std::span<const std::byte> stored = encoder.Encode(raw);
  if (!stored.empty()) {
    const StoreCodecBytes& t = encoder.tally();
    EXPECT_EQ(t.raw.in, t.raw.out);
    EXPECT_LE(t.raw.in + t.lz4.in + t.zstd.in, raw.size());
    EXPECT_GT(t.raw.in + t.lz4.in + t.zstd.in + 4 * (raw.size() / kBodyChunkBytes + 1), raw.size());
    EXPECT_LE(stored.size(), raw.size() - raw.size() / 16);
    EXPECT_GE(stored.size(), MinCompressedBytes(raw.size()));
  }
  return {stored.begin(), stored.end()};
}

void ExpectDecodes(const std::vector<std::byte>& stored, const std::vector<std::byte>& raw) {
  PageBodyDecoder decoder;
  std::vector<std::byte> out(raw.size(), std::byte{0xEE});
  const absl::Status decoded = decoder.Decode(stored, out);
  ASSERT_TRUE(decoded.ok()) << decoded;
  EXPECT_TRUE(out == raw);
  const auto checksum = decoder.ChecksumOfRaw(stored, raw.size());
  ASSERT_TRUE(checksum.ok()) << checksum.status();
  EXPECT_EQ(*checksum, ChecksumOf(raw));
}

TEST(PageBodyCodecTest, RowsOfEveryPlainTypeComeBackAndGetSmaller) {
  struct Case {
    KvType type;
    double least_ratio;
  };
  for (const Case& c :
       {Case{KvType::kF32, 1.08}, Case{KvType::kF16, 1.1}, Case{KvType::kBF16, 1.3}}) {
    const std::vector<std::byte> raw = Rows(c.type, 300'000, 1);
    const std::vector<std::byte> stored = Encoded(raw);
    ASSERT_FALSE(stored.empty()) << KvTypeName(c.type);
    EXPECT_GT(static_cast<double>(raw.size()) / static_cast<double>(stored.size()), c.least_ratio)
        << KvTypeName(c.type);
    ExpectDecodes(stored, raw);
  }
}

TEST(PageBodyCodecTest, EverySizeComesBack) {
  std::mt19937_64 rng(20261121);
  for (size_t size : {size_t{1}, size_t{2}, size_t{3}, size_t{7}, size_t{63}, size_t{64},
                      size_t{257}, size_t{4096}, kBodyChunkBytes - 1, kBodyChunkBytes,
                      kBodyChunkBytes + 1, kBodyChunkBytes + 3, 3 * kBodyChunkBytes + 12345}) {
    for (PageCompression compression : {PageCompression::kLz4, PageCompression::kZstd}) {
      // Zeros, repeats, rows, and rows with a tail that was never written.
      std::vector<std::vector<std::byte>> bodies = {std::vector<std::byte>(size),
                                                    Rows(KvType::kF16, size / 2 + 1, rng()),
                                                    Rows(KvType::kF32, size / 4 + 1, rng())};
      bodies.push_back(bodies[1]);
      for (std::vector<std::byte>& body : bodies) body.resize(size);
      std::fill(bodies[3].begin() + size / 3, bodies[3].end(), std::byte{0});
      for (size_t i = 0; i < bodies.size(); ++i) {
        const std::vector<std::byte> stored = Encoded(bodies[i], compression);
        EXPECT_TRUE(!stored.empty() || size < 512 || i == 1 || i == 2) << size << ", body " << i;
        if (!stored.empty()) ExpectDecodes(stored, bodies[i]);
      }
    }
  }
}

TEST(PageBodyCodecTest, WhatDoesNotPayStaysRaw) {
  EXPECT_TRUE(Encoded(Noise(1 << 20, 1)).empty());
  EXPECT_TRUE(Encoded(Noise(100, 2)).empty());
  // lz4 finds no repeats in rows.
  EXPECT_TRUE(Encoded(Rows(KvType::kF16, 300'000, 1), PageCompression::kLz4).empty());
  EXPECT_TRUE(Encoded(std::vector<std::byte>(1 << 20), PageCompression::kNone).empty());
}

TEST(PageBodyCodecTest, Lz4TakesWhatItPacksAsWell) {
  PageBodyEncoder encoder(PageCompression::kZstd);
  ASSERT_FALSE(encoder.Encode(std::vector<std::byte>(1 << 20)).empty());
  EXPECT_EQ(encoder.tally().lz4.in, 1u << 20);
  EXPECT_EQ(encoder.tally().zstd.in, 0u);
  ASSERT_FALSE(encoder.Encode(Rows(KvType::kF16, 1 << 19, 1)).empty());
  EXPECT_EQ(encoder.tally().zstd.in, 1u << 19);  // the planes of signs and exponents
  EXPECT_EQ(encoder.tally().raw.in, 1u << 19);
}

// Chunks that were made by hand; the bytes, and what they mean, stand in docs/store_format.md and
// never change.
TEST(PageBodyCodecTest, GoldenBytes) {
  struct Golden {
    const char* stored;
    std::string raw;
  };
  std::string two_planes;
  for (char c = 'A'; c <= 'X'; ++c) two_planes += std::string{c, '-'};
  two_planes += '!';
  const Golden goldens[] = {
      {"0101"          // one plane, one run:
       "010003000000"  // of one plane, raw, 3 bytes
       "6b6579",
       "key"},
      {"0202"          // two planes of 24 bytes, two runs:
       "010018000000"  // one raw,
       "01010a000000"  // one packed by lz4, 10 bytes
       "4142434445464748494a4b4c4d4e4f505152535455565758"
       "1e2d0100502d2d2d2d2d"
       "21",  // and the byte behind the last whole element
       two_planes},
      {"0202"          // the same, and the second run
       "010018000000"  //
       "01020a000000"  // packed by zstd
       "4142434445464748494a4b4c4d4e4f505152535455565758"
       "28b52ffd2018c300002d"
       "21",
       two_planes},
  };
  PageBodyDecoder decoder;
  for (const Golden& golden : goldens) {
    std::string out(golden.raw.size(), '?');
    const absl::Status decoded =
        decoder.Decode(Bytes(absl::HexStringToBytes(golden.stored)),
                       std::as_writable_bytes(std::span(out.data(), out.size())));
    EXPECT_TRUE(decoded.ok()) << decoded;
    EXPECT_EQ(out, golden.raw);
  }
}

TEST(PageBodyCodecTest, CutAndFlippedBodiesAreFound) {
  const std::vector<std::byte> raw = Rows(KvType::kF16, 2000, 3);
  const std::vector<std::byte> stored = Encoded(raw);
  ASSERT_FALSE(stored.empty());
  const Checksum128 checksum = ChecksumOf(raw);
  PageBodyDecoder decoder;
  std::vector<std::byte> out(raw.size());
  for (size_t n = 0; n < stored.size(); ++n) {
    const absl::Status decoded = decoder.Decode(std::span(stored).first(n), out);
    EXPECT_TRUE(absl::IsDataLoss(decoded)) << n << ": " << decoded;
  }
  std::vector<std::byte> longer = stored;
  longer.push_back(std::byte{0});
  EXPECT_TRUE(absl::IsDataLoss(decoder.Decode(longer, out)));
  size_t num_harmless = 0;
  for (size_t bit = 0; bit < stored.size() * 8; ++bit) {
    std::vector<std::byte> damaged = stored;
    damaged[bit / 8] ^= std::byte{1} << (bit % 8);
    const auto actual = decoder.ChecksumOfRaw(damaged, raw.size());
    if (!actual.ok()) {
      EXPECT_TRUE(absl::IsDataLoss(actual.status())) << actual.status();
    } else if (*actual == checksum) {
      // A bit that means nothing to zstd, such as padding: then the raw bytes are the same.
      ++num_harmless;
      ASSERT_TRUE(decoder.Decode(damaged, out).ok());
      EXPECT_TRUE(out == raw) << "bit " << bit;
    }
  }
  EXPECT_LT(num_harmless, stored.size() * 8 / 1000);
}

TEST(PageBodyCodecTest, DeclaredSizesAreComparedBeforeTheyAreUsed) {
  PageBodyDecoder decoder;
  std::vector<std::byte> out(1000);
  const auto error = [&](const std::string& hex) {
    const absl::Status decoded = decoder.Decode(Bytes(absl::HexStringToBytes(hex)), out);
    EXPECT_TRUE(absl::IsDataLoss(decoded)) << decoded;
    return std::string(decoded.message());
  };
  EXPECT_EQ(error("0101"
                  "0102ffffffff"
                  "00"),
            "page body: chunk 0: run 0 declares 4294967295 bytes, 1 are left");
  EXPECT_EQ(error("0000"), "page body: chunk 0: 0 runs of 0 planes for 1000 bytes");
  EXPECT_EQ(error("ff01"
                  "ff0001000000"
                  "00"),
            "page body: chunk 0: 1 runs of 255 planes for 1000 bytes");
  EXPECT_EQ(error("0201"
                  "030001000000"
                  "00"),
            "page body: chunk 0: run 0 has 3 planes, 2 are left");
  EXPECT_EQ(error("0101"
                  "010901000000"
                  "00"),
            "page body: chunk 0: codec 9");
  EXPECT_EQ(error("0101"
                  "010001000000"
                  "00"),
            "page body: chunk 0: codec 0: 1 bytes do not unpack to 1000");
}

TEST(PageBodyCodecTest, RandomBytesNeverCrash) {
  std::mt19937_64 rng(7);
  PageBodyDecoder decoder;
  for (int i = 0; i < 20000; ++i) {
    std::vector<std::byte> stored = Noise(rng() % 200, rng());
    std::vector<std::byte> raw(1 + rng() % 500);
    if (stored.size() > 8) {
      stored[0] = static_cast<std::byte>(1 + rng() % 3);
      stored[1] = std::byte{1};
      stored[2] = stored[0];
      stored[3] = static_cast<std::byte>(rng() % 3);
      const uint32_t packed = static_cast<uint32_t>(stored.size() - 8);
      std::memcpy(&stored[4], &packed, 4);
    }
    decoder.Decode(stored, raw).IgnoreError();
  }
}

}  // namespace
}  // namespace pagetide
