#include "kernels/rope.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace pagetide::kernels {
namespace {

// Pair index at which a wave turns `rotations` times over the original context (YaRN, equation 17
// ff.).
double YarnCorrectionPair(const RopeParams& params, double rotations) {
  constexpr double kTwoPi = 6.283185307179586476925;
  return params.n_rot * std::log(params.original_context / (rotations * kTwoPi)) /
         (2.0 * std::log(static_cast<double>(params.base)));
}

void TurnHead(const RopeParams& params, const float* cos_sin, float magnitude, float* head) {
  const int half = params.n_rot / 2;
  const bool neox = params.style == RopeStyle::kNeox;
  for (int i = 0; i < half; ++i) {
    float& a = head[neox ? i : 2 * i];
    float& b = head[neox ? i + half : 2 * i + 1];
    const float c = cos_sin[2 * i] * magnitude;
    const float s = cos_sin[2 * i + 1] * magnitude;
    const float turned_a = a * c - b * s;
    const float turned_b = a * s + b * c;
    a = turned_a;
    b = turned_b;
  }
}

}  // namespace

void RopeAngles(const RopeParams& params, int64_t position, float* cos_sin) {
  const int half = params.n_rot / 2;
  double ramp_low = 0.0;
  double ramp_high = 0.0;
  if (params.ext_factor != 0.0f) {
    ramp_low = std::max(0.0, std::floor(YarnCorrectionPair(params, params.beta_fast)));
    ramp_high =
        std::min(params.n_rot - 1.0, std::ceil(YarnCorrectionPair(params, params.beta_slow)));
  }
  for (int i = 0; i < half; ++i) {
    const double factor = params.factors == nullptr ? 1.0 : params.factors[i];
    const double unscaled =
        std::pow(static_cast<double>(params.base), -2.0 * i / params.n_rot) / factor;
    double theta = params.scale * unscaled;
    if (params.ext_factor != 0.0f) {
      const double along = (i - ramp_low) / std::max(0.001, ramp_high - ramp_low);
      const double mix = (1.0 - std::min(1.0, std::max(0.0, along))) * params.ext_factor;
      theta = theta * (1.0 - mix) + unscaled * mix;
    }
    const double angle = static_cast<double>(position) * theta;
    cos_sin[2 * i] = static_cast<float>(std::cos(angle));
    cos_sin[2 * i + 1] = static_cast<float>(std::sin(angle));
  }
}

void RopeHost(const RopeArgs& args) {
  const int64_t head_bytes = EncodedBytes(args.type, args.head_dim);
  std::vector<float> cos_sin(static_cast<size_t>(args.params.n_rot));
  std::vector<float> head(static_cast<size_t>(args.params.n_rot));
  for (int64_t r = 0; r < args.num_rows; ++r) {
    const float* turn = cos_sin.data();
    if (args.cos_sin != nullptr) {
      turn = args.cos_sin + r * args.params.n_rot;
    } else {
      RopeAngles(args.params, args.positions[r], cos_sin.data());
    }
    char* row = static_cast<char*>(args.rows) + r * args.row_bytes;
    for (int h = 0; h < args.num_heads; ++h) {
      char* first = row + h * head_bytes;
      WidenToF32(args.type, first, args.params.n_rot, head.data());
      TurnHead(args.params, turn, args.magnitude, head.data());
      NarrowFromF32(args.type, head.data(), args.params.n_rot, first);
    }
  }
}

}  // namespace pagetide::kernels
