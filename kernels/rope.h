// Rotary position embedding of rows: written rotated once at their position, shifted later by
// R(delta).
//
// Pair i of a head turns by the angle position * theta_i, theta_i = scale * base^(-2i / n_rot) /
// factors[i], mixed with the unscaled angle under YaRN. R(a)R(b) = R(a + b), so moving a row by
// delta is the same call with position = delta and magnitude 1 (a shift never re-applies YaRN's
// magnitude). Sources: RoFormer (Su et al. 2021); YaRN (Peng et al. 2023), parameters as llama.cpp
// names them.
#ifndef PAGETIDE_KERNELS_ROPE_H_
#define PAGETIDE_KERNELS_ROPE_H_

#include <cstdint>

#include "kernels/convert.h"

namespace pagetide::kernels {

enum class RopeStyle : uint8_t {
  kNorm,  // pairs (2i, 2i + 1)
  kNeox,  // pairs (i, i + n_rot / 2)
};

struct RopeParams {
  RopeStyle style = RopeStyle::kNorm;
  int32_t n_rot = 0;  // leading elements of a head that turn; even, <= head_dim
  float base = 10000.0f;
  float scale = 1.0f;              // 1 / context stretch (linear interpolation)
  const float* factors = nullptr;  // [n_rot / 2] or null for all 1
  // YaRN; off while ext_factor is 0.
  float ext_factor = 0.0f;
  float beta_fast = 32.0f;
  float beta_slow = 1.0f;
  int32_t original_context = 0;  // tokens the model was trained on
};

// cos and sin of every pair at one position: cos_sin [n_rot / 2, 2] f32. Computed in double and
// rounded once, so that far positions keep their precision.
void RopeAngles(const RopeParams& params, int64_t position, float* cos_sin);

struct RopeArgs {
  RopeParams params;
  KvType type;
  void* rows;         // [num_rows, row_bytes], turned in place, any alignment
  int64_t row_bytes;  // stride between rows
  int32_t num_heads;  // heads of a row, head_dim elements each, contiguous
  int32_t head_dim;
  const int64_t* positions;  // [num_rows]; for a shift, the deltas (may be negative)
  int64_t num_rows;
  float magnitude;  // multiplies the turned elements; 1 for a shift
  // [num_rows, n_rot / 2, 2] of RopeAngles, for callers that turn several tensors at the same
  // positions; positions is not read then. Null: computed here.
  const float* cos_sin = nullptr;
};

// CPU twin. f16 and bf16 rows are widened, turned in f32 and rounded to nearest even. One thread.
void RopeHost(const RopeArgs& args);

}  // namespace pagetide::kernels

#endif  // PAGETIDE_KERNELS_ROPE_H_
