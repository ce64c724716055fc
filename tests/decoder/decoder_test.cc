#include "decoder/decoder.h"

#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "decoder/local_kv_backend.h"
#include "gtest/gtest.h"

namespace pagetide {
namespace {

DecoderConfig SmallConfig() {
  DecoderConfig config;
  config.num_layers = 2;
  config.width = 64;
  config.num_q_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 16;
  config.ffn_width = 100;  // not a multiple of a panel
  return config;
}

std::vector<uint32_t> Text(int64_t num_tokens) {
  std::string text;
  while (static_cast<int64_t>(text.size()) < num_tokens) {
    text += "Everyone is permitted to copy and distribute verbatim copies of this document. ";
  }
  std::vector<uint32_t> tokens = TokensOf(text);
  tokens.resize(num_tokens);
  return tokens;
}

bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Keeps rows in small pages scattered over the heap and finds them by runs: what a paging service
// does.
class PagedKvBackend final : public KvBackend {
 public:
  PagedKvBackend(const DecoderConfig& config, int page_tokens)
      : config_(config), shape_(AttentionShapeOf(config)), page_tokens_(page_tokens) {}

  int64_t length() const override { return length_; }
  absl::Status BeginAppend(std::span<const uint32_t> tokens) override {
    pending_ = static_cast<int64_t>(tokens.size());
    const int64_t page_bytes = config_.num_layers * 2 * page_tokens_ * config_.row_bytes();
    while (static_cast<int64_t>(pages_.size()) * page_tokens_ < length_ + pending_) {
      pages_.push_back(std::make_unique<std::vector<std::byte>>(page_bytes));
    }
    return absl::OkStatus();
  }
  absl::Status AppendRows(int layer, std::span<const std::byte> k,
                          std::span<const std::byte> v) override {
    const int64_t bytes = config_.row_bytes();
    for (int64_t i = 0; i < pending_; ++i) {
      std::memcpy(Row(layer, length_ + i, 0), k.data() + i * bytes, bytes);
      std::memcpy(Row(layer, length_ + i, 1), v.data() + i * bytes, bytes);
    }
    return absl::OkStatus();
  }
  absl::Status Attend(int layer, std::span<const float> q, std::span<float> out) override {
    std::vector<kernels::KvRun> runs;
    for (int64_t first = 0; first < length_ + pending_; first += page_tokens_) {
      runs.push_back(
          {Row(layer, first, 0), Row(layer, first, 1), first, 0,
           static_cast<int32_t>(std::min<int64_t>(page_tokens_, length_ + pending_ - first))});
    }
    std::vector<int64_t> positions(pending_);
    std::iota(positions.begin(), positions.end(), length_);
    kernels::AttendHost(kernels::AttentionArgs{shape_, runs.data(),
                                               static_cast<int64_t>(runs.size()), q.data(),
                                               positions.data(), pending_, out.data(), nullptr});
    return absl::OkStatus();
  }
  absl::Status Commit() override {
    length_ += pending_;
    pending_ = 0;
    return absl::OkStatus();
  }
  void Abort() override { pending_ = 0; }
  void FlipBit(int layer, int64_t token) { *Row(layer, token, 1) ^= std::byte{0x01}; }

 private:
  std::byte* Row(int layer, int64_t token, int kind) {
    return pages_[token / page_tokens_]->data() +
           ((layer * 2 + kind) * page_tokens_ + token % page_tokens_) * config_.row_bytes();
  }
  const DecoderConfig config_;
  const kernels::AttentionShape shape_;
  const int64_t page_tokens_;
  std::vector<std::unique_ptr<std::vector<std::byte>>> pages_;
  int64_t length_ = 0;
  int64_t pending_ = 0;
};

TEST(DecoderTest, EveryChunkSizeGivesTheSameLogits) {
  for (const kernels::KvType type :
       {kernels::KvType::kF16, kernels::KvType::kF32, kernels::KvType::kBF16}) {
    DecoderConfig config = SmallConfig();
    config.kv_type = type;
    auto decoder = Decoder::Create(config).value();
    const std::vector<uint32_t> tokens = Text(600);
    LocalKvBackend oracle(config);
    const std::vector<float> expected =
        decoder->Forward(tokens, oracle, Decoder::LogitsOf::kAllTokens).value();
    for (const size_t chunk : {1u, 7u, 64u, 256u, 512u}) {
      LocalKvBackend kv(config);
      std::vector<float> logits;
      for (size_t begin = 0; begin < tokens.size(); begin += chunk) {
        const size_t count = std::min(chunk, tokens.size() - begin);
        const auto part = decoder->Forward(std::span(tokens).subspan(begin, count), kv,
                                           Decoder::LogitsOf::kAllTokens);
        ASSERT_TRUE(part.ok()) << part.status();
        logits.insert(logits.end(), part->begin(), part->end());
      }
      EXPECT_TRUE(SameBits(logits, expected)) << "chunk " << chunk;
    }
  }
}

TEST(DecoderTest, EveryPagingGivesTheSameLogits) {
  const DecoderConfig config;  // the full model
  auto decoder = Decoder::Create(config).value();
  const std::vector<uint32_t> tokens = Text(300);
  LocalKvBackend oracle(config);
  const std::vector<float> expected = decoder->Prefill(tokens, oracle, 512).value();
  for (const int page_tokens : {1, 16, 100, 256}) {
    PagedKvBackend kv(config, page_tokens);
    EXPECT_TRUE(SameBits(decoder->Prefill(tokens, kv, 64).value(), expected)) << page_tokens;
  }
}

TEST(DecoderTest, DecodingTokenByTokenEqualsPrefillOfTheSameTokens) {
  const DecoderConfig config = SmallConfig();
  auto decoder = Decoder::Create(config).value();
  std::vector<uint32_t> tokens = Text(100);
  LocalKvBackend kv(config);
  std::vector<float> logits = decoder->Prefill(tokens, kv).value();
  for (int i = 0; i < 50; ++i) {
    tokens.push_back(Decoder::Greedy(logits));
    logits = decoder->Forward(std::span(tokens).last(1), kv).value();
  }
  LocalKvBackend at_once(config);
  EXPECT_TRUE(SameBits(decoder->Prefill(tokens, at_once).value(), logits));
  EXPECT_EQ(decoder->computed_tokens(), 100 + 50 + 150);
}

TEST(DecoderTest, OneFlippedBitOfOneRowChangesTheLogits) {
  const DecoderConfig config;
  auto decoder = Decoder::Create(config).value();
  std::vector<uint32_t> tokens = Text(200);
  PagedKvBackend clean(config, 64);
  PagedKvBackend flipped(config, 64);
  ASSERT_TRUE(decoder->Prefill(tokens, clean).ok());
  ASSERT_TRUE(decoder->Prefill(tokens, flipped).ok());
  flipped.FlipBit(/*layer=*/0, /*token=*/70);
  tokens.push_back('x');
  EXPECT_FALSE(
      SameBits(decoder->Prefill(tokens, clean).value(), decoder->Prefill(tokens, flipped).value()));
}

TEST(DecoderTest, LogitsDependOnEveryEarlierToken) {
  const DecoderConfig config = SmallConfig();
  auto decoder = Decoder::Create(config).value();
  const std::vector<uint32_t> tokens = Text(80);
  LocalKvBackend kv(config);
  const std::vector<float> expected = decoder->Prefill(tokens, kv).value();
  for (size_t i = 0; i < tokens.size(); ++i) {
    std::vector<uint32_t> other = tokens;
    other[i] = other[i] == 'A' ? 'B' : 'A';
    LocalKvBackend other_kv(config);
    EXPECT_FALSE(SameBits(decoder->Prefill(other, other_kv).value(), expected)) << i;
  }
}

TEST(DecoderTest, WeightsAreAPureFunctionOfSeedAndShape) {
  const auto a = Decoder::Create(DecoderConfig{}).value();
  const auto b = Decoder::Create(DecoderConfig{}).value();
  DecoderConfig other;
  other.seed = 2;
  EXPECT_EQ(a->weights_digest(), b->weights_digest());
  EXPECT_NE(a->weights_digest(), Decoder::Create(other).value()->weights_digest());
  EXPECT_EQ(a->num_parameters(), 2951936);
}

TEST(DecoderTest, LogitsAreFiniteAndSpread) {
  const DecoderConfig config;
  auto decoder = Decoder::Create(config).value();
  LocalKvBackend kv(config);
  const std::vector<float> logits = decoder->Prefill(Text(300), kv).value();
  double sum = 0, squares = 0;
  for (const float x : logits) {
    ASSERT_TRUE(std::isfinite(x));
    sum += x;
    squares += static_cast<double>(x) * x;
  }
  const double mean = sum / logits.size();
  EXPECT_GT(std::sqrt(squares / logits.size() - mean * mean), 0.3);
}

TEST(DecoderTest, RefusesBadInputAndLeavesTheBackendAsItWas) {
  const DecoderConfig config = SmallConfig();
  auto decoder = Decoder::Create(config).value();
  LocalKvBackend kv(config);
  EXPECT_EQ(decoder->Forward({}, kv).status().code(), absl::StatusCode::kInvalidArgument);
  const std::vector<uint32_t> tokens = {1, 2, 257};
  const absl::Status status = decoder->Forward(tokens, kv).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("tokens[2] is 257"), std::string::npos) << status;
  EXPECT_EQ(kv.length(), 0);
  EXPECT_EQ(decoder->computed_tokens(), 0);

  DecoderConfig bad = config;
  bad.num_q_heads = 3;
  EXPECT_EQ(Decoder::Create(bad).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(PackedMatrixTest, MatchesDefinitionAndIsTheSameForEveryRowCountAndInstructionSet) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  const int inputs = 37, outputs = 41, rows = 23;
  std::vector<float> w(inputs * outputs), x(rows * inputs);
  for (float& v : w) v = normal(random);
  for (float& v : x) v = normal(random);
  const PackedMatrix matrix(inputs, outputs, w);
  std::vector<float> y(rows * outputs), baseline(rows * outputs), one(outputs);
  matrix.Multiply(x.data(), rows, y.data());
  matrix.Multiply(x.data(), rows, baseline.data(), kernels::Isa::kBaseline);
  EXPECT_TRUE(SameBits(y, baseline));
  for (int r = 0; r < rows; ++r) {
    matrix.Multiply(&x[r * inputs], 1, one.data());
    for (int n = 0; n < outputs; ++n) {
      float sum = 0.0f;
      for (int k = 0; k < inputs; ++k) {
        volatile float product = x[r * inputs + k] * w[k * outputs + n];
        sum = sum + product;
      }
      ASSERT_EQ(y[r * outputs + n], sum);
      ASSERT_EQ(one[n], sum);
    }
  }
}

}  // namespace
}  // namespace pagetide
