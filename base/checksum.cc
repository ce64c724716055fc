#include "base/checksum.h"

#include <xxhash.h>

#include <algorithm>
#include <cstring>

#include "absl/strings/str_format.h"

namespace pagetide {

std::string Checksum128::ToHex() const {
  return absl::StrFormat("%016x%016x", high, low);
}

Checksum128 ChecksumOf(std::span<const std::byte> bytes) {
  const XXH128_hash_t h = XXH3_128bits(bytes.data(), bytes.size());
  return {h.low64, h.high64};
}

Checksum128 CopyWithChecksum(std::span<const std::byte> src, std::span<std::byte> dst) {
  constexpr size_t kBlock = 64 << 10;
  XXH3_state_t* const state = XXH3_createState();
  XXH3_128bits_reset(state);
  for (size_t at = 0; at < src.size(); at += kBlock) {
    const size_t n = std::min(kBlock, src.size() - at);
    std::memcpy(dst.data() + at, src.data() + at, n);
    XXH3_128bits_update(state, src.data() + at, n);
  }
  const XXH128_hash_t h = XXH3_128bits_digest(state);
  XXH3_freeState(state);
  return {h.low64, h.high64};
}

}  // namespace pagetide
