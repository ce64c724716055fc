// Readiness: a sequence's way back into its frames, as it goes on.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "worker/model_host_impl.h"

namespace pagetide {
namespace {

// How often a watcher is asked whether it is still there.
constexpr absl::Duration kAskWatcher = absl::Milliseconds(100);

absl::Status WatcherLeft() {
  return absl::CancelledError("watch readiness: the caller left");
}

}  // namespace

Readiness ModelHostImpl::ReadinessOf(const Sequence& sequence) const {
  Readiness readiness;
  readiness.length = sequence.length();
  readiness.resident_tokens = ResidentTokens(sequence);
  readiness.shortened_because = sequence.shortened_because;
  return readiness;
}

bool ModelHostImpl::IsRestoring(const Sequence& sequence) const {
  for (const PageTable& table : sequence.tables) {
    for (const Extent& extent : table.extents()) {
      if (pages_.Find(extent.page)->state() == PageState::kRestoring) return true;
    }
  }
  return false;
}

bool ModelHostImpl::Tell(ReadinessWatcher watcher, const Readiness& readiness) {
  mu_.Unlock();
  const bool go_on = watcher(readiness);
  mu_.Lock();
  return go_on;
}

absl::Status ModelHostImpl::WatchReadiness(const Tenant& tenant, SequenceId id,
                                           MonotonicTime deadline, ReadinessWatcher watcher) {
  absl::Status status;
  {
    MutexLock lock(&mu_);
    status = WatchLocked(tenant, id, deadline, watcher);
  }
  Flush();
  return status;
}

absl::Status ModelHostImpl::WatchLocked(const Tenant& tenant, SequenceId id, MonotonicTime deadline,
                                        ReadinessWatcher watcher) {
  for (;;) {
    PT_ASSIGN_OR_RETURN(const SequencePtr sequence, FindSequence(tenant, id));
    if (!sequence->pending) CutIfLost(*sequence).IgnoreError();  // said in shortened_because
    Readiness readiness = ReadinessOf(*sequence);
    readiness.done = readiness.resident_tokens == readiness.length;
    if (!Tell(watcher, readiness)) return WatcherLeft();
    if (readiness.done) return absl::OkStatus();
    if (sequence->closed) continue;
    const absl::Duration left = deadline - clock_->MonotonicNow();
    if (left <= absl::ZeroDuration()) {
      return absl::DeadlineExceededError(absl::StrCat("watch readiness of sequence ", id.ToString(),
                                                      ": ", readiness.resident_tokens, " of ",
                                                      readiness.length, " tokens are resident"));
    }
    if (IsRestoring(*sequence)) {
      changed_.WaitWithTimeout(&mu_, std::min(left, kAskWatcher));
      continue;
    }
    // Nothing on its way: get in line for the frames. The place in line is kept however long it
    // takes: whoever gave it up to report would start again behind all others.
    std::vector<Extent> extents;
    for (const PageTable& table : sequence->tables) {
      extents.insert(extents.end(), table.extents().begin(), table.extents().end());
    }
    const Need need = NeedOf(extents);
    bool has_left = false;
    const auto report = [&]() {
      mu_.AssertHeld();
      has_left = !Tell(watcher, ReadinessOf(*sequence));
      return !has_left && !sequence->closed;
    };
    Acquired got;
    const absl::Status status = Acquire(tenant.name, need, deadline, &got, report);
    if (status.ok()) {
      // Read before the pins go: from then on the pages may be taken by others.
      readiness = ReadinessOf(*sequence);
      readiness.resident_tokens = readiness.length;
      readiness.done = true;
      ReleaseAcquired(got);
    } else if (absl::IsUnavailable(status) && !sequence->was_appended && !sequence->pending &&
               !sequence->closed) {
      // Any store error means: recompute from the longest valid prefix.
      const uint64_t resident = ResidentTokens(*sequence);
      const uint64_t before = sequence->length();
      Truncate(*sequence, resident);
      ++counters_.prefixes_lost;
      sequence->shortened_because =
          absl::StrCat("the store did not answer: ", before, " tokens became ", sequence->length());
      continue;
    } else if (absl::IsInvalidArgument(status)) {
      // Larger than the pool: it can never be resident as a whole.
      readiness = ReadinessOf(*sequence);
      readiness.done = true;
    } else if (has_left) {
      return WatcherLeft();
    } else if (GetReason(status) != "PREFIX_LOST" && !absl::IsAborted(status) &&
               !sequence->closed) {
      return status;
    }
    if (!readiness.done && sequence->pending && GetReason(status) == "PREFIX_LOST") {
      // What is lost is cut off when the write ends, and not before.
      changed_.WaitWithTimeout(&mu_, std::min(left, kAskWatcher));
    }
    if (sequence->closed || !readiness.done) continue;
    return Tell(watcher, readiness) ? absl::OkStatus() : WatcherLeft();
  }
}

}  // namespace pagetide
