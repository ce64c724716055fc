// TransferService over a Worker, its IncomingTransfers and its SequenceSender. Thread-safe; what
// the constructor takes outlives it.
#ifndef PAGETIDE_WORKER_TRANSFER_SERVICE_H_
#define PAGETIDE_WORKER_TRANSFER_SERVICE_H_

#include "pagetide/v1/transfer.grpc.pb.h"
#include "rpc/stream_deadlines.h"
#include "worker/frame_link.h"
#include "worker/group_mailbox.h"
#include "worker/incoming_transfers.h"
#include "worker/request_memos.h"
#include "worker/sequence_sender.h"
#include "worker/service_support.h"
#include "worker/worker.h"

namespace pagetide {

class TransferServiceImpl final : public v1::TransferService::Service {
 public:
  // `link` may be null.
  TransferServiceImpl(Worker* worker, IncomingTransfers* incoming, SequenceSender* sender,
                      FrameLink* link, GroupMailbox* mailbox, RequestMemos* memos,
                      StreamDeadlines* deadlines);

  grpc::Status ReserveTransfer(grpc::ServerContext* context,
                               const v1::ReserveTransferRequest* request,
                               v1::ReserveTransferResponse* response) override;
  grpc::Status PushPages(grpc::ServerContext* context,
                         grpc::ServerReader<v1::PushPagesRequest>* reader,
                         v1::PushPagesResponse* response) override;
  grpc::Status ReceivePages(grpc::ServerContext* context, const v1::ReceivePagesRequest* request,
                            grpc::ServerWriter<v1::ReceivePagesResponse>* writer) override;
  grpc::Status CommitTransfer(grpc::ServerContext* context,
                              const v1::CommitTransferRequest* request,
                              v1::CommitTransferResponse* response) override;
  grpc::Status AbortTransfer(grpc::ServerContext* context, const v1::AbortTransferRequest* request,
                             v1::AbortTransferResponse* response) override;
  grpc::Status SendSequence(grpc::ServerContext* context, const v1::SendSequenceRequest* request,
                            v1::SendSequenceResponse* response) override;
  grpc::Status DeliverBytes(grpc::ServerContext* context,
                            grpc::ServerReader<v1::DeliverBytesRequest>* reader,
                            v1::DeliverBytesResponse* response) override;

 private:
  absl::StatusOr<v1::ReserveTransferResponse> Reserve(const CallContext& call,
                                                      const v1::ReserveTransferRequest& request);
  absl::Status Push(const CallContext& call, grpc::ServerContext* context,
                    grpc::ServerReader<v1::PushPagesRequest>* reader,
                    v1::PushPagesResponse* response);
  absl::Status Receive(const CallContext& call, const v1::ReceivePagesRequest& request,
                       grpc::ServerWriter<v1::ReceivePagesResponse>* writer);
  absl::Status Deliver(const CallContext& call,
                       grpc::ServerReader<v1::DeliverBytesRequest>* reader);
  v1::CommitTransferResponse ToProto(const IncomingTransfers::Committed& committed) const;

  Worker* const worker_;
  IncomingTransfers* const incoming_;
  SequenceSender* const sender_;
  FrameLink* const link_;
  GroupMailbox* const mailbox_;
  RequestMemos* const memos_;
  StreamDeadlines* const deadlines_;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_TRANSFER_SERVICE_H_
