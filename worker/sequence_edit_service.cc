#include "worker/sequence_edit_service.h"

#include <utility>

#include "base/status_macros.h"
#include "rpc/status_mapping.h"
#include "worker/service_support.h"

namespace pagetide {

grpc::Status SequenceEditServiceImpl::Rewind(grpc::ServerContext* context,
                                             const v1::RewindRequest* request,
                                             v1::RewindResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto rewind = [&]() -> absl::StatusOr<v1::RewindResponse> {
    PT_ASSIGN_OR_RETURN(const HandleTarget target, FindSequence(*worker_, request->sequence()));
    PT_ASSIGN_OR_RETURN(const RewindResult result,
                        target.host->Rewind(call.tenant, target.handle, request->length()));
    worker_->NoteSequence(*target.host, result.info);
    v1::RewindResponse answer;
    *answer.mutable_state() = StateToProto(*worker_, *target.host, result.info);
    answer.set_removed_tokens(result.removed_tokens);
    answer.set_freed_pages(result.freed_pages);
    return answer;
  };
  auto answer = memos_->OncePerSequence<v1::RewindResponse>(
      request->sequence().sequence_id(), request->request_id(), DigestOfMessage(*request),
      call.deadline, rewind);
  if (!answer.ok()) return ToGrpcStatus(answer.status());
  *response = *std::move(answer);
  return grpc::Status::OK;
}

}  // namespace pagetide
