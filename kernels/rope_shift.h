// K-shift: moves K rows that are in the cache by whole positions, by turning them through R(delta).
// For all encodings, in place or to a copy, many runs of rows and all their layers in one call. The
// derivation is in docs/kshift.md.
//
// R(a)R(b) = R(a + b), so a row written at position p and turned by delta is the row written at
// p + delta, up to rounding. The magnitude is 1: YaRN's was applied when the row was written.
// Rounding per shift is that of the encoding: f32 rows turn in f32, all others are widened, turned
// in f32 and narrowed again (block types: each group of 32 that the turn touches is quantised
// anew). A delta of 0 and elements outside the turned groups keep their bits.
//
// Plain C++17 PODs, shared with device code; no state, thread-safe.
#ifndef PAGETIDE_KERNELS_ROPE_SHIFT_H_
#define PAGETIDE_KERNELS_ROPE_SHIFT_H_

#include <cstdint>

#include "kernels/cuda_stream.h"
#include "kernels/isa.h"
#include "kernels/kv_type.h"
#include "kernels/rope.h"

namespace pagetide::kernels {

// Consecutive rows that move by the same delta, such as the rows of one extent in one page.
struct RopeShiftRun {
  const void* in;  // first row, layer 0: [num_layers, num_rows, row], by the strides below
  void* out;       // likewise; equal to `in`, or disjoint from every run's `in`
  int64_t num_rows;
  int64_t delta;  // new position minus old; negative moves towards the start
};

struct RopeShiftArgs {
  RopeParams params;
  KvType type;
  int32_t num_heads;
  int32_t head_dim;      // elements; heads of a row are contiguous
  int32_t rope_offset;   // first element of a head that turns: 0, or the latent's width under MLA;
                         // [rope_offset, rope_offset + n_rot) turns
  int64_t in_row_bytes;  // strides, >= EncodedBytes(type, num_heads * head_dim)
  int64_t out_row_bytes;
  int32_t num_layers;      // of every run, >= 1
  int64_t in_layer_bytes;  // stride from layer to layer; 0 when num_layers is 1
  int64_t out_layer_bytes;
  const RopeShiftRun* runs;  // [num_runs]
  int64_t num_runs;
  int64_t max_rows;  // the largest num_rows: sizes the grid of a device; not read on the host
  // [num_runs, n_rot / 2, 2] f32: RopeAngles(params, runs[r].delta). Null on the host: computed
  // there, once for equal deltas that follow each other. Devices need it.
  const float* cos_sin;
};

// Returns null when `args` keeps the rules above, else a sentence that names the field. Kernels do
// not check again.
const char* CheckRopeShiftArgs(const RopeShiftArgs& args);

// CPU twin, one thread; callers split by runs. Rows have no alignment requirement. Where out is not
// in, whole rows are written (bytes between rows are not).
void RopeShiftHost(const RopeShiftArgs& args, Isa isa = Isa::kBest);

// Rows are aligned to their elements (2 bytes for block types), strides too. params.factors is not
// read. The turned part of a head is at most 12,288 elements (it is held in shared memory);
// cudaErrorInvalidValue beyond.
int RopeShiftCuda(const RopeShiftArgs& args, CudaStream stream);

}  // namespace pagetide::kernels

#endif  // PAGETIDE_KERNELS_ROPE_SHIFT_H_
