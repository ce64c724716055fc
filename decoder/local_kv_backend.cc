#include "decoder/local_kv_backend.h"

#include <numeric>

#include "absl/strings/str_cat.h"

namespace pagetide {

LocalKvBackend::LocalKvBackend(const DecoderConfig& config)
    : shape_(AttentionShapeOf(config)),
      row_bytes_(config.row_bytes()),
      layers_(config.num_layers) {}

absl::Status LocalKvBackend::BeginAppend(std::span<const uint32_t> tokens) {
  if (pending_ != 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("begin append: ", pending_, " tokens are already being appended"));
  }
  if (tokens.empty()) return absl::InvalidArgumentError("begin append: no tokens");
  pending_ = static_cast<int64_t>(tokens.size());
  return absl::OkStatus();
}

absl::Status LocalKvBackend::AppendRows(int layer, std::span<const std::byte> k_rows,
                                        std::span<const std::byte> v_rows) {
  const size_t expected = static_cast<size_t>(pending_ * row_bytes_);
  if (k_rows.size() != expected || v_rows.size() != expected) {
    return absl::InvalidArgumentError(absl::StrCat("append rows of layer ", layer, ": ",
                                                   k_rows.size(), " K and ", v_rows.size(),
                                                   " V bytes, expected ", expected));
  }
  Layer& l = layers_[layer];
  if (l.k.size() != CommittedBytes()) {
    return absl::FailedPreconditionError(
        absl::StrCat("append rows of layer ", layer, ": this layer was appended already"));
  }
  l.k.insert(l.k.end(), k_rows.begin(), k_rows.end());
  l.v.insert(l.v.end(), v_rows.begin(), v_rows.end());
  return absl::OkStatus();
}

absl::Status LocalKvBackend::Attend(int layer, std::span<const float> queries,
                                    std::span<float> out) {
  const Layer& l = layers_[layer];
  std::vector<int64_t> positions(pending_);
  std::iota(positions.begin(), positions.end(), length_);
  const kernels::KvRun run{l.k.data(), l.v.data(), 0, 0,
                           static_cast<int32_t>(l.k.size() / static_cast<size_t>(row_bytes_))};
  const kernels::AttentionArgs args{shape_,           &run,     1,          queries.data(),
                                    positions.data(), pending_, out.data(), nullptr};
  const size_t expected = static_cast<size_t>(pending_) * shape_.num_q_heads * shape_.k_dim;
  if (queries.size() != expected || out.size() != expected) {
    return absl::InvalidArgumentError(absl::StrCat("attend in layer ", layer, ": ", queries.size(),
                                                   " query and ", out.size(),
                                                   " output elements, expected ", expected));
  }
  kernels::AttendHost(args);
  return absl::OkStatus();
}

absl::Status LocalKvBackend::Commit() {
  const size_t expected = static_cast<size_t>((length_ + pending_) * row_bytes_);
  for (size_t i = 0; i < layers_.size(); ++i) {
    if (layers_[i].k.size() != expected) {
      return absl::FailedPreconditionError(
          absl::StrCat("commit of ", pending_, " tokens: layer ", i, " was not appended"));
    }
  }
  length_ += pending_;
  pending_ = 0;
  return absl::OkStatus();
}

void LocalKvBackend::Abort() {
  for (Layer& layer : layers_) {
    layer.k.resize(CommittedBytes());
    layer.v.resize(CommittedBytes());
  }
  pending_ = 0;
}

}  // namespace pagetide
