#include "kernels/byte_planes.h"

#include <cstddef>
#include <cstring>

#include "kernels/simd.h"

namespace pagetide::kernels {
namespace {

typedef uint8_t Byte16 __attribute__((vector_size(16)));

template <typename V>
PAGETIDE_ALWAYS_INLINE V LoadVector(const uint8_t* in) {
  V v;
  std::memcpy(&v, in, sizeof(v));
  return v;
}
template <typename V>
PAGETIDE_ALWAYS_INLINE void StoreVector(uint8_t* out, V v) {
  std::memcpy(out, &v, sizeof(v));
}

// Even and odd bytes of two vectors: the step that splits; Interleave undoes it.
PAGETIDE_ALWAYS_INLINE void Separate(Byte16 a, Byte16 b, Byte16* even, Byte16* odd) {
  *even = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  *odd = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
PAGETIDE_ALWAYS_INLINE void Interleave(Byte16 even, Byte16 odd, Byte16* a, Byte16* b) {
  *a = __builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  *b = __builtin_shufflevector(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                               31);
}

// Elements of any width, in tiles that keep both sides in the cache.
void SplitAny(const uint8_t* in, int64_t count, int64_t begin, int32_t width, uint8_t* out) {
  constexpr int64_t kTile = 512;
  for (int64_t tile = begin; tile < count; tile += kTile) {
    const int64_t end = tile + kTile < count ? tile + kTile : count;
    for (int32_t b = 0; b < width; ++b) {
      for (int64_t i = tile; i < end; ++i) out[b * count + i] = in[i * width + b];
    }
  }
}
void MergeAny(const uint8_t* in, int64_t count, int64_t begin, int32_t width, uint8_t* out) {
  constexpr int64_t kTile = 512;
  for (int64_t tile = begin; tile < count; tile += kTile) {
    const int64_t end = tile + kTile < count ? tile + kTile : count;
    for (int32_t b = 0; b < width; ++b) {
      for (int64_t i = tile; i < end; ++i) out[i * width + b] = in[b * count + i];
    }
  }
}

PAGETIDE_ALWAYS_INLINE void SplitBody(const uint8_t* in, int64_t count, int32_t width,
                                      uint8_t* out) {
  int64_t i = 0;
  if (width == 2) {
    for (; i + 16 <= count; i += 16) {
      Byte16 low, high;
      Separate(LoadVector<Byte16>(in + 2 * i), LoadVector<Byte16>(in + 2 * i + 16), &low, &high);
      StoreVector(out + i, low);
      StoreVector(out + count + i, high);
    }
  } else if (width == 4) {
    for (; i + 16 <= count; i += 16) {
      Byte16 even[2], odd[2], plane[4];
      for (int t = 0; t < 2; ++t) {
        Separate(LoadVector<Byte16>(in + 4 * i + 32 * t),
                 LoadVector<Byte16>(in + 4 * i + 32 * t + 16), &even[t], &odd[t]);
      }
      Separate(even[0], even[1], &plane[0], &plane[2]);
      Separate(odd[0], odd[1], &plane[1], &plane[3]);
      for (int b = 0; b < 4; ++b) StoreVector(out + b * count + i, plane[b]);
    }
  }
  SplitAny(in, count, i, width, out);
}

PAGETIDE_ALWAYS_INLINE void MergeBody(const uint8_t* in, int64_t count, int32_t width,
                                      uint8_t* out) {
  int64_t i = 0;
  if (width == 2) {
    for (; i + 16 <= count; i += 16) {
      Byte16 a, b;
      Interleave(LoadVector<Byte16>(in + i), LoadVector<Byte16>(in + count + i), &a, &b);
      StoreVector(out + 2 * i, a);
      StoreVector(out + 2 * i + 16, b);
    }
  } else if (width == 4) {
    for (; i + 16 <= count; i += 16) {
      Byte16 plane[4], even[2], odd[2];
      for (int b = 0; b < 4; ++b) plane[b] = LoadVector<Byte16>(in + b * count + i);
      Interleave(plane[0], plane[2], &even[0], &even[1]);
      Interleave(plane[1], plane[3], &odd[0], &odd[1]);
      for (int t = 0; t < 2; ++t) {
        Byte16 a, b;
        Interleave(even[t], odd[t], &a, &b);
        StoreVector(out + 4 * i + 32 * t, a);
        StoreVector(out + 4 * i + 32 * t + 16, b);
      }
    }
  }
  MergeAny(in, count, i, width, out);
}

PAGETIDE_TARGET_AVX2 void SplitAvx2(const uint8_t* in, int64_t count, int32_t width, uint8_t* out) {
  SplitBody(in, count, width, out);
}
void SplitBaseline(const uint8_t* in, int64_t count, int32_t width, uint8_t* out) {
  SplitBody(in, count, width, out);
}
PAGETIDE_TARGET_AVX2 void MergeAvx2(const uint8_t* in, int64_t count, int32_t width, uint8_t* out) {
  MergeBody(in, count, width, out);
}
void MergeBaseline(const uint8_t* in, int64_t count, int32_t width, uint8_t* out) {
  MergeBody(in, count, width, out);
}

}  // namespace

const char* CheckBytePlanesArgs(const BytePlanesArgs& args) {
  if (args.count < 0) return "count must not be negative";
  if (args.element_bytes < 1 || args.element_bytes > kMaxPlaneElementBytes) {
    return "element_bytes must be 1 to 64";
  }
  if (args.count > 0 && (args.in == nullptr || args.out == nullptr)) {
    return "in and out must not be null";
  }
  return nullptr;
}

void SplitBytePlanesHost(const BytePlanesArgs& args, Isa isa) {
  (UseAvx2(isa) ? SplitAvx2 : SplitBaseline)(static_cast<const uint8_t*>(args.in), args.count,
                                             args.element_bytes, static_cast<uint8_t*>(args.out));
}

void MergeBytePlanesHost(const BytePlanesArgs& args, Isa isa) {
  (UseAvx2(isa) ? MergeAvx2 : MergeBaseline)(static_cast<const uint8_t*>(args.in), args.count,
                                             args.element_bytes, static_cast<uint8_t*>(args.out));
}

}  // namespace pagetide::kernels
