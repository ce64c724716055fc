// Decoder: a small transformer of the Llama architecture (RMSNorm, RoPE, grouped-query attention,
// SwiGLU) with seeded weights and no KV of its own. It shows that a KV service returns what was
// written: the same tokens give the same logits, bit for bit, whatever chunks they were computed
// in, however the backend pages, spills and restores, and whatever was reused instead of computed.
//
// Every output element has one fixed order of summation and fused multiply-add is off, so two
// processes on one kind of machine agree on every bit. (RoPE angles come from libm in double,
// rounded once.)
//
// Immutable after Create but for the token counter; thread-safe: several sequences may run at once,
// each with its own backend. Source of the architecture: Touvron et al., LLaMA (2023).
#ifndef PAGETIDE_DECODER_DECODER_H_
#define PAGETIDE_DECODER_DECODER_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/digest.h"
#include "decoder/decoder_config.h"
#include "decoder/kv_backend.h"
#include "decoder/packed_matrix.h"

namespace pagetide {

// Begin-of-sequence, then the bytes of `text`.
std::vector<uint32_t> TokensOf(absl::string_view text);

class Decoder {
 public:
  static absl::StatusOr<std::unique_ptr<Decoder>> Create(const DecoderConfig& config);

  enum class LogitsOf : uint8_t { kLastToken, kAllTokens };

  // One forward pass over `tokens`, at positions kv.next_position() and on, whose K and V are
  // appended to `kv` and committed. Returns logits [1 or num_tokens, kVocabularySize]. On an error
  // the append is aborted. INVALID_ARGUMENT: no token, or an id outside the vocabulary.
  absl::StatusOr<std::vector<float>> Forward(std::span<const uint32_t> tokens, KvBackend& kv,
                                             LogitsOf logits_of = LogitsOf::kLastToken);

  // Forward over tokens[kv.length() ..) in chunks of at most `chunk_tokens`: prefill of what the
  // backend does not hold yet. Returns the logits of the last token.
  absl::StatusOr<std::vector<float>> Prefill(std::span<const uint32_t> tokens, KvBackend& kv,
                                             int64_t chunk_tokens = 256);

  // The token of the highest logit, the lowest id among equals.
  static uint32_t Greedy(std::span<const float> logits);

  const DecoderConfig& config() const { return config_; }
  // SHA-256 of all weights as they are multiplied.
  const Digest& weights_digest() const { return weights_digest_; }
  int64_t num_parameters() const { return num_parameters_; }
  // Tokens that went through the layers since construction. The ground truth of "computed".
  int64_t computed_tokens() const { return computed_tokens_.load(std::memory_order_relaxed); }

 private:
  struct Layer {
    std::vector<float> attention_norm;  // [width]
    PackedMatrix qkv;                   // [width, q_width + 2 kv_width]
    PackedMatrix attention_out;         // [q_width, width]
    std::vector<float> ffn_norm;        // [width]
    PackedMatrix gate_up;               // [width, 2 ffn_width]
    PackedMatrix down;                  // [ffn_width, width]
  };
  struct Activations;

  explicit Decoder(const DecoderConfig& config) : config_(config) {}
  void InitWeights();
  absl::Status RunLayers(std::span<const uint32_t> tokens, KvBackend& kv, Activations& a) const;
  absl::Status RunLayer(int index, KvBackend& kv, Activations& a) const;

  const DecoderConfig config_;
  // Set by InitWeights, const afterwards.
  std::vector<float> embedding_;  // [kVocabularySize, width]
  std::vector<Layer> layers_;
  std::vector<float> final_norm_;  // [width]
  PackedMatrix unembedding_;       // [width, kVocabularySize]
  Digest weights_digest_;
  int64_t num_parameters_ = 0;

  std::atomic<int64_t> computed_tokens_{0};  // relaxed: a statistic
};

}  // namespace pagetide

#endif  // PAGETIDE_DECODER_DECODER_H_
