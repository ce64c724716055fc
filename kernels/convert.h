// Conversion of KV elements to and from f32. Plain C++17, no state, thread-safe; the element
// functions run on devices too.
//
// Widening is exact; a NaN comes out quiet. Narrowing rounds to nearest, ties to even. Integer
// arithmetic only where hardware could differ, so that all machines agree on every bit.
//
//   type         beyond the largest finite value        NaN
//   f16          infinity                               sign kept, 0x7e00
//   bf16         infinity                               made quiet, payload kept
//   f8 e4m3      saturates at +-448, infinity too       0x7f
//   f8 e5m2      saturates at +-57344, infinity too     0x7f
//   block types  see block_codec.h
//
// The fp8 rules are those of the cvt.rn.satfinite instruction. An E5M2 infinity in stored rows
// widens to infinity.
#ifndef PAGETIDE_KERNELS_CONVERT_H_
#define PAGETIDE_KERNELS_CONVERT_H_

#include <cstdint>
#include <cstring>

#include "kernels/host_device.h"
#include "kernels/isa.h"
#include "kernels/kv_type.h"

namespace pagetide::kernels {

PAGETIDE_HD inline uint32_t BitsOf(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
PAGETIDE_HD inline float FloatOf(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

PAGETIDE_HD inline float F16ToF32(uint16_t half) {
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fffu) << 13;
  // 2^112 moves the exponent bias from 15 to 127 and normalises subnormals, both exactly.
  const float rebased = FloatOf(magnitude) * FloatOf(0x77800000u);
  const uint32_t inf_or_nan = rebased >= 65536.0f ? 0x7f800000u : 0u;
  const uint32_t quiet = rebased > 65536.0f ? 0x00400000u : 0u;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  return FloatOf(BitsOf(rebased) | inf_or_nan | quiet | sign);
}

PAGETIDE_HD inline uint16_t F32ToF16(float value) {
  const uint32_t bits = BitsOf(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude >= 0x47800000u) {  // |value| >= 65536: infinity or NaN
    half = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: subnormal or zero
    // Adding 0.5 aligns the ten mantissa bits at the bottom of the sum; the addition rounds to
    // even.
    half = BitsOf(FloatOf(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    const uint32_t odd = (magnitude >> 13) & 1u;
    half = (magnitude - (112u << 23) + 0xfffu + odd) >> 13;  // a carry may reach 0x7c00: infinity
  }
  return static_cast<uint16_t>(half | sign);
}

PAGETIDE_HD inline float BF16ToF32(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  const uint32_t quiet = (bits & 0x7fffffffu) > 0x7f800000u ? 0x00400000u : 0u;
  return FloatOf(bits | quiet);
}

PAGETIDE_HD inline uint16_t F32ToBF16(float value) {
  const uint32_t bits = BitsOf(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

PAGETIDE_HD inline float F8E4M3ToF32(uint8_t value) {
  const uint32_t magnitude = value & 0x7fu;
  const uint32_t sign = static_cast<uint32_t>(value & 0x80u) << 24;
  // 2^120 moves the exponent bias from 7 to 127.
  const float rebased = FloatOf(magnitude << 20) * FloatOf(0x7b800000u);
  return FloatOf((magnitude == 0x7fu ? 0x7fc00000u : BitsOf(rebased)) | sign);
}

PAGETIDE_HD inline uint8_t F32ToF8E4M3(float value) {
  const uint32_t bits = BitsOf(value);
  const uint32_t sign = (bits >> 24) & 0x80u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fu;
  uint32_t out;
  if (magnitude < 0x3c800000u) {  // below 2^-6: subnormal, steps of 2^-9
    out = BitsOf(FloatOf(magnitude) + 16384.0f) - 0x46800000u;
  } else {
    const uint32_t odd = (magnitude >> 20) & 1u;
    out = (magnitude - (120u << 23) + 0x7ffffu + odd) >> 20;
  }
  return static_cast<uint8_t>((out > 0x7eu ? 0x7eu : out) | sign);
}

PAGETIDE_HD inline float F8E5M2ToF32(uint8_t value) {
  return F16ToF32(static_cast<uint16_t>(value << 8));
}

PAGETIDE_HD inline uint8_t F32ToF8E5M2(float value) {
  const uint32_t bits = BitsOf(value);
  const uint32_t sign = (bits >> 24) & 0x80u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fu;
  uint32_t out;
  if (magnitude < 0x38800000u) {  // below 2^-14: subnormal, steps of 2^-16
    out = BitsOf(FloatOf(magnitude) + 128.0f) - 0x43000000u;
  } else {
    const uint32_t odd = (magnitude >> 21) & 1u;
    out = (magnitude - (112u << 23) + 0xfffffu + odd) >> 21;
  }
  return static_cast<uint8_t>((out > 0x7bu ? 0x7bu : out) | sign);
}

// Runs of elements; block types quantise and dequantise. Encoded rows have no alignment
// requirement. `isa` chooses speed, never bits (but for the payload of a NaN that a block's own
// scale or minimum brings).
//
// in: [EncodedBytes(type, count)]; out: [count] f32, count a multiple of GroupElements(type).
void WidenToF32(KvType type, const void* in, int64_t count, float* out, Isa isa = Isa::kBest);
// in: [count] f32; out: [EncodedBytes(type, count)].
void NarrowFromF32(KvType type, const float* in, int64_t count, void* out, Isa isa = Isa::kBest);

}  // namespace pagetide::kernels

#endif  // PAGETIDE_KERNELS_CONVERT_H_
