// FEATURES B9 through the service: K of every way to rotate, turned by whole positions, against the
// formulas of docs/kshift.md in float64.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/ascii.h"
#include "tests/conformance/sequence_algebra.h"

namespace pagetide {
namespace {

using ::pagetide::testing::Row;
using ::pagetide::testing::SequenceAlgebraTest;
using ::pagetide::testing::TestRow;
using Scaling = RopeSpec::Scaling;
using Style = RopeSpec::Style;

struct RopeCase {
  const char* name;
  RopeSpec rope;
  bool is_latent = false;
};

std::vector<RopeCase> RopeCases() {
  RopeSpec plain;
  plain.n_rot = 12;
  std::vector<RopeCase> cases;
  for (const Style style : {Style::kNorm, Style::kNeox}) {
    const bool is_norm = style == Style::kNorm;
    plain.style = style;
    cases.push_back({is_norm ? "Norm" : "Neox", plain});
    RopeSpec partial = plain;
    partial.n_rot = 6;
    partial.base = 500'000;
    cases.push_back({is_norm ? "PartialNorm" : "PartialNeox", partial});
    cases.push_back({is_norm ? "LatentNorm" : "LatentNeox", partial, /*is_latent=*/true});
  }
  RopeSpec linear = plain;
  linear.scaling = Scaling::kLinear;
  linear.scale = 0.25;
  cases.push_back({"Linear", linear});
  RopeSpec factors = plain;
  factors.factors = {1, 1, 1.5, 3, 8, 8};
  cases.push_back({"Factors", factors});
  RopeSpec yarn = plain;
  yarn.scaling = Scaling::kYarn;
  yarn.scale = 0.125;
  yarn.yarn_ext_factor = 1;
  yarn.yarn_attn_factor = 1.5;  // was applied when the rows were written
  yarn.yarn_beta_fast = 32;
  yarn.yarn_beta_slow = 1;
  yarn.yarn_original_context = 4096;
  cases.push_back({"Yarn", yarn});
  return cases;
}

// Angle that a row turns by from one position to the next, of each pair.
std::vector<double> Frequencies(const RopeSpec& rope) {
  const double n = rope.n_rot;
  std::vector<double> theta;
  for (uint32_t i = 0; i < rope.n_rot / 2; ++i) {
    const double full =
        std::pow(rope.base, -2.0 * i / n) / (rope.factors.empty() ? 1.0 : rope.factors[i]);
    if (rope.scaling == Scaling::kNone) {
      theta.push_back(full);
      continue;
    }
    double share = 0;  // of the frequency without scale
    if (rope.scaling == Scaling::kYarn) {
      const auto pair_of = [&](double turns) {
        return n * std::log(rope.yarn_original_context / (2 * M_PI * turns)) /
               (2 * std::log(rope.base));
      };
      const double low = std::max(0.0, std::floor(pair_of(rope.yarn_beta_fast)));
      const double high = std::min(n - 1, std::ceil(pair_of(rope.yarn_beta_slow)));
      const double ramp = 1 - std::clamp((i - low) / std::max(0.001, high - low), 0.0, 1.0);
      share = ramp * rope.yarn_ext_factor;
    }
    theta.push_back((1 - share) * rope.scale * full + share * full);
  }
  return theta;
}

class AlgebraRopeTest : public SequenceAlgebraTest, public ::testing::WithParamInterface<RopeCase> {
 protected:
  void SetUp() override {
    ModelSpec spec;
    spec.name = absl::AsciiStrToLower(GetParam().name);
    spec.geometry.page_tokens = 16;
    LayerGroupSpec group;
    group.k_type = group.v_type = DataType::kF32;
    group.kv_heads = GetParam().is_latent ? 1 : 2;
    group.k_dim = GetParam().is_latent ? 20 : 12;
    group.v_dim = GetParam().is_latent ? 0 : 12;
    group.layers = {0, 1};
    group.rope = GetParam().rope;
    spec.geometry.groups.push_back(group);
    StartModel(std::make_shared<const Model>(Model::Create(std::move(spec)).value()), 16);
  }

  std::vector<double> Turned(const Row& row, uint32_t layer) const {
    const GroupGeometry& group = model_->geometry().group(0);
    const LayerGroupSpec& spec = group.spec();
    const std::string written =
        TestRow(group, row.token, static_cast<uint64_t>(row.written_at), layer, RowKind::kK);
    std::vector<float> k(written.size() / sizeof(float));
    std::memcpy(k.data(), written.data(), written.size());
    std::vector<double> out(k.begin(), k.end());
    const std::vector<double> theta = Frequencies(spec.rope);
    const bool is_neox = spec.rope.style == Style::kNeox;
    const uint32_t half = spec.rope.n_rot / 2;
    for (uint32_t head = 0; head < spec.kv_heads; ++head) {
      // What turns of a latent stands behind it.
      double* const x =
          out.data() + head * spec.k_dim + (spec.v_dim == 0 ? spec.k_dim - spec.rope.n_rot : 0);
      for (uint32_t i = 0; i < half; ++i) {
        double& a = x[is_neox ? i : 2 * i];
        double& b = x[is_neox ? i + half : 2 * i + 1];
        const double angle = static_cast<double>(row.position - row.written_at) * theta[i];
        const double turned = a * std::cos(angle) - b * std::sin(angle);
        b = a * std::sin(angle) + b * std::cos(angle);
        a = turned;
      }
    }
    return out;
  }
  // The largest difference of an element of K from what it must be.
  double WorstError(const v1::SequenceState& state, const std::vector<Row>& rows) {
    const auto all = Read(state);
    EXPECT_TRUE(all.ok()) << all.status();
    if (!all.ok()) return INFINITY;
    double worst = 0;
    for (uint32_t layer = 0; layer < 2; ++layer) {
      const std::string& k = all->at({0, layer, v1::ROW_KIND_K});
      std::vector<float> got(k.size() / sizeof(float));
      std::memcpy(got.data(), k.data(), k.size());
      size_t at = 0;
      for (const Row& row : rows) {
        for (double expected : Turned(row, layer)) {
          if (at == got.size()) return INFINITY;
          worst = std::max(worst, std::fabs(got[at++] - expected));
        }
      }
      if (at != got.size()) return INFINITY;
    }
    return worst;
  }
  void Move(std::vector<Row>& rows, int64_t from, int64_t delta) {
    for (Row& row : rows) row.position += row.position >= from ? delta : 0;
  }
};

TEST_P(AlgebraRopeTest, B9TurnsAddUpAndHaveMagnitudeOne) {
  std::vector<Row> rows;
  const auto s = Open(40, &rows);
  const auto written = Read(s);
  ASSERT_OK(written);
  // As often as it likes: what is read is turned once.
  for (const int64_t delta : {4000, -777, 31}) {
    ASSERT_OK(Shift(s, 10, -1, delta));
    Move(rows, 10, delta);
    EXPECT_LE(WorstError(s, rows), 1e-5) << delta;
  }
  // Turned back by the sum, every bit is as it was written.
  ASSERT_OK(Shift(s, 10, -1, -(4000 - 777 + 31)));
  Move(rows, 10, -(4000 - 777 + 31));
  const auto back = Read(s);
  ASSERT_OK(back);
  EXPECT_EQ(*back, *written);
  // R(a) is written back, and then turned by R(b): R(a + b), but for one rounding more each time.
  for (const int64_t delta : {250, 1000}) {
    ASSERT_OK(Shift(s, 10, -1, delta));
    Move(rows, 10, delta);
    v1::CompactSequenceRequest compact;
    *compact.mutable_sequence() = Ref(s);
    compact.set_apply_shifts(true);
    for (uint64_t moved = 1; moved > 0;) {
      auto compacted = Call(&v1::SequenceEditService::StubInterface::Compact, compact);
      ASSERT_OK(compacted);
      moved = compacted->moved_rows();
    }
  }
  EXPECT_LE(WorstError(s, rows), 1e-5);
}

INSTANTIATE_TEST_SUITE_P(Ropes, AlgebraRopeTest, ::testing::ValuesIn(RopeCases()),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace pagetide
