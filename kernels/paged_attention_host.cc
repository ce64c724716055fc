#include "kernels/paged_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/attention_mask.h"
#include "kernels/simd.h"

namespace pagetide::kernels {
namespace {

constexpr int kBlock = kAttentionBlock;
constexpr int kVectors = kBlock / kLanes;  // Float8 a block of scores
// Queries that share one widened block. The state of a tile stays in the L1/L2 cache.
constexpr int64_t kQueryTile = 32;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

int PadToLanes(int n) {
  return (n + kLanes - 1) / kLanes * kLanes;
}

int64_t BlockStart(int64_t position) {
  const int64_t remainder = ((position % kBlock) + kBlock) % kBlock;
  return position - remainder;
}

// Walks the runs and hands out one block of rows at a time; slot i of a block is position start +
// i.
class BlockCursor {
 public:
  explicit BlockCursor(const AttentionArgs& args) : args_(args) {}

  // Fills rows[i] (null where no row has that position) and `start`. False at the end.
  bool Next(int64_t* start, const char* k_rows[kBlock], const char* v_rows[kBlock]) {
    SkipEmptyRuns();
    if (run_ == args_.num_runs) return false;
    *start = BlockStart(args_.runs[run_].first_position + offset_);
    std::fill(k_rows, k_rows + kBlock, nullptr);
    std::fill(v_rows, v_rows + kBlock, nullptr);
    int filled = -1;  // last slot taken; positions inside a block strictly increase
    while (run_ < args_.num_runs) {
      const KvRun& run = args_.runs[run_];
      const int64_t slot = run.first_position + offset_ - *start;
      if (slot >= kBlock || slot <= filled) return true;
      const int64_t row = run.first_slot + offset_;
      k_rows[slot] = static_cast<const char*>(run.k_rows) + row * args_.shape.k_row_bytes;
      v_rows[slot] = static_cast<const char*>(run.v_rows) + row * args_.shape.v_row_bytes;
      filled = static_cast<int>(slot);
      ++offset_;
      SkipEmptyRuns();
    }
    return true;
  }

 private:
  void SkipEmptyRuns() {
    while (run_ < args_.num_runs && offset_ >= args_.runs[run_].count) {
      ++run_;
      offset_ = 0;
    }
  }

  const AttentionArgs& args_;
  int64_t run_ = 0;
  int64_t offset_ = 0;
};

struct Scratch {
  explicit Scratch(const AttentionShape& shape)
      : v_padded(PadToLanes(shape.v_dim)),
        group(shape.num_q_heads / shape.num_kv_heads),
        row(std::max(shape.k_dim, shape.v_dim)),
        k(static_cast<size_t>(shape.k_dim) * kBlock),
        v(static_cast<size_t>(v_padded) * kBlock),
        acc(static_cast<size_t>(kQueryTile) * group * v_padded),
        maximum(static_cast<size_t>(kQueryTile) * group),
        sum(static_cast<size_t>(kQueryTile) * group) {}

  const int v_padded;
  const int group;             // query heads a KV head
  std::vector<float> row;      // one widened head
  std::vector<float> k;        // [k_dim, kBlock]: transposed, so that lanes are positions
  std::vector<float> v;        // [kBlock, v_padded]
  std::vector<float> acc;      // [kQueryTile, group, v_padded]
  std::vector<float> maximum;  // [kQueryTile, group]
  std::vector<float> sum;      // [kQueryTile, group]
  float hole[kBlock];          // 0 where a row is present, -infinity where not
};

PAGETIDE_ALWAYS_INLINE void Widen(KvType type, const char* in, int count, float* out) {
  if (type == KvType::kF16) {
    for (int i = 0; i < count; ++i) {
      uint16_t half;
      std::memcpy(&half, in + 2 * i, sizeof(half));
      out[i] = F16ToF32(half);
    }
  } else {
    WidenToF32(type, in, count, out);
  }
}

PAGETIDE_ALWAYS_INLINE void LoadBlock(const AttentionShape& shape, int kv_head,
                                      const char* const* k_rows, const char* const* v_rows,
                                      Scratch& s) {
  const int64_t k_offset = EncodedBytes(shape.k_type, int64_t{kv_head} * shape.k_dim);
  const int64_t v_offset = EncodedBytes(shape.v_type, int64_t{kv_head} * shape.v_dim);
  for (int i = 0; i < kBlock; ++i) {
    float* v_row = s.v.data() + static_cast<size_t>(i) * s.v_padded;
    if (k_rows[i] == nullptr) {
      s.hole[i] = kMinusInfinity;
      for (int d = 0; d < shape.k_dim; ++d) s.k[static_cast<size_t>(d) * kBlock + i] = 0.0f;
      for (int d = 0; d < s.v_padded; ++d) v_row[d] = 0.0f;
      continue;
    }
    s.hole[i] = 0.0f;
    Widen(shape.k_type, k_rows[i] + k_offset, shape.k_dim, s.row.data());
    for (int d = 0; d < shape.k_dim; ++d) s.k[static_cast<size_t>(d) * kBlock + i] = s.row[d];
    Widen(shape.v_type, v_rows[i] + v_offset, shape.v_dim, v_row);
    for (int d = shape.v_dim; d < s.v_padded; ++d) v_row[d] = 0.0f;
  }
}

// acc[0 .. 8 * kWidth) = acc * factor + sum over i in [begin, end) of weight[i] * v[i], in order of
// i.
template <int kWidth>
PAGETIDE_ALWAYS_INLINE void AccumulateValues(const float* weight, int begin, int end,
                                             const float* v, int v_stride, float factor,
                                             float* acc) {
  Float8 sum[kWidth];
  for (int t = 0; t < kWidth; ++t) sum[t] = Load8(acc + t * kLanes) * Broadcast8(factor);
  for (int i = begin; i < end; ++i) {
    const Float8 w = Broadcast8(weight[i]);
    const float* row = v + static_cast<size_t>(i) * v_stride;
    for (int t = 0; t < kWidth; ++t) sum[t] = sum[t] + w * Load8(row + t * kLanes);
  }
  for (int t = 0; t < kWidth; ++t) Store8(acc + t * kLanes, sum[t]);
}

PAGETIDE_ALWAYS_INLINE void AccumulateBlock(const float* weight, int begin, int end,
                                            const Scratch& s, float factor, float* acc) {
  int d = 0;
  for (; d + 4 * kLanes <= s.v_padded; d += 4 * kLanes) {
    AccumulateValues<4>(weight, begin, end, s.v.data() + d, s.v_padded, factor, acc + d);
  }
  for (; d < s.v_padded; d += kLanes) {
    AccumulateValues<1>(weight, begin, end, s.v.data() + d, s.v_padded, factor, acc + d);
  }
}

// Slots [begin, hole_begin) and [hole_end, end) of a block.
struct VisibleSlots {
  int begin;
  int hole_begin;
  int hole_end;
  int end;
};

// Adds the visible slots of the loaded block to one query head's state.
PAGETIDE_ALWAYS_INLINE void UpdateHead(const AttentionShape& shape, const float* q,
                                       const VisibleSlots& slots, Scratch& s, float* maximum,
                                       float* sum, float* acc) {
  Float8 score[kVectors];
  for (int t = 0; t < kVectors; ++t) score[t] = Broadcast8(0.0f);
  const float* k = s.k.data();
  for (int d = 0; d < shape.k_dim; ++d, k += kBlock) {
    const Float8 qd = Broadcast8(q[d]);
    for (int t = 0; t < kVectors; ++t) score[t] = score[t] + qd * Load8(k + t * kLanes);
  }
  const Float8 scale = Broadcast8(shape.scale);
  float weight[kBlock];
  for (int t = 0; t < kVectors; ++t) {
    Store8(weight + t * kLanes, score[t] * scale + Load8(s.hole + t * kLanes));
  }
  for (int i = 0; i < slots.begin; ++i) weight[i] = kMinusInfinity;
  for (int i = slots.hole_begin; i < slots.hole_end; ++i) weight[i] = kMinusInfinity;
  for (int i = slots.end; i < kBlock; ++i) weight[i] = kMinusInfinity;

  Float8 highest = Load8(weight);
  for (int t = 1; t < kVectors; ++t) {
    const Float8 other = Load8(weight + t * kLanes);
    highest = other > highest ? other : highest;
  }
  float block_maximum = highest[0];
  for (int lane = 1; lane < kLanes; ++lane) {
    block_maximum = highest[lane] > block_maximum ? highest[lane] : block_maximum;
  }
  if (block_maximum == kMinusInfinity) return;  // only holes

  const float new_maximum = block_maximum > *maximum ? block_maximum : *maximum;
  const float factor = Exp1(*maximum - new_maximum);  // 0 for the first block, 1 if nothing changed
  const Float8 shift = Broadcast8(new_maximum);
  Float8 lane_sum = Broadcast8(0.0f);
  for (int t = 0; t < kVectors; ++t) {
    const Float8 w = Exp8(Load8(weight + t * kLanes) - shift);
    Store8(weight + t * kLanes, w);
    lane_sum = lane_sum + w;
  }
  *sum = *sum * factor + SumLanes(lane_sum);
  *maximum = new_maximum;

  AccumulateBlock(weight, slots.begin, slots.hole_begin, s, factor, acc);
  // Rows in the hole are not touched: what nobody sees may hold anything.
  if (slots.hole_end < slots.end) {
    AccumulateBlock(weight, slots.hole_end, slots.end, s, 1.0f, acc);
  }
}

// What a query at `p` sees of the block that begins at position `start`; empty when end is 0.
VisibleSlots SlotsOf(const AttentionShape& shape, int64_t p, int64_t start) {
  const auto slot = [start](int64_t position) {
    return static_cast<int>(std::clamp<int64_t>(position, start, start + kBlock) - start);
  };
  const VisiblePositions visible = VisibleTo(shape, p);
  const int begin = slot(visible.first);
  const int end = slot(visible.last + 1);
  const int kept = slot(visible.kept);
  if (begin >= end) return {0, kept, kept, kept};
  if (kept >= begin) return {0, end, end, end};
  if (kept == 0) return {begin, end, end, end};
  return {0, kept, begin, end};
}

PAGETIDE_ALWAYS_INLINE void AttendTile(const AttentionArgs& args, int kv_head, int64_t first_query,
                                       int64_t end_query, Scratch& s) {
  const AttentionShape& shape = args.shape;
  std::fill(s.acc.begin(), s.acc.end(), 0.0f);
  std::fill(s.maximum.begin(), s.maximum.end(), kMinusInfinity);
  std::fill(s.sum.begin(), s.sum.end(), 0.0f);

  // Blocks that no query of the tile sees are not loaded.
  VisiblePositions any = VisibleTo(shape, args.q_positions[first_query]);
  for (int64_t i = first_query + 1; i < end_query; ++i) {
    const VisiblePositions one = VisibleTo(shape, args.q_positions[i]);
    any.first = std::min(any.first, one.first);
    any.last = std::max(any.last, one.last);
    any.kept = std::max(any.kept, one.kept);
  }

  BlockCursor cursor(args);
  int64_t start = 0;
  const char* k_rows[kBlock];
  const char* v_rows[kBlock];
  while (cursor.Next(&start, k_rows, v_rows)) {
    if (start > any.last) break;  // positions never decrease
    if (start + kBlock - 1 < any.first && start >= any.kept) continue;
    LoadBlock(shape, kv_head, k_rows, v_rows, s);
    for (int64_t i = first_query; i < end_query; ++i) {
      const VisibleSlots slots = SlotsOf(shape, args.q_positions[i], start);
      if (slots.end == 0) continue;
      for (int h = 0; h < s.group; ++h) {
        const size_t state = static_cast<size_t>(i - first_query) * s.group + h;
        const int64_t q_head = static_cast<int64_t>(kv_head) * s.group + h;
        UpdateHead(shape, args.q + (i * shape.num_q_heads + q_head) * shape.k_dim, slots, s,
                   &s.maximum[state], &s.sum[state], &s.acc[state * s.v_padded]);
      }
    }
  }

  for (int64_t i = first_query; i < end_query; ++i) {
    for (int h = 0; h < s.group; ++h) {
      const size_t state = static_cast<size_t>(i - first_query) * s.group + h;
      const int64_t q_row = i * shape.num_q_heads + static_cast<int64_t>(kv_head) * s.group + h;
      const float sum = s.sum[state];
      const float* acc = &s.acc[state * s.v_padded];
      float* out = args.out + q_row * shape.v_dim;
      for (int d = 0; d < shape.v_dim; ++d) out[d] = sum > 0.0f ? acc[d] / sum : 0.0f;
      if (args.lse != nullptr) {
        args.lse[q_row] = sum > 0.0f ? static_cast<float>(static_cast<double>(s.maximum[state]) +
                                                          std::log(static_cast<double>(sum)))
                                     : kMinusInfinity;
      }
    }
  }
}

PAGETIDE_ALWAYS_INLINE void AttendAll(const AttentionArgs& args) {
  Scratch scratch(args.shape);
  for (int64_t first = 0; first < args.num_queries; first += kQueryTile) {
    const int64_t end = std::min(first + kQueryTile, args.num_queries);
    for (int kv_head = 0; kv_head < args.shape.num_kv_heads; ++kv_head) {
      AttendTile(args, kv_head, first, end, scratch);
    }
  }
}

PAGETIDE_TARGET_AVX2 void AttendAvx2(const AttentionArgs& args) {
  AttendAll(args);
}
void AttendBaseline(const AttentionArgs& args) {
  AttendAll(args);
}

AttentionSequence SequenceOf(const AttentionBatch& batch, int64_t index) {
  if (batch.sequences != nullptr) return batch.sequences[index];
  return {0, batch.all.num_runs, 0, batch.all.num_queries};
}

AttentionArgs ArgsOf(const AttentionBatch& batch, const AttentionSequence& sequence) {
  AttentionArgs args = batch.all;
  const AttentionShape& shape = args.shape;
  const int64_t q_row = sequence.first_query * shape.num_q_heads;
  args.runs += sequence.first_run;
  args.num_runs = sequence.num_runs;
  args.q += q_row * shape.k_dim;
  args.q_positions += sequence.first_query;
  args.num_queries = sequence.num_queries;
  args.out += q_row * shape.v_dim;
  if (args.lse != nullptr) args.lse += q_row;
  return args;
}

}  // namespace

const char* CheckAttentionShape(const AttentionShape& shape) {
  if (shape.num_kv_heads < 1) return "num_kv_heads must be at least 1";
  if (shape.num_q_heads < 1 || shape.num_q_heads % shape.num_kv_heads != 0) {
    return "num_q_heads must be a positive multiple of num_kv_heads";
  }
  if (shape.k_dim < 1 || shape.v_dim < 1) return "k_dim and v_dim must be at least 1";
  if (shape.k_dim % GroupElements(shape.k_type) != 0 ||
      shape.v_dim % GroupElements(shape.v_type) != 0) {
    return "k_dim and v_dim must be multiples of 32 for block types";
  }
  if (shape.k_row_bytes < EncodedBytes(shape.k_type, int64_t{shape.num_kv_heads} * shape.k_dim)) {
    return "k_row_bytes is less than the heads of one K row";
  }
  if (shape.v_row_bytes < EncodedBytes(shape.v_type, int64_t{shape.num_kv_heads} * shape.v_dim)) {
    return "v_row_bytes is less than the heads of one V row";
  }
  if (shape.mask != AttentionMask::kCausal && shape.window < 1) return "window must be at least 1";
  if (shape.mask == AttentionMask::kWindowRing && shape.keep < 0) return "keep must be at least 0";
  return nullptr;
}

const char* CheckAttentionArgs(const AttentionArgs& args) {
  if (const char* wrong = CheckAttentionShape(args.shape)) return wrong;
  if (args.num_queries < 0 || args.num_runs < 0)
    return "num_queries and num_runs must not be negative";
  int64_t previous = std::numeric_limits<int64_t>::min();
  for (int64_t r = 0; r < args.num_runs; ++r) {
    const KvRun& run = args.runs[r];
    if (run.count < 0 || run.first_slot < 0)
      return "run: count and first_slot must not be negative";
    if (run.count == 0) continue;
    if (run.k_rows == nullptr || run.v_rows == nullptr) return "run: rows must not be null";
    if (run.first_position < previous) return "runs: positions must not decrease";
    previous = run.first_position + run.count - 1;
  }
  return nullptr;
}

const char* CheckAttentionBatch(const AttentionBatch& batch) {
  const AttentionShape& shape = batch.all.shape;
  if (const char* wrong = CheckAttentionShape(shape)) return wrong;
  if (batch.num_sequences < 0) return "num_sequences must not be negative";
  if (batch.sequences == nullptr && batch.num_sequences != 1) {
    return "sequences is null, num_sequences must be 1";
  }
  int64_t next_run = 0;
  int64_t next_query = 0;
  for (int64_t i = 0; i < batch.num_sequences; ++i) {
    const AttentionSequence sequence = SequenceOf(batch, i);
    if (sequence.first_run != next_run || sequence.num_runs < 0 ||
        sequence.num_runs > batch.all.num_runs - next_run) {
      return "sequence: its runs do not follow the last one's, or leave num_runs";
    }
    if (sequence.first_query != next_query || sequence.num_queries < 0 ||
        sequence.num_queries > batch.all.num_queries - next_query) {
      return "sequence: its queries do not follow the last one's, or leave num_queries";
    }
    next_run += sequence.num_runs;
    next_query += sequence.num_queries;
    if (sequence.num_queries > batch.max_queries) return "max_queries is less than a sequence's";
    const AttentionArgs args = ArgsOf(batch, sequence);
    if (const char* wrong = CheckAttentionArgs(args)) return wrong;
    int64_t rows = 0;
    for (int64_t r = 0; r < args.num_runs; ++r) {
      rows += args.runs[r].count;
      if (batch.values_are_keys && args.runs[r].v_rows != args.runs[r].k_rows) {
        return "run: v_rows differ from k_rows, values_are_keys must not be set";
      }
    }
    if (rows > batch.max_rows) return "max_rows is less than a sequence's rows";
  }
  if (next_run != batch.all.num_runs || next_query != batch.all.num_queries) {
    return "num_runs or num_queries is more than the sequences have";
  }
  if (batch.values_are_keys &&
      (shape.v_type != shape.k_type || shape.v_row_bytes != shape.k_row_bytes ||
       shape.v_dim > shape.k_dim || (shape.v_dim != shape.k_dim && shape.num_kv_heads != 1))) {
    return "values_are_keys: v_type, v_row_bytes or v_dim do not fit the K rows";
  }
  return nullptr;
}

void AttendHost(const AttentionArgs& args, Isa isa) {
  if (UseAvx2(isa)) {
    AttendAvx2(args);
  } else {
    AttendBaseline(args);
  }
}

void AttendHost(const AttentionBatch& batch, Isa isa) {
  for (int64_t i = 0; i < batch.num_sequences; ++i) {
    AttendHost(ArgsOf(batch, SequenceOf(batch, i)), isa);
  }
}

}  // namespace pagetide::kernels
