// RemotePageStore: the port over gRPC, for the `pagetide-store` that all nodes share. Page bodies
// travel in parts of 1 MiB through raw byte buffers and are verified on arrival, so that bytes
// damaged on the wire are UNAVAILABLE, never a hit. It does not retry (RetryingPageStore does).
// Thread-safe; calls block. The channel is shared with whoever else uses it.
#ifndef PAGETIDE_KVSTORE_REMOTE_PAGE_STORE_H_
#define PAGETIDE_KVSTORE_REMOTE_PAGE_STORE_H_

#include <grpcpp/channel.h>
#include <grpcpp/generic/generic_stub.h>

#include <memory>
#include <string>
#include <vector>

#include "core/page_store.h"
#include "pagetide/v1/page_store.grpc.pb.h"

namespace pagetide {

class RemotePageStore final : public PageStore {
 public:
  // `channel` from MakeChannel (rpc/channel.h). Deadlines are on `clock`.
  explicit RemotePageStore(std::shared_ptr<grpc::Channel> channel,
                           const Clock* clock = Clock::Real());

  std::vector<PutPageResult> PutPages(std::span<const PutPage> pages, Durability level,
                                      MonotonicTime deadline) override;
  std::vector<GetPageResult> GetPages(std::span<const GetPage> pages,
                                      MonotonicTime deadline) override;
  absl::StatusOr<std::vector<LookupResult>> LookupPages(std::span<const PageKey> keys,
                                                        MonotonicTime deadline) override;
  absl::StatusOr<uint64_t> DeletePages(std::span<const PageKey> keys,
                                       MonotonicTime deadline) override;
  absl::StatusOr<std::vector<PartialResult>> FindPartialPages(std::span<const PartialQuery> queries,
                                                              MonotonicTime deadline) override;
  absl::StatusOr<std::vector<PageKey>> SetRetention(std::span<const PageKey> keys,
                                                    const Retention& retention,
                                                    const std::optional<WriteFence>& fence,
                                                    MonotonicTime deadline) override;
  absl::Status Barrier(Durability level, MonotonicTime deadline) override;
  absl::StatusOr<PutManifestResult> PutManifest(const ManifestRecord& manifest,
                                                uint64_t expected_version,
                                                const std::optional<WriteFence>& fence,
                                                MonotonicTime deadline) override;
  absl::StatusOr<ManifestRecord> GetManifest(absl::string_view name,
                                             MonotonicTime deadline) override;
  absl::StatusOr<std::vector<ManifestEntry>> ListManifests(absl::string_view name_prefix,
                                                           absl::string_view after, size_t limit,
                                                           MonotonicTime deadline) override;
  absl::Status DeleteManifest(absl::string_view name, uint64_t expected_version,
                              const std::optional<WriteFence>& fence,
                              MonotonicTime deadline) override;
  absl::StatusOr<uint64_t> CompareAndSetRecord(absl::string_view kind, absl::string_view key,
                                               uint64_t expected_version,
                                               std::optional<absl::string_view> value,
                                               MonotonicTime deadline) override;
  absl::StatusOr<StoreRecord> GetRecord(absl::string_view kind, absl::string_view key,
                                        MonotonicTime deadline) override;
  absl::StatusOr<std::vector<StoreRecord>> ListRecords(absl::string_view kind,
                                                       absl::string_view key_prefix,
                                                       absl::string_view after, size_t limit,
                                                       MonotonicTime deadline) override;
  absl::StatusOr<StoreLease> AcquireLease(absl::string_view name, uint64_t incarnation,
                                          absl::Duration ttl, MonotonicTime deadline) override;
  absl::Status RenewLease(const StoreLease& lease, absl::Duration ttl,
                          MonotonicTime deadline) override;
  absl::Status ReleaseLease(const StoreLease& lease, MonotonicTime deadline) override;
  absl::Status Watch(const WatchCallback& on_events, MonotonicTime deadline) override;
  absl::StatusOr<StoreStats> GetStats(MonotonicTime deadline) override;
  absl::StatusOr<ScrubResult> Scrub(uint64_t max_pages, MonotonicTime deadline) override;
  absl::StatusOr<uint64_t> Compact(MonotonicTime deadline) override;

 private:
  void SetDeadline(MonotonicTime deadline, grpc::ClientContext* context) const;
  // One unary call. `method` is a member of the stub.
  template <typename Method, typename Request, typename Response>
  absl::Status Call(Method method, const Request& request, Response* response,
                    MonotonicTime deadline);
  void PutStream(std::span<const PutPage> pages, Durability level, MonotonicTime deadline,
                 std::span<PutPageResult> results);
  void GetStream(std::span<const GetPage> pages, MonotonicTime deadline,
                 std::span<GetPageResult> results);

  const Clock* const clock_;
  const std::unique_ptr<v1::PageStoreService::Stub> stub_;
  grpc::GenericStub raw_stub_;
};

}  // namespace pagetide

#endif  // PAGETIDE_KVSTORE_REMOTE_PAGE_STORE_H_
