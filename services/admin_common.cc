#include "services/admin_common.h"

#include <utility>

#include "base/log.h"
#include "rpc/status_mapping.h"

// Set by the build (services/CMakeLists.txt).
#ifndef PAGETIDE_VERSION
#define PAGETIDE_VERSION "unknown"
#endif
#ifndef PAGETIDE_REVISION
#define PAGETIDE_REVISION "unknown"
#endif
#ifndef PAGETIDE_BUILD_TYPE
#define PAGETIDE_BUILD_TYPE "unknown"
#endif

namespace pagetide {

AdminServiceCommon::AdminServiceCommon(std::string role, std::vector<std::string> capabilities,
                                       const Metrics* metrics)
    : role_(std::move(role)), capabilities_(std::move(capabilities)), metrics_(metrics) {}

grpc::ServerUnaryReactor* AdminServiceCommon::GetBuildInfo(grpc::CallbackServerContext* context,
                                                           const v1::GetBuildInfoRequest*,
                                                           v1::GetBuildInfoResponse* response) {
  response->set_version(PAGETIDE_VERSION);
  response->set_revision(PAGETIDE_REVISION);
  response->set_build_type(PAGETIDE_BUILD_TYPE);
  response->set_compiler(__VERSION__);
  auto* reactor = context->DefaultReactor();
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

grpc::ServerUnaryReactor* AdminServiceCommon::GetCapabilities(
    grpc::CallbackServerContext* context, const v1::GetCapabilitiesRequest*,
    v1::GetCapabilitiesResponse* response) {
  response->set_role(role_);
  for (const std::string& capability : capabilities_) response->add_capabilities(capability);
  auto* reactor = context->DefaultReactor();
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

grpc::ServerUnaryReactor* AdminServiceCommon::GetStats(grpc::CallbackServerContext* context,
                                                       const v1::GetStatsRequest*,
                                                       v1::GetStatsResponse* response) {
  for (const MetricSample& sample : metrics_->Snapshot()) {
    (*response->mutable_values())[FormatMetricName(sample.name, sample.labels)] = sample.value;
  }
  auto* reactor = context->DefaultReactor();
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

grpc::ServerUnaryReactor* AdminServiceCommon::SetLogLevel(grpc::CallbackServerContext* context,
                                                          const v1::SetLogLevelRequest* request,
                                                          v1::SetLogLevelResponse*) {
  auto* reactor = context->DefaultReactor();
  reactor->Finish(ToGrpcStatus(pagetide::SetLogLevel(request->level())));
  return reactor;
}

}  // namespace pagetide
