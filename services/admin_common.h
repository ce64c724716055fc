// The part of AdminService that every program has: build, capabilities, counters, log level. The
// worker and the store derive from it and add their own; what a role lacks stays UNIMPLEMENTED.
//
// Thread-safe; the metrics outlive the service.
#ifndef PAGETIDE_SERVICES_ADMIN_COMMON_H_
#define PAGETIDE_SERVICES_ADMIN_COMMON_H_

#include <string>
#include <vector>

#include "base/metrics.h"
#include "pagetide/v1/admin.grpc.pb.h"

namespace pagetide {

class AdminServiceCommon : public v1::AdminService::CallbackService {
 public:
  // `role`: router, worker or store. `capabilities`: as in the message.
  AdminServiceCommon(std::string role, std::vector<std::string> capabilities,
                     const Metrics* metrics);

  grpc::ServerUnaryReactor* GetBuildInfo(grpc::CallbackServerContext* context,
                                         const v1::GetBuildInfoRequest* request,
                                         v1::GetBuildInfoResponse* response) override;
  grpc::ServerUnaryReactor* GetCapabilities(grpc::CallbackServerContext* context,
                                            const v1::GetCapabilitiesRequest* request,
                                            v1::GetCapabilitiesResponse* response) override;
  grpc::ServerUnaryReactor* GetStats(grpc::CallbackServerContext* context,
                                     const v1::GetStatsRequest* request,
                                     v1::GetStatsResponse* response) override;
  grpc::ServerUnaryReactor* SetLogLevel(grpc::CallbackServerContext* context,
                                        const v1::SetLogLevelRequest* request,
                                        v1::SetLogLevelResponse* response) override;

 private:
  const std::string role_;
  const std::vector<std::string> capabilities_;
  const Metrics* const metrics_;
};

}  // namespace pagetide

#endif  // PAGETIDE_SERVICES_ADMIN_COMMON_H_
