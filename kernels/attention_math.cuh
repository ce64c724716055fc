// The two products of attention over one tile in shared memory, scores = Q Kᵀ and values += weights
// V: on tensor cores, and in f32 arithmetic. A Math holds the block's sums of values in registers;
// every method is called by all threads of the block, between barriers.
#ifndef PAGETIDE_KERNELS_ATTENTION_MATH_CUH_
#define PAGETIDE_KERNELS_ATTENTION_MATH_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/attention_plan.h"
#include "kernels/device_matrix.cuh"

namespace pagetide::kernels::device {

// Four warps share 16 * kRowTiles query rows, kRowGroups such sets a block. Of the scores, each of
// the four takes 16 of the tile's 64 rows; of the values, every fourth 16 columns, up to kPairs
// times. So weights go through shared memory, and no warp holds more than a quarter of a wide V.
template <bool kIsBF16, int kRowGroups, int kRowTiles, int kPairs>
class TensorMath {
 public:
  static constexpr Operand kOperand = kIsBF16 ? Operand::kBF16 : Operand::kF16;
  static constexpr int kThreads = 128 * kRowGroups;
  static constexpr int kRows = 16 * kRowTiles * kRowGroups;
  static constexpr int kTileRows = kTensorTile;
  // Thread blocks of a multiprocessor that registers are to be left for.
  static constexpr int kBlocks = kRowGroups == 1 ? 3 : (kPairs > 4 ? 1 : 2);

  __device__ void Clear() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
#pragma unroll
        for (int e = 0; e < 8; ++e) values_[m][i][e / 4][e % 4] = 0.0f;
      }
    }
  }

  // k_tile: [64, k.padded_dim] by k.pitch.
  __device__ void Scores(const AttentionPlan& plan, int /*num_rows*/, float scale, char* shared,
                         const char* k_tile) {
    const int lane = Lane();
    float sum[kRowTiles][2][4] = {};
    const char* q =
        shared + plan.q_at + (FirstRow() + (lane & 15)) * plan.k.pitch + (lane >> 4) * 16;
    const char* k = k_tile + (16 * Column() + (lane & 7) + ((lane >> 4) << 3)) * plan.k.pitch +
                    ((lane >> 3) & 1) * 16;
    const int end = plan.k.padded_dim * 2;
    for (int at = 0; at < end; at += 32) {
      uint32_t b[4];
      LoadMatrices<false>(b, k + at);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        uint32_t a[4];
        LoadMatrices<false>(a, q + m * 16 * plan.k.pitch + at);
        MultiplyAdd<kIsBF16>(sum[m][0], a, b[0], b[1]);
        MultiplyAdd<kIsBF16>(sum[m][1], a, b[2], b[3]);
      }
    }
    float* scores = reinterpret_cast<float*>(shared + plan.scores_at);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        scores[RowOf(m, e % 4) * plan.scores_pitch + 16 * Column() + 8 * (e / 4) +
               ColumnOf(e % 4)] = sum[m][e / 4][e % 4] * scale;
      }
    }
  }

  // v_tile: [64, v.padded_dim] by v.pitch.
  __device__ void AddValues(const AttentionPlan& plan, int /*num_rows*/, char* shared,
                            const char* v_tile) {
    const int lane = Lane();
    const float* factors = reinterpret_cast<const float*>(shared + plan.factors_at);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      const float factor[2] = {factors[RowOf(m, 0)], factors[RowOf(m, 2)]};
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
#pragma unroll
        for (int e = 0; e < 8; ++e) values_[m][i][e / 4][e % 4] *= factor[e % 4 / 2];
      }
    }
    const char* weights = shared + plan.weights_at +
                          (FirstRow() + (lane & 15)) * plan.weights_pitch * 2 + (lane >> 4) * 16;
    const char* v = v_tile + (lane & 15) * plan.v.pitch + (lane >> 4) * 16;
    const int pairs = plan.v.padded_dim / 16;
#pragma unroll 2
    for (int row = 0; row < kTileRows; row += 16) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        LoadMatrices<false>(a[m], weights + m * 16 * plan.weights_pitch * 2 + row * 2);
      }
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const int pair = Column() + 4 * i;
        if (pair >= pairs) continue;
        uint32_t b[4];
        LoadMatrices<true>(b, v + row * plan.v.pitch + pair * 32);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          MultiplyAdd<kIsBF16>(values_[m][i][0], a[m], b[0], b[1]);
          MultiplyAdd<kIsBF16>(values_[m][i][1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // Calls visit(row, for_each_value) for this thread's rows, and for_each_value(f) calls f(column,
  // value).
  template <typename Visit>
  __device__ void ForEachRow(Visit visit) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        visit(RowOf(m, 2 * half), [&](auto&& each) {
#pragma unroll
          for (int i = 0; i < kPairs; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              each(16 * (Column() + 4 * i) + 8 * (e / 2) + ColumnOf(e % 2),
                   values_[m][i][e / 2][2 * half + e % 2]);
            }
          }
        });
      }
    }
  }

 private:
  __device__ static int Lane() {
    return static_cast<int>(threadIdx.x) % 32;
  }
  __device__ static int Column() {
    return static_cast<int>(threadIdx.x) / 32 % 4;
  }
  __device__ static int FirstRow() {
    return static_cast<int>(threadIdx.x) / 128 * 16 * kRowTiles;
  }
  // Row and column of element e of a 16×8 sum that this lane holds.
  __device__ static int RowOf(int m, int e) {
    return FirstRow() + 16 * m + Lane() / 4 + e / 2 * 8;
  }
  __device__ static int ColumnOf(int e) {
    return 2 * (Lane() % 4) + e % 2;
  }

  float values_[kRowTiles][kPairs][2][4];  // [.., .., 8 columns each, a 16×8 sum]
};

// All in f32: rows of any types, for those that tensor cores would round.
class FloatMath {
 public:
  static constexpr Operand kOperand = Operand::kF32;
  static constexpr int kThreads = 128;
  static constexpr int kRows = kDecodeRows;
  static constexpr int kTileRows = kFloatTile;
  static constexpr int kBlocks = 3;

  __device__ void Clear() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) values_[r][i] = 0.0f;
    }
  }

  // A thread takes one row of the tile and two query rows.
  __device__ void Scores(const AttentionPlan& plan, int num_rows, float scale, char* shared,
                         const char* k_tile) {
    const int slot = static_cast<int>(threadIdx.x) % kTileRows;
    const int first = static_cast<int>(threadIdx.x) / kTileRows;
    const float4* k = reinterpret_cast<const float4*>(k_tile + slot * plan.k.pitch);
    float* scores = reinterpret_cast<float*>(shared + plan.scores_at);
    constexpr int kStep = kThreads / kTileRows;
    static_assert(kRows == 2 * kStep);
    const float4* q0 = reinterpret_cast<const float4*>(shared + plan.q_at + first * plan.k.pitch);
    const float4* q1 =
        reinterpret_cast<const float4*>(shared + plan.q_at + (first + kStep) * plan.k.pitch);
    float sum0 = 0.0f;
    float sum1 = 0.0f;
    if (first + kStep < num_rows) {
      for (int d = 0; d < plan.k.padded_dim / 4; ++d) {
        sum0 = Dot(k[d], q0[d], sum0);
        sum1 = Dot(k[d], q1[d], sum1);
      }
    } else if (first < num_rows) {
      for (int d = 0; d < plan.k.padded_dim / 4; ++d) sum0 = Dot(k[d], q0[d], sum0);
    }
    scores[first * plan.scores_pitch + slot] = sum0 * scale;
    scores[(first + kStep) * plan.scores_pitch + slot] = sum1 * scale;
  }

  // A thread takes every 128th column, for all query rows.
  __device__ void AddValues(const AttentionPlan& plan, int num_rows, char* shared,
                            const char* v_tile) {
    const float* factors = reinterpret_cast<const float*>(shared + plan.factors_at);
    const float* weights = reinterpret_cast<const float*>(shared + plan.weights_at);
    const int pitch = plan.v.pitch / 4;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int column = static_cast<int>(threadIdx.x) + kThreads * i;
      if (column >= plan.v.padded_dim) continue;
      const float* v = reinterpret_cast<const float*>(v_tile) + column;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r < num_rows) values_[r][i] *= factors[r];
      }
      for (int slot = 0; slot < kTileRows; slot += 4) {
        const float4 four = make_float4(v[slot * pitch], v[(slot + 1) * pitch],
                                        v[(slot + 2) * pitch], v[(slot + 3) * pitch]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (r < num_rows) {
            values_[r][i] =
                Dot(*reinterpret_cast<const float4*>(weights + r * plan.weights_pitch + slot), four,
                    values_[r][i]);
          }
        }
      }
    }
  }

  template <typename Visit>
  __device__ void ForEachRow(Visit visit) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      visit(r, [&](auto&& each) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          each(static_cast<int>(threadIdx.x) + kThreads * i, values_[r][i]);
        }
      });
    }
  }

 private:
  static constexpr int kColumns = kMaxValueDim / kThreads;

  __device__ static float Dot(float4 a, float4 b, float sum) {
    sum = fmaf(a.x, b.x, sum);
    sum = fmaf(a.y, b.y, sum);
    sum = fmaf(a.z, b.z, sum);
    return fmaf(a.w, b.w, sum);
  }

  float values_[kRows][kColumns];
};

}  // namespace pagetide::kernels::device

#endif  // PAGETIDE_KERNELS_ATTENTION_MATH_CUH_
