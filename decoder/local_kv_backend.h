// LocalKvBackend: K and V in plain arrays of this process, one run a layer. The oracle: nothing is
// paged, shared, moved or restored. Not thread-safe.
#ifndef PAGETIDE_DECODER_LOCAL_KV_BACKEND_H_
#define PAGETIDE_DECODER_LOCAL_KV_BACKEND_H_

#include <cstdint>
#include <vector>

#include "decoder/decoder_config.h"
#include "decoder/kv_backend.h"

namespace pagetide {

class LocalKvBackend final : public KvBackend {
 public:
  explicit LocalKvBackend(const DecoderConfig& config);

  int64_t length() const override { return length_; }
  absl::Status BeginAppend(std::span<const uint32_t> tokens) override;
  absl::Status AppendRows(int layer, std::span<const std::byte> k_rows,
                          std::span<const std::byte> v_rows) override;
  absl::Status Attend(int layer, std::span<const float> queries, std::span<float> out) override;
  absl::Status Commit() override;
  void Abort() override;

  // Committed rows of a layer: [length, row_bytes]. Valid until the next append.
  std::span<const std::byte> k_rows(int layer) const {
    return std::span(layers_[layer].k).first(CommittedBytes());
  }
  std::span<const std::byte> v_rows(int layer) const {
    return std::span(layers_[layer].v).first(CommittedBytes());
  }

 private:
  struct Layer {
    std::vector<std::byte> k;  // [length + pending, row_bytes]
    std::vector<std::byte> v;
  };
  size_t CommittedBytes() const { return static_cast<size_t>(length_ * row_bytes_); }

  const kernels::AttentionShape shape_;
  const int64_t row_bytes_;
  std::vector<Layer> layers_;
  int64_t length_ = 0;
  int64_t pending_ = 0;  // tokens of the open append; 0: none
};

}  // namespace pagetide

#endif  // PAGETIDE_DECODER_LOCAL_KV_BACKEND_H_
