#include "kernels/convert_rows.h"

#include <algorithm>
#include <cstring>

#include "kernels/convert.h"

namespace pagetide::kernels {

const char* CheckConvertRowsArgs(const ConvertRowsArgs& args) {
  if (args.row_elements < 1) return "row_elements must be at least 1";
  if (args.row_elements % GroupElements(args.in_type) != 0 ||
      args.row_elements % GroupElements(args.out_type) != 0) {
    return "row_elements must be a multiple of 32 for a block type";
  }
  if (args.in_row_bytes < EncodedBytes(args.in_type, args.row_elements)) {
    return "in_row_bytes is less than one row";
  }
  if (args.out_row_bytes < EncodedBytes(args.out_type, args.row_elements)) {
    return "out_row_bytes is less than one row";
  }
  if (args.num_runs < 0) return "num_runs must not be negative";
  for (int64_t r = 0; r < args.num_runs; ++r) {
    const ConvertRun& run = args.runs[r];
    if (run.num_rows < 0) return "run: num_rows must not be negative";
    if (run.num_rows > args.max_rows) return "run: num_rows exceeds max_rows";
    if (run.num_rows > 0 && (run.in == nullptr || run.out == nullptr)) {
      return "run: in and out must not be null";
    }
  }
  return nullptr;
}

void ConvertRowsHost(const ConvertRowsArgs& args, Isa isa) {
  // A few groups at a time, so that the f32 in between stays in the first-level cache.
  constexpr int64_t kStep = 1024;
  alignas(32) float wide[kStep];
  for (int64_t r = 0; r < args.num_runs; ++r) {
    const ConvertRun& run = args.runs[r];
    for (int64_t row = 0; row < run.num_rows; ++row) {
      const char* in = static_cast<const char*>(run.in) + row * args.in_row_bytes;
      char* out = static_cast<char*>(run.out) + row * args.out_row_bytes;
      if (args.in_type == args.out_type) {
        std::memcpy(out, in, static_cast<size_t>(EncodedBytes(args.in_type, args.row_elements)));
        continue;
      }
      for (int64_t at = 0; at < args.row_elements; at += kStep) {
        const int64_t count = std::min(kStep, args.row_elements - at);
        const char* from = in + EncodedBytes(args.in_type, at);
        char* to = out + EncodedBytes(args.out_type, at);
        WidenToF32(args.in_type, from, count, wide, isa);
        NarrowFromF32(args.out_type, wide, count, to, isa);
      }
    }
  }
}

}  // namespace pagetide::kernels
