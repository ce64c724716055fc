#include "worker/sequence_edit_service.h"

#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "rpc/status_mapping.h"
#include "worker/service_support.h"

namespace pagetide {
namespace {

constexpr int kMaxSequences = 4096;
constexpr int kMaxEdits = 256;
constexpr uint64_t kCompactRows = 4096;

absl::StatusOr<OnShared> OnSharedFromProto(int on_shared) {
  switch (on_shared) {
    case v1::ON_SHARED_UNSPECIFIED:
    case v1::ON_SHARED_COPY_ON_WRITE:
      return OnShared::kCopy;
    case v1::ON_SHARED_MOVE_ALL:
      return OnShared::kMoveAll;
    case v1::ON_SHARED_REJECT:
      return OnShared::kReject;
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("on_shared is ", on_shared, ", must be a value of OnShared"));
  }
}

// Of a ShiftWindowRequest or a SequenceEdit.ShiftWindow.
template <typename Proto>
WindowShift WindowFromProto(const Proto& proto) {
  WindowShift window{.keep = proto.keep()};
  if (proto.amount_case() == Proto::kDiscard) window.discard = proto.discard();
  if (proto.amount_case() == Proto::kFraction) window.fraction = proto.fraction();
  return window;
}

// Sequences that one call names: all of one host.
struct EditTarget {
  ModelHost* host = nullptr;
  std::vector<SequenceHandle> handles;
  uint64_t number(size_t i) const { return host->NumberOf(handles[i].id); }
};

absl::Status AddSequence(const Worker& worker, absl::string_view field, const v1::SequenceRef& ref,
                         EditTarget& target) {
  PT_ASSIGN_OR_RETURN(const HandleTarget found, FindSequence(worker, ref));
  if (target.host != nullptr && target.host != found.host) {
    return absl::InvalidArgumentError(absl::StrCat(
        field, " is of model ", found.host->model().digest().ToShortHex(), ", the others of ",
        target.host->model().digest().ToShortHex(), ": one call edits sequences of one model"));
  }
  target.host = found.host;
  target.handles.push_back(found.handle);
  return absl::OkStatus();
}

absl::StatusOr<EditTarget> TargetOf(const Worker& worker, const v1::SequenceRef& ref) {
  EditTarget target;
  PT_RETURN_IF_ERROR(AddSequence(worker, "sequence", ref, target));
  return target;
}

absl::StatusOr<EditTarget> TargetOf(
    const Worker& worker, const google::protobuf::RepeatedPtrField<v1::SequenceRef>& refs) {
  if (refs.empty() || refs.size() > kMaxSequences) {
    return absl::InvalidArgumentError(
        absl::StrCat("sequences has ", refs.size(), " entries, must have 1 to ", kMaxSequences));
  }
  EditTarget target;
  for (int i = 0; i < refs.size(); ++i) {
    PT_RETURN_IF_ERROR(AddSequence(worker, absl::StrCat("sequences[", i, "]"), refs[i], target));
  }
  return target;
}

absl::StatusOr<SequenceEdit> EditFromProto(const Worker& worker, const v1::SequenceEdit& proto,
                                           EditTarget& target) {
  const uint64_t self = target.number(0);
  switch (proto.edit_case()) {
    case v1::SequenceEdit::kRemoveRange:
      return RemoveRangeEdit{self, {proto.remove_range().p0(), proto.remove_range().p1()}};
    case v1::SequenceEdit::kCopyRange: {
      const auto& copy = proto.copy_range();
      PT_RETURN_IF_ERROR(AddSequence(worker, "copy_range.from", copy.from(), target));
      return CopyRangeEdit{target.number(target.handles.size() - 1),
                           self,
                           {copy.p0(), copy.p1()},
                           copy.allow_overlap()};
    }
    case v1::SequenceEdit::kShiftPositions: {
      const auto& shift = proto.shift_positions();
      PT_ASSIGN_OR_RETURN(const OnShared on_shared, OnSharedFromProto(shift.on_shared()));
      return ShiftPositionsEdit{
          self, {shift.p0(), shift.p1()}, shift.delta(), on_shared, shift.allow_overlap()};
    }
    case v1::SequenceEdit::kDividePositions: {
      const auto& divide = proto.divide_positions();
      return DividePositionsEdit{
          self, {divide.p0(), divide.p1()}, divide.divisor(), divide.allow_overlap()};
    }
    case v1::SequenceEdit::kShiftWindow:
      return ShiftWindowEdit{self, WindowFromProto(proto.shift_window())};
    case v1::SequenceEdit::kRewind:
      return RewindEdit{self, proto.rewind().length()};
    case v1::SequenceEdit::EDIT_NOT_SET:
      break;
  }
  return absl::InvalidArgumentError("no edit is set");
}

// Tells the worker what became of the sequences.
void Note(Worker& worker, const EditTarget& target, const EditResult& result) {
  for (const SequenceInfo& info : result.infos) worker.NoteSequence(*target.host, info);
  for (const SequenceInfo& info : result.others) worker.NoteSequence(*target.host, info);
}

// Makes the edit, tells the worker, and returns what it did.
absl::StatusOr<EditResult> EditOne(Worker& worker, const CallContext& call,
                                   const EditTarget& target, const SequenceEdit& edit) {
  PT_ASSIGN_OR_RETURN(EditResult result,
                      target.host->Edit(call.tenant, target.handles, {&edit, 1}));
  Note(worker, target, result);
  return result;
}

template <typename Response>
void SetPages(const EditResult& result, Response& response) {
  response.set_freed_pages(result.freed_pages);
  response.set_cached_pages(result.cached_pages);
}

// Once a request_id of the sequence; the answer goes to `response`.
template <typename Request, typename Response>
grpc::Status Once(RequestMemos& memos, const CallContext& call, absl::string_view sequence_id,
                  const Request& request, Response* response,
                  absl::FunctionRef<absl::StatusOr<Response>()> make) {
  absl::StatusOr<Response> answer =
      memos.OncePerSequence<Response>(call.tenant.name, sequence_id, request.request_id(),
                                      DigestOfMessage(request), call.deadline, make);
  if (!answer.ok()) return ToGrpcStatus(answer.status());
  *response = *std::move(answer);
  return grpc::Status::OK;
}

}  // namespace

grpc::Status SequenceEditServiceImpl::RemoveRange(grpc::ServerContext* context,
                                                  const v1::RemoveRangeRequest* request,
                                                  v1::RemoveRangeResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  return Once<v1::RemoveRangeRequest, v1::RemoveRangeResponse>(
      *memos_, call, request->sequence().sequence_id(), *request, response,
      [&]() -> absl::StatusOr<v1::RemoveRangeResponse> {
        PT_ASSIGN_OR_RETURN(const EditTarget target, TargetOf(*worker_, request->sequence()));
        PT_ASSIGN_OR_RETURN(
            const EditResult result,
            EditOne(*worker_, call, target,
                    RemoveRangeEdit{target.number(0), {request->p0(), request->p1()}}));
        v1::RemoveRangeResponse answer;
        *answer.mutable_state() = StateToProto(*worker_, *target.host, result.infos[0]);
        answer.set_removed_rows(result.outcome.removed_rows);
        SetPages(result, answer);
        return answer;
      });
}

grpc::Status SequenceEditServiceImpl::CopyRange(grpc::ServerContext* context,
                                                const v1::CopyRangeRequest* request,
                                                v1::CopyRangeResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  return Once<v1::CopyRangeRequest, v1::CopyRangeResponse>(
      *memos_, call, request->to().sequence_id(), *request, response,
      [&]() -> absl::StatusOr<v1::CopyRangeResponse> {
        EditTarget target;
        PT_RETURN_IF_ERROR(AddSequence(*worker_, "from", request->from(), target));
        PT_RETURN_IF_ERROR(AddSequence(*worker_, "to", request->to(), target));
        PT_ASSIGN_OR_RETURN(const EditResult result,
                            EditOne(*worker_, call, target,
                                    CopyRangeEdit{target.number(0),
                                                  target.number(1),
                                                  {request->p0(), request->p1()},
                                                  request->allow_overlap()}));
        v1::CopyRangeResponse answer;
        *answer.mutable_from() = StateToProto(*worker_, *target.host, result.infos[0]);
        *answer.mutable_to() = StateToProto(*worker_, *target.host, result.infos[1]);
        answer.set_copied_rows(result.outcome.copied_rows);
        return answer;
      });
}

grpc::Status SequenceEditServiceImpl::KeepOnly(grpc::ServerContext* context,
                                               const v1::KeepOnlyRequest* request,
                                               v1::KeepOnlyResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto keep = [&]() -> absl::StatusOr<v1::KeepOnlyResponse> {
    PT_ASSIGN_OR_RETURN(const EditTarget target, TargetOf(*worker_, request->sequences()));
    KeepOnlyEdit edit;
    for (size_t i = 0; i < target.handles.size(); ++i) edit.sequences.push_back(target.number(i));
    PT_ASSIGN_OR_RETURN(const EditResult result, EditOne(*worker_, call, target, edit));
    v1::KeepOnlyResponse answer;
    answer.set_cleared_sequences(result.outcome.others_changed);
    answer.set_removed_rows(result.outcome.removed_rows);
    SetPages(result, answer);
    return answer;
  };
  absl::StatusOr<v1::KeepOnlyResponse> answer = memos_->OncePerTenant<v1::KeepOnlyResponse>(
      call.tenant.name, request->request_id(), DigestOfMessage(*request), call.deadline, keep);
  if (!answer.ok()) return ToGrpcStatus(answer.status());
  *response = *std::move(answer);
  return grpc::Status::OK;
}

grpc::Status SequenceEditServiceImpl::ShiftPositions(grpc::ServerContext* context,
                                                     const v1::ShiftPositionsRequest* request,
                                                     v1::ShiftPositionsResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  return Once<v1::ShiftPositionsRequest, v1::ShiftPositionsResponse>(
      *memos_, call, request->sequence().sequence_id(), *request, response,
      [&]() -> absl::StatusOr<v1::ShiftPositionsResponse> {
        PT_ASSIGN_OR_RETURN(const EditTarget target, TargetOf(*worker_, request->sequence()));
        PT_ASSIGN_OR_RETURN(const OnShared on_shared, OnSharedFromProto(request->on_shared()));
        PT_ASSIGN_OR_RETURN(const EditResult result,
                            EditOne(*worker_, call, target,
                                    ShiftPositionsEdit{target.number(0),
                                                       {request->p0(), request->p1()},
                                                       request->delta(),
                                                       on_shared,
                                                       request->allow_overlap()}));
        v1::ShiftPositionsResponse answer;
        *answer.mutable_state() = StateToProto(*worker_, *target.host, result.infos[0]);
        answer.set_moved_rows(result.outcome.moved_rows);
        answer.set_removed_rows(result.outcome.removed_rows);
        answer.set_changed_sequences(result.outcome.others_changed);
        SetPages(result, answer);
        return answer;
      });
}

grpc::Status SequenceEditServiceImpl::DividePositions(grpc::ServerContext* context,
                                                      const v1::DividePositionsRequest* request,
                                                      v1::DividePositionsResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  return Once<v1::DividePositionsRequest, v1::DividePositionsResponse>(
      *memos_, call, request->sequence().sequence_id(), *request, response,
      [&]() -> absl::StatusOr<v1::DividePositionsResponse> {
        PT_ASSIGN_OR_RETURN(const EditTarget target, TargetOf(*worker_, request->sequence()));
        PT_ASSIGN_OR_RETURN(const EditResult result,
                            EditOne(*worker_, call, target,
                                    DividePositionsEdit{target.number(0),
                                                        {request->p0(), request->p1()},
                                                        request->divisor(),
                                                        request->allow_overlap()}));
        v1::DividePositionsResponse answer;
        *answer.mutable_state() = StateToProto(*worker_, *target.host, result.infos[0]);
        answer.set_moved_rows(result.outcome.moved_rows);
        return answer;
      });
}

grpc::Status SequenceEditServiceImpl::ShiftWindow(grpc::ServerContext* context,
                                                  const v1::ShiftWindowRequest* request,
                                                  v1::ShiftWindowResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  return Once<v1::ShiftWindowRequest, v1::ShiftWindowResponse>(
      *memos_, call, request->sequence().sequence_id(), *request, response,
      [&]() -> absl::StatusOr<v1::ShiftWindowResponse> {
        PT_ASSIGN_OR_RETURN(const EditTarget target, TargetOf(*worker_, request->sequence()));
        PT_ASSIGN_OR_RETURN(const EditResult result,
                            EditOne(*worker_, call, target,
                                    ShiftWindowEdit{target.number(0), WindowFromProto(*request)}));
        v1::ShiftWindowResponse answer;
        *answer.mutable_state() = StateToProto(*worker_, *target.host, result.infos[0]);
        answer.set_removed_rows(result.outcome.removed_rows);
        answer.set_moved_rows(result.outcome.moved_rows);
        SetPages(result, answer);
        return answer;
      });
}

grpc::Status SequenceEditServiceImpl::Rewind(grpc::ServerContext* context,
                                             const v1::RewindRequest* request,
                                             v1::RewindResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  return Once<v1::RewindRequest, v1::RewindResponse>(
      *memos_, call, request->sequence().sequence_id(), *request, response,
      [&]() -> absl::StatusOr<v1::RewindResponse> {
        PT_ASSIGN_OR_RETURN(const EditTarget target, TargetOf(*worker_, request->sequence()));
        PT_ASSIGN_OR_RETURN(
            const EditResult result,
            EditOne(*worker_, call, target, RewindEdit{target.number(0), request->length()}));
        v1::RewindResponse answer;
        *answer.mutable_state() = StateToProto(*worker_, *target.host, result.infos[0]);
        answer.set_removed_tokens(result.outcome.removed_rows);
        SetPages(result, answer);
        return answer;
      });
}

grpc::Status SequenceEditServiceImpl::ReorderSequences(grpc::ServerContext* context,
                                                       const v1::ReorderSequencesRequest* request,
                                                       v1::ReorderSequencesResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto reorder = [&]() -> absl::StatusOr<v1::ReorderSequencesResponse> {
    PT_ASSIGN_OR_RETURN(const EditTarget target, TargetOf(*worker_, request->sequences()));
    ReorderEdit edit;
    for (size_t i = 0; i < target.handles.size(); ++i) edit.sequences.push_back(target.number(i));
    edit.order.assign(request->order().begin(), request->order().end());
    edit.allow_repeats = request->allow_repeats();
    PT_ASSIGN_OR_RETURN(const EditResult result, EditOne(*worker_, call, target, edit));
    v1::ReorderSequencesResponse answer;
    for (const SequenceInfo& info : result.infos) {
      *answer.add_states() = StateToProto(*worker_, *target.host, info);
    }
    answer.set_changed_sequences(result.outcome.others_changed);
    SetPages(result, answer);
    return answer;
  };
  absl::StatusOr<v1::ReorderSequencesResponse> answer =
      memos_->OncePerTenant<v1::ReorderSequencesResponse>(call.tenant.name, request->request_id(),
                                                          DigestOfMessage(*request), call.deadline,
                                                          reorder);
  if (!answer.ok()) return ToGrpcStatus(answer.status());
  *response = *std::move(answer);
  return grpc::Status::OK;
}

grpc::Status SequenceEditServiceImpl::EditSequence(grpc::ServerContext* context,
                                                   const v1::EditSequenceRequest* request,
                                                   v1::EditSequenceResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  return Once<v1::EditSequenceRequest, v1::EditSequenceResponse>(
      *memos_, call, request->sequence().sequence_id(), *request, response,
      [&]() -> absl::StatusOr<v1::EditSequenceResponse> {
        if (request->edits_size() < 1 || request->edits_size() > kMaxEdits) {
          return absl::InvalidArgumentError(absl::StrCat("edits has ", request->edits_size(),
                                                         " entries, must have 1 to ", kMaxEdits));
        }
        PT_ASSIGN_OR_RETURN(EditTarget target, TargetOf(*worker_, request->sequence()));
        std::vector<SequenceEdit> edits;
        for (int i = 0; i < request->edits_size(); ++i) {
          absl::StatusOr<SequenceEdit> edit = EditFromProto(*worker_, request->edits(i), target);
          if (absl::IsInvalidArgument(edit.status())) {
            return absl::InvalidArgumentError(
                absl::StrCat("edits[", i, "]: ", edit.status().message()));
          }
          PT_RETURN_IF_ERROR(edit.status());
          edits.push_back(*std::move(edit));
        }
        PT_ASSIGN_OR_RETURN(const EditResult result,
                            target.host->Edit(call.tenant, target.handles, edits));
        Note(*worker_, target, result);
        v1::EditSequenceResponse answer;
        *answer.mutable_state() = StateToProto(*worker_, *target.host, result.infos[0]);
        answer.set_removed_rows(result.outcome.removed_rows);
        answer.set_moved_rows(result.outcome.moved_rows);
        answer.set_copied_rows(result.outcome.copied_rows);
        answer.set_changed_sequences(result.outcome.others_changed);
        SetPages(result, answer);
        return answer;
      });
}

grpc::Status SequenceEditServiceImpl::Compact(grpc::ServerContext* context,
                                              const v1::CompactSequenceRequest* request,
                                              v1::CompactSequenceResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  return Once<v1::CompactSequenceRequest, v1::CompactSequenceResponse>(
      *memos_, call, request->sequence().sequence_id(), *request, response,
      [&]() -> absl::StatusOr<v1::CompactSequenceResponse> {
        PT_ASSIGN_OR_RETURN(const EditTarget target, TargetOf(*worker_, request->sequence()));
        const uint64_t max_rows = request->max_rows() == 0 ? kCompactRows : request->max_rows();
        PT_ASSIGN_OR_RETURN(const CompactResult result,
                            target.host->Compact(call.tenant, target.handles[0], max_rows,
                                                 request->apply_shifts(), call.deadline));
        worker_->NoteSequence(*target.host, result.info);
        v1::CompactSequenceResponse answer;
        *answer.mutable_state() = StateToProto(*worker_, *target.host, result.info);
        answer.set_moved_rows(result.moved_rows);
        answer.set_freed_pages(result.freed_pages);
        return answer;
      });
}

grpc::Status SequenceEditServiceImpl::ClearSequence(grpc::ServerContext* context,
                                                    const v1::ClearSequenceRequest* request,
                                                    v1::ClearSequenceResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  return Once<v1::ClearSequenceRequest, v1::ClearSequenceResponse>(
      *memos_, call, request->sequence().sequence_id(), *request, response,
      [&]() -> absl::StatusOr<v1::ClearSequenceResponse> {
        PT_ASSIGN_OR_RETURN(const EditTarget target, TargetOf(*worker_, request->sequence()));
        PT_ASSIGN_OR_RETURN(
            const EditResult result,
            target.host->Clear(call.tenant, target.handles[0], request->zero_data()));
        worker_->NoteSequence(*target.host, result.infos[0]);
        v1::ClearSequenceResponse answer;
        *answer.mutable_state() = StateToProto(*worker_, *target.host, result.infos[0]);
        answer.set_removed_rows(result.outcome.removed_rows);
        SetPages(result, answer);
        return answer;
      });
}

grpc::Status SequenceEditServiceImpl::GetPositionExtent(grpc::ServerContext* context,
                                                        const v1::GetPositionExtentRequest* request,
                                                        v1::GetPositionExtentResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto query = [&]() -> absl::Status {
    PT_ASSIGN_OR_RETURN(const SequenceTarget target,
                        FindSequence(*worker_, request->sequence_id()));
    PT_ASSIGN_OR_RETURN(const PositionExtents found,
                        target.host->QueryExtent(call.tenant, target.id));
    for (const PositionExtent& extent : found.groups) {
      v1::GetPositionExtentResponse::Group* group = response->add_groups();
      group->set_min(extent.min);
      group->set_max(extent.max);
      group->set_rows(extent.rows);
      group->set_contiguous(extent.contiguous);
    }
    response->set_revision(found.revision);
    return absl::OkStatus();
  };
  return ToGrpcStatus(query());
}

}  // namespace pagetide
