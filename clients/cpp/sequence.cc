#include "clients/cpp/sequence.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/error_info.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "clients/cpp/batch_step.h"
#include "clients/cpp/in_place_rows.h"
#include "clients/cpp/inputs.h"
#include "clients/cpp/request_id.h"
#include "clients/cpp/row_checks.h"
#include "rpc/duration_proto.h"

namespace pagetide {
namespace {

using Service = v1::SequenceService::StubInterface;

constexpr size_t kMaxPartBytes = size_t{1} << 20;
constexpr absl::Duration kCloseTimeout = absl::Seconds(2);
constexpr char kAppendTokens[] = "/pagetide.v1.SequenceService/AppendTokens";
constexpr char kReadRows[] = "/pagetide.v1.SequenceService/ReadRows";

v1::RowKind ToProto(RowKind kind) {
  return kind == RowKind::kK ? v1::ROW_KIND_K : v1::ROW_KIND_V;
}

absl::Status CopyFloats(absl::string_view field, const std::string& bytes, std::span<float> out) {
  if (bytes.size() != out.size_bytes()) {
    return absl::InternalError(absl::StrCat("attend: the answer has ", bytes.size(), " bytes of ",
                                            field, ", expected ", out.size_bytes()));
  }
  std::memcpy(out.data(), bytes.data(), bytes.size());
  return absl::OkStatus();
}

}  // namespace

Sequence::Sequence(std::shared_ptr<WorkerConnection> worker, std::shared_ptr<const Model> model,
                   v1::SequenceState state)
    : worker_(std::move(worker)), model_(std::move(model)), state_(std::move(state)) {}

Sequence::~Sequence() {
  if (is_closed_) return;
  v1::CloseSequenceRequest request;
  request.set_sequence_id(state_.sequence_id());
  request.set_epoch(state_.epoch());
  CallOptions once{.timeout = kCloseTimeout};
  once.retry.max_attempts = 1;
  const auto closed = CallUnary(once, worker_->sequences(), &Service::CloseSequence, request);
  if (!closed.ok()) {
    LogInfo("client", "close sequence ", state_.sequence_id(), ": ", closed.status().message());
  }
}

v1::SequenceRef Sequence::Ref() const {
  v1::SequenceRef ref;
  ref.set_sequence_id(state_.sequence_id());
  ref.set_epoch(state_.epoch());
  return ref;
}

absl::StatusOr<uint64_t> Sequence::WaitReady(std::string* shortened_because) {
  v1::WatchReadinessRequest request;
  request.set_sequence_id(state_.sequence_id());
  const auto watch = [&](absl::Duration time_left) -> absl::StatusOr<v1::WatchReadinessResponse> {
    grpc::ClientContext context;
    SetDeadline(&context, time_left);
    const auto stream = worker_->sequences()->WatchReadiness(&context, request);
    v1::WatchReadinessResponse message;
    while (stream->Read(&message)) {
    }
    PT_RETURN_IF_ERROR(FromGrpcStatus(stream->Finish()));
    if (!message.done()) {
      return absl::InternalError(absl::StrCat("watch readiness of ", state_.sequence_id(),
                                              ": the stream ended before it was done"));
    }
    return message;
  };
  const CallOptions& options = worker_->call_options();
  PT_ASSIGN_OR_RETURN(const v1::WatchReadinessResponse last,
                      CallWithRetry(options.retry, options.timeout, watch));
  // Shortened: where the next token goes and the revision are others too.
  if (last.length() != state_.length()) PT_RETURN_IF_ERROR(Refresh());
  if (shortened_because != nullptr) *shortened_because = last.shortened_because();
  return last.length();
}

absl::Status Sequence::Refresh() {
  v1::GetSequenceRequest request;
  request.set_sequence_id(state_.sequence_id());
  PT_ASSIGN_OR_RETURN(
      v1::GetSequenceResponse response,
      CallUnary(worker_->call_options(), worker_->sequences(), &Service::GetSequence, request));
  state_ = std::move(*response.mutable_state());
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<PendingAppend>> Sequence::BeginAppend(
    std::span<const uint32_t> tokens, bool will_attend, std::span<const PositionedInput> inputs) {
  std::unique_ptr<PendingAppend> append(new PendingAppend(this));
  append->append_id_ = NewRequestId();
  SetDeadline(&append->context_, worker_->call_options().timeout);
  PT_ASSIGN_OR_RETURN(append->channel_, worker_->BulkChannel());
  append->stream_ =
      StartRawWriter(append->channel_.get(), kAppendTokens, &append->context_, &append->response_);
  v1::AppendTokensRequest message;
  v1::AppendHeader* header = message.mutable_header();
  header->set_request_id(append->append_id_);
  *header->mutable_sequence() = Ref();
  header->set_append_id(append->append_id_);
  header->set_expected_length(length());
  header->mutable_tokens()->Add(tokens.begin(), tokens.end());
  AddInputs(inputs, header->mutable_inputs());
  header->set_pin_prefix(will_attend);
  PT_RETURN_IF_ERROR(append->Write(EncodeMessage(message)));
  return append;
}

absl::StatusOr<std::unique_ptr<PendingStep>> Sequence::BeginStep(uint32_t num_tokens,
                                                                 bool will_attend) {
  Sequence* const self = this;
  PT_ASSIGN_OR_RETURN(std::unique_ptr<BatchStep> step,
                      BatchStep::Begin(std::span(&self, 1), num_tokens, will_attend));
  return std::unique_ptr<PendingStep>(new PendingStep(std::move(step)));
}

absl::StatusOr<std::unique_ptr<InPlaceRows>> Sequence::ReadInPlace(absl::Duration lease) {
  PT_RETURN_IF_ERROR(InPlaceRows::CheckLease(lease));
  // Loaded as another model whose rows are the same: its frames lie in that one's pool.
  if (state_.model_digest() != model_->digest().ToHex()) {
    return absl::FailedPreconditionError(
        absl::StrCat("read in place: ", id(), " is held as model ", state_.model_digest()));
  }
  PT_ASSIGN_OR_RETURN(std::shared_ptr<LocalStaging> memory,
                      worker_->SharedPool(model_->digest().ToHex()));
  v1::GetBlockTableRequest request;
  request.set_sequence_id(state_.sequence_id());
  // Of two hosts with the same socket path it tells which worker's pool was mapped.
  request.set_local_client_id(memory->client_id());
  *request.mutable_lease() = DurationToProto(lease);
  const MonotonicTime sent = Clock::Real()->MonotonicNow();
  const auto call = [&]() {
    return CallUnary(worker_->call_options(), worker_->sequences(), &Service::GetBlockTable,
                     request);
  };
  absl::StatusOr<v1::GetBlockTableResponse> first = call();
  if (GetReason(first.status()) == "LOCAL_CLIENT_NOT_FOUND") {
    return absl::FailedPreconditionError(absl::StrCat("read in place: ", first.status().message()));
  }
  PT_RETURN_IF_ERROR(first.status());
  v1::GetBlockTableResponse table = *std::move(first);
  request.clear_lease();
  request.set_lease_id(table.lease_id());
  while (!table.next_page_token().empty()) {
    request.set_page_token(table.next_page_token());
    PT_ASSIGN_OR_RETURN(const v1::GetBlockTableResponse more, call());
    table.mutable_extents()->MergeFrom(more.extents());
    table.set_next_page_token(more.next_page_token());
  }
  state_ = table.state();
  return InPlaceRows::Create(std::move(memory), model_, table, sent + lease);
}

absl::Status Sequence::Attend(const AttendCall& call) {
  v1::AttendRequest request;
  return Attend(call, &request);
}

absl::Status Sequence::Attend(const AttendCall& call, v1::AttendRequest* request) {
  PT_RETURN_IF_ERROR(CheckLayer(*model_, call.group, call.layer));
  const LayerGroupSpec& group = model_->geometry().group(call.group).spec();
  const size_t query_width = static_cast<size_t>(call.query_heads) * group.k_dim;
  if (query_width == 0 || call.queries.empty() || call.queries.size() % query_width != 0) {
    return absl::InvalidArgumentError(absl::StrCat("attend: queries has ", call.queries.size(),
                                                   " elements, expected a multiple of ",
                                                   query_width));
  }
  const size_t num_queries = call.queries.size() / query_width;
  if (call.outputs.size() != num_queries * call.query_heads * group.v_dim ||
      (!call.log_sum_exp.empty() && call.log_sum_exp.size() != num_queries * call.query_heads)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "attend: outputs has ", call.outputs.size(), " elements and log_sum_exp ",
        call.log_sum_exp.size(), " for ", num_queries, " queries of ", call.query_heads, " heads"));
  }
  request->set_sequence_id(state_.sequence_id());
  request->set_epoch(state_.epoch());
  request->set_group(call.group);
  request->set_layer(call.layer);
  request->set_num_queries(static_cast<uint32_t>(num_queries));
  request->set_query_heads(call.query_heads);
  request->set_first_position(call.first_position);
  request->set_scale(call.scale);
  request->set_allow_behind_end(call.allow_behind_end);
  request->set_queries(call.queries.data(), call.queries.size_bytes());
  PT_ASSIGN_OR_RETURN(
      const v1::AttendResponse response,
      CallUnary(worker_->call_options(), worker_->sequences(), &Service::Attend, *request));
  PT_RETURN_IF_ERROR(CopyFloats("outputs", response.outputs(), call.outputs));
  if (call.log_sum_exp.empty()) return absl::OkStatus();
  return CopyFloats("log_sum_exp", response.log_sum_exp(), call.log_sum_exp);
}

absl::Status Sequence::ReadRows(uint32_t group, uint64_t begin, uint64_t end,
                                std::span<const uint32_t> layers,
                                absl::FunctionRef<absl::Status(const RowsPart&)> sink) {
  std::vector<std::byte> joined;
  return ReadRowPieces(group, begin, end, layers, [&](const RowsPieces& rows) -> absl::Status {
    RowsPart part{rows.layer, rows.kind, rows.first_token, rows.num_tokens, {}};
    if (rows.bytes->num_pieces() == 1) {
      part.bytes = rows.bytes->piece(0);
    } else {
      joined.resize(rows.bytes->size());
      PT_RETURN_IF_ERROR(rows.bytes->CopyTo(joined));
      part.bytes = joined;
    }
    return sink(part);
  });
}

absl::Status Sequence::ReadRowPieces(uint32_t group, uint64_t begin, uint64_t end,
                                     std::span<const uint32_t> layers,
                                     absl::FunctionRef<absl::Status(const RowsPieces&)> sink) {
  PT_RETURN_IF_ERROR(CheckLayer(*model_, group, 0));
  v1::ReadRowsRequest request;
  request.set_sequence_id(state_.sequence_id());
  request.set_group(group);
  request.set_begin(begin);
  request.set_end(end);
  request.mutable_layers()->Add(layers.begin(), layers.end());
  absl::Status sink_status;
  bool has_delivered = false;
  const auto deliver = [&](const grpc::ByteBuffer& bytes) -> absl::Status {
    v1::ReadRowsResponse message;
    PayloadView data;
    PT_RETURN_IF_ERROR(
        DecodeWithPayload(bytes, v1::ReadRowsResponse::kDataFieldNumber, &message, &data));
    const RowKind kind = message.kind() == v1::ROW_KIND_K ? RowKind::kK : RowKind::kV;
    const uint64_t expected =
        uint64_t{message.num_tokens()} * model_->geometry().group(group).row_bytes(kind);
    if (data.size() != expected) {
      return absl::DataLossError(absl::StrCat("read rows of ", id(), ": part of ", data.size(),
                                              " bytes, expected ", expected));
    }
    has_delivered = true;
    return sink({message.layer(), kind, message.first_token(), message.num_tokens(), &data});
  };
  const auto read = [&](absl::Duration time_left) -> absl::Status {
    grpc::ClientContext context;
    SetDeadline(&context, time_left);
    PT_ASSIGN_OR_RETURN(const auto channel, worker_->BulkChannel());
    const auto stream = StartRawReader(channel.get(), kReadRows, &context, EncodeMessage(request));
    grpc::ByteBuffer message;
    while (sink_status.ok() && stream->Read(&message)) sink_status = deliver(message);
    if (!sink_status.ok()) context.TryCancel();
    const absl::Status status = FromGrpcStatus(stream->Finish());
    if (!sink_status.ok()) return sink_status;
    if (absl::IsUnavailable(status)) worker_->DropBulkChannel(channel);
    if (absl::IsUnavailable(status) && has_delivered) {
      // The sink has seen parts: another attempt would show them twice.
      return absl::AbortedError(absl::StrCat("read rows: ", status.message()));
    }
    return status;
  };
  const CallOptions& options = worker_->call_options();
  return CallWithRetry(options.retry, options.timeout, read);
}

absl::StatusOr<v1::SaveSessionResponse> Sequence::Save(absl::string_view name,
                                                       const SaveOptions& options) {
  v1::SaveSessionRequest request;
  request.set_request_id(NewRequestId());
  *request.mutable_sequence() = Ref();
  request.set_name(std::string(name));
  request.mutable_metadata()->insert(options.metadata.begin(), options.metadata.end());
  if (options.expected_version) request.set_expected_version(*options.expected_version);
  if (options.keep_tokens) request.set_keep_tokens(*options.keep_tokens);
  request.set_compact(options.compact);
  return CallUnary(worker_->call_options(), worker_->sessions(),
                   &v1::SessionService::StubInterface::SaveSession, request);
}

absl::StatusOr<uint64_t> Sequence::CreateCheckpoint(v1::Tier tier, v1::CheckpointScope scope) {
  v1::CreateCheckpointRequest request;
  request.set_request_id(NewRequestId());
  request.set_tier(tier);
  request.set_scope(scope);
  *request.mutable_sequence() = Ref();
  PT_ASSIGN_OR_RETURN(const v1::CreateCheckpointResponse response,
                      CallUnary(worker_->call_options(), worker_->sessions(),
                                &v1::SessionService::StubInterface::CreateCheckpoint, request));
  return response.checkpoint().checkpoint_id();
}

absl::Status Sequence::RestoreCheckpoint(uint64_t checkpoint_id) {
  v1::RestoreCheckpointRequest request;
  request.set_request_id(NewRequestId());
  *request.mutable_sequence() = Ref();
  request.set_checkpoint_id(checkpoint_id);
  PT_ASSIGN_OR_RETURN(v1::RestoreCheckpointResponse response,
                      CallUnary(worker_->call_options(), worker_->sessions(),
                                &v1::SessionService::StubInterface::RestoreCheckpoint, request));
  state_ = std::move(*response.mutable_state());
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Sequence>> Sequence::Fork(std::optional<uint64_t> length) {
  v1::ForkSequenceRequest request;
  request.set_request_id(NewRequestId());
  *request.mutable_source() = Ref();
  if (length.has_value()) request.set_length(*length);
  PT_ASSIGN_OR_RETURN(
      v1::ForkSequenceResponse response,
      CallUnary(worker_->call_options(), worker_->sequences(), &Service::ForkSequence, request));
  return std::unique_ptr<Sequence>(
      new Sequence(worker_, model_, std::move(*response.mutable_state())));
}

absl::Status Sequence::Close() {
  if (is_closed_) return absl::OkStatus();
  v1::CloseSequenceRequest request;
  request.set_sequence_id(state_.sequence_id());
  request.set_epoch(state_.epoch());
  PT_RETURN_IF_ERROR(
      CallUnary(worker_->call_options(), worker_->sequences(), &Service::CloseSequence, request)
          .status());
  is_closed_ = true;
  return absl::OkStatus();
}

PendingAppend::~PendingAppend() {
  if (stream_ == nullptr) return;
  context_.TryCancel();
  // A sync stream must be finished before it goes; cancelled, it is so at once.
  stream_->Finish();
}

absl::Status PendingAppend::Finish() {
  const absl::Status status = FromGrpcStatus(stream_->Finish());
  stream_ = nullptr;
  if (absl::IsUnavailable(status)) sequence_->worker_->DropBulkChannel(channel_);
  return status;
}

absl::Status PendingAppend::IsOver() const {
  return absl::FailedPreconditionError(
      absl::StrCat("append ", append_id_, " to ", sequence_->id(), " is over"));
}

absl::Status PendingAppend::Write(const grpc::ByteBuffer& message) {
  if (stream_ == nullptr) return IsOver();
  if (stream_->Write(message)) return absl::OkStatus();
  const absl::Status status = Finish();
  if (!status.ok()) return status;
  return absl::AbortedError(
      absl::StrCat("append ", append_id_, ": the worker ended the stream before the rows"));
}

absl::Status PendingAppend::WriteParts(
    uint32_t group, uint32_t layer, RowKind kind, uint32_t first_token,
    std::span<const std::byte> bytes,
    absl::FunctionRef<grpc::Slice(std::span<const std::byte>)> slice_of) {
  PT_RETURN_IF_ERROR(CheckLayer(sequence_->model(), group, layer));
  const size_t row_bytes = sequence_->model().geometry().group(group).row_bytes(kind);
  if (row_bytes == 0 || bytes.size() % row_bytes != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("write rows: ", bytes.size(), " bytes, expected a multiple of ", row_bytes));
  }
  const size_t part_bytes = std::max(kMaxPartBytes / row_bytes, size_t{1}) * row_bytes;
  v1::RowPart part;
  part.set_group(group);
  part.set_layer(layer);
  part.set_kind(ToProto(kind));
  for (size_t offset = 0; offset < bytes.size(); offset += part_bytes) {
    const auto piece = bytes.subspan(offset, std::min(part_bytes, bytes.size() - offset));
    part.set_first_token(first_token + static_cast<uint32_t>(offset / row_bytes));
    part.set_num_tokens(static_cast<uint32_t>(piece.size() / row_bytes));
    const grpc::Slice slice = slice_of(piece);
    PT_RETURN_IF_ERROR(
        Write(EncodeNestedPayload(v1::AppendTokensRequest::kRowsFieldNumber, part,
                                  v1::RowPart::kDataFieldNumber, std::span(&slice, 1))));
  }
  return absl::OkStatus();
}

absl::Status PendingAppend::WriteRows(uint32_t group, uint32_t layer, RowKind kind,
                                      uint32_t first_token, std::span<const std::byte> bytes) {
  return WriteParts(group, layer, kind, first_token, bytes, [](std::span<const std::byte> piece) {
    return grpc::Slice(piece.data(), piece.size());
  });
}

absl::Status PendingAppend::WriteLentRows(uint32_t group, uint32_t layer, RowKind kind,
                                          uint32_t first_token, std::span<const std::byte> bytes,
                                          std::shared_ptr<const void> owner) {
  return WriteParts(group, layer, kind, first_token, bytes,
                    [&](std::span<const std::byte> piece) { return LendSlice(piece, owner); });
}

absl::Status PendingAppend::Attend(const AttendCall& call) {
  if (stream_ == nullptr) return IsOver();
  if (!has_begun_) {
    // An Attend travels on another stream and would overtake the header. The worker sends its
    // initial metadata once the append can be attended under, or ends the stream.
    stream_->WaitForInitialMetadata();
    has_begun_ = true;
  }
  v1::AttendRequest request;
  request.set_append_id(append_id_);
  const absl::Status status = sequence_->Attend(call, &request);
  if (GetReason(status) != "APPEND_NOT_FOUND") return status;
  // The worker has ended the append; the stream's status says why.
  context_.TryCancel();
  const absl::Status ended = Finish();
  return ended.ok() || absl::IsCancelled(ended) ? status : ended;
}

absl::StatusOr<v1::AppendTokensResponse> PendingAppend::Commit() {
  if (stream_ == nullptr) return IsOver();
  stream_->WritesDone();  // false only if the stream is broken, which Finish reports
  PT_RETURN_IF_ERROR(Finish());
  v1::AppendTokensResponse response;
  PT_RETURN_IF_ERROR(DecodeMessage(response_, &response));
  sequence_->state_ = response.state();
  return response;
}

PendingStep::PendingStep(std::unique_ptr<BatchStep> step) : step_(std::move(step)) {}

PendingStep::~PendingStep() = default;

uint64_t PendingStep::first_position() const {
  return step_->first_position(0);
}

bool PendingStep::is_local() const {
  return step_->is_local();
}

absl::Status PendingStep::WriteRows(uint32_t group, uint32_t layer,
                                    std::span<const std::byte> k_rows,
                                    std::span<const std::byte> v_rows) {
  return step_->WriteRows(0, group, layer, k_rows, v_rows);
}

absl::Status PendingStep::Attend(const AttendCall& call) {
  return step_->Attend(0, call);
}

absl::Status PendingStep::Commit(std::span<const uint32_t> tokens) {
  PT_ASSIGN_OR_RETURN(const std::vector<absl::Status> results, step_->Commit({&tokens, 1}));
  return results[0];
}

}  // namespace pagetide
