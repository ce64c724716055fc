// PrefixService over a Worker, its memos and its PromptPlanner. Thread-safe; they outlive it.
#ifndef PAGETIDE_WORKER_PREFIX_SERVICE_H_
#define PAGETIDE_WORKER_PREFIX_SERVICE_H_

#include <string>

#include "absl/status/statusor.h"
#include "pagetide/v1/prefix.grpc.pb.h"
#include "worker/prompt_planner.h"
#include "worker/request_memos.h"
#include "worker/service_support.h"
#include "worker/worker.h"

namespace pagetide {

class PrefixServiceImpl final : public v1::PrefixService::Service {
 public:
  PrefixServiceImpl(Worker* worker, RequestMemos* memos, const PromptPlanner* planner)
      : worker_(worker), memos_(memos), planner_(planner) {}

  grpc::Status LookupPrefix(grpc::ServerContext* context, const v1::LookupPrefixRequest* request,
                            v1::LookupPrefixResponse* response) override;
  grpc::Status PlanPrompt(grpc::ServerContext* context, const v1::PlanPromptRequest* request,
                          v1::PlanPromptResponse* response) override;
  grpc::Status ExtendMatch(grpc::ServerContext* context, const v1::ExtendMatchRequest* request,
                           v1::ExtendMatchResponse* response) override;

 private:
  // Pins the resident part of the prompt's prefix through a sequence that nobody else sees and that
  // the lease's end closes.
  absl::StatusOr<std::string> LeasePrefix(const CallContext& call, ModelHost* host,
                                          const v1::LookupPrefixRequest& request,
                                          std::span<const PositionedInput> inputs,
                                          absl::Duration duration);

  absl::StatusOr<v1::ExtendMatchResponse> Extend(const CallContext& call,
                                                 const v1::ExtendMatchRequest& request);

  Worker* const worker_;
  RequestMemos* const memos_;
  const PromptPlanner* const planner_;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_PREFIX_SERVICE_H_
