#include "core/compute_claims.h"

namespace pagetide {

ComputeClaims::Answer ComputeClaims::Claim(const PrefixKey& key, uint64_t holder, MonotonicTime now,
                                           absl::Duration duration) {
  if (IsHeldByOther(key, holder, now)) return {false, claims_.find(key)->second.ends};
  Release(key);
  ReleaseHolder(holder);
  const MonotonicTime ends = now + duration;
  if (claims_.size() >= max_claims_) ForgetEnded(now);
  if (claims_.size() < max_claims_) {
    claims_[key] = {holder, ends};
    by_holder_[holder] = key;
  }
  return {true, ends};
}

bool ComputeClaims::IsHeldByOther(const PrefixKey& key, uint64_t holder, MonotonicTime now) const {
  const auto found = claims_.find(key);
  return found != claims_.end() && found->second.holder != holder && found->second.ends > now;
}

void ComputeClaims::Release(const PrefixKey& key) {
  const auto found = claims_.find(key);
  if (found == claims_.end()) return;
  by_holder_.erase(found->second.holder);
  claims_.erase(found);
}

bool ComputeClaims::ReleaseHolder(uint64_t holder) {
  const auto found = by_holder_.find(holder);
  if (found == by_holder_.end()) return false;
  claims_.erase(found->second);
  by_holder_.erase(found);
  return true;
}

void ComputeClaims::ForgetEnded(MonotonicTime now) {
  for (auto it = claims_.begin(); it != claims_.end();) {
    if (it->second.ends > now) {
      ++it;
      continue;
    }
    by_holder_.erase(it->second.holder);
    claims_.erase(it++);
  }
}

}  // namespace pagetide
