// PackedMatrix: a weight matrix laid out for one job, y = x W, with a fixed order of summation.
//
// Each output element is the sum over k in ascending order of x[k] * W[k][n], multiplied and added
// in f32, whatever the number of rows: a row gives the same bits alone and in a batch of 512.
// Immutable after construction; thread-safe.
#ifndef PAGETIDE_DECODER_PACKED_MATRIX_H_
#define PAGETIDE_DECODER_PACKED_MATRIX_H_

#include <cstdint>
#include <vector>

#include "kernels/isa.h"

namespace pagetide {

class PackedMatrix {
 public:
  PackedMatrix() = default;
  // weights: [inputs, outputs] f32, row-major.
  PackedMatrix(int inputs, int outputs, const std::vector<float>& weights);

  int inputs() const { return inputs_; }
  int outputs() const { return outputs_; }

  // x: [num_rows, inputs], y: [num_rows, outputs], both f32; they do not overlap.
  void Multiply(const float* x, int64_t num_rows, float* y,
                kernels::Isa isa = kernels::Isa::kBest) const;

 private:
  int inputs_ = 0;
  int outputs_ = 0;
  // [ceil(outputs / kPanel), inputs, kPanel] f32: a panel of columns is one stream; padding is
  // zero.
  std::vector<float> panels_;
};

}  // namespace pagetide

#endif  // PAGETIDE_DECODER_PACKED_MATRIX_H_
