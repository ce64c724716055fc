// Oracle: the reference decoder over plain local arrays, one token stream at a time. What the
// service answers is compared with it, bit for bit. For one thread.
#ifndef PAGETIDE_CLI_DEMO_ORACLE_H_
#define PAGETIDE_CLI_DEMO_ORACLE_H_

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "base/status_macros.h"
#include "decoder/decoder.h"
#include "decoder/local_kv_backend.h"

namespace pagetide::demo {

class Oracle {
 public:
  // `decoder` outlives this; not the one whose computed tokens are reported.
  explicit Oracle(Decoder* decoder) : decoder_(decoder), kv_(decoder->config()) {}

  // Logits of the token after `tokens`, which extend those of the last call or equal them.
  absl::StatusOr<std::vector<float>> LogitsAfter(std::span<const uint32_t> tokens) {
    if (static_cast<int64_t>(tokens.size()) > kv_.length()) {
      PT_ASSIGN_OR_RETURN(logits_, decoder_->Prefill(tokens, kv_));
    }
    return logits_;
  }
  // K and V of all tokens so far.
  const LocalKvBackend& kv() const { return kv_; }

 private:
  Decoder* const decoder_;
  LocalKvBackend kv_;
  std::vector<float> logits_;  // after kv_'s tokens
};

}  // namespace pagetide::demo

#endif  // PAGETIDE_CLI_DEMO_ORACLE_H_
