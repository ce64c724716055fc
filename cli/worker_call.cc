#include "cli/worker_call.h"

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "base/status_macros.h"
#include "pagetide/v1/router.grpc.pb.h"
#include "rpc/channel.h"
#include "rpc/duration_proto.h"

namespace pagetide {

void AddWorkerFlags(CLI::App& command, WorkerFlags* flags) {
  auto* worker = command.add_option("--worker", flags->worker,
                                    "Address of a worker (default: one that the router knows)");
  command.add_option("--router", flags->router, "Address of a router")
      ->excludes(worker)
      ->capture_default_str();
  command.add_flag("--json", flags->is_json, "Print the answer as JSON");
  command.add_option("--timeout", flags->timeout_seconds, "Seconds to wait for an answer")
      ->check(CLI::Range(1, 3600))
      ->capture_default_str();
}

absl::StatusOr<std::string> FindWorker(const WorkerFlags& flags) {
  if (!flags.worker.empty()) return flags.worker;
  const auto router = v1::RouterService::NewStub(MakeChannel(flags.router));
  if (!flags.sequence.empty()) {
    v1::RouterGetSequenceRequest request;
    request.set_sequence_id(flags.sequence);
    v1::RouterGetSequenceResponse response;
    PT_RETURN_IF_ERROR(
        CallWorker(flags, *router, &v1::RouterService::Stub::GetSequence, request, &response));
    return response.sequence().address();
  }
  v1::ListWorkersResponse response;
  PT_RETURN_IF_ERROR(CallWorker(flags, *router, &v1::RouterService::Stub::ListWorkers,
                                v1::ListWorkersRequest(), &response));
  for (const v1::WorkerInfo& worker : response.workers()) {
    if (worker.role() == "worker" && worker.state() == "serving") return worker.address();
  }
  return absl::UnavailableError(absl::StrCat("find a worker: router ", flags.router,
                                             " knows none that serves among ",
                                             response.workers_size(), " members"));
}

absl::Status ParseTtl(const std::string& text, google::protobuf::Duration* ttl) {
  absl::Duration parsed;
  if (!absl::ParseDuration(text, &parsed)) {
    return absl::InvalidArgumentError(
        absl::StrCat("--ttl ", text, ": not a duration such as 90s, 15m or 24h"));
  }
  *ttl = DurationToProto(parsed);
  return absl::OkStatus();
}

}  // namespace pagetide
