// KeyedLock: one holder a key, for steps that must not overlap for the same key and take disk time
// (a page's put, a record's compare-and-set). Keys are all taken or none, so that two holders of
// several keys cannot wait for each other. Thread-safe. The clock outlives it.
#ifndef PAGETIDE_KVSTORE_KEYED_LOCK_H_
#define PAGETIDE_KVSTORE_KEYED_LOCK_H_

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "base/mutex.h"

namespace pagetide {

class KeyedLock {
 public:
  explicit KeyedLock(const Clock* clock) : clock_(clock) {}

  // Gives the keys back when destroyed. The lock outlives it.
  class Hold {
   public:
    // Waits for those who have one of the keys, until `deadline`. Without one: for background work,
    // which can wait for calls, as all of theirs end.
    Hold(KeyedLock* lock, std::vector<std::string> keys,
         MonotonicTime deadline = MonotonicTime::InfiniteFuture())
        : lock_(lock), keys_(std::move(keys)), status_(lock_->Acquire(keys_, deadline)) {}
    ~Hold() {
      if (status_.ok()) lock_->Release(keys_);
    }
    Hold(const Hold&) = delete;
    Hold& operator=(const Hold&) = delete;

    // DEADLINE_EXCEEDED: none of the keys is held.
    const absl::Status& status() const { return status_; }

   private:
    KeyedLock* const lock_;
    const std::vector<std::string> keys_;
    const absl::Status status_;
  };

 private:
  bool AllFree(const std::vector<std::string>& keys) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return std::none_of(keys.begin(), keys.end(), [this](const std::string& key) {
      mu_.AssertHeld();
      return busy_.contains(key);
    });
  }
  absl::Status Acquire(const std::vector<std::string>& keys, MonotonicTime deadline) {
    MutexLock lock(&mu_);
    while (!AllFree(keys)) {
      const absl::Duration left = deadline - clock_->MonotonicNow();
      if (left <= absl::ZeroDuration()) {
        return absl::DeadlineExceededError(
            absl::StrCat("wait for ", keys.size(), " keys that other calls work on: ", busy_.size(),
                         " are busy"));
      }
      freed_.WaitWithTimeout(&mu_, std::min(left, absl::Seconds(1)));
    }
    busy_.insert(keys.begin(), keys.end());
    return absl::OkStatus();
  }
  void Release(const std::vector<std::string>& keys) {
    {
      MutexLock lock(&mu_);
      for (const std::string& key : keys) busy_.erase(key);
    }
    freed_.SignalAll();
  }

  const Clock* const clock_;
  Mutex mu_;
  CondVar freed_;
  absl::flat_hash_set<std::string> busy_ ABSL_GUARDED_BY(mu_);
};

}  // namespace pagetide

#endif  // PAGETIDE_KVSTORE_KEYED_LOCK_H_
