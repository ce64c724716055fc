#include "kernels/rope.h"

#include <cmath>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace pagetide::kernels {
namespace {

RopeArgs Args(const RopeParams& params, std::vector<float>& row, const int64_t& position) {
  return RopeArgs{params,     KvType::kF32,
                  row.data(), static_cast<int64_t>(row.size()) * 4,
                  1,          static_cast<int32_t>(row.size()),
                  &position,  1,
                  1.0f};
}

std::vector<float> Turned(const RopeParams& params, std::vector<float> row, int64_t position) {
  RopeHost(Args(params, row, position));
  return row;
}

TEST(RopeTest, ShiftOfAWrittenRowEqualsWritingItAtTheNewPosition) {
  for (const RopeStyle style : {RopeStyle::kNorm, RopeStyle::kNeox}) {
    RopeParams params;
    params.style = style;
    params.n_rot = 4;
    const std::vector<float> k = {1, 2, 3, 4};
    const std::vector<float> shifted = Turned(params, Turned(params, k, 7), -3);
    const std::vector<float> direct = Turned(params, k, 4);
    for (int i = 0; i < 4; ++i) EXPECT_NEAR(shifted[i], direct[i], 1e-5) << i;
  }
}

TEST(RopeTest, PairsFollowTheStyle) {
  RopeParams params;
  params.n_rot = 4;
  params.base = 100.0f;  // theta = 1, 0.1
  const std::vector<float> k = {1, 0, 1, 0};
  const std::vector<float> norm = Turned(params, k, 2);
  EXPECT_NEAR(norm[0], std::cos(2.0), 1e-6);
  EXPECT_NEAR(norm[1], std::sin(2.0), 1e-6);
  EXPECT_NEAR(norm[2], std::cos(0.2), 1e-6);
  EXPECT_NEAR(norm[3], std::sin(0.2), 1e-6);
  params.style = RopeStyle::kNeox;
  const std::vector<float> neox = Turned(params, k, 2);
  EXPECT_NEAR(neox[0], std::cos(2.0) - std::sin(2.0), 1e-6);
  EXPECT_NEAR(neox[2], std::cos(2.0) + std::sin(2.0), 1e-6);
  EXPECT_NEAR(neox[1], 0.0, 1e-6);
  EXPECT_NEAR(neox[3], 0.0, 1e-6);
}

TEST(RopeTest, OnlyTheLeadingElementsOfEachHeadTurnAndStrideIsKept) {
  RopeParams params;
  params.n_rot = 2;
  // Two rows of two heads of four elements, with two elements of padding a row.
  std::vector<float> rows(20, 1.0f);
  const std::vector<int64_t> positions = {0, 1};
  RopeHost(RopeArgs{params, KvType::kF32, rows.data(), 40, 2, 4, positions.data(), 2, 1.0f});
  for (int i = 0; i < 10; ++i) EXPECT_EQ(rows[i], 1.0f) << "position 0 turns nothing: " << i;
  for (const int i : {12, 13, 16, 17, 18, 19}) EXPECT_EQ(rows[i], 1.0f) << i;
  for (const int i : {10, 14}) EXPECT_NEAR(rows[i], std::cos(1.0) - std::sin(1.0), 1e-6) << i;
}

TEST(RopeTest, YarnMixesTheAngleAndShiftsCompose) {
  RopeParams params;
  params.n_rot = 64;
  params.scale = 0.25f;
  params.ext_factor = 1.0f;
  params.original_context = 4096;
  std::vector<float> angles(64);
  RopeAngles(params, 1, angles.data());
  // The fastest pair keeps its angle, the slowest is interpolated in full.
  EXPECT_NEAR(std::atan2(angles[1], angles[0]), 1.0, 1e-6);
  const double slowest = std::pow(10000.0, -62.0 / 64.0);
  EXPECT_NEAR(std::atan2(angles[63], angles[62]), 0.25 * slowest, 1e-9);

  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<float> k(64);
  for (float& x : k) x = normal(random);
  const std::vector<float> twice = Turned(params, Turned(params, k, 1000), -700);
  const std::vector<float> once = Turned(params, k, 300);
  for (int i = 0; i < 64; ++i) EXPECT_NEAR(twice[i], once[i], 1e-4) << i;
}

TEST(RopeTest, HalfTypesAgreeWithF32WithinTheirPrecision) {
  RopeParams params;
  params.n_rot = 8;
  std::vector<float> k = {1, -2, 3, -4, 5, -6, 7, -8};
  const std::vector<float> exact = Turned(params, k, 123);
  const int64_t position = 123;
  for (const KvType type : {KvType::kF16, KvType::kBF16}) {
    std::vector<char> bytes(16);
    NarrowFromF32(type, k.data(), 8, bytes.data());
    RopeHost(RopeArgs{params, type, bytes.data(), 16, 1, 8, &position, 1, 1.0f});
    std::vector<float> turned(8);
    WidenToF32(type, bytes.data(), 8, turned.data());
    for (int i = 0; i < 8; ++i)
      EXPECT_NEAR(turned[i], exact[i], type == KvType::kF16 ? 0.01 : 0.08);
  }
}

}  // namespace
}  // namespace pagetide::kernels
