// The calls of SequenceService that an engine makes at each step: slots, their rows, their commit,
// and attention over them.
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "core/staging_layout.h"
#include "rpc/channel.h"
#include "rpc/status_mapping.h"
#include "worker/sequence_service.h"

namespace pagetide {
namespace {

constexpr absl::Duration kDefaultReserveLease = absl::Seconds(30);
constexpr absl::Duration kMaxReserveLease = absl::Minutes(5);
// Staging outlives its reservation a little, so that a region is never given out again while a
// commit that came just in time still copies from it.
constexpr absl::Duration kStagingGrace = absl::Seconds(10);
constexpr int kMaxItems = 4096;
constexpr uint32_t kMaxReserveTokens = 1024;

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

// Attention answers num_queries x query_heads x (v_dim + 1) floats, however little was sent.
absl::Status CheckAnswerFits(const v1::AttendRequest& request, uint32_t v_dim) {
  uint64_t rows = uint64_t{request.num_queries()} * request.query_heads();
  uint64_t bytes = 0;
  if (!__builtin_mul_overflow(rows, (uint64_t{v_dim} + 1) * sizeof(float), &bytes) &&
      bytes <= kMaxPayloadBytes) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "num_queries is ", request.num_queries(), ", query_heads is ", request.query_heads(),
      ": with v_dim ", v_dim, " and one log-sum-exp each the answer exceeds ", kMaxPayloadBytes,
      " bytes; ask for fewer queries at a time"));
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
    if (local_plane_ != nullptr) local_plane_->Release(slot.sequence, slot.pending_id);
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
        call.tenant.name, item.sequence().sequence_id(), request->request_id(),
        DigestOfMessage(identity), call.deadline, [&] { return CommitItem(call, item); });
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
      call.tenant.name, identity.sequence().sequence_id(), request->request_id(),
      DigestOfMessage(identity), call.deadline, [&]() -> absl::StatusOr<v1::AcceptResponse> {
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
  if (local_plane_ != nullptr) local_plane_->Release(id, item.reservation_id());
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
    // First no commit can take its rows any more, then they are somebody else's to write.
    const absl::Status aborted =
        target.host->Abort(call.tenant, target.id, request->reservation_id());
    if (aborted.ok() && local_plane_ != nullptr) {
      local_plane_->Release(target.id, request->reservation_id());
    }
    return aborted;
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
  PT_RETURN_IF_ERROR(CheckAnswerFits(request, group.spec().v_dim));
  PT_ASSIGN_OR_RETURN(const std::vector<float> queries,
                      FloatsOf("queries", request.queries(), request.num_queries(),
                               request.query_heads(), group.spec().k_dim));
  uint64_t pending_id = request.reservation_id();
  if (!request.append_id().empty()) {
    PT_ASSIGN_OR_RETURN(pending_id, target.host->FindAppend(call.tenant, target.id,
                                                            request.append_id(), call.deadline));
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
                          .allow_behind_end = request.allow_behind_end(),
                          .queries = queries};
  return target.host->Attend(call.tenant, query, call.deadline);
}

}  // namespace pagetide
