#include <cstring>

#include "kernels/copy_rows.h"

namespace pagetide::kernels {

const char* CheckCopyRowsArgs(const CopyRowsArgs& args) {
  if (args.num_runs < 0) return "num_runs must not be negative";
  if (args.num_planes < 1) return "num_planes must be at least 1";
  for (int64_t r = 0; r < args.num_runs; ++r) {
    const CopyRun& run = args.runs[r];
    if (run.num_bytes < 0) return "run: num_bytes must not be negative";
    if (run.num_bytes > args.max_run_bytes) return "run: num_bytes exceeds max_run_bytes";
    if (run.num_bytes > 0 && (run.in == nullptr || run.out == nullptr)) {
      return "run: in and out must not be null";
    }
  }
  return nullptr;
}

void CopyRowsHost(const CopyRowsArgs& args) {
  for (int64_t r = 0; r < args.num_runs; ++r) {
    const CopyRun& run = args.runs[r];
    if (run.num_bytes == 0) continue;
    for (int64_t plane = 0; plane < args.num_planes; ++plane) {
      std::memcpy(static_cast<char*>(run.out) + plane * args.out_plane_bytes,
                  static_cast<const char*>(run.in) + plane * args.in_plane_bytes,
                  static_cast<size_t>(run.num_bytes));
    }
  }
}

}  // namespace pagetide::kernels
