// Attention over pages against a naive reference in double, and the property the service rests on:
// how rows are paged and how queries are chunked does not change one bit.
#include "kernels/paged_attention.h"

#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/simd.h"

namespace pagetide::kernels {
namespace {

struct Problem {
  AttentionShape shape;
  std::vector<int64_t> key_positions;
  std::vector<float> k;  // [rows, num_kv_heads, k_dim], values the type can hold
  std::vector<float> v;
  std::vector<int64_t> q_positions;
  std::vector<float> q;
  int64_t rows() const { return static_cast<int64_t>(key_positions.size()); }
};

Problem MakeProblem(uint32_t seed, AttentionShape shape, std::vector<int64_t> key_positions,
                    std::vector<int64_t> q_positions) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Problem p{shape, std::move(key_positions), {}, {}, std::move(q_positions), {}};
  p.shape.k_row_bytes = EncodedBytes(shape.k_type, shape.num_kv_heads * shape.k_dim);
  p.shape.v_row_bytes = EncodedBytes(shape.v_type, shape.num_kv_heads * shape.v_dim);
  const auto fill = [&](KvType type, size_t count, std::vector<float>* out) {
    out->resize(count);
    for (float& x : *out) x = normal(random);
    std::vector<char> narrow(EncodedBytes(type, count));
    NarrowFromF32(type, out->data(), count, narrow.data());
    WidenToF32(type, narrow.data(), count, out->data());
  };
  fill(shape.k_type, p.rows() * shape.num_kv_heads * shape.k_dim, &p.k);
  fill(shape.v_type, p.rows() * shape.num_kv_heads * shape.v_dim, &p.v);
  fill(KvType::kF32, p.q_positions.size() * shape.num_q_heads * shape.k_dim, &p.q);
  return p;
}

std::vector<int64_t> Iota(int64_t first, int64_t count) {
  std::vector<int64_t> out(count);
  for (int64_t i = 0; i < count; ++i) out[i] = first + i;
  return out;
}

AttentionShape Shape(int q_heads, int kv_heads, int dim, KvType type) {
  return AttentionShape{q_heads,
                        kv_heads,
                        dim,
                        dim,
                        type,
                        type,
                        0,
                        0,
                        1.0f / std::sqrt(static_cast<float>(dim)),
                        AttentionMask::kCausal,
                        0};
}

// Rows laid out in pages of the canonical layout with two layers, of which the second is used.
// Extents start at arbitrary slots: `page_tokens` slots a page, each page filled from a random slot
// on.
class Paging {
 public:
  Paging(const Problem& p, int page_tokens, uint32_t seed) {
    std::mt19937 random(seed);
    const int64_t layer_bytes = page_tokens * (p.shape.k_row_bytes + p.shape.v_row_bytes);
    int64_t row = 0;
    while (row < p.rows()) {
      int32_t slot = seed == 0 ? 0 : static_cast<int32_t>(random() % page_tokens);
      // One odd byte in front: no alignment may be assumed.
      pages_.push_back(std::make_unique<std::vector<char>>(2 * layer_bytes + 1, '\x5a'));
      char* k = pages_.back()->data() + 1 + layer_bytes;
      char* v = k + page_tokens * p.shape.k_row_bytes;
      while (slot < page_tokens && row < p.rows()) {
        const int64_t first = row;
        const int32_t first_slot = slot;
        do {
          NarrowFromF32(p.shape.k_type, &p.k[row * p.shape.num_kv_heads * p.shape.k_dim],
                        p.shape.num_kv_heads * p.shape.k_dim, k + slot * p.shape.k_row_bytes);
          NarrowFromF32(p.shape.v_type, &p.v[row * p.shape.num_kv_heads * p.shape.v_dim],
                        p.shape.num_kv_heads * p.shape.v_dim, v + slot * p.shape.v_row_bytes);
          ++row;
          ++slot;
        } while (slot < page_tokens && row < p.rows() &&
                 p.key_positions[row] == p.key_positions[row - 1] + 1);
        runs_.push_back(KvRun{k, v, p.key_positions[first], first_slot, slot - first_slot});
      }
    }
  }
  const std::vector<KvRun>& runs() const { return runs_; }

 private:
  std::vector<std::unique_ptr<std::vector<char>>> pages_;
  std::vector<KvRun> runs_;
};

struct Result {
  std::vector<float> out;
  std::vector<float> lse;
  bool SameBits(const Result& other) const {
    return out.size() == other.out.size() && lse.size() == other.lse.size() &&
           std::memcmp(out.data(), other.out.data(), out.size() * 4) == 0 &&
           std::memcmp(lse.data(), other.lse.data(), lse.size() * 4) == 0;
  }
};

// Queries are handed over `chunk` at a time.
Result Attend(const Problem& p, const std::vector<KvRun>& runs, int64_t chunk,
              Isa isa = Isa::kBest) {
  const int64_t num_queries = static_cast<int64_t>(p.q_positions.size());
  Result result;
  result.out.assign(num_queries * p.shape.num_q_heads * p.shape.v_dim, NAN);
  result.lse.assign(num_queries * p.shape.num_q_heads, NAN);
  for (int64_t first = 0; first < num_queries; first += chunk) {
    AttentionArgs args{p.shape,
                       runs.data(),
                       static_cast<int64_t>(runs.size()),
                       &p.q[first * p.shape.num_q_heads * p.shape.k_dim],
                       &p.q_positions[first],
                       std::min(chunk, num_queries - first),
                       &result.out[first * p.shape.num_q_heads * p.shape.v_dim],
                       &result.lse[first * p.shape.num_q_heads]};
    EXPECT_EQ(CheckAttentionArgs(args), nullptr);
    AttendHost(args, isa);
  }
  return result;
}

bool Sees(const AttentionShape& shape, int64_t p1, int64_t p0) {
  switch (shape.mask) {
    case AttentionMask::kCausal:
      return p0 <= p1;
    case AttentionMask::kWindowStandard:
      return p0 <= p1 && !(p1 - p0 >= shape.window);
    case AttentionMask::kWindowChunked:
      return p0 <= p1 && !(p0 < p1 / shape.window * shape.window);
    case AttentionMask::kWindowSymmetric:
      return !(std::abs(p1 - p0) > shape.window / 2);
    case AttentionMask::kWindowRing:
      return p0 <= p1 && (p1 - p0 < shape.window || p0 < shape.keep);
  }
  return false;
}

void ExpectNearNaive(const Problem& p, const Result& result) {
  const AttentionShape& s = p.shape;
  const int group = s.num_q_heads / s.num_kv_heads;
  for (size_t i = 0; i < p.q_positions.size(); ++i) {
    for (int h = 0; h < s.num_q_heads; ++h) {
      std::vector<double> weight(p.rows(), 0.0);
      double sum = 0.0;
      for (int64_t j = 0; j < p.rows(); ++j) {
        if (!Sees(s, p.q_positions[i], p.key_positions[j])) continue;
        double score = 0.0;
        for (int d = 0; d < s.k_dim; ++d) {
          score += static_cast<double>(p.q[(i * s.num_q_heads + h) * s.k_dim + d]) *
                   p.k[(j * s.num_kv_heads + h / group) * s.k_dim + d];
        }
        weight[j] = std::exp(score * s.scale);
        sum += weight[j];
      }
      const float lse = result.lse[i * s.num_q_heads + h];
      if (sum == 0.0) {
        ASSERT_TRUE(std::isinf(lse) && lse < 0);
      } else {
        ASSERT_NEAR(lse, std::log(sum), 1e-4);
      }
      for (int d = 0; d < s.v_dim; ++d) {
        double expected = 0.0;
        for (int64_t j = 0; j < p.rows(); ++j) {
          expected += weight[j] * p.v[(j * s.num_kv_heads + h / group) * s.v_dim + d];
        }
        if (sum > 0.0) expected /= sum;
        ASSERT_NEAR(result.out[(i * s.num_q_heads + h) * s.v_dim + d], expected, 2e-5)
            << "query " << i << " head " << h << " element " << d;
      }
    }
  }
}

TEST(PagedAttentionTest, MatchesNaiveReferenceForAllTypesAndHeadGroupings) {
  for (const KvType type : {KvType::kF32, KvType::kF16, KvType::kBF16}) {
    for (const auto& [q_heads, kv_heads, dim] :
         {std::tuple{8, 2, 32}, std::tuple{4, 4, 64}, std::tuple{6, 1, 20}, std::tuple{1, 1, 1}}) {
      const Problem p =
          MakeProblem(11, Shape(q_heads, kv_heads, dim, type), Iota(0, 150), Iota(100, 50));
      ExpectNearNaive(p, Attend(p, Paging(p, 16, 3).runs(), 50));
    }
  }
}

TEST(PagedAttentionTest, ValueWidthMayDifferFromKeyWidth) {
  AttentionShape shape = Shape(4, 2, 24, KvType::kF16);
  shape.v_dim = 40;
  shape.v_type = KvType::kBF16;
  const Problem p = MakeProblem(12, shape, Iota(0, 90), Iota(60, 30));
  ExpectNearNaive(p, Attend(p, Paging(p, 32, 5).runs(), 30));
}

TEST(PagedAttentionTest, WindowMasksFollowTheirDefinition) {
  for (const AttentionMask mask : {AttentionMask::kWindowStandard, AttentionMask::kWindowChunked,
                                   AttentionMask::kWindowSymmetric}) {
    for (const int64_t window : {1, 4, 63, 100}) {
      AttentionShape shape = Shape(2, 1, 8, KvType::kF32);
      shape.mask = mask;
      shape.window = window;
      const Problem p = MakeProblem(13, shape, Iota(0, 200), Iota(0, 200));
      ExpectNearNaive(p, Attend(p, Paging(p, 16, 0).runs(), 200));
    }
  }
}

TEST(PagedAttentionTest, ARingSeesWhatItKeepsAndTheNewest) {
  for (const int64_t keep : {0, 3, 64, 70, 190}) {
    for (const int64_t window : {1, 20, 100}) {
      AttentionShape shape = Shape(2, 1, 8, KvType::kF32);
      shape.mask = AttentionMask::kWindowRing;
      shape.window = window;
      shape.keep = keep;
      const Problem p = MakeProblem(16, shape, Iota(0, 200), Iota(0, 200));
      const Result whole = Attend(p, Paging(p, 16, 0).runs(), 200);
      ExpectNearNaive(p, whole);
      EXPECT_TRUE(whole.SameBits(Attend(p, Paging(p, 7, 5).runs(), 13)));
    }
  }
}

TEST(PagedAttentionTest, WhatLiesBetweenTheKeptRowsAndTheRingMayHoldAnything) {
  AttentionShape shape = Shape(2, 1, 8, KvType::kF32);
  shape.mask = AttentionMask::kWindowRing;
  shape.window = 10;
  shape.keep = 4;
  // All in one block, and over several.
  for (const int64_t last : {40, 300}) {
    const Problem p = MakeProblem(17, shape, Iota(0, last + 1), {last});
    Problem damaged = p;
    for (int64_t row = 4; row <= last - 10; ++row) {
      for (int d = 0; d < 8; ++d) damaged.k[row * 8 + d] = damaged.v[row * 8 + d] = NAN;
    }
    EXPECT_TRUE(Attend(p, Paging(p, 16, 0).runs(), 1)
                    .SameBits(Attend(damaged, Paging(damaged, 16, 0).runs(), 1)));
  }
}

TEST(PagedAttentionTest, HolesAndSharedPositionsAreTakenInOrder) {
  std::vector<int64_t> positions = Iota(0, 40);
  for (const int64_t x : {40, 40, 41, 41, 41, 90, 91, 300, 301}) positions.push_back(x);
  const Problem p = MakeProblem(14, Shape(2, 2, 16, KvType::kF32), positions, {0, 39, 41, 95, 400});
  const Result whole = Attend(p, Paging(p, 64, 0).runs(), 5);
  ExpectNearNaive(p, whole);
  for (uint32_t seed = 1; seed < 20; ++seed) {
    EXPECT_TRUE(whole.SameBits(Attend(p, Paging(p, 1 + seed % 9, seed).runs(), 2))) << seed;
  }
}

TEST(PagedAttentionTest, QueryThatSeesNoKeyGivesZeroAndMinusInfinity) {
  const Problem p = MakeProblem(15, Shape(2, 1, 8, KvType::kF16), Iota(10, 20), {9, 10});
  const Result result = Attend(p, Paging(p, 8, 0).runs(), 2);
  for (int i = 0; i < 16; ++i) EXPECT_EQ(result.out[i], 0.0f);
  EXPECT_TRUE(std::isinf(result.lse[0]) && result.lse[0] < 0);
  EXPECT_FALSE(std::isinf(result.lse[2]));
}

TEST(PagedAttentionTest, AnyPagingAndAnyChunkingGiveTheSameBits) {
  for (const KvType type : {KvType::kF32, KvType::kF16, KvType::kBF16}) {
    const Problem p = MakeProblem(21, Shape(8, 2, 32, type), Iota(0, 333), Iota(0, 333));
    const Result reference = Attend(p, Paging(p, 4096, 0).runs(), 333);
    for (uint32_t seed = 1; seed <= 12; ++seed) {
      std::mt19937 random(seed);
      const int page_tokens = 1 + static_cast<int>(random() % 100);
      const int64_t chunk = 1 + static_cast<int64_t>(random() % 70);
      EXPECT_TRUE(reference.SameBits(Attend(p, Paging(p, page_tokens, seed).runs(), chunk)))
          << "seed " << seed << ", page of " << page_tokens << ", chunk " << chunk;
    }
  }
}

TEST(PagedAttentionTest, RowsThatTheMaskHidesDoNotMatter) {
  // A query gives the same bits whether or not later rows exist already, and under a window whether
  // or not the rows before it were reclaimed.
  AttentionShape shape = Shape(4, 2, 16, KvType::kF16);
  const Problem all = MakeProblem(22, shape, Iota(0, 200), {120});
  Problem fewer = all;
  fewer.key_positions.resize(121);
  EXPECT_TRUE(Attend(all, Paging(all, 16, 0).runs(), 1)
                  .SameBits(Attend(fewer, Paging(fewer, 16, 0).runs(), 1)));

  Problem windowed = all;
  windowed.shape.mask = AttentionMask::kWindowStandard;
  windowed.shape.window = 50;
  Problem reclaimed = windowed;
  const int64_t dropped = 71;
  reclaimed.key_positions.erase(reclaimed.key_positions.begin(),
                                reclaimed.key_positions.begin() + dropped);
  reclaimed.k.erase(reclaimed.k.begin(), reclaimed.k.begin() + dropped * 32);
  reclaimed.v.erase(reclaimed.v.begin(), reclaimed.v.begin() + dropped * 32);
  EXPECT_TRUE(Attend(windowed, Paging(windowed, 16, 0).runs(), 1)
                  .SameBits(Attend(reclaimed, Paging(reclaimed, 16, 0).runs(), 1)));
}

TEST(PagedAttentionTest, EveryInstructionSetGivesTheSameBits) {
  const Problem p = MakeProblem(23, Shape(8, 2, 32, KvType::kF16), Iota(0, 300), Iota(200, 100));
  const Paging paging(p, 64, 0);
  EXPECT_TRUE(Attend(p, paging.runs(), 100, Isa::kBest)
                  .SameBits(Attend(p, paging.runs(), 100, Isa::kBaseline)));
}

TEST(PagedAttentionTest, OneFlippedBitOfOneRowChangesTheResult) {
  const Problem p = MakeProblem(24, Shape(2, 1, 16, KvType::kF16), Iota(0, 100), {99});
  const Result before = Attend(p, Paging(p, 16, 0).runs(), 1);
  Problem flipped = p;
  flipped.k[50 * 16 + 3] = -flipped.k[50 * 16 + 3];
  EXPECT_FALSE(before.SameBits(Attend(flipped, Paging(flipped, 16, 0).runs(), 1)));
}

TEST(PagedAttentionTest, PartialResultsMergeThroughTheLogSumExp) {
  const Problem p = MakeProblem(25, Shape(2, 1, 16, KvType::kF32), Iota(0, 200), {199});
  const Paging paging(p, 50, 0);
  const Result whole = Attend(p, paging.runs(), 1);
  const std::vector<KvRun> head(paging.runs().begin(), paging.runs().begin() + 1);
  const std::vector<KvRun> rest(paging.runs().begin() + 1, paging.runs().end());
  const Result a = Attend(p, head, 1);
  const Result b = Attend(p, rest, 1);
  for (int h = 0; h < 2; ++h) {
    const double top = std::max(a.lse[h], b.lse[h]);
    const double wa = std::exp(a.lse[h] - top);
    const double wb = std::exp(b.lse[h] - top);
    EXPECT_NEAR(top + std::log(wa + wb), whole.lse[h], 1e-5);
    for (int d = 0; d < 16; ++d) {
      EXPECT_NEAR((wa * a.out[h * 16 + d] + wb * b.out[h * 16 + d]) / (wa + wb),
                  whole.out[h * 16 + d], 1e-5);
    }
  }
}

TEST(PagedAttentionTest, ArgumentsThatCannotWorkAreNamed) {
  const Problem p = MakeProblem(26, Shape(4, 2, 8, KvType::kF32), Iota(0, 20), {5});
  const Paging paging(p, 8, 0);
  std::vector<float> out(32);
  AttentionArgs args{p.shape, paging.runs().data(), 3,      p.q.data(), p.q_positions.data(),
                     1,       out.data(),           nullptr};
  EXPECT_EQ(CheckAttentionArgs(args), nullptr);
  AttentionArgs bad = args;
  bad.shape.num_q_heads = 3;
  EXPECT_NE(std::string(CheckAttentionArgs(bad)).find("num_q_heads"), std::string::npos);
  bad = args;
  bad.shape.k_row_bytes -= 1;
  EXPECT_NE(std::string(CheckAttentionArgs(bad)).find("k_row_bytes"), std::string::npos);
  std::vector<KvRun> swapped = paging.runs();
  std::swap(swapped[0], swapped[1]);
  bad = args;
  bad.runs = swapped.data();
  EXPECT_NE(std::string(CheckAttentionArgs(bad)).find("positions"), std::string::npos);
}

TEST(SimdTest, ExpIsWithinTwoUlpAndMasksExactly) {
  double worst = 0.0;
  for (int i = 0; i <= 870000; ++i) {
    const float x = -1e-4f * static_cast<float>(i);
    const double exact = std::exp(static_cast<double>(x));
    worst = std::max(worst, std::abs(Exp1(x) - exact) / exact);
  }
  EXPECT_LT(worst, 2.4e-7);
  EXPECT_EQ(Exp1(0.0f), 1.0f);
  EXPECT_EQ(Exp1(-std::numeric_limits<float>::infinity()), 0.0f);
  EXPECT_EQ(Exp1(-88.0f), 0.0f);
}

}  // namespace
}  // namespace pagetide::kernels
