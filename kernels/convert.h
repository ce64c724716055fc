// Element types of KV rows and their conversion to and from f32. Plain C++17, no state,
// thread-safe.
//
// Widening (f16, bf16 -> f32) is exact. Narrowing rounds to nearest, ties to even, as IEEE 754 and
// the F16C instructions do; NaN stays NaN (quiet), overflow becomes infinity. Integer arithmetic
// only where hardware could differ, so two machines agree on every bit.
#ifndef PAGETIDE_KERNELS_CONVERT_H_
#define PAGETIDE_KERNELS_CONVERT_H_

#include <cstdint>
#include <cstring>

namespace pagetide::kernels {

enum class KvType : uint8_t { kF32, kF16, kBF16 };

inline constexpr int64_t KvTypeBytes(KvType type) {
  return type == KvType::kF32 ? 4 : 2;
}

inline uint32_t BitsOf(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float FloatOf(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Branch-free on purpose: the compiler vectorises loops over it.
inline float F16ToF32(uint16_t half) {
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fffu) << 13;
  // 2^112 moves the exponent bias from 15 to 127 and normalises subnormals, both exactly.
  const float rebased = FloatOf(magnitude) * FloatOf(0x77800000u);
  const uint32_t inf_or_nan = rebased >= 65536.0f ? 0x7f800000u : 0u;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  return FloatOf(BitsOf(rebased) | inf_or_nan | sign);
}

inline uint16_t F32ToF16(float value) {
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

inline float BF16ToF32(uint16_t value) {
  return FloatOf(static_cast<uint32_t>(value) << 16);
}

inline uint16_t F32ToBF16(float value) {
  const uint32_t bits = BitsOf(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Rows have no alignment requirement: elements are loaded with memcpy.
// in: [count] of `type`; out: [count] f32.
void WidenToF32(KvType type, const void* in, int64_t count, float* out);
// in: [count] f32; out: [count] of `type`.
void NarrowFromF32(KvType type, const float* in, int64_t count, void* out);

}  // namespace pagetide::kernels

#endif  // PAGETIDE_KERNELS_CONVERT_H_
