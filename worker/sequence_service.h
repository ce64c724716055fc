// SequenceService over a Worker. Bulk bytes (AppendTokens, ReadRows) travel as raw byte buffers:
// row bytes are copied once, between the message's slices and the frame, or lent from the frame.
//
// Handlers block (for frames, for staged rows, for peers), so they run on gRPC's synchronous
// threads. Thread-safe. What the constructor takes outlives it; destroy it after the server.
#ifndef PAGETIDE_WORKER_SEQUENCE_SERVICE_H_
#define PAGETIDE_WORKER_SEQUENCE_SERVICE_H_

#include <grpcpp/support/byte_buffer.h>

#include <memory>
#include <string>

#include "pagetide/v1/sequence.grpc.pb.h"
#include "rpc/stream_deadlines.h"
#include "worker/lent_frames.h"
#include "worker/local_plane.h"
#include "worker/parking.h"
#include "worker/prompt_planner.h"
#include "worker/request_memos.h"
#include "worker/row_wire.h"
#include "worker/service_support.h"
#include "worker/worker.h"

namespace pagetide {

class SequenceServiceImpl final : public v1::SequenceService::Service {
 public:
  // `local_plane` may be null: then no call can name staging.
  SequenceServiceImpl(Worker* worker, RequestMemos* memos, LocalPlane* local_plane,
                      const PromptPlanner* planner, Parking* parking, StreamDeadlines* deadlines);
  // Waits until the transport has given back all frames that ReadRows lent to it.
  ~SequenceServiceImpl() override;

  grpc::Status OpenSequence(grpc::ServerContext* context, const v1::OpenSequenceRequest* request,
                            v1::OpenSequenceResponse* response) override;
  grpc::Status WatchReadiness(grpc::ServerContext* context,
                              const v1::WatchReadinessRequest* request,
                              grpc::ServerWriter<v1::WatchReadinessResponse>* writer) override;

  // sequence_step_service.cc
  grpc::Status ReserveSlots(grpc::ServerContext* context, const v1::ReserveSlotsRequest* request,
                            v1::ReserveSlotsResponse* response) override;
  grpc::Status CommitStep(grpc::ServerContext* context, const v1::CommitStepRequest* request,
                          v1::CommitStepResponse* response) override;
  grpc::Status Accept(grpc::ServerContext* context, const v1::AcceptRequest* request,
                      v1::AcceptResponse* response) override;
  grpc::Status AbortReservation(grpc::ServerContext* context,
                                const v1::AbortReservationRequest* request,
                                v1::AbortReservationResponse* response) override;
  grpc::Status Attend(grpc::ServerContext* context, const v1::AttendRequest* request,
                      v1::AttendResponse* response) override;

  // sequence_service.cc
  grpc::Status ForkSequence(grpc::ServerContext* context, const v1::ForkSequenceRequest* request,
                            v1::ForkSequenceResponse* response) override;
  grpc::Status GetSequence(grpc::ServerContext* context, const v1::GetSequenceRequest* request,
                           v1::GetSequenceResponse* response) override;
  grpc::Status ListWorkerSequences(grpc::ServerContext* context,
                                   const v1::ListWorkerSequencesRequest* request,
                                   v1::ListWorkerSequencesResponse* response) override;
  grpc::Status GetBlockTable(grpc::ServerContext* context, const v1::GetBlockTableRequest* request,
                             v1::GetBlockTableResponse* response) override;
  grpc::Status CloseSequence(grpc::ServerContext* context, const v1::CloseSequenceRequest* request,
                             v1::CloseSequenceResponse* response) override;

  // parking_service.cc
  grpc::Status ParkSequence(grpc::ServerContext* context, const v1::ParkSequenceRequest* request,
                            v1::ParkSequenceResponse* response) override;
  grpc::Status ResumeSequence(grpc::ServerContext* context,
                              const v1::ResumeSequenceRequest* request,
                              v1::ResumeSequenceResponse* response) override;

 private:
  using RawStream = grpc::ServerReaderWriter<grpc::ByteBuffer, grpc::ByteBuffer>;

  // The two raw methods; see the constructor. With what they use in sequence_stream_service.cc.
  grpc::Status AppendRaw(grpc::ServerContext* context, RawStream* stream);
  grpc::Status ReadRaw(grpc::ServerContext* context, RawStream* stream);

  absl::StatusOr<v1::AppendTokensResponse> Append(const CallContext& call,
                                                  grpc::ServerContext* context,
                                                  const v1::AppendHeader& header,
                                                  RawStream* stream);
  absl::Status Read(const CallContext& call, const v1::ReadRowsRequest& request, RawStream* stream);
  // Rows of one layer and kind, in parts.
  absl::Status ReadLayer(ModelHost* host, const std::shared_ptr<const ModelHost::PinnedRows>& rows,
                         uint32_t group, uint32_t layer, RowKind kind, RawStream* stream);
  // Of a group without rows: each page whole, in parts.
  absl::Status ReadPages(ModelHost* host, const std::shared_ptr<const ModelHost::PinnedRows>& rows,
                         uint64_t page_bytes, RawStream* stream);
  // The table that a GetBlockTable asks for; its lease, if any, in *lease_id.
  absl::StatusOr<PinLeases::Table> TableOf(const CallContext& call,
                                           const v1::GetBlockTableRequest& request,
                                           uint32_t page_size, std::string* lease_id);
  absl::StatusOr<v1::ParkSequenceResponse> Park(const CallContext& call,
                                                const v1::ParkSequenceRequest& request);
  absl::StatusOr<v1::ResumeSequenceResponse> Resume(const CallContext& call,
                                                    const v1::ResumeSequenceRequest& request);
  absl::StatusOr<v1::ReserveSlotsResponse> Reserve(const CallContext& call,
                                                   const v1::ReserveSlotsRequest& request);
  absl::StatusOr<v1::CommitStepResponse::Result> CommitItem(
      const CallContext& call, const v1::CommitStepRequest::Item& item);
  // Writes the rows that came with the item, then commits it.
  absl::StatusOr<CommitResult> WriteAndCommit(const CallContext& call, const HandleTarget& target,
                                              const v1::CommitStepRequest::Item& item);
  absl::Status WriteStagedRows(const CallContext& call, ModelHost* host, SequenceId id,
                               uint64_t reservation_id, uint32_t num_tokens);
  absl::StatusOr<AttendOutput> AttendItem(const CallContext& call,
                                          const v1::AttendRequest& request);

  Worker* const worker_;
  RequestMemos* const memos_;
  LocalPlane* const local_plane_;
  const PromptPlanner* const planner_;
  Parking* const parking_;
  StreamDeadlines* const deadlines_;
  LentFrames lent_;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_SEQUENCE_SERVICE_H_
