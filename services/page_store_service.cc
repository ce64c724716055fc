#include "services/page_store_service.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "kvstore/page_store_codec.h"
#include "rpc/status_mapping.h"

namespace pagetide {
namespace {

constexpr uint32_t kMaxListEntries = 1000;
constexpr int kMaxPartialQueries = 64;

absl::Status TooManyKeys(absl::string_view field, size_t given, size_t allowed) {
  return absl::InvalidArgumentError(
      absl::StrCat(field, " has ", given, " entries, at most ", allowed));
}

absl::StatusOr<std::vector<PageKey>> DecodeKeys(
    const google::protobuf::RepeatedPtrField<std::string>& bytes, size_t max_keys) {
  if (static_cast<size_t>(bytes.size()) > max_keys) {
    return TooManyKeys("page_keys", bytes.size(), max_keys);
  }
  std::vector<PageKey> keys;
  keys.reserve(static_cast<size_t>(bytes.size()));
  for (const std::string& raw : bytes) {
    PT_ASSIGN_OR_RETURN(const PageKey key, DecodePageKey("page_keys", raw));
    keys.push_back(key);
  }
  return keys;
}

std::optional<WriteFence> DecodeFence(bool has_fence, const v1::Fence& fence) {
  if (!has_fence) return std::nullopt;
  return WriteFence{fence.ownership_key(), fence.epoch()};
}

size_t ListLimit(uint32_t page_size) {
  return page_size == 0 ? kMaxListEntries : std::min(page_size, kMaxListEntries);
}

}  // namespace

PageStoreServiceImpl::PageStoreServiceImpl(PageStore* store, const Clock* clock, Options options)
    : store_(store),
      clock_(clock),
      options_(options),
      incarnation_(static_cast<uint64_t>(absl::ToUnixNanos(clock->WallNow()))),
      num_idle_streams_(options.metrics == nullptr
                            ? nullptr
                            : options.metrics->GetCounter(
                                  "pagetide_store_idle_streams_total",
                                  "Put streams that were ended because nothing came of them.")),
      // Often enough for a bound of a minute, and for tests that move the clock by hand.
      idle_streams_("put-idle", absl::Milliseconds(250), [this] { EndIdlePutStreams(); }),
      executor_(
          {.name = "store", .num_threads = options.num_threads, .max_queue = options.max_queue}),
      lease_executor_({.name = "lease", .num_threads = 2, .max_queue = options.max_queue}) {}

PageStoreServiceImpl::~PageStoreServiceImpl() {
  EndStreams();
}

MonotonicTime PageStoreServiceImpl::DeadlineOf(const grpc::CallbackServerContext& context) const {
  const auto deadline = context.deadline();
  if (deadline == std::chrono::system_clock::time_point::max()) {
    return MonotonicTime::InfiniteFuture();
  }
  return clock_->MonotonicNow() + absl::FromChrono(deadline - std::chrono::system_clock::now());
}

template <typename Call>
grpc::ServerUnaryReactor* PageStoreServiceImpl::RunOn(ThreadPoolExecutor& executor,
                                                      grpc::CallbackServerContext* context,
                                                      Call call) {
  grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
  const absl::Status scheduled =
      executor.Schedule([reactor, deadline = DeadlineOf(*context), call = std::move(call)] {
        reactor->Finish(ToGrpcStatus(call(deadline)));
      });
  if (!scheduled.ok()) {
    reactor->Finish(ToGrpcStatus(WithRetryDelay(scheduled, absl::Milliseconds(100))));
  }
  return reactor;
}

// ---- unary calls -------------------------------------------------------------------------------

grpc::ServerUnaryReactor* PageStoreServiceImpl::LookupPages(grpc::CallbackServerContext* context,
                                                            const v1::LookupPagesRequest* request,
                                                            v1::LookupPagesResponse* response) {
  return Run(context, [=, this](MonotonicTime deadline) -> absl::Status {
    PT_ASSIGN_OR_RETURN(const auto keys, DecodeKeys(request->page_keys(), options_.max_keys));
    PT_ASSIGN_OR_RETURN(const auto results, store_->LookupPages(keys, deadline));
    for (const LookupResult& result : results) {
      v1::LookupPagesResponse::Result* out = response->add_results();
      out->set_present(result.present);
      out->set_quarantined(result.quarantined);
      out->set_body_bytes(result.body_bytes);
      EncodeChecksum(result.checksum, out->mutable_checksum());
      if (request->leading_run() && !result.present) break;
    }
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* PageStoreServiceImpl::DeletePages(grpc::CallbackServerContext* context,
                                                            const v1::DeletePagesRequest* request,
                                                            v1::DeletePagesResponse* response) {
  return Run(context, [=, this](MonotonicTime deadline) -> absl::Status {
    PT_ASSIGN_OR_RETURN(const auto keys, DecodeKeys(request->page_keys(), options_.max_keys));
    PT_ASSIGN_OR_RETURN(const uint64_t deleted, store_->DeletePages(keys, deadline));
    response->set_deleted(deleted);
    // What is still there after the call was protected (or has been put again).
    PT_ASSIGN_OR_RETURN(const auto left, store_->LookupPages(keys, deadline));
    response->set_protected_pages(static_cast<uint64_t>(
        std::count_if(left.begin(), left.end(), [](const LookupResult& r) { return r.present; })));
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* PageStoreServiceImpl::FindPartialPages(
    grpc::CallbackServerContext* context, const v1::FindPartialPagesRequest* request,
    v1::FindPartialPagesResponse* response) {
  return Run(context, [=, this](MonotonicTime deadline) -> absl::Status {
    if (request->queries_size() > kMaxPartialQueries) {
      return TooManyKeys("queries", request->queries_size(), kMaxPartialQueries);
    }
    std::vector<PartialQuery> queries;
    for (const auto& query : request->queries()) {
      if (static_cast<uint64_t>(query.tokens_size()) > kMaxIndexedPageTokens) {
        return TooManyKeys("queries.tokens", query.tokens_size(), kMaxIndexedPageTokens);
      }
      PT_ASSIGN_OR_RETURN(const PrefixKey parent,
                          DecodePrefixKey("queries.parent_prefix_key", query.parent_prefix_key()));
      PT_ASSIGN_OR_RETURN(const Digest fingerprint,
                          DecodeFingerprint("queries.fingerprint", query.fingerprint()));
      queries.push_back({parent, fingerprint,
                         std::span<const uint32_t>(query.tokens().data(), query.tokens_size())});
    }
    PT_ASSIGN_OR_RETURN(const auto results, store_->FindPartialPages(queries, deadline));
    for (const PartialResult& result : results) {
      v1::FindPartialPagesResponse::Result* out = response->add_results();
      if (result.common_tokens == 0) continue;
      out->set_common_tokens(result.common_tokens);
      out->set_page_key(result.key.digest.ToBytes());
      EncodeChecksum(result.checksum, out->mutable_checksum());
      out->set_body_bytes(result.body_bytes);
      out->mutable_tokens()->Add(result.tokens.begin(), result.tokens.end());
    }
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* PageStoreServiceImpl::SetRetention(grpc::CallbackServerContext* context,
                                                             const v1::SetRetentionRequest* request,
                                                             v1::SetRetentionResponse* response) {
  return Run(context, [=, this](MonotonicTime deadline) -> absl::Status {
    PT_ASSIGN_OR_RETURN(const auto keys, DecodeKeys(request->page_keys(), options_.max_keys));
    PT_ASSIGN_OR_RETURN(const Retention retention, DecodeRetention(request->retention()));
    PT_ASSIGN_OR_RETURN(
        const auto missing,
        store_->SetRetention(keys, retention, DecodeFence(request->has_fence(), request->fence()),
                             deadline));
    for (const PageKey& key : missing) response->add_missing_page_keys(key.digest.ToBytes());
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* PageStoreServiceImpl::Barrier(grpc::CallbackServerContext* context,
                                                        const v1::BarrierRequest* request,
                                                        v1::BarrierResponse* response) {
  return Run(context, [=, this](MonotonicTime deadline) -> absl::Status {
    PT_ASSIGN_OR_RETURN(const Durability level, DecodeDurability(request->level()));
    return store_->Barrier(level, deadline);
  });
}

grpc::ServerUnaryReactor* PageStoreServiceImpl::PutManifest(grpc::CallbackServerContext* context,
                                                            const v1::PutManifestRequest* request,
                                                            v1::PutManifestResponse* response) {
  return Run(context, [=, this](MonotonicTime deadline) -> absl::Status {
    PT_ASSIGN_OR_RETURN(const ManifestRecord manifest, DecodeManifestMessage(request->manifest()));
    PT_ASSIGN_OR_RETURN(
        const PutManifestResult result,
        store_->PutManifest(manifest, request->expected_version(),
                            DecodeFence(request->has_fence(), request->fence()), deadline));
    response->set_committed(result.committed);
    response->set_version(result.version);
    for (const PageKey& key : result.missing) response->add_missing_page_keys(key.digest.ToBytes());
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* PageStoreServiceImpl::GetManifest(grpc::CallbackServerContext* context,
                                                            const v1::GetManifestRequest* request,
                                                            v1::GetManifestResponse* response) {
  return Run(context, [=, this](MonotonicTime deadline) -> absl::Status {
    PT_ASSIGN_OR_RETURN(const ManifestRecord manifest,
                        store_->GetManifest(request->name(), deadline));
    EncodeManifestMessage(manifest, response->mutable_manifest());
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* PageStoreServiceImpl::ListManifests(
    grpc::CallbackServerContext* context, const v1::ListManifestsRequest* request,
    v1::ListManifestsResponse* response) {
  return Run(context, [=, this](MonotonicTime deadline) -> absl::Status {
    // Summaries may have 4 KiB each: the answer ends before it outgrows a message.
    constexpr size_t kMaxBytes = size_t{2} << 20;
    const size_t limit = ListLimit(request->page_size());
    PT_ASSIGN_OR_RETURN(
        const auto manifests,
        store_->ListManifests(request->name_prefix(), request->page_token(), limit, deadline));
    size_t bytes = 0;
    for (const ManifestEntry& manifest : manifests) {
      bytes += manifest.name.size() + manifest.request_id.size() + manifest.summary.size() + 64;
      if (bytes > kMaxBytes && response->manifests_size() > 0) break;
      EncodeManifestEntry(manifest, response->add_manifests());
    }
    if (manifests.size() == limit ||
        static_cast<size_t>(response->manifests_size()) < manifests.size()) {
      response->set_next_page_token(response->manifests(response->manifests_size() - 1).name());
    }
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* PageStoreServiceImpl::DeleteManifest(
    grpc::CallbackServerContext* context, const v1::DeleteManifestRequest* request,
    v1::DeleteManifestResponse* response) {
  return Run(context, [=, this](MonotonicTime deadline) {
    return store_->DeleteManifest(request->name(), request->expected_version(),
                                  DecodeFence(request->has_fence(), request->fence()), deadline);
  });
}

grpc::ServerUnaryReactor* PageStoreServiceImpl::CompareAndSetRecord(
    grpc::CallbackServerContext* context, const v1::CompareAndSetRecordRequest* request,
    v1::CompareAndSetRecordResponse* response) {
  return Run(context, [=, this](MonotonicTime deadline) -> absl::Status {
    std::optional<absl::string_view> value;
    if (!request->delete_record()) value = request->value();
    PT_ASSIGN_OR_RETURN(const uint64_t version,
                        store_->CompareAndSetRecord(request->kind(), request->key(),
                                                    request->expected_version(), value, deadline));
    response->set_version(version);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* PageStoreServiceImpl::GetRecord(grpc::CallbackServerContext* context,
                                                          const v1::GetRecordRequest* request,
                                                          v1::GetRecordResponse* response) {
  return Run(context, [=, this](MonotonicTime deadline) -> absl::Status {
    PT_ASSIGN_OR_RETURN(const StoreRecord record,
                        store_->GetRecord(request->kind(), request->key(), deadline));
    response->set_version(record.version);
    response->set_value(record.value);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* PageStoreServiceImpl::ListRecords(grpc::CallbackServerContext* context,
                                                            const v1::ListRecordsRequest* request,
                                                            v1::ListRecordsResponse* response) {
  return Run(context, [=, this](MonotonicTime deadline) -> absl::Status {
    // Values may have a mebibyte each: the answer ends before it outgrows a message.
    constexpr size_t kMaxBytes = size_t{2} << 20;
    const size_t limit = ListLimit(request->page_size());
    size_t bytes = 0;
    std::string after = request->page_token();
    while (static_cast<size_t>(response->records_size()) < limit) {
      const size_t want = std::min<size_t>(16, limit - response->records_size());
      PT_ASSIGN_OR_RETURN(
          const auto records,
          store_->ListRecords(request->kind(), request->key_prefix(), after, want, deadline));
      for (const StoreRecord& record : records) {
        bytes += record.value.size() + record.key.size();
        if (bytes > kMaxBytes && response->records_size() > 0) {
          response->set_next_page_token(after);
          return absl::OkStatus();
        }
        v1::ListRecordsResponse::Entry* entry = response->add_records();
        entry->set_key(record.key);
        entry->set_version(record.version);
        entry->set_value(record.value);
        after = record.key;
      }
      if (records.size() < want) return absl::OkStatus();
    }
    response->set_next_page_token(after);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* PageStoreServiceImpl::AcquireLease(grpc::CallbackServerContext* context,
                                                             const v1::AcquireLeaseRequest* request,
                                                             v1::AcquireLeaseResponse* response) {
  return Run(context, [=, this](MonotonicTime deadline) -> absl::Status {
    PT_ASSIGN_OR_RETURN(const absl::Duration ttl, DecodeDuration("ttl", request->ttl()));
    PT_ASSIGN_OR_RETURN(
        const StoreLease lease,
        store_->AcquireLease(request->name(), request->incarnation(), ttl, deadline));
    response->set_epoch(lease.epoch);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* PageStoreServiceImpl::RenewLease(grpc::CallbackServerContext* context,
                                                           const v1::RenewLeaseRequest* request,
                                                           v1::RenewLeaseResponse* response) {
  return RunOn(lease_executor_, context, [=, this](MonotonicTime deadline) -> absl::Status {
    PT_ASSIGN_OR_RETURN(const absl::Duration ttl, DecodeDuration("ttl", request->ttl()));
    return store_->RenewLease({request->name(), request->incarnation(), request->epoch()}, ttl,
                              deadline);
  });
}

grpc::ServerUnaryReactor* PageStoreServiceImpl::ReleaseLease(grpc::CallbackServerContext* context,
                                                             const v1::ReleaseLeaseRequest* request,
                                                             v1::ReleaseLeaseResponse* response) {
  return Run(context, [=, this](MonotonicTime deadline) {
    return store_->ReleaseLease({request->name(), request->incarnation(), request->epoch()},
                                deadline);
  });
}

grpc::ServerUnaryReactor* PageStoreServiceImpl::GetStoreStats(
    grpc::CallbackServerContext* context, const v1::GetStoreStatsRequest* request,
    v1::GetStoreStatsResponse* response) {
  return Run(context, [=, this](MonotonicTime deadline) -> absl::Status {
    PT_ASSIGN_OR_RETURN(const StoreStats stats, store_->GetStats(deadline));
    EncodeStats(stats, response);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* PageStoreServiceImpl::Scrub(grpc::CallbackServerContext* context,
                                                      const v1::ScrubRequest* request,
                                                      v1::ScrubResponse* response) {
  return Run(context, [=, this](MonotonicTime deadline) -> absl::Status {
    PT_ASSIGN_OR_RETURN(const ScrubResult result, store_->Scrub(request->max_pages(), deadline));
    response->set_verified_pages(result.verified_pages);
    response->set_quarantined_pages(result.quarantined_pages);
    response->set_verified_bytes(result.verified_bytes);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* PageStoreServiceImpl::Compact(grpc::CallbackServerContext* context,
                                                        const v1::CompactRequest* request,
                                                        v1::CompactResponse* response) {
  return Run(context, [=, this](MonotonicTime deadline) -> absl::Status {
    PT_ASSIGN_OR_RETURN(const uint64_t bytes, store_->Compact(deadline));
    response->set_reclaimed_bytes(bytes);
    return absl::OkStatus();
  });
}

}  // namespace pagetide
