// Chunks: runs of saved tokens that a prompt holds further in front, where something between was
// left out. Their rows can be reused at the prompt's positions: K is turned by the distance. That
// is approximate, since they were computed over other tokens: nothing of it is ever keyed. Pure
// functions; thread-safe.
#ifndef PAGETIDE_CORE_REUSED_CHUNKS_H_
#define PAGETIDE_CORE_REUSED_CHUNKS_H_

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "core/keys.h"
#include "core/sequence_editor.h"
#include "core/sequence_rows.h"

namespace pagetide {

// Saved tokens [session_begin, session_end()) are the prompt's from prompt_begin on. Of several
// each begins where the one before ends in the prompt, and there or behind it in the session.
struct ReusedChunk {
  uint64_t session_begin = 0;
  uint64_t prompt_begin = 0;  // never behind session_begin
  uint64_t count = 0;
  uint64_t session_end() const { return session_begin + count; }
  uint64_t prompt_end() const { return prompt_begin + count; }
  friend bool operator==(const ReusedChunk&, const ReusedChunk&) = default;
};
uint64_t ChunkTokens(std::span<const ReusedChunk> chunks);

// Of one prompt: what plans carry and sequences of many pieces cost is bounded.
inline constexpr size_t kMaxReusedChunks = 256;

// Tokens with the other inputs (images) that are bound to them. `inputs` ascend.
struct TokensAndInputs {
  std::span<const uint32_t> tokens;
  std::span<const PositionedInput> inputs;
};

// Walks the session from `begin`, the length of what it shares with the prompt: where at least
// `min_tokens` (not 0) of its tokens are the prompt's next, they are a chunk, as long as they are
// equal; otherwise one token on. This is what llama.cpp's server does with --cache-reuse. At most
// kMaxReusedChunks. Takes time in the order of both lengths, whatever repeats in them.
std::vector<ReusedChunk> FindChunks(const TokensAndInputs& session, const TokensAndInputs& prompt,
                                    uint64_t begin, uint64_t min_tokens);

// The rows in front of the first chunk, and the chunks' at the positions of the prompt. Positions
// of `rows` are implicit. FAILED_PRECONDITION as SequenceEditor (CANNOT_CUT, CANNOT_SHIFT,
// ROWS_RECLAIMED). Takes no references.
absl::StatusOr<SequenceRows> TakeChunks(const SequenceEditor::Options& options,
                                        const SequenceRows& rows,
                                        std::span<const ReusedChunk> chunks);

}  // namespace pagetide

#endif  // PAGETIDE_CORE_REUSED_CHUNKS_H_
