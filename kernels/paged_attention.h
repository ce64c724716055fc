// Attention of query rows over KV rows that lie in pages, for one layer. Prefill and decode, GQA,
// MQA and MLA, causal and window masks, rows of all types. Plain C++17 PODs, shared with device
// code.
//
// Order of summation on the host (what makes reuse unable to change a bit): positions are cut into
// blocks
// [kAttentionBlock * b, kAttentionBlock * (b + 1)). For a query, a score is the dot product summed
// over the head dimension in ascending order; blocks are taken in ascending order with one running
// maximum; inside a block the weights sum in eight lanes by position mod 8 and the values
// accumulate position by position. Nothing depends on where a page, an extent or a chunk of queries
// begins, so every paging and every chunking of the same rows gives the same bits. Rows that share
// a position (after DividePositions) are taken in list order, each repeat opening a further block
// of its own.
//
// Partial results over disjoint key sets merge through the log-sum-exp (equal in value, not in
// bits).
//
// MLA latents (v_dim 0 in the geometry): pass the K rows as values too, with v_dim = latent width.
#ifndef PAGETIDE_KERNELS_PAGED_ATTENTION_H_
#define PAGETIDE_KERNELS_PAGED_ATTENTION_H_

#include <cstdint>

#include "kernels/convert.h"
#include "kernels/cuda_stream.h"
#include "kernels/isa.h"

namespace pagetide::kernels {

inline constexpr int kAttentionBlock = 64;  // positions

// Consecutive rows of one page at consecutive positions: slot first_slot + i holds position
// first_position + i, i in [0, count).
struct KvRun {
  const void* k_rows;  // this layer's K rows, slot 0: [page_tokens, k_row_bytes], any alignment
  const void* v_rows;  // this layer's V rows, slot 0: [page_tokens, v_row_bytes], any alignment
  int64_t first_position;
  int32_t first_slot;
  int32_t count;
};

// Which key positions p0 a query at p1 sees (FEATURES.md C2).
enum class AttentionMask : uint8_t {
  kCausal,           // p0 <= p1
  kWindowStandard,   // causal and p1 - p0 < window
  kWindowChunked,    // causal and p0 >= floor(p1 / window) * window
  kWindowSymmetric,  // |p1 - p0| <= window / 2
  kWindowRing,       // causal and (p1 - p0 < window or p0 < keep)
};

struct AttentionShape {
  int32_t num_q_heads;  // a multiple of num_kv_heads; query head h reads KV head h / (ratio)
  int32_t num_kv_heads;
  int32_t k_dim;  // elements of one K head, also of one query head
  int32_t v_dim;  // elements of one V head
  KvType k_type;
  KvType v_type;
  int64_t k_row_bytes;  // stride between K rows, >= num_kv_heads * k_dim * size of k_type
  int64_t v_row_bytes;
  float scale;  // scores are multiplied by this, usually 1 / sqrt(k_dim)
  AttentionMask mask;
  int64_t window;  // positions; used by the window masks only, >= 1
  int64_t keep;    // positions; used by kWindowRing only, >= 0
};

struct AttentionArgs {
  AttentionShape shape;
  const KvRun* runs;  // [num_runs], positions never decrease from run to run
  int64_t num_runs;
  const float* q;              // [num_queries, num_q_heads, k_dim], f32
  const int64_t* q_positions;  // [num_queries]
  int64_t num_queries;
  float* out;  // [num_queries, num_q_heads, v_dim], f32; 0 where a query sees no key
  float* lse;  // [num_queries, num_q_heads] natural log-sum-exp of the scaled scores,
               // -infinity where a query sees no key; may be null
};

// Runs and queries of one sequence of a batch. Sequences follow one another in order and without
// gaps.
struct AttentionSequence {
  int64_t first_run;  // in AttentionArgs.runs
  int64_t num_runs;
  int64_t first_query;  // in AttentionArgs.q, q_positions, out and lse
  int64_t num_queries;
};

// Sequences that are attended to together: one launch for a whole step of an engine. Their numbers
// of runs, rows and queries may differ; positions never decrease within a sequence.
struct AttentionBatch {
  AttentionArgs all;                   // all sequences' runs and queries
  const AttentionSequence* sequences;  // [num_sequences]; null: one, of all runs and queries
  int64_t num_sequences;
  int64_t max_rows;     // at least the KV rows of the longest: divides the work of a device
  int64_t max_queries;  // at least the queries of any sequence: sizes the grid of a device
  // Every run's v_rows are its k_rows (MLA): a device reads them once. Then v_type and v_row_bytes
  // are the K rows', v_dim <= k_dim, and v_dim == k_dim or num_kv_heads == 1.
  bool values_are_keys;
};

// Returns null when `args` keeps the rules above, else a sentence that names the field. Kernels do
// not check again.
const char* CheckAttentionArgs(const AttentionArgs& args);
// The same of a batch in host memory.
const char* CheckAttentionBatch(const AttentionBatch& batch);
// The shape alone: all that can be said of a batch in device memory.
const char* CheckAttentionShape(const AttentionShape& shape);

// The CPU twin: the oracle of device kernels and the CPU device's own kernel. One thread; callers
// split by queries. Scratch is a few tens of KiB, allocated once a call.
void AttendHost(const AttentionArgs& args, Isa isa = Isa::kBest);
void AttendHost(const AttentionBatch& batch, Isa isa = Isa::kBest);

// The device half: KV rows in list order, tile by tile, on tensor cores where the types allow, long
// sequences divided among thread blocks whose parts are merged through the log-sum-exp. Rows have
// the alignment of their elements (2 bytes for block types), strides too; heads at multiples of 16
// bytes are read fastest.
//
// How rows are paged does not change a bit of a result; max_rows, max_queries and the number of
// sequences, by which the work is divided, do. docs/kernels.md bounds the deviation from the host
// twin by type. Unlike there, a NaN or an infinity in a value row may reach all queries of
// its sequence, and on f16 operands (f16, fp8 and block types) so does an element beyond 65504.
//
// Bytes of device memory that AttendCuda needs on the current device, 256-byte aligned; negative
// where the device cannot attend to such a batch (WhyNotAttendCuda). Reads no device memory.
int64_t AttentionWorkspaceBytes(const AttentionBatch& batch);
// Null, or a sentence that says why AttendCuda cannot take the batch on the current device.
const char* WhyNotAttendCuda(const AttentionBatch& batch);
// cudaErrorInvalidValue where WhyNotAttendCuda has a reason. `workspace` may be used by calls on
// one stream in turn. Allocates nothing and can be captured into a graph.
int AttendCuda(const AttentionBatch& batch, void* workspace, CudaStream stream);

}  // namespace pagetide::kernels

#endif  // PAGETIDE_KERNELS_PAGED_ATTENTION_H_
