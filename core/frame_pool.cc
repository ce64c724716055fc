#include "core/frame_pool.h"

#include "absl/strings/str_cat.h"

namespace pagetide {

FramePool::FramePool(uint32_t num_frames)
    : num_frames_(num_frames), is_held_(num_frames + 1, false), last_tenant_(num_frames + 1, kNoTenant) {
  free_.reserve(num_frames);
  for (uint32_t f = num_frames; f >= 1; --f) free_.push_back(FrameId(f));
}

std::optional<FramePool::Grant> FramePool::Allocate(absl::string_view tenant) {
  if (free_.empty()) return std::nullopt;
  const uint32_t tenant_id =
      tenant_ids_.try_emplace(tenant, static_cast<uint32_t>(tenant_ids_.size()) + 1).first->second;
  const FrameId frame = free_.back();
  free_.pop_back();
  is_held_[frame.value()] = true;
  uint32_t& last = last_tenant_[frame.value()];
  const bool needs_zero = last != kNoTenant && last != tenant_id;
  last = tenant_id;
  return Grant{frame, needs_zero};
}

absl::Status FramePool::Release(FrameId frame) {
  if (frame.value() == 0 || frame.value() > num_frames_) {
    return absl::InvalidArgumentError(
        absl::StrCat("release frame ", frame.value(), ": the pool has frames 1 to ", num_frames_));
  }
  if (!is_held_[frame.value()]) {
    return absl::FailedPreconditionError(absl::StrCat("release frame ", frame.value(),
                                                      ": it is free already; ", free_.size(), " of ",
                                                      num_frames_, " are"));
  }
  is_held_[frame.value()] = false;
  free_.push_back(frame);
  return absl::OkStatus();
}

bool FramePool::IsFree(FrameId frame) const {
  return frame.value() > num_frames_ || !is_held_[frame.value()];
}

}  // namespace pagetide
