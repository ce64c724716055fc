#include "clients/cpp/attention_merge.h"

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pagetide {
namespace {

using ::testing::HasSubstr;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Softmax over scores [rows, keys] of values [keys, dim], of the keys [begin, end) alone.
struct Softmax {
  Softmax(const std::vector<float>& scores, const std::vector<float>& values, size_t rows,
          size_t keys, size_t dim, size_t begin, size_t end)
      : outputs(rows * dim), log_sum_exp(rows, -kInfinity) {
    for (size_t row = 0; row < rows && begin < end; ++row) {
      double sum = 0;
      for (size_t key = begin; key < end; ++key) sum += std::exp(double{scores[row * keys + key]});
      log_sum_exp[row] = static_cast<float>(std::log(sum));
      for (size_t d = 0; d < dim; ++d) {
        double value = 0;
        for (size_t key = begin; key < end; ++key) {
          value += std::exp(double{scores[row * keys + key]}) / sum * values[key * dim + d];
        }
        outputs[row * dim + d] = static_cast<float>(value);
      }
    }
  }
  AttentionPart part() const { return {outputs, log_sum_exp}; }

  std::vector<float> outputs;
  std::vector<float> log_sum_exp;
};

TEST(MergeAttentionTest, PartsOfAnyCutGiveTheWhole) {
  constexpr size_t kRows = 5, kKeys = 40, kDim = 7;
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (int round = 0; round < 50; ++round) {
    std::vector<float> scores(kRows * kKeys), values(kKeys * kDim);
    for (float& score : scores) score = normal(random) * 10;
    for (float& value : values) value = normal(random);
    const Softmax whole(scores, values, kRows, kKeys, kDim, 0, kKeys);
    std::vector<Softmax> cut;
    for (size_t begin = 0; begin < kKeys;) {  // a part may have no key
      const size_t end = std::min<size_t>(kKeys, begin + random() % 20);
      cut.emplace_back(scores, values, kRows, kKeys, kDim, begin, end);
      begin = end;
    }
    std::vector<AttentionPart> parts;
    for (const Softmax& part : cut) parts.push_back(part.part());
    std::vector<float> outputs(kRows * kDim, NAN), lse(kRows, NAN);
    ASSERT_TRUE(MergeAttention(parts, std::span(outputs), std::span(lse)).ok());
    for (size_t i = 0; i < outputs.size(); ++i) ASSERT_NEAR(outputs[i], whole.outputs[i], 2e-6);
    for (size_t i = 0; i < lse.size(); ++i) ASSERT_NEAR(lse[i], whole.log_sum_exp[i], 4e-6);
    std::vector<float> again(kRows * kDim, NAN);
    ASSERT_TRUE(MergeAttention(parts, std::span(again), {}).ok());
    EXPECT_EQ(again, outputs);
  }
}

TEST(MergeAttentionTest, RowsThatNobodySawAreZero) {
  const std::vector<float> garbage = {NAN, NAN}, none = {-kInfinity};
  const AttentionPart part{garbage, none};
  std::vector<float> outputs = {1, 2}, lse = {3};
  ASSERT_TRUE(MergeAttention({{part, part}}, std::span(outputs), std::span(lse)).ok());
  EXPECT_EQ(outputs, std::vector<float>({0, 0}));
  EXPECT_EQ(lse[0], -kInfinity);
}

TEST(MergeAttentionTest, RefusesWhatDisagreesAndWritesNothing) {
  const std::vector<float> six(6, 1.0f), two(2, 0.0f), three(3, 0.0f), five(5, 1.0f);
  const std::vector<float> nan = {0, NAN}, infinite = {kInfinity, 0};
  std::vector<float> outputs(6, 9.0f), lse(2, 9.0f);
  const auto expect_refused = [&](std::vector<AttentionPart> parts, std::span<float> room,
                                  absl::string_view text) {
    const absl::Status status = MergeAttention(parts, std::span(outputs), room);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(std::string(text)));
    EXPECT_EQ(outputs, std::vector<float>(6, 9.0f));
    EXPECT_EQ(lse, std::vector<float>(2, 9.0f));
  };
  expect_refused({}, std::span(lse), "no parts");
  expect_refused({{six, two}, {six, three}}, std::span(lse), "part 1 has 6 outputs and 3");
  expect_refused({{five, two}}, std::span(lse), "part 0 has 5 outputs");
  expect_refused({{six, {}}}, std::span(lse), "0 log_sum_exp");
  expect_refused({{six, nan}}, std::span(lse), "part 0 has a log_sum_exp of nan");
  expect_refused({{six, two}, {six, infinite}}, std::span(lse), "part 1 has a log_sum_exp of inf");
  expect_refused({{six, two}}, std::span(lse).first(1), "room for 1");
}

}  // namespace
}  // namespace pagetide
