#include "cli/router_commands.h"

#include <grpcpp/client_context.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/byte_size.h"
#include "base/status_macros.h"
#include "cli/output.h"
#include "cli/sequence_map.h"
#include "pagetide/v1/router.grpc.pb.h"
#include "pagetide/v1/sequence.grpc.pb.h"
#include "rpc/channel.h"
#include "rpc/default_ports.h"
#include "rpc/status_mapping.h"

namespace pagetide {
namespace {

using Stub = v1::RouterService::Stub;

// Flags of every subcommand here.
struct RouterFlags {
  std::string router = LoopbackAddress(kDefaultRouterPort);
  bool is_json = false;
  int timeout_seconds = 10;

  void AddTo(CLI::App& command) {
    command.add_option("--router", router, "Address of a router")->capture_default_str();
    command.add_flag("--json", is_json, "Print the answer as JSON");
    command.add_option("--timeout", timeout_seconds, "Seconds to wait for an answer")
        ->check(CLI::Range(1, 3600))
        ->capture_default_str();
  }
};

template <typename Method, typename Request, typename Response>
absl::Status Call(const RouterFlags& flags, Method method, const Request& request,
                  Response* response) {
  const auto stub = v1::RouterService::NewStub(MakeChannel(flags.router));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() +
                       std::chrono::seconds(flags.timeout_seconds));
  return FromGrpcStatus((stub.get()->*method)(&context, request, response));
}

std::string Seconds(const google::protobuf::Duration& duration) {
  return absl::StrFormat("%.3f s",
                         static_cast<double>(duration.seconds()) + duration.nanos() * 1e-9);
}

absl::Status RunWorkers(const RouterFlags& flags, std::ostream& out) {
  v1::ListWorkersResponse response;
  PT_RETURN_IF_ERROR(Call(flags, &Stub::ListWorkers, v1::ListWorkersRequest(), &response));
  if (flags.is_json) return PrintJson(response, out);
  std::vector<std::vector<std::string>> rows = {{"ID", "ROLE", "STATE", "ADDRESS", "SHARD",
                                                 "FRAMES FREE", "SEQUENCES", "QUEUED TOKENS",
                                                 "TOKENS/S", "RESIDENT PAGES", "HEARD"}};
  for (const auto& worker : response.workers()) {
    rows.push_back({worker.worker_id(), worker.role(), worker.state(), worker.address(),
                    worker.shard_group().empty()
                        ? "-"
                        : absl::StrCat(worker.shard_group(), " rank ", worker.shard_rank()),
                    absl::StrCat(worker.free_frames(), "/", worker.total_frames()),
                    absl::StrCat(worker.open_sequences()),
                    absl::StrCat(worker.queued_prefill_tokens()),
                    absl::StrFormat("%.0f", worker.prefill_tokens_per_second()),
                    absl::StrCat(worker.resident_pages()),
                    absl::StrCat(Seconds(worker.since_heartbeat()), " ago")});
  }
  PrintTable(rows, out);
  return absl::OkStatus();
}

absl::Status RunSequences(const RouterFlags& flags, std::ostream& out) {
  v1::ListSequencesResponse all, page;
  v1::ListSequencesRequest request;
  request.set_page_size(1000);
  do {
    page.Clear();
    PT_RETURN_IF_ERROR(Call(flags, &Stub::ListSequences, request, &page));
    all.mutable_sequences()->MergeFrom(page.sequences());
    request.set_page_token(page.next_page_token());
  } while (!page.next_page_token().empty());
  if (flags.is_json) return PrintJson(all, out);
  std::vector<std::vector<std::string>> rows = {
      {"SEQUENCE", "TOKENS", "WORKER", "ADDRESS", "MODEL"}};
  for (const auto& sequence : all.sequences()) {
    rows.push_back({sequence.sequence_id(), absl::StrCat(sequence.length()), sequence.worker_id(),
                    sequence.address(), sequence.model_digest().substr(0, 12)});
  }
  PrintTable(rows, out);
  return absl::OkStatus();
}

absl::Status RunShowSequence(const RouterFlags& flags, const std::string& sequence_id,
                             std::ostream& out) {
  v1::RouterGetSequenceRequest where;
  where.set_sequence_id(sequence_id);
  v1::RouterGetSequenceResponse found;
  PT_RETURN_IF_ERROR(Call(flags, &Stub::GetSequence, where, &found));
  const auto worker = v1::SequenceService::NewStub(MakeChannel(found.sequence().address()));
  v1::GetBlockTableRequest request;
  request.set_sequence_id(sequence_id);
  v1::GetBlockTableResponse table;
  do {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() +
                         std::chrono::seconds(flags.timeout_seconds));
    v1::GetBlockTableResponse page;
    PT_RETURN_IF_ERROR(FromGrpcStatus(worker->GetBlockTable(&context, request, &page)));
    table.mutable_extents()->MergeFrom(page.extents());
    *table.mutable_state() = std::move(*page.mutable_state());
    request.set_page_token(page.next_page_token());
  } while (!request.page_token().empty());
  if (flags.is_json) return PrintJson(table, out);
  PrintSequenceMap(table, out);
  return absl::OkStatus();
}

absl::Status RunModels(const RouterFlags& flags, std::ostream& out) {
  v1::ListModelsResponse response;
  PT_RETURN_IF_ERROR(Call(flags, &Stub::ListModels, v1::ListModelsRequest(), &response));
  if (flags.is_json) return PrintJson(response, out);
  std::vector<std::vector<std::string>> rows = {
      {"DIGEST", "NAME", "PAGE TOKENS", "GROUPS", "PAGE BYTES"}};
  for (const auto& model : response.models()) {
    rows.push_back(
        {model.model_digest(), model.spec().name(),
         absl::StrCat(model.spec().geometry().page_tokens()),
         absl::StrCat(model.spec().geometry().groups_size()),
         absl::StrJoin(model.group_page_bytes(), " + ", [](std::string* text, uint64_t bytes) {
           absl::StrAppend(text, FormatByteSize(bytes));
         })});
  }
  PrintTable(rows, out);
  return absl::OkStatus();
}

struct ExplainFlags : RouterFlags {
  std::string model;
  std::vector<uint32_t> tokens;
  std::string text;
  std::string sticky_worker_id;
};

absl::Status RunExplain(const ExplainFlags& flags, std::ostream& out) {
  v1::ExplainPlacementRequest request;
  request.mutable_prompt()->set_model(flags.model);
  for (uint32_t token : flags.tokens) request.mutable_prompt()->add_tokens(token);
  for (char c : flags.text) request.mutable_prompt()->add_tokens(static_cast<uint8_t>(c));
  request.set_sticky_worker_id(flags.sticky_worker_id);
  v1::ExplainPlacementResponse response;
  PT_RETURN_IF_ERROR(Call(flags, &Stub::ExplainPlacement, request, &response));
  if (flags.is_json) return PrintJson(response, out);
  std::vector<std::vector<std::string>> rows = {{"WORKER", "SCORE", "FIRST TOKEN IN", "QUEUE",
                                                 "RESTORE", "PREFILL", "DEVICE", "HOST", "STORE",
                                                 "COMPUTE", "NOTE"}};
  for (const auto& candidate : response.candidates()) {
    if (!candidate.eligible()) {
      rows.push_back({candidate.worker_id(), "-", "-", "-", "-", "-", "-", "-", "-", "-",
                      candidate.ineligible_because()});
      continue;
    }
    rows.push_back({candidate.worker_id(), absl::StrFormat("%.6f", candidate.score()),
                    Seconds(candidate.predicted_ttft()), Seconds(candidate.queue_wait()),
                    Seconds(candidate.restore_time()), Seconds(candidate.prefill_time()),
                    absl::StrCat(candidate.device_tokens()), absl::StrCat(candidate.host_tokens()),
                    absl::StrCat(candidate.store_tokens()),
                    absl::StrCat(candidate.compute_tokens()), ""});
  }
  PrintTable(rows, out);
  out << response.policy() << ": " << response.explanation() << "\n";
  return absl::OkStatus();
}

// The flags are shared by the parser, which CLI11 keeps by reference, and the runner.
CommandRunner AddPlainCommand(CLI::App& app, const char* name, const char* description,
                              absl::Status (*run)(const RouterFlags&, std::ostream&)) {
  const auto flags = std::make_shared<RouterFlags>();
  flags->AddTo(*app.add_subcommand(name, description));
  return [flags, run](std::ostream& out) { return run(*flags, out); };
}

}  // namespace

CommandRunner AddWorkersCommand(CLI::App& app) {
  return AddPlainCommand(app, "workers", "Workers and stores that a router knows", RunWorkers);
}

CommandRunner AddSequencesCommand(CLI::App& app) {
  const auto flags = std::make_shared<RouterFlags>();
  const auto sequence_id = std::make_shared<std::string>();
  CLI::App& command = *app.add_subcommand("sequences", "Open sequences and their owners");
  flags->AddTo(command);
  CLI::App& show =
      *command.add_subcommand("show", "Map of one sequence: its pages, positions and owners");
  show.add_option("id", *sequence_id, "Id of the sequence")->required();
  flags->AddTo(show);
  return [flags, sequence_id, &show](std::ostream& out) {
    return show.parsed() ? RunShowSequence(*flags, *sequence_id, out) : RunSequences(*flags, out);
  };
}

CommandRunner AddModelsCommand(CLI::App& app) {
  return AddPlainCommand(app, "models", "Registered models", RunModels);
}

CommandRunner AddExplainCommand(CLI::App& app) {
  const auto flags = std::make_shared<ExplainFlags>();
  CLI::App& command =
      *app.add_subcommand("explain", "Where a prompt would be placed, and why; without effect");
  flags->AddTo(command);
  command.add_option("--model", flags->model, "Name or digest of a registered model")->required();
  auto* tokens = command.add_option("--tokens", flags->tokens, "Token ids of the prompt: 1,2,3")
                     ->delimiter(',');
  command.add_option("--text", flags->text, "Prompt of a byte-level model: one token a byte")
      ->excludes(tokens);
  command.add_option("--sticky", flags->sticky_worker_id, "Worker to stay with if it serves");
  return [flags](std::ostream& out) { return RunExplain(*flags, out); };
}

}  // namespace pagetide
