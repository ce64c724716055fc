#include "decoder/decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "decoder/elementwise.h"
#include "kernels/rope.h"

namespace pagetide {
namespace {

// SplitMix64 (Steele, Lea, Flood 2014): one fixed stream a seed, on every machine.
class SplitMix64 {
 public:
  explicit SplitMix64(uint64_t seed) : state_(seed) {}
  uint64_t Next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

 private:
  uint64_t state_;
};

// Draws tensors one after another and digests what it drew.
class WeightSource {
 public:
  explicit WeightSource(uint64_t seed) : random_(seed) {}

  // Uniform in [-limit, limit) with limit = sqrt(3 / fan_in): outputs keep the variance of inputs.
  std::vector<float> Uniform(size_t count, int fan_in) {
    const float limit = std::sqrt(3.0f / static_cast<float>(fan_in));
    std::vector<float> values(count);
    for (float& value : values) {
      // 24 bits are exact in f32, so are the subtraction and the doubling.
      const float unit = static_cast<float>(random_.Next() >> 40) * (1.0f / 16777216.0f);
      value = (2.0f * unit - 1.0f) * limit;
    }
    Record(values);
    return values;
  }
  // Norm weights near 1, not equal, so that a lost factor shows.
  std::vector<float> Norm(size_t count) {
    std::vector<float> values(count);
    for (float& value : values) {
      value = 0.75f + static_cast<float>(random_.Next() >> 40) * (0.5f / 16777216.0f);
    }
    Record(values);
    return values;
  }
  PackedMatrix Matrix(int inputs, int outputs) {
    return PackedMatrix(inputs, outputs, Uniform(static_cast<size_t>(inputs) * outputs, inputs));
  }
  int64_t count() const { return count_; }
  Digest Finish() { return sha_.Finish(); }

 private:
  void Record(const std::vector<float>& values) {
    count_ += static_cast<int64_t>(values.size());
    sha_.AppendField(absl::string_view(reinterpret_cast<const char*>(values.data()),
                                       values.size() * sizeof(float)));
  }

  SplitMix64 random_;
  Sha256 sha_;
  int64_t count_ = 0;
};

}  // namespace

// Buffers of one forward pass. [n, …] means a row a token of the chunk.
struct Decoder::Activations {
  Activations(const DecoderConfig& c, int64_t num_tokens)
      : n(num_tokens),
        residual(n * c.width),
        normed(n * c.width),
        qkv(n * (c.q_width() + 2 * c.kv_width())),
        q(n * c.q_width()),
        k(n * c.kv_width()),
        attended(n * c.q_width()),
        projected(n * c.width),
        gate_up(n * 2 * c.ffn_width),
        gated(n * c.ffn_width),
        cos_sin(n * c.head_dim),
        k_rows(n * c.row_bytes()),
        v_rows(n * c.row_bytes()) {}

  const int64_t n;
  std::vector<float> residual;    // [n, width]
  std::vector<float> normed;      // [n, width]
  std::vector<float> qkv;         // [n, q_width + 2 kv_width]
  std::vector<float> q;           // [n, num_q_heads, head_dim]
  std::vector<float> k;           // [n, num_kv_heads, head_dim]
  std::vector<float> attended;    // [n, num_q_heads, head_dim]
  std::vector<float> projected;   // [n, width]
  std::vector<float> gate_up;     // [n, 2 ffn_width]
  std::vector<float> gated;       // [n, ffn_width]
  std::vector<float> cos_sin;     // [n, head_dim / 2, 2]
  std::vector<std::byte> k_rows;  // [n, row_bytes]
  std::vector<std::byte> v_rows;  // [n, row_bytes]
};

std::vector<uint32_t> TokensOf(absl::string_view text) {
  std::vector<uint32_t> tokens;
  tokens.reserve(text.size() + 1);
  tokens.push_back(DecoderConfig::kBeginOfSequence);
  for (const char c : text) tokens.push_back(static_cast<uint8_t>(c));
  return tokens;
}

absl::StatusOr<std::unique_ptr<Decoder>> Decoder::Create(const DecoderConfig& config) {
  PT_RETURN_IF_ERROR(config.Validate());
  std::unique_ptr<Decoder> decoder(new Decoder(config));
  decoder->InitWeights();
  return decoder;
}

void Decoder::InitWeights() {
  const DecoderConfig& c = config_;
  WeightSource source(c.seed);
  // Fan-in 3 gives rows of unit variance in [-1, 1).
  embedding_ = source.Uniform(static_cast<size_t>(DecoderConfig::kVocabularySize) * c.width, 3);
  layers_.resize(c.num_layers);
  for (Layer& layer : layers_) {
    layer.attention_norm = source.Norm(c.width);
    layer.qkv = source.Matrix(c.width, c.q_width() + 2 * c.kv_width());
    layer.attention_out = source.Matrix(c.q_width(), c.width);
    layer.ffn_norm = source.Norm(c.width);
    layer.gate_up = source.Matrix(c.width, 2 * c.ffn_width);
    layer.down = source.Matrix(c.ffn_width, c.width);
  }
  final_norm_ = source.Norm(c.width);
  unembedding_ = source.Matrix(c.width, DecoderConfig::kVocabularySize);
  num_parameters_ = source.count();
  weights_digest_ = source.Finish();
}

absl::StatusOr<std::vector<float>> Decoder::Forward(std::span<const uint32_t> tokens, KvBackend& kv,
                                                    LogitsOf logits_of) {
  if (tokens.empty()) return absl::InvalidArgumentError("forward pass: no tokens");
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] >= DecoderConfig::kVocabularySize) {
      return absl::InvalidArgumentError(absl::StrCat("forward pass: tokens[", i, "] is ", tokens[i],
                                                     ", the vocabulary has ",
                                                     DecoderConfig::kVocabularySize));
    }
  }
  Activations a(config_, static_cast<int64_t>(tokens.size()));
  absl::Status status = RunLayers(tokens, kv, a);
  if (!status.ok()) {
    kv.Abort();
    return status;
  }
  computed_tokens_.fetch_add(a.n, std::memory_order_relaxed);

  const int64_t rows = logits_of == LogitsOf::kAllTokens ? a.n : 1;
  const float* last = a.residual.data() + (a.n - rows) * config_.width;
  RmsNorm(last, rows, config_.width, final_norm_.data(), config_.norm_epsilon, a.normed.data());
  std::vector<float> logits(rows * DecoderConfig::kVocabularySize);
  unembedding_.Multiply(a.normed.data(), rows, logits.data());
  return logits;
}

absl::Status Decoder::RunLayers(std::span<const uint32_t> tokens, KvBackend& kv,
                                Activations& a) const {
  kernels::RopeParams rope;
  rope.n_rot = config_.head_dim;
  rope.base = config_.rope_base;
  for (int64_t i = 0; i < a.n; ++i) {
    std::memcpy(&a.residual[i * config_.width],
                &embedding_[static_cast<size_t>(tokens[i]) * config_.width],
                sizeof(float) * config_.width);
    kernels::RopeAngles(rope, kv.position_of(i), &a.cos_sin[i * config_.head_dim]);
  }
  PT_RETURN_IF_ERROR(kv.BeginAppend(tokens));
  for (int layer = 0; layer < config_.num_layers; ++layer) {
    PT_RETURN_IF_ERROR(RunLayer(layer, kv, a));
  }
  return kv.Commit();
}

absl::Status Decoder::RunLayer(int index, KvBackend& kv, Activations& a) const {
  const DecoderConfig& c = config_;
  const Layer& layer = layers_[index];
  RmsNorm(a.residual.data(), a.n, c.width, layer.attention_norm.data(), c.norm_epsilon,
          a.normed.data());
  layer.qkv.Multiply(a.normed.data(), a.n, a.qkv.data());

  const int64_t qkv_width = c.q_width() + 2 * c.kv_width();
  for (int64_t i = 0; i < a.n; ++i) {
    const float* row = &a.qkv[i * qkv_width];
    std::memcpy(&a.q[i * c.q_width()], row, sizeof(float) * c.q_width());
    std::memcpy(&a.k[i * c.kv_width()], row + c.q_width(), sizeof(float) * c.kv_width());
    kernels::NarrowFromF32(c.kv_type, row + c.q_width() + c.kv_width(), c.kv_width(),
                           &a.v_rows[i * c.row_bytes()]);
  }
  kernels::RopeArgs rope{};
  rope.params.n_rot = c.head_dim;
  rope.params.base = c.rope_base;
  rope.type = kernels::KvType::kF32;
  rope.head_dim = c.head_dim;
  rope.num_rows = a.n;
  rope.magnitude = 1.0f;
  rope.cos_sin = a.cos_sin.data();
  rope.rows = a.q.data();
  rope.row_bytes = c.q_width() * static_cast<int64_t>(sizeof(float));
  rope.num_heads = c.num_q_heads;
  kernels::RopeHost(rope);
  rope.rows = a.k.data();
  rope.row_bytes = c.kv_width() * static_cast<int64_t>(sizeof(float));
  rope.num_heads = c.num_kv_heads;
  kernels::RopeHost(rope);
  kernels::NarrowFromF32(c.kv_type, a.k.data(), a.n * c.kv_width(), a.k_rows.data());

  PT_RETURN_IF_ERROR(kv.AppendRows(index, a.k_rows, a.v_rows));
  PT_RETURN_IF_ERROR(kv.Attend(index, a.q, a.attended));

  layer.attention_out.Multiply(a.attended.data(), a.n, a.projected.data());
  AddInPlace(a.residual.data(), a.projected.data(), a.n * c.width);
  RmsNorm(a.residual.data(), a.n, c.width, layer.ffn_norm.data(), c.norm_epsilon, a.normed.data());
  layer.gate_up.Multiply(a.normed.data(), a.n, a.gate_up.data());
  SwiGlu(a.gate_up.data(), a.n, c.ffn_width, a.gated.data());
  layer.down.Multiply(a.gated.data(), a.n, a.projected.data());
  AddInPlace(a.residual.data(), a.projected.data(), a.n * c.width);
  return absl::OkStatus();
}

absl::StatusOr<std::vector<float>> Decoder::Prefill(std::span<const uint32_t> tokens, KvBackend& kv,
                                                    int64_t chunk_tokens) {
  const int64_t total = static_cast<int64_t>(tokens.size());
  if (chunk_tokens < 1 || kv.length() >= total) {
    return absl::InvalidArgumentError(absl::StrCat("prefill: the backend holds ", kv.length(),
                                                   " of ", total, " tokens, chunk of ",
                                                   chunk_tokens, ": nothing to compute"));
  }
  std::vector<float> logits;
  while (kv.length() < total) {
    const int64_t begin = kv.length();
    const int64_t count = std::min(chunk_tokens, total - begin);
    PT_ASSIGN_OR_RETURN(logits, Forward(tokens.subspan(begin, count), kv));
  }
  return logits;
}

uint32_t Decoder::Greedy(std::span<const float> logits) {
  return static_cast<uint32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

}  // namespace pagetide
