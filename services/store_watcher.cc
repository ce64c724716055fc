#include "services/store_watcher.h"

#include <pthread.h>

#include <algorithm>
#include <utility>

#include "base/log.h"
#include "base/status_macros.h"

namespace pagetide {

StoreWatcher::StoreWatcher(Options options, PageStore* store, Router* router, const Clock* clock)
    : options_(std::move(options)), store_(store), router_(router), clock_(clock), thread_([this] {
        Run();
      }) {
  pthread_setname_np(thread_.native_handle(), "store-watch");
}

StoreWatcher::~StoreWatcher() {
  {
    MutexLock lock(&mu_);
    is_stopping_ = true;
  }
  stop_changed_.SignalAll();
  thread_.join();
}

bool StoreWatcher::IsStopping() const {
  MutexLock lock(&mu_);
  return is_stopping_;
}

void StoreWatcher::Run() {
  absl::Duration backoff = options_.initial_backoff;
  while (!IsStopping()) {
    Following following;
    absl::Status refused;  // by the router
    const absl::Status watched = store_->Watch(
        [&](bool is_snapshot, bool is_snapshot_end, std::span<const StoreEvent> events) {
          if (IsStopping()) return false;
          refused = OnEvents(following, is_snapshot, is_snapshot_end, events);
          return refused.ok();
        },
        MonotonicTime::InfiniteFuture());
    if (following.attachment.has_value()) {
      router_->Detach(*following.attachment, "the watch of the store ended");
      backoff = options_.initial_backoff;
    }
    if (IsStopping()) return;
    LogWarning("router", "watch of the store ended, again in ", absl::FormatDuration(backoff), ": ",
               (refused.ok() ? watched : refused).ToString());
    MutexLock lock(&mu_);
    const MonotonicTime until = clock_->MonotonicNow() + backoff;
    while (!is_stopping_ && clock_->MonotonicNow() < until) {
      stop_changed_.WaitWithTimeout(&mu_, until - clock_->MonotonicNow());
    }
    backoff = std::min(2 * backoff, options_.max_backoff);
  }
}

absl::Status StoreWatcher::OnEvents(Following& following, bool is_snapshot, bool is_snapshot_end,
                                    std::span<const StoreEvent> events) {
  if (!following.attachment.has_value()) {
    PT_ASSIGN_OR_RETURN(const Router::Attached attached,
                        router_->Attach({.worker_id = options_.source_id,
                                         .incarnation = ++next_incarnation_,
                                         .address = options_.address,
                                         .role = SourceRole::kStore,
                                         .is_in_process = true}));
    following.attachment = attached.id;
  }
  // The watch is alive, or it would have ended.
  if (!is_snapshot && events.empty()) return router_->OnLoad(*following.attachment, {});
  following.changes.clear();
  for (const StoreEvent& event : events) {
    following.changes.push_back({.hint = PrefixHint::Of(event.prefix),
                                 .group = event.group,
                                 .tier = Tier::kStore,
                                 .is_removed = event.removed,
                                 .page_bytes = event.body_bytes});
  }
  // The store marks every part of a snapshot, a report only the first.
  const ResidencyReport report{.number = ++following.number,
                               .is_snapshot = is_snapshot && !following.is_in_snapshot,
                               .is_snapshot_end = is_snapshot_end,
                               .changes = following.changes};
  following.is_in_snapshot = is_snapshot && !is_snapshot_end;
  PT_ASSIGN_OR_RETURN(const auto because, router_->OnResidency(*following.attachment, report));
  if (because.has_value()) return absl::InternalError(*because);
  return absl::OkStatus();
}

}  // namespace pagetide
