// RouterService over the router's domain: decodes, makes one domain call, encodes.
//
// Calls whose model is cached here are answered on the thread that reads them; those that need the
// store run on `io`, whose queue is bounded. Thread-safe; everything passed in outlives the
// service.
#ifndef PAGETIDE_SERVICES_ROUTER_SERVICE_H_
#define PAGETIDE_SERVICES_ROUTER_SERVICE_H_

#include <functional>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "base/executor.h"
#include "core/router.h"
#include "pagetide/v1/router.grpc.pb.h"
#include "services/model_catalog.h"
#include "services/tenant.h"

namespace pagetide {

class RouterServiceImpl final : public v1::RouterService::CallbackService {
 public:
  struct Options {
    // Longest wait for the store in a call, whatever the caller's deadline.
    absl::Duration store_timeout = absl::Seconds(5);
  };

  RouterServiceImpl(Options options, Router* router, ModelCatalog* models, const TenantSalts* salts,
                    Executor* io, const Clock* clock);

  grpc::ServerUnaryReactor* AssignSequence(grpc::CallbackServerContext* context,
                                           const v1::AssignSequenceRequest* request,
                                           v1::AssignSequenceResponse* response) override;
  grpc::ServerUnaryReactor* AssignGroup(grpc::CallbackServerContext* context,
                                        const v1::AssignGroupRequest* request,
                                        v1::AssignGroupResponse* response) override;
  grpc::ServerUnaryReactor* ScoreWorkers(grpc::CallbackServerContext* context,
                                         const v1::ScoreWorkersRequest* request,
                                         v1::ScoreWorkersResponse* response) override;
  grpc::ServerUnaryReactor* ExplainPlacement(grpc::CallbackServerContext* context,
                                             const v1::ExplainPlacementRequest* request,
                                             v1::ExplainPlacementResponse* response) override;
  grpc::ServerUnaryReactor* ListWorkers(grpc::CallbackServerContext* context,
                                        const v1::ListWorkersRequest* request,
                                        v1::ListWorkersResponse* response) override;
  grpc::ServerUnaryReactor* GetWorker(grpc::CallbackServerContext* context,
                                      const v1::GetWorkerRequest* request,
                                      v1::GetWorkerResponse* response) override;
  grpc::ServerUnaryReactor* ListSequences(grpc::CallbackServerContext* context,
                                          const v1::ListSequencesRequest* request,
                                          v1::ListSequencesResponse* response) override;
  grpc::ServerUnaryReactor* GetSequence(grpc::CallbackServerContext* context,
                                        const v1::RouterGetSequenceRequest* request,
                                        v1::RouterGetSequenceResponse* response) override;
  grpc::ServerUnaryReactor* RegisterModel(grpc::CallbackServerContext* context,
                                          const v1::RegisterModelRequest* request,
                                          v1::RegisterModelResponse* response) override;
  grpc::ServerUnaryReactor* ListModels(grpc::CallbackServerContext* context,
                                       const v1::ListModelsRequest* request,
                                       v1::ListModelsResponse* response) override;

 private:
  using Models = std::vector<std::shared_ptr<const Model>>;  // shared with the catalog

  // Calls `act` with the models of those digests or names, at once if all are cached, else on io_;
  // then finishes the call with its status. Request and response live until then, and so must what
  // `names` points to.
  grpc::ServerUnaryReactor* WithModels(grpc::CallbackServerContext* context,
                                       std::vector<absl::string_view> names,
                                       std::function<absl::Status(const Models&)> act);
  // The same with a prompt and its model.
  grpc::ServerUnaryReactor* WithPrompt(grpc::CallbackServerContext* context,
                                       const v1::Prompt& prompt,
                                       std::function<absl::Status(const RoutedPrompt&)> act);
  // Runs `act` on io_ and finishes the call with its status.
  grpc::ServerUnaryReactor* OnIo(grpc::CallbackServerContext* context,
                                 std::function<absl::Status(MonotonicTime deadline)> act);
  MonotonicTime DeadlineOf(const grpc::CallbackServerContext& context) const;

  const Options options_;
  Router* const router_;
  ModelCatalog* const models_;
  const TenantSalts* const salts_;
  Executor* const io_;
  const Clock* const clock_;
};

}  // namespace pagetide

#endif  // PAGETIDE_SERVICES_ROUTER_SERVICE_H_
