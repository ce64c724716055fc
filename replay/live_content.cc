#include "replay/live_content.h"

#include <algorithm>
#include <cstring>

namespace pagetide {
namespace {

// Trace pages are numbered below it (kMaxTracePages), the requests' own pages from it on.
constexpr uint32_t kFirstOwnPage = uint32_t{1} << 31;
static_assert(kMaxTracePages < kFirstOwnPage);

// One step of SplitMix64. Source: Steele, Lea, Flood, OOPSLA 2014.
uint64_t NextRandom(uint64_t* state) {
  uint64_t z = *state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

uint64_t Mixed(uint64_t value) {
  return NextRandom(&value);
}

void FillRow(uint64_t seed, std::span<std::byte> row) {
  size_t done = 0;
  while (done < row.size()) {
    const uint64_t word = NextRandom(&seed);
    const size_t n = std::min(sizeof(word), row.size() - done);
    std::memcpy(row.data() + done, &word, n);
    done += n;
  }
}

}  // namespace

void LiveContent::AppendPage(uint32_t first, uint32_t count, PrefixKey* parent,
                             LivePrompt* prompt) const {
  const uint32_t page_tokens = model_->geometry().page_tokens();
  std::vector<uint32_t> tokens(page_tokens, first);
  uint64_t random = Mixed(seed_ ^ first);
  for (uint32_t i = 1; i < page_tokens; ++i) tokens[i] = static_cast<uint32_t>(NextRandom(&random));
  *parent = NextPrefixKey(*parent, tokens);
  const PageKey key = MakePageKey(*parent, model_->geometry().group(0).fingerprint());
  uint64_t head;
  std::memcpy(&head, key.digest.bytes.data(), sizeof(head));
  prompt->row_seeds.push_back(head);
  prompt->tokens.insert(prompt->tokens.end(), tokens.begin(), tokens.begin() + count);
}

LivePrompt LiveContent::MakePrompt(const TraceRequest& request, size_t request_number,
                                   uint32_t own_tokens, uint32_t decode_tokens) const {
  const uint32_t page_tokens = model_->geometry().page_tokens();
  LivePrompt prompt;
  // The salt of the service's keys is a secret of its own; any fixed root tells pages apart.
  PrefixKey parent = RootPrefixKey(TenantSalt(), model_->identity(), page_tokens);
  for (const PageId page : request.pages) {
    AppendPage(static_cast<uint32_t>(page.value()), page_tokens, &parent, &prompt);
  }
  prompt.trace_pages = request.pages.size();
  const uint32_t own = own_tokens + decode_tokens;
  const uint32_t own_pages = (own + page_tokens - 1) / page_tokens;
  uint32_t number = kFirstOwnPage + static_cast<uint32_t>(request_number * own_pages);
  for (uint32_t done = 0; done < own; done += page_tokens) {
    AppendPage(number++, std::min(page_tokens, own - done), &parent, &prompt);
  }
  prompt.prompt_tokens = prompt.tokens.size() - decode_tokens;
  return prompt;
}

void LiveContent::FillRows(const LivePrompt& prompt, uint32_t layer, RowKind kind,
                           uint64_t first_token, std::span<std::byte> out) const {
  const GroupGeometry& group = model_->geometry().group(0);
  const size_t row_bytes = group.row_bytes(kind);
  const uint64_t plane = (uint64_t{layer} * 2 + (kind == RowKind::kV ? 1 : 0)) << 32;
  uint64_t token = first_token;
  for (size_t at = 0; at < out.size(); at += row_bytes, ++token) {
    const uint64_t page = token / group.page_tokens();
    const uint64_t slot = token % group.page_tokens();
    FillRow(prompt.row_seeds[page] ^ Mixed(plane | slot), out.subspan(at, row_bytes));
  }
}

uint64_t LiveContent::CountWrongBytes(const LivePrompt& prompt, uint32_t layer, RowKind kind,
                                      uint64_t first_token, std::span<const std::byte> rows) const {
  std::vector<std::byte> expected(rows.size());
  FillRows(prompt, layer, kind, first_token, expected);
  if (std::memcmp(expected.data(), rows.data(), rows.size()) == 0) return 0;
  uint64_t wrong = 0;
  for (size_t i = 0; i < rows.size(); ++i) wrong += rows[i] != expected[i];
  return wrong;
}

}  // namespace pagetide
