// Prefix keys and page keys: the names under which equal content is found (DESIGN rule 4).
//
//   root       = SHA-256(field "pagetide.prefix.v1", field tenant_salt, field model identity, u32
//   page_tokens) PrefixKey  = SHA-256(field "pagetide.page.v1", field parent, u64 n, n × u32 token,
//   u64 m, m × {u32 slot, field digest}) PageKey    = SHA-256(field "pagetide.component_page.v1",
//   field PrefixKey, field component fingerprint)
// A field is its u64 length and its bytes; integers are little-endian. All 32 bytes are kept
// everywhere.
#ifndef PAGETIDE_CORE_KEYS_H_
#define PAGETIDE_CORE_KEYS_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"
#include "base/digest.h"

namespace pagetide {

struct PrefixKey {
  Digest digest;
  friend bool operator==(const PrefixKey&, const PrefixKey&) = default;
  friend auto operator<=>(const PrefixKey&, const PrefixKey&) = default;
  template <typename H>
  friend H AbslHashValue(H h, const PrefixKey& k) {
    return H::combine(std::move(h), k.digest);
  }
};

struct PageKey {
  Digest digest;
  friend bool operator==(const PageKey&, const PageKey&) = default;
  friend auto operator<=>(const PageKey&, const PageKey&) = default;
  template <typename H>
  friend H AbslHashValue(H h, const PageKey& k) {
    return H::combine(std::move(h), k.digest);
  }
};

// Secret of a tenant: HMAC-SHA-256(deployment secret, tenant). Clients and the store never hold it.
struct TenantSalt {
  Digest digest;
};
TenantSalt DeriveTenantSalt(absl::string_view deployment_secret, absl::string_view tenant);

// Another input (an image) bound to a token.
struct PositionedInput {
  uint64_t position = 0;  // token index in the sequence
  Digest digest;
  friend bool operator==(const PositionedInput&, const PositionedInput&) = default;
};

PrefixKey RootPrefixKey(const TenantSalt& salt, const Digest& model_identity, uint32_t page_tokens);

// Key of the page that follows `parent`. `tokens` are the page's, `inputs` those at its positions
// (their position is taken relative to first_position).
PrefixKey NextPrefixKey(const PrefixKey& parent, std::span<const uint32_t> tokens,
                        uint64_t first_position = 0, std::span<const PositionedInput> inputs = {});

// Keys of all full pages of a prompt, in order. `inputs` ascend by position.
std::vector<PrefixKey> PrefixKeysOf(const PrefixKey& root, std::span<const uint32_t> tokens,
                                    uint32_t page_tokens,
                                    std::span<const PositionedInput> inputs = {});

PageKey MakePageKey(const PrefixKey& prefix, const Digest& component_fingerprint);

// Key of a page that is no prefix: a spilled tail. Unique by construction, never found by content.
PageKey MakePrivatePageKey(uint64_t incarnation, uint64_t page_id, uint64_t spill_number);

// Key of a private page by its content: equal bytes of a tenant have one record. Never found by
// prefix. `rows`: how many leading rows count; the caller has zeroed the slots behind them.
//   SHA-256(field "pagetide.content_page.v1", field tenant_salt, field component fingerprint,
//           u32 rows, body)
PageKey MakeContentPageKey(const TenantSalt& salt, const Digest& component_fingerprint,
                           uint32_t rows, std::span<const std::byte> body);

}  // namespace pagetide

#endif  // PAGETIDE_CORE_KEYS_H_
