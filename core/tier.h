// Tier: where a copy of a page can be. Ordered from fast and small to slow and large.
#ifndef PAGETIDE_CORE_TIER_H_
#define PAGETIDE_CORE_TIER_H_

#include <cstddef>
#include <cstdint>

namespace pagetide {

enum class Tier : uint8_t {
  kDevice = 0,  // hot: a frame in the device's memory
  kHost = 1,    // warm: a pinned host frame
  kStore = 2,   // cold: a record in the page store
};
inline constexpr size_t kNumTiers = 3;

constexpr size_t TierIndex(Tier tier) {
  return static_cast<size_t>(tier);
}

constexpr const char* TierName(Tier tier) {
  switch (tier) {
    case Tier::kDevice:
      return "device";
    case Tier::kHost:
      return "host";
    case Tier::kStore:
      return "store";
  }
  return "unknown";
}

}  // namespace pagetide

#endif  // PAGETIDE_CORE_TIER_H_
