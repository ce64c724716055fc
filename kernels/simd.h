// Float8: eight f32 lanes, and exp over them, with bits that do not depend on the instruction set.
//
// Lanes are independent IEEE operations in source order, so the SSE2 and the AVX2 compilation of
// the same body agree on every bit, provided that multiplications and additions are never fused:
// files that include this are compiled with -ffp-contract=off and never with -ffast-math. libm's
// expf has FMA variants chosen at run time, which is why exp is here.
//
// A kernel writes its body once as an always-inline function and wraps it twice:
//   PAGETIDE_TARGET_AVX2 void RunAvx2(Args a) { Body(a); }      void RunBaseline(Args a) { Body(a);
//   }
#ifndef PAGETIDE_KERNELS_SIMD_H_
#define PAGETIDE_KERNELS_SIMD_H_

#include <cstdint>
#include <cstring>

#include "kernels/isa.h"

#define PAGETIDE_ALWAYS_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__)
#define PAGETIDE_TARGET_AVX2 __attribute__((target("avx2")))
#else
#define PAGETIDE_TARGET_AVX2
#endif

namespace pagetide::kernels {

inline bool UseAvx2(Isa isa) {
#if defined(__x86_64__)
  return isa == Isa::kBest && __builtin_cpu_supports("avx2");
#else
  return false;
#endif
}

inline constexpr int kLanes = 8;
typedef float Float8 __attribute__((vector_size(32)));
typedef int32_t Int8 __attribute__((vector_size(32)));

PAGETIDE_ALWAYS_INLINE Float8 Load8(const float* p) {
  Float8 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
PAGETIDE_ALWAYS_INLINE void Store8(float* p, Float8 v) {
  std::memcpy(p, &v, sizeof(v));
}
PAGETIDE_ALWAYS_INLINE Float8 Broadcast8(float x) {
  return Float8{x, x, x, x, x, x, x, x};
}

// Fixed tree: ((0+4)+(2+6)) + ((1+5)+(3+7)).
PAGETIDE_ALWAYS_INLINE float SumLanes(Float8 v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// e^x for x <= 88, within 2 ulp; exactly 0 below -87 (so -infinity is a mask) and exactly 1 at 0.
// Source: range reduction by ln 2 in two parts and the degree-6 polynomial of Cephes expf.
PAGETIDE_ALWAYS_INLINE Float8 Exp8(Float8 x) {
  const Float8 floor_x = Broadcast8(-87.0f);
  const Int8 is_zero = x < floor_x;
  const Float8 ceiling = Broadcast8(88.0f);
  x = is_zero ? floor_x : x;
  x = x > ceiling ? ceiling : x;
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low mantissa bits.
  const Float8 magic = Broadcast8(12582912.0f);
  const Float8 shifted = x * Broadcast8(1.44269504088896341f) + magic;
  const Float8 n = shifted - magic;
  const Float8 r = (x - n * Broadcast8(0.693359375f)) - n * Broadcast8(-2.12194440e-4f);
  Float8 p = Broadcast8(1.9875691500e-4f);
  p = p * r + Broadcast8(1.3981999507e-3f);
  p = p * r + Broadcast8(8.3334519073e-3f);
  p = p * r + Broadcast8(4.1665795894e-2f);
  p = p * r + Broadcast8(1.6666665459e-1f);
  p = p * r + Broadcast8(5.0000001201e-1f);
  p = (p * (r * r) + r) + Broadcast8(1.0f);
  Int8 bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  const Int8 exponent = (bits - 0x4b400000 + 127) << 23;
  Float8 power;
  std::memcpy(&power, &exponent, sizeof(power));
  return is_zero ? Broadcast8(0.0f) : p * power;
}

// One lane of Exp8, the same bits.
PAGETIDE_ALWAYS_INLINE float Exp1(float x) {
  return Exp8(Broadcast8(x))[0];
}

}  // namespace pagetide::kernels

#endif  // PAGETIDE_KERNELS_SIMD_H_
