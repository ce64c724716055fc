// What subcommands that talk to one worker share: which worker, for how long, and in what form the
// answer is printed.
#ifndef PAGETIDE_CLI_WORKER_CALL_H_
#define PAGETIDE_CLI_WORKER_CALL_H_

#include <google/protobuf/duration.pb.h>
#include <grpcpp/client_context.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/status_macros.h"
#include "rpc/channel.h"
#include "rpc/default_ports.h"
#include "rpc/status_mapping.h"

namespace pagetide {

struct WorkerFlags {
  std::string worker;  // address; empty: the router is asked
  std::string router = LoopbackAddress(kDefaultRouterPort);
  bool is_json = false;
  int timeout_seconds = 30;
  std::string sequence;  // id; empty: any worker will do
};

// --worker, --router, --json and --timeout. `flags` outlives the command.
void AddWorkerFlags(CLI::App& command, WorkerFlags* flags);

// Address of the worker to ask. A sequence is where the router says; saved state is everywhere.
absl::StatusOr<std::string> FindWorker(const WorkerFlags& flags);

// "90s", "15m", "24h". INVALID_ARGUMENT names --ttl.
absl::Status ParseTtl(const std::string& text, google::protobuf::Duration* ttl);

// The worker that FindWorker names, and its Service.
template <typename Service>
struct WorkerConnection {
  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<typename Service::Stub> stub;
};
template <typename Service>
absl::StatusOr<WorkerConnection<Service>> ConnectWorker(const WorkerFlags& flags) {
  PT_ASSIGN_OR_RETURN(const std::string address, FindWorker(flags));
  WorkerConnection<Service> connection;
  connection.channel = MakeChannel(address);
  connection.stub = Service::NewStub(connection.channel);
  return connection;
}

template <typename Stub, typename Method, typename Request, typename Response>
absl::Status CallWorker(const WorkerFlags& flags, Stub& stub, Method method, const Request& request,
                        Response* response) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() +
                       std::chrono::seconds(flags.timeout_seconds));
  return FromGrpcStatus((stub.*method)(&context, request, response));
}

}  // namespace pagetide

#endif  // PAGETIDE_CLI_WORKER_CALL_H_
