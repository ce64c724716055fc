#include "decoder/decoder_config.h"

#include <cmath>

#include "absl/strings/str_cat.h"

namespace pagetide {

absl::Status DecoderConfig::Validate() const {
  const auto in_range = [](const char* field, int64_t value, int64_t low, int64_t high) {
    if (value >= low && value <= high) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("decoder config: ", field, " is ", value, ", not in ", low, " to ", high));
  };
  for (const absl::Status& status :
       {in_range("num_layers", num_layers, 1, 256), in_range("width", width, 8, 65536),
        in_range("num_q_heads", num_q_heads, 1, 1024),
        in_range("num_kv_heads", num_kv_heads, 1, 1024), in_range("head_dim", head_dim, 2, 1024),
        in_range("ffn_width", ffn_width, 8, 262144)}) {
    if (!status.ok()) return status;
  }
  if (num_q_heads % num_kv_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat("decoder config: num_q_heads ", num_q_heads,
                                                   " is no multiple of num_kv_heads ",
                                                   num_kv_heads));
  }
  if (head_dim % 2 != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("decoder config: head_dim ", head_dim, " is odd; RoPE turns pairs"));
  }
  return absl::OkStatus();
}

kernels::AttentionShape AttentionShapeOf(const DecoderConfig& config) {
  kernels::AttentionShape shape{};
  shape.num_q_heads = config.num_q_heads;
  shape.num_kv_heads = config.num_kv_heads;
  shape.k_dim = config.head_dim;
  shape.v_dim = config.head_dim;
  shape.k_type = config.kv_type;
  shape.v_type = config.kv_type;
  shape.k_row_bytes = config.row_bytes();
  shape.v_row_bytes = config.row_bytes();
  shape.scale = 1.0f / std::sqrt(static_cast<float>(config.head_dim));
  shape.mask = kernels::AttentionMask::kCausal;
  return shape;
}

}  // namespace pagetide
