// Names and digests of residency reports, shared by those who send them (workers, the store's
// watcher) and the router that checks them. Both sides must agree bit for bit, across versions: a
// change here is a change of the protocol.
//
// All functions are pure; thread-safe.
#ifndef PAGETIDE_CORE_RESIDENCY_DIGEST_H_
#define PAGETIDE_CORE_RESIDENCY_DIGEST_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <utility>

#include "absl/strings/string_view.h"
#include "base/checksum.h"
#include "core/keys.h"
#include "core/tier.h"

namespace pagetide {

// The first 16 bytes of a prefix key: enough to find a page by, since residency is a hint at the
// router and the owner compares all 32.
struct PrefixHint {
  static constexpr size_t kBytes = 16;
  std::array<uint8_t, kBytes> bytes{};

  static PrefixHint Of(const PrefixKey& key) {
    PrefixHint hint;
    std::memcpy(hint.bytes.data(), key.digest.bytes.data(), kBytes);
    return hint;
  }
  // `raw` has at least 16 bytes.
  static PrefixHint FromBytes(absl::string_view raw) {
    PrefixHint hint;
    std::memcpy(hint.bytes.data(), raw.data(), kBytes);
    return hint;
  }
  absl::string_view view() const {
    return absl::string_view(reinterpret_cast<const char*>(bytes.data()), kBytes);
  }
  friend bool operator==(const PrefixHint&, const PrefixHint&) = default;
  friend auto operator<=>(const PrefixHint&, const PrefixHint&) = default;
  template <typename H>
  friend H AbslHashValue(H h, const PrefixHint& hint) {
    uint64_t head;  // part of a SHA-256: uniform already
    std::memcpy(&head, hint.bytes.data(), sizeof(head));
    return H::combine(std::move(h), head);
  }
};

// A copy of a page that a source began or ceased to hold in one tier.
struct ResidencyDelta {
  PrefixHint hint;
  uint32_t group = 0;
  Tier tier = Tier::kDevice;
  bool is_removed = false;
  uint64_t page_bytes = 0;
};

// XOR of the hashes of all copies a source holds, by the first hex digit of the hint. Adding and
// removing a copy are the same operation, so a digest costs O(1) a change and does not depend on
// the order.
inline constexpr size_t kNumResidencyBuckets = 16;
using ResidencyDigests = std::array<uint64_t, kNumResidencyBuckets>;

inline size_t ResidencyBucket(const PrefixHint& hint) {
  return hint.bytes[0] >> 4;
}

// Low half of XXH3-128 over {hint, group as u32 LE, tier as u8 + 1, 3 zero bytes}.
inline uint64_t ResidencyHash(const PrefixHint& hint, uint32_t group, Tier tier) {
  std::array<std::byte, 24> buffer{};
  std::memcpy(buffer.data(), hint.bytes.data(), PrefixHint::kBytes);
  for (int i = 0; i < 4; ++i) buffer[16 + i] = static_cast<std::byte>(group >> (8 * i));
  buffer[20] = static_cast<std::byte>(static_cast<uint8_t>(tier) + 1);
  return ChecksumOf(buffer).low;
}

inline void ToggleInDigest(ResidencyDigests& digests, const PrefixHint& hint, uint32_t group,
                           Tier tier) {
  digests[ResidencyBucket(hint)] ^= ResidencyHash(hint, group, tier);
}

}  // namespace pagetide

#endif  // PAGETIDE_CORE_RESIDENCY_DIGEST_H_
