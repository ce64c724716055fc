// Manifests of checkpoints that ended, on their way out of the store.
#include <algorithm>
#include <utility>

#include "base/log.h"
#include "worker/model_host_impl.h"

namespace pagetide {
namespace {

// Manifests that wait to be deleted, and how many of them one job deletes.
constexpr size_t kMaxReleased = 4096;
constexpr size_t kReleaseBatch = 64;
// Between attempts to delete manifests in a store that is away.
constexpr absl::Duration kReleaseAgain = absl::Seconds(1);

}  // namespace

void ModelHostImpl::Release(const std::string& manifest, uint64_t version) {
  released_manifests_.push_back({manifest, version});
  TrimReleases();
  StartReleases();
}

void ModelHostImpl::TrimReleases() {
  // The oldest end by themselves, when their time is over.
  while (released_manifests_.size() > kMaxReleased) released_manifests_.pop_front();
}

void ModelHostImpl::StartReleases() {
  if (is_releasing_ || released_manifests_.empty() || clock_->MonotonicNow() < release_again_at_) {
    return;
  }
  const auto end =
      released_manifests_.begin() + std::min(released_manifests_.size(), kReleaseBatch);
  std::deque<ReleasedManifest> batch(released_manifests_.begin(), end);
  released_manifests_.erase(released_manifests_.begin(), end);
  is_releasing_ = true;
  ++jobs_in_flight_;
  const absl::Status scheduled = io_->Schedule([this, batch] { RunReleases(batch); });
  if (scheduled.ok()) return;
  --jobs_in_flight_;
  EndReleases(std::move(batch));
}

void ModelHostImpl::RunReleases(std::deque<ReleasedManifest> batch) {
  // Of all together: a store that hangs holds one thread for one timeout.
  const MonotonicTime deadline = clock_->MonotonicNow() + options_.store_timeout;
  for (; !batch.empty(); batch.pop_front()) {
    // Each has a name that nobody else uses: no fence is needed to delete it.
    const absl::Status deleted =
        store_->DeleteManifest(batch.front().name, batch.front().version, std::nullopt, deadline);
    if (absl::IsUnavailable(deleted) || absl::IsDeadlineExceeded(deleted)) break;
    if (!deleted.ok() && !absl::IsNotFound(deleted)) {
      LogWarning("worker", "delete checkpoint ", batch.front().name, ": ", deleted.message(),
                 "; it ends when its time is over");
    }
  }
  {
    MutexLock lock(&mu_);
    EndReleases(std::move(batch));
    StartReleases();
  }
  FinishJob();
}

void ModelHostImpl::EndReleases(std::deque<ReleasedManifest> left) {
  is_releasing_ = false;
  if (left.empty()) return;
  release_again_at_ = clock_->MonotonicNow() + kReleaseAgain;
  released_manifests_.insert(released_manifests_.begin(), left.begin(), left.end());
  TrimReleases();
}

}  // namespace pagetide
