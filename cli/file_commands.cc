#include "cli/file_commands.h"

#include <google/protobuf/util/json_util.h>
#include <grpcpp/client_context.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/byte_size.h"
#include "base/status_macros.h"
#include "cli/output.h"
#include "cli/worker_call.h"
#include "pagetide/v1/session.grpc.pb.h"
#include "rpc/channel.h"
#include "rpc/status_mapping.h"

namespace pagetide {
namespace {

constexpr size_t kPartBytes = size_t{1} << 20;

struct FileFlags : WorkerFlags {
  std::string file;
  std::string format;
  std::string layout_file;  // export: read; import: written
  std::string model;        // import
  std::vector<uint32_t> tokens;
  std::string tokens_file;
  std::string basis;
  std::string request_id;

  void AddTo(CLI::App& command) {
    timeout_seconds = 600;
    AddWorkerFlags(command, this);
    command.add_option("--format", format, "native, llama.cpp, mlx or llamasharp")
        ->check(CLI::IsMember({"native", "llama.cpp", "mlx", "llamasharp"}));
  }
  void SetDeadline(grpc::ClientContext* context) const {
    context->set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(timeout_seconds));
  }
};

v1::StateFormat FormatOf(const std::string& name) {
  if (name == "native") return v1::STATE_FORMAT_NATIVE;
  if (name == "llama.cpp") return v1::STATE_FORMAT_LLAMA_CPP;
  if (name == "mlx") return v1::STATE_FORMAT_MLX;
  if (name == "llamasharp") return v1::STATE_FORMAT_LLAMA_SHARP;
  return v1::STATE_FORMAT_UNSPECIFIED;
}

// Percent of the bytes on stderr, for people.
class Progress {
 public:
  Progress(const FileFlags& flags, const char* verb)
      : is_shown_(!flags.is_json && isatty(STDERR_FILENO) != 0), verb_(verb) {}
  ~Progress() {
    if (is_shown_) std::fprintf(stderr, "\r\033[K");
  }
  void Show(uint64_t done, uint64_t total) {
    const int percent = total == 0 ? 100 : static_cast<int>(done * 100 / total);
    if (!is_shown_ || percent == last_) return;
    last_ = percent;
    std::fprintf(stderr, "\r%s %s of %s, %d %%", verb_, FormatByteSize(done).c_str(),
                 FormatByteSize(total).c_str(), percent);
  }

 private:
  const bool is_shown_;
  const char* const verb_;
  int last_ = -1;
};

absl::StatusOr<std::string> ReadWholeFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) return absl::NotFoundError(absl::StrCat("read ", path, ": cannot be opened"));
  return std::string(std::istreambuf_iterator<char>(in), {});
}

absl::Status RunExport(const FileFlags& flags, std::ostream& out) {
  v1::ExportSequenceRequest request;
  request.set_sequence_id(flags.sequence);
  request.set_format(FormatOf(flags.format));
  if (!flags.layout_file.empty()) {
    PT_ASSIGN_OR_RETURN(const std::string json, ReadWholeFile(flags.layout_file));
    const auto parsed = google::protobuf::util::JsonStringToMessage(json, request.mutable_layout());
    if (!parsed.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("read layout ", flags.layout_file, ": ", std::string(parsed.message())));
    }
  }
  PT_ASSIGN_OR_RETURN(const std::string address, FindWorker(flags));
  const auto worker = v1::SessionService::NewStub(MakeChannel(address));
  grpc::ClientContext context;
  flags.SetDeadline(&context);
  const auto stream = worker->ExportSequence(&context, request);
  // The file takes its name only when it is whole.
  const std::string partial = flags.file + ".partial";
  std::ofstream file(partial, std::ios::binary | std::ios::trunc);
  v1::ExportSequenceResponse message;
  v1::ExportSequenceResponse::Header header;
  uint64_t received = 0;
  {
    Progress progress(flags, "exported");
    while (file && stream->Read(&message)) {
      if (message.has_header()) header = message.header();
      file.write(message.data().data(), static_cast<std::streamsize>(message.data().size()));
      received += message.data().size();
      progress.Show(received, header.total_bytes());
    }
  }
  file.close();
  if (!file) context.TryCancel();
  absl::Status status = FromGrpcStatus(stream->Finish());
  if (!file) status = absl::FailedPreconditionError(absl::StrCat("write ", partial, " failed"));
  if (status.ok() && received != header.total_bytes()) {
    status = absl::DataLossError(absl::StrCat("export: ", received, " bytes came, ",
                                              header.total_bytes(), " were announced"));
  }
  if (status.ok() && std::rename(partial.c_str(), flags.file.c_str()) != 0) {
    status = absl::FailedPreconditionError(absl::StrCat("rename ", partial, " failed"));
  }
  if (!status.ok()) {
    std::remove(partial.c_str());
    return status;
  }
  if (flags.is_json) return PrintJson(header, out);
  out << "exported " << header.tokens() << " tokens to " << flags.file << " ("
      << FormatByteSize(received) << ")\n";
  return absl::OkStatus();
}

absl::Status AddTokens(const FileFlags& flags, v1::ImportSequenceRequest::Header* header) {
  for (const uint32_t token : flags.tokens) header->add_tokens(token);
  if (flags.tokens_file.empty()) return absl::OkStatus();
  PT_ASSIGN_OR_RETURN(const std::string text, ReadWholeFile(flags.tokens_file));
  for (const absl::string_view word :
       absl::StrSplit(text, absl::ByAnyChar(" \t\r\n,"), absl::SkipEmpty())) {
    uint32_t token = 0;
    if (!absl::SimpleAtoi(word, &token)) {
      return absl::InvalidArgumentError(absl::StrCat("read tokens ", flags.tokens_file, ": \"",
                                                     word.substr(0, 40), "\" is no token id"));
    }
    header->add_tokens(token);
  }
  return absl::OkStatus();
}

// The file that --layout-out names, or none. It is made before the import, so that a path where
// nothing can be written costs no import, and takes its name only when it is whole.
class LayoutFile {
 public:
  explicit LayoutFile(const std::string& path) : path_(path), partial_(path + ".partial") {}
  ~LayoutFile() {
    if (!is_named_) std::remove(partial_.c_str());
  }
  absl::Status Open() {
    if (path_.empty()) return absl::OkStatus();
    is_named_ = false;
    out_.open(partial_, std::ios::trunc);
    if (out_) return absl::OkStatus();
    return absl::FailedPreconditionError(
        absl::StrCat("write ", partial_, ": cannot be opened; nothing was imported"));
  }
  absl::Status Write(const v1::FileLayout& layout) {
    if (path_.empty()) return absl::OkStatus();
    std::string json;
    const auto printed = google::protobuf::util::MessageToJsonString(layout, &json);
    out_ << json << "\n";
    out_.close();
    is_named_ = printed.ok() && out_ && std::rename(partial_.c_str(), path_.c_str()) == 0;
    if (is_named_) return absl::OkStatus();
    return absl::FailedPreconditionError(absl::StrCat("write ", path_, " failed"));
  }

 private:
  const std::string path_;
  const std::string partial_;
  std::ofstream out_;
  bool is_named_ = true;  // nothing of it is to be removed
};

absl::Status RunImport(const FileFlags& flags, std::ostream& out) {
  v1::ImportSequenceRequest message;
  v1::ImportSequenceRequest::Header* const header = message.mutable_header();
  header->set_request_id(flags.request_id);
  header->set_model_digest(flags.model);
  header->set_format(FormatOf(flags.format));
  if (flags.basis == "plain") header->set_basis(v1::ImportSequenceRequest::Header::BASIS_PLAIN);
  if (flags.basis == "hadamard") {
    header->set_basis(v1::ImportSequenceRequest::Header::BASIS_HADAMARD);
  }
  PT_RETURN_IF_ERROR(AddTokens(flags, header));
  std::ifstream file(flags.file, std::ios::binary | std::ios::ate);
  if (!file) return absl::NotFoundError(absl::StrCat("read ", flags.file, ": cannot be opened"));
  const uint64_t total = static_cast<uint64_t>(file.tellg());
  file.seekg(0);
  LayoutFile layout(flags.layout_file);
  PT_RETURN_IF_ERROR(layout.Open());
  PT_ASSIGN_OR_RETURN(const std::string address, FindWorker(flags));
  const auto worker = v1::SessionService::NewStub(MakeChannel(address));
  grpc::ClientContext context;
  flags.SetDeadline(&context);
  v1::ImportSequenceResponse response;
  const auto stream = worker->ImportSequence(&context, &response);
  bool is_open = stream->Write(message);
  message.Clear();
  std::string part(kPartBytes, '\0');
  {
    Progress progress(flags, "sent");
    for (uint64_t sent = 0; is_open && sent < total; sent += message.data().size()) {
      file.read(part.data(), static_cast<std::streamsize>(kPartBytes));
      if (file.gcount() <= 0) {
        context.TryCancel();
        (void)stream->Finish();
        return absl::DataLossError(absl::StrCat("read ", flags.file, ": it ended at byte ", sent));
      }
      message.set_data(part.data(), static_cast<size_t>(file.gcount()));
      is_open = stream->Write(message);
      progress.Show(sent + message.data().size(), total);
    }
  }
  if (is_open) stream->WritesDone();
  PT_RETURN_IF_ERROR(FromGrpcStatus(stream->Finish()));
  // The sequence is open: whatever becomes of the layout, its id is told.
  if (flags.is_json) {
    PT_RETURN_IF_ERROR(PrintJson(response, out));
  } else {
    out << "sequence " << response.state().sequence_id() << ": " << response.state().length()
        << " tokens from " << FormatByteSize(response.file_bytes()) << " of "
        << v1::StateFormat_Name(response.format()) << ", "
        << (response.canonical() ? "shared by prefix" : "private") << "\n";
  }
  const absl::Status written = layout.Write(response.layout());
  if (written.ok()) return absl::OkStatus();
  return absl::Status(written.code(),
                      absl::StrCat("sequence ", response.state().sequence_id(),
                                   " is open, but its layout is not kept: ", written.message()));
}

}  // namespace

CommandRunner AddExportCommand(CLI::App& app) {
  const auto flags = std::make_shared<FileFlags>();
  CLI::App& command = *app.add_subcommand("export", "Write a sequence to a file");
  flags->AddTo(command);
  command.add_option("sequence", flags->sequence, "Id of the sequence")->required();
  command.add_option("file", flags->file, "File to write")->required();
  command.add_option("--layout", flags->layout_file,
                     "JSON of a FileLayout, as import --layout-out wrote it");
  return [flags](std::ostream& out) { return RunExport(*flags, out); };
}

CommandRunner AddImportCommand(CLI::App& app) {
  const auto flags = std::make_shared<FileFlags>();
  CLI::App& command = *app.add_subcommand("import", "Open a sequence from a file");
  flags->AddTo(command);
  command.add_option("file", flags->file, "File to read")->required();
  command.add_option("--model", flags->model, "Digest of the model, 64 hex digits")->required();
  auto* tokens = command
                     .add_option("--tokens", flags->tokens,
                                 "Token ids of the rows, for formats without: 1,2,3")
                     ->delimiter(',');
  command.add_option("--tokens-file", flags->tokens_file, "The same from a file")->excludes(tokens);
  command
      .add_option("--basis", flags->basis,
                  "plain or hadamard: of the rows; quantised llama.cpp states need it")
      ->check(CLI::IsMember({"plain", "hadamard"}));
  command.add_option("--layout-out", flags->layout_file,
                     "Write what export needs to make the same file again");
  command.add_option("--request-id", flags->request_id, "Makes a repetition safe");
  return [flags](std::ostream& out) { return RunImport(*flags, out); };
}

}  // namespace pagetide
