#include "kernels/rope_shift.h"

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/convert.h"

namespace pagetide::kernels {
namespace {

constexpr KvType kTypes[] = {KvType::kF32,    KvType::kF16,  KvType::kBF16, KvType::kF8E4M3,
                             KvType::kF8E5M2, KvType::kQ8_0, KvType::kQ5_0, KvType::kQ5_1,
                             KvType::kQ4_0,   KvType::kQ4_1, KvType::kIQ4NL};

std::vector<float> Normal(uint32_t seed, int64_t count) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& x : values) x = normal(random);
  return values;
}

// Shape of the rows and one run over all of them.
struct Rows {
  RopeParams params;
  KvType type = KvType::kF32;
  int num_heads = 1;
  int head_dim = 64;
  int rope_offset = 0;
  int num_rows = 1;

  int64_t row_bytes() const { return EncodedBytes(type, int64_t{num_heads} * head_dim); }
  RopeShiftArgs Args(const RopeShiftRun* run) const {
    return RopeShiftArgs{params, type, num_heads, head_dim, rope_offset, row_bytes(), row_bytes(),
                         1,      0,    0,         run,      1,           num_rows,    nullptr};
  }
  std::vector<uint8_t> Encode(const std::vector<float>& values) const {
    std::vector<uint8_t> bytes(static_cast<size_t>(num_rows * row_bytes()));
    NarrowFromF32(type, values.data(), static_cast<int64_t>(values.size()), bytes.data());
    return bytes;
  }
  std::vector<float> Decode(const std::vector<uint8_t>& bytes) const {
    std::vector<float> values(static_cast<size_t>(num_rows) * num_heads * head_dim);
    WidenToF32(type, bytes.data(), static_cast<int64_t>(values.size()), values.data());
    return values;
  }
  std::vector<uint8_t> Shift(std::vector<uint8_t> bytes, int64_t delta,
                             Isa isa = Isa::kBest) const {
    const RopeShiftRun run{bytes.data(), bytes.data(), num_rows, delta};
    const RopeShiftArgs args = Args(&run);
    EXPECT_EQ(CheckRopeShiftArgs(args), nullptr);
    RopeShiftHost(args, isa);
    return bytes;
  }
  // RoPE at `position` in double, element by element.
  std::vector<double> Direct(const std::vector<float>& values, int64_t position) const {
    std::vector<double> out(values.begin(), values.end());
    const int half = params.n_rot / 2;
    for (int64_t head = 0; head < int64_t{num_rows} * num_heads; ++head) {
      double* x = &out[head * head_dim + rope_offset];
      for (int i = 0; i < half; ++i) {
        const double factor = params.factors == nullptr ? 1.0 : params.factors[i];
        const double theta =
            params.scale * std::pow(double{params.base}, -2.0 * i / params.n_rot) / factor;
        const bool neox = params.style == RopeStyle::kNeox;
        double& a = x[neox ? i : 2 * i];
        double& b = x[neox ? i + half : 2 * i + 1];
        const double c = std::cos(position * theta);
        const double s = std::sin(position * theta);
        const double turned = a * c - b * s;
        b = a * s + b * c;
        a = turned;
      }
    }
    return out;
  }
};

TEST(RopeShiftTest, ARowWrittenAt7AndShiftedByMinus3IsARowWrittenAt4) {
  for (const RopeStyle style : {RopeStyle::kNorm, RopeStyle::kNeox}) {
    Rows rows;
    rows.params.style = style;
    rows.params.n_rot = 4;
    rows.head_dim = 4;
    const std::vector<float> k = {1, 2, 3, 4};
    const std::vector<double> at7 = rows.Direct(k, 7);
    const std::vector<float> written(at7.begin(), at7.end());
    const std::vector<float> shifted = rows.Decode(rows.Shift(rows.Encode(written), -3));
    const std::vector<double> at4 = rows.Direct(k, 4);
    for (int i = 0; i < 4; ++i) EXPECT_NEAR(shifted[i], at4[i], 1e-5) << i;
  }
}

// R(a)R(b) = R(a + b), for random shapes, both pairings, partial rotation, scaling and factors.
TEST(RopeShiftTest, TwoShiftsEqualTheirSum) {
  for (uint32_t seed = 1; seed <= 200; ++seed) {
    std::mt19937 random(seed);
    Rows rows;
    rows.num_rows = 1 + random() % 3;
    rows.num_heads = 1 + random() % 4;
    rows.params.style = random() % 2 == 0 ? RopeStyle::kNorm : RopeStyle::kNeox;
    rows.params.n_rot = 2 * (1 + random() % 40);
    rows.rope_offset = random() % 20;
    rows.head_dim = rows.rope_offset + rows.params.n_rot + random() % 20;
    rows.params.scale = random() % 2 == 0 ? 1.0f : 0.25f;
    std::vector<float> factors(rows.params.n_rot / 2);
    for (float& f : factors) f = 1.0f + static_cast<float>(random() % 100) / 10.0f;
    if (random() % 2 == 0) rows.params.factors = factors.data();
    if (random() % 2 == 0) {
      rows.params.ext_factor = 1.0f;
      rows.params.original_context = 4096;
    }
    const int64_t a = static_cast<int64_t>(random() % 200000) - 100000;
    const int64_t b = static_cast<int64_t>(random() % 200000) - 100000;
    const std::vector<float> k =
        Normal(seed, int64_t{rows.num_rows} * rows.num_heads * rows.head_dim);
    const std::vector<uint8_t> encoded = rows.Encode(k);
    const std::vector<float> twice = rows.Decode(rows.Shift(rows.Shift(encoded, a), b));
    const std::vector<float> once = rows.Decode(rows.Shift(encoded, a + b));
    const std::vector<float> back = rows.Decode(rows.Shift(rows.Shift(encoded, a), -a));
    for (size_t i = 0; i < k.size(); ++i) {
      ASSERT_NEAR(twice[i], once[i], 4e-6) << "seed " << seed << ", element " << i;
      ASSERT_NEAR(back[i], k[i], 4e-6) << "seed " << seed << ", element " << i;
    }
  }
}

TEST(RopeShiftTest, EveryTypeAgreesWithDirectRopeWithinItsStep) {
  // Half a step of the encoding for elements of a normal distribution, with room for the extremes.
  const double bound[] = {2e-6, 2e-3, 2e-2, 0.2, 0.3, 0.04, 0.25, 0.3, 0.6, 0.6, 0.6};
  for (const KvType type : kTypes) {
    Rows rows;
    rows.type = type;
    rows.num_rows = 8;
    rows.num_heads = 2;
    rows.params.style = RopeStyle::kNeox;
    rows.params.n_rot = 64;
    const std::vector<float> k = Normal(3, 8 * 2 * 64);
    const std::vector<uint8_t> encoded = rows.Encode(k);
    const std::vector<float> shifted = rows.Decode(rows.Shift(encoded, -777));
    const std::vector<double> direct = rows.Direct(rows.Decode(encoded), -777);
    double worst = 0.0;
    for (size_t i = 0; i < k.size(); ++i) worst = std::max(worst, std::abs(shifted[i] - direct[i]));
    EXPECT_LT(worst, bound[static_cast<int>(type)]) << KvTypeName(type);
  }
}

TEST(RopeShiftTest, MagnitudeIsOneUnderYarn) {
  Rows rows;
  rows.params.n_rot = 64;
  rows.params.scale = 0.25f;
  rows.params.ext_factor = 1.0f;
  rows.params.original_context = 4096;
  const std::vector<float> k = Normal(4, 64);
  const std::vector<float> shifted = rows.Decode(rows.Shift(rows.Encode(k), 12345));
  for (int i = 0; i < 64; i += 2) {
    EXPECT_NEAR(std::hypot(shifted[i], shifted[i + 1]), std::hypot(k[i], k[i + 1]), 1e-6) << i;
  }
}

TEST(RopeShiftTest, ZeroDeltaAndUntouchedGroupsKeepTheirBits) {
  for (const KvType type : kTypes) {
    // The turned part begins in group 4 of 6 (elements 128 to 160), as in an MLA row.
    Rows rows;
    rows.type = type;
    rows.num_rows = 3;
    rows.num_heads = 2;
    rows.head_dim = 192;
    rows.rope_offset = 128;
    rows.params.n_rot = 32;
    const std::vector<uint8_t> encoded = rows.Encode(Normal(5, 3 * 2 * 192));
    EXPECT_EQ(rows.Shift(encoded, 0), encoded) << KvTypeName(type);
    const std::vector<uint8_t> shifted = rows.Shift(encoded, 9);
    const int64_t head = EncodedBytes(type, 192);
    const int64_t begin = EncodedBytes(type, 128);
    const int64_t end = EncodedBytes(type, 160);
    for (int h = 0; h < 6; ++h) {
      const uint8_t* before = &encoded[h * head];
      const uint8_t* after = &shifted[h * head];
      EXPECT_EQ(std::memcmp(before, after, begin), 0) << KvTypeName(type);
      EXPECT_NE(std::memcmp(before + begin, after + begin, end - begin), 0) << KvTypeName(type);
      EXPECT_EQ(std::memcmp(before + end, after + end, head - end), 0) << KvTypeName(type);
    }
  }
}

// Runs of several layers out of place, with padding between rows: what one call over pages does is
// what calls row by row do, and nothing else is written.
TEST(RopeShiftTest, RunsLayersAndStridesAreThoseOfSingleRows) {
  for (const KvType type : kTypes) {
    Rows one;
    one.type = type;
    one.num_heads = 2;
    one.head_dim = 64;
    one.params.n_rot = 32;
    const int64_t row = one.row_bytes();
    const int64_t in_stride = row + 3;
    const int64_t out_stride = row + 5;
    const int layers = 3;
    const int rows_in_layer = 7;
    std::vector<uint8_t> in(layers * rows_in_layer * in_stride, 0x11);
    for (int i = 0; i < layers * rows_in_layer; ++i) {
      const std::vector<uint8_t> encoded = one.Encode(Normal(100 + i, 128));
      std::memcpy(&in[i * in_stride], encoded.data(), row);
    }
    std::vector<uint8_t> out(layers * rows_in_layer * out_stride, 0xee);
    std::vector<uint8_t> expected = out;
    const std::vector<RopeShiftRun> runs = {
        {&in[0], &out[0], 4, -5},
        {&in[4 * in_stride], &out[4 * out_stride], 2, -5},
        {&in[6 * in_stride], &out[6 * out_stride], 1, 0},
    };
    RopeShiftArgs args = one.Args(runs.data());
    args.num_runs = 3;
    args.in_row_bytes = in_stride;
    args.out_row_bytes = out_stride;
    args.num_layers = layers;
    args.in_layer_bytes = rows_in_layer * in_stride;
    args.out_layer_bytes = rows_in_layer * out_stride;
    ASSERT_EQ(CheckRopeShiftArgs(args), nullptr);
    for (int i = 0; i < layers * rows_in_layer; ++i) {
      std::vector<uint8_t> bytes(&in[i * in_stride], &in[i * in_stride] + row);
      bytes = one.Shift(bytes, i % rows_in_layer < 6 ? -5 : 0);
      std::memcpy(&expected[i * out_stride], bytes.data(), row);
    }
    RopeShiftHost(args);
    EXPECT_EQ(out, expected) << KvTypeName(type);

    std::vector<float> tables(3 * one.params.n_rot);
    for (int r = 0; r < 3; ++r) {
      RopeAngles(one.params, runs[r].delta, &tables[r * one.params.n_rot]);
    }
    args.cos_sin = tables.data();
    std::fill(out.begin(), out.end(), 0xee);
    RopeShiftHost(args);
    EXPECT_EQ(out, expected) << KvTypeName(type) << " with given tables";
  }
}

TEST(RopeShiftTest, EveryInstructionSetGivesTheSameBits) {
  for (const KvType type : kTypes) {
    for (const RopeStyle style : {RopeStyle::kNorm, RopeStyle::kNeox}) {
      for (const int n_rot : {2, 6, 30, 32, 50, 64}) {
        Rows rows;
        rows.type = type;
        rows.num_rows = 5;
        rows.num_heads = 3;
        rows.params.style = style;
        rows.params.n_rot = n_rot;
        const std::vector<uint8_t> encoded = rows.Encode(Normal(n_rot, 5 * 3 * 64));
        EXPECT_EQ(rows.Shift(encoded, 1234), rows.Shift(encoded, 1234, Isa::kBaseline))
            << KvTypeName(type) << ", n_rot " << n_rot;
      }
    }
  }
}

TEST(RopeShiftTest, ArgumentsThatCannotWorkAreNamed) {
  Rows rows;
  rows.params.n_rot = 64;
  std::vector<uint8_t> bytes(1024);
  const RopeShiftRun run{bytes.data(), bytes.data(), 1, 1};
  const RopeShiftArgs good = rows.Args(&run);
  ASSERT_EQ(CheckRopeShiftArgs(good), nullptr);
  const auto names = [](const RopeShiftArgs& args, const std::string& field) {
    const char* wrong = CheckRopeShiftArgs(args);
    return wrong != nullptr && std::string(wrong).find(field) != std::string::npos;
  };
  RopeShiftArgs bad = good;
  bad.params.n_rot = 63;
  EXPECT_TRUE(names(bad, "n_rot"));
  bad = good;
  bad.rope_offset = 1;
  EXPECT_TRUE(names(bad, "rope_offset"));
  bad = good;
  bad.in_row_bytes = 255;
  EXPECT_TRUE(names(bad, "in_row_bytes"));
  bad = good;
  bad.out_row_bytes = 260;
  EXPECT_TRUE(names(bad, "in place"));
  bad = good;
  bad.num_layers = 0;
  EXPECT_TRUE(names(bad, "num_layers"));
  bad = good;
  bad.type = KvType::kQ8_0;
  bad.head_dim = 72;
  EXPECT_TRUE(names(bad, "head_dim"));
}

}  // namespace
}  // namespace pagetide::kernels
