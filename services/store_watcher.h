// StoreWatcher: makes the page store a residency source of the router, as workers are. It follows
// the store's changes on a thread of its own, and comes back with back-off when the store fails;
// while it is away, the router plans without stored pages.
//
// Thread-safe. The store, the router and the clock outlive it; the destructor joins its thread.
#ifndef PAGETIDE_SERVICES_STORE_WATCHER_H_
#define PAGETIDE_SERVICES_STORE_WATCHER_H_

#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "base/mutex.h"
#include "core/page_store.h"
#include "core/router.h"

namespace pagetide {

class StoreWatcher {
 public:
  struct Options {
    std::string source_id = "store";  // its name among the workers
    std::string address;              // shown in lists
    absl::Duration initial_backoff = absl::Milliseconds(100);
    absl::Duration max_backoff = absl::Seconds(2);
  };

  StoreWatcher(Options options, PageStore* store, Router* router, const Clock* clock);
  // Waits until the store's Watch returns, which asks its callback several times a second.
  ~StoreWatcher();
  StoreWatcher(const StoreWatcher&) = delete;
  StoreWatcher& operator=(const StoreWatcher&) = delete;

 private:
  void Run();
  // One attachment: from Watch's first call to its end.
  struct Following {
    std::optional<AttachmentId> attachment;
    uint64_t number = 0;
    bool is_in_snapshot = false;
    std::vector<ResidencyDelta> changes;
  };
  absl::Status OnEvents(Following& following, bool is_snapshot, bool is_snapshot_end,
                        std::span<const StoreEvent> events);
  bool IsStopping() const;

  const Options options_;
  PageStore* const store_;
  Router* const router_;
  const Clock* const clock_;

  mutable Mutex mu_;
  CondVar stop_changed_;
  bool is_stopping_ ABSL_GUARDED_BY(mu_) = false;

  uint64_t next_incarnation_ = 0;  // of thread_
  std::thread thread_;             // "store-watch"
};

}  // namespace pagetide

#endif  // PAGETIDE_SERVICES_STORE_WATCHER_H_
