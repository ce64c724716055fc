// PageTideKvBackend: K and V in a PageTide sequence. Chunks of tokens go as one append each (rows
// stream up layer by layer, Attend sees them under the append), single tokens as decode steps.
//
// The sequence outlives the backend. Not thread-safe.
#ifndef PAGETIDE_DECODER_PAGETIDE_KV_BACKEND_H_
#define PAGETIDE_DECODER_PAGETIDE_KV_BACKEND_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "clients/cpp/sequence.h"
#include "core/model.h"
#include "decoder/decoder.h"
#include "decoder/kv_backend.h"

namespace pagetide {

// What a decoder's rows look like, and whose they are: one full-attention group of all layers.
ModelSpec ModelSpecOf(const Decoder& decoder, absl::string_view name, uint32_t page_tokens = 256);

class PageTideKvBackend final : public KvBackend {
 public:
  PageTideKvBackend(const DecoderConfig& config, Sequence* sequence)
      : num_q_heads_(config.num_q_heads), sequence_(sequence) {}

  int64_t length() const override { return static_cast<int64_t>(sequence_->length()); }
  int64_t next_position() const override { return static_cast<int64_t>(sequence_->end_position()); }
  absl::Status BeginAppend(std::span<const uint32_t> tokens) override;
  absl::Status AppendRows(int layer, std::span<const std::byte> k_rows,
                          std::span<const std::byte> v_rows) override;
  absl::Status Attend(int layer, std::span<const float> queries, std::span<float> out) override;
  absl::Status Commit() override;
  void Abort() override;

 private:
  const int32_t num_q_heads_;
  Sequence* const sequence_;
  std::vector<uint32_t> tokens_;  // of the open append
  // At most one of the two is open.
  std::unique_ptr<PendingAppend> append_;
  std::unique_ptr<PendingStep> step_;
};

}  // namespace pagetide

#endif  // PAGETIDE_DECODER_PAGETIDE_KV_BACKEND_H_
