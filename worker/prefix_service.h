// PrefixService over a Worker. Thread-safe; the worker outlives it.
#ifndef PAGETIDE_WORKER_PREFIX_SERVICE_H_
#define PAGETIDE_WORKER_PREFIX_SERVICE_H_

#include <string>

#include "absl/status/statusor.h"
#include "pagetide/v1/prefix.grpc.pb.h"
#include "worker/service_support.h"
#include "worker/worker.h"

namespace pagetide {

class PrefixServiceImpl final : public v1::PrefixService::Service {
 public:
  explicit PrefixServiceImpl(Worker* worker) : worker_(worker) {}

  grpc::Status LookupPrefix(grpc::ServerContext* context, const v1::LookupPrefixRequest* request,
                            v1::LookupPrefixResponse* response) override;

 private:
  // Pins the resident part of the prompt's prefix through a sequence that nobody else sees and that
  // the lease's end closes.
  absl::StatusOr<std::string> LeasePrefix(const CallContext& call, ModelHost* host,
                                          const v1::LookupPrefixRequest& request,
                                          std::span<const PositionedInput> inputs,
                                          absl::Duration duration);

  Worker* const worker_;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_PREFIX_SERVICE_H_
