#include "kvstore/remote_page_store.h"

#include <grpcpp/client_context.h>
#include <grpcpp/completion_queue.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/mutex.h"
#include "base/status_macros.h"
#include "kvstore/page_record.h"
#include "kvstore/page_store_codec.h"
#include "rpc/byte_buffer.h"
#include "rpc/duration_proto.h"
#include "rpc/status_mapping.h"

namespace pagetide {
namespace {

// Of one stream or call; the service allows more.
constexpr size_t kMaxStreamPages = 1024;
constexpr size_t kMaxKeys = 16384;
constexpr size_t kMaxPartialQueries = 64;
constexpr char kPutPages[] = "/pagetide.v1.PageStoreService/PutPages";
constexpr char kGetPages[] = "/pagetide.v1.PageStoreService/GetPages";

template <typename Request>
void EncodeFence(const std::optional<WriteFence>& fence, Request& request) {
  if (!fence.has_value()) return;
  request.mutable_fence()->set_ownership_key(fence->ownership_key);
  request.mutable_fence()->set_epoch(fence->epoch);
}

// A raw call whose steps block: one operation at a time on a completion queue of its own.
class BlockingRawCall {
 public:
  BlockingRawCall(grpc::GenericStub* stub, const char* method, grpc::ClientContext* context)
      : stream_(stub->PrepareCall(context, method, &queue_)) {
    stream_->StartCall(nullptr);
    started_ = Wait();
  }
  ~BlockingRawCall() {
    queue_.Shutdown();
    void* tag = nullptr;
    bool ok = false;
    while (queue_.Next(&tag, &ok)) {
    }
  }
  // False: the call is over, Finish says why.
  bool Write(const grpc::ByteBuffer& message) {
    if (!started_) return false;
    stream_->Write(message, nullptr);
    return Wait();
  }
  bool WritesDone() {
    if (!started_) return false;
    stream_->WritesDone(nullptr);
    return Wait();
  }
  // False: no further message.
  bool Read(grpc::ByteBuffer* message) {
    if (!started_) return false;
    stream_->Read(message, nullptr);
    return Wait();
  }
  absl::Status Finish() {
    grpc::Status status;
    stream_->Finish(&status, nullptr);
    Wait();
    return FromGrpcStatus(status);
  }

 private:
  bool Wait() {
    void* tag = nullptr;
    bool ok = false;
    return queue_.Next(&tag, &ok) && ok;
  }

  grpc::CompletionQueue queue_;  // before the stream: it outlives it
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> stream_;
  bool started_ = false;
};

absl::Status StatusOfResult(const v1::PutPagesResponse::Result& result) {
  if (result.code() == 0) return absl::OkStatus();
  absl::Status status(static_cast<absl::StatusCode>(result.code()), result.message());
  return result.reason().empty() ? status : WithReason(status, result.reason());
}

// How often a watcher's callback is asked whether it wants to go on while nothing happens.
constexpr absl::Duration kWatchPoll = absl::Milliseconds(200);
// The store says something every second (WatchStore in page_store.proto).
constexpr absl::Duration kWatchSilence = absl::Seconds(3);

absl::Status DecodeWatchedPages(const v1::WatchStoreResponse& message,
                                std::vector<StoreEvent>* events) {
  events->clear();
  for (const bool removed : {false, true}) {
    for (const auto& page : removed ? message.removed() : message.added()) {
      StoreEvent event;
      if (page.prefix_hint().size() != 16) {
        return absl::InternalError(
            absl::StrCat("watch store: prefix_hint has ", page.prefix_hint().size(), " bytes"));
      }
      std::copy(page.prefix_hint().begin(), page.prefix_hint().end(),
                event.prefix.digest.bytes.begin());
      event.group = page.group();
      event.body_bytes = page.body_bytes();
      event.removed = removed;
      events->push_back(event);
    }
  }
  return absl::OkStatus();
}

// Reads a watch one message at a time for a thread that waits with a timeout, which the blocking
// reader cannot. WaitForEnd before destruction.
class WatchReader final : public grpc::ClientReadReactor<v1::WatchStoreResponse> {
 public:
  enum class Outcome { kMessage, kTimeout, kEnded };

  void Start() {
    StartRead(&message_);
    // Keeps the call alive between reads: it may have ended when the next one is started.
    AddHold();
    StartCall();
  }
  // *message is the reader's, until ReadNext.
  Outcome WaitForMessage(absl::Duration timeout, const v1::WatchStoreResponse** message) {
    MutexLock lock(&mu_);
    if (!has_message_ && !has_ended_) changed_.WaitWithTimeout(&mu_, timeout);
    *message = &message_;
    if (has_message_) return Outcome::kMessage;
    return has_ended_ ? Outcome::kEnded : Outcome::kTimeout;
  }
  void ReadNext() {
    {
      MutexLock lock(&mu_);
      has_message_ = false;
    }
    StartRead(&message_);
  }
  absl::Status WaitForEnd() {
    RemoveHold();
    MutexLock lock(&mu_);
    while (!status_.has_value()) changed_.Wait(&mu_);
    return *status_;
  }

  void OnReadDone(bool ok) override {
    MutexLock lock(&mu_);
    (ok ? has_message_ : has_ended_) = true;
    changed_.SignalAll();
  }
  void OnDone(const grpc::Status& status) override {
    MutexLock lock(&mu_);
    status_ = FromGrpcStatus(status);
    changed_.SignalAll();
  }

 private:
  v1::WatchStoreResponse message_;  // gRPC's while a read runs, else the watching thread's
  Mutex mu_;
  CondVar changed_;
  bool has_message_ ABSL_GUARDED_BY(mu_) = false;
  bool has_ended_ ABSL_GUARDED_BY(mu_) = false;  // no message follows
  std::optional<absl::Status> status_ ABSL_GUARDED_BY(mu_);
};

}  // namespace

RemotePageStore::RemotePageStore(std::shared_ptr<grpc::Channel> channel, const Clock* clock)
    : clock_(clock), stub_(v1::PageStoreService::NewStub(channel)), raw_stub_(channel) {}

void RemotePageStore::SetDeadline(MonotonicTime deadline, grpc::ClientContext* context) const {
  if (deadline == MonotonicTime::InfiniteFuture()) return;
  const absl::Duration left = deadline - clock_->MonotonicNow();
  context->set_deadline(std::chrono::system_clock::now() + absl::ToChronoMicroseconds(left));
}

template <typename Method, typename Request, typename Response>
absl::Status RemotePageStore::Call(Method method, const Request& request, Response* response,
                                   MonotonicTime deadline) {
  grpc::ClientContext context;
  SetDeadline(deadline, &context);
  return FromGrpcStatus((stub_.get()->*method)(&context, request, response));
}

// ---- pages -------------------------------------------------------------------------------------

std::vector<PutPageResult> RemotePageStore::PutPages(std::span<const PutPage> pages,
                                                     Durability level, MonotonicTime deadline) {
  std::vector<PutPageResult> results(pages.size());
  // What could spoil the stream for the others is refused here.
  std::vector<PutPage> good;
  std::vector<size_t> index;
  for (size_t i = 0; i < pages.size(); ++i) {
    results[i].status = ValidatePutPage(pages[i]);
    if (!results[i].status.ok()) continue;
    good.push_back(pages[i]);
    index.push_back(i);
  }
  std::vector<PutPageResult> answers(good.size());
  for (size_t at = 0; at < good.size(); at += kMaxStreamPages) {
    const size_t n = std::min(kMaxStreamPages, good.size() - at);
    PutStream(std::span(good).subspan(at, n), level, deadline, std::span(answers).subspan(at, n));
  }
  for (size_t i = 0; i < index.size(); ++i) results[index[i]] = std::move(answers[i]);
  return results;
}

void RemotePageStore::PutStream(std::span<const PutPage> pages, Durability level,
                                MonotonicTime deadline, std::span<PutPageResult> results) {
  grpc::ClientContext context;
  SetDeadline(deadline, &context);
  BlockingRawCall call(&raw_stub_, kPutPages, &context);
  v1::PutPagesRequest header;
  header.set_level(EncodeDurability(level));
  bool open = true;
  for (size_t i = 0; open && i < pages.size(); ++i) {
    EncodePageHeader(pages[i].meta, header.mutable_header());
    header.mutable_header()->mutable_tokens()->Add(pages[i].tokens.begin(), pages[i].tokens.end());
    const std::span<const std::byte> body = pages[i].body;
    for (uint64_t at = 0; open && at < body.size(); at += kPagePartBytes) {
      // Copied: the transport may still hold a slice of a failed call when the caller reuses the
      // frame.
      const auto part = body.subspan(at, std::min<uint64_t>(kPagePartBytes, body.size() - at));
      open = call.Write(EncodeWithPayload(header, kPageBodyField, part));
      header.Clear();
    }
  }
  grpc::ByteBuffer message;
  const bool answered = open && call.WritesDone() && call.Read(&message);
  absl::Status status = call.Finish();
  v1::PutPagesResponse response;
  if (status.ok() && answered) status = DecodeMessage(message, &response);
  if (status.ok() && static_cast<size_t>(response.results_size()) != pages.size()) {
    status = absl::InternalError(absl::StrCat("put pages: ", response.results_size(),
                                              " results for ", pages.size(), " pages"));
  }
  for (size_t i = 0; i < pages.size(); ++i) {
    if (!status.ok()) {
      results[i].status = status;
      continue;
    }
    const v1::PutPagesResponse::Result& result = response.results(static_cast<int>(i));
    results[i].status = StatusOfResult(result);
    results[i].already_present = result.already_present();
    results[i].checksum = DecodeChecksum(result.checksum());
  }
}

std::vector<GetPageResult> RemotePageStore::GetPages(std::span<const GetPage> pages,
                                                     MonotonicTime deadline) {
  std::vector<GetPageResult> results(pages.size());
  for (size_t at = 0; at < pages.size(); at += kMaxStreamPages) {
    const size_t n = std::min(kMaxStreamPages, pages.size() - at);
    GetStream(pages.subspan(at, n), deadline, std::span(results).subspan(at, n));
  }
  return results;
}

void RemotePageStore::GetStream(std::span<const GetPage> pages, MonotonicTime deadline,
                                std::span<GetPageResult> results) {
  v1::GetPagesRequest request;
  const bool any_expected = std::any_of(pages.begin(), pages.end(),
                                        [](const GetPage& p) { return p.expected.has_value(); });
  for (const GetPage& page : pages) {
    request.add_page_keys(page.key.digest.ToBytes());
    if (any_expected) EncodeChecksum(page.expected.value_or(Checksum128{}), request.add_expected());
  }
  grpc::ClientContext context;
  SetDeadline(deadline, &context);
  BlockingRawCall call(&raw_stub_, kGetPages, &context);
  bool open = call.Write(EncodeMessage(request)) && call.WritesDone();

  // Pages come in order; `next` is the one whose first message is due, `received` its bytes so far.
  absl::Status broken;
  size_t next = 0;
  uint64_t received = 0;
  v1::GetPagesResponse first;  // of the page being received
  grpc::ByteBuffer message;
  while (open && next < pages.size() && call.Read(&message)) {
    v1::GetPagesResponse part;
    PayloadView body;
    broken = DecodeWithPayload(message, kPageBodyField, &part, &body);
    if (broken.ok() && part.index() != next) {
      broken = absl::InternalError(
          absl::StrCat("get pages: a part of page ", part.index(), ", page ", next, " is due"));
    }
    if (!broken.ok()) break;
    GetPageResult& result = results[next];
    if (received == 0) first = part;
    if (first.outcome() != v1::GetPagesResponse::OUTCOME_HIT) {
      result.outcome = first.outcome() == v1::GetPagesResponse::OUTCOME_QUARANTINED
                           ? GetOutcome::kQuarantined
                           : GetOutcome::kMiss;
      ++next;
      continue;
    }
    const uint64_t total = first.header().body_bytes();
    if (body.empty() || body.size() > total - received) {
      broken = absl::InternalError(absl::StrCat("get pages: page ", next, " has ", total,
                                                " bytes, received ", received + body.size()));
      break;
    }
    const std::span<std::byte> buffer = pages[next].body;
    const bool fits = total == buffer.size();
    if (fits) broken = body.CopyTo(buffer.subspan(received, body.size()));
    if (!broken.ok()) break;
    received += body.size();
    if (received < total) continue;
    if (!fits) {
      result.status = absl::InvalidArgumentError(
          absl::StrCat("get page ", pages[next].key.digest.ToShortHex(), ": buffer of ",
                       buffer.size(), " bytes, the page has ", total));
    } else if (first.header().page_key() != pages[next].key.digest.view() ||
               ChecksumOf(buffer) != DecodeChecksum(first.header().checksum())) {
      result.status = absl::UnavailableError(absl::StrCat(
          "get page ", pages[next].key.digest.ToShortHex(), ": bytes were damaged on their way"));
    } else {
      result.outcome = GetOutcome::kHit;
      result.checksum = DecodeChecksum(first.header().checksum());
    }
    received = 0;
    ++next;
  }
  if (!broken.ok()) context.TryCancel();
  absl::Status status = call.Finish();
  if (!broken.ok()) status = broken;
  if (status.ok() && next < pages.size()) {
    status = absl::UnavailableError(
        absl::StrCat("get pages: the stream ended after ", next, " of ", pages.size(), " pages"));
  }
  for (size_t i = next; i < pages.size(); ++i) results[i].status = status;
}

absl::StatusOr<std::vector<LookupResult>> RemotePageStore::LookupPages(
    std::span<const PageKey> keys, MonotonicTime deadline) {
  std::vector<LookupResult> results;
  results.reserve(keys.size());
  for (size_t at = 0; at < keys.size(); at += kMaxKeys) {
    v1::LookupPagesRequest request;
    const auto chunk = keys.subspan(at, std::min(kMaxKeys, keys.size() - at));
    for (const PageKey& key : chunk) request.add_page_keys(key.digest.ToBytes());
    v1::LookupPagesResponse response;
    PT_RETURN_IF_ERROR(
        Call(&v1::PageStoreService::Stub::LookupPages, request, &response, deadline));
    if (static_cast<size_t>(response.results_size()) != chunk.size()) {
      return absl::InternalError(absl::StrCat("look up pages: ", response.results_size(),
                                              " results for ", chunk.size(), " keys"));
    }
    for (const auto& result : response.results()) {
      results.push_back({result.present(), result.quarantined(), DecodeChecksum(result.checksum()),
                         result.body_bytes()});
    }
  }
  return results;
}

absl::StatusOr<uint64_t> RemotePageStore::DeletePages(std::span<const PageKey> keys,
                                                      MonotonicTime deadline) {
  uint64_t deleted = 0;
  for (size_t at = 0; at < keys.size(); at += kMaxKeys) {
    v1::DeletePagesRequest request;
    for (const PageKey& key : keys.subspan(at, std::min(kMaxKeys, keys.size() - at))) {
      request.add_page_keys(key.digest.ToBytes());
    }
    v1::DeletePagesResponse response;
    PT_RETURN_IF_ERROR(
        Call(&v1::PageStoreService::Stub::DeletePages, request, &response, deadline));
    deleted += response.deleted();
  }
  return deleted;
}

absl::StatusOr<std::vector<PartialResult>> RemotePageStore::FindPartialPages(
    std::span<const PartialQuery> queries, MonotonicTime deadline) {
  std::vector<PartialResult> results;
  results.reserve(queries.size());
  for (size_t at = 0; at < queries.size(); at += kMaxPartialQueries) {
    v1::FindPartialPagesRequest request;
    const auto chunk = queries.subspan(at, std::min(kMaxPartialQueries, queries.size() - at));
    for (const PartialQuery& query : chunk) {
      auto* out = request.add_queries();
      out->set_parent_prefix_key(query.parent.digest.ToBytes());
      out->set_fingerprint(query.fingerprint.ToBytes());
      // No page has more.
      const size_t n = std::min<size_t>(query.tokens.size(), kMaxIndexedPageTokens);
      out->mutable_tokens()->Add(query.tokens.begin(), query.tokens.begin() + n);
    }
    v1::FindPartialPagesResponse response;
    PT_RETURN_IF_ERROR(
        Call(&v1::PageStoreService::Stub::FindPartialPages, request, &response, deadline));
    if (static_cast<size_t>(response.results_size()) != chunk.size()) {
      return absl::InternalError(absl::StrCat("find partial pages: ", response.results_size(),
                                              " results for ", chunk.size(), " queries"));
    }
    for (const auto& result : response.results()) {
      PartialResult& out = results.emplace_back();
      if (result.common_tokens() == 0) continue;
      out.common_tokens = result.common_tokens();
      PT_ASSIGN_OR_RETURN(out.key, DecodePageKey("results.page_key", result.page_key()));
      out.checksum = DecodeChecksum(result.checksum());
      out.body_bytes = result.body_bytes();
      out.tokens.assign(result.tokens().begin(), result.tokens().end());
    }
  }
  return results;
}

absl::StatusOr<std::vector<PageKey>> RemotePageStore::SetRetention(
    std::span<const PageKey> keys, const Retention& retention,
    const std::optional<WriteFence>& fence, MonotonicTime deadline) {
  std::vector<PageKey> missing;
  for (size_t at = 0; at < keys.size(); at += kMaxKeys) {
    v1::SetRetentionRequest request;
    EncodeRetention(retention, request.mutable_retention());
    EncodeFence(fence, request);
    for (const PageKey& key : keys.subspan(at, std::min(kMaxKeys, keys.size() - at))) {
      request.add_page_keys(key.digest.ToBytes());
    }
    v1::SetRetentionResponse response;
    PT_RETURN_IF_ERROR(
        Call(&v1::PageStoreService::Stub::SetRetention, request, &response, deadline));
    for (const std::string& raw : response.missing_page_keys()) {
      PT_ASSIGN_OR_RETURN(const PageKey key, DecodePageKey("missing_page_keys", raw));
      missing.push_back(key);
    }
  }
  return missing;
}

absl::Status RemotePageStore::Barrier(Durability level, MonotonicTime deadline) {
  v1::BarrierRequest request;
  request.set_level(EncodeDurability(level));
  v1::BarrierResponse response;
  return Call(&v1::PageStoreService::Stub::Barrier, request, &response, deadline);
}

// ---- manifests ---------------------------------------------------------------------------------

absl::StatusOr<PutManifestResult> RemotePageStore::PutManifest(
    const ManifestRecord& manifest, uint64_t expected_version,
    const std::optional<WriteFence>& fence, MonotonicTime deadline) {
  v1::PutManifestRequest request;
  EncodeManifestMessage(manifest, request.mutable_manifest());
  request.set_expected_version(expected_version);
  EncodeFence(fence, request);
  v1::PutManifestResponse response;
  PT_RETURN_IF_ERROR(Call(&v1::PageStoreService::Stub::PutManifest, request, &response, deadline));
  PutManifestResult result{response.committed(), response.version(), {}};
  for (const std::string& raw : response.missing_page_keys()) {
    PT_ASSIGN_OR_RETURN(const PageKey key, DecodePageKey("missing_page_keys", raw));
    result.missing.push_back(key);
  }
  return result;
}

absl::StatusOr<ManifestRecord> RemotePageStore::GetManifest(absl::string_view name,
                                                            MonotonicTime deadline) {
  v1::GetManifestRequest request;
  request.set_name(std::string(name));
  v1::GetManifestResponse response;
  PT_RETURN_IF_ERROR(Call(&v1::PageStoreService::Stub::GetManifest, request, &response, deadline));
  return DecodeManifestMessage(response.manifest());
}

absl::StatusOr<std::vector<ManifestEntry>> RemotePageStore::ListManifests(
    absl::string_view name_prefix, absl::string_view after, size_t limit, MonotonicTime deadline) {
  std::vector<ManifestEntry> manifests;
  std::string token(after);
  while (manifests.size() < limit) {
    v1::ListManifestsRequest request;
    request.set_name_prefix(std::string(name_prefix));
    request.set_page_size(static_cast<uint32_t>(std::min<size_t>(limit - manifests.size(), 1000)));
    request.set_page_token(token);
    v1::ListManifestsResponse response;
    PT_RETURN_IF_ERROR(
        Call(&v1::PageStoreService::Stub::ListManifests, request, &response, deadline));
    for (const auto& entry : response.manifests()) {
      PT_ASSIGN_OR_RETURN(ManifestEntry manifest, DecodeManifestEntry(entry));
      manifests.push_back(std::move(manifest));
    }
    token = response.next_page_token();
    if (token.empty()) break;
  }
  return manifests;
}

absl::Status RemotePageStore::DeleteManifest(absl::string_view name, uint64_t expected_version,
                                             const std::optional<WriteFence>& fence,
                                             MonotonicTime deadline) {
  v1::DeleteManifestRequest request;
  request.set_name(std::string(name));
  request.set_expected_version(expected_version);
  EncodeFence(fence, request);
  v1::DeleteManifestResponse response;
  return Call(&v1::PageStoreService::Stub::DeleteManifest, request, &response, deadline);
}

// ---- records and leases ------------------------------------------------------------------------

absl::StatusOr<uint64_t> RemotePageStore::CompareAndSetRecord(
    absl::string_view kind, absl::string_view key, uint64_t expected_version,
    std::optional<absl::string_view> value, MonotonicTime deadline) {
  v1::CompareAndSetRecordRequest request;
  request.set_kind(std::string(kind));
  request.set_key(std::string(key));
  request.set_expected_version(expected_version);
  if (value.has_value()) {
    request.set_value(std::string(*value));
  } else {
    request.set_delete_record(true);
  }
  v1::CompareAndSetRecordResponse response;
  PT_RETURN_IF_ERROR(
      Call(&v1::PageStoreService::Stub::CompareAndSetRecord, request, &response, deadline));
  return response.version();
}

absl::StatusOr<StoreRecord> RemotePageStore::GetRecord(absl::string_view kind,
                                                       absl::string_view key,
                                                       MonotonicTime deadline) {
  v1::GetRecordRequest request;
  request.set_kind(std::string(kind));
  request.set_key(std::string(key));
  v1::GetRecordResponse response;
  PT_RETURN_IF_ERROR(Call(&v1::PageStoreService::Stub::GetRecord, request, &response, deadline));
  return StoreRecord{std::string(key), response.version(), response.value()};
}

absl::StatusOr<std::vector<StoreRecord>> RemotePageStore::ListRecords(absl::string_view kind,
                                                                      absl::string_view key_prefix,
                                                                      absl::string_view after,
                                                                      size_t limit,
                                                                      MonotonicTime deadline) {
  std::vector<StoreRecord> records;
  std::string token(after);
  while (records.size() < limit) {
    v1::ListRecordsRequest request;
    request.set_kind(std::string(kind));
    request.set_key_prefix(std::string(key_prefix));
    request.set_page_size(static_cast<uint32_t>(std::min<size_t>(limit - records.size(), 1000)));
    request.set_page_token(token);
    v1::ListRecordsResponse response;
    PT_RETURN_IF_ERROR(
        Call(&v1::PageStoreService::Stub::ListRecords, request, &response, deadline));
    for (const auto& entry : response.records()) {
      records.push_back({entry.key(), entry.version(), entry.value()});
    }
    token = response.next_page_token();
    if (token.empty()) break;
  }
  return records;
}

absl::StatusOr<StoreLease> RemotePageStore::AcquireLease(absl::string_view name,
                                                         uint64_t incarnation, absl::Duration ttl,
                                                         MonotonicTime deadline) {
  v1::AcquireLeaseRequest request;
  request.set_name(std::string(name));
  request.set_incarnation(incarnation);
  *request.mutable_ttl() = DurationToProto(ttl);
  v1::AcquireLeaseResponse response;
  PT_RETURN_IF_ERROR(Call(&v1::PageStoreService::Stub::AcquireLease, request, &response, deadline));
  return StoreLease{std::string(name), incarnation, response.epoch()};
}

absl::Status RemotePageStore::RenewLease(const StoreLease& lease, absl::Duration ttl,
                                         MonotonicTime deadline) {
  v1::RenewLeaseRequest request;
  request.set_name(lease.name);
  request.set_incarnation(lease.incarnation);
  request.set_epoch(lease.epoch);
  *request.mutable_ttl() = DurationToProto(ttl);
  v1::RenewLeaseResponse response;
  return Call(&v1::PageStoreService::Stub::RenewLease, request, &response, deadline);
}

absl::Status RemotePageStore::ReleaseLease(const StoreLease& lease, MonotonicTime deadline) {
  v1::ReleaseLeaseRequest request;
  request.set_name(lease.name);
  request.set_incarnation(lease.incarnation);
  request.set_epoch(lease.epoch);
  v1::ReleaseLeaseResponse response;
  return Call(&v1::PageStoreService::Stub::ReleaseLease, request, &response, deadline);
}

// ---- residency and upkeep ----------------------------------------------------------------------

absl::Status RemotePageStore::Watch(const WatchCallback& on_events, MonotonicTime deadline) {
  grpc::ClientContext context;
  SetDeadline(deadline, &context);
  const v1::WatchStoreRequest request;
  WatchReader reader;
  stub_->async()->WatchStore(&context, &request, &reader);
  reader.Start();
  absl::Status damage;
  std::vector<StoreEvent> events;
  bool wants_more = true;
  MonotonicTime last_heard = clock_->MonotonicNow();
  while (wants_more) {
    const v1::WatchStoreResponse* message = nullptr;
    const WatchReader::Outcome outcome = reader.WaitForMessage(kWatchPoll, &message);
    if (outcome == WatchReader::Outcome::kEnded) break;
    if (outcome == WatchReader::Outcome::kTimeout) {
      const absl::Duration silent = clock_->MonotonicNow() - last_heard;
      if (silent > kWatchSilence) {
        damage = absl::UnavailableError(
            absl::StrCat("watch store: no sign of life for ", absl::FormatDuration(silent)));
      }
      wants_more = damage.ok() && on_events(false, false, {});
      continue;
    }
    last_heard = clock_->MonotonicNow();
    damage = DecodeWatchedPages(*message, &events);
    wants_more = damage.ok() && on_events(message->snapshot(), message->snapshot_end(), events);
    if (wants_more) reader.ReadNext();
  }
  if (!wants_more) context.TryCancel();
  const absl::Status status = reader.WaitForEnd();
  if (!damage.ok()) return damage;
  return wants_more ? status : absl::OkStatus();
}

absl::StatusOr<StoreStats> RemotePageStore::GetStats(MonotonicTime deadline) {
  v1::GetStoreStatsResponse response;
  PT_RETURN_IF_ERROR(Call(&v1::PageStoreService::Stub::GetStoreStats, v1::GetStoreStatsRequest(),
                          &response, deadline));
  return DecodeStats(response);
}

absl::StatusOr<ScrubResult> RemotePageStore::Scrub(uint64_t max_pages, MonotonicTime deadline) {
  v1::ScrubRequest request;
  request.set_max_pages(max_pages);
  v1::ScrubResponse response;
  PT_RETURN_IF_ERROR(Call(&v1::PageStoreService::Stub::Scrub, request, &response, deadline));
  return ScrubResult{response.verified_pages(), response.quarantined_pages(),
                     response.verified_bytes()};
}

absl::StatusOr<uint64_t> RemotePageStore::Compact(MonotonicTime deadline) {
  v1::CompactResponse response;
  PT_RETURN_IF_ERROR(
      Call(&v1::PageStoreService::Stub::Compact, v1::CompactRequest(), &response, deadline));
  return response.reclaimed_bytes();
}

}  // namespace pagetide
