#include "clients/cpp/worker_connection.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "base/status_macros.h"

namespace pagetide {
namespace {
constexpr absl::Duration kLocalPlaneTimeout = absl::Seconds(2);
}  // namespace

WorkerConnection::WorkerConnection(Options options)
    : WorkerConnection(options, MakeChannel(options.address, options.channel)) {}

WorkerConnection::WorkerConnection(Options options, std::shared_ptr<grpc::Channel> channel)
    : options_(std::move(options)),
      sequences_(v1::SequenceService::NewStub(channel)),
      edits_(v1::SequenceEditService::NewStub(channel)),
      prefixes_(v1::PrefixService::NewStub(channel)),
      sessions_(v1::SessionService::NewStub(channel)),
      admin_(v1::AdminService::NewStub(channel)) {}

std::shared_ptr<LocalStaging> WorkerConnection::Staging() {
  {
    MutexLock lock(&mu_);
    if (is_staging_decided_ || options_.local_socket.empty()) return staging_;
  }
  // Two first callers may both connect; the second connection is dropped.
  auto connected =
      LocalStaging::Connect(options_.local_socket, options_.staging_bytes, kLocalPlaneTimeout);
  if (!connected.ok()) {
    LogInfo("client", "rows go by RPC: ", connected.status().message());
  }
  MutexLock lock(&mu_);
  if (!is_staging_decided_) {
    is_staging_decided_ = true;
    if (connected.ok()) staging_ = *std::move(connected);
  }
  return staging_;
}

void WorkerConnection::DropStaging() {
  MutexLock lock(&mu_);
  is_staging_decided_ = true;
  staging_.reset();
}

absl::StatusOr<std::shared_ptr<grpc::Channel>> WorkerConnection::BulkChannel() {
  {
    MutexLock lock(&mu_);
    if (bulk_ != nullptr) return bulk_;
  }
  // Connects without the lock. Two first callers may both make one; the second one's is dropped.
  PT_ASSIGN_OR_RETURN(std::shared_ptr<grpc::Channel> made,
                      MakeBulkChannel(options_.address, options_.channel));
  MutexLock lock(&mu_);
  if (bulk_ == nullptr) bulk_ = std::move(made);
  return bulk_;
}

void WorkerConnection::DropBulkChannel(const std::shared_ptr<grpc::Channel>& channel) {
  MutexLock lock(&mu_);
  if (bulk_ == channel) bulk_.reset();
}

absl::StatusOr<std::shared_ptr<LocalStaging>> WorkerConnection::SharedPool(
    absl::string_view model_digest) {
  const std::string digest(model_digest);
  if (options_.local_socket.empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat("share the pool of worker ", options_.address, ": it has no local plane"));
  }
  {
    MutexLock lock(&mu_);
    const auto it = pools_.find(digest);
    if (it != pools_.end() && it->second->IsConnected()) return it->second;
  }
  // Connects without the lock; of two first callers the later one's connection stays.
  PT_ASSIGN_OR_RETURN(std::shared_ptr<LocalStaging> pool,
                      LocalStaging::Connect(options_.local_socket, /*staging_bytes=*/1,
                                            kLocalPlaneTimeout, digest));
  if (pool->pool().empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat("share the pool of worker ", options_.address,
                     ": the host cannot address its frames: ", pool->why_no_pool()));
  }
  MutexLock lock(&mu_);
  pools_[digest] = pool;
  return pool;
}

absl::StatusOr<std::map<std::string, double>> WorkerConnection::GetStats() const {
  PT_ASSIGN_OR_RETURN(const v1::GetStatsResponse response,
                      CallUnary(options_.call, admin_.get(),
                                &v1::AdminService::StubInterface::GetStats, v1::GetStatsRequest()));
  return std::map<std::string, double>(response.values().begin(), response.values().end());
}

absl::StatusOr<v1::EvictPagesResponse> WorkerConnection::EvictPages(uint64_t max_pages) const {
  v1::EvictPagesRequest request;
  request.set_max_pages(max_pages);
  return CallUnary(options_.call, admin_.get(), &v1::AdminService::StubInterface::EvictPages,
                   request);
}

}  // namespace pagetide
