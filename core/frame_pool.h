// FramePool: which frames of one tier and layer group are free. Accounting only, no memory.
// Frame 0 is the null frame that pads block tables; 1…num_frames are handed out. Not thread-safe.
#ifndef PAGETIDE_CORE_FRAME_POOL_H_
#define PAGETIDE_CORE_FRAME_POOL_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "core/ids.h"

namespace pagetide {

class FramePool {
 public:
  struct Grant {
    FrameId frame;
    // It may hold another tenant's bytes: zero it, or overwrite it whole, before anything of it can
    // be read; then MarkClean.
    bool needs_zero = false;
  };

  explicit FramePool(uint32_t num_frames);

  // Nullopt when none is free.
  std::optional<Grant> Allocate(absl::string_view tenant);
  // The frame holds nothing of another tenant any more. Without it every later grant needs zeroing
  // again, to the same tenant too, so that a grant given back unused leaks nothing. Ignored for
  // frames that nobody holds.
  void MarkClean(FrameId frame);
  // What the frame holds must not be seen by anybody: the next grant needs zeroing, whoever gets
  // it.
  void MarkDirty(FrameId frame) { is_dirty_.at(frame.value()) = true; }
  // FAILED_PRECONDITION for a frame that is free already; INVALID_ARGUMENT for one that is not
  // ours.
  absl::Status Release(FrameId frame);

  uint32_t num_frames() const { return num_frames_; }
  uint32_t num_free() const { return static_cast<uint32_t>(free_.size()); }
  // True for the null frame and unknown frames too: nobody holds them.
  bool IsFree(FrameId frame) const;
  // Tenants that some frame remembers: at most num_frames, however many there ever were.
  size_t num_tenants() const { return tenant_ids_.size(); }

 private:
  static constexpr uint32_t kNoTenant = 0;

  // A tenant that used some frame last. Forgotten, and its id reused, when no frame remembers it.
  struct TenantEntry {
    std::string name;
    uint32_t num_frames = 0;
  };

  uint32_t InternTenant(absl::string_view tenant);
  void ForgetFrameOf(uint32_t tenant_id);

  const uint32_t num_frames_;
  std::vector<FrameId> free_;          // last released is reused first: it is warm in the caches
  std::vector<bool> is_held_;          // [frame]
  std::vector<bool> is_dirty_;         // [frame]; may hold bytes of a tenant before the last one
  std::vector<uint32_t> last_tenant_;  // [frame]; kNoTenant: never used, still zero
  std::vector<TenantEntry> tenants_;   // [id]; [kNoTenant] is nobody
  std::vector<uint32_t> free_tenant_ids_;
  absl::flat_hash_map<std::string, uint32_t> tenant_ids_;
};

}  // namespace pagetide

#endif  // PAGETIDE_CORE_FRAME_POOL_H_
