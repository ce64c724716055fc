// Edits of a sequence (SequenceEditService).
#include <utility>

#include "base/status_macros.h"
#include "clients/cpp/request_id.h"
#include "clients/cpp/sequence.h"
#include "pagetide/v1/sequence_edit.pb.h"

namespace pagetide {
namespace {

using Edits = v1::SequenceEditService::StubInterface;

}  // namespace

absl::StatusOr<v1::EditSequenceResponse> Sequence::Edit(std::span<const v1::SequenceEdit> edits) {
  v1::EditSequenceRequest request;
  request.set_request_id(NewRequestId());
  *request.mutable_sequence() = Ref();
  request.mutable_edits()->Add(edits.begin(), edits.end());
  PT_ASSIGN_OR_RETURN(
      v1::EditSequenceResponse response,
      CallUnary(worker_->call_options(), worker_->edits(), &Edits::EditSequence, request));
  state_ = response.state();
  return response;
}

absl::StatusOr<v1::EditSequenceResponse> Sequence::RemoveRange(int64_t p0, int64_t p1) {
  v1::SequenceEdit edit;
  edit.mutable_remove_range()->set_p0(p0);
  edit.mutable_remove_range()->set_p1(p1);
  return Edit({&edit, 1});
}

absl::StatusOr<v1::EditSequenceResponse> Sequence::CopyRange(const Sequence& from, int64_t p0,
                                                             int64_t p1) {
  v1::SequenceEdit edit;
  *edit.mutable_copy_range()->mutable_from() = from.Ref();
  edit.mutable_copy_range()->set_p0(p0);
  edit.mutable_copy_range()->set_p1(p1);
  return Edit({&edit, 1});
}

absl::StatusOr<v1::EditSequenceResponse> Sequence::ShiftPositions(int64_t p0, int64_t p1,
                                                                  int64_t delta) {
  v1::SequenceEdit edit;
  edit.mutable_shift_positions()->set_p0(p0);
  edit.mutable_shift_positions()->set_p1(p1);
  edit.mutable_shift_positions()->set_delta(delta);
  return Edit({&edit, 1});
}

absl::StatusOr<v1::EditSequenceResponse> Sequence::DividePositions(int64_t p0, int64_t p1,
                                                                   int64_t divisor) {
  v1::SequenceEdit edit;
  edit.mutable_divide_positions()->set_p0(p0);
  edit.mutable_divide_positions()->set_p1(p1);
  edit.mutable_divide_positions()->set_divisor(divisor);
  return Edit({&edit, 1});
}

absl::StatusOr<v1::EditSequenceResponse> Sequence::ShiftWindow(int64_t keep, int64_t discard) {
  v1::SequenceEdit edit;
  edit.mutable_shift_window()->set_keep(keep);
  edit.mutable_shift_window()->set_discard(discard);
  return Edit({&edit, 1});
}

absl::Status Sequence::Rewind(int64_t length) {
  v1::SequenceEdit edit;
  edit.mutable_rewind()->set_length(length);
  return Edit({&edit, 1}).status();
}

absl::Status Sequence::Clear(bool zero_data) {
  v1::ClearSequenceRequest request;
  request.set_request_id(NewRequestId());
  *request.mutable_sequence() = Ref();
  request.set_zero_data(zero_data);
  PT_ASSIGN_OR_RETURN(
      v1::ClearSequenceResponse response,
      CallUnary(worker_->call_options(), worker_->edits(), &Edits::ClearSequence, request));
  state_ = std::move(*response.mutable_state());
  return absl::OkStatus();
}

absl::StatusOr<v1::GetPositionExtentResponse> Sequence::PositionExtent() {
  v1::GetPositionExtentRequest request;
  request.set_sequence_id(state_.sequence_id());
  return CallUnary(worker_->call_options(), worker_->edits(), &Edits::GetPositionExtent, request);
}

absl::Status Sequence::Reorder(std::span<Sequence* const> sequences,
                               std::span<const uint32_t> order, bool allow_repeats) {
  if (sequences.empty()) return absl::InvalidArgumentError("reorder: no sequences");
  v1::ReorderSequencesRequest request;
  request.set_request_id(NewRequestId());
  for (const Sequence* sequence : sequences) *request.add_sequences() = sequence->Ref();
  request.mutable_order()->Add(order.begin(), order.end());
  request.set_allow_repeats(allow_repeats);
  const WorkerConnection& worker = *sequences.front()->worker_;
  PT_ASSIGN_OR_RETURN(
      v1::ReorderSequencesResponse response,
      CallUnary(worker.call_options(), worker.edits(), &Edits::ReorderSequences, request));
  for (size_t i = 0; i < sequences.size(); ++i) {
    sequences[i]->state_ = std::move(*response.mutable_states(static_cast<int>(i)));
  }
  return absl::OkStatus();
}

}  // namespace pagetide
