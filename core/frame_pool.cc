#include "core/frame_pool.h"

#include "absl/strings/str_cat.h"

namespace pagetide {

FramePool::FramePool(uint32_t num_frames)
    : num_frames_(num_frames),
      is_held_(size_t{num_frames} + 1, false),
      is_dirty_(size_t{num_frames} + 1, false),
      last_tenant_(size_t{num_frames} + 1, kNoTenant),
      tenants_(1) {
  free_.reserve(num_frames);
  for (uint32_t f = num_frames; f >= 1; --f) free_.push_back(FrameId(f));
}

std::optional<FramePool::Grant> FramePool::Allocate(absl::string_view tenant) {
  if (free_.empty()) return std::nullopt;
  const FrameId frame = free_.back();
  free_.pop_back();
  is_held_[frame.value()] = true;
  const uint32_t tenant_id = InternTenant(tenant);
  uint32_t& last = last_tenant_[frame.value()];
  if (last != tenant_id) {
    if (last != kNoTenant) {
      is_dirty_[frame.value()] = true;
      ForgetFrameOf(last);
    }
    ++tenants_[tenant_id].num_frames;
    last = tenant_id;
  }
  return Grant{frame, is_dirty_[frame.value()]};
}

void FramePool::MarkClean(FrameId frame) {
  if (!IsFree(frame)) is_dirty_[frame.value()] = false;
}

uint32_t FramePool::InternTenant(absl::string_view tenant) {
  if (const auto it = tenant_ids_.find(tenant); it != tenant_ids_.end()) return it->second;
  uint32_t id;
  if (free_tenant_ids_.empty()) {
    id = static_cast<uint32_t>(tenants_.size());
    tenants_.emplace_back();
  } else {
    id = free_tenant_ids_.back();
    free_tenant_ids_.pop_back();
  }
  tenants_[id].name = std::string(tenant);
  tenant_ids_.emplace(tenants_[id].name, id);
  return id;
}

void FramePool::ForgetFrameOf(uint32_t tenant_id) {
  TenantEntry& entry = tenants_[tenant_id];
  if (--entry.num_frames > 0) return;
  tenant_ids_.erase(entry.name);
  entry.name.clear();
  free_tenant_ids_.push_back(tenant_id);
}

absl::Status FramePool::Release(FrameId frame) {
  if (frame.value() == 0 || frame.value() > num_frames_) {
    return absl::InvalidArgumentError(
        absl::StrCat("release frame ", frame.value(), ": the pool has frames 1 to ", num_frames_));
  }
  if (!is_held_[frame.value()]) {
    return absl::FailedPreconditionError(absl::StrCat("release frame ", frame.value(),
                                                      ": it is free already; ", free_.size(),
                                                      " of ", num_frames_, " are"));
  }
  is_held_[frame.value()] = false;
  free_.push_back(frame);
  return absl::OkStatus();
}

bool FramePool::IsFree(FrameId frame) const {
  return frame.value() > num_frames_ || !is_held_[frame.value()];
}

}  // namespace pagetide
