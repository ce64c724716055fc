#include "kernels/convert.h"

#include "kernels/block_codec.h"

namespace pagetide::kernels {
namespace {

template <typename Stored, float (*kWiden)(Stored)>
void WidenPlain(const void* in, int64_t count, float* out) {
  const char* bytes = static_cast<const char*>(in);
  for (int64_t i = 0; i < count; ++i) {
    Stored stored;
    std::memcpy(&stored, bytes + i * static_cast<int64_t>(sizeof(Stored)), sizeof(Stored));
    out[i] = kWiden(stored);
  }
}

template <typename Stored, Stored (*kNarrow)(float)>
void NarrowPlain(const float* in, int64_t count, void* out) {
  char* bytes = static_cast<char*>(out);
  for (int64_t i = 0; i < count; ++i) {
    const Stored stored = kNarrow(in[i]);
    std::memcpy(bytes + i * static_cast<int64_t>(sizeof(Stored)), &stored, sizeof(Stored));
  }
}

}  // namespace

void WidenToF32(KvType type, const void* in, int64_t count, float* out, Isa isa) {
  switch (type) {
    case KvType::kF32:
      std::memcpy(out, in, static_cast<size_t>(count) * sizeof(float));
      return;
    case KvType::kF16:
      return WidenPlain<uint16_t, F16ToF32>(in, count, out);
    case KvType::kBF16:
      return WidenPlain<uint16_t, BF16ToF32>(in, count, out);
    case KvType::kF8E4M3:
      return WidenPlain<uint8_t, F8E4M3ToF32>(in, count, out);
    case KvType::kF8E5M2:
      return WidenPlain<uint8_t, F8E5M2ToF32>(in, count, out);
    default: {
      const uint8_t* group = static_cast<const uint8_t*>(in);
      for (int64_t i = 0; i < count; i += 32, group += GroupBytes(type)) {
        DecodeGroup(type, group, out + i);
      }
      return;
    }
  }
}

void NarrowFromF32(KvType type, const float* in, int64_t count, void* out, Isa isa) {
  switch (type) {
    case KvType::kF32:
      std::memcpy(out, in, static_cast<size_t>(count) * sizeof(float));
      return;
    case KvType::kF16:
      return NarrowPlain<uint16_t, F32ToF16>(in, count, out);
    case KvType::kBF16:
      return NarrowPlain<uint16_t, F32ToBF16>(in, count, out);
    case KvType::kF8E4M3:
      return NarrowPlain<uint8_t, F32ToF8E4M3>(in, count, out);
    case KvType::kF8E5M2:
      return NarrowPlain<uint8_t, F32ToF8E5M2>(in, count, out);
    default: {
      uint8_t* group = static_cast<uint8_t*>(out);
      for (int64_t i = 0; i < count; i += 32, group += GroupBytes(type)) {
        EncodeGroup(type, in + i, group);
      }
      return;
    }
  }
}

}  // namespace pagetide::kernels
