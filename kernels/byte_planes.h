// Byte-plane split: plane b holds byte b of every element. The planes of high bytes (sign, exponent
// and leading mantissa) repeat much more than the elements do, so a general codec shrinks them;
// nothing is lost. Plain C++17 PODs, shared with device code; no state, thread-safe.
#ifndef PAGETIDE_KERNELS_BYTE_PLANES_H_
#define PAGETIDE_KERNELS_BYTE_PLANES_H_

#include <cstdint>

#include "kernels/cuda_stream.h"
#include "kernels/isa.h"

namespace pagetide::kernels {

inline constexpr int32_t kMaxPlaneElementBytes = 64;

// Split:  in [count, element_bytes] -> out [element_bytes, count].
// Merge:  in [element_bytes, count] -> out [count, element_bytes].
// For block types an element is a group: 34 planes for q8_0, the first two of scales.
struct BytePlanesArgs {
  const void* in;  // any alignment; no byte of `out`
  void* out;
  int64_t count;          // elements
  int32_t element_bytes;  // 1 to kMaxPlaneElementBytes
};

// Returns null when `args` keeps the rules above (but for overlap), else a sentence that names the
// field.
const char* CheckBytePlanesArgs(const BytePlanesArgs& args);

// CPU twins, one thread.
void SplitBytePlanesHost(const BytePlanesArgs& args, Isa isa = Isa::kBest);
void MergeBytePlanesHost(const BytePlanesArgs& args, Isa isa = Isa::kBest);
int SplitBytePlanesCuda(const BytePlanesArgs& args, CudaStream stream);
int MergeBytePlanesCuda(const BytePlanesArgs& args, CudaStream stream);

}  // namespace pagetide::kernels

#endif  // PAGETIDE_KERNELS_BYTE_PLANES_H_
