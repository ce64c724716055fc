// What the attention of every device keeps: against the host twin within the bounds of
// docs/kernels.md, over all types, masks, head sizes, unequal runs and batches, poisoned outputs.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/attention_plan.h"
#include "kernels/convert.h"
#include "kernels/paged_attention.h"
#include "tests/kernels/kernel_device.h"

namespace pagetide::kernels {
namespace {

constexpr float kPoison = -12345.0f;

struct SequenceSpec {
  int64_t rows;     // KV rows
  int64_t queries;  // the last ones, unless q_positions says otherwise
};

struct Case {
  int q_heads = 4;
  int kv_heads = 2;
  int k_dim = 64;
  int v_dim = 64;
  KvType k_type = KvType::kF16;
  KvType v_type = KvType::kF16;
  AttentionMask mask = AttentionMask::kCausal;
  int64_t window = 1;
  int64_t keep = 0;
  bool latent = false;
  std::vector<SequenceSpec> sequences = {{100, 1}};
  int page_tokens = 16;
  int64_t row_pad = 0;   // bytes between rows
  int64_t misalign = 0;  // of every page
  uint32_t seed = 1;
  bool with_lse = true;
  bool rounded_q = true;  // to what tensor cores take, as the rows' own engine would
};

// One byte image of all pages, the same for every device, with the runs as offsets into it.
struct Problem {
  AttentionShape shape{};
  std::vector<uint8_t> memory;
  std::vector<KvRun> runs;  // k_rows and v_rows are offsets
  std::vector<AttentionSequence> sequences;
  std::vector<float> q;
  std::vector<int64_t> q_positions;
  int64_t max_rows = 0;
  int64_t max_queries = 0;
  bool latent = false;
  bool with_lse = true;
  bool rounded_q = true;
};

// Of the arithmetic, docs/kernels.md: half the distance of two neighbouring operands as a share of
// them; 0 where the arithmetic is f32.
KvType OperandOf(KvType k, KvType v) {
  if (k == KvType::kBF16 && v == KvType::kBF16) return KvType::kBF16;
  for (const KvType type : {k, v}) {
    if (type == KvType::kF32 || type == KvType::kBF16) return KvType::kF32;
  }
  return KvType::kF16;
}
double RoundingOf(KvType operand) {
  return operand == KvType::kF32    ? 0
         : operand == KvType::kBF16 ? std::ldexp(1.0, -8)
                                    : std::ldexp(1.0, -11);
}

Problem MakeProblem(const Case& c) {
  std::mt19937 random(c.seed);
  std::normal_distribution<float> normal;
  Problem p;
  p.latent = c.latent;
  p.with_lse = c.with_lse;
  p.rounded_q = c.rounded_q;
  AttentionShape& s = p.shape;
  s.num_q_heads = c.q_heads;
  s.num_kv_heads = c.kv_heads;
  s.k_dim = c.k_dim;
  s.v_dim = c.v_dim;
  s.k_type = c.k_type;
  s.v_type = c.latent ? c.k_type : c.v_type;
  s.k_row_bytes = EncodedBytes(c.k_type, int64_t{c.kv_heads} * c.k_dim) + c.row_pad;
  s.v_row_bytes =
      c.latent ? s.k_row_bytes : EncodedBytes(c.v_type, int64_t{c.kv_heads} * c.v_dim) + c.row_pad;
  s.scale = 1.0f / std::sqrt(static_cast<float>(c.k_dim));
  s.mask = c.mask;
  s.window = c.window;
  s.keep = c.keep;

  const auto fill_row = [&](KvType type, int64_t count, int64_t at) {
    std::vector<float> values(static_cast<size_t>(count));
    for (float& x : values) x = normal(random);
    NarrowFromF32(type, values.data(), count, &p.memory[static_cast<size_t>(at)]);
  };
  for (const SequenceSpec& spec : c.sequences) {
    AttentionSequence sequence{};
    sequence.first_run = static_cast<int64_t>(p.runs.size());
    sequence.first_query = static_cast<int64_t>(p.q_positions.size());
    sequence.num_queries = spec.queries;
    int64_t row = 0;
    while (row < spec.rows) {
      // A page of its own each, some slots in front and behind unused: poison, as all that is no
      // row. NaN in every encoding.
      const int32_t slot = static_cast<int32_t>(random() % static_cast<uint32_t>(c.page_tokens));
      const int32_t count = static_cast<int32_t>(std::min<int64_t>(
          1 + static_cast<int64_t>(random() % static_cast<uint32_t>(c.page_tokens - slot)),
          spec.rows - row));
      const int64_t base = (static_cast<int64_t>(p.memory.size()) + 255) / 256 * 256 + c.misalign;
      const int64_t v_base = base + (c.latent ? 0 : c.page_tokens * s.k_row_bytes);
      p.memory.resize(static_cast<size_t>(v_base + c.page_tokens * s.v_row_bytes), 0xff);
      for (int32_t i = 0; i < count; ++i) {
        fill_row(s.k_type, int64_t{c.kv_heads} * c.k_dim, base + (slot + i) * s.k_row_bytes);
        if (c.latent) continue;
        fill_row(s.v_type, int64_t{c.kv_heads} * c.v_dim, v_base + (slot + i) * s.v_row_bytes);
      }
      KvRun run{};
      run.k_rows = reinterpret_cast<const void*>(base);
      run.v_rows = reinterpret_cast<const void*>(v_base);
      run.first_position = row;
      run.first_slot = slot;
      run.count = count;
      p.runs.push_back(run);
      if (random() % 8 == 0) {  // empty runs are allowed
        run.count = 0;
        p.runs.push_back(run);
      }
      row += count;
    }
    sequence.num_runs = static_cast<int64_t>(p.runs.size()) - sequence.first_run;
    p.sequences.push_back(sequence);
    for (int64_t i = 0; i < spec.queries; ++i) {
      p.q_positions.push_back(spec.rows - spec.queries + i);
    }
    p.max_rows = std::max(p.max_rows, spec.rows);
    p.max_queries = std::max(p.max_queries, spec.queries);
  }
  p.q.resize(p.q_positions.size() * static_cast<size_t>(c.q_heads * c.k_dim));
  for (float& x : p.q) x = normal(random);
  if (c.rounded_q) {
    const KvType operand = OperandOf(s.k_type, s.v_type);
    std::vector<uint8_t> narrow(p.q.size() * 4);
    NarrowFromF32(operand, p.q.data(), static_cast<int64_t>(p.q.size()), narrow.data());
    WidenToF32(operand, narrow.data(), static_cast<int64_t>(p.q.size()), p.q.data());
  }
  return p;
}

struct Result {
  std::vector<float> out;
  std::vector<float> lse;
};

Result Attend(KernelDevice& device, const Problem& p) {
  AttentionBatch batch{};
  batch.all.shape = p.shape;
  uint8_t* const memory = device.Place(p.memory);
  std::vector<KvRun> runs = p.runs;
  for (KvRun& run : runs) {
    run.k_rows = memory + reinterpret_cast<uintptr_t>(run.k_rows);
    run.v_rows = memory + reinterpret_cast<uintptr_t>(run.v_rows);
  }
  const size_t q_rows = p.q_positions.size() * static_cast<size_t>(p.shape.num_q_heads);
  Result result;
  result.out.assign(q_rows * static_cast<size_t>(p.shape.v_dim) + 1, kPoison);
  result.lse.assign(q_rows + 1, kPoison);
  batch.all.runs = device.Place(runs);
  batch.all.num_runs = static_cast<int64_t>(runs.size());
  batch.all.q = device.Place(p.q);
  batch.all.q_positions = device.Place(p.q_positions);
  batch.all.num_queries = static_cast<int64_t>(p.q_positions.size());
  batch.all.out = device.Place(result.out);
  batch.all.lse = p.with_lse ? device.Place(result.lse) : nullptr;
  batch.num_sequences = static_cast<int64_t>(p.sequences.size());
  batch.sequences = p.sequences.size() == 1 ? nullptr : device.Place(p.sequences);
  batch.max_rows = p.max_rows;
  batch.max_queries = p.max_queries;
  batch.values_are_keys = p.latent;
  EXPECT_EQ(device.Run(batch), 0);
  result.out = device.Fetch(batch.all.out, result.out.size());
  EXPECT_EQ(result.out.back(), kPoison);
  result.out.pop_back();
  if (p.with_lse) {
    result.lse = device.Fetch(batch.all.lse, result.lse.size());
    EXPECT_EQ(result.lse.back(), kPoison);
  }
  result.lse.pop_back();
  return result;
}

bool IsVisible(const AttentionShape& s, int64_t query, int64_t key) {
  switch (s.mask) {
    case AttentionMask::kCausal:
      return key <= query;
    case AttentionMask::kWindowStandard:
      return key <= query && query - key < s.window;
    case AttentionMask::kWindowChunked:
      return key <= query && key / s.window == query / s.window;
    case AttentionMask::kWindowSymmetric:
      return std::abs(query - key) <= s.window / 2;
    case AttentionMask::kWindowRing:
      return key <= query && (query - key < s.window || key < s.keep);
  }
  return false;
}

// What rounding may do to one query head, from its own keys and weights.
struct Sizes {
  double score = 0;           // the largest sum of |q| |k| of a key it sees, scaled
  std::vector<double> value;  // [v_dim]: sum of weight * |v|
};

Sizes SizesOf(const Problem& p, const AttentionSequence& sequence, int64_t query, int head) {
  const AttentionShape& s = p.shape;
  const int kv_head = head / (s.num_q_heads / s.num_kv_heads);
  const float* q = &p.q[static_cast<size_t>((query * s.num_q_heads + head) * s.k_dim)];
  Sizes sizes;
  sizes.value.assign(static_cast<size_t>(s.v_dim), 0);
  std::vector<float> k(static_cast<size_t>(s.k_dim));
  std::vector<float> v(static_cast<size_t>(s.v_dim));
  double sum = 0;
  for (int64_t r = 0; r < sequence.num_runs; ++r) {
    const KvRun& run = p.runs[static_cast<size_t>(sequence.first_run + r)];
    for (int64_t i = 0; i < run.count; ++i) {
      if (!IsVisible(s, p.q_positions[static_cast<size_t>(query)], run.first_position + i))
        continue;
      const auto widen = [&](KvType type, const void* rows, int64_t row_bytes,
                             std::vector<float>& out) {
        const int64_t dim = static_cast<int64_t>(out.size());
        WidenToF32(type,
                   &p.memory[reinterpret_cast<uintptr_t>(rows) +
                             static_cast<size_t>((run.first_slot + i) * row_bytes +
                                                 kv_head * EncodedBytes(type, dim))],
                   dim, out.data());
      };
      widen(s.k_type, run.k_rows, s.k_row_bytes, k);
      widen(s.v_type, run.v_rows, s.v_row_bytes, v);
      double score = 0;
      double size = 0;
      for (size_t d = 0; d < k.size(); ++d) {
        score += static_cast<double>(q[d]) * k[d];
        size += std::abs(static_cast<double>(q[d]) * k[d]);
      }
      sizes.score = std::max(sizes.score, size * s.scale);
      const double weight = std::exp(score * s.scale);
      sum += weight;
      for (size_t d = 0; d < v.size(); ++d) sizes.value[d] += weight * std::abs(v[d]);
    }
  }
  for (double& x : sizes.value) x = sum > 0 ? x / sum : 0;
  return sizes;
}

// The bounds of docs/kernels.md.
void ExpectClose(const Problem& p, const Result& got, const Result& want) {
  const AttentionShape& s = p.shape;
  const double u = RoundingOf(OperandOf(s.k_type, s.v_type));
  const double of_q = p.rounded_q ? 0 : u;
  const double of_k = IsBlockType(s.k_type) ? u : 0;
  const double of_v = IsBlockType(s.v_type) ? u : 0;
  const double f32 = std::ldexp(1.0, -24);
  ASSERT_EQ(got.out.size(), want.out.size());
  for (const AttentionSequence& sequence : p.sequences) {
    for (int64_t i = 0; i < sequence.num_queries; ++i) {
      for (int head = 0; head < s.num_q_heads; ++head) {
        const int64_t query = sequence.first_query + i;
        const size_t row = static_cast<size_t>(query * s.num_q_heads + head);
        const Sizes sizes = SizesOf(p, sequence, query, head);
        const double of_score = sizes.score * (of_q + of_k + f32 * (s.k_dim + 16)) + 4 * f32;
        for (size_t d = 0; d < sizes.value.size(); ++d) {
          const size_t at = row * sizes.value.size() + d;
          const double bound =
              sizes.value[d] * (2.1 * of_score + 1.01 * (u + of_v) + 64 * f32) + 1e-30;
          ASSERT_NEAR(got.out[at], want.out[at], bound)
              << "query " << query << ", head " << head << ", element " << d;
        }
        if (!p.with_lse) continue;
        if (std::isinf(want.lse[row])) {
          ASSERT_EQ(got.lse[row], want.lse[row]) << "query " << query << ", head " << head;
        } else {
          ASSERT_NEAR(got.lse[row], want.lse[row],
                      of_score + 8 * f32 * (1 + std::abs(want.lse[row])))
              << "query " << query << ", head " << head;
        }
      }
    }
  }
}

class AttentionContractTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    std::string why_not;
    device_ = MakeKernelDevice(GetParam(), &why_not);
    if (device_ == nullptr) GTEST_SKIP() << why_not;
  }

  void Check(const Case& c) {
    SCOPED_TRACE(testing::Message()
                 << KvTypeName(c.k_type) << "/" << KvTypeName(c.v_type) << " " << c.q_heads << ":"
                 << c.kv_heads << " heads of " << c.k_dim << "/" << c.v_dim << ", "
                 << c.sequences.size() << " sequences, first " << c.sequences[0].rows << " rows "
                 << c.sequences[0].queries << " queries, mask " << static_cast<int>(c.mask) << " "
                 << c.window << " " << c.keep << ", seed " << c.seed);
    const Problem p = MakeProblem(c);
    HostKernelDevice host;
    ExpectClose(p, Attend(*device_, p), Attend(host, p));
  }

  std::unique_ptr<KernelDevice> device_;
};

constexpr KvType kAllTypes[] = {KvType::kF32,    KvType::kF16,  KvType::kBF16, KvType::kF8E4M3,
                                KvType::kF8E5M2, KvType::kQ8_0, KvType::kQ5_0, KvType::kQ5_1,
                                KvType::kQ4_0,   KvType::kQ4_1, KvType::kIQ4NL};

TEST_P(AttentionContractTest, AllTypesDecode) {
  for (const KvType type : kAllTypes) {
    Case c;
    c.k_type = c.v_type = type;
    c.sequences = {{77, 1}};
    Check(c);
    // Heads and rows at odd places: 2 bytes is all that block types promise.
    c.misalign = type == KvType::kF32 ? 4 : type == KvType::kF8E4M3 ? 1 : 2;
    c.row_pad = type == KvType::kF32 ? 4 : 2;
    c.k_dim = c.v_dim = 96;
    Check(c);
  }
}

// Queries that no engine rounded: the bound is wider by their rounding.
TEST_P(AttentionContractTest, QueriesOfFullPrecision) {
  for (const KvType type : {KvType::kF16, KvType::kBF16, KvType::kQ4_0}) {
    Case c;
    c.k_type = c.v_type = type;
    c.rounded_q = false;
    c.sequences = {{70, 2}};
    Check(c);
  }
}

TEST_P(AttentionContractTest, KeysAndValuesOfDifferentTypes) {
  const std::pair<KvType, KvType> pairs[] = {
      {KvType::kF16, KvType::kQ8_0},   {KvType::kQ8_0, KvType::kQ4_0},
      {KvType::kQ5_1, KvType::kF16},   {KvType::kBF16, KvType::kF16},
      {KvType::kF32, KvType::kF8E4M3}, {KvType::kBF16, KvType::kIQ4NL},
      {KvType::kF8E5M2, KvType::kF32}};
  for (const auto& [k, v] : pairs) {
    Case c;
    c.k_type = k;
    c.v_type = v;
    c.k_dim = 64;
    c.v_dim = 96;
    c.sequences = {{70, 2}};
    Check(c);
  }
}

// One key that takes nearly all of the weight and has no value, beside many whose weights are
// `faint_bits` binary digits below its own: of the output they are all.
Problem MakeFaintProblem(const Case& c, double faint_bits) {
  Problem p = MakeProblem(c);
  const AttentionShape& s = p.shape;
  std::fill(p.q.begin(), p.q.end(), 1.0f);
  const auto loud = static_cast<float>(faint_bits * std::log(2.0) / (s.k_dim * s.scale));
  for (const KvRun& run : p.runs) {
    for (int64_t i = 0; i < run.count; ++i) {
      const bool is_loud = run.first_position + i == 0;
      const auto fill = [&](KvType type, const void* rows, int64_t row_bytes, int dim,
                            float value) {
        const std::vector<float> row(static_cast<size_t>(c.kv_heads * dim), value);
        NarrowFromF32(type, row.data(), static_cast<int64_t>(row.size()),
                      &p.memory[reinterpret_cast<uintptr_t>(rows) +
                                static_cast<size_t>((run.first_slot + i) * row_bytes)]);
      };
      fill(s.k_type, run.k_rows, s.k_row_bytes, s.k_dim, is_loud ? loud : 0.0f);
      fill(s.v_type, run.v_rows, s.v_row_bytes, s.v_dim, is_loud ? 0.0f : 1.0f);
    }
  }
  return p;
}

TEST_P(AttentionContractTest, FaintKeysCountThoughOneOutweighsThemAll) {
  // Down to what f16 operands keep, docs/kernels.md; below 2^-14 f16 by itself has fewer digits,
  // and below 2^-25 nothing.
  const auto check = [&](KvType type, double faint_bits, const SequenceSpec& sequence) {
    SCOPED_TRACE(testing::Message() << KvTypeName(type) << ", " << faint_bits << " bits, "
                                    << sequence.rows << " rows");
    Case c;
    c.k_type = c.v_type = type;
    c.sequences = {sequence};
    const Problem p = MakeFaintProblem(c, faint_bits);
    HostKernelDevice host;
    const Result got = Attend(*device_, p);
    ExpectClose(p, got, Attend(host, p));
    // All values are 0 or 1, so the output is the share of the faint keys.
    const double share = SizesOf(p, p.sequences[0], 0, 0).value[0];
    ASSERT_GT(share, 0);
    ASSERT_NEAR(got.out[0], share, share * 0.02);
  };
  for (const KvType type : {KvType::kF16, KvType::kF8E5M2, KvType::kQ8_0, KvType::kBF16}) {
    for (const double faint_bits : {13.7, 20.6, 26.3, 28.9}) check(type, faint_bits, {150, 1});
    check(type, 26.3, {120, 20});
  }
  for (const double faint_bits : {15.3, 24.4}) check(KvType::kF16, faint_bits, {400, 1});
  check(KvType::kF16, 26.3, {5000, 1});  // in several chunks
}

// (query heads, KV heads, k_dim, v_dim) of today's models and some that none has.
TEST_P(AttentionContractTest, HeadSizesAndGroupings) {
  const int shapes[][4] = {{4, 4, 64, 64},   {5, 1, 80, 80},    {6, 2, 96, 96}, {8, 2, 128, 128},
                           {7, 1, 192, 128}, {4, 1, 256, 256},  {3, 1, 20, 40}, {1, 1, 1, 1},
                           {2, 1, 33, 7},    {20, 1, 128, 128}, {16, 1, 64, 96}};
  const KvType types[] = {KvType::kF16, KvType::kBF16, KvType::kF32};
  for (size_t i = 0; i < std::size(shapes); ++i) {
    Case c;
    c.q_heads = shapes[i][0];
    c.kv_heads = shapes[i][1];
    c.k_dim = shapes[i][2];
    c.v_dim = shapes[i][3];
    c.k_type = c.v_type = types[i % 3];
    c.sequences = {{66, 1}};
    c.seed = 7;
    Check(c);
    c.k_type = c.v_type = types[(i + 1) % 3];
    Check(c);
  }
}

// MLA: one KV head of 576, its first 512 elements are the values.
TEST_P(AttentionContractTest, LatentRowsAreReadAsKeysAndValues) {
  for (const KvType type : {KvType::kF16, KvType::kBF16, KvType::kF8E4M3, KvType::kF32}) {
    for (const int q_heads : {16, 20}) {
      // The second is more than one matrix tile: blocks of 64 query rows.
      if (q_heads == 20 && type != KvType::kF16) continue;
      Case c;
      c.q_heads = q_heads;
      c.kv_heads = 1;
      c.k_dim = 576;
      c.v_dim = 512;
      c.latent = true;
      c.k_type = type;
      c.sequences = {{70, 1}};
      Check(c);
    }
  }
  // The same rows as separate values, and a latent of several heads.
  Case c;
  c.q_heads = 4;
  c.kv_heads = 1;
  c.k_dim = 576;
  c.v_dim = 512;
  c.sequences = {{40, 1}};
  Check(c);
  c.kv_heads = 2;
  c.k_dim = c.v_dim = 48;
  c.latent = true;
  Check(c);
}

TEST_P(AttentionContractTest, MasksDecodeAndPrefill) {
  struct Mask {
    AttentionMask mask;
    int64_t window, keep;
  };
  const Mask masks[] = {
      {AttentionMask::kCausal, 1, 0},          {AttentionMask::kWindowStandard, 1, 0},
      {AttentionMask::kWindowStandard, 50, 0}, {AttentionMask::kWindowChunked, 70, 0},
      {AttentionMask::kWindowChunked, 64, 0},  {AttentionMask::kWindowSymmetric, 40, 0},
      {AttentionMask::kWindowRing, 30, 5},     {AttentionMask::kWindowRing, 20, 100}};
  for (const Mask& mask : masks) {
    for (const int64_t queries : {1, 70}) {
      for (const KvType type : {KvType::kF16, KvType::kF32}) {
        if (type == KvType::kF32 && queries > 1) continue;
        Case c;
        c.k_dim = c.v_dim = 32;
        c.kv_heads = 1;
        c.q_heads = 2;
        c.k_type = c.v_type = type;
        c.mask = mask.mask;
        c.window = mask.window;
        c.keep = mask.keep;
        c.sequences = {{200, queries}};
        c.seed = 3;
        Check(c);
      }
    }
  }
}

TEST_P(AttentionContractTest, SequencesOfUnequalLengthTogether) {
  Case c;
  c.kv_heads = 1;
  c.q_heads = 3;
  c.k_dim = c.v_dim = 32;
  c.sequences = {{130, 1}, {0, 1}, {1, 1}, {64, 3}, {65, 0}, {5, 5}, {63, 9}};
  Check(c);
  c.k_type = c.v_type = KvType::kF32;
  Check(c);
  c.k_type = c.v_type = KvType::kQ4_1;
  c.with_lse = false;
  Check(c);
}

// Long enough that sequences are divided and their parts merged, some parts empty.
TEST_P(AttentionContractTest, ChunksAreMerged) {
  for (const KvType type : {KvType::kF16, KvType::kBF16, KvType::kF32}) {
    Case c;
    c.kv_heads = 1;
    c.q_heads = 2;
    c.k_dim = c.v_dim = 16;
    c.k_type = c.v_type = type;
    c.page_tokens = 100;
    c.sequences = {{900, 1}, {20, 1}, {300, 2}};
    AttentionBatch batch{};
    batch.all.shape = MakeProblem(c).shape;
    batch.num_sequences = 3;
    batch.all.num_queries = 4;
    batch.max_rows = 900;
    batch.max_queries = 2;
    AttentionPlan plan;
    ASSERT_STREQ(PlanAttention(batch, 226 * 1024, &plan), nullptr);
    ASSERT_GT(plan.num_chunks, 2);
    Check(c);
    c.mask = AttentionMask::kWindowRing;
    c.window = 10;
    c.keep = 3;
    Check(c);
  }
}

// What nobody sees may hold anything: rows outside the window are NaN here.
TEST_P(AttentionContractTest, HiddenRowsAreNotTouched) {
  for (const KvType type : {KvType::kF16, KvType::kF32, KvType::kF8E4M3}) {
    Case c;
    c.kv_heads = 1;
    c.q_heads = 2;
    c.k_dim = c.v_dim = 32;
    c.k_type = c.v_type = type;
    c.mask = AttentionMask::kWindowRing;
    c.window = 10;
    c.keep = 4;
    c.page_tokens = 7;
    c.sequences = {{150, 2}};
    Problem p = MakeProblem(c);
    HostKernelDevice host;
    const Result want = Attend(host, p);
    for (const KvRun& run : p.runs) {
      for (int32_t i = 0; i < run.count; ++i) {
        const int64_t position = run.first_position + i;
        if (position < 4 || position > 148 - 10) continue;
        const auto spoil = [&](const void* rows, int64_t row_bytes) {
          std::memset(&p.memory[reinterpret_cast<uintptr_t>(rows) +
                                static_cast<size_t>((run.first_slot + i) * row_bytes)],
                      0xff, static_cast<size_t>(row_bytes));
        };
        spoil(run.k_rows, p.shape.k_row_bytes);
        spoil(run.v_rows, p.shape.v_row_bytes);
      }
    }
    ExpectClose(p, Attend(*device_, p), want);
  }
}

// Rows that share positions, gaps between positions, queries anywhere.
TEST_P(AttentionContractTest, SharedPositionsAndGaps) {
  for (const KvType type : {KvType::kBF16, KvType::kF32}) {
    Case c;
    c.kv_heads = 1;
    c.q_heads = 1;
    c.k_dim = c.v_dim = 32;
    c.k_type = c.v_type = type;
    c.page_tokens = 5;
    c.sequences = {{90, 6}};
    Problem p = MakeProblem(c);
    int64_t previous = 0;
    std::mt19937 random(9);
    for (KvRun& run : p.runs) {
      run.first_position = previous + static_cast<int64_t>(random() % 3) * 37;
      if (run.count > 0) previous = run.first_position + run.count - 1;
    }
    p.q_positions = {0, 3, previous / 2, previous, previous + 500, -1};
    HostKernelDevice host;
    ExpectClose(p, Attend(*device_, p), Attend(host, p));
  }
}

TEST_P(AttentionContractTest, PagingDoesNotChangeABit) {
  for (const KvType type : {KvType::kF16, KvType::kQ8_0, KvType::kF32}) {
    Case c;
    c.kv_heads = 1;
    c.q_heads = 2;
    c.k_dim = c.v_dim = 32;
    c.k_type = c.v_type = type;
    c.sequences = {{150, 3}};
    const Problem p = MakeProblem(c);
    const Result whole = Attend(*device_, p);
    // The same rows, every run cut in two, and all rows moved to pages of one row.
    Problem cut = p;
    cut.runs.clear();
    for (const KvRun& run : p.runs) {
      KvRun first = run;
      first.count = run.count / 2;
      KvRun second = run;
      second.first_slot += first.count;
      second.first_position += first.count;
      second.count -= first.count;
      cut.runs.push_back(first);
      cut.runs.push_back(second);
    }
    cut.sequences[0].num_runs = static_cast<int64_t>(cut.runs.size());
    const Result other = Attend(*device_, cut);
    EXPECT_EQ(std::memcmp(whole.out.data(), other.out.data(), whole.out.size() * 4), 0);
    EXPECT_EQ(std::memcmp(whole.lse.data(), other.lse.data(), whole.lse.size() * 4), 0);
  }
}

TEST_P(AttentionContractTest, RandomBatches) {
  for (uint32_t seed = 1; seed <= 24; ++seed) {
    std::mt19937 random(seed);
    const auto below = [&](uint32_t n) { return static_cast<int>(random() % n); };
    Case c;
    c.seed = seed;
    c.kv_heads = 1 + below(3);
    c.q_heads = c.kv_heads * (1 + below(5));
    c.k_type = kAllTypes[below(11)];
    c.v_type = random() % 2 == 0 ? c.k_type : kAllTypes[below(11)];
    c.k_dim = IsBlockType(c.k_type) ? 32 * (1 + below(3)) : 1 + below(100);
    c.v_dim = IsBlockType(c.v_type) ? 32 * (1 + below(3)) : 1 + below(100);
    c.mask = static_cast<AttentionMask>(below(5));
    c.window = 1 + below(90);
    c.keep = below(20);
    c.page_tokens = 1 + below(40);
    c.row_pad = 4 * below(5);
    c.misalign = 4 * below(5);
    c.sequences.clear();
    for (int i = below(3); i >= 0; --i) {
      const int64_t rows = below(140);
      c.sequences.push_back({rows, std::min<int64_t>(rows, below(6))});
    }
    Check(c);
  }
}

AttentionBatch BatchOf(int64_t num_sequences, int64_t max_rows, int64_t max_queries) {
  AttentionBatch batch{};
  batch.all.shape = {
      32, 8, 128, 128, KvType::kF16, KvType::kF16, 8 * 256, 2048, 0.1f, AttentionMask::kCausal,
      1,  0};
  batch.num_sequences = num_sequences;
  batch.max_rows = max_rows;
  batch.max_queries = max_queries;
  batch.all.num_queries = num_sequences * max_queries;
  batch.all.num_runs = num_sequences * (max_rows / 256 + 1);
  return batch;
}

TEST(AttentionPlanTest, WorkIsDividedWithoutLossAndFitsTheDevice) {
  for (const int32_t limit : {99 * 1024, 163 * 1024, 226 * 1024}) {
    for (const int64_t rows : {0, 1, 255, 8192, 131071, 10000000}) {
      for (const int64_t sequences : {1, 64, 5000}) {
        for (const int64_t queries : {1, 4, 5, 2048}) {
          const AttentionBatch batch = BatchOf(sequences, rows, queries);
          AttentionPlan plan;
          ASSERT_STREQ(PlanAttention(batch, limit, &plan), nullptr);
          EXPECT_LE(plan.shared_bytes, limit);
          EXPECT_EQ(plan.chunk_rows % plan.tile_rows, 0);
          EXPECT_GE(int64_t{plan.num_chunks} * plan.chunk_rows, rows);
          EXPECT_LT(int64_t{plan.num_chunks - 1} * plan.chunk_rows, std::max<int64_t>(rows, 1));
          EXPECT_GE(int64_t{plan.row_blocks} * plan.block_rows, 4 * queries);
          // Merging costs a small part of what the KV rows do.
          EXPECT_TRUE(plan.num_chunks == 1 || plan.chunk_rows >= 256);
        }
      }
    }
  }
}

// The case whose speed is promised: a batch of 64 × 8 K rows.
TEST(AttentionPlanTest, ADecodeStepKeepsEnoughBytesInFlight) {
  AttentionPlan plan;
  ASSERT_STREQ(PlanAttention(BatchOf(64, 8192, 1), 226 * 1024, &plan), nullptr);
  EXPECT_EQ(plan.block_rows, kDecodeRows);
  EXPECT_EQ(plan.stages, 2);
  EXPECT_EQ(plan.k.raw_pitch, 0);
  // 228 KiB of shared memory a multiprocessor, 1 KiB of it reserved a block.
  const int blocks = 228 * 1024 / (plan.shared_bytes + 1024);
  EXPECT_GE(blocks * (plan.k.stage_bytes + plan.v.stage_bytes), 64 * 1024);
  // Rounds of blocks on 132 multiprocessors: the last one is a small part.
  EXPECT_GE(64 * 8 * plan.num_chunks, 6 * 132 * blocks);
}

TEST(AttentionPlanTest, WhatNoDeviceCanDoIsNamed) {
  const auto names = [](const AttentionBatch& batch, int32_t limit, const char* what) {
    AttentionPlan plan;
    const char* wrong = PlanAttention(batch, limit, &plan);
    return wrong != nullptr && std::string(wrong).find(what) != std::string::npos;
  };
  AttentionBatch batch = BatchOf(1, 100, 1);
  EXPECT_TRUE(names(batch, 0, "shared memory"));
  batch.all.shape.v_dim = 513;
  batch.all.shape.v_row_bytes = 1 << 20;
  EXPECT_TRUE(names(batch, 226 * 1024, "v_dim"));
  batch = BatchOf(1, 100, 1);
  batch.all.shape.k_dim = 0;
  EXPECT_TRUE(names(batch, 226 * 1024, "k_dim"));
  EXPECT_TRUE(names(BatchOf(65536, 100, 1), 226 * 1024, "num_sequences"));
  EXPECT_TRUE(names(BatchOf(1, int64_t{1} << 31, 1), 226 * 1024, "max_rows"));
  EXPECT_TRUE(names(BatchOf(1, 100, int64_t{1} << 36), 226 * 1024, "max_queries"));
}

TEST(AttentionBatchTest, WhatCannotWorkIsNamed) {
  Case c;
  c.sequences = {{20, 2}, {30, 1}};
  const Problem p = MakeProblem(c);
  std::vector<KvRun> runs = p.runs;
  for (KvRun& run : runs) {
    run.k_rows = p.memory.data() + reinterpret_cast<uintptr_t>(run.k_rows);
    run.v_rows = p.memory.data() + reinterpret_cast<uintptr_t>(run.v_rows);
  }
  std::vector<float> out(3 * 4 * 64);
  AttentionBatch good{};
  good.all = {p.shape,
              runs.data(),
              static_cast<int64_t>(runs.size()),
              p.q.data(),
              p.q_positions.data(),
              3,
              out.data(),
              nullptr};
  good.sequences = p.sequences.data();
  good.num_sequences = 2;
  good.max_rows = 30;
  good.max_queries = 2;
  ASSERT_STREQ(CheckAttentionBatch(good), nullptr);
  const auto names = [&](auto&& spoil, const char* field) {
    AttentionBatch bad = good;
    spoil(bad);
    const char* wrong = CheckAttentionBatch(bad);
    return wrong != nullptr && std::string(wrong).find(field) != std::string::npos;
  };
  EXPECT_TRUE(names([](AttentionBatch& b) { b.max_rows = 29; }, "max_rows"));
  EXPECT_TRUE(names([](AttentionBatch& b) { b.max_queries = 1; }, "max_queries"));
  EXPECT_TRUE(names([](AttentionBatch& b) { b.num_sequences = 1; }, "num_runs"));
  EXPECT_TRUE(names([](AttentionBatch& b) { b.sequences = nullptr; }, "num_sequences"));
  EXPECT_TRUE(names([](AttentionBatch& b) { b.all.num_queries = 2; }, "queries"));
  EXPECT_TRUE(names([](AttentionBatch& b) { b.values_are_keys = true; }, "values_are_keys"));
  std::vector<AttentionSequence> swapped = p.sequences;
  std::swap(swapped[0], swapped[1]);
  EXPECT_TRUE(names([&](AttentionBatch& b) { b.sequences = swapped.data(); }, "runs"));
}

#ifdef PAGETIDE_EMULATED_CUDA
INSTANTIATE_TEST_SUITE_P(Devices, AttentionContractTest, testing::Values("emulated"),
#else
INSTANTIATE_TEST_SUITE_P(Devices, AttentionContractTest, testing::Values("host", "cuda"),
#endif
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace pagetide::kernels
