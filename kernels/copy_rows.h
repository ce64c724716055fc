// Row copy: runs of consecutive rows from page to page, all layers in one call, bytes unchanged.
// For pages that are taken over in part and for compaction. Plain C++17 PODs, shared with device
// code; no state, thread-safe.
#ifndef PAGETIDE_KERNELS_COPY_ROWS_H_
#define PAGETIDE_KERNELS_COPY_ROWS_H_

#include <cstdint>

#include "kernels/cuda_stream.h"

namespace pagetide::kernels {

// One run of rows of one kind (K or V), such as slots [first, first + n) of a page: in every plane
// num_bytes contiguous bytes.
struct CopyRun {
  const void* in;  // first byte in plane 0, any alignment
  void* out;       // likewise; no byte of a run's `out` may be in any run's `in`
  int64_t num_bytes;
};

struct CopyRowsArgs {
  const CopyRun* runs;  // [num_runs]
  int64_t num_runs;
  int32_t num_planes;      // layers, >= 1; plane p begins p strides after plane 0
  int64_t in_plane_bytes;  // strides; 0 when num_planes is 1
  int64_t out_plane_bytes;
  int64_t max_run_bytes;  // the largest num_bytes: sizes the grid of a device
};

// Returns null when `args` keeps the rules above (but for overlap), else a sentence that names the
// field.
const char* CheckCopyRowsArgs(const CopyRowsArgs& args);

// CPU twin, one thread.
void CopyRowsHost(const CopyRowsArgs& args);
int CopyRowsCuda(const CopyRowsArgs& args, CudaStream stream);

}  // namespace pagetide::kernels

#endif  // PAGETIDE_KERNELS_COPY_ROWS_H_
