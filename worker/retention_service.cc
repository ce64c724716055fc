// The calls of SequenceEditService that say how long rows are kept in the store.
#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "rpc/status_mapping.h"
#include "worker/sequence_edit_service.h"
#include "worker/service_support.h"

namespace pagetide {
namespace {

// Of either message that names tokens [begin, end).
template <typename Range>
TokenRange RangeFromProto(const Range& proto) {
  TokenRange range{.begin = proto.begin()};
  if (proto.has_end()) range.end = proto.end();
  return range;
}

template <typename Timed>
absl::StatusOr<std::optional<absl::Duration>> TtlFromProto(absl::string_view field,
                                                           const Timed& proto) {
  if (!proto.has_ttl()) return std::nullopt;
  PT_ASSIGN_OR_RETURN(const absl::Duration ttl, DurationFromProto(field, proto.ttl()));
  return ttl;
}

absl::StatusOr<std::vector<RangeRetention>> RangesFromProto(
    const v1::SetRangeRetentionRequest& request) {
  std::vector<RangeRetention> ranges;
  for (const v1::RangeRetention& proto : request.ranges()) {
    RangeRetention range{.range = RangeFromProto(proto)};
    if (proto.has_priority()) range.priority = proto.priority();
    PT_ASSIGN_OR_RETURN(range.ttl,
                        TtlFromProto(absl::StrCat("ranges[", ranges.size(), "].ttl"), proto));
    ranges.push_back(range);
  }
  return ranges;
}

v1::PinInfo ToProto(const Pin& pin) {
  v1::PinInfo proto;
  proto.set_name(pin.name);
  proto.set_begin(pin.summary.begin);
  proto.set_end(pin.summary.end);
  proto.set_pages(pin.num_pages);
  proto.set_bytes(pin.summary.bytes);
  proto.set_model_digest(pin.summary.model_digest.ToHex());
  *proto.mutable_pinned_at() = TimestampToProto(pin.pinned_at);
  if (pin.expires_at) *proto.mutable_expires_at() = TimestampToProto(*pin.expires_at);
  return proto;
}

v1::PinRangeResponse AnswerOf(const Pin& pin) {
  v1::PinRangeResponse proto;
  *proto.mutable_pin() = ToProto(pin);
  proto.set_pages_written(pin.summary.pages_written);
  proto.set_bytes_written(pin.summary.bytes_written);
  return proto;
}

}  // namespace

grpc::Status SequenceEditServiceImpl::SetRetention(grpc::ServerContext* context,
                                                   const v1::SetRangeRetentionRequest* request,
                                                   v1::SetRangeRetentionResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto set = [&]() -> absl::StatusOr<v1::SetRangeRetentionResponse> {
    PT_ASSIGN_OR_RETURN(const std::vector<RangeRetention> ranges, RangesFromProto(*request));
    PT_ASSIGN_OR_RETURN(const HandleTarget target, FindSequence(*worker_, request->sequence()));
    PT_ASSIGN_OR_RETURN(
        const RetentionAnswer result,
        retentions_->Set(call.tenant, target.host, target.handle, ranges, call.deadline));
    v1::SetRangeRetentionResponse answer;
    answer.set_pages(result.pages);
    answer.set_pages_written(result.pages_written);
    answer.set_bytes_written(result.bytes_written);
    return answer;
  };
  auto answer = memos_->OncePerSequence<v1::SetRangeRetentionResponse>(
      call.tenant.name, request->sequence().sequence_id(), request->request_id(),
      DigestOfMessage(*request), call.deadline, set);
  if (!answer.ok()) return ToGrpcStatus(answer.status());
  *response = *std::move(answer);
  return grpc::Status::OK;
}

absl::StatusOr<v1::PinRangeResponse> SequenceEditServiceImpl::MakePin(
    const CallContext& call, const v1::PinRangeRequest& request) {
  PinRequest pin;
  pin.name = request.name();
  pin.range = RangeFromProto(request);
  PT_ASSIGN_OR_RETURN(pin.ttl, TtlFromProto("ttl", request));
  pin.request_id = request.request_id();
  pin.request_digest = DigestOfMessage(request);
  // Before the sequence is looked for: a retry may come to another worker than the first call.
  PT_ASSIGN_OR_RETURN(const std::optional<Pin> first,
                      retentions_->FindAnswer(call.tenant, pin, call.deadline));
  if (first) return AnswerOf(*first);
  PT_ASSIGN_OR_RETURN(const HandleTarget target, FindSequence(*worker_, request.sequence()));
  pin.sequence = target.handle;
  PT_ASSIGN_OR_RETURN(const Pin made,
                      retentions_->PinRange(call.tenant, target.host, pin, call.deadline));
  return AnswerOf(made);
}

grpc::Status SequenceEditServiceImpl::PinRange(grpc::ServerContext* context,
                                               const v1::PinRangeRequest* request,
                                               v1::PinRangeResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  auto answer = memos_->OncePerTenant<v1::PinRangeResponse>(
      call.tenant.name, request->request_id(), DigestOfMessage(*request), call.deadline,
      [&] { return MakePin(call, *request); });
  if (!answer.ok()) return ToGrpcStatus(answer.status());
  *response = *std::move(answer);
  return grpc::Status::OK;
}

grpc::Status SequenceEditServiceImpl::UnpinRange(grpc::ServerContext* context,
                                                 const v1::UnpinRangeRequest* request,
                                                 v1::UnpinRangeResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  return ToGrpcStatus(retentions_->Unpin(call.tenant, request->name(), call.deadline));
}

grpc::Status SequenceEditServiceImpl::ListPins(grpc::ServerContext* context,
                                               const v1::ListPinsRequest* request,
                                               v1::ListPinsResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto list = [&]() -> absl::Status {
    PT_ASSIGN_OR_RETURN(const uint32_t limit,
                        ListSize(request->page_size(), kDefaultListSize, kMaxListSize));
    PT_RETURN_IF_ERROR(ValidateNamePrefix(request->name_prefix()));
    if (!request->page_token().empty()) {
      PT_RETURN_IF_ERROR(ValidateName("page_token", request->page_token()));
    }
    PT_ASSIGN_OR_RETURN(std::vector<Pin> pins,
                        retentions_->List(call.tenant, request->name_prefix(),
                                          request->page_token(), limit + 1, call.deadline));
    if (pins.size() > limit) {
      pins.resize(limit);
      response->set_next_page_token(pins.back().name);
    }
    for (const Pin& pin : pins) *response->add_pins() = ToProto(pin);
    return absl::OkStatus();
  };
  return ToGrpcStatus(list());
}

}  // namespace pagetide
