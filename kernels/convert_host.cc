// The vector twins of the element functions of convert.h and the group functions of block_codec.h:
// the same operations in eight lanes, the same bits (tests compare all of them).
#include "kernels/convert.h"

#include "kernels/block_codec.h"
#include "kernels/simd.h"

namespace pagetide::kernels {
namespace {

typedef uint16_t Half8 __attribute__((vector_size(16)));
typedef uint8_t Byte16 __attribute__((vector_size(16)));

PAGETIDE_ALWAYS_INLINE Int8 AsInt(Float8 v) {
  Int8 bits;
  std::memcpy(&bits, &v, sizeof(bits));
  return bits;
}
PAGETIDE_ALWAYS_INLINE Float8 AsFloat(Int8 bits) {
  Float8 v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}
PAGETIDE_ALWAYS_INLINE Float8 ToFloat(Int8 v) {
  return __builtin_convertvector(v, Float8);
}
PAGETIDE_ALWAYS_INLINE Int8 Truncate(Float8 v) {
  return __builtin_convertvector(v, Int8);
}
PAGETIDE_ALWAYS_INLINE Int8 LoadHalves(const uint8_t* in) {
  Half8 v;
  std::memcpy(&v, in, sizeof(v));
  return __builtin_convertvector(v, Int8);
}
// Bytes go by way of halves: compilers take a direct conversion apart lane by lane.
PAGETIDE_ALWAYS_INLINE Int8 LoadBytes(const uint8_t* in) {
  Byte16 v{};
  std::memcpy(&v, in, 8);
  const Byte16 zero{};
  v = __builtin_shufflevector(v, zero, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  Half8 halves;
  std::memcpy(&halves, &v, sizeof(halves));
  return __builtin_convertvector(halves, Int8);
}
PAGETIDE_ALWAYS_INLINE void StoreHalves(uint8_t* out, Int8 v) {
  const Half8 narrow = __builtin_convertvector(v, Half8);
  std::memcpy(out, &narrow, sizeof(narrow));
}
PAGETIDE_ALWAYS_INLINE void StoreBytes(uint8_t* out, Int8 v) {
  const Half8 halves = __builtin_convertvector(v, Half8);
  Byte16 bytes;
  std::memcpy(&bytes, &halves, sizeof(bytes));
  bytes =
      __builtin_shufflevector(bytes, bytes, 0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14);
  std::memcpy(out, &bytes, 8);
}

// --- plain types: eight elements at a time

PAGETIDE_ALWAYS_INLINE Float8 WidenF16(Int8 half) {
  const Float8 rebased = AsFloat((half & 0x7fff) << 13) * FloatOf(0x77800000u);
  const Int8 inf_or_nan = (rebased >= 65536.0f) & 0x7f800000;
  const Int8 quiet = (rebased > 65536.0f) & 0x00400000;
  return AsFloat(AsInt(rebased) | inf_or_nan | quiet | ((half & 0x8000) << 16));
}

PAGETIDE_ALWAYS_INLINE Int8 NarrowF16(Float8 value) {
  const Int8 bits = AsInt(value);
  const Int8 magnitude = bits & 0x7fffffff;
  const Int8 special = magnitude > 0x7f800000 ? (Int8{} + 0x7e00) : (Int8{} + 0x7c00);
  const Int8 subnormal = AsInt(AsFloat(magnitude) + 0.5f) - 0x3f000000;
  const Int8 normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const Int8 finite = magnitude < 0x38800000 ? subnormal : normal;
  return (magnitude >= 0x47800000 ? special : finite) | ((bits >> 16) & 0x8000);
}

PAGETIDE_ALWAYS_INLINE Float8 WidenBF16(Int8 value) {
  const Int8 bits = value << 16;
  return AsFloat(bits | (((bits & 0x7fffffff) > 0x7f800000) & 0x00400000));
}

PAGETIDE_ALWAYS_INLINE Int8 NarrowBF16(Float8 value) {
  const Int8 bits = AsInt(value);
  const Int8 magnitude = bits & 0x7fffffff;
  const Int8 is_nan = magnitude > 0x7f800000;
  const Int8 rounded = (is_nan ? Int8{} : magnitude) + 0x7fff + ((magnitude >> 16) & 1);
  return ((is_nan ? (magnitude | 0x400000) : rounded) >> 16) | ((bits >> 16) & 0x8000);
}

PAGETIDE_ALWAYS_INLINE Float8 WidenF8E4M3(Int8 value) {
  const Int8 magnitude = value & 0x7f;
  const Int8 bits = AsInt(AsFloat(magnitude << 20) * FloatOf(0x7b800000u));
  return AsFloat((magnitude == 0x7f ? (Int8{} + 0x7fc00000) : bits) | ((value & 0x80) << 24));
}

PAGETIDE_ALWAYS_INLINE Int8 NarrowF8E4M3(Float8 value) {
  const Int8 bits = AsInt(value);
  const Int8 magnitude = bits & 0x7fffffff;
  const Int8 subnormal = AsInt(AsFloat(magnitude) + 16384.0f) - 0x46800000;
  const Int8 normal = (magnitude - (120 << 23) + 0x7ffff + ((magnitude >> 20) & 1)) >> 20;
  const Int8 out = magnitude < 0x3c800000 ? subnormal : normal;
  const Int8 bounded = (out > 0x7e ? (Int8{} + 0x7e) : out) | ((bits >> 24) & 0x80);
  return magnitude > 0x7f800000 ? (Int8{} + 0x7f) : bounded;
}

PAGETIDE_ALWAYS_INLINE Int8 NarrowF8E5M2(Float8 value) {
  const Int8 bits = AsInt(value);
  const Int8 magnitude = bits & 0x7fffffff;
  const Int8 subnormal = AsInt(AsFloat(magnitude) + 128.0f) - 0x43000000;
  const Int8 normal = (magnitude - (112 << 23) + 0xfffff + ((magnitude >> 21) & 1)) >> 21;
  const Int8 out = magnitude < 0x38800000 ? subnormal : normal;
  const Int8 bounded = (out > 0x7b ? (Int8{} + 0x7b) : out) | ((bits >> 24) & 0x80);
  return magnitude > 0x7f800000 ? (Int8{} + 0x7f) : bounded;
}

template <KvType kType>
PAGETIDE_ALWAYS_INLINE Float8 WidenEight(const uint8_t* in) {
  if (kType == KvType::kF16) return WidenF16(LoadHalves(in));
  if (kType == KvType::kBF16) return WidenBF16(LoadHalves(in));
  if (kType == KvType::kF8E4M3) return WidenF8E4M3(LoadBytes(in));
  return WidenF16(LoadBytes(in) << 8);
}

template <KvType kType>
PAGETIDE_ALWAYS_INLINE void NarrowEight(Float8 value, uint8_t* out) {
  if (kType == KvType::kF16) return StoreHalves(out, NarrowF16(value));
  if (kType == KvType::kBF16) return StoreHalves(out, NarrowBF16(value));
  if (kType == KvType::kF8E4M3) return StoreBytes(out, NarrowF8E4M3(value));
  return StoreBytes(out, NarrowF8E5M2(value));
}

// --- block types: one group at a time

// The reductions are over values without NaN; they are exact in any order, but for the sign of 0.
PAGETIDE_ALWAYS_INLINE float MaximumOf(Float8 v) {
  Float8 other = __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  v = v > other ? v : other;
  other = __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
  v = v > other ? v : other;
  return v[0] > v[1] ? v[0] : v[1];
}

// The elements of a group as BlockInput gives them, and their extremes.
struct Group {
  Float8 x[4];
  float most;
  float least;
};

PAGETIDE_ALWAYS_INLINE Group LoadGroup(const float* in) {
  const Float8 clamp = Broadcast8(kBlockClamp);
  Group g;
  for (int t = 0; t < 4; ++t) {
    Float8 v = Load8(in + t * kLanes);
    v = v == v ? v : Broadcast8(0.0f);
    v = v > clamp ? clamp : v;
    g.x[t] = v < -clamp ? -clamp : v;
  }
  Float8 most = g.x[0];
  Float8 fewest = -g.x[0];
  for (int t = 1; t < 4; ++t) {
    most = g.x[t] > most ? g.x[t] : most;
    fewest = -g.x[t] > fewest ? -g.x[t] : fewest;
  }
  g.most = MaximumOf(most);
  g.least = -MaximumOf(fewest);
  return g;
}

// SignedMaximum of the group; `in` is read again where both signs reach the largest magnitude.
PAGETIDE_ALWAYS_INLINE float SignedMaximumOf(const Group& g, const float* in) {
  if (g.most > -g.least) return g.most;
  if (g.most < -g.least) return g.least;
  return SignedMaximum(in);
}

// c: codes of elements 8t .. 8t + 7, below 2^kBits.
template <int kBits>
PAGETIDE_ALWAYS_INLINE void StoreCodes(const Int8 c[4], uint8_t* nibbles, uint8_t* high) {
  StoreBytes(nibbles, (c[0] & 15) | ((c[2] & 15) << 4));
  StoreBytes(nibbles + 8, (c[1] & 15) | ((c[3] & 15) << 4));
  if (kBits == 5) {
    const Int8 lane = {0, 1, 2, 3, 4, 5, 6, 7};
    Int8 bits = ((c[0] >> 4) << lane) | ((c[1] >> 4) << (lane + 8)) | ((c[2] >> 4) << (lane + 16)) |
                ((c[3] >> 4) << (lane + 24));
    bits |= __builtin_shufflevector(bits, bits, 4, 5, 6, 7, 0, 1, 2, 3);
    bits |= __builtin_shufflevector(bits, bits, 2, 3, 0, 1, 6, 7, 4, 5);
    const int32_t all = bits[0] | bits[1];
    std::memcpy(high, &all, sizeof(all));
  }
}

template <int kBits>
PAGETIDE_ALWAYS_INLINE void LoadCodes(const uint8_t* nibbles, const uint8_t* high, Int8 c[4]) {
  const Int8 first = LoadBytes(nibbles);
  const Int8 second = LoadBytes(nibbles + 8);
  c[0] = first & 15;
  c[1] = second & 15;
  c[2] = first >> 4;
  c[3] = second >> 4;
  if (kBits == 5) {
    const Int8 lane = {0, 1, 2, 3, 4, 5, 6, 7};
    for (int t = 0; t < 4; ++t) c[t] |= (((Int8{} + high[t]) >> lane) & 1) << 4;
  }
}

PAGETIDE_ALWAYS_INLINE void EncodeQ8_0Vector(const float* in, uint8_t* out) {
  const Group g = LoadGroup(in);
  const float d = Magnitude(g.most > -g.least ? g.most : g.least) / 127.0f;
  const Float8 inverse = Broadcast8(BlockReciprocal(d));
  StoreU16(out, BlockScale(d));
  for (int t = 0; t < 4; ++t) {
    const Float8 scaled = g.x[t] * inverse;
    Int8 q = Truncate(scaled);
    const Float8 rest = scaled - ToFloat(q);
    q = q - (rest >= 0.5f) + (rest <= -0.5f);  // a true lane is -1
    StoreBytes(out + 2 + t * kLanes, q);
  }
}

template <int kBits>
PAGETIDE_ALWAYS_INLINE void EncodeSymmetricVector(const float* in, uint8_t* out) {
  constexpr float kHalf = 1 << (kBits - 1);
  constexpr int32_t kMost = (1 << kBits) - 1;
  const Group g = LoadGroup(in);
  const float d = SignedMaximumOf(g, in) / -kHalf;
  const Float8 inverse = Broadcast8(BlockReciprocal(d));
  StoreU16(out, BlockScale(d));
  Int8 c[4];
  for (int t = 0; t < 4; ++t) {
    const Int8 q = Truncate(g.x[t] * inverse + (kHalf + 0.5f));
    c[t] = q < kMost ? q : Int8{} + kMost;
  }
  StoreCodes<kBits>(c, out + (kBits == 5 ? 6 : 2), out + 2);
}

template <int kBits>
PAGETIDE_ALWAYS_INLINE void EncodeWithMinimumVector(const float* in, uint8_t* out) {
  constexpr int32_t kMost = (1 << kBits) - 1;
  const Group g = LoadGroup(in);
  float least = g.least;
  if (least == 0.0f) {  // its sign is that of the first 0
    int j = 0;
    while (BlockInput(in[j]) != 0.0f) ++j;
    least = BlockInput(in[j]);
  }
  const float range = g.most == least ? 0.0f : g.most - least;
  const float d = range / static_cast<float>(kMost);
  const Float8 inverse = Broadcast8(BlockReciprocal(d));
  StoreU16(out, BlockScale(d));
  StoreU16(out + 2, BlockScale(least));
  Int8 c[4];
  for (int t = 0; t < 4; ++t) {
    const Int8 q = Truncate((g.x[t] - Broadcast8(least)) * inverse + 0.5f);
    c[t] = q < kMost ? q : Int8{} + kMost;
  }
  StoreCodes<kBits>(c, out + (kBits == 5 ? 8 : 4), out + 4);
}

PAGETIDE_ALWAYS_INLINE void EncodeIq4NlVector(const float* in, uint8_t* out) {
  const Group g = LoadGroup(in);
  const float extreme = SignedMaximumOf(g, in);
  if (Magnitude(extreme) < kIq4NlSmallest) {
    std::memset(out, 0, 18);
    return;
  }
  const Float8 inverse = Broadcast8(BlockReciprocal(extreme / -127.0f));
  Int8 c[4];
  float terms_qx[32];
  float terms_qq[32];
  for (int t = 0; t < 4; ++t) {
    const Float8 twice = g.x[t] * inverse * 2.0f;
    Int8 index{};
    Int8 level = Int8{} + Iq4NlLevel(0);
    for (int i = 0; i < 15; ++i) {
      const Int8 reached = twice >= static_cast<float>(Iq4NlTwiceMidpoint(i));
      index -= reached;
      level += reached & (Iq4NlLevel(i + 1) - Iq4NlLevel(i));
    }
    c[t] = index;
    const Float8 q = ToFloat(level);
    const Float8 weighted = g.x[t] * g.x[t] * q;
    Store8(terms_qx + t * kLanes, weighted * g.x[t]);
    Store8(terms_qq + t * kLanes, weighted * q);
  }
  // In order, as ggml sums.
  float sum_qx = 0.0f;
  float sum_qq = 0.0f;
  for (int j = 0; j < 32; ++j) {
    sum_qx += terms_qx[j];
    sum_qq += terms_qq[j];
  }
  StoreU16(out, BlockScale(sum_qq > 0.0f ? sum_qx / sum_qq : 0.0f));
  StoreCodes<4>(c, out + 2, nullptr);
}

template <KvType kType>
PAGETIDE_ALWAYS_INLINE void EncodeGroupVector(const float* in, uint8_t* out) {
  if (kType == KvType::kQ8_0) return EncodeQ8_0Vector(in, out);
  if (kType == KvType::kQ5_0) return EncodeSymmetricVector<5>(in, out);
  if (kType == KvType::kQ5_1) return EncodeWithMinimumVector<5>(in, out);
  if (kType == KvType::kQ4_0) return EncodeSymmetricVector<4>(in, out);
  if (kType == KvType::kQ4_1) return EncodeWithMinimumVector<4>(in, out);
  return EncodeIq4NlVector(in, out);
}

// Both levels of a byte of two nibbles.
struct Iq4NlPairs {
  uint8_t low[256];
  uint8_t high[256];
};
constexpr Iq4NlPairs MakeIq4NlPairs() {
  Iq4NlPairs pairs{};
  for (int byte = 0; byte < 256; ++byte) {
    pairs.low[byte] = static_cast<uint8_t>(Iq4NlLevel(byte & 15));
    pairs.high[byte] = static_cast<uint8_t>(Iq4NlLevel(byte >> 4));
  }
  return pairs;
}
constexpr Iq4NlPairs kIq4NlPairs = MakeIq4NlPairs();

template <KvType kType>
PAGETIDE_ALWAYS_INLINE void DecodeGroupVector(const uint8_t* in, float* out) {
  const Float8 d = Broadcast8(F16ToF32(LoadU16(in)));
  if (kType == KvType::kQ8_0 || kType == KvType::kIQ4NL) {
    uint8_t levels[32];
    if (kType == KvType::kQ8_0) {
      std::memcpy(levels, in + 2, sizeof(levels));
    } else {
      for (int j = 0; j < 16; ++j) {
        levels[j] = kIq4NlPairs.low[in[2 + j]];
        levels[j + 16] = kIq4NlPairs.high[in[2 + j]];
      }
    }
    for (int t = 0; t < 4; ++t) {
      const Int8 q = (LoadBytes(levels + t * kLanes) ^ 0x80) - 0x80;  // sign extended
      Store8(out + t * kLanes, ToFloat(q) * d);
    }
    return;
  }
  constexpr bool kHasMinimum = kType == KvType::kQ4_1 || kType == KvType::kQ5_1;
  constexpr int kBits = kType == KvType::kQ5_0 || kType == KvType::kQ5_1 ? 5 : 4;
  constexpr int kCodesAt = kHasMinimum ? 4 : 2;
  Int8 c[4];
  LoadCodes<kBits>(in + kCodesAt + (kBits == 5 ? 4 : 0), in + kCodesAt, c);
  for (int t = 0; t < 4; ++t) {
    if (kHasMinimum) {
      Store8(out + t * kLanes, ToFloat(c[t]) * d + F16ToF32(LoadU16(in + 2)));
    } else {
      Store8(out + t * kLanes, ToFloat(c[t] - (1 << (kBits - 1))) * d);
    }
  }
}

// --- runs

template <KvType kType>
PAGETIDE_ALWAYS_INLINE void WidenBody(const uint8_t* in, int64_t count, float* out) {
  constexpr int64_t kBytes = GroupBytes(kType);
  if constexpr (kType == KvType::kF32) {
    std::memcpy(out, in, static_cast<size_t>(count) * sizeof(float));
  } else if constexpr (IsBlockType(kType)) {
    for (int64_t i = 0; i < count; i += 32, in += kBytes) DecodeGroupVector<kType>(in, out + i);
  } else {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) Store8(out + i, WidenEight<kType>(in + i * kBytes));
    if (i < count) {
      uint8_t last[kLanes * kBytes] = {};
      std::memcpy(last, in + i * kBytes, static_cast<size_t>((count - i) * kBytes));
      const Float8 v = WidenEight<kType>(last);
      std::memcpy(out + i, &v, static_cast<size_t>(count - i) * sizeof(float));
    }
  }
}

template <KvType kType>
PAGETIDE_ALWAYS_INLINE void NarrowBody(const float* in, int64_t count, uint8_t* out) {
  constexpr int64_t kBytes = GroupBytes(kType);
  if constexpr (kType == KvType::kF32) {
    std::memcpy(out, in, static_cast<size_t>(count) * sizeof(float));
  } else if constexpr (IsBlockType(kType)) {
    for (int64_t i = 0; i < count; i += 32, out += kBytes) EncodeGroupVector<kType>(in + i, out);
  } else {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) NarrowEight<kType>(Load8(in + i), out + i * kBytes);
    if (i < count) {
      float last[kLanes] = {};
      std::memcpy(last, in + i, static_cast<size_t>(count - i) * sizeof(float));
      uint8_t narrow[kLanes * kBytes];
      NarrowEight<kType>(Load8(last), narrow);
      std::memcpy(out + i * kBytes, narrow, static_cast<size_t>((count - i) * kBytes));
    }
  }
}

using Widen = void (*)(const uint8_t* in, int64_t count, float* out);
using Narrow = void (*)(const float* in, int64_t count, uint8_t* out);

template <KvType kType>
struct Runs {
  PAGETIDE_TARGET_AVX2 static void WidenAvx2(const uint8_t* in, int64_t count, float* out) {
    WidenBody<kType>(in, count, out);
  }
  static void WidenBaseline(const uint8_t* in, int64_t count, float* out) {
    WidenBody<kType>(in, count, out);
  }
  PAGETIDE_TARGET_AVX2 static void NarrowAvx2(const float* in, int64_t count, uint8_t* out) {
    NarrowBody<kType>(in, count, out);
  }
  static void NarrowBaseline(const float* in, int64_t count, uint8_t* out) {
    NarrowBody<kType>(in, count, out);
  }
};

// [baseline, AVX2], by type.
#define PAGETIDE_FOR_ALL_TYPES(FUNCTION)                                                       \
  {                                                                                            \
    Runs<KvType::kF32>::FUNCTION, Runs<KvType::kF16>::FUNCTION, Runs<KvType::kBF16>::FUNCTION, \
        Runs<KvType::kF8E4M3>::FUNCTION, Runs<KvType::kF8E5M2>::FUNCTION,                      \
        Runs<KvType::kQ8_0>::FUNCTION, Runs<KvType::kQ5_0>::FUNCTION,                          \
        Runs<KvType::kQ5_1>::FUNCTION, Runs<KvType::kQ4_0>::FUNCTION,                          \
        Runs<KvType::kQ4_1>::FUNCTION, Runs<KvType::kIQ4NL>::FUNCTION                          \
  }
constexpr Widen kWiden[2][kNumKvTypes] = {PAGETIDE_FOR_ALL_TYPES(WidenBaseline),
                                          PAGETIDE_FOR_ALL_TYPES(WidenAvx2)};
constexpr Narrow kNarrow[2][kNumKvTypes] = {PAGETIDE_FOR_ALL_TYPES(NarrowBaseline),
                                            PAGETIDE_FOR_ALL_TYPES(NarrowAvx2)};
#undef PAGETIDE_FOR_ALL_TYPES

}  // namespace

void WidenToF32(KvType type, const void* in, int64_t count, float* out, Isa isa) {
  kWiden[UseAvx2(isa)][static_cast<int>(type)](static_cast<const uint8_t*>(in), count, out);
}

void NarrowFromF32(KvType type, const float* in, int64_t count, void* out, Isa isa) {
  kNarrow[UseAvx2(isa)][static_cast<int>(type)](in, count, static_cast<uint8_t*>(out));
}

}  // namespace pagetide::kernels
