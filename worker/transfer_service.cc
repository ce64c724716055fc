#include "worker/transfer_service.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "rpc/status_mapping.h"
#include "worker/transfer_wire.h"

namespace pagetide {

TransferServiceImpl::TransferServiceImpl(Worker* worker, IncomingTransfers* incoming,
                                         SequenceSender* sender, FrameLink* link,
                                         GroupMailbox* mailbox, RequestMemos* memos,
                                         StreamDeadlines* deadlines)
    : worker_(worker),
      incoming_(incoming),
      sender_(sender),
      link_(link),
      mailbox_(mailbox),
      memos_(memos),
      deadlines_(deadlines) {}

v1::CommitTransferResponse TransferServiceImpl::ToProto(
    const IncomingTransfers::Committed& committed) const {
  v1::CommitTransferResponse proto;
  if (committed.info)
    *proto.mutable_state() = StateToProto(*worker_, *committed.host, *committed.info);
  proto.set_pages(committed.pages);
  proto.set_received_pages(committed.received_pages);
  proto.set_received_bytes(committed.received_bytes);
  return proto;
}

absl::StatusOr<v1::ReserveTransferResponse> TransferServiceImpl::Reserve(
    const CallContext& call, const v1::ReserveTransferRequest& request) {
  PT_ASSIGN_OR_RETURN(const absl::Duration ttl, DurationFromProto("ttl", request.ttl()));
  PT_ASSIGN_OR_RETURN(TransferPlan plan, PlanFromProto(request, call.tenant));
  if (plan.state.model_digest.ToHex() != request.model_digest()) {
    return absl::InvalidArgumentError(
        absl::StrCat("model_digest is not that of the state, ", plan.state.model_digest.ToHex()));
  }
  PT_ASSIGN_OR_RETURN(ModelHost* const host,
                      worker_->HostOfModel(request.model_digest(), call.deadline));
  PT_ASSIGN_OR_RETURN(const IncomingTransfers::Reserved reserved,
                      incoming_->Reserve(call.tenant, host, std::move(plan), ttl, call.deadline));
  v1::ReserveTransferResponse response;
  response.set_transfer_id(reserved.id);
  response.mutable_wanted()->Add(reserved.wanted.begin(), reserved.wanted.end());
  response.set_wanted_bytes(reserved.wanted_bytes);
  *response.mutable_ttl() = DurationToProto(reserved.ttl);
  response.set_worker_id(worker_->id());
  response.set_incarnation(worker_->incarnation());
  if (link_ != nullptr && TransfersOf(*host).has_device_addresses()) {
    response.set_link(link_->name());
  }
  return response;
}

grpc::Status TransferServiceImpl::ReserveTransfer(grpc::ServerContext* context,
                                                  const v1::ReserveTransferRequest* request,
                                                  v1::ReserveTransferResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  auto answer = memos_->OncePerTenant<v1::ReserveTransferResponse>(
      call.tenant.name, request->request_id(), DigestOfMessage(*request), call.deadline,
      [&] { return Reserve(call, *request); });
  if (answer.ok()) *response = *std::move(answer);
  return ToGrpcStatus(answer.status());
}

absl::Status TransferServiceImpl::Push(const CallContext& call, grpc::ServerContext* context,
                                       grpc::ServerReader<v1::PushPagesRequest>* reader,
                                       v1::PushPagesResponse* response) {
  std::unique_ptr<IncomingTransfers::Push> push;
  std::string transfer_id;
  v1::PushPagesRequest part;
  while (reader->Read(&part)) {
    if (push == nullptr) {
      transfer_id = part.transfer_id();
      PT_ASSIGN_OR_RETURN(push, incoming_->BeginPush(call.tenant, transfer_id));
    } else if (!part.transfer_id().empty() && part.transfer_id() != transfer_id) {
      return absl::InvalidArgumentError("transfer_id changed within the stream");
    }
    if (part.data().size() > kMaxTransferPartBytes) {
      return absl::InvalidArgumentError(absl::StrCat(
          "data has ", part.data().size(), " bytes, a part at most ", kMaxTransferPartBytes));
    }
    PT_RETURN_IF_ERROR(
        push->Write(part.page(), part.offset(),
                    std::as_bytes(std::span(part.data().data(), part.data().size()))));
  }
  // The end of a stream and its loss look alike to Read. What came whole is there all the same.
  if (context->IsCancelled()) return absl::CancelledError("push pages: the stream broke");
  if (push == nullptr) return absl::InvalidArgumentError("the stream has no transfer_id");
  response->set_received_pages(push->received_pages());
  response->set_received_bytes(push->received_bytes());
  response->set_missing_pages(push->num_missing());
  return absl::OkStatus();
}

grpc::Status TransferServiceImpl::PushPages(grpc::ServerContext* context,
                                            grpc::ServerReader<v1::PushPagesRequest>* reader,
                                            v1::PushPagesResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const StreamDeadlines::Watch watch(deadlines_, context, call.end, "push pages");
  return ToGrpcStatus(Push(call, context, reader, response));
}

absl::Status TransferServiceImpl::Receive(const CallContext& call,
                                          const v1::ReceivePagesRequest& request,
                                          grpc::ServerWriter<v1::ReceivePagesResponse>* writer) {
  PT_ASSIGN_OR_RETURN(const absl::Duration join_timeout,
                      DurationFromProto("join_timeout", request.join_timeout()));
  if (join_timeout == absl::ZeroDuration() || join_timeout > FrameLink::kMaxJoinTimeout) {
    return absl::InvalidArgumentError(absl::StrCat(
        "join_timeout is ", absl::FormatDuration(join_timeout), ", must be above 0 and at most ",
        absl::FormatDuration(FrameLink::kMaxJoinTimeout)));
  }
  if (ProveLink(request.transfer_id(), request.link(), call.tenant.salt).view() !=
      request.proof()) {
    return WithReason(
        absl::PermissionDeniedError("receive pages: the proof is not of a worker of this "
                                    "deployment, for this tenant"),
        "NOT_PROVEN");
  }
  if (link_ == nullptr || request.link() != link_->name()) {
    return WithReason(
        absl::FailedPreconditionError("receive pages: this worker has no link of that name"),
        "NO_LINK");
  }
  // All that can refuse comes before the id: a group that nobody joins leaves a thread of NCCL's.
  PT_ASSIGN_OR_RETURN(const std::unique_ptr<IncomingTransfers::Push> push,
                      incoming_->BeginPush(call.tenant, request.transfer_id()));
  PT_ASSIGN_OR_RETURN(const std::unique_ptr<FrameLink::Pair> pair, link_->Take(call.tenant.name));
  PT_ASSIGN_OR_RETURN(const std::string id, pair->MakeId());
  v1::ReceivePagesResponse first;
  first.set_link_id(id);
  if (!writer->Write(first)) return absl::CancelledError("receive pages: the caller left");
  PT_RETURN_IF_ERROR(pair->Receive(
      id, join_timeout, *push,
      std::span(request.pages().data(), static_cast<size_t>(request.pages_size())), call.deadline));
  v1::ReceivePagesResponse last;
  last.set_received_pages(push->received_pages());
  last.set_received_bytes(push->received_bytes());
  last.set_missing_pages(push->num_missing());
  if (!writer->Write(last)) return absl::CancelledError("receive pages: the caller left");
  return absl::OkStatus();
}

grpc::Status TransferServiceImpl::ReceivePages(
    grpc::ServerContext* context, const v1::ReceivePagesRequest* request,
    grpc::ServerWriter<v1::ReceivePagesResponse>* writer) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const StreamDeadlines::Watch watch(deadlines_, context, call.end, "receive pages");
  return ToGrpcStatus(Receive(call, *request, writer));
}

grpc::Status TransferServiceImpl::CommitTransfer(grpc::ServerContext* context,
                                                 const v1::CommitTransferRequest* request,
                                                 v1::CommitTransferResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  bool is_repeat = false;
  const auto committed = incoming_->Commit(call.tenant, request->transfer_id(), &is_repeat);
  if (committed.ok()) {
    *response = ToProto(*committed);
    if (!is_repeat && committed->info) {
      // A sequence that is moved may have been open here before.
      if (committed->is_move) {
        worker_->NoteResumed(*committed->host, *committed->info);
      } else {
        worker_->NoteSequence(*committed->host, *committed->info);
      }
    }
  }
  return ToGrpcStatus(committed.status());
}

grpc::Status TransferServiceImpl::AbortTransfer(grpc::ServerContext* context,
                                                const v1::AbortTransferRequest* request,
                                                v1::AbortTransferResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto committed = incoming_->Abort(call.tenant, request->transfer_id());
  if (committed.ok() && *committed) *response->mutable_committed() = ToProto(**committed);
  response->set_worker_id(worker_->id());
  response->set_incarnation(worker_->incarnation());
  return ToGrpcStatus(committed.status());
}

grpc::Status TransferServiceImpl::SendSequence(grpc::ServerContext* context,
                                               const v1::SendSequenceRequest* request,
                                               v1::SendSequenceResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  auto answer = memos_->OncePerTenant<v1::SendSequenceResponse>(
      call.tenant.name, request->request_id(), DigestOfMessage(*request), call.deadline,
      [&] { return sender_->Send(call.tenant, *request, call.deadline); });
  if (answer.ok()) *response = *std::move(answer);
  return ToGrpcStatus(answer.status());
}

absl::Status TransferServiceImpl::Deliver(const CallContext& call,
                                          grpc::ServerReader<v1::DeliverBytesRequest>* reader) {
  v1::DeliverBytesRequest part;
  if (!reader->Read(&part) || !part.has_header()) {
    return absl::InvalidArgumentError("the first message has no header");
  }
  const v1::DeliverBytesRequest::Header header = part.header();
  if (header.group_id().empty() || header.group_id().size() > kMaxGroupIdBytes) {
    return absl::InvalidArgumentError(absl::StrCat("group_id has ", header.group_id().size(),
                                                   " bytes, must have 1 to ", kMaxGroupIdBytes));
  }
  const DeliveryName name{call.tenant.name, header.group_id(), header.from_rank(), header.to_rank(),
                          header.number()};
  if (ProveDelivery(name, header.num_bytes(), call.tenant.salt).view() != header.proof()) {
    return WithReason(
        absl::PermissionDeniedError("deliver bytes: the proof is not of a worker of this "
                                    "deployment, for this tenant"),
        "NOT_PROVEN");
  }
  PT_ASSIGN_OR_RETURN(const auto delivery,
                      mailbox_->Deliver(name, header.num_bytes(), call.deadline));
  Counter* const received = worker_->metrics().GetCounter(
      "pagetide_group_received_bytes_total", "Bytes that came from other members of groups");
  while (reader->Read(&part)) {
    if (part.has_header()) return absl::InvalidArgumentError("a second header in the stream");
    if (!part.checksum().empty()) {
      PT_ASSIGN_OR_RETURN(const Checksum128 checksum,
                          ChecksumFromBytes("checksum", part.checksum()));
      return delivery->Finish(checksum);
    }
    if (part.data().size() > kMaxTransferPartBytes) {
      return absl::InvalidArgumentError(absl::StrCat(
          "data has ", part.data().size(), " bytes, a part at most ", kMaxTransferPartBytes));
    }
    PT_RETURN_IF_ERROR(
        delivery->Write(std::as_bytes(std::span(part.data().data(), part.data().size()))));
    received->Add(static_cast<double>(part.data().size()));
  }
  return absl::CancelledError("deliver bytes: the stream ended before its checksum");
}

grpc::Status TransferServiceImpl::DeliverBytes(grpc::ServerContext* context,
                                               grpc::ServerReader<v1::DeliverBytesRequest>* reader,
                                               v1::DeliverBytesResponse*) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const StreamDeadlines::Watch watch(deadlines_, context, call.end, "deliver bytes");
  const absl::Status status = Deliver(call, reader);
  worker_->metrics()
      .GetCounter("pagetide_group_deliveries_total",
                  "Deliveries from other members of groups, by the code of the answer",
                  {{"code", absl::StatusCodeToString(status.code())}})
      ->Increment();
  return ToGrpcStatus(status);
}

}  // namespace pagetide
