// KvBackend: where the reference decoder keeps K and V. The decoder holds no KV of its own: it
// appends rows here and attends here, so that what it computes shows what the backend holds.
//
// One append at a time: BeginAppend, then for each layer in ascending order AppendRows and Attend,
// then Commit or Abort. Rows appended to a layer are visible to Attend of that layer at once and
// become part of the sequence at Commit. Not thread-safe.
#ifndef PAGETIDE_DECODER_KV_BACKEND_H_
#define PAGETIDE_DECODER_KV_BACKEND_H_

#include <cstddef>
#include <cstdint>
#include <span>

#include "absl/status/status.h"

namespace pagetide {

class KvBackend {
 public:
  virtual ~KvBackend() = default;

  // Committed tokens.
  virtual int64_t length() const = 0;
  // Where the next token goes: behind the last one, unless rows were moved.
  virtual int64_t next_position() const { return length(); }
  // Where token `index` of an append that begins now goes. They follow one by one, unless they are
  // the tokens of a draft tree.
  virtual int64_t position_of(int64_t index) const { return next_position() + index; }

  // tokens: ids of the rows about to be appended, at least one. FAILED_PRECONDITION while another
  // append is open.
  virtual absl::Status BeginAppend(std::span<const uint32_t> tokens) = 0;

  // k_rows: [num_tokens, k_row_bytes], v_rows: [num_tokens, v_row_bytes], encoded in the model's
  // types.
  virtual absl::Status AppendRows(int layer, std::span<const std::byte> k_rows,
                                  std::span<const std::byte> v_rows) = 0;

  // Causal attention of the appended tokens' queries over the committed and the appended rows.
  // queries, out: [num_tokens, num_q_heads, head_dim] f32.
  virtual absl::Status Attend(int layer, std::span<const float> queries, std::span<float> out) = 0;

  // All layers were appended: the tokens become part of the sequence, whole or not at all.
  virtual absl::Status Commit() = 0;

  // Drops the open append, if any; the sequence is as before BeginAppend.
  virtual void Abort() = 0;
};

}  // namespace pagetide

#endif  // PAGETIDE_DECODER_KV_BACKEND_H_
