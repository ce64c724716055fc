#include <algorithm>
#include <cmath>

#include "kernels/attention_mask.h"
#include "kernels/attention_math.cuh"
#include "kernels/attention_plan.h"
#include "kernels/attention_tiles.cuh"
#include "kernels/device_launch.cuh"
#include "kernels/paged_attention.h"

namespace pagetide::kernels {
namespace {

using device::QueryRows;
using device::SequenceRuns;

constexpr int kIndexThreads = 256;
constexpr int kMergeThreads = 128;
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

__device__ inline AttentionSequence SequenceOf(const AttentionBatch& batch, int64_t index) {
  if (batch.sequences != nullptr) return batch.sequences[index];
  return {0, batch.all.num_runs, 0, batch.all.num_queries};
}

__device__ inline SequenceRuns RunsOf(const AttentionBatch& batch, const AttentionPlan& plan,
                                      const AttentionSequence& sequence, const char* workspace) {
  SequenceRuns runs;
  runs.runs = batch.all.runs + sequence.first_run;
  runs.ends = reinterpret_cast<const int32_t*>(workspace + plan.ends_at) + sequence.first_run;
  runs.last_positions =
      reinterpret_cast<const int64_t*>(workspace + plan.last_positions_at) + sequence.first_run;
  runs.num_runs = static_cast<int32_t>(sequence.num_runs);
  return runs;
}

// Running sums over each sequence's runs, so that blocks find their rows: a thread block a
// sequence, each thread takes neighbouring runs.
__global__ void __launch_bounds__(kIndexThreads)
    IndexRunsKernel(AttentionBatch batch, AttentionPlan plan, char* workspace) {
  __shared__ int32_t rows[kIndexThreads];
  __shared__ int64_t last[kIndexThreads];
  const AttentionSequence sequence = SequenceOf(batch, blockIdx.x);
  const KvRun* runs = batch.all.runs + sequence.first_run;
  int32_t* ends = reinterpret_cast<int32_t*>(workspace + plan.ends_at) + sequence.first_run;
  int64_t* last_positions =
      reinterpret_cast<int64_t*>(workspace + plan.last_positions_at) + sequence.first_run;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t each = (sequence.num_runs + kIndexThreads - 1) / kIndexThreads;
  const int64_t begin = each * thread;
  const int64_t end = begin + each < sequence.num_runs ? begin + each : sequence.num_runs;
  int32_t my_rows = 0;
  int64_t my_last = kLowestPosition;
  for (int64_t i = begin; i < end; ++i) {
    const KvRun run = runs[i];
    my_rows += run.count;
    if (run.count > 0) my_last = run.first_position + run.count - 1;
  }
  rows[thread] = my_rows;
  last[thread] = my_last;
  __syncthreads();
  for (int step = 1; step < kIndexThreads; step *= 2) {
    const int32_t rows_before = thread >= step ? rows[thread - step] : 0;
    const int64_t last_before = thread >= step ? last[thread - step] : kLowestPosition;
    __syncthreads();
    rows[thread] += rows_before;
    if (last_before > last[thread]) last[thread] = last_before;
    __syncthreads();
  }
  int32_t sum = thread > 0 ? rows[thread - 1] : 0;
  int64_t position = thread > 0 ? last[thread - 1] : kLowestPosition;
  for (int64_t i = begin; i < end; ++i) {
    const KvRun run = runs[i];
    sum += run.count;
    if (run.count > 0) position = run.first_position + run.count - 1;
    ends[i] = sum;
    last_positions[i] = position;
  }
}

// A thread block attends its query rows to one chunk of the sequence's KV rows. Grid: x KV heads
// (fastest: neighbours read neighbouring bytes) by blocks of query rows, y chunks, z sequences.
template <typename Math>
__global__ void __launch_bounds__(Math::kThreads, Math::kBlocks)
    AttendKernel(AttentionBatch batch, AttentionPlan plan, char* workspace) {
  PAGETIDE_DYNAMIC_SHARED(float4, shared_memory);
  __shared__ device::BlockView view;
  constexpr int kThreads = Math::kThreads;
  constexpr int kSharers = kThreads / Math::kRows;
  char* shared = reinterpret_cast<char*>(shared_memory);
  VisiblePositions* visible = reinterpret_cast<VisiblePositions*>(shared + plan.visible_at);
  AttentionTable* tables = reinterpret_cast<AttentionTable*>(shared + plan.tables_at);
  const AttentionShape& shape = batch.all.shape;

  const AttentionSequence sequence = SequenceOf(batch, blockIdx.z);
  const SequenceRuns runs = RunsOf(batch, plan, sequence, workspace);
  QueryRows queries;
  queries.first_query = sequence.first_query;
  queries.num_q_heads = shape.num_q_heads;
  queries.group = shape.num_q_heads / shape.num_kv_heads;
  queries.kv_head = static_cast<int32_t>(blockIdx.x) % shape.num_kv_heads;
  // The last queries see the most rows: they begin first.
  const int64_t first_row =
      int64_t{plan.row_blocks - 1 - static_cast<int32_t>(blockIdx.x) / shape.num_kv_heads} *
      Math::kRows;
  const int64_t rows_left = sequence.num_queries * queries.group - first_row;
  if (rows_left <= 0) return;
  queries.first_row = static_cast<int32_t>(first_row);
  queries.num_rows = rows_left < Math::kRows ? static_cast<int32_t>(rows_left) : Math::kRows;

  device::LoadQueries<Math::kOperand, kThreads>(batch, plan, queries, shared);
  device::LookAround(batch, plan, runs, queries, visible, &view);

  // Tiles of this chunk that some query sees: `tile_after(t)` is the first of them from t on.
  const int32_t chunk = static_cast<int32_t>(blockIdx.y);
  const int32_t num_rows = runs.num_rows();
  const int32_t chunk_end = num_rows - chunk * plan.chunk_rows < plan.chunk_rows
                                ? num_rows
                                : (chunk + 1) * plan.chunk_rows;
  const int32_t seen_end = chunk_end < view.end ? chunk_end : view.end;
  const int32_t end_tile = (seen_end + Math::kTileRows - 1) / Math::kTileRows;
  const auto tile_after = [](int32_t tile) {
    const int32_t first_in_window = view.begin / Math::kTileRows;
    const bool is_hidden = tile < first_in_window && tile * Math::kTileRows >= view.kept_end;
    return is_hidden ? first_in_window : tile;
  };

  Math math;
  math.Clear();
  device::RowState state{-INFINITY, 0.0f};
  int32_t next = tile_after(chunk * (plan.chunk_rows / Math::kTileRows));
  int turn = 0;
  const auto fetch = [&] {
    if (next < end_tile) {
      const int stage = turn & (plan.stages - 1);
      device::LocateRows(batch, plan, runs, queries, visible, next * Math::kTileRows, chunk_end,
                         turn, &view, &tables[stage]);
      __syncthreads();  // also: the last tile of this stage is done with
      device::CopyTile<kThreads>(plan.k, Math::kTileRows, tables[stage].k, shared, stage);
      if (!batch.values_are_keys) {
        device::CopyTile<kThreads>(plan.v, Math::kTileRows, tables[stage].v, shared, stage);
      }
      next = tile_after(next + 1);
      ++turn;
    }
    device::CommitCopies();
  };
  int done = 0;
  if (plan.stages == 2) fetch();
  while (true) {
    fetch();
    if (done == turn) break;
    if (plan.stages == 2) {
      device::WaitForCopies<1>();
    } else {
      device::WaitForCopies<0>();
    }
    __syncthreads();
    const int stage = done & (plan.stages - 1);
    const AttentionTable& table = tables[stage];
    if constexpr (Math::kOperand != Operand::kBF16) {
      if (plan.k.raw_pitch != 0) {
        device::ConvertTile<Math::kOperand, kThreads>(shape.k_type, plan.k, Math::kTileRows,
                                                      table.k, shared, stage);
      }
      if (plan.v.raw_pitch != 0 && !batch.values_are_keys) {
        device::ConvertTile<Math::kOperand, kThreads>(shape.v_type, plan.v, Math::kTileRows,
                                                      table.v, shared, stage);
      }
      if (plan.k.raw_pitch != 0 || plan.v.raw_pitch != 0) __syncthreads();
    }
    math.Scores(plan, queries.num_rows, shape.scale * kLog2E, shared,
                shared + plan.k.at + stage * plan.k.stage_bytes);
    __syncthreads();
    device::WeighTile<Math::kOperand, kThreads, Math::kRows, Math::kTileRows>(plan, table, visible,
                                                                              shared, &state);
    __syncthreads();
    math.AddValues(plan, queries.num_rows, shared, shared + plan.v.at + stage * plan.v.stage_bytes);
    ++done;
  }

  // Rows' sums go to the threads that hold their values.
  float* maxima = reinterpret_cast<float*>(shared + plan.factors_at);
  float* sums = reinterpret_cast<float*>(shared + plan.sums_at);
  const float sum = device::SumOfRow<kSharers>(state.sum);
  __syncthreads();
  const int my_row = static_cast<int>(threadIdx.x) / kSharers;
  if (threadIdx.x % kSharers == 0) {
    maxima[my_row] = state.maximum;
    sums[my_row] = sum;
  }
  __syncthreads();
  constexpr float kUnscale = 1.0f / device::kWeightScale<Math::kOperand>;
  const int64_t q_rows = batch.all.num_queries * shape.num_q_heads;
  if (plan.num_chunks > 1) {
    const int64_t first_part = chunk * q_rows;
    float* parts = reinterpret_cast<float*>(workspace + plan.parts_at);
    float* values = reinterpret_cast<float*>(workspace + plan.values_at);
    if (threadIdx.x % kSharers == 0 && my_row < queries.num_rows) {
      float* part = parts + 2 * (first_part + queries.IndexOf(my_row));
      part[0] = maxima[my_row];
      part[1] = sums[my_row];
    }
    math.ForEachRow([&](int32_t row, auto&& for_each_value) {
      if (row >= queries.num_rows || sums[row] == 0.0f) return;
      float* out = values + (first_part + queries.IndexOf(row)) * shape.v_dim;
      for_each_value([&](int32_t d, float value) {
        if (d < shape.v_dim) out[d] = value * kUnscale;
      });
    });
    return;
  }
  if (batch.all.lse != nullptr && threadIdx.x % kSharers == 0 && my_row < queries.num_rows) {
    batch.all.lse[queries.IndexOf(my_row)] =
        sums[my_row] == 0.0f ? -INFINITY : (maxima[my_row] + log2f(sums[my_row])) * kLn2;
  }
  math.ForEachRow([&](int32_t row, auto&& for_each_value) {
    if (row >= queries.num_rows) return;
    float* out = batch.all.out + queries.IndexOf(row) * shape.v_dim;
    const float whole = sums[row];
    for_each_value([&](int32_t d, float value) {
      if (d < shape.v_dim) out[d] = whole == 0.0f ? 0.0f : value * kUnscale / whole;
    });
  });
}

// Merges the parts of one query row, in the order of the chunks. Grid: x query rows.
__global__ void __launch_bounds__(kMergeThreads)
    MergePartsKernel(AttentionBatch batch, AttentionPlan plan, const char* workspace) {
  const int64_t q_rows = batch.all.num_queries * batch.all.shape.num_q_heads;
  const int64_t row = blockIdx.x;
  const float* parts = reinterpret_cast<const float*>(workspace + plan.parts_at) + 2 * row;
  float maximum = -INFINITY;
  for (int32_t c = 0; c < plan.num_chunks; ++c) maximum = fmaxf(maximum, parts[2 * c * q_rows]);
  float sum = 0.0f;
  for (int32_t c = 0; c < plan.num_chunks; ++c) {
    const float one = parts[2 * c * q_rows + 1];
    if (one != 0.0f) sum = fmaf(one, exp2f(parts[2 * c * q_rows] - maximum), sum);
  }
  const int64_t v_dim = batch.all.shape.v_dim;
  const float* values = reinterpret_cast<const float*>(workspace + plan.values_at) + row * v_dim;
  for (int64_t d = threadIdx.x; d < v_dim; d += kMergeThreads) {
    float value = 0.0f;
    for (int32_t c = 0; c < plan.num_chunks; ++c) {
      if (parts[2 * c * q_rows + 1] == 0.0f) continue;
      const float factor = exp2f(parts[2 * c * q_rows] - maximum);
      value = fmaf(values[c * q_rows * v_dim + d], factor, value);
    }
    batch.all.out[row * v_dim + d] = sum == 0.0f ? 0.0f : value / sum;
  }
  if (batch.all.lse != nullptr && threadIdx.x == 0) {
    batch.all.lse[row] = sum == 0.0f ? -INFINITY : (maximum + log2f(sum)) * kLn2;
  }
}

using Kernel = void (*)(AttentionBatch, AttentionPlan, char*);
struct Choice {
  Kernel kernel;
  int threads;
};

template <typename Math>
constexpr Choice ChoiceOf() {
  return {AttendKernel<Math>, Math::kThreads};
}

template <bool kBF16>
Choice TensorChoice(bool is_prefill, bool is_wide) {
  // 16 query rows, one matrix tile; 64, two by two. Values up to 256 wide, and up to 512.
  if (!is_prefill) {
    return is_wide ? ChoiceOf<device::TensorMath<kBF16, 1, 1, 8>>()
                   : ChoiceOf<device::TensorMath<kBF16, 1, 1, 4>>();
  }
  return is_wide ? ChoiceOf<device::TensorMath<kBF16, 2, 2, 8>>()
                 : ChoiceOf<device::TensorMath<kBF16, 2, 2, 4>>();
}

Choice Choose(const AttentionPlan& plan, const AttentionShape& shape) {
  const bool is_prefill = plan.block_rows == kPrefillRows;
  const bool is_wide = shape.v_dim > 256;
  switch (plan.operand) {
    case Operand::kF16:
      return TensorChoice<false>(is_prefill, is_wide);
    case Operand::kBF16:
      return TensorChoice<true>(is_prefill, is_wide);
    case Operand::kF32:
      break;
  }
  return ChoiceOf<device::FloatMath>();
}

// Bytes of shared memory that a block of the current device can have; 0 if there is no device.
int32_t SharedLimit() {
  int device = 0;
  int bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
      cudaSuccess) {
    return 0;
  }
  // Kernels have some static shared memory too.
  return bytes - 1024;
}

}  // namespace

const char* WhyNotAttendCuda(const AttentionBatch& batch) {
  AttentionPlan plan;
  return PlanAttention(batch, SharedLimit(), &plan);
}

int64_t AttentionWorkspaceBytes(const AttentionBatch& batch) {
  AttentionPlan plan;
  return PlanAttention(batch, SharedLimit(), &plan) == nullptr ? plan.workspace_bytes : -1;
}

int AttendCuda(const AttentionBatch& batch, void* workspace, CudaStream stream) {
  AttentionPlan plan;
  if (PlanAttention(batch, SharedLimit(), &plan) != nullptr) return cudaErrorInvalidValue;
  if (batch.num_sequences == 0 || plan.row_blocks == 0) return cudaSuccess;
  char* const memory = static_cast<char*>(workspace);
  const AttentionShape& shape = batch.all.shape;
  const unsigned sequences = static_cast<unsigned>(batch.num_sequences);
  int error =
      device::Launch(IndexRunsKernel, sequences, kIndexThreads, 0, stream, batch, plan, memory);
  if (error != cudaSuccess) return error;
  const Choice choice = Choose(plan, shape);
  // The kernel's limit is the process's: never lowered, so that no other thread's launch fails by
  // it.
  error = cudaFuncSetAttribute(choice.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               SharedLimit());
  if (error != cudaSuccess) return error;
  const dim3 grid(
      static_cast<unsigned>(plan.row_blocks) * static_cast<unsigned>(shape.num_kv_heads),
      static_cast<unsigned>(plan.num_chunks), sequences);
  error = device::Launch(choice.kernel, grid, static_cast<unsigned>(choice.threads),
                         static_cast<size_t>(plan.shared_bytes), stream, batch, plan, memory);
  if (error != cudaSuccess || plan.num_chunks == 1) return error;
  const int64_t q_rows = batch.all.num_queries * shape.num_q_heads;
  if (q_rows > INT32_MAX) return cudaErrorInvalidValue;
  return device::Launch(MergePartsKernel, static_cast<unsigned>(q_rows), kMergeThreads, 0, stream,
                        batch, plan, memory);
}

}  // namespace pagetide::kernels
