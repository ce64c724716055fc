// ExportSequence and ImportSequence of SessionService: files in, files out.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "rpc/status_mapping.h"
#include "worker/sequence_formats.h"
#include "worker/session_service.h"
#include "worker/spool_file.h"

namespace pagetide {
namespace {

constexpr size_t kMaxLayoutBytes = size_t{1} << 20;
constexpr size_t kMaxFilePartBytes = size_t{1} << 20;

absl::StatusOr<std::optional<StateFormat>> FormatFromProto(int format) {
  if (format == v1::STATE_FORMAT_UNSPECIFIED) return std::nullopt;
  if (format < v1::STATE_FORMAT_NATIVE || format > v1::STATE_FORMAT_LLAMA_SHARP) {
    return absl::InvalidArgumentError(absl::StrCat("format is ", format, ", known are 1 to 4"));
  }
  return static_cast<StateFormat>(format);
}

absl::StatusOr<FileLayout> LayoutFromProto(const v1::FileLayout& proto) {
  if (proto.mlx_layout().size() > kMaxLayoutBytes ||
      proto.llama_sharp_json().size() > kMaxLayoutBytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        "layout has ", proto.mlx_layout().size(), " bytes of mlx_layout and ",
        proto.llama_sharp_json().size(), " of llama_sharp_json, at most ", kMaxLayoutBytes));
  }
  FileLayout layout;
  switch (proto.llama_form()) {
    case v1::FileLayout::LLAMA_FORM_UNSPECIFIED:
    case v1::FileLayout::LLAMA_FORM_FILE:
      layout.llama_form = LlamaCppForm::kFile;
      break;
    case v1::FileLayout::LLAMA_FORM_MEMORY:
      layout.llama_form = LlamaCppForm::kMemory;
      break;
    case v1::FileLayout::LLAMA_FORM_BODY:
      layout.llama_form = LlamaCppForm::kBody;
      break;
    default:
      return absl::InvalidArgumentError(absl::StrCat("layout.llama_form is ", proto.llama_form()));
  }
  if (proto.llama_version() != 0) layout.llama_version = proto.llama_version();
  layout.llama_sequence_id = proto.llama_sequence_id();
  layout.llama_v_transposed = proto.llama_v_transposed();
  layout.llama_num_streams = std::max<uint32_t>(1, proto.llama_num_streams());
  if (layout.llama_num_streams > 4096) {
    return absl::InvalidArgumentError(
        absl::StrCat("layout.llama_num_streams is ", layout.llama_num_streams, ", at most 4096"));
  }
  layout.llama_stream = proto.llama_stream();
  for (const v1::FileLayout::LlamaCells& cells : proto.llama_cells()) {
    layout.llama_cells.emplace_back(cells.positions().begin(), cells.positions().end());
  }
  layout.mlx_layout = proto.mlx_layout();
  layout.mlx_legacy = proto.mlx_legacy();
  layout.mlx_metadata.insert(proto.mlx_metadata().begin(), proto.mlx_metadata().end());
  layout.llama_sharp_json = proto.llama_sharp_json();
  return layout;
}

void LayoutToProto(const ImportResult& result, v1::FileLayout* proto) {
  const FileLayout& layout = result.layout;
  if (result.format == StateFormat::kLlamaCpp || result.format == StateFormat::kLlamaSharp) {
    proto->set_llama_form(static_cast<v1::FileLayout::LlamaForm>(layout.llama_form));
    proto->set_llama_version(layout.llama_version);
    proto->set_llama_sequence_id(layout.llama_sequence_id);
    proto->set_llama_v_transposed(layout.llama_v_transposed);
    proto->set_llama_num_streams(layout.llama_num_streams);
    proto->set_llama_stream(layout.llama_stream);
    for (const std::vector<uint32_t>& cells : layout.llama_cells) {
      proto->add_llama_cells()->mutable_positions()->Add(cells.begin(), cells.end());
    }
    proto->set_llama_sharp_json(layout.llama_sharp_json);
  } else if (result.format == StateFormat::kMlx) {
    proto->set_mlx_legacy(layout.mlx_legacy);
    // What would not fit into an answer is left out, like a layout beyond the limit.
    uint64_t metadata_bytes = 0;
    for (const auto& [key, value] : layout.mlx_metadata)
      metadata_bytes += key.size() + value.size();
    if (metadata_bytes <= kMaxLayoutBytes) {
      for (const auto& [key, value] : layout.mlx_metadata) {
        (*proto->mutable_mlx_metadata())[key] = value;
      }
    }
    // Beyond the limit the caller makes a new header of the same rows.
    if (layout.mlx_layout.size() <= kMaxLayoutBytes) proto->set_mlx_layout(layout.mlx_layout);
  }
}

void CountBytes(Worker* worker, absl::string_view name, absl::string_view help, StateFormat format,
                uint64_t bytes) {
  static constexpr const char* kNames[] = {"", "native", "llama_cpp", "mlx", "llama_sharp"};
  worker->metrics()
      .GetCounter(name, help, {{"format", kNames[static_cast<int>(format)]}})
      ->Add(static_cast<double>(bytes));
}

absl::Status ExportTo(Worker* worker, const CallContext& call,
                      const v1::ExportSequenceRequest& request,
                      grpc::ServerWriter<v1::ExportSequenceResponse>* writer) {
  PT_ASSIGN_OR_RETURN(const SequenceTarget target, FindSequence(*worker, request.sequence_id()));
  PT_ASSIGN_OR_RETURN(const std::optional<StateFormat> asked, FormatFromProto(request.format()));
  const StateFormat format = asked.value_or(StateFormat::kNative);
  PT_ASSIGN_OR_RETURN(const FileLayout layout, LayoutFromProto(request.layout()));
  PT_ASSIGN_OR_RETURN(
      const std::unique_ptr<SequenceExport> exported,
      SequenceExport::Begin(target.host, call.tenant, target.id, format, layout, call.deadline));
  v1::ExportSequenceResponse message;
  message.mutable_header()->set_total_bytes(exported->total_bytes());
  message.mutable_header()->set_tokens(exported->num_tokens());
  message.mutable_header()->set_format(static_cast<v1::StateFormat>(format));
  const absl::Status left = absl::CancelledError("export: the reader left");
  if (!writer->Write(message)) return left;
  message.Clear();
  uint64_t sent = 0;
  PT_RETURN_IF_ERROR(exported->Write([&](absl::string_view part) -> absl::Status {
    message.set_data(part.data(), part.size());
    if (!writer->Write(message)) return left;
    sent += part.size();
    return absl::OkStatus();
  }));
  if (sent != exported->total_bytes()) {
    return absl::InternalError(
        absl::StrCat("export: ", sent, " bytes were written, ", exported->total_bytes(), " said"));
  }
  CountBytes(worker, "pagetide_worker_exported_bytes_total",
             "Bytes of files that sequences were exported to", format, sent);
  return absl::OkStatus();
}

}  // namespace

SessionServiceImpl::SessionServiceImpl(Worker* worker, Sessions* sessions, RequestMemos* memos,
                                       StreamDeadlines* deadlines, const FileLimits& limits)
    : worker_(worker),
      sessions_(sessions),
      memos_(memos),
      deadlines_(deadlines),
      file_limits_(limits),
      import_slots_({.what = "imports",
                     .reason = "TOO_MANY_IMPORTS",
                     .in_all = limits.max_running,
                     .per_tenant = limits.max_running_of_tenant}),
      export_slots_({.what = "exports",
                     .reason = "TOO_MANY_EXPORTS",
                     .in_all = limits.max_running,
                     .per_tenant = limits.max_running_of_tenant}),
      import_threads_({.name = "import",
                       .num_threads = static_cast<int>(limits.max_running),
                       .max_queue = limits.max_running}) {}

grpc::Status SessionServiceImpl::ExportSequence(
    grpc::ServerContext* context, const v1::ExportSequenceRequest* request,
    grpc::ServerWriter<v1::ExportSequenceResponse>* writer) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto run = [&]() -> absl::Status {
    PT_ASSIGN_OR_RETURN(const auto slot, export_slots_.Take(call.tenant.name));
    const StreamDeadlines::Watch watch(deadlines_, context, call.end, "export sequence");
    return ExportTo(worker_, call, *request, writer);
  };
  const absl::Status status = run();
  if (!status.ok()) {
    worker_->metrics()
        .GetCounter("pagetide_worker_exports_refused_total",
                    "Exports that ended without a file, by the code of the answer",
                    {{"code", absl::StatusCodeToString(status.code())}})
        ->Add(1);
  }
  return ToGrpcStatus(status);
}

absl::StatusOr<std::optional<v1::ImportSequenceRequest>> SessionServiceImpl::NextPart(
    const CallContext& call, ImportStream* stream, absl::string_view request_id,
    uint64_t received) const {
  const auto what = [&] {
    return absl::StrCat("import sequence", request_id.empty() ? "" : " ", request_id, ": ");
  };
  const Clock& clock = worker_->clock();
  v1::ImportSequenceRequest message;
  switch (stream->Read(&message,
                       std::min(call.deadline, clock.MonotonicNow() + file_limits_.max_idle))) {
    case ImportStream::Outcome::kMessage:
      return message;
    case ImportStream::Outcome::kEnd:
      return std::nullopt;
    case ImportStream::Outcome::kLate:
      if (clock.MonotonicNow() >= call.deadline) {
        return absl::DeadlineExceededError(
            absl::StrCat(what(), "its time was up behind byte ", received, "; nothing was kept"));
      }
      return WithReason(
          absl::DeadlineExceededError(
              absl::StrCat(what(), "nothing came for ", absl::FormatDuration(file_limits_.max_idle),
                           " behind byte ", received, "; nothing was kept")),
          "IMPORT_IDLE");
    case ImportStream::Outcome::kBroken:
      break;
  }
  return absl::CancelledError(absl::StrCat(what(), "the stream broke behind byte ", received));
}

absl::StatusOr<v1::ImportSequenceResponse> SessionServiceImpl::Import(
    const CallContext& call, const v1::ImportSequenceRequest::Header& header,
    ImportStream* stream) {
  ImportOptions options;
  PT_ASSIGN_OR_RETURN(options.format, FormatFromProto(header.format()));
  options.tokens.assign(header.tokens().begin(), header.tokens().end());
  switch (header.basis()) {
    case v1::ImportSequenceRequest::Header::BASIS_UNSPECIFIED:
      break;
    case v1::ImportSequenceRequest::Header::BASIS_PLAIN:
      options.basis = LayerGroupSpec::Basis::kPlain;
      break;
    case v1::ImportSequenceRequest::Header::BASIS_HADAMARD:
      options.basis = LayerGroupSpec::Basis::kHadamard;
      break;
    default:
      return absl::InvalidArgumentError(absl::StrCat("basis is ", header.basis()));
  }
  // Before any byte is taken: the model must be there.
  PT_ASSIGN_OR_RETURN(ModelHost* const host,
                      worker_->HostOfModel(header.model_digest(), call.deadline));
  PT_ASSIGN_OR_RETURN(const std::unique_ptr<SpoolFile> spool,
                      SpoolFile::Create(file_limits_.folder, file_limits_.max_bytes));
  for (;;) {
    PT_ASSIGN_OR_RETURN(const std::optional<v1::ImportSequenceRequest> part,
                        NextPart(call, stream, header.request_id(), spool->size()));
    if (!part) break;
    if (part->has_header()) return absl::InvalidArgumentError("a second header in the stream");
    if (part->data().size() > kMaxFilePartBytes) {
      return absl::InvalidArgumentError(absl::StrCat("data has ", part->data().size(),
                                                     " bytes, a part at most ", kMaxFilePartBytes));
    }
    PT_RETURN_IF_ERROR(spool->Append(part->data()));
  }
  PT_ASSIGN_OR_RETURN(const absl::string_view file, spool->Map());
  PT_ASSIGN_OR_RETURN(const ImportResult result,
                      ImportSequenceFile(host, call.tenant, file, options, call.deadline));
  worker_->NoteSequence(*host, result.info);
  v1::ImportSequenceResponse response;
  *response.mutable_state() = StateToProto(*worker_, *host, result.info);
  response.set_format(static_cast<v1::StateFormat>(result.format));
  response.set_file_bytes(file.size());
  response.set_canonical(result.is_canonical);
  LayoutToProto(result, response.mutable_layout());
  CountBytes(worker_, "pagetide_worker_imported_bytes_total",
             "Bytes of files that sequences were made from", result.format, file.size());
  return response;
}

absl::StatusOr<v1::ImportSequenceResponse> SessionServiceImpl::ImportOnce(const CallContext& call,
                                                                          ImportStream* stream) {
  PT_ASSIGN_OR_RETURN(const std::optional<v1::ImportSequenceRequest> first,
                      NextPart(call, stream, "", 0));
  if (!first || !first->has_header()) {
    return absl::InvalidArgumentError("the first message has no header");
  }
  // The bytes are not part of what makes two requests the same: a retry sends the same file.
  return memos_->OncePerTenant<v1::ImportSequenceResponse>(
      call.tenant.name, first->header().request_id(), DigestOfMessage(*first), call.deadline,
      [&]() -> absl::StatusOr<v1::ImportSequenceResponse> {
        auto imported = Import(call, first->header(), stream);
        // Broken meanwhile: the caller gets nothing of it.
        if (imported.ok() && stream->is_broken()) {
          const auto target = FindSequence(*worker_, imported->state().sequence_id());
          if (target.ok()) {
            (void)target->host->Close(call.tenant, target->id, imported->state().epoch());
            worker_->NoteClosed(*target->host, call.tenant, target->id);
          }
          return absl::CancelledError("import: the stream broke; nothing was kept");
        }
        return imported;
      });
}

grpc::ServerReadReactor<v1::ImportSequenceRequest>* SessionServiceImpl::ImportSequence(
    grpc::CallbackServerContext* context, v1::ImportSequenceResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  auto* const stream = new ImportStream(context, &worker_->clock());  // deletes itself
  const auto finish = [this, stream, response](absl::StatusOr<v1::ImportSequenceResponse> answer) {
    if (answer.ok()) {
      *response = *std::move(answer);
    } else {
      worker_->metrics()
          .GetCounter("pagetide_worker_imports_refused_total",
                      "Files that no sequence was made from, by the code of the answer",
                      {{"code", absl::StatusCodeToString(answer.status().code())}})
          ->Add(1);
    }
    stream->Finish(ToGrpcStatus(answer.status()));
  };
  auto taken = import_slots_.Take(call.tenant.name);
  absl::Status status = taken.status();
  if (taken.ok()) {
    // Shared only because a task must be copyable.
    std::shared_ptr<StreamSlots::Slot> slot = *std::move(taken);
    stream->StartSendInitialMetadata();  // tells the caller that it has a place
    status = import_threads_.Schedule([this, call, stream, finish, slot]() mutable {
      auto answer = ImportOnce(call, stream);
      slot.reset();  // free when the caller has its answer
      finish(std::move(answer));
    });
  }
  if (!status.ok()) finish(status);
  return stream;
}

}  // namespace pagetide
