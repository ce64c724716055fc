// The calls of SequenceService that let go of a sequence and take it up again.
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "rpc/status_mapping.h"
#include "worker/sequence_service.h"
#include "worker/service_support.h"

namespace pagetide {
namespace {

v1::ParkSequenceResponse ToProto(SequenceId id, const ParkAnswer& answer) {
  v1::ParkSequenceResponse proto;
  proto.set_sequence_id(id.ToString());
  proto.set_epoch(answer.epoch);
  proto.set_version(answer.version);
  proto.set_is_open(answer.is_open);
  proto.set_tokens(answer.tokens);
  proto.set_pages(answer.pages);
  proto.set_pages_written(answer.pages_written);
  proto.set_bytes_written(answer.bytes_written);
  proto.set_bytes_total(answer.bytes_total);
  return proto;
}

}  // namespace

absl::StatusOr<v1::ParkSequenceResponse> SequenceServiceImpl::Park(
    const CallContext& call, const v1::ParkSequenceRequest& request) {
  ParkRequest park;
  park.keep_open = request.keep_open();
  if (request.has_ttl()) {
    PT_ASSIGN_OR_RETURN(park.ttl, DurationFromProto("ttl", request.ttl()));
  }
  park.request_id = request.request_id();
  park.request_digest = DigestOfMessage(request);
  PT_ASSIGN_OR_RETURN(const SequenceId id, SequenceIdFromProto(request.sequence().sequence_id()));
  // Before the sequence is looked for: after a lost answer it is open nowhere.
  PT_ASSIGN_OR_RETURN(const std::optional<ParkAnswer> first,
                      parking_->FindAnswer(call.tenant, id, park, call.deadline));
  if (first) return ToProto(id, *first);
  PT_ASSIGN_OR_RETURN(const HandleTarget target, FindSequence(*worker_, request.sequence()));
  park.sequence = target.handle;
  PT_ASSIGN_OR_RETURN(const ParkAnswer answer,
                      parking_->Park(call.tenant, target.host, park, call.deadline));
  if (!answer.is_open) memos_->ForgetSequence(call.tenant.name, request.sequence().sequence_id());
  return ToProto(id, answer);
}

grpc::Status SequenceServiceImpl::ParkSequence(grpc::ServerContext* context,
                                               const v1::ParkSequenceRequest* request,
                                               v1::ParkSequenceResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  auto answer = memos_->OncePerTenant<v1::ParkSequenceResponse>(
      call.tenant.name, request->request_id(), DigestOfMessage(*request), call.deadline,
      [&] { return Park(call, *request); });
  if (!answer.ok()) return ToGrpcStatus(answer.status());
  *response = *std::move(answer);
  return grpc::Status::OK;
}

absl::StatusOr<v1::ResumeSequenceResponse> SequenceServiceImpl::Resume(
    const CallContext& call, const v1::ResumeSequenceRequest& request) {
  PT_ASSIGN_OR_RETURN(const SequenceId id, SequenceIdFromProto(request.sequence_id()));
  PT_ASSIGN_OR_RETURN(const ResumedSequence resumed,
                      parking_->Resume(call.tenant, id, request.model_digest(), call.deadline));
  worker_->NoteResumed(*resumed.host, resumed.info);
  v1::ResumeSequenceResponse answer;
  *answer.mutable_state() = StateToProto(*worker_, *resumed.host, resumed.info);
  answer.set_restoring_pages(resumed.restoring_pages);
  answer.set_parked_version(resumed.parked_version);
  answer.set_was_taken_over(resumed.was_taken_over);
  return answer;
}

grpc::Status SequenceServiceImpl::ResumeSequence(grpc::ServerContext* context,
                                                 const v1::ResumeSequenceRequest* request,
                                                 v1::ResumeSequenceResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  auto answer = memos_->OncePerTenant<v1::ResumeSequenceResponse>(
      call.tenant.name, request->request_id(), DigestOfMessage(*request), call.deadline,
      [&] { return Resume(call, *request); });
  if (!answer.ok()) return ToGrpcStatus(answer.status());
  *response = *std::move(answer);
  return grpc::Status::OK;
}

}  // namespace pagetide
