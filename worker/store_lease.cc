#include "worker/store_lease.h"

#include <pthread.h>

#include <algorithm>
#include <utility>

#include "base/log.h"

namespace pagetide {

StoreLeaseKeeper::StoreLeaseKeeper(Options options, PageStore* store, const Clock* clock)
    : options_(std::move(options)), store_(store), clock_(clock) {}

StoreLeaseKeeper::~StoreLeaseKeeper() {
  Stop();
}

void StoreLeaseKeeper::Start() {
  thread_ = std::thread([this] { Run(); });
}

void StoreLeaseKeeper::Stop() {
  {
    MutexLock lock(&mu_);
    stopping_ = true;
  }
  wake_.SignalAll();
  granted_.SignalAll();
  if (thread_.joinable()) thread_.join();
  std::optional<StoreLease> lease;
  {
    MutexLock lock(&mu_);
    lease = std::exchange(lease_, std::nullopt);
    valid_until_ = MonotonicTime{};
  }
  if (!lease.has_value()) return;
  // A lease that cannot be given back runs out by itself.
  const absl::Status released =
      store_->ReleaseLease(*lease, clock_->MonotonicNow() + absl::Seconds(1));
  if (!released.ok())
    LogWarning("worker", "release lease ", options_.name, ": ", released.message());
}

void StoreLeaseKeeper::Run() {
  pthread_setname_np(pthread_self(), "store-lease");
  for (;;) {
    const absl::Duration wait = Step();
    MutexLock lock(&mu_);
    if (!stopping_) wake_.WaitWithTimeout(&mu_, wait);
    if (stopping_) return;
  }
}

absl::Duration StoreLeaseKeeper::Step() {
  const MonotonicTime sent = clock_->MonotonicNow();
  std::optional<StoreLease> lease;
  {
    MutexLock lock(&mu_);
    if (lease_.has_value() && sent >= valid_until_) lease_.reset();
    lease = lease_;
  }
  return lease.has_value() ? Renew(*lease, sent) : Acquire(sent);
}

absl::Duration StoreLeaseKeeper::Acquire(MonotonicTime sent) {
  absl::StatusOr<StoreLease> lease = store_->AcquireLease(options_.name, options_.incarnation,
                                                          options_.ttl, sent + options_.ttl / 3);
  if (lease.ok()) {
    Held(*lease, sent);
    LogInfo("worker", "holds store lease ", options_.name, ", epoch ", lease->epoch);
    if (options_.on_granted) options_.on_granted();
    return options_.ttl / 3;
  }
  MutexLock lock(&mu_);
  held_by_other_ = absl::IsAlreadyExists(lease.status());
  last_error_ = lease.status();
  return options_.ttl / 10;
}

absl::Duration StoreLeaseKeeper::Renew(const StoreLease& lease, MonotonicTime sent) {
  const absl::Status renewed = store_->RenewLease(lease, options_.ttl, sent + options_.ttl / 3);
  if (renewed.ok()) {
    Held(lease, sent);
    return options_.ttl / 3;
  }
  {
    MutexLock lock(&mu_);
    last_error_ = renewed;
    // An unreachable store says nothing about the lease: it holds until its time is over.
    if (absl::IsFailedPrecondition(renewed) || absl::IsNotFound(renewed)) lease_.reset();
  }
  LogWarning("worker", "renew store lease ", options_.name, ": ", renewed.message());
  return options_.ttl / 10;
}

void StoreLeaseKeeper::Held(const StoreLease& lease, MonotonicTime sent) {
  MutexLock lock(&mu_);
  lease_ = lease;
  epoch_ = lease.epoch;
  valid_until_ = sent + options_.ttl - std::min(options_.margin, options_.ttl / 4);
  was_held_ = true;
  held_by_other_ = false;
  last_error_ = absl::OkStatus();
  granted_.SignalAll();
}

StoreLeaseKeeper::State StoreLeaseKeeper::AwaitFirst(MonotonicTime deadline) {
  {
    MutexLock lock(&mu_);
    while (!was_held_ && !stopping_) {
      const absl::Duration left = deadline - clock_->MonotonicNow();
      if (left <= absl::ZeroDuration()) break;
      granted_.WaitWithTimeout(&mu_, left);
    }
  }
  return state();
}

bool StoreLeaseKeeper::IsHeld() const {
  return state() == State::kHeld;
}

StoreLeaseKeeper::State StoreLeaseKeeper::state() const {
  const MonotonicTime now = clock_->MonotonicNow();
  MutexLock lock(&mu_);
  if (lease_.has_value() && now < valid_until_) return State::kHeld;
  if (held_by_other_) return State::kHeldByOther;
  return was_held_ ? State::kLost : State::kAcquiring;
}

uint64_t StoreLeaseKeeper::epoch() const {
  MutexLock lock(&mu_);
  return epoch_;
}

absl::Status StoreLeaseKeeper::last_error() const {
  MutexLock lock(&mu_);
  return last_error_;
}

}  // namespace pagetide
