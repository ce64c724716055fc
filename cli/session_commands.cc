#include "cli/session_commands.h"

#include <google/protobuf/util/time_util.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/byte_size.h"
#include "base/status_macros.h"
#include "cli/output.h"
#include "cli/worker_call.h"
#include "pagetide/v1/sequence.grpc.pb.h"
#include "pagetide/v1/session.grpc.pb.h"
#include "rpc/channel.h"

namespace pagetide {
namespace {

struct SessionFlags : WorkerFlags {
  std::string name;
  std::string prefix;
  std::vector<std::string> metadata;  // key=value
  int64_t expected_version = -1;      // -1: whatever is there
  int64_t length = -1;                // -1: all
  bool compact = false;
};

std::vector<std::string> Row(const v1::SessionInfo& session) {
  return {session.name(),
          absl::StrCat(session.version()),
          absl::StrCat(session.tokens()),
          absl::StrCat(session.pages()),
          FormatByteSize(session.bytes()),
          session.model_digest().substr(0, 12),
          google::protobuf::util::TimeUtil::ToString(session.saved_at())};
}
const std::vector<std::string> kHeading = {"NAME",  "VERSION", "TOKENS",  "PAGES",
                                           "BYTES", "MODEL",   "SAVED AT"};

absl::Status RunList(const SessionFlags& flags, std::ostream& out) {
  PT_ASSIGN_OR_RETURN(const auto worker, ConnectWorker<v1::SessionService>(flags));
  v1::ListSessionsRequest request;
  request.set_page_size(1000);
  request.set_name_prefix(flags.prefix);
  v1::ListSessionsResponse all, page;
  do {
    page.Clear();
    PT_RETURN_IF_ERROR(
        CallWorker(flags, *worker.stub, &v1::SessionService::Stub::ListSessions, request, &page));
    all.mutable_sessions()->MergeFrom(page.sessions());
    request.set_page_token(page.next_page_token());
  } while (!page.next_page_token().empty());
  if (flags.is_json) return PrintJson(all, out);
  std::vector<std::vector<std::string>> rows = {kHeading};
  for (const v1::SessionInfo& session : all.sessions()) rows.push_back(Row(session));
  PrintTable(rows, out);
  return absl::OkStatus();
}

absl::Status RunShow(const SessionFlags& flags, std::ostream& out) {
  PT_ASSIGN_OR_RETURN(const auto worker, ConnectWorker<v1::SessionService>(flags));
  v1::PeekSessionRequest request;
  request.set_name(flags.name);
  v1::PeekSessionResponse response;
  PT_RETURN_IF_ERROR(
      CallWorker(flags, *worker.stub, &v1::SessionService::Stub::PeekSession, request, &response));
  if (flags.is_json) return PrintJson(response, out);
  const std::vector<std::string> row = Row(response.session());
  std::vector<std::vector<std::string>> rows = {{"SESSION", response.session().name()}};
  for (size_t i = 1; i < row.size(); ++i) rows.push_back({kHeading[i], row[i]});
  rows.push_back({"MODEL NAME", response.model_name()});
  rows.push_back({"KEYED TOKENS", absl::StrCat(response.session().canonical_length())});
  for (const auto& [key, value] : response.metadata()) rows.push_back({key, value});
  PrintTable(rows, out);
  return absl::OkStatus();
}

absl::Status RunSave(const SessionFlags& flags, std::ostream& out) {
  PT_ASSIGN_OR_RETURN(const auto worker, ConnectWorker<v1::SessionService>(flags));
  v1::GetSequenceRequest get;
  get.set_sequence_id(flags.sequence);
  v1::GetSequenceResponse sequence;
  const auto stub = v1::SequenceService::NewStub(worker.channel);
  PT_RETURN_IF_ERROR(
      CallWorker(flags, *stub, &v1::SequenceService::Stub::GetSequence, get, &sequence));
  v1::SaveSessionRequest request;
  request.set_name(flags.name);
  request.mutable_sequence()->set_sequence_id(flags.sequence);
  request.mutable_sequence()->set_epoch(sequence.state().epoch());
  if (flags.expected_version >= 0) request.set_expected_version(flags.expected_version);
  if (flags.length >= 0) request.set_keep_tokens(flags.length);
  request.set_compact(flags.compact);
  for (const std::string& entry : flags.metadata) {
    const size_t at = entry.find('=');
    if (at == std::string::npos) {
      return absl::InvalidArgumentError(absl::StrCat("--metadata ", entry, ": not key=value"));
    }
    (*request.mutable_metadata())[entry.substr(0, at)] = entry.substr(at + 1);
  }
  v1::SaveSessionResponse response;
  PT_RETURN_IF_ERROR(
      CallWorker(flags, *worker.stub, &v1::SessionService::Stub::SaveSession, request, &response));
  if (flags.is_json) return PrintJson(response, out);
  out << "saved " << response.name() << ", version " << response.version() << ": "
      << response.tokens() << " tokens, " << response.pages() << " pages; wrote "
      << FormatByteSize(response.bytes_written()) << " of "
      << FormatByteSize(response.bytes_total()) << "\n";
  return absl::OkStatus();
}

absl::Status RunLoad(const SessionFlags& flags, std::ostream& out) {
  PT_ASSIGN_OR_RETURN(const auto worker, ConnectWorker<v1::SessionService>(flags));
  v1::LoadSessionRequest request;
  request.set_name(flags.name);
  if (flags.expected_version >= 0) request.set_version(flags.expected_version);
  if (flags.length >= 0) request.set_length(flags.length);
  v1::LoadSessionResponse response;
  PT_RETURN_IF_ERROR(
      CallWorker(flags, *worker.stub, &v1::SessionService::Stub::LoadSession, request, &response));
  if (flags.is_json) return PrintJson(response, out);
  out << "sequence " << response.state().sequence_id() << " on " << response.state().worker_id()
      << ": " << response.state().length() << " tokens, " << response.restoring_pages()
      << " pages on their way\n";
  return absl::OkStatus();
}

absl::Status RunDelete(const SessionFlags& flags, std::ostream& out) {
  PT_ASSIGN_OR_RETURN(const auto worker, ConnectWorker<v1::SessionService>(flags));
  v1::DeleteSessionRequest request;
  request.set_name(flags.name);
  if (flags.expected_version >= 0) request.set_expected_version(flags.expected_version);
  v1::DeleteSessionResponse response;
  PT_RETURN_IF_ERROR(CallWorker(flags, *worker.stub, &v1::SessionService::Stub::DeleteSession,
                                request, &response));
  if (flags.is_json) return PrintJson(response, out);
  out << "deleted " << flags.name << ", version " << response.deleted_version() << "\n";
  return absl::OkStatus();
}

}  // namespace

CommandRunner AddSessionsCommand(CLI::App& app) {
  const auto flags = std::make_shared<SessionFlags>();  // shared by the parser and the runner
  CLI::App& sessions = *app.add_subcommand("sessions", "Saved state: sequences kept under a name");
  sessions.require_subcommand(1);
  using Run = absl::Status (*)(const SessionFlags&, std::ostream&);
  std::vector<std::pair<CLI::App*, Run>> runs;
  const auto add = [&](const char* name, const char* description, Run run) -> CLI::App& {
    CLI::App& command = *sessions.add_subcommand(name, description);
    AddWorkerFlags(command, flags.get());
    runs.emplace_back(&command, run);
    return command;
  };
  const auto add_name = [&](CLI::App& command) -> CLI::App& {
    command.add_option("name", flags->name, "Name of the session")->required();
    return command;
  };
  const auto add_version = [&](CLI::App& command, const char* description) {
    command.add_option("--expected-version", flags->expected_version, description)
        ->check(CLI::NonNegativeNumber);
  };
  add("list", "Sessions in order of name", RunList)
      .add_option("--prefix", flags->prefix, "Only names that begin so");
  add_name(add("show", "What a session holds, without loading it", RunShow));
  CLI::App& save = add_name(add("save", "Save an open sequence", RunSave));
  save.add_option("--sequence", flags->sequence, "Id of the sequence")->required();
  save.add_option("--metadata", flags->metadata, "key=value, any number of times");
  save.add_option("--keep-tokens", flags->length, "Save the first so many tokens only")
      ->check(CLI::NonNegativeNumber);
  save.add_flag("--compact", flags->compact, "First move the rows of an edited sequence together");
  add_version(save, "Version that must be there; 0: none");
  CLI::App& load = add_name(add("load", "Open a new sequence with what was saved", RunLoad));
  load.add_option("--length", flags->length, "The first so many tokens only")
      ->check(CLI::NonNegativeNumber);
  add_version(load, "Version that must be there");
  add_version(add_name(add("delete", "Delete a session", RunDelete)), "Version that must be there");
  return [flags, runs](std::ostream& out) -> absl::Status {
    for (const auto& [command, run] : runs) {
      if (command->parsed()) return run(*flags, out);
    }
    return absl::InternalError("no subcommand of sessions was given");
  };
}

}  // namespace pagetide
