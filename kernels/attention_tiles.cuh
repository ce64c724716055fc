// What a thread block of the attention kernel does around its arithmetic: finding the rows of a
// tile, bringing them to shared memory, converting them to operands, and the running softmax.
//
// Every function is called by all threads of the block; a barrier is the caller's unless said.
#ifndef PAGETIDE_KERNELS_ATTENTION_TILES_CUH_
#define PAGETIDE_KERNELS_ATTENTION_TILES_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/attention_mask.h"
#include "kernels/attention_plan.h"
#include "kernels/device_codec.cuh"
#include "kernels/device_matrix.cuh"

namespace pagetide::kernels::device {

// Rows of shared memory are copied by 16 neighbouring threads each.
inline constexpr int kRowThreads = 16;

// The query rows of a thread block: row r is query (first_row + r) / group of the sequence under
// head kv_head * group + (first_row + r) % group.
struct QueryRows {
  int64_t first_query;  // the sequence's, in the batch
  int32_t first_row;
  int32_t num_rows;  // at most the plan's block_rows
  int32_t group;
  int32_t kv_head;
  int32_t num_q_heads;

  __device__ int64_t QueryOf(int32_t row) const { return first_query + (first_row + row) / group; }
  // Index in [num_queries, num_q_heads].
  __device__ int64_t IndexOf(int32_t row) const {
    return QueryOf(row) * num_q_heads + kv_head * group + (first_row + row) % group;
  }
  // The first row of the next query.
  __device__ int32_t NextQuery(int32_t row) const {
    return ((first_row + row) / group + 1) * group - first_row;
  }
};

// The sequence's KV rows, numbered in list order.
struct SequenceRuns {
  const KvRun* runs;
  const int32_t* ends;            // rows up to the end of each run
  const int64_t* last_positions;  // the position of the last of them
  int32_t num_runs;

  __device__ int32_t num_rows() const { return num_runs == 0 ? 0 : ends[num_runs - 1]; }
  __device__ int32_t StartOf(int32_t run) const { return run == 0 ? 0 : ends[run - 1]; }

  // The run of a row that is there, looked for from run `from` on: most often it is that one.
  __device__ int32_t RunOfRow(int32_t row, int32_t from) const {
    if (ends[from] > row) return from;
    int32_t low = from + 1;
    int32_t high = num_runs - 1;
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      if (ends[middle] > row) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }

  // The number of rows at positions below `position`.
  __device__ int32_t RowsBefore(int64_t position) const {
    int32_t low = 0;
    int32_t high = num_runs;
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      if (last_positions[middle] >= position) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    if (low == num_runs) return num_rows();
    const int64_t first = runs[low].first_position;
    return StartOf(low) + (position > first ? static_cast<int32_t>(position - first) : 0);
  }
};

// What the query rows of a block see together. In static shared memory.
struct BlockView {
  VisiblePositions any;  // seen by some query, and perhaps what lies between
  int64_t all_first;     // [all_first, all_last] is seen by all
  int64_t all_last;
  int32_t begin;     // rows [begin, end) are seen through windows, by some query
  int32_t end;       // no row from here on is seen
  int32_t kept_end;  // rows [0, kept_end) are kept
  int32_t run[2];    // of the last row that was looked for, by turns
};

// Fills visible_at and `view`; ends with a barrier.
__device__ inline void LookAround(const AttentionBatch& batch, const AttentionPlan& plan,
                                  const SequenceRuns& sequence, const QueryRows& queries,
                                  VisiblePositions* visible, BlockView* view) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < plan.block_rows) {
    visible[thread] =
        thread < queries.num_rows
            ? VisibleTo(batch.all.shape, batch.all.q_positions[queries.QueryOf(thread)])
            : VisiblePositions{INT64_MAX, INT64_MIN, INT64_MIN};
  }
  __syncthreads();
  if (thread == 0) {
    VisiblePositions any = visible[0];
    int64_t all_first = any.first;
    int64_t all_last = any.last;
    for (int32_t r = queries.NextQuery(0); r < queries.num_rows; r = queries.NextQuery(r)) {
      const VisiblePositions one = visible[r];
      if (one.first < any.first) any.first = one.first;
      if (one.last > any.last) any.last = one.last;
      if (one.kept > any.kept) any.kept = one.kept;
      if (one.first > all_first) all_first = one.first;
      if (one.last < all_last) all_last = one.last;
    }
    view->any = any;
    view->all_first = all_first;
    view->all_last = all_last;
    view->run[0] = 0;
  }
  __syncthreads();
  if (thread == 0) view->begin = sequence.RowsBefore(view->any.first);
  if (thread == 1) view->end = sequence.RowsBefore(view->any.last + 1);
  if (thread == 2) view->kept_end = sequence.RowsBefore(view->any.kept);
  __syncthreads();
}

__device__ inline bool SeenByAny(const BlockView& view, const QueryRows& queries,
                                 const VisiblePositions* visible, int64_t position) {
  if (position >= view.all_first && position <= view.all_last) return true;
  for (int32_t r = 0; r < queries.num_rows; r = queries.NextQuery(r)) {
    if (Sees(visible[r], position)) return true;
  }
  return false;
}

// Fills the table of rows [first_row, first_row + tile_rows), of which those from end_row on are
// not there. `turn`: counts the calls; barriers separate them.
__device__ inline void LocateRows(const AttentionBatch& batch, const AttentionPlan& plan,
                                  const SequenceRuns& sequence, const QueryRows& queries,
                                  const VisiblePositions* visible, int32_t first_row,
                                  int32_t end_row, int turn, BlockView* view,
                                  AttentionTable* table) {
  const int slot = static_cast<int>(threadIdx.x);
  if (slot >= plan.tile_rows) return;
  const AttentionShape& shape = batch.all.shape;
  const char* k = nullptr;
  const char* v = nullptr;
  int64_t position = INT64_MAX;
  bool is_seen_by_all = false;
  const int32_t row = first_row + slot;
  if (row < end_row) {
    const int32_t index = sequence.RunOfRow(row, view->run[turn & 1]);
    const KvRun run = sequence.runs[index];
    const int32_t offset = row - sequence.StartOf(index);
    position = run.first_position + offset;
    is_seen_by_all = position >= view->all_first && position <= view->all_last;
    // What nobody sees may hold anything: it is not read.
    if (SeenByAny(*view, queries, visible, position)) {
      const int64_t at = int64_t{run.first_slot} + offset;
      k = static_cast<const char*>(run.k_rows) + at * shape.k_row_bytes +
          int64_t{queries.kv_head} * plan.k.head_bytes;
      v = static_cast<const char*>(run.v_rows) + at * shape.v_row_bytes +
          int64_t{queries.kv_head} * plan.v.head_bytes;
    }
    if (slot == plan.tile_rows - 1) view->run[(turn & 1) ^ 1] = index;
  }
  table->k[slot] = k;
  table->v[slot] = v;
  table->position[slot] = position;
  if (slot == 0) table->is_seen[0] = is_seen_by_all;
  if (slot == plan.tile_rows - 1) table->is_seen[1] = is_seen_by_all;
}

// Begins to copy a tile's rows to shared memory.
template <int kThreads>
__device__ inline void CopyTile(const AttentionTile& tile, int32_t tile_rows,
                                const char* const* rows, char* shared, int stage) {
  const int lane = static_cast<int>(threadIdx.x) % kRowThreads;
  for (int32_t p = static_cast<int32_t>(threadIdx.x) / kRowThreads; p < tile_rows;
       p += kThreads / kRowThreads) {
    const char* from = rows[p];
    if (tile.raw_pitch != 0) {
      if (from == nullptr) continue;
      // From the multiple of 16 before it, so that rows of any alignment are copied 16 bytes at a
      // time.
      const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(from) & 15);
      char* to = shared + tile.raw_at + stage * tile.raw_bytes + p * tile.raw_pitch;
      const int end = shift + tile.head_bytes;
      for (int at = 16 * lane; at < end; at += 16 * kRowThreads) {
        CopyAsync16(to + at, from - shift + at, end - at < 16 ? end - at : 16);
      }
      continue;
    }
    char* to = shared + tile.at + stage * tile.stage_bytes + p * tile.pitch;
    const int padded = tile.padded_dim * tile.element_bytes;
    const bool is_aligned = IsAligned(from, 16);
    for (int at = 16 * lane; at < padded; at += 16 * kRowThreads) {
      const int left = tile.head_bytes - at;
      if (from != nullptr && left > 0 && is_aligned) {
        CopyAsync16(to + at, from + at, left < 16 ? left : 16);
        continue;
      }
      uint32_t word[4] = {0, 0, 0, 0};
      if (from != nullptr) {
        const uint16_t* halves = reinterpret_cast<const uint16_t*>(Global(from + at));
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (2 * i < left) word[i / 2] |= static_cast<uint32_t>(halves[i]) << (16 * (i & 1));
        }
      }
      *reinterpret_cast<uint4*>(to + at) = make_uint4(word[0], word[1], word[2], word[3]);
    }
  }
}

template <Operand kOperand>
__device__ inline void StoreOperands(const float x[kLaneElements], void* to) {
  if constexpr (kOperand == Operand::kF32) {
    float4* out = static_cast<float4*>(to);
    out[0] = make_float4(x[0], x[1], x[2], x[3]);
    out[1] = make_float4(x[4], x[5], x[6], x[7]);
  } else {
    constexpr bool kBF16 = kOperand == Operand::kBF16;
    *static_cast<uint4*>(to) = make_uint4(PackTwo<kBF16>(x[0], x[1]), PackTwo<kBF16>(x[2], x[3]),
                                          PackTwo<kBF16>(x[4], x[5]), PackTwo<kBF16>(x[6], x[7]));
  }
}

// Elements [8 * chunk, 8 * chunk + 8) of a raw head as operands, zeros from element `dim` on.
template <Operand kOperand, KvType kType>
__device__ inline void ConvertEight(const char* raw, int chunk, int dim, char* to) {
  constexpr bool kIsF8 = kType == KvType::kF8E4M3 || kType == KvType::kF8E5M2;
  const int left = dim - chunk * kLaneElements;
  if constexpr (kOperand == Operand::kF16 && kIsF8) {
    if (left >= kLaneElements && IsAligned(raw, 8)) {
      const uint2 eight = *reinterpret_cast<const uint2*>(raw + chunk * kLaneElements);
      *reinterpret_cast<uint4*>(to) =
          make_uint4(F8ToF16Twice<kType>(eight.x), F8ToF16Twice<kType>(eight.x >> 16),
                     F8ToF16Twice<kType>(eight.y), F8ToF16Twice<kType>(eight.y >> 16));
      return;
    }
  }
  float x[kLaneElements];
  if (IsBlockType(kType) && left >= kLaneElements) {
    LoadEight<kType, true>(raw, chunk, x);
  } else {
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      x[i] = 0.0f;
      if constexpr (!IsBlockType(kType)) {
        if (i < left) x[i] = LoadPlain<kType>(raw, chunk * kLaneElements + i);
      }
    }
  }
  StoreOperands<kOperand>(x, to);
}

// Only types that the operand does not hold already, and that a plan gives to it.
template <Operand kOperand>
__device__ inline void ConvertEightOf(KvType type, const char* raw, int chunk, int dim, char* to) {
  if constexpr (kOperand == Operand::kF32) {
    if (type == KvType::kF16) {
      return ConvertEight<kOperand, KvType::kF16>(raw, chunk, dim, to);
    }
    if (type == KvType::kBF16) {
      return ConvertEight<kOperand, KvType::kBF16>(raw, chunk, dim, to);
    }
  }
  switch (type) {
    case KvType::kF8E4M3:
      return ConvertEight<kOperand, KvType::kF8E4M3>(raw, chunk, dim, to);
    case KvType::kF8E5M2:
      return ConvertEight<kOperand, KvType::kF8E5M2>(raw, chunk, dim, to);
    case KvType::kQ8_0:
      return ConvertEight<kOperand, KvType::kQ8_0>(raw, chunk, dim, to);
    case KvType::kQ5_0:
      return ConvertEight<kOperand, KvType::kQ5_0>(raw, chunk, dim, to);
    case KvType::kQ5_1:
      return ConvertEight<kOperand, KvType::kQ5_1>(raw, chunk, dim, to);
    case KvType::kQ4_0:
      return ConvertEight<kOperand, KvType::kQ4_0>(raw, chunk, dim, to);
    case KvType::kQ4_1:
      return ConvertEight<kOperand, KvType::kQ4_1>(raw, chunk, dim, to);
    case KvType::kIQ4NL:
      return ConvertEight<kOperand, KvType::kIQ4NL>(raw, chunk, dim, to);
    default:
      return;
  }
}

// A stage's raw rows to operands; nothing where rows were copied straight into the tile.
template <Operand kOperand, int kThreads>
__device__ inline void ConvertTile(KvType type, const AttentionTile& tile, int32_t tile_rows,
                                   const char* const* rows, char* shared, int stage) {
  const int lane = static_cast<int>(threadIdx.x) % kRowThreads;
  for (int32_t p = static_cast<int32_t>(threadIdx.x) / kRowThreads; p < tile_rows;
       p += kThreads / kRowThreads) {
    const char* from = rows[p];
    const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(from) & 15);
    const char* raw = shared + tile.raw_at + stage * tile.raw_bytes + p * tile.raw_pitch + shift;
    char* to = shared + tile.at + p * tile.pitch;
    const int dim = from == nullptr ? 0 : tile.dim;
    for (int chunk = lane; chunk < tile.padded_dim / kLaneElements; chunk += kRowThreads) {
      char* eight = to + chunk * kLaneElements * tile.element_bytes;
      if (chunk * kLaneElements < dim) {
        ConvertEightOf<kOperand>(type, raw, chunk, dim, eight);
      } else {
        const float zeros[kLaneElements] = {};
        StoreOperands<kOperand>(zeros, eight);
      }
    }
  }
}

// The query rows as operands, zeros where there is none and behind k_dim.
template <Operand kOperand, int kThreads>
__device__ inline void LoadQueries(const AttentionBatch& batch, const AttentionPlan& plan,
                                   const QueryRows& queries, char* shared) {
  const int lane = static_cast<int>(threadIdx.x) % kRowThreads;
  for (int32_t r = static_cast<int32_t>(threadIdx.x) / kRowThreads; r < plan.block_rows;
       r += kThreads / kRowThreads) {
    char* to = shared + plan.q_at + r * plan.k.pitch;
    const int dim = r < queries.num_rows ? plan.k.dim : 0;
    const float* q = batch.all.q + (dim > 0 ? queries.IndexOf(r) * plan.k.dim : 0);
    for (int chunk = lane; chunk < plan.k.padded_dim / kLaneElements; chunk += kRowThreads) {
      float x[kLaneElements];
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i) {
        const int d = chunk * kLaneElements + i;
        x[i] = d < dim ? q[d] : 0.0f;
      }
      StoreOperands<kOperand>(x, to + chunk * kLaneElements * plan.k.element_bytes);
    }
  }
}

// The running softmax of a query row, in the threads that share the row; scores are in base 2.
struct RowState {
  float maximum;  // of the row; the same in all its threads
  float sum;      // of this thread's share of the weights
};

// What weights are multiplied by before they are rounded to the operand, and values divided by in
// the end. The largest weight is 1: this is the largest power of two that f16 holds, so that
// weights down to 2^-29 keep all their digits; without it those below 2^-14 would lose some, and
// those below 2^-25 all, while the sum that they are divided by counts them.
template <Operand kOperand>
constexpr float kWeightScale = kOperand == Operand::kF16 ? 32768.0f : 1.0f;

// Turns a tile's scores into weights and factors.
template <Operand kOperand, int kThreads, int kRows, int kTileRows>
__device__ inline void WeighTile(const AttentionPlan& plan, const AttentionTable& table,
                                 const VisiblePositions* visible, char* shared, RowState* state) {
  constexpr int kSharers = kThreads / kRows;  // threads of a row
  constexpr int kPairs = kTileRows / kSharers / 2;
  const int row = static_cast<int>(threadIdx.x) / kSharers;
  const int sharer = static_cast<int>(threadIdx.x) % kSharers;
  const float* scores =
      reinterpret_cast<const float*>(shared + plan.scores_at) + row * plan.scores_pitch;
  float x[kPairs][2];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    x[i][0] = scores[2 * (sharer + kSharers * i)];
    x[i][1] = scores[2 * (sharer + kSharers * i) + 1];
  }
  if (!table.is_seen[0] || !table.is_seen[1]) {
    const VisiblePositions mine = visible[row];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (!Sees(mine, table.position[2 * (sharer + kSharers * i) + j])) x[i][j] = -INFINITY;
      }
    }
  }
  float highest = state->maximum;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) highest = fmaxf(highest, fmaxf(x[i][0], x[i][1]));
#pragma unroll
  for (int step = 1; step < kSharers; step *= 2) {
    highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, step));
  }
  // A row that has seen nothing has weights of 0, not of exp(-inf + inf).
  const float base = highest == -INFINITY ? 0.0f : highest;
  const float factor = exp2f(state->maximum - base);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    x[i][0] = exp2f(x[i][0] - base);
    x[i][1] = exp2f(x[i][1] - base);
    sum += x[i][0] + x[i][1];
    const int at = row * plan.weights_pitch + 2 * (sharer + kSharers * i);
    if constexpr (kOperand == Operand::kF32) {
      float* weights = reinterpret_cast<float*>(shared + plan.weights_at);
      weights[at] = x[i][0];
      weights[at + 1] = x[i][1];
    } else {
      uint32_t* weights = reinterpret_cast<uint32_t*>(shared + plan.weights_at);
      weights[at / 2] = PackTwo<kOperand == Operand::kBF16>(x[i][0] * kWeightScale<kOperand>,
                                                            x[i][1] * kWeightScale<kOperand>);
    }
  }
  state->sum = fmaf(state->sum, factor, sum);
  state->maximum = highest;
  if (sharer == 0) reinterpret_cast<float*>(shared + plan.factors_at)[row] = factor;
}

// The whole sum of a row, in all its threads.
template <int kSharers>
__device__ inline float SumOfRow(float sum) {
#pragma unroll
  for (int step = 1; step < kSharers; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  return sum;
}

}  // namespace pagetide::kernels::device

#endif  // PAGETIDE_KERNELS_ATTENTION_TILES_CUH_
