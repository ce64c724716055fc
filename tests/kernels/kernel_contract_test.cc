// What every implementation of the copy, conversion and shift kernels keeps: random shapes, odd
// sizes and addresses, poisoned outputs, against loops over elements.
#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/block_codec.h"
#include "kernels/convert.h"
#include "tests/kernels/kernel_device.h"

namespace pagetide::kernels {
namespace {

constexpr uint8_t kPoison = 0xa5;
constexpr KvType kAllTypes[] = {KvType::kF32,    KvType::kF16,  KvType::kBF16, KvType::kF8E4M3,
                                KvType::kF8E5M2, KvType::kQ8_0, KvType::kQ5_0, KvType::kQ5_1,
                                KvType::kQ4_0,   KvType::kQ4_1, KvType::kIQ4NL};

class KernelContractTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    std::string why_not;
    device_ = MakeKernelDevice(GetParam(), &why_not);
    if (device_ == nullptr) GTEST_SKIP() << why_not;
  }

  static std::vector<uint8_t> RandomBytes(std::mt19937& random, size_t count) {
    std::vector<uint8_t> bytes(count);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
    return bytes;
  }
  static std::vector<float> RandomFloats(std::mt19937& random, size_t count) {
    std::normal_distribution<float> normal;
    std::vector<float> values(count);
    for (float& x : values) x = normal(random) * (random() % 50 == 0 ? 30.0f : 1.0f);
    return values;
  }
  static int64_t Below(std::mt19937& random, int64_t n) {
    return static_cast<int64_t>(random() % static_cast<uint32_t>(n));
  }

  std::unique_ptr<KernelDevice> device_;
};

TEST_P(KernelContractTest, CopyRowsCopiesItsBytesAndNoOthers) {
  for (uint32_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    std::mt19937 random(seed);
    const int64_t unit = int64_t{1} << Below(random, 6);  // sizes and places share alignments
    const int32_t planes = 1 + static_cast<int32_t>(Below(random, 4));
    const int64_t plane_bytes = 64 * 1024 + unit * Below(random, 9);
    const std::vector<uint8_t> in = RandomBytes(random, planes * plane_bytes);
    std::vector<uint8_t> expected(in.size(), kPoison);
    uint8_t* d_in = device_->Place(in);
    uint8_t* d_out = device_->Place(expected);
    std::vector<CopyRun> runs;
    int64_t longest = 0;
    int64_t to = unit * Below(random, 5);
    while (true) {
      const int64_t bytes = unit * Below(random, runs.size() == 2 ? 1000 : 300);
      if (to + bytes > plane_bytes) break;
      const int64_t from = unit * Below(random, (plane_bytes - bytes) / unit + 1);
      runs.push_back({d_in + from, d_out + to, bytes});
      longest = std::max(longest, bytes);
      for (int32_t p = 0; p < planes; ++p) {
        std::memcpy(&expected[p * plane_bytes + to], &in[p * plane_bytes + from], bytes);
      }
      to += bytes + unit * Below(random, 5);
      if (runs.size() == 40) break;
    }
    CopyRowsArgs args{
        runs.data(), static_cast<int64_t>(runs.size()), planes, plane_bytes, plane_bytes, longest};
    ASSERT_STREQ(CheckCopyRowsArgs(args), nullptr);
    args.runs = device_->Place(runs);
    ASSERT_EQ(device_->Run(args), 0);
    ASSERT_EQ(device_->Fetch(d_out, expected.size()), expected);
  }
}

// Both layouts of engine pools, both directions, skipped tokens: the pool and the page hold the
// same rows afterwards and nothing else has changed.
TEST_P(KernelContractTest, PagesGoToAnEnginePoolAndComeBack) {
  for (uint32_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    std::mt19937 random(seed);
    const bool heads_first = random() % 2 == 0;  // HND
    const int32_t num_heads = 1 + static_cast<int32_t>(Below(random, 4));
    const int64_t head_bytes = (int64_t{1} << Below(random, 6)) * (1 + Below(random, 9));
    const int64_t row_bytes = num_heads * head_bytes;
    const int32_t engine_page_tokens = 1 + static_cast<int32_t>(Below(random, 16));
    const int64_t engine_pages = 20;
    const int64_t engine_page_bytes = engine_page_tokens * row_bytes;
    const int32_t page_tokens = 32;
    const int32_t num_planes = 4;  // K and V of two layers
    const int64_t page_bytes = num_planes * page_tokens * row_bytes;
    const int64_t num_pages = 3;

    const size_t plane_size = static_cast<size_t>(engine_pages * engine_page_bytes);
    std::vector<std::vector<uint8_t>> pool;
    std::vector<uint8_t*> d_pool;
    std::vector<EnginePlane> planes;
    for (int32_t p = 0; p < num_planes; ++p) {
      pool.push_back(RandomBytes(random, plane_size));
      d_pool.push_back(device_->Place(pool.back()));
      planes.push_back({d_pool.back(), engine_page_bytes, heads_first ? head_bytes : row_bytes,
                        heads_first ? engine_page_tokens * head_bytes : head_bytes,
                        p * page_tokens * row_bytes});
    }
    std::vector<uint8_t> pages(static_cast<size_t>(num_pages * page_bytes), kPoison);
    uint8_t* d_pages = device_->Place(pages);

    // Distinct slots in random order, some tokens without one.
    std::vector<int64_t> all(static_cast<size_t>(engine_pages * engine_page_tokens));
    for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int64_t>(i);
    std::shuffle(all.begin(), all.end(), random);
    std::vector<PageTokens> tokens;
    std::vector<std::vector<int64_t>> slots;
    size_t next = 0;
    for (int64_t i = 0; i < num_pages; ++i) {
      const int32_t first = static_cast<int32_t>(Below(random, page_tokens));
      const int32_t count =
          std::min<int32_t>(static_cast<int32_t>(Below(random, page_tokens - first + 1)),
                            static_cast<int32_t>(all.size() / 4));
      slots.emplace_back();
      for (int32_t t = 0; t < count; ++t) {
        slots.back().push_back(random() % 8 == 0 ? -1 : all[next++]);
      }
      tokens.push_back({d_pages + i * page_bytes, device_->Place(slots.back()), first, count});
    }
    const auto engine_at = [&](const EnginePlane& plane, int64_t slot, int32_t head) {
      return slot / engine_page_tokens * plane.engine_page_bytes +
             slot % engine_page_tokens * plane.engine_token_bytes + head * plane.engine_head_bytes;
    };
    PageMoveArgs args{PageMoveDirection::kGather,
                      device_->Place(planes),
                      num_planes,
                      device_->Place(tokens),
                      num_pages,
                      page_tokens,
                      engine_page_tokens,
                      num_heads,
                      head_bytes};
    ASSERT_EQ(device_->Run(args), 0);
    const auto for_each_head = [&](auto&& visit) {
      for (int64_t i = 0; i < num_pages; ++i) {
        for (int32_t t = 0; t < tokens[i].num_tokens; ++t) {
          if (slots[i][t] < 0) continue;
          for (int32_t p = 0; p < num_planes; ++p) {
            for (int32_t h = 0; h < num_heads; ++h) {
              visit(p, engine_at(planes[p], slots[i][t], h),
                    i * page_bytes + planes[p].page_offset +
                        (tokens[i].first_token + t) * row_bytes + h * head_bytes);
            }
          }
        }
      }
    };
    for_each_head([&](int32_t p, int64_t in_engine, int64_t in_pages) {
      std::memcpy(&pages[in_pages], &pool[p][in_engine], head_bytes);
    });
    ASSERT_EQ(device_->Fetch(d_pages, pages.size()), pages);

    // Back, over poison.
    std::vector<std::vector<uint8_t>> expected(num_planes,
                                               std::vector<uint8_t>(plane_size, kPoison));
    for (int32_t p = 0; p < num_planes; ++p) {
      device_->Write(d_pool[p], expected[p].data(), plane_size);
    }
    args.direction = PageMoveDirection::kScatter;
    ASSERT_EQ(device_->Run(args), 0);
    for_each_head([&](int32_t p, int64_t in_engine, int64_t in_pages) {
      std::memcpy(&expected[p][in_engine], &pages[in_pages], head_bytes);
    });
    for (int32_t p = 0; p < num_planes; ++p) {
      ASSERT_EQ(device_->Fetch(d_pool[p], plane_size), expected[p]) << "plane " << p;
    }
  }
}

// One group, or one element, at a time through the scalar oracle.
std::vector<uint8_t> ConvertByOracle(KvType from, KvType to, const std::vector<uint8_t>& in) {
  const int64_t count = static_cast<int64_t>(in.size()) / GroupBytes(from) * GroupElements(from);
  std::vector<float> wide(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; i += GroupElements(from)) {
    const uint8_t* at = &in[EncodedBytes(from, i)];
    if (IsBlockType(from)) {
      DecodeGroup(from, at, &wide[i]);
    } else {
      WidenToF32(from, at, 1, &wide[i], Isa::kBaseline);
    }
  }
  std::vector<uint8_t> out(static_cast<size_t>(EncodedBytes(to, count)));
  for (int64_t i = 0; i < count; i += GroupElements(to)) {
    uint8_t* at = &out[EncodedBytes(to, i)];
    if (IsBlockType(to)) {
      EncodeGroup(to, &wide[i], at);
    } else {
      NarrowFromF32(to, &wide[i], 1, at, Isa::kBaseline);
    }
  }
  return out;
}

TEST_P(KernelContractTest, ConvertRowsEqualsTheScalarOracleForAllPairsOfTypes) {
  for (const KvType from : kAllTypes) {
    for (const KvType to : kAllTypes) {
      SCOPED_TRACE(testing::Message() << KvTypeName(from) << " to " << KvTypeName(to));
      std::mt19937 random(static_cast<uint32_t>(from) * 100 + static_cast<uint32_t>(to));
      const bool blocks = IsBlockType(from) || IsBlockType(to);
      // 96 and 64 are heads that today's models use; 37 leaves a rest; 2176 is several steps.
      for (const int64_t elements :
           blocks ? std::vector<int64_t>{32, 96, 2176} : std::vector<int64_t>{1, 37, 64, 2177}) {
        const int64_t rows = 5;
        const int64_t in_bytes = EncodedBytes(from, elements);
        const int64_t out_bytes = EncodedBytes(to, elements);
        // Wide and narrow paths: strides of whole 16 bytes, and of 4 more.
        for (const int64_t pad : {0, 4}) {
          const int64_t in_stride = (in_bytes + 15) / 16 * 16 + pad;
          const int64_t out_stride = (out_bytes + 15) / 16 * 16 + pad;
          std::vector<uint8_t> in(static_cast<size_t>(rows * in_stride), kPoison);
          std::vector<uint8_t> expected(static_cast<size_t>(rows * out_stride), kPoison);
          for (int64_t row = 0; row < rows; ++row) {
            const std::vector<float> values = RandomFloats(random, static_cast<size_t>(elements));
            std::vector<uint8_t> encoded(static_cast<size_t>(in_bytes));
            NarrowFromF32(from, values.data(), elements, encoded.data());
            std::memcpy(&in[row * in_stride], encoded.data(), encoded.size());
            const std::vector<uint8_t> converted = ConvertByOracle(from, to, encoded);
            // The fourth row belongs to no run.
            if (row == 3) continue;
            std::memcpy(&expected[row * out_stride], from == to ? encoded.data() : converted.data(),
                        converted.size());
          }
          uint8_t* d_in = device_->Place(in);
          uint8_t* d_out = device_->Place(std::vector<uint8_t>(expected.size(), kPoison));
          const std::vector<ConvertRun> runs = {{d_in, d_out, 3},
                                                {d_in + 4 * in_stride, d_out + 4 * out_stride, 1}};
          const ConvertRowsArgs args{
              from, to, elements, in_stride, out_stride, device_->Place(runs), 2, 3};
          ASSERT_EQ(device_->Run(args), 0);
          ASSERT_EQ(device_->Fetch(d_out, expected.size()), expected)
              << elements << ", pad " << pad;
        }
      }
    }
  }
}

// The head sizes of today's open models, both pairings, in place and out of place; the host twin
// itself is held to float64 in rope_shift_test.cc.
TEST_P(KernelContractTest, RopeShiftGivesTheBitsOfTheHostTwin) {
  struct Shape {
    int head_dim, rope_offset, n_rot;
  };
  for (const KvType type : kAllTypes) {
    for (const Shape& shape : {Shape{64, 0, 64}, Shape{80, 0, 32}, Shape{96, 0, 96},
                               Shape{128, 0, 128}, Shape{192, 128, 64}, Shape{256, 0, 64},
                               Shape{576, 512, 64}, Shape{160, 0, 50}, Shape{36, 3, 30}}) {
      if (shape.head_dim % GroupElements(type) != 0) continue;
      for (const RopeStyle style : {RopeStyle::kNorm, RopeStyle::kNeox}) {
        SCOPED_TRACE(testing::Message() << KvTypeName(type) << ", head_dim " << shape.head_dim
                                        << ", style " << static_cast<int>(style));
        std::mt19937 random(static_cast<uint32_t>(shape.head_dim));
        RopeParams params;
        params.style = style;
        params.n_rot = shape.n_rot;
        const int heads = shape.head_dim > 256 ? 1 : 3;
        const int layers = 2;
        const int rows = 9;
        const int64_t row_bytes = EncodedBytes(type, int64_t{heads} * shape.head_dim);
        const int64_t layer_bytes = rows * row_bytes;
        const std::vector<float> values =
            RandomFloats(random, static_cast<size_t>(layers) * rows * heads * shape.head_dim);
        std::vector<uint8_t> in(static_cast<size_t>(layers * layer_bytes));
        NarrowFromF32(type, values.data(), static_cast<int64_t>(values.size()), in.data());
        const std::vector<int64_t> deltas = {-3, 0, 100000};
        std::vector<float> tables(deltas.size() * shape.n_rot);
        for (size_t i = 0; i < deltas.size(); ++i) {
          RopeAngles(params, deltas[i], &tables[i * shape.n_rot]);
        }
        // Rows 0-3, 4-5 and 6-8 of every layer, by their deltas.
        const auto runs_of = [&](uint8_t* from, uint8_t* to) {
          return std::vector<RopeShiftRun>{
              {from, to, 4, deltas[0]},
              {from + 4 * row_bytes, to + 4 * row_bytes, 2, deltas[1]},
              {from + 6 * row_bytes, to + 6 * row_bytes, 3, deltas[2]}};
        };
        RopeShiftArgs args{params,    type,      heads,  shape.head_dim, shape.rope_offset,
                           row_bytes, row_bytes, layers, layer_bytes,    layer_bytes,
                           nullptr,   3,         4,      tables.data()};
        std::vector<uint8_t> expected = in;
        const std::vector<RopeShiftRun> host_runs = runs_of(expected.data(), expected.data());
        args.runs = host_runs.data();
        ASSERT_STREQ(CheckRopeShiftArgs(args), nullptr);
        RopeShiftHost(args, Isa::kBaseline);

        args.cos_sin = device_->Place(tables);
        uint8_t* d_in = device_->Place(in);
        uint8_t* d_out = device_->Place(std::vector<uint8_t>(in.size(), kPoison));
        args.runs = device_->Place(runs_of(d_in, d_out));
        ASSERT_EQ(device_->Run(args), 0);
        ASSERT_EQ(device_->Fetch(d_out, in.size()), expected) << "out of place";
        ASSERT_EQ(device_->Fetch(d_in, in.size()), in);
        args.runs = device_->Place(runs_of(d_in, d_in));
        ASSERT_EQ(device_->Run(args), 0);
        ASSERT_EQ(device_->Fetch(d_in, in.size()), expected) << "in place";
      }
    }
  }
}

TEST_P(KernelContractTest, BytePlanesSplitAndMergeBack) {
  std::mt19937 random(5);
  for (const int32_t width : {1, 2, 3, 4, 8, 18, 34, 64}) {
    for (const int64_t count : {0, 1, 15, 16, 17, 48, 1000, 4096, 4100}) {
      for (const size_t misalign : {0, 1}) {
        SCOPED_TRACE(testing::Message() << width << " bytes × " << count << " at " << misalign);
        const std::vector<uint8_t> in = RandomBytes(random, static_cast<size_t>(width * count));
        std::vector<uint8_t> expected(in.size());
        for (int64_t i = 0; i < count; ++i) {
          for (int32_t b = 0; b < width; ++b) expected[b * count + i] = in[i * width + b];
        }
        uint8_t* d_in = device_->Place(in, misalign);
        uint8_t* d_planes = device_->Place(std::vector<uint8_t>(in.size() + 1, kPoison), misalign);
        uint8_t* d_back = device_->Place(std::vector<uint8_t>(in.size() + 1, kPoison), misalign);
        ASSERT_EQ(device_->Split({d_in, d_planes, count, width}), 0);
        expected.push_back(kPoison);
        ASSERT_EQ(device_->Fetch(d_planes, expected.size()), expected);
        ASSERT_EQ(device_->Merge({d_planes, d_back, count, width}), 0);
        std::vector<uint8_t> back = in;
        back.push_back(kPoison);
        ASSERT_EQ(device_->Fetch(d_back, back.size()), back);
      }
    }
  }
}

#ifdef PAGETIDE_EMULATED_CUDA
INSTANTIATE_TEST_SUITE_P(Devices, KernelContractTest, testing::Values("emulated"),
#else
INSTANTIATE_TEST_SUITE_P(Devices, KernelContractTest, testing::Values("host", "cuda"),
#endif
                         [](const auto& info) { return info.param; });

TEST(KernelArgumentsTest, WhatCannotWorkIsNamed) {
  const auto names = [](const char* wrong, const char* field) {
    return wrong != nullptr && std::string(wrong).find(field) != std::string::npos;
  };
  std::vector<uint8_t> bytes(256);
  const CopyRun copy{bytes.data(), bytes.data() + 128, 64};
  EXPECT_STREQ(CheckCopyRowsArgs({&copy, 1, 1, 0, 0, 64}), nullptr);
  EXPECT_TRUE(names(CheckCopyRowsArgs({&copy, 1, 1, 0, 0, 63}), "max_run_bytes"));
  EXPECT_TRUE(names(CheckCopyRowsArgs({&copy, 1, 0, 0, 0, 64}), "num_planes"));
  const CopyRun nowhere{bytes.data(), nullptr, 64};
  EXPECT_TRUE(names(CheckCopyRowsArgs({&nowhere, 1, 1, 0, 0, 64}), "null"));

  const ConvertRun convert{bytes.data(), bytes.data() + 128, 1};
  ConvertRowsArgs rows{KvType::kF32, KvType::kQ8_0, 32, 128, 34, &convert, 1, 1};
  EXPECT_STREQ(CheckConvertRowsArgs(rows), nullptr);
  rows.row_elements = 31;
  EXPECT_TRUE(names(CheckConvertRowsArgs(rows), "row_elements"));
  rows.row_elements = 32;
  rows.out_row_bytes = 33;
  EXPECT_TRUE(names(CheckConvertRowsArgs(rows), "out_row_bytes"));

  const int64_t slot = -2;
  const EnginePlane plane{bytes.data(), 64, 64, 64, 0};
  const PageTokens tokens{bytes.data(), &slot, 0, 1};
  PageMoveArgs move{PageMoveDirection::kGather, &plane, 1, &tokens, 1, 1, 1, 1, 64};
  EXPECT_TRUE(names(CheckPageMoveArgs(move), "slot"));
  move.engine_page_tokens = 0;
  EXPECT_TRUE(names(CheckPageMoveArgs(move), "engine_page_tokens"));

  EXPECT_TRUE(names(CheckBytePlanesArgs({bytes.data(), bytes.data(), 1, 65}), "element_bytes"));
}

}  // namespace
}  // namespace pagetide::kernels
