#include "cli/retention_commands.h"

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
#include "pagetide/v1/sequence_edit.grpc.pb.h"
#include "rpc/channel.h"

namespace pagetide {
namespace {

using Edits = v1::SequenceEditService::Stub;

struct RetentionFlags : WorkerFlags {
  std::string name;
  std::string prefix;
  std::string ttl;  // as absl::ParseDuration takes it; empty: none
  uint64_t begin = 0;
  int64_t end = -1;       // -1: the committed length
  int64_t priority = -1;  // -1: the default
};

absl::StatusOr<v1::SequenceRef> RefOf(const RetentionFlags& flags,
                                      const WorkerConnection<v1::SequenceEditService>& worker) {
  const auto stub = v1::SequenceService::NewStub(worker.channel);
  v1::GetSequenceRequest request;
  request.set_sequence_id(flags.sequence);
  v1::GetSequenceResponse response;
  PT_RETURN_IF_ERROR(
      CallWorker(flags, *stub, &v1::SequenceService::Stub::GetSequence, request, &response));
  v1::SequenceRef ref;
  ref.set_sequence_id(flags.sequence);
  ref.set_epoch(response.state().epoch());
  return ref;
}

// Fills in what the two messages that name a range have in common.
template <typename Range>
absl::Status SetRange(const RetentionFlags& flags, Range* range) {
  range->set_begin(flags.begin);
  if (flags.end >= 0) range->set_end(flags.end);
  if (flags.ttl.empty()) return absl::OkStatus();
  return ParseTtl(flags.ttl, range->mutable_ttl());
}

std::string EndOf(const v1::PinInfo& pin) {
  return pin.has_expires_at() ? google::protobuf::util::TimeUtil::ToString(pin.expires_at())
                              : "never";
}

absl::Status RunList(const RetentionFlags& flags, std::ostream& out) {
  PT_ASSIGN_OR_RETURN(const auto worker, ConnectWorker<v1::SequenceEditService>(flags));
  v1::ListPinsRequest request;
  request.set_page_size(1000);
  request.set_name_prefix(flags.prefix);
  v1::ListPinsResponse all, page;
  do {
    page.Clear();
    PT_RETURN_IF_ERROR(CallWorker(flags, *worker.stub, &Edits::ListPins, request, &page));
    all.mutable_pins()->MergeFrom(page.pins());
    request.set_page_token(page.next_page_token());
  } while (!page.next_page_token().empty());
  if (flags.is_json) return PrintJson(all, out);
  std::vector<std::vector<std::string>> rows = {
      {"NAME", "TOKENS", "PAGES", "BYTES", "MODEL", "PINNED AT", "EXPIRES"}};
  for (const v1::PinInfo& pin : all.pins()) {
    rows.push_back({pin.name(), absl::StrCat("[", pin.begin(), ", ", pin.end(), ")"),
                    absl::StrCat(pin.pages()), FormatByteSize(pin.bytes()),
                    pin.model_digest().substr(0, 12),
                    google::protobuf::util::TimeUtil::ToString(pin.pinned_at()), EndOf(pin)});
  }
  PrintTable(rows, out);
  return absl::OkStatus();
}

absl::Status RunAdd(const RetentionFlags& flags, std::ostream& out) {
  PT_ASSIGN_OR_RETURN(const auto worker, ConnectWorker<v1::SequenceEditService>(flags));
  v1::PinRangeRequest request;
  request.set_name(flags.name);
  PT_RETURN_IF_ERROR(SetRange(flags, &request));
  PT_ASSIGN_OR_RETURN(*request.mutable_sequence(), RefOf(flags, worker));
  v1::PinRangeResponse response;
  PT_RETURN_IF_ERROR(CallWorker(flags, *worker.stub, &Edits::PinRange, request, &response));
  if (flags.is_json) return PrintJson(response, out);
  const v1::PinInfo& pin = response.pin();
  out << "pinned " << pin.name() << ": tokens [" << pin.begin() << ", " << pin.end() << "), "
      << pin.pages() << " pages of " << FormatByteSize(pin.bytes()) << "; wrote "
      << FormatByteSize(response.bytes_written()) << "; expires: " << EndOf(pin) << "\n";
  return absl::OkStatus();
}

absl::Status RunRemove(const RetentionFlags& flags, std::ostream& out) {
  PT_ASSIGN_OR_RETURN(const auto worker, ConnectWorker<v1::SequenceEditService>(flags));
  v1::UnpinRangeRequest request;
  request.set_name(flags.name);
  v1::UnpinRangeResponse response;
  PT_RETURN_IF_ERROR(CallWorker(flags, *worker.stub, &Edits::UnpinRange, request, &response));
  if (flags.is_json) return PrintJson(response, out);
  out << "unpinned " << flags.name << "\n";
  return absl::OkStatus();
}

absl::Status RunRetain(const RetentionFlags& flags, std::ostream& out) {
  PT_ASSIGN_OR_RETURN(const auto worker, ConnectWorker<v1::SequenceEditService>(flags));
  v1::SetRangeRetentionRequest request;
  v1::RangeRetention& range = *request.add_ranges();
  PT_RETURN_IF_ERROR(SetRange(flags, &range));
  if (flags.priority >= 0) range.set_priority(static_cast<uint32_t>(flags.priority));
  PT_ASSIGN_OR_RETURN(*request.mutable_sequence(), RefOf(flags, worker));
  v1::SetRangeRetentionResponse response;
  PT_RETURN_IF_ERROR(CallWorker(flags, *worker.stub, &Edits::SetRetention, request, &response));
  if (flags.is_json) return PrintJson(response, out);
  out << "set for " << response.pages() << " pages; wrote "
      << FormatByteSize(response.bytes_written()) << "\n";
  return absl::OkStatus();
}

void AddRange(CLI::App& command, RetentionFlags* flags) {
  command.add_option("--sequence", flags->sequence, "Id of the sequence")->required();
  command.add_option("--begin", flags->begin, "First token")->capture_default_str();
  command.add_option("--end", flags->end, "One past the last token (default: all)")
      ->check(CLI::NonNegativeNumber);
  command.add_option("--ttl", flags->ttl,
                     "For so long, such as 90s, 15m or 24h (default: for ever)");
}

}  // namespace

CommandRunner AddPinsCommand(CLI::App& app) {
  const auto flags = std::make_shared<RetentionFlags>();  // shared by the parser and the runner
  CLI::App& pins = *app.add_subcommand("pins", "Pages that the store keeps under a name");
  pins.require_subcommand(1);
  using Run = absl::Status (*)(const RetentionFlags&, std::ostream&);
  std::vector<std::pair<CLI::App*, Run>> runs;
  const auto add = [&](const char* name, const char* description, Run run) -> CLI::App& {
    CLI::App& command = *pins.add_subcommand(name, description);
    AddWorkerFlags(command, flags.get());
    runs.emplace_back(&command, run);
    return command;
  };
  add("list", "Pins in order of name", RunList)
      .add_option("--prefix", flags->prefix, "Only names that begin so");
  CLI::App& pin = add("add", "Pin tokens of an open sequence", RunAdd);
  pin.add_option("name", flags->name, "Name of the pin")->required();
  AddRange(pin, flags.get());
  add("remove", "Let the store evict the pages again", RunRemove)
      .add_option("name", flags->name, "Name of the pin")
      ->required();
  return [flags, runs](std::ostream& out) -> absl::Status {
    for (const auto& [command, run] : runs) {
      if (command->parsed()) return run(*flags, out);
    }
    return absl::InternalError("no subcommand of pins was given");
  };
}

CommandRunner AddRetainCommand(CLI::App& app) {
  const auto flags = std::make_shared<RetentionFlags>();  // shared by the parser and the runner
  CLI::App& retain = *app.add_subcommand(
      "retain", "Say how long tokens of an open sequence are worth keeping in the store");
  AddWorkerFlags(retain, flags.get());
  AddRange(retain, flags.get());
  retain.add_option("--priority", flags->priority, "0 to 100: the higher, the later it is evicted")
      ->check(CLI::NonNegativeNumber);
  return [flags](std::ostream& out) { return RunRetain(*flags, out); };
}

}  // namespace pagetide
