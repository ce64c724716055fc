// ggml's block encodings of 32 elements, one group at a time: the scalar oracle, run by host and
// device. Plain C++17.
//
//   type    bytes of a group, in order                       element j decodes to
//   q8_0    f16 d, i8 q[32]                                  q[j] * d
//   q4_0    f16 d, u8 nibbles[16]                            (q - 8) * d
//   q4_1    f16 d, f16 m, u8 nibbles[16]                     q * d + m
//   q5_0    f16 d, u32 fifth bits, u8 nibbles[16]            (q - 16) * d
//   q5_1    f16 d, f16 m, u32 fifth bits, u8 nibbles[16]     q * d + m
//   iq4_nl  f16 d, u8 nibbles[16]                            d * table[q]
// Nibble byte j holds element j low and element j + 16 high; bit j of the fifth bits belongs to
// element j; numbers are little-endian. Source: quantize_row_*_ref and dequantize_row_* of ggml
// 0.25 (ggml-quants.c), whose bytes and floats these functions reproduce for finite input whose
// scale fits f16.
//
// Beyond that ggml yields NaN or undefined behaviour; here a NaN element counts as 0, elements are
// clamped to +-1e9, scale and minimum saturate at +-65504, and where the reciprocal of the scale
// would overflow (elements below about 1e-37) the group encodes to zeros. No group that was encoded
// here decodes to NaN, and an all-zero group decodes to zeros.
#ifndef PAGETIDE_KERNELS_BLOCK_CODEC_H_
#define PAGETIDE_KERNELS_BLOCK_CODEC_H_

#include <cstdint>
#include <cstring>

#include "kernels/convert.h"
#include "kernels/host_device.h"
#include "kernels/kv_type.h"

namespace pagetide::kernels {

// Largest magnitude an element keeps before it is quantised. High enough to change no group whose
// scale fits f16, low enough that no difference of elements and no sum of their cubes overflows.
inline constexpr float kBlockClamp = 1e9f;
// Groups of iq4_nl with no element at least this large have scale 0.
inline constexpr float kIq4NlSmallest = 1e-15f;

// iq4_nl's levels, scaled by d: -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113, a byte
// each from the lowest. Not an array: devices would keep that in local memory.
PAGETIDE_HD constexpr int32_t Iq4NlLevel(int index) {
  constexpr uint64_t kLow = 0xf6eaddcfbfad9881u;
  constexpr uint64_t kHigh = 0x7159453526190d01u;
  return static_cast<int8_t>((index < 8 ? kLow : kHigh) >> (8 * (index & 7)) & 255u);
}

// Twice the midpoint between levels i and i + 1: x is nearer to i + 1, or as near, iff 2x reaches
// it.
PAGETIDE_HD constexpr int32_t Iq4NlTwiceMidpoint(int index) {
  return Iq4NlLevel(index) + Iq4NlLevel(index + 1);
}

PAGETIDE_HD inline float BlockInput(float x) {
  if (!(x == x)) return 0.0f;
  return x > kBlockClamp ? kBlockClamp : x < -kBlockClamp ? -kBlockClamp : x;
}

PAGETIDE_HD inline float Magnitude(float x) {
  return FloatOf(BitsOf(x) & 0x7fffffffu);
}

// f16 of a scale or a minimum, never infinite.
PAGETIDE_HD inline uint16_t BlockScale(float value) {
  const uint16_t half = F32ToF16(value);
  return (half & 0x7fffu) >= 0x7c00u ? static_cast<uint16_t>((half & 0x8000u) | 0x7bffu) : half;
}

// 1 / d, or 0 where that is not a finite number.
PAGETIDE_HD inline float BlockReciprocal(float d) {
  const float inverse = d != 0.0f ? 1.0f / d : 0.0f;
  return (BitsOf(inverse) & 0x7f800000u) == 0x7f800000u ? 0.0f : inverse;
}

PAGETIDE_HD inline void StoreU16(uint8_t* out, uint16_t value) {
  memcpy(out, &value, sizeof(value));
}
PAGETIDE_HD inline uint16_t LoadU16(const uint8_t* in) {
  uint16_t value;
  memcpy(&value, in, sizeof(value));
  return value;
}

// The element of largest magnitude, the first of equals.
PAGETIDE_HD inline float SignedMaximum(const float* x) {
  float magnitude = 0.0f;
  float value = 0.0f;
  for (int j = 0; j < 32; ++j) {
    const float v = BlockInput(x[j]);
    const float a = Magnitude(v);
    if (magnitude < a) {
      magnitude = a;
      value = v;
    }
  }
  return value;
}

// Codes are unsigned and below 2^4 or 2^5. Nibbles go to out[0, 16), fifth bits to *high.
PAGETIDE_HD inline void PackNibbles(const uint8_t* codes, uint8_t* out, uint32_t* high) {
  *high = 0;
  for (int j = 0; j < 16; ++j) {
    const uint32_t a = codes[j];
    const uint32_t b = codes[j + 16];
    out[j] = static_cast<uint8_t>((a & 15u) | ((b & 15u) << 4));
    *high |= (a >> 4) << j;
    *high |= (b >> 4) << (j + 16);
  }
}

// x: [32] f32; out: [GroupBytes(type)].
PAGETIDE_HD inline void EncodeQ8_0(const float* x, uint8_t* out) {
  float largest = 0.0f;
  for (int j = 0; j < 32; ++j) {
    const float a = Magnitude(BlockInput(x[j]));
    largest = largest > a ? largest : a;
  }
  const float d = largest / 127.0f;
  const float inverse = BlockReciprocal(d);
  StoreU16(out, BlockScale(d));
  for (int j = 0; j < 32; ++j) {
    const float scaled = BlockInput(x[j]) * inverse;
    // Half away from zero; the difference to the truncated value is exact.
    int32_t q = static_cast<int32_t>(scaled);
    const float rest = scaled - static_cast<float>(q);
    q += rest >= 0.5f ? 1 : rest <= -0.5f ? -1 : 0;
    out[2 + j] = static_cast<uint8_t>(q);
  }
}

// Symmetric: q4_0 (kBits 4) and q5_0 (kBits 5).
template <int kBits>
PAGETIDE_HD inline void EncodeSymmetric(const float* x, uint8_t* out) {
  constexpr float kHalf = 1 << (kBits - 1);
  constexpr int32_t kMost = (1 << kBits) - 1;
  const float d = SignedMaximum(x) / -kHalf;
  const float inverse = BlockReciprocal(d);
  StoreU16(out, BlockScale(d));
  uint8_t codes[32];
  for (int j = 0; j < 32; ++j) {
    const int32_t q = static_cast<int32_t>(BlockInput(x[j]) * inverse + (kHalf + 0.5f));
    codes[j] = static_cast<uint8_t>(q < kMost ? q : kMost);
  }
  uint32_t high;
  PackNibbles(codes, out + (kBits == 5 ? 6 : 2), &high);
  if (kBits == 5) memcpy(out + 2, &high, sizeof(high));
}

// With a minimum: q4_1 (kBits 4) and q5_1 (kBits 5).
template <int kBits>
PAGETIDE_HD inline void EncodeWithMinimum(const float* x, uint8_t* out) {
  constexpr int32_t kMost = (1 << kBits) - 1;
  float least = BlockInput(x[0]);
  float most = least;
  for (int j = 1; j < 32; ++j) {
    const float v = BlockInput(x[j]);
    least = v < least ? v : least;
    most = v > most ? v : most;
  }
  const float d = (most - least) / static_cast<float>(kMost);
  const float inverse = BlockReciprocal(d);
  StoreU16(out, BlockScale(d));
  StoreU16(out + 2, BlockScale(least));
  uint8_t codes[32];
  for (int j = 0; j < 32; ++j) {
    const int32_t q = static_cast<int32_t>((BlockInput(x[j]) - least) * inverse + 0.5f);
    codes[j] = static_cast<uint8_t>(q < kMost ? q : kMost);
  }
  uint32_t high;
  PackNibbles(codes, out + (kBits == 5 ? 8 : 4), &high);
  if (kBits == 5) memcpy(out + 4, &high, sizeof(high));
}

// The scale is the least-squares fit to the levels chosen at d = extreme / -127, weighted by x^2.
PAGETIDE_HD inline void EncodeIq4Nl(const float* x, uint8_t* out) {
  const float extreme = SignedMaximum(x);
  if (Magnitude(extreme) < kIq4NlSmallest) {
    memset(out, 0, 18);
    return;
  }
  const float inverse = BlockReciprocal(extreme / -127.0f);
  uint8_t codes[32];
  float sum_qx = 0.0f;
  float sum_qq = 0.0f;
  for (int j = 0; j < 32; ++j) {
    const float v = BlockInput(x[j]);
    const float scaled = v * inverse;
    int index = 0;
    for (int i = 0; i < 15; ++i) {
      index += 2.0f * scaled >= static_cast<float>(Iq4NlTwiceMidpoint(i)) ? 1 : 0;
    }
    codes[j] = static_cast<uint8_t>(index);
    const float q = static_cast<float>(Iq4NlLevel(index));
    const float weight = v * v;
    sum_qx += weight * q * v;
    sum_qq += weight * q * q;
  }
  const float d = sum_qq > 0.0f ? sum_qx / sum_qq : 0.0f;
  StoreU16(out, BlockScale(d));
  uint32_t high;
  PackNibbles(codes, out + 2, &high);
}

// in: [GroupBytes(type)]; x: [32] f32. A type that is not a block type is a caller's error and
// leaves the output alone.
PAGETIDE_HD inline void EncodeGroup(KvType type, const float* x, uint8_t* out) {
  switch (type) {
    case KvType::kQ8_0:
      return EncodeQ8_0(x, out);
    case KvType::kQ5_0:
      return EncodeSymmetric<5>(x, out);
    case KvType::kQ5_1:
      return EncodeWithMinimum<5>(x, out);
    case KvType::kQ4_0:
      return EncodeSymmetric<4>(x, out);
    case KvType::kQ4_1:
      return EncodeWithMinimum<4>(x, out);
    case KvType::kIQ4NL:
      return EncodeIq4Nl(x, out);
    default:
      return;
  }
}

// Element j of a group, j in [0, 32).
PAGETIDE_HD inline float DecodeElement(KvType type, const uint8_t* in, int j) {
  const float d = F16ToF32(LoadU16(in));
  if (type == KvType::kQ8_0) return static_cast<float>(static_cast<int8_t>(in[2 + j])) * d;
  const bool has_minimum = type == KvType::kQ4_1 || type == KvType::kQ5_1;
  const bool has_fifth = type == KvType::kQ5_0 || type == KvType::kQ5_1;
  const int bits_at = has_minimum ? 4 : 2;
  const uint8_t byte = in[bits_at + (has_fifth ? 4 : 0) + (j & 15)];
  int32_t q = j < 16 ? byte & 15 : byte >> 4;
  if (has_fifth) q |= ((in[bits_at + (j >> 3)] >> (j & 7)) & 1) << 4;
  if (has_minimum) return static_cast<float>(q) * d + F16ToF32(LoadU16(in + 2));
  if (type == KvType::kIQ4NL) return d * static_cast<float>(Iq4NlLevel(q));
  return static_cast<float>(q - (has_fifth ? 16 : 8)) * d;
}

PAGETIDE_HD inline void DecodeGroup(KvType type, const uint8_t* in, float* x) {
  for (int j = 0; j < 32; ++j) x[j] = DecodeElement(type, in, j);
}

}  // namespace pagetide::kernels

#endif  // PAGETIDE_KERNELS_BLOCK_CODEC_H_
