#include "formats/mlx_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/little_endian.h"
#include "tests/formats/format_test_util.h"

namespace pagetide {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pair;
using ::testing::UnorderedElementsAre;

std::string Write(const MlxCache& layout, const RowReader& rows) {
  std::string out;
  const absl::Status status = WriteMlxCache(layout, rows, [&](absl::string_view part) {
    EXPECT_LE(part.size(), kMaxSinkBytes);
    out.append(part.data(), part.size());
    return absl::OkStatus();
  });
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(out.size(), layout.file_bytes());
  return out;
}

// What the format's own loader showed: K, then V, of each layer in the order of the cache.
std::string RowsByLayer(const MlxCache& cache) {
  std::map<uint32_t, std::string> by_number;
  for (size_t b = 0; b < cache.state().blocks.size(); ++b) {
    const RowBlock& block = cache.state().blocks[b];
    for (size_t l = 0; l < block.layers.size(); ++l) {
      by_number[block.layers[l].number] = ReadAll(cache, cache.state(), b, l, RowKind::kK) +
                                          ReadAll(cache, cache.state(), b, l, RowKind::kV);
    }
  }
  std::string all;
  for (const auto& [number, rows] : by_number) all += rows;
  return all;
}

// Written by mlx-lm itself: see testdata/make_mlx_caches.py.
class MlxRealFileTest : public ::testing::TestWithParam<const char*> {};

TEST_P(MlxRealFileTest, ReadsAndWritesTheSameBytes) {
  const std::string name = GetParam();
  const std::string file = TestFile(name + ".safetensors");
  const auto cache = MlxCache::Parse(file);
  ASSERT_TRUE(cache.ok()) << cache.status();
  EXPECT_EQ(cache->is_legacy(), absl::StrContains(name, "v0_28"));
  EXPECT_THAT(cache->user_metadata(),
              UnorderedElementsAre(Pair("model", "tiny"), Pair("note", ::testing::_)));
  if (!absl::StrContains(name, "quantized")) {
    EXPECT_EQ(RowsByLayer(*cache), TestFile(name + ".rows"));
  }
  EXPECT_EQ(Write(*cache, *cache), file);
  // The layout alone, with rows from elsewhere, gives the same file.
  const auto layout = MlxCache::FromLayout(cache->layout(), 64);
  ASSERT_TRUE(layout.ok()) << layout.status();
  EXPECT_EQ(layout->state(), cache->state());
  EXPECT_EQ(Write(*layout, *cache), file);
  CheckHostileVariants(file, [](absl::string_view bytes) {
    const absl::Status status = MlxCache::Parse(bytes).status();
    // A changed start position makes an old chunked cache look trimmed.
    return absl::IsFailedPrecondition(status) ? absl::OkStatus() : status;
  });
}

INSTANTIATE_TEST_SUITE_P(Files, MlxRealFileTest,
                         ::testing::Values("mlx_v0_28_plain", "mlx_v0_28_plain_bf16",
                                           "mlx_v0_28_rotating", "mlx_v0_28_quantized",
                                           "mlx_v0_28_chunked", "mlx_v0_28_mixed", "mlx_v0_28_ring",
                                           "mlx_v0_28_ring_prompt", "mlx_v0_32_plain",
                                           "mlx_v0_32_plain_bf16", "mlx_v0_32_rotating",
                                           "mlx_v0_32_quantized", "mlx_v0_32_chunked",
                                           "mlx_v0_32_chunked_trimmed", "mlx_v0_32_mixed",
                                           "mlx_v0_32_ring", "mlx_v0_32_ring_prompt",
                                           "mlx_v0_28_ring_keep", "mlx_v0_32_ring_keep"),
                         [](const auto& info) { return std::string(info.param); });

MlxCache ParseOrDie(const std::string& file) {
  auto cache = MlxCache::Parse(file);
  EXPECT_TRUE(cache.ok()) << cache.status();
  return *std::move(cache);
}

TEST(MlxCacheTest, PositionsOfARingAreThoseOfItsTokens) {
  for (const char* version : {"mlx_v0_28", "mlx_v0_32"}) {
    const std::string file = TestFile(absl::StrCat(version, "_rotating.safetensors"));
    const MlxCache cache = ParseOrDie(file);
    const std::vector<RowBlock>& blocks = cache.state().blocks;
    ASSERT_EQ(blocks.size(), 3);
    // Not full yet.
    EXPECT_THAT(blocks[0].positions, ElementsAre(0, 1, 2, 3, 4, 5));
    // 14 tokens in 8 rows, 2 kept: tokens 8 to 13 lie in a ring that last wrote its row 7.
    EXPECT_THAT(blocks[1].positions, ElementsAre(0, 1, 8, 9, 10, 11, 12, 13));
    // 6, then a prompt of 9: not cut yet.
    EXPECT_EQ(blocks[2].positions.size(), 15);
    EXPECT_EQ(blocks[2].positions.back(), 14);
  }
}

TEST(MlxCacheTest, TrimmedChunkBeginsAtItsStartPosition) {
  const std::string file = TestFile("mlx_v0_32_chunked_trimmed.safetensors");
  const MlxCache cache = ParseOrDie(file);
  ASSERT_EQ(cache.state().blocks.size(), 1);
  EXPECT_THAT(cache.state().blocks[0].positions, ElementsAre(4, 5, 6, 7, 8, 9, 10, 11));
}

TEST(MlxCacheTest, QuantisedRowsArePacked) {
  const std::string file = TestFile("mlx_v0_32_quantized.safetensors");
  const MlxCache cache = ParseOrDie(file);
  const LayerShape& layer = cache.state().blocks[0].layers[0];
  // 2 heads of 64 × 4 bits, with 2 scales and 2 biases of f16 each.
  EXPECT_EQ(layer.k.bytes, 2 * (32 + 4 + 4));
  EXPECT_FALSE(layer.k.type.has_value());
  EXPECT_EQ(cache.layers()[0].bits, 4);
  EXPECT_EQ(cache.layers()[0].group_size, 32);
}

TEST(MlxCacheTest, LayersWithTheSameRowsShareABlock) {
  const std::string file = TestFile("mlx_v0_32_mixed.safetensors");
  const MlxCache cache = ParseOrDie(file);
  ASSERT_EQ(cache.state().blocks.size(), 1);
  EXPECT_EQ(cache.state().blocks[0].layers.size(), 2);
}

TEST(MlxCacheTest, ComposedLayoutIsAFileOfTheSameGeneration) {
  for (const bool legacy : {false, true}) {
    MlxComposeOptions options;
    options.legacy = legacy;
    options.user_metadata = {{"model", "x"}, {"quote", "\"\\\n"}};
    options.layers = {{DataType::kF16, 2, 8, 8}, {DataType::kF32, 1, 4, 6}};
    options.rows = 11;
    const auto layout = ComposeMlxLayout(options);
    ASSERT_TRUE(layout.ok()) << layout.status();
    const MemoryRows rows(&layout->state(), 5);
    const std::string file = Write(*layout, rows);
    const auto cache = MlxCache::Parse(file);
    ASSERT_TRUE(cache.ok()) << cache.status();
    EXPECT_EQ(cache->is_legacy(), legacy);
    EXPECT_EQ(cache->user_metadata(), options.user_metadata);
    EXPECT_EQ(cache->state(), layout->state());
    for (size_t l = 0; l < 2; ++l) {
      for (const RowKind kind : {RowKind::kK, RowKind::kV}) {
        EXPECT_EQ(ReadAll(*cache, cache->state(), 0, l, kind), rows.Of(0, l, kind));
      }
    }
    EXPECT_EQ(Write(*cache, *cache), file);
  }
  MlxComposeOptions quantised;
  quantised.layers = {{DataType::kQ8_0, 2, 32, 32}};
  EXPECT_TRUE(absl::IsFailedPrecondition(ComposeMlxLayout(quantised).status()));
}

// A safetensors file around a header.
std::string File(absl::string_view json, size_t data_bytes) {
  std::string out;
  AppendLittleEndian<uint64_t>(&out, json.size());
  out.append(json.data(), json.size());
  out.append(data_bytes, '\0');
  return out;
}

absl::Status Parse(absl::string_view json, size_t data_bytes) {
  return MlxCache::Parse(File(json, data_bytes)).status();
}

TEST(MlxCacheTest, HostileHeadersAreDataLoss) {
  const std::string metadata = R"("__metadata__":{"0.0":"","2.0":"KVCache"})";
  const auto with = [&](absl::string_view tensors) {
    return absl::StrCat("{", metadata, ",", tensors, "}");
  };
  const struct {
    std::string json;
    const char* text;
    size_t data_bytes = 24;
  } cases[] = {
      // Overlap, gap, end behind the data, product beyond 64 bits, negative and fractional numbers.
      {with(R"("0.0":{"dtype":"F16","shape":[1,1,2,2],"data_offsets":[0,8]},)"
            R"("0.1":{"dtype":"F16","shape":[1,1,2,2],"data_offsets":[4,12]})"),
       "begins at 4, the one before ends at 8"},
      {with(R"("0.0":{"dtype":"F16","shape":[1,1,2,2],"data_offsets":[0,8]},)"
            R"("0.1":{"dtype":"F16","shape":[1,1,2,2],"data_offsets":[16,24]})"),
       "begins at 16"},
      {with(R"("0.0":{"dtype":"F16","shape":[1,1,2,2],"data_offsets":[0,9]})"), "its shape needs"},
      {with(R"("0.0":{"dtype":"F16","shape":[1,1,2,2],"data_offsets":[8,0]})"), "its shape needs"},
      {with(R"("0.0":{"dtype":"F64","shape":[4294967296,4294967296,1,1],"data_offsets":[0,0]})"),
       "its shape needs"},
      {with(R"("0.0":{"dtype":"F16","shape":[-1],"data_offsets":[0,8]})"), "no whole number"},
      {with(R"("0.0":{"dtype":"F16","shape":[1.5],"data_offsets":[0,8]})"), "no whole number"},
      {with(R"("0.0":{"dtype":"F16","shape":[1e300],"data_offsets":[0,8]})"), "no whole number"},
      {with(R"("0.0":{"dtype":"Q9","shape":[4],"data_offsets":[0,8]})"), "unknown dtype"},
      {with(R"("0.0":{"dtype":"F16","shape":[4]})"), "lacks"},
      {with(R"("0.0":{"dtype":"F16","shape":[1,1,2,2],"data_offsets":[0,8]})"),
       "\"0.1\" is missing", 8},
      {"[1,2]", "not a JSON object"},
      {std::string(1000, '['), "deeper than 3"},
      {"{\"a\":" + std::string(600000, '['), "deeper"},
      {absl::StrCat("{\"a\":[", std::string(600000, ','), "]}"), "more than 200000 values"},
      {"{}", "no entry 2.0", 0},
      {R"({"__metadata__":{"2.0":1}})", "no string"},
  };
  for (const auto& c : cases) {
    const absl::Status status = Parse(c.json, c.data_bytes);
    EXPECT_TRUE(absl::IsDataLoss(status)) << c.json.substr(0, 200) << ": " << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.text));
  }
  std::string huge;
  AppendLittleEndian<uint64_t>(&huge, uint64_t{1} << 62);
  EXPECT_TRUE(absl::IsDataLoss(MlxCache::Parse(huge + "{}").status()));
}

TEST(MlxCacheTest, WhatCannotBeTakenIsNamed) {
  const char* batch = R"({"__metadata__":{"0.0":"","2.0":"KVCache"},)"
                      R"("0.0":{"dtype":"F16","shape":[2,1,1,2],"data_offsets":[0,8]},)"
                      R"("0.1":{"dtype":"F16","shape":[2,1,1,2],"data_offsets":[8,16]}})";
  const absl::Status status = Parse(batch, 16);
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("a batch of 2"));
  const char* recurrent = R"({"__metadata__":{"0.0":"","2.0":"ArraysCache"},)"
                          R"("0.0":{"dtype":"F16","shape":[1,1,1,2],"data_offsets":[0,4]}})";
  EXPECT_THAT(std::string(Parse(recurrent, 4).message()), HasSubstr("layer 0 is a ArraysCache"));
  const char* trimmed = R"({"__metadata__":{"0.0.0":"8","0.0.1":"4","2.0":"ChunkedKVCache"},)"
                        R"("0.0":{"dtype":"F16","shape":[1,1,1,2],"data_offsets":[0,4]},)"
                        R"("0.1":{"dtype":"F16","shape":[1,1,1,2],"data_offsets":[4,8]}})";
  EXPECT_TRUE(absl::IsFailedPrecondition(Parse(trimmed, 8)));
}

TEST(MlxCacheTest, ALayoutCannotClaimMoreRowsThanAllowed) {
  const std::string json =
      R"({"__metadata__":{"0.0":"","2.0":"KVCache"},)"
      R"("0.0":{"dtype":"F16","shape":[1,1,1000000000,1],"data_offsets":[0,2000000000]},)"
      R"("0.1":{"dtype":"F16","shape":[1,1,1000000000,1],"data_offsets":[2000000000,4000000000]}})";
  const absl::Status status = MlxCache::FromLayout(File(json, 0), 1000).status();
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
}

}  // namespace
}  // namespace pagetide
