// Rows from one encoding to another: appends of an engine's rows to pages of another type, pages
// that are kept colder than they are used, and the way back. Plain C++17 PODs, shared with device
// code; no state, thread-safe.
//
// Elements go through f32 by the rules of convert.h and block_codec.h. Equal types copy bytes.
#ifndef PAGETIDE_KERNELS_CONVERT_ROWS_H_
#define PAGETIDE_KERNELS_CONVERT_ROWS_H_

#include <cstdint>

#include "kernels/cuda_stream.h"
#include "kernels/isa.h"
#include "kernels/kv_type.h"

namespace pagetide::kernels {

// Consecutive rows, such as the part of an append that goes to one page.
struct ConvertRun {
  const void* in;  // first row: [num_rows, in_row_bytes]
  void* out;       // first row: [num_rows, out_row_bytes]; no byte of any run's `in`
  int64_t num_rows;
};

// Device rows have the alignment of their elements (2 bytes for block types), strides too; rows
// whose addresses and strides are multiples of 16 are read and written 16 bytes at a time.
struct ConvertRowsArgs {
  KvType in_type;
  KvType out_type;
  int64_t row_elements;  // a multiple of 32 where either type is a block type
  int64_t in_row_bytes;  // strides, >= EncodedBytes(type, row_elements)
  int64_t out_row_bytes;
  const ConvertRun* runs;  // [num_runs]
  int64_t num_runs;
  int64_t max_rows;  // the largest num_rows: sizes the grid of a device
};

// Returns null when `args` keeps the rules above (but for overlap and alignment), else a sentence
// that names the field.
const char* CheckConvertRowsArgs(const ConvertRowsArgs& args);

// CPU twin, one thread; any alignment. Bytes between rows are not written.
void ConvertRowsHost(const ConvertRowsArgs& args, Isa isa = Isa::kBest);
int ConvertRowsCuda(const ConvertRowsArgs& args, CudaStream stream);

}  // namespace pagetide::kernels

#endif  // PAGETIDE_KERNELS_CONVERT_ROWS_H_
