// PrefixService over a Worker and its PromptPlanner. Thread-safe; both outlive it.
#ifndef PAGETIDE_WORKER_PREFIX_SERVICE_H_
#define PAGETIDE_WORKER_PREFIX_SERVICE_H_

#include <string>

#include "absl/status/statusor.h"
#include "pagetide/v1/prefix.grpc.pb.h"
#include "worker/prompt_planner.h"
#include "worker/service_support.h"
#include "worker/worker.h"

namespace pagetide {

class PrefixServiceImpl final : public v1::PrefixService::Service {
 public:
  PrefixServiceImpl(Worker* worker, const PromptPlanner* planner)
      : worker_(worker), planner_(planner) {}

  grpc::Status LookupPrefix(grpc::ServerContext* context, const v1::LookupPrefixRequest* request,
                            v1::LookupPrefixResponse* response) override;
  grpc::Status PlanPrompt(grpc::ServerContext* context, const v1::PlanPromptRequest* request,
                          v1::PlanPromptResponse* response) override;

 private:
  // Pins the resident part of the prompt's prefix through a sequence that nobody else sees and that
  // the lease's end closes.
  absl::StatusOr<std::string> LeasePrefix(const CallContext& call, ModelHost* host,
                                          const v1::LookupPrefixRequest& request,
                                          std::span<const PositionedInput> inputs,
                                          absl::Duration duration);

  Worker* const worker_;
  const PromptPlanner* const planner_;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_PREFIX_SERVICE_H_
