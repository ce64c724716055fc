// The calls of SequenceService that carry bulk bytes as raw streams: AppendTokens and ReadRows.
#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/byte_size.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "rpc/byte_buffer.h"
#include "rpc/status_mapping.h"
#include "worker/sequence_service.h"

namespace pagetide {

grpc::Status SequenceServiceImpl::AppendRaw(grpc::ServerContext* context, RawStream* stream) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const StreamDeadlines::Watch watch(deadlines_, context, call.end, "append tokens");
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
    PT_ASSIGN_OR_RETURN(const v1::AppendTokensResponse response,
                        memos_->OncePerSequence<v1::AppendTokensResponse>(
                            call.tenant.name, header.sequence().sequence_id(), header.request_id(),
                            DigestOfMessage(header), call.deadline,
                            [&] { return Append(call, context, header, stream); }));
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
  const StreamDeadlines::Watch watch(deadlines_, context, call.end, "read rows");
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
  if (request.begin() == ModelHost::kHeldRows) {  // means something else to the host
    return absl::InvalidArgumentError(absl::StrCat("rows [", request.begin(), ", ", request.end(),
                                                   ") are not within the ", "committed ones"));
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

}  // namespace pagetide
