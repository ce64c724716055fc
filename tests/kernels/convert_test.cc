#include "kernels/convert.h"

#include <cmath>
#include <limits>
#include <vector>

#include "gtest/gtest.h"

namespace pagetide::kernels {
namespace {

// Value of an f16 by its definition: sign, exponent bias 15, ten mantissa bits.
double DefinitionOfF16(uint16_t half) {
  const double sign = (half & 0x8000) ? -1.0 : 1.0;
  const int exponent = (half >> 10) & 31;
  const int mantissa = half & 1023;
  if (exponent == 31)
    return mantissa ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  if (exponent == 0) return sign * std::ldexp(mantissa, -24);
  return sign * std::ldexp(1024 + mantissa, exponent - 25);
}

TEST(ConvertTest, EveryF16WidensExactlyAndNarrowsBack) {
  for (int bits = 0; bits < 65536; ++bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    const float wide = F16ToF32(half);
    const double expected = DefinitionOfF16(half);
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(wide)) << bits;
      EXPECT_TRUE(std::isnan(F16ToF32(F32ToF16(wide)))) << bits;
      continue;
    }
    ASSERT_EQ(static_cast<double>(wide), expected) << bits;
    ASSERT_EQ(std::signbit(wide), (half & 0x8000) != 0) << bits;
    ASSERT_EQ(F32ToF16(wide), half) << bits;
  }
}

TEST(ConvertTest, NarrowsToTheNearestF16TiesToEven) {
  // Between each pair of neighbours: just below the middle, the middle, just above.
  for (int bits = 0; bits < 0x7bff; ++bits) {
    const double low = DefinitionOfF16(static_cast<uint16_t>(bits));
    const double high = DefinitionOfF16(static_cast<uint16_t>(bits + 1));
    const float middle = static_cast<float>((low + high) / 2);  // exact: one bit more than f16
    ASSERT_EQ(F32ToF16(middle), (bits & 1) ? bits + 1 : bits) << bits;
    ASSERT_EQ(F32ToF16(std::nextafter(middle, 0.0f)), bits) << bits;
    ASSERT_EQ(F32ToF16(std::nextafter(middle, 1e9f)), bits + 1) << bits;
  }
  EXPECT_EQ(F32ToF16(65519.99f), 0x7bff);
  EXPECT_EQ(F32ToF16(65520.0f), 0x7c00);
  EXPECT_EQ(F32ToF16(-1e30f), 0xfc00);
}

TEST(ConvertTest, EveryBF16WidensExactlyAndNarrowsBack) {
  for (int bits = 0; bits < 65536; ++bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    const float wide = BF16ToF32(half);
    if (std::isnan(wide)) {
      EXPECT_TRUE(std::isnan(BF16ToF32(F32ToBF16(wide))));
    } else {
      ASSERT_EQ(F32ToBF16(wide), half) << bits;
    }
  }
  EXPECT_EQ(F32ToBF16(FloatOf(0x3f808000u)), 0x3f80);  // tie, to even
  EXPECT_EQ(F32ToBF16(FloatOf(0x3f818000u)), 0x3f82);  // tie, to even
  EXPECT_EQ(F32ToBF16(FloatOf(0x3f808001u)), 0x3f81);
}

TEST(ConvertTest, RowsNeedNoAlignment) {
  const std::vector<float> values = {1.5f, -2.25f, 0.0f, 3e-5f, 1000.0f};
  for (const KvType type : {KvType::kF32, KvType::kF16, KvType::kBF16}) {
    std::vector<char> bytes(EncodedBytes(type, values.size()) + 1);
    NarrowFromF32(type, values.data(), values.size(), bytes.data() + 1);
    std::vector<float> back(values.size());
    WidenToF32(type, bytes.data() + 1, values.size(), back.data());
    for (size_t i = 0; i < values.size(); ++i) {
      EXPECT_NEAR(back[i], values[i], std::abs(values[i]) / 128) << i;
    }
  }
}

}  // namespace
}  // namespace pagetide::kernels
