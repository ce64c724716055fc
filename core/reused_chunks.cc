#include "core/reused_chunks.h"

#include <algorithm>
#include <utility>

#include "absl/container/btree_map.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace pagetide {
namespace {

// Numbers lists of inputs at one token: 0 is none. Equal lists have equal numbers.
class InputNumbers {
 public:
  // Each token with the number of its inputs, as one number.
  std::vector<uint64_t> SymbolsOf(const TokensAndInputs& from) {
    std::vector<uint64_t> symbols(from.tokens.begin(), from.tokens.end());
    size_t i = 0;
    while (i < from.inputs.size() && from.inputs[i].position < symbols.size()) {
      const uint64_t position = from.inputs[i].position;
      uint64_t number = 0;
      for (; i < from.inputs.size() && from.inputs[i].position == position; ++i) {
        number = numbers_.try_emplace({number, from.inputs[i].digest}, numbers_.size() + 1)
                     .first->second;
      }
      symbols[position] |= number << 32;
    }
    return symbols;
  }

 private:
  // By the number of the inputs in front of it, and its digest.
  absl::btree_map<std::pair<uint64_t, Digest>, uint64_t> numbers_;
};

// Where `pattern`, which is not empty, begins first in `text` from `from` on; text.size() when
// nowhere. Knuth, Morris and Pratt's search: linear however much repeats.
uint64_t Find(std::span<const uint64_t> text, uint64_t from, std::span<const uint64_t> pattern) {
  // border[i]: of pattern[0, i], the longest proper prefix that is its suffix too.
  std::vector<uint64_t> border(pattern.size(), 0);
  const auto extend = [&](uint64_t matched, uint64_t symbol) {
    while (matched > 0 && pattern[matched] != symbol) matched = border[matched - 1];
    return pattern[matched] == symbol ? matched + 1 : 0;
  };
  for (uint64_t i = 1; i < pattern.size(); ++i) border[i] = extend(border[i - 1], pattern[i]);
  uint64_t matched = 0;
  for (uint64_t i = from; i < text.size(); ++i) {
    matched = extend(matched, text[i]);
    if (matched == pattern.size()) return i + 1 - pattern.size();
  }
  return text.size();
}

// The editor's view of one sequence, whatever its number.
class OnlySequence final : public SequenceEditor::Sequences {
 public:
  static constexpr uint64_t kNumber = 0;
  explicit OnlySequence(const SequenceRows* rows) : rows_(rows) {}
  const SequenceRows* Find(uint64_t) const override { return rows_; }
  void ForEach(absl::FunctionRef<void(uint64_t, const SequenceRows&)> fn) const override {
    fn(kNumber, *rows_);
  }

 private:
  const SequenceRows* const rows_;
};

}  // namespace

uint64_t ChunkTokens(std::span<const ReusedChunk> chunks) {
  uint64_t tokens = 0;
  for (const ReusedChunk& chunk : chunks) tokens += chunk.count;
  return tokens;
}

std::vector<ReusedChunk> FindChunks(const TokensAndInputs& session, const TokensAndInputs& prompt,
                                    uint64_t begin, uint64_t min_tokens) {
  PT_CHECK(min_tokens > 0);
  std::vector<ReusedChunk> chunks;
  if (begin >= session.tokens.size() || begin >= prompt.tokens.size()) return chunks;
  InputNumbers numbers;
  const std::vector<uint64_t> saved = numbers.SymbolsOf(session);
  const std::vector<uint64_t> wanted = numbers.SymbolsOf(prompt);
  uint64_t from = begin, to = begin;
  while (from < saved.size() && min_tokens <= wanted.size() - to &&
         chunks.size() < kMaxReusedChunks) {
    // Each search reads at most the chunk that it finds, the tokens in front of it and min_tokens
    // of the prompt, which are no more than the chunk; the last one finds none.
    from = Find(saved, from, std::span(wanted).subspan(to, min_tokens));
    if (from == saved.size()) break;
    const auto end = std::mismatch(saved.begin() + from + min_tokens, saved.end(),
                                   wanted.begin() + to + min_tokens, wanted.end());
    const uint64_t count = static_cast<uint64_t>(end.first - saved.begin()) - from;
    chunks.push_back({from, to, count});
    from += count;
    to += count;
  }
  return chunks;
}

absl::StatusOr<SequenceRows> TakeChunks(const SequenceEditor::Options& options,
                                        const SequenceRows& rows,
                                        std::span<const ReusedChunk> chunks) {
  PT_CHECK(!chunks.empty() && rows.positions.empty() &&
           chunks.back().session_end() <= rows.num_rows());
  const OnlySequence sequences(&rows);
  constexpr uint64_t kIt = OnlySequence::kNumber;
  SequenceEditor editor(options, &sequences);
  std::vector<SequenceEditor::KeptRun> runs = {{0, chunks.front().prompt_begin, 0}};
  for (const ReusedChunk& chunk : chunks) {
    runs.push_back({chunk.session_begin, chunk.session_end(), chunk.prompt_begin});
  }
  PT_RETURN_IF_ERROR(editor.KeepRuns(kIt, runs).status());
  return editor.Rows(kIt);
}

}  // namespace pagetide
