#include "services/worker_registry_service.h"

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "rpc/status_mapping.h"
#include "services/router_codec.h"

namespace pagetide {

// One worker's stream. gRPC calls OnReadDone, OnWriteDone and OnDone from its threads, one reading
// callback at a time; Tick and the drain call from theirs. mu_ makes sure that nothing is started
// after Finish. gRPC never runs a callback from within StartRead, StartWrite or Finish, so that
// calling them under mu_ cannot deadlock.
class WorkerRegistryServiceImpl::Stream final
    : public grpc::ServerBidiReactor<v1::AttachRequest, v1::AttachResponse>,
      public std::enable_shared_from_this<Stream> {
 public:
  explicit Stream(WorkerRegistryServiceImpl* service)
      : service_(service), started_(service->clock_->MonotonicNow()) {}

  void Start() {
    MutexLock lock(&mu_);
    StartRead(&request_);
  }

  void Close(const absl::Status& status) {
    MutexLock lock(&mu_);
    if (std::exchange(is_finished_, true)) return;
    Finish(ToGrpcStatus(status));
  }

  // Sends a directive whose time has come, and ends a stream that never said hello.
  void Tick() {
    const MonotonicTime now = service_->clock_->MonotonicNow();
    bool is_late = false;
    {
      MutexLock lock(&mu_);
      is_late = !has_hello_ && now >= started_ + service_->options_.hello_timeout;
      SendNext();
    }
    if (is_late) {
      Close(absl::DeadlineExceededError(absl::StrCat(
          "attach: no hello within ", absl::FormatDuration(service_->options_.hello_timeout))));
    }
  }

  std::optional<AttachmentId> attachment() const {
    MutexLock lock(&mu_);
    return attachment_;
  }
  bool has_hello() const {
    MutexLock lock(&mu_);
    return has_hello_;
  }

  void OnReadDone(bool ok) override {
    if (!ok) {
      Close(absl::OkStatus());  // half-closed by the worker, or the connection broke
      return;
    }
    const absl::Status status = Handle(request_);
    if (!status.ok()) {
      Close(status);
      return;
    }
    MutexLock lock(&mu_);
    if (!is_finished_) StartRead(&request_);
  }

  void OnWriteDone(bool ok) override {
    MutexLock lock(&mu_);
    is_writing_ = false;
    if (ok) SendNext();
  }

  void OnCancel() override { Close(absl::CancelledError("attach: the stream was cancelled")); }

  void OnDone() override { service_->OnEnded(shared_from_this()); }

 private:
  absl::Status Handle(const v1::AttachRequest& request) {
    if (request.report_case() == v1::AttachRequest::kHello) return HandleHello(request.hello());
    const std::optional<AttachmentId> attachment = this->attachment();
    if (!attachment.has_value()) {
      return absl::InvalidArgumentError("attach: the first message is not a hello");
    }
    Router& router = *service_->router_;
    switch (request.report_case()) {
      case v1::AttachRequest::kLoad:
        return router.OnLoad(*attachment, LoadFromProto(request.load()));
      case v1::AttachRequest::kSequences: {
        PT_ASSIGN_OR_RETURN(const auto changes, SequencesFromProto(request.sequences()));
        const absl::Status status =
            router.OnSequences(*attachment, request.sequences().snapshot(), changes);
        // More sequences than the table holds is no reason to lose the worker.
        return absl::IsResourceExhausted(status) ? absl::OkStatus() : status;
      }
      case v1::AttachRequest::kResidency: {
        PT_ASSIGN_OR_RETURN(const ResidencyReport report,
                            ResidencyFromProto(request.residency(), changes_));
        PT_ASSIGN_OR_RETURN(auto because, router.OnResidency(*attachment, report));
        if (because.has_value()) AskForSnapshot(*std::move(because));
        return absl::OkStatus();
      }
      default:
        return absl::InvalidArgumentError("attach: a message without a report");
    }
  }

  absl::Status HandleHello(const v1::AttachHello& proto) {
    if (has_hello()) return absl::InvalidArgumentError("attach: a second hello");
    PT_ASSIGN_OR_RETURN(WorkerHello hello, HelloFromProto(proto));
    const std::string worker_id = hello.worker_id;
    PT_ASSIGN_OR_RETURN(const Router::Attached attached,
                        service_->router_->Attach(std::move(hello)));
    {
      MutexLock lock(&mu_);
      has_hello_ = true;
      attachment_ = attached.id;
    }
    // Who is welcomed is known: Tick finds its stream when it falls silent.
    service_->OnAttached(shared_from_this(), attached);
    {
      MutexLock lock(&mu_);
      is_welcome_due_ = true;
      SendNext();
    }
    LogInfo("router", proto.role(), " ", worker_id, " attached, incarnation ",
            absl::Hex(proto.incarnation(), absl::kZeroPad16));
    return absl::OkStatus();
  }

  void AskForSnapshot(std::string because) {
    LogInfo("router", "asks for a residency snapshot: ", because);
    MutexLock lock(&mu_);
    snapshot_because_ = std::move(because);
    SendNext();
  }

  // At most one write is in flight; what is due next waits in the flags, one of each kind.
  void SendNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (is_writing_ || is_finished_) return;
    response_.Clear();
    if (is_welcome_due_) {
      is_welcome_due_ = false;
      response_.mutable_welcome()->set_router_id(service_->router_->options().router_id);
      response_.mutable_welcome()->set_heartbeat_milliseconds(
          static_cast<uint32_t>(absl::ToInt64Milliseconds(service_->options_.heartbeat)));
    } else if (snapshot_because_.has_value()) {
      const MonotonicTime now = service_->clock_->MonotonicNow();
      if (last_snapshot_.has_value() &&
          now < *last_snapshot_ + service_->options_.min_snapshot_interval) {
        return;  // Tick sends it
      }
      last_snapshot_ = now;
      response_.mutable_send_snapshot()->set_because(
          *std::exchange(snapshot_because_, std::nullopt));
    } else {
      return;
    }
    is_writing_ = true;
    StartWrite(&response_);
  }

  WorkerRegistryServiceImpl* const service_;
  const MonotonicTime started_;

  // Used by the reading callbacks only.
  v1::AttachRequest request_;
  std::vector<ResidencyDelta> changes_;

  mutable Mutex mu_;
  v1::AttachResponse response_ ABSL_GUARDED_BY(mu_);  // not touched while is_writing_
  bool is_writing_ ABSL_GUARDED_BY(mu_) = false;
  bool is_finished_ ABSL_GUARDED_BY(mu_) = false;
  bool has_hello_ ABSL_GUARDED_BY(mu_) = false;
  bool is_welcome_due_ ABSL_GUARDED_BY(mu_) = false;
  std::optional<AttachmentId> attachment_ ABSL_GUARDED_BY(mu_);
  std::optional<std::string> snapshot_because_ ABSL_GUARDED_BY(mu_);
  std::optional<MonotonicTime> last_snapshot_ ABSL_GUARDED_BY(mu_);
};

WorkerRegistryServiceImpl::WorkerRegistryServiceImpl(Options options, Router* router,
                                                     const Clock* clock)
    : options_(options), router_(router), clock_(clock) {}

WorkerRegistryServiceImpl::~WorkerRegistryServiceImpl() = default;

grpc::ServerBidiReactor<v1::AttachRequest, v1::AttachResponse>* WorkerRegistryServiceImpl::Attach(
    grpc::CallbackServerContext*) {
  auto stream = std::make_shared<Stream>(this);
  absl::Status refusal;
  {
    MutexLock lock(&mu_);
    streams_[stream.get()] = stream;
    if (is_closed_) {
      refusal = absl::UnavailableError("attach: this router is draining");
    } else if (streams_.size() - attached_.size() > options_.max_pending_streams) {
      refusal = absl::ResourceExhaustedError(absl::StrCat("attach: ", options_.max_pending_streams,
                                                          " streams have not said hello yet"));
    }
  }
  if (refusal.ok()) {
    stream->Start();
  } else {
    stream->Close(refusal);
  }
  return stream.get();
}

void WorkerRegistryServiceImpl::OnAttached(std::shared_ptr<Stream> stream,
                                           const Router::Attached& attached) {
  std::shared_ptr<Stream> replaced;
  {
    MutexLock lock(&mu_);
    attached_[attached.id] = std::move(stream);
    if (attached.replaced.has_value()) {
      const auto it = attached_.find(*attached.replaced);
      if (it != attached_.end()) replaced = it->second;
    }
  }
  if (replaced != nullptr) {
    replaced->Close(absl::FailedPreconditionError(
        "attach: another stream has attached with the same worker_id"));
  }
}

void WorkerRegistryServiceImpl::OnEnded(const std::shared_ptr<Stream>& stream) {
  const std::optional<AttachmentId> attachment = stream->attachment();
  if (attachment.has_value()) router_->Detach(*attachment, "its stream ended");
  MutexLock lock(&mu_);
  if (attachment.has_value()) attached_.erase(*attachment);
  streams_.erase(stream.get());
}

void WorkerRegistryServiceImpl::Tick() {
  const std::vector<AttachmentId> silent = router_->Tick();
  std::vector<std::shared_ptr<Stream>> streams, to_close;
  {
    MutexLock lock(&mu_);
    for (const auto& [_, stream] : streams_) streams.push_back(stream);
    for (AttachmentId id : silent) {
      const auto it = attached_.find(id);
      if (it != attached_.end()) to_close.push_back(it->second);
    }
  }
  for (const auto& stream : to_close) {
    stream->Close(absl::DeadlineExceededError("attach: no report for the time to live"));
  }
  for (const auto& stream : streams) stream->Tick();
}

void WorkerRegistryServiceImpl::CloseAll(const absl::Status& status) {
  std::vector<std::shared_ptr<Stream>> streams;
  {
    MutexLock lock(&mu_);
    is_closed_ = true;
    for (const auto& [_, stream] : streams_) streams.push_back(stream);
  }
  for (const auto& stream : streams) stream->Close(status);
}

}  // namespace pagetide
