// KeyedLock: one holder a key, for steps that must not overlap for the same key and take disk time
// (a page's put, a record's compare-and-set). Keys are all taken or none, so that two holders of
// several keys cannot wait for each other. Thread-safe.
#ifndef PAGETIDE_KVSTORE_KEYED_LOCK_H_
#define PAGETIDE_KVSTORE_KEYED_LOCK_H_

#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "base/mutex.h"

namespace pagetide {

class KeyedLock {
 public:
  // Gives the keys back when destroyed. The lock outlives it.
  class Hold {
   public:
    Hold(KeyedLock* lock, std::vector<std::string> keys) : lock_(lock), keys_(std::move(keys)) {
      lock_->Acquire(keys_);
    }
    ~Hold() { lock_->Release(keys_); }
    Hold(const Hold&) = delete;
    Hold& operator=(const Hold&) = delete;

   private:
    KeyedLock* const lock_;
    const std::vector<std::string> keys_;
  };

 private:
  bool AllFree(const std::vector<std::string>& keys) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    for (const std::string& key : keys) {
      if (busy_.contains(key)) return false;
    }
    return true;
  }
  void Acquire(const std::vector<std::string>& keys) {
    MutexLock lock(&mu_);
    while (!AllFree(keys)) freed_.Wait(&mu_);
    busy_.insert(keys.begin(), keys.end());
  }
  void Release(const std::vector<std::string>& keys) {
    {
      MutexLock lock(&mu_);
      for (const std::string& key : keys) busy_.erase(key);
    }
    freed_.SignalAll();
  }

  Mutex mu_;
  CondVar freed_;
  absl::flat_hash_set<std::string> busy_ ABSL_GUARDED_BY(mu_);
};

}  // namespace pagetide

#endif  // PAGETIDE_KVSTORE_KEYED_LOCK_H_
