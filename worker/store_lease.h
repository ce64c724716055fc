// StoreLeaseKeeper: holds one store lease for this process's life: acquires, renews at a third of
// the time to live, and says at any moment whether the lease can still be relied on.
//
// The store times a lease from receipt; we count from *sending*, minus a margin, on the monotonic
// clock, so that we always stop believing before the store gives the name to another (DESIGN rule
// 8). Thread-safe. The store and the clock outlive the keeper.
#ifndef PAGETIDE_WORKER_STORE_LEASE_H_
#define PAGETIDE_WORKER_STORE_LEASE_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "base/mutex.h"
#include "core/page_store.h"

namespace pagetide {

class StoreLeaseKeeper {
 public:
  struct Options {
    std::string name;  // "worker/<id>"
    uint64_t incarnation = 0;
    absl::Duration ttl = absl::Seconds(5);
    // Taken off what is left, for the drift of two clocks and the time to act on the answer.
    // At most a quarter of ttl is taken.
    absl::Duration margin = absl::Milliseconds(500);
    // After each grant (not renewal), by the thread that renews: to be quick, a third of ttl at
    // most. May be null.
    std::function<void()> on_granted;
  };
  enum class State {
    kAcquiring,  // not held yet; the store has not answered or could not be reached
    kHeld,
    kHeldByOther,  // another incarnation has the name; we keep asking
    kLost,         // was held, ran out or was given to another; we ask again
  };

  StoreLeaseKeeper(Options options, PageStore* store, const Clock* clock);
  // Stops and releases.
  ~StoreLeaseKeeper();

  // Starts the thread. Once.
  void Start();
  // Joins the thread and gives the lease back, best effort. Idempotent.
  void Stop();

  // One acquisition or renewal, now; returns how long to wait before the next. The thread calls it;
  // tests call it instead of Start.
  absl::Duration Step();

  bool IsHeld() const;
  // Waits until the lease was granted once, or until the deadline; then as state(). A lease that
  // was held and lost is not waited for.
  State AwaitFirst(MonotonicTime deadline);
  State state() const;
  // Of the current lease; 0 before the first.
  uint64_t epoch() const;
  // Why the last attempt failed; OK after a success.
  absl::Status last_error() const;

 private:
  void Run();
  absl::Duration Acquire(MonotonicTime sent);
  absl::Duration Renew(const StoreLease& lease, MonotonicTime sent);
  void Held(const StoreLease& lease, MonotonicTime sent);

  const Options options_;
  PageStore* const store_;
  const Clock* const clock_;
  std::thread thread_;

  mutable Mutex mu_;
  CondVar wake_;     // the thread, to stop
  CondVar granted_;  // callers of AwaitFirst
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  bool was_held_ ABSL_GUARDED_BY(mu_) = false;
  bool held_by_other_ ABSL_GUARDED_BY(mu_) = false;
  std::optional<StoreLease> lease_ ABSL_GUARDED_BY(mu_);
  MonotonicTime valid_until_ ABSL_GUARDED_BY(mu_);
  uint64_t epoch_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Status last_error_ ABSL_GUARDED_BY(mu_);
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_STORE_LEASE_H_
