// The element-wise steps of the decoder. Fixed order of summation; rows are independent of each
// other.
#ifndef PAGETIDE_DECODER_ELEMENTWISE_H_
#define PAGETIDE_DECODER_ELEMENTWISE_H_

#include <cstdint>

namespace pagetide {

// out[r][i] = x[r][i] / sqrt(mean(x[r]^2) + epsilon) * weight[i]; x, out: [num_rows, width] f32.
void RmsNorm(const float* x, int64_t num_rows, int width, const float* weight, float epsilon,
             float* out);

// out[r][i] = silu(gate) * up; gate_up: [num_rows, 2 * width] (gate first), out: [num_rows, width]
// f32.
void SwiGlu(const float* gate_up, int64_t num_rows, int width, float* out);

// x[i] += y[i].
void AddInPlace(float* x, const float* y, int64_t count);

}  // namespace pagetide

#endif  // PAGETIDE_DECODER_ELEMENTWISE_H_
