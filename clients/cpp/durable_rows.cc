// What outlives a sequence: its parked state, and what the store keeps of its rows.
#include <utility>

#include "base/status_macros.h"
#include "clients/cpp/client.h"
#include "clients/cpp/request_id.h"
#include "rpc/duration_proto.h"

namespace pagetide {
namespace {

using Edits = v1::SequenceEditService::StubInterface;

}  // namespace

absl::StatusOr<v1::SetRangeRetentionResponse> Sequence::SetRetention(
    std::span<const RetentionOptions> ranges) {
  v1::SetRangeRetentionRequest request;
  request.set_request_id(NewRequestId());
  *request.mutable_sequence() = Ref();
  for (const RetentionOptions& range : ranges) {
    v1::RangeRetention* const proto = request.add_ranges();
    proto->set_begin(range.begin);
    if (range.end) proto->set_end(*range.end);
    if (range.priority) proto->set_priority(*range.priority);
    if (range.ttl) *proto->mutable_ttl() = DurationToProto(*range.ttl);
  }
  return CallUnary(worker_->call_options(), worker_->edits(), &Edits::SetRetention, request);
}

absl::StatusOr<v1::PinRangeResponse> Sequence::Pin(absl::string_view name,
                                                   const PinOptions& options) {
  v1::PinRangeRequest request;
  request.set_request_id(NewRequestId());
  *request.mutable_sequence() = Ref();
  request.set_name(std::string(name));
  request.set_begin(options.begin);
  if (options.end) request.set_end(*options.end);
  if (options.ttl) *request.mutable_ttl() = DurationToProto(*options.ttl);
  return CallUnary(worker_->call_options(), worker_->edits(), &Edits::PinRange, request);
}

absl::StatusOr<v1::ParkSequenceResponse> Sequence::Park(bool keep_open) {
  v1::ParkSequenceRequest request;
  request.set_request_id(NewRequestId());
  *request.mutable_sequence() = Ref();
  request.set_keep_open(keep_open);
  PT_ASSIGN_OR_RETURN(v1::ParkSequenceResponse response,
                      CallUnary(worker_->call_options(), worker_->sequences(),
                                &v1::SequenceService::StubInterface::ParkSequence, request));
  state_.set_epoch(response.epoch());
  // Not ours to close any more.
  if (!response.is_open()) is_closed_ = true;
  return response;
}

absl::StatusOr<std::unique_ptr<Sequence>> Client::Resume(std::shared_ptr<const Model> model,
                                                         absl::string_view sequence_id) {
  PT_ASSIGN_OR_RETURN(std::shared_ptr<WorkerConnection> worker, AnyWorker());
  v1::ResumeSequenceRequest request;
  request.set_request_id(NewRequestId());
  request.set_sequence_id(std::string(sequence_id));
  request.set_model_digest(model->digest().ToHex());
  PT_ASSIGN_OR_RETURN(v1::ResumeSequenceResponse response,
                      CallUnary(worker->call_options(), worker->sequences(),
                                &v1::SequenceService::StubInterface::ResumeSequence, request));
  std::unique_ptr<Sequence> sequence(
      new Sequence(std::move(worker), std::move(model), std::move(*response.mutable_state())));
  sequence->restoring_pages_ = response.restoring_pages();
  return sequence;
}

absl::Status Client::Unpin(absl::string_view name) {
  PT_ASSIGN_OR_RETURN(const std::shared_ptr<WorkerConnection> worker, AnyWorker());
  v1::UnpinRangeRequest request;
  request.set_name(std::string(name));
  // A repeat after a lost answer ends a pin that was made under the name meanwhile.
  return CallUnary<RetryNothing>(worker->call_options(), worker->edits(), &Edits::UnpinRange,
                                 request)
      .status();
}

absl::StatusOr<std::vector<v1::PinInfo>> Client::ListPins(absl::string_view prefix) {
  PT_ASSIGN_OR_RETURN(const std::shared_ptr<WorkerConnection> worker, AnyWorker());
  v1::ListPinsRequest request;
  request.set_name_prefix(std::string(prefix));
  request.set_page_size(1000);
  std::vector<v1::PinInfo> pins;
  do {
    PT_ASSIGN_OR_RETURN(
        const v1::ListPinsResponse response,
        CallUnary(worker->call_options(), worker->edits(), &Edits::ListPins, request));
    pins.insert(pins.end(), response.pins().begin(), response.pins().end());
    request.set_page_token(response.next_page_token());
  } while (!request.page_token().empty());
  return pins;
}

}  // namespace pagetide
