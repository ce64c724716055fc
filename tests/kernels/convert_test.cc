#include "kernels/convert.h"

#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <random>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/block_codec.h"

namespace pagetide::kernels {
namespace {

constexpr KvType kAllTypes[] = {KvType::kF32,    KvType::kF16,  KvType::kBF16, KvType::kF8E4M3,
                                KvType::kF8E5M2, KvType::kQ8_0, KvType::kQ5_0, KvType::kQ5_1,
                                KvType::kQ4_0,   KvType::kQ4_1, KvType::kIQ4NL};

std::vector<uint8_t> FromHex(const std::string& hex) {
  std::vector<uint8_t> bytes;
  for (size_t i = 0; i + 1 < hex.size(); i += 2) {
    bytes.push_back(static_cast<uint8_t>(std::stoi(hex.substr(i, 2), nullptr, 16)));
  }
  return bytes;
}

uint64_t Fnv1a(const std::vector<float>& values) {
  uint64_t hash = 0xcbf29ce484222325u;
  const unsigned char* bytes = reinterpret_cast<const unsigned char*>(values.data());
  for (size_t i = 0; i < values.size() * sizeof(float); ++i) {
    hash = (hash ^ bytes[i]) * 0x100000001b3u;
  }
  return hash;
}

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

TEST(ConvertTest, NaNsComeOutQuiet) {
  const float signalling = FloatOf(0xff800001u);
  EXPECT_EQ(F32ToF16(signalling), 0xfe00);
  EXPECT_EQ(F32ToBF16(signalling), 0xffc0);
  EXPECT_EQ(F32ToF8E4M3(signalling), 0x7f);
  EXPECT_EQ(F32ToF8E5M2(signalling), 0x7f);
  EXPECT_EQ(BitsOf(F16ToF32(0x7c01)), 0x7fc02000u);
  EXPECT_EQ(BitsOf(BF16ToF32(0xff81)), 0xffc10000u);
}

// Value of an fp8 by its definition; infinities and NaN as the format has them.
double DefinitionOfF8(uint8_t bits, int mantissa_bits, int bias, bool has_infinity) {
  const double sign = (bits & 0x80) ? -1.0 : 1.0;
  const int exponent = (bits & 0x7f) >> mantissa_bits;
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  if (has_infinity && exponent == (0x7f >> mantissa_bits)) {
    return mantissa ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  }
  if (!has_infinity && (bits & 0x7f) == 0x7f) return std::nan("");
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
}

TEST(ConvertTest, Fp8IsTheOcpFormatRoundedToEvenAndSaturated) {
  struct Format {
    int mantissa_bits, bias;
    bool has_infinity;
    uint8_t largest;  // finite
    float (*widen)(uint8_t);
    uint8_t (*narrow)(float);
  };
  for (const Format& f : {Format{3, 7, false, 0x7e, F8E4M3ToF32, F32ToF8E4M3},
                          Format{2, 15, true, 0x7b, F8E5M2ToF32, F32ToF8E5M2}}) {
    for (int bits = 0; bits < 256; ++bits) {
      const double expected =
          DefinitionOfF8(static_cast<uint8_t>(bits), f.mantissa_bits, f.bias, f.has_infinity);
      const float wide = f.widen(static_cast<uint8_t>(bits));
      if (std::isnan(expected)) {
        EXPECT_TRUE(std::isnan(wide)) << bits;
        EXPECT_EQ(f.narrow(wide), 0x7f) << bits;
        continue;
      }
      EXPECT_EQ(static_cast<double>(wide), expected) << bits;
      const bool is_finite = (bits & 0x7f) <= f.largest;
      EXPECT_EQ(f.narrow(wide), is_finite ? bits : (bits & 0x80) | f.largest) << bits;
    }
    for (int bits = 0; bits < f.largest; ++bits) {
      const float middle =
          (f.widen(static_cast<uint8_t>(bits)) + f.widen(static_cast<uint8_t>(bits + 1))) / 2;
      EXPECT_EQ(f.narrow(middle), (bits & 1) ? bits + 1 : bits) << bits;
      EXPECT_EQ(f.narrow(std::nextafter(middle, 0.0f)), bits) << bits;
      EXPECT_EQ(f.narrow(-std::nextafter(middle, 1e9f)), (bits + 1) | 0x80) << bits;
    }
    EXPECT_EQ(f.narrow(1e30f), f.largest);
    EXPECT_EQ(f.narrow(-std::numeric_limits<float>::infinity()), f.largest | 0x80);
  }
  EXPECT_EQ(F8E4M3ToF32(0x7e), 448.0f);
  EXPECT_EQ(F8E5M2ToF32(0x7b), 57344.0f);
}

uint16_t Load16(const std::vector<uint8_t>& bytes, int at) {
  return static_cast<uint16_t>(bytes[at] | bytes[at + 1] << 8);
}

// One element by the scalar oracle.
void NarrowOne(KvType type, float value, uint8_t* out) {
  switch (type) {
    case KvType::kF32:
      std::memcpy(out, &value, 4);
      return;
    case KvType::kF16:
      return StoreU16(out, F32ToF16(value));
    case KvType::kBF16:
      return StoreU16(out, F32ToBF16(value));
    case KvType::kF8E4M3:
      *out = F32ToF8E4M3(value);
      return;
    default:
      *out = F32ToF8E5M2(value);
  }
}
float WidenOne(KvType type, const uint8_t* in) {
  switch (type) {
    case KvType::kF32: {
      float value;
      std::memcpy(&value, in, 4);
      return value;
    }
    case KvType::kF16:
      return F16ToF32(LoadU16(in));
    case KvType::kBF16:
      return BF16ToF32(LoadU16(in));
    case KvType::kF8E4M3:
      return F8E4M3ToF32(*in);
    default:
      return F8E5M2ToF32(*in);
  }
}

std::vector<uint8_t> NarrowByOracle(KvType type, const std::vector<float>& values) {
  std::vector<uint8_t> out(EncodedBytes(type, values.size()));
  const int step = GroupElements(type);
  for (size_t i = 0; i < values.size(); i += step) {
    uint8_t* to = &out[i / step * GroupBytes(type)];
    IsBlockType(type) ? EncodeGroup(type, &values[i], to) : NarrowOne(type, values[i], to);
  }
  return out;
}
std::vector<float> WidenByOracle(KvType type, const std::vector<uint8_t>& bytes) {
  const int step = GroupElements(type);
  std::vector<float> out(bytes.size() / GroupBytes(type) * step);
  for (size_t i = 0; i < out.size(); i += step) {
    const uint8_t* from = &bytes[i / step * GroupBytes(type)];
    IsBlockType(type) ? DecodeGroup(type, from, &out[i]) : void(out[i] = WidenOne(type, from));
  }
  return out;
}

// Any two NaNs count as the same: which operand's payload a sum keeps is the compiler's choice.
bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (BitsOf(a[i]) != BitsOf(b[i]) && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
  }
  return true;
}

// Groups that reach every branch: any bits at all, zeros of both signs, equal magnitudes, halves
// of the codes' steps, subnormals, NaN and infinities.
std::vector<float> HostileValues(uint32_t seed, int64_t groups) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values;
  for (int64_t g = 0; g < groups; ++g) {
    const int kind = static_cast<int>(random() % 8);
    for (int j = 0; j < 32; ++j) {
      float x = normal(random);
      if (kind == 1) x = FloatOf(static_cast<uint32_t>(random()));
      if (kind == 2) x = (random() % 2 == 0 ? -1.0f : 1.0f) * static_cast<float>(random() % 3);
      if (kind == 3) x = static_cast<float>(static_cast<int>(random() % 511) - 255) / 2.0f;
      if (kind == 4) x = std::ldexp(x, -120 - static_cast<int>(random() % 30));
      if (kind == 5) x = random() % 4 == 0 ? -0.0f : 0.0f;
      if (kind == 6) x = std::ldexp(x, static_cast<int>(random() % 40));
      if (kind == 7) x = std::abs(x) * (random() % 4 == 0 ? 0.0f : 1.0f);
      values.push_back(x);
    }
  }
  return values;
}

TEST(ConvertTest, VectorTwinsGiveTheBitsOfTheScalarOracle) {
  for (uint32_t seed = 1; seed <= 20; ++seed) {
    const std::vector<float> values = HostileValues(seed, 200);
    std::mt19937 random(seed);
    for (const KvType type : kAllTypes) {
      const std::vector<uint8_t> expected = NarrowByOracle(type, values);
      // Any bytes may lie in a frame.
      std::vector<uint8_t> any(expected.size());
      for (uint8_t& byte : any) byte = static_cast<uint8_t>(random());
      for (const Isa isa : {Isa::kBest, Isa::kBaseline}) {
        SCOPED_TRACE(testing::Message()
                     << KvTypeName(type) << ", seed " << seed << ", isa " << static_cast<int>(isa));
        std::vector<uint8_t> narrow(expected.size());
        NarrowFromF32(type, values.data(), values.size(), narrow.data(), isa);
        ASSERT_EQ(narrow, expected);
        for (const std::vector<uint8_t>& bytes : {expected, any}) {
          std::vector<float> wide(values.size());
          WidenToF32(type, bytes.data(), values.size(), wide.data(), isa);
          ASSERT_TRUE(SameBits(wide, WidenByOracle(type, bytes)));
        }
      }
    }
  }
}

TEST(ConvertTest, AnyLengthAndAlignmentOfPlainTypesTouchesOnlyItsBytes) {
  const std::vector<float> values = HostileValues(77, 2);
  for (const KvType type : kAllTypes) {
    if (IsBlockType(type)) continue;
    for (size_t count = 0; count <= 33; ++count) {
      const size_t size = EncodedBytes(type, count);
      std::vector<uint8_t> bytes(size + 2, 0xab);
      NarrowFromF32(type, values.data(), count, bytes.data() + 1);
      EXPECT_EQ(bytes.front(), 0xab);
      EXPECT_EQ(bytes.back(), 0xab);
      const std::vector<float> some(values.begin(), values.begin() + count);
      const std::vector<uint8_t> expected = NarrowByOracle(type, some);
      EXPECT_EQ(std::vector<uint8_t>(bytes.begin() + 1, bytes.end() - 1), expected);
      std::vector<float> wide(count + 1, 7.0f);
      WidenToF32(type, bytes.data() + 1, count, wide.data());
      EXPECT_EQ(wide.back(), 7.0f);
      wide.pop_back();
      EXPECT_TRUE(SameBits(wide, WidenByOracle(type, expected))) << KvTypeName(type) << count;
    }
  }
}

// Bytes and floats that ggml's own functions gave, see data/make_ggml_vectors.py.
TEST(BlockCodecTest, EncodesAndDecodesBitForBitAsGgml) {
  constexpr KvType kOrder[] = {KvType::kQ8_0, KvType::kQ5_0, KvType::kQ5_1,
                               KvType::kQ4_0, KvType::kQ4_1, KvType::kIQ4NL};
  std::ifstream file(std::string(PAGETIDE_SOURCE_DIR) + "/tests/kernels/data/ggml_blocks.txt");
  ASSERT_TRUE(file.is_open());
  int groups = 0;
  int beyond_f16 = 0;
  for (std::string line; std::getline(file, line);) {
    if (line[0] == '#') continue;
    ++groups;
    std::istringstream columns(line);
    std::string hex;
    columns >> hex;
    const std::vector<uint8_t> raw = FromHex(hex);
    ASSERT_EQ(raw.size(), 128u);
    std::vector<float> values(32);
    std::memcpy(values.data(), raw.data(), 128);
    for (const KvType type : kOrder) {
      SCOPED_TRACE(testing::Message() << KvTypeName(type) << ", group " << groups);
      uint64_t decoded_hash = 0;
      columns >> hex >> std::hex >> decoded_hash;
      const std::vector<uint8_t> expected = FromHex(hex);
      ASSERT_EQ(expected.size(), static_cast<size_t>(GroupBytes(type)));
      std::vector<uint8_t> encoded(GroupBytes(type));
      NarrowFromF32(type, values.data(), 32, encoded.data());
      if ((Load16(expected, 0) & 0x7fff) == 0x7c00) {
        // ggml's scale overflows f16 and decodes to NaN; ours saturates.
        ++beyond_f16;
        EXPECT_EQ(Load16(encoded, 0) & 0x7fff, 0x7bff);
        continue;
      }
      EXPECT_EQ(encoded, expected);
      std::vector<float> decoded(32);
      WidenToF32(type, expected.data(), 32, decoded.data());
      EXPECT_EQ(Fnv1a(decoded), decoded_hash);
    }
  }
  EXPECT_EQ(groups, 189);
  EXPECT_LE(beyond_f16, 6);
}

TEST(BlockCodecTest, TheRampOfTheSpecification) {
  std::vector<float> ramp(32);
  for (int j = 0; j < 32; ++j) ramp[j] = static_cast<float>(j - 16);
  std::vector<uint8_t> q8(34);
  NarrowFromF32(KvType::kQ8_0, ramp.data(), 32, q8.data());
  EXPECT_EQ(q8, FromHex("083081899199a1a9b1b9c0c8d0d8e0e8f0f800081018202830384047"
                        "4f575f676f77"));
  std::vector<uint8_t> q4(18);
  NarrowFromF32(KvType::kQ4_0, ramp.data(), 32, q4.data());
  EXPECT_EQ(q4, FromHex("0040809191a2a2b3b3c4c4d5d5e6e6f7f7f8"));
}

TEST(BlockCodecTest, NoInputDecodesToNaN) {
  std::vector<std::vector<float>> groups = {
      std::vector<float>(32, 0.0f), std::vector<float>(32, -0.0f), std::vector<float>(32, 1e-40f),
      std::vector<float>(32, std::nanf("")), std::vector<float>(32, 3e38f)};
  groups.push_back(groups[0]);
  groups.back()[7] = std::numeric_limits<float>::infinity();
  groups.back()[8] = -std::numeric_limits<float>::infinity();
  groups.back()[9] = std::nanf("");
  for (const KvType type : kAllTypes) {
    if (!IsBlockType(type)) continue;
    for (size_t g = 0; g < groups.size(); ++g) {
      std::vector<uint8_t> encoded(GroupBytes(type));
      std::vector<float> decoded(32);
      NarrowFromF32(type, groups[g].data(), 32, encoded.data());
      WidenToF32(type, encoded.data(), 32, decoded.data());
      for (const float x : decoded) {
        EXPECT_TRUE(std::isfinite(x)) << KvTypeName(type) << ", group " << g;
        if (g < 4) {
          EXPECT_EQ(x, 0.0f) << KvTypeName(type) << ", group " << g;
        }
      }
    }
  }
}

// Each midpoint between levels goes up, as in ggml.
TEST(BlockCodecTest, Iq4NlTakesTheNearestLevel) {
  for (int i = 0; i < 15; ++i) {
    const float middle = static_cast<float>(Iq4NlTwiceMidpoint(i)) / 2.0f;
    for (const auto& [value, code] : {std::pair<float, int>{std::nextafter(middle, -1e9f), i},
                                      {middle, i + 1},
                                      {std::nextafter(middle, 1e9f), i + 1}}) {
      std::vector<float> group(32, 0.0f);
      group[0] = -127.0f;  // makes the reciprocal scale exactly 1
      group[1] = value;
      std::vector<uint8_t> encoded(18);
      NarrowFromF32(KvType::kIQ4NL, group.data(), 32, encoded.data());
      EXPECT_EQ(encoded[2 + 1] & 15, code) << value;
    }
  }
}

}  // namespace
}  // namespace pagetide::kernels
