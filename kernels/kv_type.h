// KvType: how the elements of KV rows are encoded. Plain C++17, shared with device code.
//
// Plain types encode each element on its own. Block types are ggml's: a group of 32 consecutive
// elements shares a scale (and a minimum); a head is a whole number of groups.
#ifndef PAGETIDE_KERNELS_KV_TYPE_H_
#define PAGETIDE_KERNELS_KV_TYPE_H_

#include <cstdint>

#include "kernels/host_device.h"

namespace pagetide::kernels {

// The order is that of the page geometry's data types, so that the two convert by number.
enum class KvType : uint8_t {
  kF32,
  kF16,
  kBF16,
  kF8E4M3,  // OCP E4M3: no infinity, largest 448
  kF8E5M2,  // OCP E5M2: largest finite 57344
  kQ8_0,
  kQ5_0,
  kQ5_1,
  kQ4_0,
  kQ4_1,
  kIQ4NL,
};
inline constexpr int kNumKvTypes = 11;
inline constexpr int kMaxGroupElements = 32;

PAGETIDE_HD constexpr bool IsBlockType(KvType type) {
  return type >= KvType::kQ8_0;
}

// Elements that are encoded together.
PAGETIDE_HD constexpr int32_t GroupElements(KvType type) {
  return IsBlockType(type) ? 32 : 1;
}

// Bytes of one such group.
PAGETIDE_HD constexpr int32_t GroupBytes(KvType type) {
  switch (type) {
    case KvType::kF32:
      return 4;
    case KvType::kF16:
    case KvType::kBF16:
      return 2;
    case KvType::kF8E4M3:
    case KvType::kF8E5M2:
      return 1;
    case KvType::kQ8_0:
      return 34;
    case KvType::kQ5_0:
      return 22;
    case KvType::kQ5_1:
      return 24;
    case KvType::kQ4_0:
      return 18;
    case KvType::kQ4_1:
      return 20;
    case KvType::kIQ4NL:
      return 18;
  }
  return 0;
}

// Bytes of `count` elements, a multiple of GroupElements(type).
PAGETIDE_HD constexpr int64_t EncodedBytes(KvType type, int64_t count) {
  return count / GroupElements(type) * GroupBytes(type);
}

// "f16", "q8_0": the names of the page geometry.
constexpr const char* KvTypeName(KvType type) {
  constexpr const char* kNames[kNumKvTypes] = {"f32",  "f16",  "bf16", "f8_e4m3", "f8_e5m2", "q8_0",
                                               "q5_0", "q5_1", "q4_0", "q4_1",    "iq4_nl"};
  return kNames[static_cast<int>(type)];
}

}  // namespace pagetide::kernels

#endif  // PAGETIDE_KERNELS_KV_TYPE_H_
