// Counts and times every call of a server: pagetide_rpc_calls_total{method,code} and
// pagetide_rpc_latency_seconds{method}, from the arrival of the call to the sending of its status.
#ifndef PAGETIDE_RPC_CALL_METRICS_H_
#define PAGETIDE_RPC_CALL_METRICS_H_

#include <grpcpp/support/server_interceptor.h>

#include <memory>

#include "base/metrics.h"
#include "rpc/running_calls.h"

namespace pagetide {

// A call that ends without a status of its own counts as CANCELLED. `running` counts the calls of
// our own services: those of gRPC's (health, reflection, channelz) may stay open for as long as
// their clients like. Both outlive the server.
std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface> MakeCallMetricsInterceptor(
    Metrics* metrics, RunningCalls* running);

}  // namespace pagetide

#endif  // PAGETIDE_RPC_CALL_METRICS_H_
