#include "kernels/rope_shift.h"

#include <cstddef>
#include <cstring>
#include <vector>

#include "kernels/convert.h"
#include "kernels/simd.h"

namespace pagetide::kernels {
namespace {

// Elements [first, first + count) of a head: the turned ones, widened to whole groups.
struct Span {
  int32_t first;
  int32_t count;
};

Span TurnedGroups(const RopeShiftArgs& args) {
  const int32_t group = GroupElements(args.type);
  const int32_t first = args.rope_offset / group * group;
  const int32_t end = (args.rope_offset + args.params.n_rot + group - 1) / group * group;
  return {first, end - first};
}

// The angles of one delta in the order in which lanes meet them.
struct Turn {
  // kNeox: cos [n_rot / 2], then sin [n_rot / 2]. kNorm: cos twice a pair [n_rot], then -sin, sin
  // [n_rot].
  std::vector<float> cos;
  std::vector<float> sin;
};

void Arrange(const RopeParams& params, const float* cos_sin, Turn& turn) {
  const int half = params.n_rot / 2;
  const bool neox = params.style == RopeStyle::kNeox;
  turn.cos.resize(neox ? half : params.n_rot);
  turn.sin.resize(turn.cos.size());
  for (int i = 0; i < half; ++i) {
    const float c = cos_sin[2 * i];
    const float s = cos_sin[2 * i + 1];
    if (neox) {
      turn.cos[i] = c;
      turn.sin[i] = s;
    } else {
      turn.cos[2 * i] = turn.cos[2 * i + 1] = c;
      turn.sin[2 * i] = -s;
      turn.sin[2 * i + 1] = s;
    }
  }
}

// a' = a cos - b sin, b' = a sin + b cos. Subtracting a product and adding its negative are the
// same operation, so both pairings and all lanes round alike.
PAGETIDE_ALWAYS_INLINE void TurnNeox(int half, const float* cos, const float* sin, float* x) {
  int i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Float8 a = Load8(x + i);
    const Float8 b = Load8(x + half + i);
    const Float8 c = Load8(cos + i);
    const Float8 s = Load8(sin + i);
    Store8(x + i, a * c - b * s);
    Store8(x + half + i, a * s + b * c);
  }
  for (; i < half; ++i) {
    const float a = x[i];
    const float b = x[half + i];
    x[i] = a * cos[i] - b * sin[i];
    x[half + i] = a * sin[i] + b * cos[i];
  }
}

PAGETIDE_ALWAYS_INLINE void TurnNorm(int n_rot, const float* cos, const float* sin, float* x) {
  int i = 0;
  for (; i + kLanes <= n_rot; i += kLanes) {
    const Float8 own = Load8(x + i);
    const Float8 other = __builtin_shufflevector(own, own, 1, 0, 3, 2, 5, 4, 7, 6);
    Store8(x + i, own * Load8(cos + i) + other * Load8(sin + i));
  }
  for (; i < n_rot; i += 2) {
    const float a = x[i];
    const float b = x[i + 1];
    x[i] = a * cos[i] + b * sin[i];
    x[i + 1] = b * cos[i + 1] + a * sin[i + 1];
  }
}

PAGETIDE_ALWAYS_INLINE void TurnBody(const RopeParams& params, const Turn& turn, float* x) {
  if (params.style == RopeStyle::kNeox) {
    TurnNeox(params.n_rot / 2, turn.cos.data(), turn.sin.data(), x);
  } else {
    TurnNorm(params.n_rot, turn.cos.data(), turn.sin.data(), x);
  }
}

PAGETIDE_TARGET_AVX2 void TurnAvx2(const RopeParams& params, const Turn& turn, float* x) {
  TurnBody(params, turn, x);
}
void TurnBaseline(const RopeParams& params, const Turn& turn, float* x) {
  TurnBody(params, turn, x);
}

// Turns every head of the encoded `row`. head: scratch, [span.count].
void TurnRow(const RopeShiftArgs& args, Span span, const Turn& turn, Isa isa, float* head,
             char* row) {
  const int64_t head_bytes = EncodedBytes(args.type, args.head_dim);
  char* encoded = row + EncodedBytes(args.type, span.first);
  for (int h = 0; h < args.num_heads; ++h, encoded += head_bytes) {
    WidenToF32(args.type, encoded, span.count, head, isa);
    if (UseAvx2(isa)) {
      TurnAvx2(args.params, turn, head + (args.rope_offset - span.first));
    } else {
      TurnBaseline(args.params, turn, head + (args.rope_offset - span.first));
    }
    NarrowFromF32(args.type, head, span.count, encoded, isa);
  }
}

}  // namespace

const char* CheckRopeShiftArgs(const RopeShiftArgs& args) {
  if (args.num_heads < 1 || args.head_dim < 1) return "num_heads and head_dim must be at least 1";
  if (args.head_dim % GroupElements(args.type) != 0) {
    return "head_dim must be a multiple of 32 for a block type";
  }
  if (args.params.n_rot < 2 || args.params.n_rot % 2 != 0) return "n_rot must be even, at least 2";
  if (args.rope_offset < 0 || args.rope_offset > args.head_dim - args.params.n_rot) {
    return "rope_offset + n_rot must not exceed head_dim";
  }
  const int64_t row = EncodedBytes(args.type, int64_t{args.num_heads} * args.head_dim);
  if (args.in_row_bytes < row) return "in_row_bytes is less than the heads of one row";
  if (args.out_row_bytes < row) return "out_row_bytes is less than the heads of one row";
  if (args.num_layers < 1) return "num_layers must be at least 1";
  if (args.num_runs < 0) return "num_runs must not be negative";
  for (int64_t r = 0; r < args.num_runs; ++r) {
    const RopeShiftRun& run = args.runs[r];
    if (run.num_rows < 0) return "run: num_rows must not be negative";
    if (run.num_rows > 0 && (run.in == nullptr || run.out == nullptr)) {
      return "run: in and out must not be null";
    }
    if (run.in == run.out &&
        (args.in_row_bytes != args.out_row_bytes ||
         (args.num_layers > 1 && args.in_layer_bytes != args.out_layer_bytes))) {
      return "run: in place needs equal strides of in and out";
    }
  }
  return nullptr;
}

void RopeShiftHost(const RopeShiftArgs& args, Isa isa) {
  const Span span = TurnedGroups(args);
  const size_t row_bytes =
      static_cast<size_t>(EncodedBytes(args.type, int64_t{args.num_heads} * args.head_dim));
  std::vector<float> angles(static_cast<size_t>(args.params.n_rot));
  std::vector<float> head(static_cast<size_t>(span.count));
  Turn turn;
  for (int64_t r = 0; r < args.num_runs; ++r) {
    const RopeShiftRun& run = args.runs[r];
    if (args.cos_sin != nullptr) {
      Arrange(args.params, args.cos_sin + r * args.params.n_rot, turn);
    } else if (r == 0 || run.delta != args.runs[r - 1].delta) {
      RopeAngles(args.params, run.delta, angles.data());
      Arrange(args.params, angles.data(), turn);
    }
    for (int64_t layer = 0; layer < args.num_layers; ++layer) {
      const char* in = static_cast<const char*>(run.in) + layer * args.in_layer_bytes;
      char* out = static_cast<char*>(run.out) + layer * args.out_layer_bytes;
      for (int64_t i = 0; i < run.num_rows; ++i) {
        if (out != in) std::memcpy(out, in, row_bytes);
        if (run.delta != 0) TurnRow(args, span, turn, isa, head.data(), out);
        in += args.in_row_bytes;
        out += args.out_row_bytes;
      }
    }
  }
}

}  // namespace pagetide::kernels
