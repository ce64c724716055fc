// Counts and times every call of a server: pagetide_rpc_calls_total{method,code} and
// pagetide_rpc_latency_seconds{method}, from the arrival of the call to the sending of its status.
#ifndef PAGETIDE_RPC_CALL_METRICS_H_
#define PAGETIDE_RPC_CALL_METRICS_H_

#include <grpcpp/support/server_interceptor.h>

#include <memory>

#include "base/metrics.h"

namespace pagetide {

// `metrics` outlives the server. A call that ends without a status of its own counts as CANCELLED.
std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface> MakeCallMetricsInterceptor(
    Metrics* metrics);

}  // namespace pagetide

#endif  // PAGETIDE_RPC_CALL_METRICS_H_
