// SequenceEditService over a Worker. Thread-safe; the worker and the memos outlive it.
#ifndef PAGETIDE_WORKER_SEQUENCE_EDIT_SERVICE_H_
#define PAGETIDE_WORKER_SEQUENCE_EDIT_SERVICE_H_

#include "pagetide/v1/sequence_edit.grpc.pb.h"
#include "worker/request_memos.h"
#include "worker/worker.h"

namespace pagetide {

class SequenceEditServiceImpl final : public v1::SequenceEditService::Service {
 public:
  SequenceEditServiceImpl(Worker* worker, RequestMemos* memos) : worker_(worker), memos_(memos) {}

  grpc::Status Rewind(grpc::ServerContext* context, const v1::RewindRequest* request,
                      v1::RewindResponse* response) override;

 private:
  Worker* const worker_;
  RequestMemos* const memos_;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_SEQUENCE_EDIT_SERVICE_H_
