// Checksum128: XXH3-128 of a page's raw bytes. It finds damage, not malice: identity is a Digest.
#ifndef PAGETIDE_BASE_CHECKSUM_H_
#define PAGETIDE_BASE_CHECKSUM_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "base/checksum_kernel.h"

namespace pagetide {

struct Checksum128 {
  uint64_t low = 0;
  uint64_t high = 0;
  friend bool operator==(const Checksum128&, const Checksum128&) = default;
  // 32 hex digits, high half first.
  std::string ToHex() const;
};

Checksum128 ChecksumOf(std::span<const std::byte> bytes);
// Copies src to dst (equal sizes, no overlap) and returns the checksum of what was read, in one
// pass over blocks that stay in the L1/L2 cache.
Checksum128 CopyWithChecksum(std::span<const std::byte> src, std::span<std::byte> dst);

// The checksum of bytes that come in pieces. A value: a copy goes on from the same place. Not
// thread-safe.
class ChecksumStream {
 public:
  // Bytes worth handing over at a time, so that what was just copied is still in the cache.
  static constexpr size_t kBlockBytes = 64 << 10;

  ChecksumStream();
  void Update(std::span<const std::byte> bytes);
  // Of all bytes so far; more may follow.
  Checksum128 Get() const;

 private:
  alignas(checksum_internal::kStateAlignment) std::byte state_[checksum_internal::kStateBytes];
};

}  // namespace pagetide

#endif  // PAGETIDE_BASE_CHECKSUM_H_
