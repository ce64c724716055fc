// ComputeClaims: who computes which page right now, so that a second sequence with the same prompt
// waits for it instead of computing it too. A hint between prefills that race: whoever ignores it,
// or whose claim has ended, computes the page as ever, and the first commit wins.
//
// A claim ends with its time, with the page, or with its holder. A holder has one claim: the next
// takes the place of the one before. Not thread-safe: its owner locks.
#ifndef PAGETIDE_CORE_COMPUTE_CLAIMS_H_
#define PAGETIDE_CORE_COMPUTE_CLAIMS_H_

#include <cstddef>
#include <cstdint>

#include "absl/container/flat_hash_map.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "core/keys.h"

namespace pagetide {

class ComputeClaims {
 public:
  static constexpr size_t kDefaultMaxClaims = 65536;
  explicit ComputeClaims(size_t max_claims = kDefaultMaxClaims) : max_claims_(max_claims) {}

  struct Answer {
    bool is_granted = false;
    MonotonicTime ends;  // the claim's end, whoever holds it
  };
  // Claims the page of `key` for `duration` from `now` on, or says until when another holder has
  // it. A holder's repeat extends its claim. Of a full table the answer is a grant that nobody
  // else hears of: then both compute.
  Answer Claim(const PrefixKey& key, uint64_t holder, MonotonicTime now, absl::Duration duration);
  bool IsHeldByOther(const PrefixKey& key, uint64_t holder, MonotonicTime now) const;
  // The page is there.
  void Release(const PrefixKey& key);
  // The holder is gone. True if it held a claim.
  bool ReleaseHolder(uint64_t holder);
  // Claims, those that have ended by their time and were not looked at since among them.
  size_t size() const { return claims_.size(); }

 private:
  struct Held {
    uint64_t holder = 0;
    MonotonicTime ends;
  };
  void ForgetEnded(MonotonicTime now);

  const size_t max_claims_;
  absl::flat_hash_map<PrefixKey, Held> claims_;
  absl::flat_hash_map<uint64_t, PrefixKey> by_holder_;
};

}  // namespace pagetide

#endif  // PAGETIDE_CORE_COMPUTE_CLAIMS_H_
