#include "kernels/convert.h"

namespace pagetide::kernels {

void WidenToF32(KvType type, const void* in, int64_t count, float* out) {
  const char* bytes = static_cast<const char*>(in);
  switch (type) {
    case KvType::kF32:
      std::memcpy(out, bytes, static_cast<size_t>(count) * sizeof(float));
      return;
    case KvType::kF16:
      for (int64_t i = 0; i < count; ++i) {
        uint16_t half;
        std::memcpy(&half, bytes + 2 * i, sizeof(half));
        out[i] = F16ToF32(half);
      }
      return;
    case KvType::kBF16:
      for (int64_t i = 0; i < count; ++i) {
        uint16_t half;
        std::memcpy(&half, bytes + 2 * i, sizeof(half));
        out[i] = BF16ToF32(half);
      }
      return;
  }
}

void NarrowFromF32(KvType type, const float* in, int64_t count, void* out) {
  char* bytes = static_cast<char*>(out);
  switch (type) {
    case KvType::kF32:
      std::memcpy(bytes, in, static_cast<size_t>(count) * sizeof(float));
      return;
    case KvType::kF16:
      for (int64_t i = 0; i < count; ++i) {
        const uint16_t half = F32ToF16(in[i]);
        std::memcpy(bytes + 2 * i, &half, sizeof(half));
      }
      return;
    case KvType::kBF16:
      for (int64_t i = 0; i < count; ++i) {
        const uint16_t half = F32ToBF16(in[i]);
        std::memcpy(bytes + 2 * i, &half, sizeof(half));
      }
      return;
  }
}

}  // namespace pagetide::kernels
