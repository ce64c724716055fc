#include "decoder/elementwise.h"

#include <algorithm>
#include <cmath>

#include "kernels/simd.h"

namespace pagetide {
namespace {

using kernels::Broadcast8;
using kernels::Exp8;
using kernels::Float8;
using kernels::kLanes;
using kernels::Load8;
using kernels::Store8;

// silu(g) * u = g / (1 + e^-g) * u.
PAGETIDE_ALWAYS_INLINE Float8 Gated(Float8 gate, Float8 up) {
  const Float8 one = Broadcast8(1.0f);
  return gate / (one + Exp8(-gate)) * up;
}

PAGETIDE_ALWAYS_INLINE void SwiGluAll(const float* gate_up, int64_t num_rows, int width,
                                      float* out) {
  for (int64_t r = 0; r < num_rows; ++r) {
    const float* gate = gate_up + r * 2 * width;
    const float* up = gate + width;
    float* row = out + r * width;
    int i = 0;
    for (; i + kLanes <= width; i += kLanes) Store8(row + i, Gated(Load8(gate + i), Load8(up + i)));
    for (; i < width; ++i) row[i] = Gated(Broadcast8(gate[i]), Broadcast8(up[i]))[0];
  }
}

PAGETIDE_TARGET_AVX2 void SwiGluAvx2(const float* gate_up, int64_t num_rows, int width,
                                     float* out) {
  SwiGluAll(gate_up, num_rows, width, out);
}

}  // namespace

void RmsNorm(const float* x, int64_t num_rows, int width, const float* weight, float epsilon,
             float* out) {
  for (int64_t r = 0; r < num_rows; ++r, x += width, out += width) {
    Float8 lanes = Broadcast8(0.0f);
    int i = 0;
    for (; i + kLanes <= width; i += kLanes) {
      const Float8 v = Load8(x + i);
      lanes = lanes + v * v;
    }
    float sum = kernels::SumLanes(lanes);
    for (; i < width; ++i) sum += x[i] * x[i];
    const float factor = 1.0f / std::sqrt(sum / static_cast<float>(width) + epsilon);
    for (int j = 0; j < width; ++j) out[j] = x[j] * factor * weight[j];
  }
}

void SwiGlu(const float* gate_up, int64_t num_rows, int width, float* out) {
  if (kernels::UseAvx2(kernels::Isa::kBest)) {
    SwiGluAvx2(gate_up, num_rows, width, out);
  } else {
    SwiGluAll(gate_up, num_rows, width, out);
  }
}

void AddInPlace(float* x, const float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] += y[i];
}

}  // namespace pagetide
