#include "cli/parking_commands.h"

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "base/byte_size.h"
#include "base/status_macros.h"
#include "cli/output.h"
#include "cli/worker_call.h"
#include "pagetide/v1/sequence.grpc.pb.h"
#include "rpc/channel.h"

namespace pagetide {
namespace {

using Sequences = v1::SequenceService::Stub;

struct ParkingFlags : WorkerFlags {
  std::string id;
  std::string ttl;
  bool keep_open = false;
};

absl::Status RunPark(const ParkingFlags& flags, std::ostream& out) {
  WorkerFlags of_sequence = flags;
  of_sequence.sequence = flags.id;
  PT_ASSIGN_OR_RETURN(const std::string address, FindWorker(of_sequence));
  const auto worker = v1::SequenceService::NewStub(MakeChannel(address));
  v1::GetSequenceRequest get;
  get.set_sequence_id(flags.id);
  v1::GetSequenceResponse sequence;
  PT_RETURN_IF_ERROR(CallWorker(flags, *worker, &Sequences::GetSequence, get, &sequence));
  v1::ParkSequenceRequest request;
  request.mutable_sequence()->set_sequence_id(flags.id);
  request.mutable_sequence()->set_epoch(sequence.state().epoch());
  request.set_keep_open(flags.keep_open);
  if (!flags.ttl.empty()) PT_RETURN_IF_ERROR(ParseTtl(flags.ttl, request.mutable_ttl()));
  v1::ParkSequenceResponse response;
  PT_RETURN_IF_ERROR(CallWorker(flags, *worker, &Sequences::ParkSequence, request, &response));
  if (flags.is_json) return PrintJson(response, out);
  out << "parked " << response.sequence_id() << ", version " << response.version() << ", epoch "
      << response.epoch() << ": " << response.tokens() << " tokens, " << response.pages()
      << " pages; wrote " << FormatByteSize(response.bytes_written()) << " of "
      << FormatByteSize(response.bytes_total()) << (response.is_open() ? "; still open" : "")
      << "\n";
  return absl::OkStatus();
}

absl::Status RunResume(const ParkingFlags& flags, std::ostream& out) {
  PT_ASSIGN_OR_RETURN(const std::string address, FindWorker(flags));
  const auto worker = v1::SequenceService::NewStub(MakeChannel(address));
  v1::ResumeSequenceRequest request;
  request.set_sequence_id(flags.id);
  v1::ResumeSequenceResponse response;
  PT_RETURN_IF_ERROR(CallWorker(flags, *worker, &Sequences::ResumeSequence, request, &response));
  if (flags.is_json) return PrintJson(response, out);
  out << "sequence " << response.state().sequence_id() << " on " << response.state().worker_id()
      << ", epoch " << response.state().epoch() << ": " << response.state().length() << " tokens, "
      << response.restoring_pages() << " pages on their way"
      << (response.was_taken_over() ? "; taken over" : "") << "\n";
  return absl::OkStatus();
}

}  // namespace

CommandRunner AddParkCommand(CLI::App& app) {
  const auto flags = std::make_shared<ParkingFlags>();  // shared by the parser and the runner
  CLI::App& park =
      *app.add_subcommand("park", "Make an open sequence durable under its id and let go of it");
  AddWorkerFlags(park, flags.get());
  park.add_option("id", flags->id, "Id of the sequence")->required();
  park.add_flag("--keep-open", flags->keep_open, "Go on with it; durable is what is there now");
  park.add_option("--ttl", flags->ttl, "Keep what is parked for so long, such as 24h");
  return [flags](std::ostream& out) { return RunPark(*flags, out); };
}

CommandRunner AddResumeCommand(CLI::App& app) {
  const auto flags = std::make_shared<ParkingFlags>();  // shared by the parser and the runner
  CLI::App& resume = *app.add_subcommand("resume", "Open a parked sequence under its id");
  AddWorkerFlags(resume, flags.get());
  resume.add_option("id", flags->id, "Id of the sequence")->required();
  return [flags](std::ostream& out) { return RunResume(*flags, out); };
}

}  // namespace pagetide
