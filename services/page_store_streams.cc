// The three streams of PageStoreServiceImpl: PutPages, GetPages, WatchStore.
#include <grpc/grpc.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/mutex.h"
#include "base/status_macros.h"
#include "kvstore/page_record.h"
#include "kvstore/page_store_codec.h"
#include "rpc/byte_buffer.h"
#include "rpc/status_mapping.h"
#include "services/page_store_service.h"
#include "services/read_ahead.h"

namespace pagetide {

// ---- PutPages ----------------------------------------------------------------------------------
// Reads parts into page buffers; full pages go to the store in batches, on a worker thread, while
// no read is outstanding: that is the back-pressure. One barrier at the end covers all of them. One
// step runs at a time (a reaction or a task), so that no lock is needed.
class PageStoreServiceImpl::PutStream final : public grpc::ServerReadReactor<grpc::ByteBuffer> {
 public:
  PutStream(PageStoreServiceImpl* service, grpc::CallbackServerContext* context,
            grpc::ByteBuffer* response)
      : service_(*service),
        deadline_(service->DeadlineOf(*context)),
        context_(context),
        response_(response) {
    {
      MutexLock lock(&service_.put_streams_mu_);
      service_.put_streams_.insert(this);
    }
    AwaitMessage();
  }

  // If the stream has waited for a message since before `since`: its call, with a reference, to be
  // ended, once; else null.
  grpc_call* TakeIfIdle(MonotonicTime since) {
    int64_t waits_since = waits_since_.load(std::memory_order_relaxed);
    if (waits_since >= absl::ToInt64Nanoseconds(since.since_boot) ||
        !waits_since_.compare_exchange_strong(waits_since, kBusy, std::memory_order_relaxed)) {
      return nullptr;
    }
    grpc_call_ref(context_->c_call());
    return context_->c_call();
  }

  void OnReadDone(bool ok) override {
    waits_since_.store(kBusy, std::memory_order_relaxed);
    if (!ok) {
      RunTask([this] { End(); });
      return;
    }
    const absl::Status taken = TakeMessage();
    message_.Clear();
    if (!taken.ok()) {
      Refuse(taken);
    } else if (buffered_bytes_ >= service_.options_.max_stream_bytes / 2) {
      RunTask([this] {
        StoreFullPages();
        AwaitMessage();
      });
    } else {
      AwaitMessage();
    }
  }
  void OnDone() override { delete this; }

 private:
  struct Incoming {
    PageRecordMeta meta;
    std::vector<uint32_t> tokens;
    std::vector<std::byte> body;  // grows with what arrives, never ahead of it
    uint64_t num_bytes() const {
      return sizeof(*this) + tokens.size() * sizeof(uint32_t) + body.size();
    }
  };

  static constexpr int64_t kBusy = std::numeric_limits<int64_t>::max();

  ~PutStream() override {
    Hold(0);
    MutexLock lock(&service_.put_streams_mu_);
    service_.put_streams_.erase(this);
  }

  void AwaitMessage() {
    waits_since_.store(absl::ToInt64Nanoseconds(service_.clock_->MonotonicNow().since_boot),
                       std::memory_order_relaxed);
    StartRead(&message_);
  }

  // What this stream has in memory is `bytes` now.
  void Hold(uint64_t bytes) {
    service_.put_bytes_.fetch_add(bytes - buffered_bytes_, std::memory_order_relaxed);
    buffered_bytes_ = bytes;
  }

  template <typename Task>
  void RunTask(Task task) {
    const absl::Status scheduled = service_.executor_.Schedule(std::move(task));
    if (!scheduled.ok()) Refuse(WithRetryDelay(scheduled, absl::Milliseconds(100)));
  }

  // What the stream held is free before its client knows.
  void Refuse(const absl::Status& status) {
    pages_.clear();
    Hold(0);
    Finish(ToGrpcStatus(status));
  }

  bool IsLastPageFull() const {
    return pages_.empty() || pages_.back().body.size() == pages_.back().meta.body_bytes;
  }

  absl::Status TakeMessage() {
    v1::PutPagesRequest request;
    PayloadView part;
    PT_RETURN_IF_ERROR(DecodeWithPayload(message_, kPageBodyField, &request, &part));
    if (!has_level_) {
      PT_ASSIGN_OR_RETURN(level_, DecodeDurability(request.level()));
      has_level_ = true;
    }
    if (request.has_header()) {
      if (!IsLastPageFull()) return CutPageError("a new header came");
      if (num_pages_ >= service_.options_.max_stream_pages) {
        return absl::InvalidArgumentError(
            absl::StrCat("put pages: more than ", service_.options_.max_stream_pages, " pages"));
      }
      Incoming page;
      PT_ASSIGN_OR_RETURN(page.meta, DecodePageHeader(request.header()));
      PT_RETURN_IF_ERROR(ValidatePageMeta(page.meta));
      if (static_cast<uint64_t>(request.header().tokens_size()) > kMaxIndexedPageTokens) {
        return absl::InvalidArgumentError(absl::StrCat(
            "put pages: page ", num_pages_, ": tokens has ", request.header().tokens_size(),
            " entries, at most ", kMaxIndexedPageTokens));
      }
      page.tokens.assign(request.header().tokens().begin(), request.header().tokens().end());
      page.body.reserve(std::min(page.meta.body_bytes, 4 * kPagePartBytes));
      Hold(buffered_bytes_ + page.num_bytes());
      pages_.push_back(std::move(page));
      ++num_pages_;
    } else if (pages_.empty()) {
      return absl::InvalidArgumentError("put pages: body without a header");
    }
    if (part.size() > kPagePartBytes) {
      return absl::InvalidArgumentError(
          absl::StrCat("put pages: a part of ", part.size(), " bytes, at most ", kPagePartBytes));
    }
    Incoming& page = pages_.back();
    if (part.size() > page.meta.body_bytes - page.body.size()) {
      return absl::InvalidArgumentError(
          absl::StrCat("put pages: page ", num_pages_ - 1, ": body_bytes is ", page.meta.body_bytes,
                       ", received ", page.body.size() + part.size()));
    }
    for (size_t i = 0; i < part.num_pieces(); ++i) {
      const auto piece = part.piece(i);
      page.body.insert(page.body.end(), piece.begin(), piece.end());
    }
    Hold(buffered_bytes_ + part.size());
    const uint64_t held = service_.put_bytes_.load(std::memory_order_relaxed);
    if (held > service_.options_.max_put_bytes) {
      return WithRetryDelay(
          WithReason(absl::ResourceExhaustedError(absl::StrCat(
                         "put pages: ", held, " bytes are on their way to the store, at most ",
                         service_.options_.max_put_bytes)),
                     "PUT_MEMORY"),
          absl::Milliseconds(100));
    }
    return absl::OkStatus();
  }

  absl::Status CutPageError(absl::string_view why) const {
    return absl::InvalidArgumentError(absl::StrCat(
        "put pages: page ", num_pages_ - 1, ": body_bytes is ", pages_.back().meta.body_bytes,
        ", received ", pages_.back().body.size(), ": ", why));
  }

  // Hands all full pages to the store; an unfinished last one stays.
  void StoreFullPages() {
    const size_t num_full = IsLastPageFull() ? pages_.size() : pages_.size() - 1;
    if (num_full == 0) return;
    std::vector<PutPage> puts;
    puts.reserve(num_full);
    for (size_t i = 0; i < num_full; ++i)
      puts.push_back({pages_[i].meta, pages_[i].body, pages_[i].tokens});
    // LOCAL is reached by one barrier at the end of the stream.
    const Durability level = level_ == Durability::kLocal ? Durability::kProcess : level_;
    for (PutPageResult& result : service_.store_->PutPages(puts, level, deadline_)) {
      results_.push_back(std::move(result));
    }
    pages_.erase(pages_.begin(), pages_.begin() + static_cast<ptrdiff_t>(num_full));
    Hold(pages_.empty() ? 0 : pages_.back().num_bytes());
  }

  void End() {
    if (!IsLastPageFull()) return Refuse(CutPageError("the stream ended"));
    StoreFullPages();
    const bool any_ok = std::any_of(results_.begin(), results_.end(),
                                    [](const PutPageResult& r) { return r.status.ok(); });
    absl::Status durable;
    if (any_ok && level_ == Durability::kLocal)
      durable = service_.store_->Barrier(level_, deadline_);
    v1::PutPagesResponse response;
    for (PutPageResult& result : results_) {
      if (result.status.ok()) result.status = durable;
      v1::PutPagesResponse::Result* out = response.add_results();
      out->set_code(static_cast<int32_t>(result.status.code()));
      out->set_message(std::string(result.status.message()));
      out->set_reason(GetReason(result.status));
      out->set_already_present(result.already_present);
      EncodeChecksum(result.checksum, out->mutable_checksum());
    }
    *response_ = EncodeMessage(response);
    Finish(grpc::Status::OK);
  }

  PageStoreServiceImpl& service_;
  const MonotonicTime deadline_;
  grpc::CallbackServerContext* const context_;
  grpc::ByteBuffer* const response_;
  // Since when a message is awaited, in ns; kBusy: none is. Relaxed: a hint, of a minute ago.
  std::atomic<int64_t> waits_since_{kBusy};
  grpc::ByteBuffer message_;
  Durability level_ = Durability::kCache;
  bool has_level_ = false;
  std::vector<Incoming> pages_;  // full but not yet stored; the last one may be unfinished
  size_t num_pages_ = 0;
  uint64_t buffered_bytes_ = 0;  // of pages_; counted in the service's put_bytes_, too
  std::vector<PutPageResult> results_;
};

void PageStoreServiceImpl::EndIdlePutStreams() {
  const MonotonicTime since = clock_->MonotonicNow() - options_.put_idle;
  std::vector<grpc_call*> idle;
  {
    MutexLock lock(&put_streams_mu_);
    for (PutStream* stream : put_streams_) {
      if (grpc_call* const call = stream->TakeIfIdle(since)) idle.push_back(call);
    }
  }
  const std::string what =
      absl::StrCat("put pages: nothing came for ", absl::FormatDuration(options_.put_idle));
  for (grpc_call* call : idle) {
    if (num_idle_streams_ != nullptr) num_idle_streams_->Increment();
    // As ServerContext::TryCancel, which can say CANCELLED only. The stream's read fails, and it
    // ends as when its client goes away.
    grpc_call_cancel_with_status(call, GRPC_STATUS_DEADLINE_EXCEEDED, what.c_str(), nullptr);
    grpc_call_unref(call);
  }
}

grpc::ServerReadReactor<grpc::ByteBuffer>* PageStoreServiceImpl::PutPages(
    grpc::CallbackServerContext* context, grpc::ByteBuffer* response) {
  return new PutStream(this, context, response);
}

// ---- GetPages ----------------------------------------------------------------------------------
// A task reads pages ahead of the wire, up to half of max_stream_bytes; writes lend slices of the
// page buffers to gRPC. ReadAhead says what comes next.
class PageStoreServiceImpl::GetStream final : public grpc::ServerWriteReactor<grpc::ByteBuffer> {
 public:
  GetStream(PageStoreServiceImpl* service, grpc::CallbackServerContext* context,
            const grpc::ByteBuffer* request)
      : service_(*service), deadline_(service->DeadlineOf(*context)) {
    const absl::Status decoded = Decode(*request);
    if (!decoded.ok()) {
      Finish(ToGrpcStatus(decoded));
      return;
    }
    read_ahead_.emplace(keys_.size(), service_.options_.max_stream_bytes / 2);
    Take(read_ahead_->Begin());
  }

  void OnWriteDone(bool ok) override {
    Take(read_ahead_->WriterTurn(ok ? absl::OkStatus()
                                    : absl::CancelledError("get pages: the stream broke")));
  }
  void OnCancel() override {
    if (read_ahead_) Take(read_ahead_->CancelTurn(absl::CancelledError("get pages: cancelled")));
  }
  void OnDone() override { delete this; }

 private:
  using Body = std::shared_ptr<std::byte[]>;  // shared by the slices on their way
  using Turn = ReadAhead<grpc::ByteBuffer>::Turn;

  absl::Status Decode(const grpc::ByteBuffer& bytes) {
    v1::GetPagesRequest request;
    PT_RETURN_IF_ERROR(DecodeMessage(bytes, &request));
    const size_t n = static_cast<size_t>(request.page_keys_size());
    if (n > service_.options_.max_stream_pages) {
      return absl::InvalidArgumentError(absl::StrCat("page_keys has ", n, " entries, at most ",
                                                     service_.options_.max_stream_pages));
    }
    if (request.expected_size() != 0 && static_cast<size_t>(request.expected_size()) != n) {
      return absl::InvalidArgumentError(
          absl::StrCat("expected has ", request.expected_size(), " entries, page_keys has ", n));
    }
    for (size_t i = 0; i < n; ++i) {
      PT_ASSIGN_OR_RETURN(const PageKey key,
                          DecodePageKey("page_keys", request.page_keys(static_cast<int>(i))));
      keys_.push_back(key);
      // All zero: no checksum is expected of this page.
      std::optional<Checksum128> expected;
      if (request.expected_size() != 0) {
        expected = DecodeChecksum(request.expected(static_cast<int>(i)));
        if (*expected == Checksum128{}) expected.reset();
      }
      expected_.push_back(expected);
    }
    return absl::OkStatus();
  }

  // Does what a turn says, but for reading. After it the stream may be gone, unless the turn gave
  // the reader an item.
  void Take(Turn turn) {
    if (turn.write != nullptr) StartWrite(turn.write);
    if (turn.finish) Finish(ToGrpcStatus(*turn.finish));
    if (!turn.start_reader) return;
    const absl::Status scheduled = service_.executor_.Schedule([this] { Read(); });
    if (!scheduled.ok()) {
      Take(read_ahead_->ReaderTurn(WithRetryDelay(scheduled, absl::Milliseconds(100))));
    }
  }

  // Runs on a worker thread; only one at a time.
  void Read() {
    absl::Status read;
    for (;;) {
      const Turn turn = read_ahead_->ReaderTurn(read);
      Take(turn);
      if (!turn.read) return;
      read = ReadPage(*turn.read);
    }
  }

  absl::Status ReadPage(size_t index) {
    const PageKey key = keys_[index];
    PT_ASSIGN_OR_RETURN(const auto found, service_.store_->LookupPages({&key, 1}, deadline_));
    v1::GetPagesResponse header;
    header.set_index(static_cast<uint32_t>(index));
    // A page that comes, goes or is replaced between look-up and read is answered as a miss.
    const uint64_t body_bytes = found[0].present ? found[0].body_bytes : 0;
    const Body body = std::make_shared_for_overwrite<std::byte[]>(body_bytes);
    const std::span<std::byte> bytes(body.get(), body_bytes);
    const GetPage get{key, bytes, expected_[index]};
    // Absent pages are asked for too: the store counts its misses.
    GetPageResult result = service_.store_->GetPages({&get, 1}, deadline_)[0];
    if (absl::IsInvalidArgument(result.status)) result = GetPageResult{};
    PT_RETURN_IF_ERROR(result.status);
    if (result.outcome != GetOutcome::kHit) {
      header.set_outcome(result.outcome == GetOutcome::kQuarantined
                             ? v1::GetPagesResponse::OUTCOME_QUARANTINED
                             : v1::GetPagesResponse::OUTCOME_MISS);
      read_ahead_->Push(EncodeMessage(header), 0);
      return absl::OkStatus();
    }
    header.set_outcome(v1::GetPagesResponse::OUTCOME_HIT);
    header.mutable_header()->set_page_key(key.digest.ToBytes());
    header.mutable_header()->set_body_bytes(body_bytes);
    EncodeChecksum(result.checksum, header.mutable_header()->mutable_checksum());
    for (uint64_t at = 0; at < body_bytes; at += kPagePartBytes) {
      const uint64_t n = std::min<uint64_t>(kPagePartBytes, body_bytes - at);
      const std::span<const std::byte> part = bytes.subspan(at, n);
      read_ahead_->Push(EncodeWithPayload(header, kPageBodyField, LendSlice(part, Body(body))), n);
      header.Clear();
      header.set_index(static_cast<uint32_t>(index));
    }
    return absl::OkStatus();
  }

  PageStoreServiceImpl& service_;
  const MonotonicTime deadline_;
  // Const after construction.
  std::vector<PageKey> keys_;
  std::vector<std::optional<Checksum128>> expected_;
  std::optional<ReadAhead<grpc::ByteBuffer>> read_ahead_;  // absent: the request was refused
};

grpc::ServerWriteReactor<grpc::ByteBuffer>* PageStoreServiceImpl::GetPages(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request) {
  return new GetStream(this, context, request);
}

// ---- WatchStore --------------------------------------------------------------------------------
// A watcher gives up after three seconds of silence.
constexpr absl::Duration kWatchHeartbeat = absl::Seconds(1);

// A thread a watcher, since the port's Watch blocks for as long as the watch lasts.
class PageStoreServiceImpl::WatchStream final
    : public grpc::ServerWriteReactor<v1::WatchStoreResponse> {
 public:
  WatchStream(PageStoreServiceImpl* service, grpc::CallbackServerContext* context)
      : service_(*service), deadline_(service->DeadlineOf(*context)) {
    const int watchers = service_.num_watchers_.fetch_add(1) + 1;
    if (watchers > service_.options_.max_watchers) {
      Finish(ToGrpcStatus(absl::ResourceExhaustedError(absl::StrCat(
          "watch store: ", watchers - 1, " watchers, at most ", service_.options_.max_watchers))));
      return;
    }
    service_.watch_threads_.Start([this] { Run(); });
  }
  ~WatchStream() override { service_.num_watchers_.fetch_sub(1); }

  void OnWriteDone(bool ok) override {
    {
      MutexLock lock(&mu_);
      is_writing_ = false;
      is_broken_ = is_broken_ || !ok;
    }
    written_.SignalAll();
  }
  void OnCancel() override {
    MutexLock lock(&mu_);
    is_broken_ = true;
  }
  // May come from the watch's own thread, inside Finish: the service joins it.
  void OnDone() override { delete this; }

 private:
  void Run() {
    const absl::Status ended = service_.store_->Watch(
        [this](bool snapshot, bool snapshot_end, std::span<const StoreEvent> events) {
          return Send(snapshot, snapshot_end, events);
        },
        deadline_);
    // The last thing it does: nothing of the stream is there afterwards.
    Finish(
        ToGrpcStatus(ended.ok() ? absl::UnavailableError("watch store: the store drains") : ended));
  }

  // Writes one message and waits until it is on its way.
  bool Send(bool snapshot, bool snapshot_end, std::span<const StoreEvent> events) {
    {
      MutexLock lock(&mu_);
      if (is_broken_ || service_.ending_.load(std::memory_order_relaxed)) return false;
    }
    // Nothing happened: a sign of life is enough, and not at every poll.
    const MonotonicTime now = service_.clock_->MonotonicNow();
    if (events.empty() && !snapshot && now - last_message_ < kWatchHeartbeat) return true;
    last_message_ = now;
    v1::WatchStoreResponse message;
    message.set_incarnation(service_.incarnation_);
    message.set_number(++number_);
    message.set_snapshot(snapshot);
    message.set_snapshot_end(snapshot_end);
    for (const StoreEvent& event : events) {
      v1::WatchStoreResponse::Page* page =
          event.removed ? message.add_removed() : message.add_added();
      page->set_prefix_hint(std::string(event.prefix.digest.view().substr(0, 16)));
      page->set_group(event.group);
      page->set_body_bytes(event.body_bytes);
    }
    {
      MutexLock lock(&mu_);
      is_writing_ = true;
    }
    StartWrite(&message);
    MutexLock lock(&mu_);
    while (is_writing_) written_.Wait(&mu_);
    return !is_broken_;
  }

  PageStoreServiceImpl& service_;
  const MonotonicTime deadline_;
  // Owned by the watch's thread.
  uint64_t number_ = 0;
  MonotonicTime last_message_;
  Mutex mu_;
  CondVar written_;
  bool is_writing_ ABSL_GUARDED_BY(mu_) = false;
  bool is_broken_ ABSL_GUARDED_BY(mu_) = false;
};

grpc::ServerWriteReactor<v1::WatchStoreResponse>* PageStoreServiceImpl::WatchStore(
    grpc::CallbackServerContext* context, const v1::WatchStoreRequest* request) {
  return new WatchStream(this, context);
}

}  // namespace pagetide
