// What a live replay writes: tokens that stand for the pages of a trace, and rows whose bytes
// follow from the key of their page, so that a reader knows every byte without having seen it
// before.
//
// A page of the trace becomes one page of the model. Its first token is the page's number, so no
// two pages begin alike and none is reused in part; the others are a seeded hash. Behind the
// trace's pages come tokens of the request's own: the last of a prompt is never reused, and a
// partial page is there to be spilled. Immutable; thread-safe.
#ifndef PAGETIDE_REPLAY_LIVE_CONTENT_H_
#define PAGETIDE_REPLAY_LIVE_CONTENT_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/keys.h"
#include "core/model.h"
#include "replay/trace.h"

namespace pagetide {

struct LivePrompt {
  std::vector<uint32_t> tokens;     // the prompt, then the tokens to decode
  size_t prompt_tokens = 0;         // of tokens
  size_t trace_pages = 0;           // leading full pages that the trace names
  std::vector<uint64_t> row_seeds;  // by page: the head of its page key
};

class LiveContent {
 public:
  // `model` has one layer group, pages of at least two tokens, and outlives this. Another `seed`
  // gives other tokens, hence other pages and other bytes.
  LiveContent(const Model* model, uint64_t seed) : model_(model), seed_(seed) {}

  // `request_number` names the request in the trace: its own tokens are no one else's.
  LivePrompt MakePrompt(const TraceRequest& request, size_t request_number, uint32_t own_tokens,
                        uint32_t decode_tokens) const;

  // Rows of consecutive tokens from first_token on: [out.size() / row_bytes, row_bytes].
  void FillRows(const LivePrompt& prompt, uint32_t layer, RowKind kind, uint64_t first_token,
                std::span<std::byte> out) const;
  // Bytes of `rows` that are not what FillRows gives.
  uint64_t CountWrongBytes(const LivePrompt& prompt, uint32_t layer, RowKind kind,
                           uint64_t first_token, std::span<const std::byte> rows) const;

 private:
  void AppendPage(uint32_t first, uint32_t count, PrefixKey* parent, LivePrompt* prompt) const;

  const Model* const model_;
  const uint64_t seed_;
};

}  // namespace pagetide

#endif  // PAGETIDE_REPLAY_LIVE_CONTENT_H_
