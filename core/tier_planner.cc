#include "core/tier_planner.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"

namespace pagetide {

SpillPlan PlanSpill(const TierSnapshot& snapshot) {
  SpillPlan plan;
  const uint32_t in_use = snapshot.num_frames - std::min(snapshot.num_frames, snapshot.free_frames);
  if (in_use <= snapshot.high_watermark * snapshot.num_frames) return plan;
  const uint32_t keep =
      static_cast<uint32_t>(std::floor(snapshot.low_watermark * snapshot.num_frames));
  const uint32_t excess = in_use - std::min(in_use, keep);
  plan.evict_clean = std::min(excess, snapshot.evictable_clean);
  plan.spill_dirty = std::min(excess - plan.evict_clean, snapshot.evictable_dirty);
  return plan;
}

RestoreEstimate EstimateRestore(uint64_t bytes, double store_bytes_per_second, uint64_t tokens,
                                double prefill_tokens_per_second) {
  RestoreEstimate estimate;
  if (store_bytes_per_second <= 0 || prefill_tokens_per_second <= 0) {
    estimate.explanation = "restore: rates are not measured yet";
    return estimate;
  }
  estimate.load = absl::Seconds(static_cast<double>(bytes) / store_bytes_per_second);
  estimate.recompute = absl::Seconds(static_cast<double>(tokens) / prefill_tokens_per_second);
  estimate.worth_it = estimate.load < estimate.recompute;
  estimate.explanation =
      absl::StrCat("restore of ", bytes, " bytes takes ", absl::FormatDuration(estimate.load),
                   ", recomputing ", tokens, " tokens ", absl::FormatDuration(estimate.recompute));
  return estimate;
}

void RateMeter::Add(double units, absl::Duration duration) {
  const double seconds = absl::ToDoubleSeconds(duration);
  if (!(units > 0) || !(seconds > 0) || !std::isfinite(units) || !std::isfinite(seconds)) return;
  const double rate = units / seconds;
  per_second_ = per_second_ == 0 ? rate : per_second_ + weight_ * (rate - per_second_);
}

}  // namespace pagetide
