// RegionAllocator: first-fit allocation of byte ranges in a fixed arena, such as a staging pool
// that a local engine writes into. It does the books only, on offsets; the arena is the owner's.
//
// Regions begin at multiples of 64 bytes (a cache line, and what vector loads want) and do not
// overlap; freed neighbours merge. At most arena_bytes / 64 regions exist, which bounds the tables.
// Not thread-safe.
#ifndef PAGETIDE_CORE_REGION_ALLOCATOR_H_
#define PAGETIDE_CORE_REGION_ALLOCATOR_H_

#include <cstddef>
#include <cstdint>
#include <optional>

#include "absl/container/btree_map.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"

namespace pagetide {

class RegionAllocator {
 public:
  static constexpr uint64_t kAlignment = 64;

  // The tail of an arena whose size is no multiple of kAlignment is not used.
  explicit RegionAllocator(uint64_t arena_bytes);

  // Offset of the lowest free range that fits, or nullopt if none does. Takes `num_bytes` rounded
  // up to kAlignment, at least kAlignment. O(free ranges).
  std::optional<uint64_t> Allocate(uint64_t num_bytes);
  // FAILED_PRECONDITION unless `offset` is what Allocate gave and is not freed yet. O(log).
  absl::Status Free(uint64_t offset);

  uint64_t arena_bytes() const { return arena_bytes_; }
  // Sum over free ranges; one allocation may find no single range of this size.
  uint64_t free_bytes() const { return free_bytes_; }
  size_t num_regions() const { return regions_.size(); }
  size_t num_free_ranges() const { return free_.size(); }

 private:
  const uint64_t arena_bytes_;  // usable: a multiple of kAlignment
  uint64_t free_bytes_;
  absl::btree_map<uint64_t, uint64_t> free_;         // offset → bytes; no two touch
  absl::flat_hash_map<uint64_t, uint64_t> regions_;  // offset → bytes, in use
};

}  // namespace pagetide

#endif  // PAGETIDE_CORE_REGION_ALLOCATOR_H_
