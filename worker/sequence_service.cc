#include "worker/sequence_service.h"

#include <grpcpp/impl/codegen/method_handler.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "core/staging_layout.h"
#include "rpc/byte_buffer.h"
#include "rpc/status_mapping.h"

namespace pagetide {
namespace {

constexpr absl::Duration kDefaultReserveLease = absl::Seconds(30);
constexpr absl::Duration kMaxReserveLease = absl::Minutes(5);
// Staging outlives its reservation a little, so that a region is never given out again while a
// commit that came just in time still copies from it.
constexpr absl::Duration kStagingGrace = absl::Seconds(10);
constexpr int kMaxItems = 4096;
constexpr uint32_t kMaxReserveTokens = 1024;
constexpr uint32_t kDefaultListSize = 100;
constexpr uint32_t kMaxListSize = 1000;
// Messages of a WatchReadiness before the last. They fit the window of a stream, so that a caller
// who does not read them cannot block a call that holds frames or its place in the line for them.
constexpr int kMaxReadinessNews = 256;
constexpr absl::Duration kShutdownWait = absl::Seconds(10);

// Index of a method in its service: how grpc::Service numbers them.
int MethodIndex(const char* name) {
  return google::protobuf::DescriptorPool::generated_pool()
      ->FindServiceByName(v1::SequenceService::service_full_name())
      ->FindMethodByName(name)
      ->index();
}

// The floats of a bytes field. INVALID_ARGUMENT names the field unless there are exactly a × b × c.
absl::StatusOr<std::vector<float>> FloatsOf(absl::string_view field, absl::string_view bytes,
                                            uint64_t a, uint64_t b, uint64_t c) {
  uint64_t count = 0;
  uint64_t expected = 0;
  if (__builtin_mul_overflow(a, b, &count) || __builtin_mul_overflow(count, c, &count) ||
      __builtin_mul_overflow(count, sizeof(float), &expected) || bytes.size() != expected) {
    return absl::InvalidArgumentError(absl::StrCat(
        field, " has ", bytes.size(), " bytes, expected ", a, " x ", b, " x ", c, " f32"));
  }
  std::vector<float> floats(count);
  std::memcpy(floats.data(), bytes.data(), bytes.size());
  return floats;
}

// Writes rows that lie contiguously in memory.
absl::Status WriteContiguous(ModelHost* host, const Tenant& tenant, SequenceId id,
                             uint64_t pending_id, const RowRun& run,
                             std::span<const std::byte> bytes) {
  return host->WriteRows(tenant, id, pending_id, run, bytes.size(),
                         [&](uint64_t offset, std::span<std::byte> dst) {
                           std::memcpy(dst.data(), bytes.data() + offset, dst.size());
                         });
}

std::span<const std::byte> BytesOf(const std::string& data) {
  return std::as_bytes(std::span<const char>(data.data(), data.size()));
}

// Rows may be staged only by the sequence's owner: they lie where the owner's own go, and nothing
// checks them again before the commit.
absl::Status CheckEpoch(ModelHost* host, const Tenant& tenant, SequenceId id, uint64_t epoch) {
  PT_ASSIGN_OR_RETURN(const SequenceInfo info, host->Get(tenant, id));
  if (info.epoch == epoch) return absl::OkStatus();
  return WithReason(absl::FailedPreconditionError(absl::StrCat(
                        "sequence ", id.ToString(), ": epoch ", epoch, " != ", info.epoch)),
                    error_reason::kStaleEpoch, {{"epoch", absl::StrCat(info.epoch)}});
}

absl::Status NotReserved(uint64_t reservation_id) {
  return absl::NotFoundError(absl::StrCat("reservation_id ", reservation_id,
                                          ": rows_in_staging, but this worker has no local plane"));
}

}  // namespace

SequenceServiceImpl::SequenceServiceImpl(Worker* worker, RequestMemos* memos,
                                         LocalPlane* local_plane, const PromptPlanner* planner,
                                         Parking* parking)
    : worker_(worker),
      memos_(memos),
      local_plane_(local_plane),
      planner_(planner),
      parking_(parking) {
  // The two bulk methods are handled as raw byte streams. On the wire a stream of one message is
  // the same as one message, so the declared kinds of the methods (and reflection) stay true.
  using Handler =
      grpc::internal::BidiStreamingHandler<SequenceServiceImpl, grpc::ByteBuffer, grpc::ByteBuffer>;
  using Call = grpc::Status (SequenceServiceImpl::*)(grpc::ServerContext*, RawStream*);
  const auto replace = [this](const char* name, Call call) {
    // gRPC owns the handler.
    MarkMethodStreamed(
        MethodIndex(name),
        new Handler([call](SequenceServiceImpl* self, grpc::ServerContext* context,
                           RawStream* stream) { return (self->*call)(context, stream); },
                    this));
  };
  replace("AppendTokens", &SequenceServiceImpl::AppendRaw);
  replace("ReadRows", &SequenceServiceImpl::ReadRaw);
}

SequenceServiceImpl::~SequenceServiceImpl() {
  if (!lent_.Wait(kShutdownWait)) {
    LogError("worker", "the transport still holds frames ", absl::FormatDuration(kShutdownWait),
             " after the server's end");
  }
}

grpc::Status SequenceServiceImpl::OpenSequence(grpc::ServerContext* context,
                                               const v1::OpenSequenceRequest* request,
                                               v1::OpenSequenceResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto open = [&]() -> absl::StatusOr<v1::OpenSequenceResponse> {
    PT_ASSIGN_OR_RETURN(const auto inputs, InputsFromProto(request->inputs()));
    PT_ASSIGN_OR_RETURN(ModelHost * host,
                        worker_->HostOfModel(request->model_digest(), call.deadline));
    const PromptOptions options{.allow_full_reuse = request->allow_full_reuse(),
                                .no_reuse = request->no_reuse()};
    const PromptRequest prompt{
        .tokens = TokensOf(request->tokens()), .inputs = inputs, .options = options};
    PT_ASSIGN_OR_RETURN(const OpenResult result,
                        planner_->Open(call.tenant, host, prompt, request->plan().session(),
                                       request->plan().session_version(), call.deadline));
    worker_->NoteSequence(*host, result.info);
    v1::OpenSequenceResponse answer;
    *answer.mutable_state() = StateToProto(*worker_, *host, result.info);
    *answer.mutable_reuse() = ReuseToProto(result.reuse);
    answer.set_restoring_pages(result.restoring_pages);
    return answer;
  };
  auto answer = memos_->OncePerTenant<v1::OpenSequenceResponse>(
      call.tenant.name, request->request_id(), DigestOfMessage(*request), call.deadline, open);
  if (!answer.ok()) return ToGrpcStatus(answer.status());
  *response = *std::move(answer);
  return grpc::Status::OK;
}

grpc::Status SequenceServiceImpl::WatchReadiness(
    grpc::ServerContext* context, const v1::WatchReadinessRequest* request,
    grpc::ServerWriter<v1::WatchReadinessResponse>* writer) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto watch = [&]() -> absl::Status {
    PT_ASSIGN_OR_RETURN(const SequenceTarget target,
                        FindSequence(*worker_, request->sequence_id()));
    std::optional<uint64_t> seen;
    int num_told = 0;
    return target.host->WatchReadiness(
        call.tenant, target.id, call.deadline, [&](const Readiness& readiness) {
          if (context->IsCancelled()) return false;
          const bool is_news = seen != readiness.resident_tokens && num_told < kMaxReadinessNews;
          if (!readiness.done && !is_news) return true;
          seen = readiness.resident_tokens;
          ++num_told;
          v1::WatchReadinessResponse message;
          message.set_resident_tokens(readiness.resident_tokens);
          message.set_length(readiness.length);
          message.set_done(readiness.done);
          message.set_shortened_because(readiness.shortened_because);
          return writer->Write(message);
        });
  };
  return ToGrpcStatus(watch());
}

grpc::Status SequenceServiceImpl::AppendRaw(grpc::ServerContext* context, RawStream* stream) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto append = [&]() -> absl::Status {
    AppendMessage first;
    if (!stream->Read(first.buffer())) {
      return absl::InvalidArgumentError("the stream ended before its header");
    }
    PT_RETURN_IF_ERROR(first.Decode());
    if (!first.is_header()) {
      return absl::InvalidArgumentError("the first message of an append must be its header");
    }
    const v1::AppendHeader& header = first.header();
    PT_ASSIGN_OR_RETURN(
        const v1::AppendTokensResponse response,
        memos_->OncePerSequence<v1::AppendTokensResponse>(
            header.sequence().sequence_id(), header.request_id(), DigestOfMessage(header),
            call.deadline, [&] { return Append(call, context, header, stream); }));
    // A caller that left before its answer asks again with the same request_id.
    stream->Write(EncodeMessage(response));
    return absl::OkStatus();
  };
  return ToGrpcStatus(append());
}

absl::StatusOr<v1::AppendTokensResponse> SequenceServiceImpl::Append(const CallContext& call,
                                                                     grpc::ServerContext* context,
                                                                     const v1::AppendHeader& header,
                                                                     RawStream* stream) {
  PT_ASSIGN_OR_RETURN(const HandleTarget target, FindSequence(*worker_, header.sequence()));
  PT_ASSIGN_OR_RETURN(const auto inputs, InputsFromProto(header.inputs()));
  ModelHost* const host = target.host;
  const SequenceId id = target.handle.id;
  PT_ASSIGN_OR_RETURN(
      const PendingSlot slot,
      host->BeginAppend(call.tenant, target.handle, header.append_id(), header.expected_length(),
                        TokensOf(header.tokens()), inputs, header.pin_prefix(), call.deadline));
  // Tells the caller that Attend under this append finds it from now on. A caller that left is
  // noticed by the first Read.
  stream->SendInitialMetadata();
  const auto receive = [&]() -> absl::StatusOr<CommitResult> {
    AppendMessage message;
    // One message at a time: the frames are there, so rows go straight from the transport's slices
    // to their place, whatever the number of layers.
    ByteGauge::Hold staged(&worker_->staged_rows());
    while (stream->Read(message.buffer())) {
      staged.Set(message.buffer()->Length());
      PT_RETURN_IF_ERROR(message.Decode());
      if (message.is_header()) {
        return absl::InvalidArgumentError("an append has a second header");
      }
      PT_RETURN_IF_ERROR(
          host->WriteRows(call.tenant, id, slot.pending_id, message.run(), message.num_bytes(),
                          [&](uint64_t, std::span<std::byte> dst) { message.CopyNext(dst); }));
    }
    // The end of a stream and its loss look alike to Read. A loss that is noticed only later cannot
    // commit half an append either: Commit refuses unless all rows have arrived.
    if (context->IsCancelled()) {
      return absl::CancelledError(absl::StrCat("append ", header.append_id(), " to ",
                                               header.sequence().sequence_id(),
                                               ": the stream broke; nothing was changed"));
    }
    return host->Commit(call.tenant, target.handle, slot.pending_id, {});
  };
  const absl::StatusOr<CommitResult> result = receive();
  if (!result.ok()) {
    const absl::Status aborted = host->Abort(call.tenant, id, slot.pending_id);
    if (!aborted.ok() && !absl::IsNotFound(aborted)) {
      LogWarning("worker", "abort append: ", aborted.message());
    }
    return result.status();
  }
  worker_->NoteSequence(*host, result->info);
  v1::AppendTokensResponse response;
  *response.mutable_state() = StateToProto(*worker_, *host, result->info);
  response.set_appended_tokens(result->appended_tokens);
  response.set_pages_filled(result->pages_filled);
  response.set_pages_created(result->pages_created);
  return response;
}

grpc::Status SequenceServiceImpl::ReadRaw(grpc::ServerContext* context, RawStream* stream) {
  const CallContext call = MakeCallContext(*context, *worker_);
  grpc::ByteBuffer bytes;
  v1::ReadRowsRequest request;
  if (!stream->Read(&bytes)) return ToGrpcStatus(absl::InvalidArgumentError("no ReadRowsRequest"));
  if (const absl::Status decoded = DecodeMessage(bytes, &request); !decoded.ok()) {
    return ToGrpcStatus(decoded);
  }
  return ToGrpcStatus(Read(call, request, stream));
}

absl::Status SequenceServiceImpl::Read(const CallContext& call, const v1::ReadRowsRequest& request,
                                       RawStream* stream) {
  PT_ASSIGN_OR_RETURN(const SequenceTarget target, FindSequence(*worker_, request.sequence_id()));
  const PageGeometry& geometry = target.host->model().geometry();
  if (request.group() >= geometry.num_groups()) {
    return absl::InvalidArgumentError(
        absl::StrCat("group is ", request.group(), ", the model has ", geometry.num_groups()));
  }
  const GroupGeometry& group = geometry.group(request.group());
  std::vector<uint32_t> layers(request.layers().begin(), request.layers().end());
  for (uint32_t layer : layers) {
    if (layer >= group.num_layers()) {
      return absl::InvalidArgumentError(absl::StrCat("layers names ", layer, ", group ",
                                                     request.group(), " has ", group.num_layers()));
    }
  }
  if (layers.empty()) {
    for (uint32_t layer = 0; layer < group.num_layers(); ++layer) layers.push_back(layer);
  }
  PT_ASSIGN_OR_RETURN(const auto rows,
                      target.host->PinRows(call.tenant, target.id, request.group(), request.begin(),
                                           request.end(), call.deadline));
  if (!group.has_rows()) return ReadPages(target.host, rows, group.page_bytes(), stream);
  for (uint32_t layer : layers) {
    for (RowKind kind : {RowKind::kK, RowKind::kV}) {
      if (group.row_bytes(kind) == 0) continue;
      PT_RETURN_IF_ERROR(ReadLayer(target.host, rows, request.group(), layer, kind, stream));
    }
  }
  return absl::OkStatus();
}

absl::Status SequenceServiceImpl::ReadPages(
    ModelHost* host, const std::shared_ptr<const ModelHost::PinnedRows>& rows, uint64_t page_bytes,
    RawStream* stream) {
  std::byte* const view = host->pool().host_view();
  for (const ModelHost::PinnedRows::Run& run : rows->Runs(0, RowKind::kPage)) {
    for (uint64_t at = 0; at < page_bytes; at += kMaxPartBytes) {
      v1::ReadRowsResponse header;
      header.set_kind(v1::ROW_KIND_PAGE);
      header.set_first_token(run.first_token);
      header.set_num_tokens(run.num_tokens);
      header.set_page_offset(static_cast<uint32_t>(at));
      const uint64_t num_bytes = std::min(kMaxPartBytes, page_bytes - at);
      std::vector<grpc::Slice> slices;
      if (view != nullptr) {
        slices.push_back(lent_.Lend(rows, {view + run.offset + at, num_bytes}));
      } else {
        grpc::Slice copy(num_bytes);
        auto* const to = reinterpret_cast<std::byte*>(const_cast<uint8_t*>(copy.begin()));
        PT_RETURN_IF_ERROR(host->pool().Read(run.offset + at, {to, num_bytes}));
        slices.push_back(std::move(copy));
      }
      const grpc::ByteBuffer message =
          EncodeWithPayload(header, v1::ReadRowsResponse::kDataFieldNumber, slices);
      if (!stream->Write(message)) return absl::CancelledError("the reader left");
    }
  }
  return absl::OkStatus();
}

absl::Status SequenceServiceImpl::ReadLayer(
    ModelHost* host, const std::shared_ptr<const ModelHost::PinnedRows>& rows, uint32_t group,
    uint32_t layer, RowKind kind, RawStream* stream) {
  // Below this a slice of its own costs more than the copy.
  constexpr uint64_t kMinLentBytes = 16 * kKiB;
  const uint64_t row_bytes = host->model().geometry().group(group).row_bytes(kind);
  const uint64_t rows_a_part = std::max<uint64_t>(1, kMaxPartBytes / row_bytes);
  DevicePool& pool = host->pool();
  const std::byte* const view = pool.host_view();

  uint64_t first_token = 0;
  uint64_t num_tokens = 0;
  std::vector<grpc::Slice> slices;
  const auto flush = [&]() -> absl::Status {
    if (num_tokens == 0) return absl::OkStatus();
    v1::ReadRowsResponse header;
    header.set_layer(layer);
    header.set_kind(kind == RowKind::kK ? v1::ROW_KIND_K : v1::ROW_KIND_V);
    header.set_first_token(first_token);
    header.set_num_tokens(static_cast<uint32_t>(num_tokens));
    const grpc::ByteBuffer message =
        EncodeWithPayload(header, v1::ReadRowsResponse::kDataFieldNumber, slices);
    slices.clear();
    num_tokens = 0;
    if (!stream->Write(message)) return absl::CancelledError("the reader left");
    return absl::OkStatus();
  };
  for (const ModelHost::PinnedRows::Run& run : rows->Runs(layer, kind)) {
    for (uint64_t done = 0; done < run.num_tokens;) {
      if (num_tokens == 0) first_token = run.first_token + done;
      const uint64_t take = std::min(run.num_tokens - done, rows_a_part - num_tokens);
      const uint64_t offset = run.offset + done * row_bytes;
      const uint64_t num_bytes = take * row_bytes;
      if (run.shift != 0) {
        grpc::Slice copy(num_bytes);
        auto* const to = reinterpret_cast<std::byte*>(const_cast<uint8_t*>(copy.begin()));
        PT_RETURN_IF_ERROR(pool.ReadShifted(host->model().geometry().group(group), offset,
                                            static_cast<uint32_t>(take), run.shift,
                                            {to, num_bytes}));
        slices.push_back(std::move(copy));
      } else if (view != nullptr && num_bytes >= kMinLentBytes) {
        slices.push_back(lent_.Lend(rows, {view + offset, num_bytes}));
      } else {
        grpc::Slice copy(num_bytes);
        // A slice made by size is ours alone until it is handed on.
        auto* const to = reinterpret_cast<std::byte*>(const_cast<uint8_t*>(copy.begin()));
        PT_RETURN_IF_ERROR(pool.Read(offset, {to, num_bytes}));
        slices.push_back(std::move(copy));
      }
      done += take;
      num_tokens += take;
      if (num_tokens == rows_a_part) PT_RETURN_IF_ERROR(flush());
    }
  }
  return flush();
}

grpc::Status SequenceServiceImpl::ReserveSlots(grpc::ServerContext* context,
                                               const v1::ReserveSlotsRequest* request,
                                               v1::ReserveSlotsResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  auto answer = memos_->OncePerTenant<v1::ReserveSlotsResponse>(
      call.tenant.name, request->request_id(), DigestOfMessage(*request), call.deadline,
      [&] { return Reserve(call, *request); });
  if (!answer.ok()) return ToGrpcStatus(answer.status());
  *response = *std::move(answer);
  return grpc::Status::OK;
}

absl::StatusOr<v1::ReserveSlotsResponse> SequenceServiceImpl::Reserve(
    const CallContext& call, const v1::ReserveSlotsRequest& request) {
  if (request.items_size() < 1 || request.items_size() > kMaxItems) {
    return absl::InvalidArgumentError(
        absl::StrCat("items has ", request.items_size(), " entries, must have 1 to ", kMaxItems));
  }
  PT_ASSIGN_OR_RETURN(absl::Duration lease, DurationFromProto("lease", request.lease()));
  if (lease == absl::ZeroDuration()) lease = kDefaultReserveLease;
  if (lease > kMaxReserveLease) {
    return absl::InvalidArgumentError(absl::StrCat("lease is ", absl::FormatDuration(lease),
                                                   ", must be at most ",
                                                   absl::FormatDuration(kMaxReserveLease)));
  }
  ModelHost* host = nullptr;
  std::vector<ReserveItem> items;
  items.reserve(request.items_size());
  for (int i = 0; i < request.items_size(); ++i) {
    const v1::ReserveSlotsRequest::Item& item = request.items(i);
    if (item.num_tokens() < 1 || item.num_tokens() > kMaxReserveTokens) {
      return absl::InvalidArgumentError(absl::StrCat("items[", i, "].num_tokens is ",
                                                     item.num_tokens(), ", must be 1 to ",
                                                     kMaxReserveTokens));
    }
    PT_ASSIGN_OR_RETURN(const HandleTarget target, FindSequence(*worker_, item.sequence()));
    if (host != nullptr && host != target.host) {
      return absl::InvalidArgumentError(
          absl::StrCat("items[", i, "] is of model ", target.host->model().digest().ToShortHex(),
                       ", items[0] of ", host->model().digest().ToShortHex(),
                       ": one call reserves for one model"));
    }
    host = target.host;
    items.push_back({target.handle, item.num_tokens(),
                     std::vector<int32_t>(item.parents().begin(), item.parents().end())});
  }
  PT_ASSIGN_OR_RETURN(
      const std::vector<PendingSlot> slots,
      host->Reserve(call.tenant, items, lease, request.pin_prefix(), call.deadline));
  v1::ReserveSlotsResponse response;
  absl::Status staged;
  for (const PendingSlot& slot : slots) {
    v1::ReserveSlotsResponse::Slot* out = response.add_slots();
    out->set_sequence_id(slot.sequence.ToString());
    out->set_reservation_id(slot.pending_id);
    out->set_first_position(slot.first_position);
    out->set_num_tokens(slot.num_tokens);
    out->set_pages_created(slot.pages_created);
    if (request.local_client_id() == 0 || !staged.ok()) continue;
    if (local_plane_ == nullptr) {
      staged = absl::NotFoundError(absl::StrCat("local_client_id ", request.local_client_id(),
                                                ": this worker has no local plane"));
      continue;
    }
    const uint64_t num_bytes = StagedBytes(host->model().geometry(), slot.num_tokens);
    const absl::StatusOr<uint64_t> offset =
        local_plane_->Stage(request.local_client_id(), slot.pending_id,
                            {.host = host,
                             .tenant = call.tenant,
                             .sequence = slot.sequence,
                             .num_tokens = slot.num_tokens,
                             .num_bytes = num_bytes,
                             .expires = worker_->clock().MonotonicNow() + lease + kStagingGrace});
    staged = offset.status();
    if (!offset.ok()) continue;
    out->set_staging_offset(*offset);
    out->set_staging_bytes(num_bytes);
  }
  if (staged.ok()) return response;
  for (const PendingSlot& slot : slots) {  // all or nothing
    if (local_plane_ != nullptr) local_plane_->Release(slot.pending_id);
    const absl::Status aborted = host->Abort(call.tenant, slot.sequence, slot.pending_id);
    if (!aborted.ok()) LogWarning("worker", "abort reservation: ", aborted.message());
  }
  return staged;
}

grpc::Status SequenceServiceImpl::CommitStep(grpc::ServerContext* context,
                                             const v1::CommitStepRequest* request,
                                             v1::CommitStepResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  if (request->items_size() > kMaxItems) {
    return ToGrpcStatus(absl::InvalidArgumentError(absl::StrCat(
        "items has ", request->items_size(), " entries, must have at most ", kMaxItems)));
  }
  for (const v1::CommitStepRequest::Item& item : request->items()) {
    // One memo an item: in a repeat, what was committed answers again and what failed is tried
    // again. The rows are left out of the digest: the reservation names them.
    v1::CommitStepRequest::Item identity;
    *identity.mutable_sequence() = item.sequence();
    identity.set_reservation_id(item.reservation_id());
    *identity.mutable_tokens() = item.tokens();
    *identity.mutable_indices() = item.indices();
    auto result = memos_->OncePerSequence<v1::CommitStepResponse::Result>(
        item.sequence().sequence_id(), request->request_id(), DigestOfMessage(identity),
        call.deadline, [&] { return CommitItem(call, item); });
    if (result.ok()) {
      *response->add_results() = *std::move(result);
      continue;
    }
    v1::CommitStepResponse::Result* failed = response->add_results();
    failed->set_sequence_id(item.sequence().sequence_id());
    failed->set_code(static_cast<int>(result.status().code()));
    failed->set_reason(GetReason(result.status()));
    failed->set_message(std::string(result.status().message()));
  }
  return grpc::Status::OK;
}

grpc::Status SequenceServiceImpl::Accept(grpc::ServerContext* context,
                                         const v1::AcceptRequest* request,
                                         v1::AcceptResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  v1::CommitStepRequest::Item identity = request->item();
  identity.clear_rows();
  auto answer = memos_->OncePerSequence<v1::AcceptResponse>(
      identity.sequence().sequence_id(), request->request_id(), DigestOfMessage(identity),
      call.deadline, [&]() -> absl::StatusOr<v1::AcceptResponse> {
        const v1::CommitStepRequest::Item& item = request->item();
        PT_ASSIGN_OR_RETURN(const HandleTarget target, FindSequence(*worker_, item.sequence()));
        if (item.indices().empty()) {
          return absl::InvalidArgumentError("item.indices is empty; AbortReservation drops all");
        }
        PT_ASSIGN_OR_RETURN(const CommitResult commit, WriteAndCommit(call, target, item));
        v1::AcceptResponse accepted;
        *accepted.mutable_state() = StateToProto(*worker_, *target.host, commit.info);
        accepted.set_pages_filled(commit.pages_filled);
        return accepted;
      });
  if (!answer.ok()) return ToGrpcStatus(answer.status());
  *response = *std::move(answer);
  return grpc::Status::OK;
}

absl::StatusOr<CommitResult> SequenceServiceImpl::WriteAndCommit(
    const CallContext& call, const HandleTarget& target, const v1::CommitStepRequest::Item& item) {
  const SequenceId id = target.handle.id;
  PT_RETURN_IF_ERROR(CheckEpoch(target.host, call.tenant, id, target.handle.epoch));
  for (int i = 0; i < item.rows_size(); ++i) {
    const v1::RowPart& part = item.rows(i);
    PT_ASSIGN_OR_RETURN(const RowRun run, RunFromProto(absl::StrCat("rows[", i, "]"), part));
    PT_RETURN_IF_ERROR(WriteContiguous(target.host, call.tenant, id, item.reservation_id(), run,
                                       BytesOf(part.data())));
  }
  if (item.rows_in_staging()) {
    const uint32_t num_rows = item.indices().empty() ? static_cast<uint32_t>(item.tokens_size())
                                                     : item.indices(item.indices_size() - 1) + 1;
    PT_RETURN_IF_ERROR(WriteStagedRows(call, target.host, id, item.reservation_id(), num_rows));
  }
  const std::vector<uint32_t> indices(item.indices().begin(), item.indices().end());
  PT_ASSIGN_OR_RETURN(CommitResult commit,
                      indices.empty()
                          ? target.host->Commit(call.tenant, target.handle, item.reservation_id(),
                                                TokensOf(item.tokens()))
                          : target.host->Accept(call.tenant, target.handle, item.reservation_id(),
                                                indices, TokensOf(item.tokens())));
  worker_->NoteSequence(*target.host, commit.info);
  if (local_plane_ != nullptr) local_plane_->Release(item.reservation_id());
  return commit;
}

absl::StatusOr<v1::CommitStepResponse::Result> SequenceServiceImpl::CommitItem(
    const CallContext& call, const v1::CommitStepRequest::Item& item) {
  PT_ASSIGN_OR_RETURN(const HandleTarget target, FindSequence(*worker_, item.sequence()));
  PT_ASSIGN_OR_RETURN(const CommitResult commit, WriteAndCommit(call, target, item));
  v1::CommitStepResponse::Result result;
  result.set_sequence_id(item.sequence().sequence_id());
  result.set_revision(commit.info.revision);
  result.set_length(commit.info.length);
  result.set_pages_filled(commit.pages_filled);
  return result;
}

absl::Status SequenceServiceImpl::WriteStagedRows(const CallContext& call, ModelHost* host,
                                                  SequenceId id, uint64_t reservation_id,
                                                  uint32_t num_tokens) {
  if (local_plane_ == nullptr) return NotReserved(reservation_id);
  PT_ASSIGN_OR_RETURN(const LocalPlane::StagedRows staged,
                      local_plane_->FindStaged(id, reservation_id));
  if (num_tokens > staged.num_tokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("tokens has ", num_tokens, " entries, ", staged.num_tokens, " were reserved"));
  }
  const PageGeometry& geometry = host->model().geometry();
  for (uint32_t g = 0; g < geometry.num_groups(); ++g) {
    const GroupGeometry& group = geometry.group(g);
    if (!group.has_rows()) continue;
    for (uint32_t layer = 0; layer < group.num_layers(); ++layer) {
      for (RowKind kind : {RowKind::kK, RowKind::kV}) {
        if (group.row_bytes(kind) == 0 || num_tokens == 0) continue;
        const uint64_t offset = StagedOffset(geometry, staged.num_tokens, g, layer, kind);
        PT_RETURN_IF_ERROR(WriteContiguous(
            host, call.tenant, id, reservation_id, RowRun{g, layer, kind, 0, num_tokens},
            staged.View(offset, uint64_t{num_tokens} * group.row_bytes(kind))));
      }
    }
  }
  return absl::OkStatus();
}

grpc::Status SequenceServiceImpl::AbortReservation(grpc::ServerContext* context,
                                                   const v1::AbortReservationRequest* request,
                                                   v1::AbortReservationResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto abort = [&]() -> absl::Status {
    PT_ASSIGN_OR_RETURN(const SequenceTarget target,
                        FindSequence(*worker_, request->sequence_id()));
    PT_RETURN_IF_ERROR(CheckEpoch(target.host, call.tenant, target.id, request->epoch()));
    if (local_plane_ != nullptr) local_plane_->Release(request->reservation_id());
    return target.host->Abort(call.tenant, target.id, request->reservation_id());
  };
  return ToGrpcStatus(abort());
}

grpc::Status SequenceServiceImpl::Attend(grpc::ServerContext* context,
                                         const v1::AttendRequest* request,
                                         v1::AttendResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const absl::StatusOr<AttendOutput> output = AttendItem(call, *request);
  if (!output.ok()) return ToGrpcStatus(output.status());
  response->set_log_sum_exp(reinterpret_cast<const char*>(output->log_sum_exp.data()),
                            output->log_sum_exp.size() * sizeof(float));
  response->set_outputs(reinterpret_cast<const char*>(output->outputs.data()),
                        output->outputs.size() * sizeof(float));
  return grpc::Status::OK;
}

absl::StatusOr<AttendOutput> SequenceServiceImpl::AttendItem(const CallContext& call,
                                                             const v1::AttendRequest& request) {
  PT_ASSIGN_OR_RETURN(const SequenceTarget target, FindSequence(*worker_, request.sequence_id()));
  const PageGeometry& geometry = target.host->model().geometry();
  if (request.group() >= geometry.num_groups()) {
    return absl::InvalidArgumentError(
        absl::StrCat("group is ", request.group(), ", the model has ", geometry.num_groups()));
  }
  const GroupGeometry& group = geometry.group(request.group());
  if (request.layer() >= group.num_layers()) {
    return absl::InvalidArgumentError(absl::StrCat("layer is ", request.layer(), ", group ",
                                                   request.group(), " has ", group.num_layers()));
  }
  if (!group.can_attend()) {
    return WithReason(absl::FailedPreconditionError(absl::StrCat(
                          "attend over group ", request.group(), ": it has no plain K and V rows")),
                      "CANNOT_ATTEND");
  }
  if (!request.append_id().empty() && request.reservation_id() != 0) {
    return absl::InvalidArgumentError(
        "append_id and reservation_id are both set; at most one may be");
  }
  PT_ASSIGN_OR_RETURN(const std::vector<float> queries,
                      FloatsOf("queries", request.queries(), request.num_queries(),
                               request.query_heads(), group.spec().k_dim));
  uint64_t pending_id = request.reservation_id();
  if (!request.append_id().empty()) {
    PT_ASSIGN_OR_RETURN(pending_id,
                        target.host->FindAppend(call.tenant, target.id, request.append_id()));
  }
  if (!request.k_rows().empty() || !request.v_rows().empty() || request.rows_in_staging()) {
    PT_RETURN_IF_ERROR(CheckEpoch(target.host, call.tenant, target.id, request.epoch()));
  }
  for (RowKind kind : {RowKind::kK, RowKind::kV}) {
    const std::string& rows = kind == RowKind::kK ? request.k_rows() : request.v_rows();
    const char* const field = kind == RowKind::kK ? "k_rows" : "v_rows";
    if (rows.empty()) continue;
    const uint32_t row_bytes = group.row_bytes(kind);
    if (row_bytes == 0 || rows.size() % row_bytes != 0) {
      return absl::InvalidArgumentError(
          absl::StrCat(field, " has ", rows.size(), " bytes, expected a multiple of ", row_bytes));
    }
    if (pending_id == 0) {
      return absl::InvalidArgumentError(
          absl::StrCat(field, " is set, but neither append_id nor reservation_id is"));
    }
    const RowRun run{request.group(), request.layer(), kind, 0,
                     static_cast<uint32_t>(rows.size() / row_bytes)};
    PT_RETURN_IF_ERROR(
        WriteContiguous(target.host, call.tenant, target.id, pending_id, run, BytesOf(rows)));
  }
  if (request.rows_in_staging()) {
    if (local_plane_ == nullptr) return NotReserved(pending_id);
    PT_ASSIGN_OR_RETURN(const LocalPlane::StagedRows staged,
                        local_plane_->FindStaged(target.id, pending_id));
    for (RowKind kind : {RowKind::kK, RowKind::kV}) {
      if (group.row_bytes(kind) == 0) continue;
      const RowRun run{request.group(), request.layer(), kind, 0, staged.num_tokens};
      const uint64_t offset =
          StagedOffset(geometry, staged.num_tokens, request.group(), request.layer(), kind);
      PT_RETURN_IF_ERROR(WriteContiguous(
          target.host, call.tenant, target.id, pending_id, run,
          staged.View(offset, uint64_t{staged.num_tokens} * group.row_bytes(kind))));
    }
  }
  const AttendQuery query{.sequence = target.id,
                          .epoch = request.epoch(),
                          .pending_id = pending_id,
                          .group = request.group(),
                          .layer = request.layer(),
                          .num_queries = request.num_queries(),
                          .query_heads = request.query_heads(),
                          .first_position = request.first_position(),
                          .scale = request.scale(),
                          .queries = queries};
  return target.host->Attend(call.tenant, query, call.deadline);
}

grpc::Status SequenceServiceImpl::ForkSequence(grpc::ServerContext* context,
                                               const v1::ForkSequenceRequest* request,
                                               v1::ForkSequenceResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto fork = [&]() -> absl::StatusOr<v1::ForkSequenceResponse> {
    PT_ASSIGN_OR_RETURN(const HandleTarget target, FindSequence(*worker_, request->source()));
    std::optional<uint64_t> length;
    if (request->has_length()) length = request->length();
    PT_ASSIGN_OR_RETURN(const ForkResult result,
                        target.host->Fork(call.tenant, target.handle, length, call.deadline));
    worker_->NoteSequence(*target.host, result.info);
    v1::ForkSequenceResponse answer;
    *answer.mutable_state() = StateToProto(*worker_, *target.host, result.info);
    answer.set_shared_pages(result.shared_pages);
    answer.set_copied_rows(result.copied_rows);
    return answer;
  };
  auto answer = memos_->OncePerTenant<v1::ForkSequenceResponse>(
      call.tenant.name, request->request_id(), DigestOfMessage(*request), call.deadline, fork);
  if (!answer.ok()) return ToGrpcStatus(answer.status());
  *response = *std::move(answer);
  return grpc::Status::OK;
}

grpc::Status SequenceServiceImpl::GetSequence(grpc::ServerContext* context,
                                              const v1::GetSequenceRequest* request,
                                              v1::GetSequenceResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto get = [&]() -> absl::Status {
    PT_ASSIGN_OR_RETURN(const SequenceTarget target,
                        FindSequence(*worker_, request->sequence_id()));
    PT_ASSIGN_OR_RETURN(const SequenceInfo info, target.host->Get(call.tenant, target.id));
    *response->mutable_state() = StateToProto(*worker_, *target.host, info);
    return absl::OkStatus();
  };
  return ToGrpcStatus(get());
}

grpc::Status SequenceServiceImpl::ListWorkerSequences(grpc::ServerContext* context,
                                                      const v1::ListWorkerSequencesRequest* request,
                                                      v1::ListWorkerSequencesResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const uint32_t limit = request->page_size() == 0 ? kDefaultListSize : request->page_size();
  if (limit > kMaxListSize) {
    return ToGrpcStatus(absl::InvalidArgumentError(
        absl::StrCat("page_size is ", limit, ", must be at most ", kMaxListSize)));
  }
  uint64_t after = 0;
  if (!request->page_token().empty() && !absl::SimpleAtoi(request->page_token(), &after)) {
    return ToGrpcStatus(
        absl::InvalidArgumentError("page_token is not one that ListWorkerSequences has returned"));
  }
  std::vector<std::pair<SequenceInfo, ModelHost*>> found;
  for (ModelHost* host : worker_->Hosts()) {
    for (const SequenceInfo& info : host->List(call.tenant, after, limit + 1)) {
      found.emplace_back(info, host);
    }
  }
  std::sort(found.begin(), found.end(),
            [](const auto& a, const auto& b) { return a.first.number < b.first.number; });
  const bool more = found.size() > limit;
  if (more) found.resize(limit);
  for (const auto& [info, host] : found) {
    *response->add_sequences() = StateToProto(*worker_, *host, info);
  }
  if (more) response->set_next_page_token(absl::StrCat(found.back().first.number));
  return grpc::Status::OK;
}

grpc::Status SequenceServiceImpl::GetBlockTable(grpc::ServerContext* context,
                                                const v1::GetBlockTableRequest* request,
                                                v1::GetBlockTableResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto get = [&]() -> absl::Status {
    PT_ASSIGN_OR_RETURN(const SequenceTarget target,
                        FindSequence(*worker_, request->sequence_id()));
    PT_ASSIGN_OR_RETURN(const absl::Duration lease, DurationFromProto("lease", request->lease()));
    ModelHost* const host = target.host;
    PT_ASSIGN_OR_RETURN(SequenceInfo info, host->Get(call.tenant, target.id));
    if (lease > absl::ZeroDuration()) {
      PT_RETURN_IF_ERROR(worker_->leases().CheckDuration("lease", lease));
      PinLeases::Pins pins;
      for (uint32_t g = 0; info.length > 0 && g < host->model().geometry().num_groups(); ++g) {
        PT_ASSIGN_OR_RETURN(auto pinned, host->PinRows(call.tenant, target.id, g,
                                                       ModelHost::kHeldRows, 0, call.deadline));
        pins.push_back(std::move(pinned));
      }
      PT_ASSIGN_OR_RETURN(*response->mutable_lease_id(),
                          worker_->leases().Add(std::move(pins), lease, nullptr));
      PT_ASSIGN_OR_RETURN(info, host->Get(call.tenant, target.id));
    }
    PT_ASSIGN_OR_RETURN(const auto table, host->GetBlockTable(call.tenant, target.id));
    *response->mutable_state() = StateToProto(*worker_, *host, info);
    for (const BlockTableEntry& entry : table) {
      v1::GetBlockTableResponse::Extent* extent = response->add_extents();
      extent->set_group(entry.group);
      extent->set_first_position(entry.first_position);
      extent->set_first_row(entry.first_row);
      extent->set_pending_shift(entry.shift);
      extent->set_first_slot(entry.first_slot);
      extent->set_count(entry.count);
      extent->set_page_id(entry.page.value());
      extent->set_page_state(entry.page_state);
      if (entry.frame.has_value()) {
        extent->set_frame(entry.frame->value());
        extent->set_pool_offset(host->FrameOffset(entry.group, *entry.frame));
      }
      if (entry.key.has_value()) extent->set_page_key(entry.key->digest.ToBytes());
      extent->set_references(entry.references);
      extent->set_pins(entry.pins);
    }
    return absl::OkStatus();
  };
  return ToGrpcStatus(get());
}

grpc::Status SequenceServiceImpl::CloseSequence(grpc::ServerContext* context,
                                                const v1::CloseSequenceRequest* request,
                                                v1::CloseSequenceResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto close = [&]() -> absl::Status {
    const absl::StatusOr<SequenceTarget> target = FindSequence(*worker_, request->sequence_id());
    if (absl::IsNotFound(target.status())) {
      PT_ASSIGN_OR_RETURN(const SequenceId id, SequenceId::Parse(request->sequence_id()));
      // It may be parked, or its close may have ended halfway.
      PT_ASSIGN_OR_RETURN(const bool was_parked,
                          parking_->Drop(call.tenant, id, request->epoch(), call.deadline));
      // One of ours that is not open is closed: the call is idempotent.
      const bool is_ours = id.incarnation == worker_->incarnation();
      return was_parked || is_ours ? absl::OkStatus() : target.status();
    }
    PT_RETURN_IF_ERROR(target.status());
    const bool is_durable = parking_->Owns(target->id);
    PT_RETURN_IF_ERROR(target->host->Close(call.tenant, target->id, request->epoch()));
    if (is_durable) {
      PT_RETURN_IF_ERROR(
          parking_->Drop(call.tenant, target->id, request->epoch(), call.deadline).status());
    }
    memos_->ForgetSequence(request->sequence_id());
    worker_->NoteClosed(target->id);
    return absl::OkStatus();
  };
  return ToGrpcStatus(close());
}

}  // namespace pagetide
