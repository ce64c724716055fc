// Encoding and decoding by threads: what convert.h and block_codec.h do to one element or group,
// spread over the lanes of a warp. Eight consecutive elements a lane, so that a group of 32 is four
// neighbouring lanes and an f16 element group is one 16-byte access.
#ifndef PAGETIDE_KERNELS_DEVICE_CODEC_CUH_
#define PAGETIDE_KERNELS_DEVICE_CODEC_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/block_codec.h"
#include "kernels/convert.h"
#include "kernels/kv_type.h"

namespace pagetide::kernels::device {

inline constexpr int kLaneElements = 8;

__device__ inline bool IsAligned(const void* p, unsigned bytes) {
  return (reinterpret_cast<uintptr_t>(p) & (bytes - 1)) == 0;
}

// Says that a pointer read from an argument array is to global memory, so that accesses need not
// find out at run time.
template <typename T>
__device__ inline T* Global(T* p) {
#ifdef __CUDACC__
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

// One element of a plain type at `index`.
template <KvType kType>
__device__ inline float LoadPlain(const void* in, int64_t index) {
  if constexpr (kType == KvType::kF32) return static_cast<const float*>(in)[index];
  if constexpr (kType == KvType::kF16) return F16ToF32(static_cast<const uint16_t*>(in)[index]);
  if constexpr (kType == KvType::kBF16) return BF16ToF32(static_cast<const uint16_t*>(in)[index]);
  if constexpr (kType == KvType::kF8E4M3) {
    return F8E4M3ToF32(static_cast<const uint8_t*>(in)[index]);
  }
  return F8E5M2ToF32(static_cast<const uint8_t*>(in)[index]);
}

template <KvType kType>
__device__ inline void StorePlain(float value, void* out, int64_t index) {
  if constexpr (kType == KvType::kF32) static_cast<float*>(out)[index] = value;
  if constexpr (kType == KvType::kF16) static_cast<uint16_t*>(out)[index] = F32ToF16(value);
  if constexpr (kType == KvType::kBF16) static_cast<uint16_t*>(out)[index] = F32ToBF16(value);
  if constexpr (kType == KvType::kF8E4M3) static_cast<uint8_t*>(out)[index] = F32ToF8E4M3(value);
  if constexpr (kType == KvType::kF8E5M2) static_cast<uint8_t*>(out)[index] = F32ToF8E5M2(value);
}

// Raw bytes of eight elements of a plain type.
template <KvType kType>
struct alignas(8) Eight {
  uint32_t word[kLaneElements * GroupBytes(kType) / 4];
};

// Elements [8 * chunk, 8 * chunk + 8) of a run. kWide: the run's address is a multiple of 16.
// Block types: the four lanes of a group call together, `in` at least 2-byte aligned.
template <KvType kType, bool kWide>
__device__ inline void LoadEight(const void* in, int64_t chunk, float x[kLaneElements]) {
  if constexpr (IsBlockType(kType)) {
    constexpr bool kHasMinimum = kType == KvType::kQ4_1 || kType == KvType::kQ5_1;
    constexpr bool kHasFifth = kType == KvType::kQ5_0 || kType == KvType::kQ5_1;
    constexpr int kCodesAt = kHasMinimum ? 4 : 2;
    const int quarter = static_cast<int>(chunk & 3);
    const uint8_t* group = static_cast<const uint8_t*>(in) + (chunk >> 2) * GroupBytes(kType);
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(group);
    const float d = F16ToF32(halves[0]);
    // Eight bytes of codes: own ones for q8_0, shared by two lanes' nibbles for the others.
    const int byte = kType == KvType::kQ8_0 ? 2 + 8 * quarter
                                            : kCodesAt + (kHasFifth ? 4 : 0) + 8 * (quarter & 1);
    uint16_t codes[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) codes[i] = halves[byte / 2 + i];
    if constexpr (kType == KvType::kQ8_0) {
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i) {
        x[i] = static_cast<float>(static_cast<int8_t>(codes[i / 2] >> (8 * (i & 1)))) * d;
      }
    } else {
      const uint32_t fifth = kHasFifth ? group[kCodesAt + quarter] : 0u;
      const float minimum = kHasMinimum ? F16ToF32(halves[1]) : 0.0f;
      const int high = quarter >> 1 ? 4 : 0;
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i) {
        int32_t q = (codes[i / 2] >> (8 * (i & 1) + high)) & 15;
        if constexpr (kHasFifth) q |= static_cast<int32_t>((fifth >> i) & 1u) << 4;
        if constexpr (kHasMinimum) {
          x[i] = static_cast<float>(q) * d + minimum;
        } else if constexpr (kType == KvType::kIQ4NL) {
          x[i] = d * static_cast<float>(Iq4NlLevel(q));
        } else {
          x[i] = static_cast<float>(q - (kHasFifth ? 16 : 8)) * d;
        }
      }
    }
  } else if constexpr (kWide) {
    constexpr int kBytes = kLaneElements * GroupBytes(kType);
    Eight<kType> raw;
    const char* from = static_cast<const char*>(in) + chunk * kBytes;
    if constexpr (kBytes == 8) {
      const uint2 part = *reinterpret_cast<const uint2*>(from);
      memcpy(&raw, &part, kBytes);
    } else {
      uint4 part[kBytes / 16];
#pragma unroll
      for (int i = 0; i < kBytes / 16; ++i) part[i] = reinterpret_cast<const uint4*>(from)[i];
      memcpy(&raw, part, kBytes);
    }
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) x[i] = LoadPlain<kType>(&raw, i);
  } else {
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      x[i] = LoadPlain<kType>(in, chunk * kLaneElements + i);
    }
  }
}

// The lanes of one group of 32, numbered 0 to 3, as a mask of their warp.
__device__ inline unsigned GroupMask() {
  const unsigned lane = (threadIdx.x + blockDim.x * threadIdx.y) & 31u;
  return 0xfu << (lane & ~3u);
}

// The element of a group that `better` prefers, the first of equals; `value` is a lane's own.
template <typename Better>
__device__ inline float Reduce(unsigned mask, int quarter, float value, Better better) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const float other = __shfl_xor_sync(mask, value, step);
    const bool other_is_first = (quarter & step) != 0;
    if (better(other, value) || (!better(value, other) && other_is_first)) value = other;
  }
  return value;
}

template <typename Better>
__device__ inline float Best(const float x[kLaneElements], float start, Better better) {
  float value = start;
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) value = better(x[i], value) ? x[i] : value;
  return value;
}

// Adds all lanes' terms in the order of the elements.
__device__ inline float SumInOrder(unsigned mask, const float terms[kLaneElements]) {
  float sum = 0.0f;
#pragma unroll
  for (int lane = 0; lane < 4; ++lane) {
    float mine = sum;
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) mine += terms[i];
    sum = __shfl_sync(mask, mine, lane, 4);
  }
  return sum;
}

// codes: four bits (and a fifth) of a lane's eight elements.
template <bool kHasFifth>
__device__ inline void StoreNibbles(unsigned mask, int quarter, const uint32_t code[kLaneElements],
                                    uint8_t* nibbles, uint8_t* high) {
  uint32_t packed = 0;
  uint32_t fifth = 0;
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) {
    packed |= (code[i] & 15u) << (4 * i);
    fifth |= (code[i] >> 4) << i;
  }
  const uint32_t other = __shfl_xor_sync(mask, packed, 2);
  if (quarter < 2) {
    uint16_t* out = reinterpret_cast<uint16_t*>(nibbles + 8 * quarter);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = packed >> (8 * i);
      const uint32_t top = other >> (8 * i);
      out[i] = static_cast<uint16_t>((low & 15u) | ((top & 15u) << 4) | ((low & 240u) << 4) |
                                     ((top & 240u) << 8));
    }
  }
  if constexpr (kHasFifth) high[quarter] = static_cast<uint8_t>(fifth);
}

// The counterpart of LoadEight.
template <KvType kType, bool kWide>
__device__ inline void StoreEight(const float x[kLaneElements], void* out, int64_t chunk) {
  if constexpr (IsBlockType(kType)) {
    const unsigned mask = GroupMask();
    const int quarter = static_cast<int>(chunk & 3);
    uint8_t* group = static_cast<uint8_t*>(out) + (chunk >> 2) * GroupBytes(kType);
    uint16_t* halves = reinterpret_cast<uint16_t*>(group);
    float v[kLaneElements];
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) v[i] = BlockInput(x[i]);
    const auto is_larger = [](float a, float b) { return Magnitude(a) > Magnitude(b); };
    if constexpr (kType == KvType::kQ4_1 || kType == KvType::kQ5_1) {
      constexpr bool kHasFifth = kType == KvType::kQ5_1;
      constexpr int32_t kMost = kHasFifth ? 31 : 15;
      const auto is_less = [](float a, float b) { return a < b; };
      const auto is_more = [](float a, float b) { return a > b; };
      const float least = Reduce(mask, quarter, Best(v, v[0], is_less), is_less);
      const float most = Reduce(mask, quarter, Best(v, v[0], is_more), is_more);
      const float d = (most - least) / static_cast<float>(kMost);
      const float inverse = BlockReciprocal(d);
      uint32_t code[kLaneElements];
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i) {
        const int32_t q = static_cast<int32_t>((v[i] - least) * inverse + 0.5f);
        code[i] = static_cast<uint32_t>(q < kMost ? q : kMost);
      }
      if (quarter == 0) {
        halves[0] = BlockScale(d);
        halves[1] = BlockScale(least);
      }
      StoreNibbles<kHasFifth>(mask, quarter, code, group + (kHasFifth ? 8 : 4), group + 4);
    } else {
      const float extreme = Reduce(mask, quarter, Best(v, 0.0f, is_larger), is_larger);
      if constexpr (kType == KvType::kQ8_0) {
        const float d = Magnitude(extreme) / 127.0f;
        const float inverse = BlockReciprocal(d);
        uint16_t codes[4] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < kLaneElements; ++i) {
          const float scaled = v[i] * inverse;
          int32_t q = static_cast<int32_t>(scaled);
          const float rest = scaled - static_cast<float>(q);
          q += rest >= 0.5f ? 1 : rest <= -0.5f ? -1 : 0;
          codes[i / 2] |= static_cast<uint16_t>((q & 255) << (8 * (i & 1)));
        }
        if (quarter == 0) halves[0] = BlockScale(d);
#pragma unroll
        for (int i = 0; i < 4; ++i) halves[1 + 4 * quarter + i] = codes[i];
      } else if constexpr (kType == KvType::kIQ4NL) {
        const bool is_zero = Magnitude(extreme) < kIq4NlSmallest;
        const float inverse = is_zero ? 0.0f : BlockReciprocal(extreme / -127.0f);
        uint32_t code[kLaneElements];
        float terms_qx[kLaneElements];
        float terms_qq[kLaneElements];
#pragma unroll
        for (int i = 0; i < kLaneElements; ++i) {
          const float twice = v[i] * inverse * 2.0f;
          uint32_t index = 0;
          int32_t level = Iq4NlLevel(0);
#pragma unroll
          for (int k = 0; k < 15; ++k) {
            const bool reached = twice >= static_cast<float>(Iq4NlTwiceMidpoint(k));
            index += reached ? 1u : 0u;
            level += reached ? Iq4NlLevel(k + 1) - Iq4NlLevel(k) : 0;
          }
          code[i] = is_zero ? 0u : index;
          const float q = static_cast<float>(level);
          const float weighted = v[i] * v[i] * q;
          terms_qx[i] = weighted * v[i];
          terms_qq[i] = weighted * q;
        }
        const float sum_qx = SumInOrder(mask, terms_qx);
        const float sum_qq = SumInOrder(mask, terms_qq);
        if (quarter == 0) {
          halves[0] = is_zero || !(sum_qq > 0.0f) ? uint16_t{0} : BlockScale(sum_qx / sum_qq);
        }
        StoreNibbles<false>(mask, quarter, code, group + 2, nullptr);
      } else {
        constexpr bool kHasFifth = kType == KvType::kQ5_0;
        constexpr float kHalf = kHasFifth ? 16.0f : 8.0f;
        constexpr int32_t kMost = kHasFifth ? 31 : 15;
        const float d = extreme / -kHalf;
        const float inverse = BlockReciprocal(d);
        uint32_t code[kLaneElements];
#pragma unroll
        for (int i = 0; i < kLaneElements; ++i) {
          const int32_t q = static_cast<int32_t>(v[i] * inverse + (kHalf + 0.5f));
          code[i] = static_cast<uint32_t>(q < kMost ? q : kMost);
        }
        if (quarter == 0) halves[0] = BlockScale(d);
        StoreNibbles<kHasFifth>(mask, quarter, code, group + (kHasFifth ? 6 : 2), group + 2);
      }
    }
  } else if constexpr (kWide) {
    constexpr int kBytes = kLaneElements * GroupBytes(kType);
    Eight<kType> raw;
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) StorePlain<kType>(x[i], &raw, i);
    char* to = static_cast<char*>(out) + chunk * kBytes;
    if constexpr (kBytes == 8) {
      uint2 part;
      memcpy(&part, &raw, kBytes);
      *reinterpret_cast<uint2*>(to) = part;
    } else {
      uint4 part[kBytes / 16];
      memcpy(part, &raw, kBytes);
#pragma unroll
      for (int i = 0; i < kBytes / 16; ++i) reinterpret_cast<uint4*>(to)[i] = part[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      StorePlain<kType>(x[i], out, chunk * kLaneElements + i);
    }
  }
}

// Copies n bytes with the threads `rank` of `num_threads`, as wide as the addresses allow.
__device__ inline void CopyBytes(const char* in, char* out, int64_t n, int rank, int num_threads) {
  const uintptr_t together = reinterpret_cast<uintptr_t>(in) | reinterpret_cast<uintptr_t>(out) |
                             static_cast<uintptr_t>(n);
  if ((together & 15) == 0) {
    const uint4* from = reinterpret_cast<const uint4*>(in);
    uint4* to = reinterpret_cast<uint4*>(out);
    const int64_t count = n / 16;
    int64_t i = rank;
    // Four loads in flight before the first store.
    for (; i + 3 * num_threads < count; i += 4 * num_threads) {
      uint4 v[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) v[k] = from[i + k * num_threads];
#pragma unroll
      for (int k = 0; k < 4; ++k) to[i + k * num_threads] = v[k];
    }
    for (; i < count; i += num_threads) to[i] = from[i];
  } else if ((together & 3) == 0) {
    const uint32_t* from = reinterpret_cast<const uint32_t*>(in);
    uint32_t* to = reinterpret_cast<uint32_t*>(out);
    for (int64_t i = rank; i < n / 4; i += num_threads) to[i] = from[i];
  } else if ((together & 1) == 0) {
    const uint16_t* from = reinterpret_cast<const uint16_t*>(in);
    uint16_t* to = reinterpret_cast<uint16_t*>(out);
    for (int64_t i = rank; i < n / 2; i += num_threads) to[i] = from[i];
  } else {
    for (int64_t i = rank; i < n; i += num_threads) out[i] = in[i];
  }
}

}  // namespace pagetide::kernels::device

#endif  // PAGETIDE_KERNELS_DEVICE_CODEC_CUH_
