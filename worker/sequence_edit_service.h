// SequenceEditService over a Worker: each call is decoded to edits, made as one transaction of its
// model's host, and encoded. Thread-safe; the worker, the memos and the retentions
// outlive it.
#ifndef PAGETIDE_WORKER_SEQUENCE_EDIT_SERVICE_H_
#define PAGETIDE_WORKER_SEQUENCE_EDIT_SERVICE_H_

#include "absl/status/statusor.h"
#include "pagetide/v1/sequence_edit.grpc.pb.h"
#include "worker/request_memos.h"
#include "worker/retention.h"
#include "worker/service_support.h"
#include "worker/worker.h"

namespace pagetide {

class SequenceEditServiceImpl final : public v1::SequenceEditService::Service {
 public:
  SequenceEditServiceImpl(Worker* worker, RequestMemos* memos, Retentions* retentions)
      : worker_(worker), memos_(memos), retentions_(retentions) {}

  grpc::Status RemoveRange(grpc::ServerContext* context, const v1::RemoveRangeRequest* request,
                           v1::RemoveRangeResponse* response) override;
  grpc::Status CopyRange(grpc::ServerContext* context, const v1::CopyRangeRequest* request,
                         v1::CopyRangeResponse* response) override;
  grpc::Status KeepOnly(grpc::ServerContext* context, const v1::KeepOnlyRequest* request,
                        v1::KeepOnlyResponse* response) override;
  grpc::Status ShiftPositions(grpc::ServerContext* context,
                              const v1::ShiftPositionsRequest* request,
                              v1::ShiftPositionsResponse* response) override;
  grpc::Status DividePositions(grpc::ServerContext* context,
                               const v1::DividePositionsRequest* request,
                               v1::DividePositionsResponse* response) override;
  grpc::Status ShiftWindow(grpc::ServerContext* context, const v1::ShiftWindowRequest* request,
                           v1::ShiftWindowResponse* response) override;
  grpc::Status Rewind(grpc::ServerContext* context, const v1::RewindRequest* request,
                      v1::RewindResponse* response) override;
  grpc::Status ReorderSequences(grpc::ServerContext* context,
                                const v1::ReorderSequencesRequest* request,
                                v1::ReorderSequencesResponse* response) override;
  grpc::Status EditSequence(grpc::ServerContext* context, const v1::EditSequenceRequest* request,
                            v1::EditSequenceResponse* response) override;
  grpc::Status Compact(grpc::ServerContext* context, const v1::CompactSequenceRequest* request,
                       v1::CompactSequenceResponse* response) override;
  grpc::Status ClearSequence(grpc::ServerContext* context, const v1::ClearSequenceRequest* request,
                             v1::ClearSequenceResponse* response) override;
  grpc::Status GetPositionExtent(grpc::ServerContext* context,
                                 const v1::GetPositionExtentRequest* request,
                                 v1::GetPositionExtentResponse* response) override;

  // retention_service.cc
  grpc::Status SetRetention(grpc::ServerContext* context,
                            const v1::SetRangeRetentionRequest* request,
                            v1::SetRangeRetentionResponse* response) override;
  grpc::Status PinRange(grpc::ServerContext* context, const v1::PinRangeRequest* request,
                        v1::PinRangeResponse* response) override;
  grpc::Status UnpinRange(grpc::ServerContext* context, const v1::UnpinRangeRequest* request,
                          v1::UnpinRangeResponse* response) override;
  grpc::Status ListPins(grpc::ServerContext* context, const v1::ListPinsRequest* request,
                        v1::ListPinsResponse* response) override;

 private:
  absl::StatusOr<v1::PinRangeResponse> MakePin(const CallContext& call,
                                               const v1::PinRangeRequest& request);

  Worker* const worker_;
  RequestMemos* const memos_;
  Retentions* const retentions_;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_SEQUENCE_EDIT_SERVICE_H_
