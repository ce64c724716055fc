// DecoderConfig: shape and seed of the reference decoder.
#ifndef PAGETIDE_DECODER_DECODER_CONFIG_H_
#define PAGETIDE_DECODER_DECODER_CONFIG_H_

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/convert.h"
#include "kernels/paged_attention.h"

namespace pagetide {

// Llama architecture over bytes: token ids 0..255 are bytes, 256 begins a sequence. The defaults
// make about three million parameters and KV pages of 256 KiB (256 tokens, f16).
struct DecoderConfig {
  static constexpr uint32_t kBeginOfSequence = 256;
  static constexpr uint32_t kVocabularySize = 257;

  int32_t num_layers = 4;
  int32_t width = 256;  // elements of the residual stream
  int32_t num_q_heads = 8;
  int32_t num_kv_heads = 2;
  int32_t head_dim = 32;
  int32_t ffn_width = 704;
  float rope_base = 10000.0f;
  float norm_epsilon = 1e-5f;
  kernels::KvType kv_type = kernels::KvType::kF16;  // of both K and V rows
  uint64_t seed = 1;                                // weights are a pure function of seed and shape

  int32_t q_width() const { return num_q_heads * head_dim; }
  int32_t kv_width() const { return num_kv_heads * head_dim; }
  // Of one K row, and of one V row.
  int64_t row_bytes() const { return kernels::EncodedBytes(kv_type, kv_width()); }

  // INVALID_ARGUMENT names the field and the numbers.
  absl::Status Validate() const;
};

// How the decoder attends: rows [num_kv_heads, head_dim], scale 1 / sqrt(head_dim), causal.
kernels::AttentionShape AttentionShapeOf(const DecoderConfig& config);

}  // namespace pagetide

#endif  // PAGETIDE_DECODER_DECODER_CONFIG_H_
