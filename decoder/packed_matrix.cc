#include "decoder/packed_matrix.h"

#include <algorithm>
#include <cstring>

#include "kernels/simd.h"

namespace pagetide {
namespace {

using kernels::Broadcast8;
using kernels::Float8;
using kernels::kLanes;
using kernels::Load8;
using kernels::Store8;

constexpr int kVectors = 2;
constexpr int kPanel = kVectors * kLanes;  // outputs a panel
constexpr int kTileRows = 6;               // 12 sums, 2 weights, 1 input: the 16 registers of AVX2

// Rows [0, kRows) of one panel: y[r][0 .. columns).
template <int kRows>
PAGETIDE_ALWAYS_INLINE void MultiplyTile(const float* x, int inputs, const float* panel, float* y,
                                         int outputs, int columns) {
  Float8 sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kVectors; ++t) sum[r][t] = Broadcast8(0.0f);
  }
  for (int k = 0; k < inputs; ++k) {
    const Float8 w0 = Load8(panel + static_cast<size_t>(k) * kPanel);
    const Float8 w1 = Load8(panel + static_cast<size_t>(k) * kPanel + kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Float8 xk = Broadcast8(x[static_cast<size_t>(r) * inputs + k]);
      sum[r][0] = sum[r][0] + xk * w0;
      sum[r][1] = sum[r][1] + xk * w1;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    float row[kPanel];
    Store8(row, sum[r][0]);
    Store8(row + kLanes, sum[r][1]);
    std::memcpy(y + static_cast<size_t>(r) * outputs, row, sizeof(float) * columns);
  }
}

struct Job {
  const float* panels;
  int inputs;
  int outputs;
  const float* x;
  int64_t num_rows;
  float* y;
};

PAGETIDE_ALWAYS_INLINE void MultiplyAll(const Job& job) {
  const float* panel = job.panels;
  for (int first = 0; first < job.outputs; first += kPanel) {
    const int columns = std::min(kPanel, job.outputs - first);
    int64_t row = 0;
    for (; row + kTileRows <= job.num_rows; row += kTileRows) {
      MultiplyTile<kTileRows>(job.x + row * job.inputs, job.inputs, panel,
                              job.y + row * job.outputs + first, job.outputs, columns);
    }
    for (; row < job.num_rows; ++row) {
      MultiplyTile<1>(job.x + row * job.inputs, job.inputs, panel,
                      job.y + row * job.outputs + first, job.outputs, columns);
    }
    panel += static_cast<size_t>(job.inputs) * kPanel;
  }
}

PAGETIDE_TARGET_AVX2 void MultiplyAvx2(const Job& job) {
  MultiplyAll(job);
}
void MultiplyBaseline(const Job& job) {
  MultiplyAll(job);
}

}  // namespace

PackedMatrix::PackedMatrix(int inputs, int outputs, const std::vector<float>& weights)
    : inputs_(inputs),
      outputs_(outputs),
      panels_(static_cast<size_t>((outputs + kPanel - 1) / kPanel) * inputs * kPanel) {
  for (int k = 0; k < inputs; ++k) {
    for (int n = 0; n < outputs; ++n) {
      panels_[(static_cast<size_t>(n / kPanel) * inputs + k) * kPanel + n % kPanel] =
          weights[static_cast<size_t>(k) * outputs + n];
    }
  }
}

void PackedMatrix::Multiply(const float* x, int64_t num_rows, float* y, kernels::Isa isa) const {
  const Job job{panels_.data(), inputs_, outputs_, x, num_rows, y};
  if (kernels::UseAvx2(isa)) {
    MultiplyAvx2(job);
  } else {
    MultiplyBaseline(job);
  }
}

}  // namespace pagetide
