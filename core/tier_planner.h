// TierPlanner: what to spill, and whether a restore pays. Pure functions of what is measured.
#ifndef PAGETIDE_CORE_TIER_PLANNER_H_
#define PAGETIDE_CORE_TIER_PLANNER_H_

#include <cstdint>
#include <string>

#include "absl/time/time.h"

namespace pagetide {

struct TierSnapshot {
  uint32_t num_frames = 0;
  uint32_t free_frames = 0;
  uint32_t evictable_clean = 0;  // the store has them, or nobody needs them
  uint32_t evictable_dirty = 0;
  double high_watermark = 0.9;  // fraction of frames in use
  double low_watermark = 0.75;
};

struct SpillPlan {
  uint32_t evict_clean = 0;
  uint32_t spill_dirty = 0;
};

// Nothing up to the high watermark; above it, enough to come down to the low one, clean pages
// first.
SpillPlan PlanSpill(const TierSnapshot& snapshot);

struct RestoreEstimate {
  absl::Duration load;
  absl::Duration recompute;
  bool worth_it = true;
  std::string explanation;
};

// A restore is planned only where it is predicted to be faster than recomputing (DESIGN rule 11). A
// rate of 0 is not known yet: then the restore is tried, which measures it.
RestoreEstimate EstimateRestore(uint64_t bytes, double store_bytes_per_second, uint64_t tokens,
                                double prefill_tokens_per_second);

// Exponentially weighted mean of units per second. Not thread-safe.
class RateMeter {
 public:
  // `weight`: share of a new sample, 0 to 1.
  explicit RateMeter(double weight = 0.2) : weight_(weight) {}
  // Samples without duration or units, or with infinite ones, say nothing and are ignored.
  void Add(double units, absl::Duration duration);
  double per_second() const { return per_second_; }  // 0 before the first sample

 private:
  double weight_;
  double per_second_ = 0;
};

}  // namespace pagetide

#endif  // PAGETIDE_CORE_TIER_PLANNER_H_
