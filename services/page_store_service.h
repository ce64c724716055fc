// PageStoreServiceImpl: pagetide.v1.PageStoreService over any PageStore. Decodes, makes one call of
// the port on a worker thread (the port blocks), encodes.
//
// PutPages and GetPages are raw handlers: page bytes go from the receive buffers into one page
// buffer and from one page buffer to the wire, never through a protobuf string. Memory is bounded
// by `max_stream_bytes` a stream and by the server's quota. Thread-safe. The store, the clock and
// the executor's owner outlive the service; the service outlives the server that serves it.
#ifndef PAGETIDE_SERVICES_PAGE_STORE_SERVICE_H_
#define PAGETIDE_SERVICES_PAGE_STORE_SERVICE_H_

#include <atomic>
#include <memory>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "base/executor.h"
#include "base/metrics.h"
#include "base/mutex.h"
#include "base/periodic_task.h"
#include "base/thread_group.h"
#include "core/page_store.h"
#include "pagetide/v1/page_store.grpc.pb.h"

namespace pagetide {

struct PageStoreServiceOptions {
  // Threads that wait for the store's disk.
  int num_threads = 32;
  // Calls that wait for a thread; beyond them RESOURCE_EXHAUSTED.
  size_t max_queue = 1024;
  // Page bytes that one stream may have in memory.
  uint64_t max_stream_bytes = uint64_t{8} << 20;
  // Bytes of pages, and of what describes them, that all PutPages streams together may have in
  // memory; beyond them RESOURCE_EXHAUSTED. One page, which is taken whole, may be larger than a
  // stream's share.
  uint64_t max_put_bytes = uint64_t{1} << 30;
  // A PutPages stream of which nothing comes for this long, while the store waits for it, ends with
  // DEADLINE_EXCEEDED: a client that fell silent must not keep what its stream holds.
  absl::Duration put_idle = absl::Minutes(1);
  // Counts those in pagetide_store_idle_streams_total; null: not counted. Outlives the service.
  Metrics* metrics = nullptr;
  // Pages a PutPages or GetPages stream.
  size_t max_stream_pages = 4096;
  // Keys a LookupPages or DeletePages call.
  size_t max_keys = 65536;
  int max_watchers = 64;
};

class PageStoreServiceImpl final : public v1::PageStoreService::WithRawCallbackMethod_PutPages<
                                       v1::PageStoreService::WithRawCallbackMethod_GetPages<
                                           v1::PageStoreService::CallbackService>> {
 public:
  using Options = PageStoreServiceOptions;

  PageStoreServiceImpl(PageStore* store, const Clock* clock, Options options = {});
  ~PageStoreServiceImpl() override;

  // Ends watches, for a drain; new ones are UNAVAILABLE.
  void EndStreams() { ending_.store(true, std::memory_order_relaxed); }

  grpc::ServerUnaryReactor* LookupPages(grpc::CallbackServerContext* context,
                                        const v1::LookupPagesRequest* request,
                                        v1::LookupPagesResponse* response) override;
  grpc::ServerReadReactor<grpc::ByteBuffer>* PutPages(grpc::CallbackServerContext* context,
                                                      grpc::ByteBuffer* response) override;
  grpc::ServerWriteReactor<grpc::ByteBuffer>* GetPages(grpc::CallbackServerContext* context,
                                                       const grpc::ByteBuffer* request) override;
  grpc::ServerUnaryReactor* DeletePages(grpc::CallbackServerContext* context,
                                        const v1::DeletePagesRequest* request,
                                        v1::DeletePagesResponse* response) override;
  grpc::ServerUnaryReactor* FindPartialPages(grpc::CallbackServerContext* context,
                                             const v1::FindPartialPagesRequest* request,
                                             v1::FindPartialPagesResponse* response) override;
  grpc::ServerUnaryReactor* SetRetention(grpc::CallbackServerContext* context,
                                         const v1::SetRetentionRequest* request,
                                         v1::SetRetentionResponse* response) override;
  grpc::ServerUnaryReactor* Barrier(grpc::CallbackServerContext* context,
                                    const v1::BarrierRequest* request,
                                    v1::BarrierResponse* response) override;
  grpc::ServerUnaryReactor* PutManifest(grpc::CallbackServerContext* context,
                                        const v1::PutManifestRequest* request,
                                        v1::PutManifestResponse* response) override;
  grpc::ServerUnaryReactor* GetManifest(grpc::CallbackServerContext* context,
                                        const v1::GetManifestRequest* request,
                                        v1::GetManifestResponse* response) override;
  grpc::ServerUnaryReactor* ListManifests(grpc::CallbackServerContext* context,
                                          const v1::ListManifestsRequest* request,
                                          v1::ListManifestsResponse* response) override;
  grpc::ServerUnaryReactor* DeleteManifest(grpc::CallbackServerContext* context,
                                           const v1::DeleteManifestRequest* request,
                                           v1::DeleteManifestResponse* response) override;
  grpc::ServerUnaryReactor* CompareAndSetRecord(grpc::CallbackServerContext* context,
                                                const v1::CompareAndSetRecordRequest* request,
                                                v1::CompareAndSetRecordResponse* response) override;
  grpc::ServerUnaryReactor* GetRecord(grpc::CallbackServerContext* context,
                                      const v1::GetRecordRequest* request,
                                      v1::GetRecordResponse* response) override;
  grpc::ServerUnaryReactor* ListRecords(grpc::CallbackServerContext* context,
                                        const v1::ListRecordsRequest* request,
                                        v1::ListRecordsResponse* response) override;
  grpc::ServerUnaryReactor* AcquireLease(grpc::CallbackServerContext* context,
                                         const v1::AcquireLeaseRequest* request,
                                         v1::AcquireLeaseResponse* response) override;
  grpc::ServerUnaryReactor* RenewLease(grpc::CallbackServerContext* context,
                                       const v1::RenewLeaseRequest* request,
                                       v1::RenewLeaseResponse* response) override;
  grpc::ServerUnaryReactor* ReleaseLease(grpc::CallbackServerContext* context,
                                         const v1::ReleaseLeaseRequest* request,
                                         v1::ReleaseLeaseResponse* response) override;
  grpc::ServerWriteReactor<v1::WatchStoreResponse>* WatchStore(
      grpc::CallbackServerContext* context, const v1::WatchStoreRequest* request) override;
  grpc::ServerUnaryReactor* GetStoreStats(grpc::CallbackServerContext* context,
                                          const v1::GetStoreStatsRequest* request,
                                          v1::GetStoreStatsResponse* response) override;
  grpc::ServerUnaryReactor* Scrub(grpc::CallbackServerContext* context,
                                  const v1::ScrubRequest* request,
                                  v1::ScrubResponse* response) override;
  grpc::ServerUnaryReactor* Compact(grpc::CallbackServerContext* context,
                                    const v1::CompactRequest* request,
                                    v1::CompactResponse* response) override;

 private:
  class PutStream;
  class GetStream;
  class WatchStream;

  MonotonicTime DeadlineOf(const grpc::CallbackServerContext& context) const;
  // Ends the PutPages streams that have waited for their client for too long.
  void EndIdlePutStreams() ABSL_LOCKS_EXCLUDED(put_streams_mu_);
  // Runs `call` (MonotonicTime → absl::Status) on a thread of `executor` and finishes the reactor
  // with it.
  template <typename Call>
  grpc::ServerUnaryReactor* RunOn(ThreadPoolExecutor& executor,
                                  grpc::CallbackServerContext* context, Call call);
  template <typename Call>
  grpc::ServerUnaryReactor* Run(grpc::CallbackServerContext* context, Call call) {
    return RunOn(executor_, context, std::move(call));
  }

  PageStore* const store_;
  const Clock* const clock_;
  const Options options_;
  // Names this life of the service to watchers.
  const uint64_t incarnation_;
  std::atomic<bool> ending_{false};  // relaxed: polled
  std::atomic<int> num_watchers_{0};
  std::atomic<uint64_t> put_bytes_{0};  // relaxed: of all PutPages streams
  Counter* const num_idle_streams_;     // null: not counted
  Mutex put_streams_mu_;
  absl::flat_hash_set<PutStream*> put_streams_ ABSL_GUARDED_BY(put_streams_mu_);
  // Last: their threads end before the rest goes.
  PeriodicTask idle_streams_;
  ThreadGroup watch_threads_{"store-watch"};
  ThreadPoolExecutor executor_;
  // Renewals of leases, which touch no disk: a disk that keeps all other threads waiting must not
  // cost every worker its lease.
  ThreadPoolExecutor lease_executor_;
};

}  // namespace pagetide

#endif  // PAGETIDE_SERVICES_PAGE_STORE_SERVICE_H_
