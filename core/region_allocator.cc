#include "core/region_allocator.h"

#include <algorithm>
#include <iterator>

#include "absl/strings/str_cat.h"

namespace pagetide {

RegionAllocator::RegionAllocator(uint64_t arena_bytes)
    : arena_bytes_(arena_bytes / kAlignment * kAlignment), free_bytes_(arena_bytes_) {
  if (arena_bytes_ > 0) free_.emplace(0, arena_bytes_);
}

std::optional<uint64_t> RegionAllocator::Allocate(uint64_t num_bytes) {
  // Checked before rounding, which could overflow.
  if (num_bytes > free_bytes_ || free_bytes_ == 0) return std::nullopt;
  const uint64_t size =
      std::max(kAlignment, (num_bytes + kAlignment - 1) / kAlignment * kAlignment);
  const auto it = std::find_if(free_.begin(), free_.end(),
                               [size](const auto& range) { return range.second >= size; });
  if (it == free_.end()) return std::nullopt;
  const auto [offset, range_bytes] = *it;
  free_.erase(it);
  if (range_bytes > size) free_.emplace(offset + size, range_bytes - size);
  regions_.emplace(offset, size);
  free_bytes_ -= size;
  return offset;
}

absl::Status RegionAllocator::Free(uint64_t offset) {
  const auto region = regions_.find(offset);
  if (region == regions_.end()) {
    return absl::FailedPreconditionError(absl::StrCat("free region at offset ", offset,
                                                      ": no region begins there; ", regions_.size(),
                                                      " regions are in use"));
  }
  uint64_t begin = offset;
  uint64_t end = offset + region->second;
  free_bytes_ += region->second;
  regions_.erase(region);
  // Merge with the free range behind, then with the one in front.
  if (const auto next = free_.find(end); next != free_.end()) {
    end += next->second;
    free_.erase(next);
  }
  if (const auto next = free_.lower_bound(begin); next != free_.begin()) {
    if (const auto prev = std::prev(next); prev->first + prev->second == begin) {
      prev->second = end - prev->first;
      return absl::OkStatus();
    }
  }
  free_.emplace(begin, end - begin);
  return absl::OkStatus();
}

}  // namespace pagetide
