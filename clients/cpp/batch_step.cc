#include "clients/cpp/batch_step.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "clients/cpp/request_id.h"
#include "clients/cpp/row_checks.h"
#include "core/staging_layout.h"
#include "rpc/duration_proto.h"

namespace pagetide {
namespace {

using Service = v1::SequenceService::StubInterface;

constexpr absl::Duration kAbortTimeout = absl::Seconds(2);
// Rows of one CommitStep: leaves room for the other fields of 4096 items.
constexpr uint64_t kMaxCommitBytes = uint64_t{3} << 20;

std::string StringOf(std::span<const std::byte> bytes) {
  return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

}  // namespace

absl::StatusOr<std::unique_ptr<BatchStep>> BatchStep::Begin(std::span<Sequence* const> sequences,
                                                            uint32_t num_tokens, bool will_attend) {
  if (sequences.empty()) return absl::InvalidArgumentError("begin step: no sequence");
  std::unique_ptr<BatchStep> step(new BatchStep);
  step->items_.resize(sequences.size());
  for (size_t i = 0; i < sequences.size(); ++i) {
    if (&sequences[i]->worker() != &sequences[0]->worker()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "begin step: sequence ", i, " is on worker ", sequences[i]->worker().address(),
          ", the first one on ", sequences[0]->worker().address()));
    }
    step->items_[i].sequence = sequences[i];
  }
  PT_RETURN_IF_ERROR(step->Reserve(num_tokens, will_attend));
  return step;
}

absl::Status BatchStep::Reserve(uint32_t num_tokens, bool will_attend) {
  Sequence& first = *items_[0].sequence;
  WorkerConnection& worker = first.worker();
  const uint64_t staged_bytes = StagedBytes(first.model().geometry(), num_tokens);
  staging_ = worker.Staging();
  if (staging_ != nullptr && staged_bytes * items_.size() > staging_->num_bytes()) {
    staging_ = nullptr;
  }
  v1::ReserveSlotsRequest request;
  for (const Item& item : items_) {
    v1::ReserveSlotsRequest::Item* out = request.add_items();
    *out->mutable_sequence() = item.sequence->Ref();
    out->set_num_tokens(num_tokens);
  }
  request.set_pin_prefix(will_attend);
  const absl::Duration lease = worker.step_lease();
  *request.mutable_lease() = DurationToProto(lease);
  const auto reserve = [&] {
    lease_ends_ = Clock::Real()->MonotonicNow() + lease;
    request.set_request_id(NewRequestId());
    request.set_local_client_id(staging_ == nullptr ? 0 : staging_->client_id());
    return CallUnary(worker.call_options(), worker.sequences(), &Service::ReserveSlots, request);
  };
  absl::StatusOr<v1::ReserveSlotsResponse> response = reserve();
  if (absl::IsNotFound(response.status()) && staging_ != nullptr &&
      GetReason(response.status()) != "SEQUENCE_NOT_FOUND") {
    // The worker forgot our staging buffer, which does not hinder the step.
    worker.DropStaging();
    staging_ = nullptr;
    response = reserve();
  }
  PT_RETURN_IF_ERROR(response.status());
  if (static_cast<size_t>(response->slots_size()) != items_.size()) {
    return absl::InternalError(absl::StrCat("reserve slots: ", response->slots_size(),
                                            " slots in the answer, expected ", items_.size()));
  }
  for (size_t i = 0; i < items_.size(); ++i) {
    items_[i].slot = std::move(*response->mutable_slots(static_cast<int>(i)));
    items_[i].is_open = true;
  }
  if (staging_ == nullptr) return absl::OkStatus();
  for (Item& item : items_) {
    PT_ASSIGN_OR_RETURN(item.region,
                        staging_->Region(item.slot.staging_offset(), item.slot.staging_bytes()));
    if (item.region.size() != staged_bytes) {
      return absl::InternalError(absl::StrCat("reserve slots of ", item.sequence->id(),
                                              ": staging of ", item.region.size(),
                                              " bytes, expected ", staged_bytes));
    }
  }
  return absl::OkStatus();
}

BatchStep::~BatchStep() {
  for (const Item& item : items_) {
    if (!item.is_open) continue;
    v1::AbortReservationRequest request;
    request.set_sequence_id(item.sequence->id());
    request.set_epoch(item.sequence->state().epoch());
    request.set_reservation_id(item.slot.reservation_id());
    CallOptions once{.timeout = kAbortTimeout};
    once.retry.max_attempts = 1;
    const auto aborted =
        CallUnary(once, item.sequence->worker().sequences(), &Service::AbortReservation, request);
    if (aborted.ok()) continue;
    LogInfo("client", "abort reservation ", item.slot.reservation_id(), ": ",
            aborted.status().message());
    // The others would wait as long in vain; their leases end by themselves.
    if (!absl::IsNotFound(aborted.status())) return;
  }
}

absl::Status BatchStep::CheckHeld(const Item& item) const {
  const absl::string_view why = !item.is_open           ? "it is over"
                                : item.may_be_committed ? "a commit of it got no answer"
                                : Clock::Real()->MonotonicNow() >= lease_ends_
                                    ? "its lease has ended"
                                    : "";
  if (why.empty()) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("write rows of a step of ", item.sequence->id(), ": ", why));
}

absl::Status BatchStep::WriteRows(size_t i, uint32_t group, uint32_t layer,
                                  std::span<const std::byte> k_rows,
                                  std::span<const std::byte> v_rows) {
  Item& item = items_[i];
  PT_RETURN_IF_ERROR(CheckHeld(item));
  PT_RETURN_IF_ERROR(CheckLayer(item.sequence->model(), group, layer));
  const PageGeometry& geometry = item.sequence->model().geometry();
  const uint32_t n = item.slot.num_tokens();
  const uint64_t k_bytes = uint64_t{n} * geometry.group(group).k_row_bytes();
  const uint64_t v_bytes = uint64_t{n} * geometry.group(group).v_row_bytes();
  if (k_rows.size() != k_bytes || v_rows.size() != v_bytes) {
    return absl::InvalidArgumentError(absl::StrCat("write rows of ", n, " tokens: ", k_rows.size(),
                                                   " K and ", v_rows.size(), " V bytes, expected ",
                                                   k_bytes, " and ", v_bytes));
  }
  if (staging_ == nullptr) {
    item.unsent.push_back({group, layer, StringOf(k_rows), StringOf(v_rows)});
    return absl::OkStatus();
  }
  const auto stage = [&](RowKind kind, std::span<const std::byte> rows) {
    if (rows.empty()) return;
    std::memcpy(item.region.data() + StagedOffset(geometry, n, group, layer, kind), rows.data(),
                rows.size());
  };
  stage(RowKind::kK, k_rows);
  stage(RowKind::kV, v_rows);
  return absl::OkStatus();
}

absl::Status BatchStep::Attend(size_t i, const AttendCall& call) {
  Item& item = items_[i];
  v1::AttendRequest request;
  request.set_reservation_id(item.slot.reservation_id());
  const auto mine = std::find_if(
      item.unsent.begin(), item.unsent.end(),
      [&](const UnsentRows& rows) { return rows.group == call.group && rows.layer == call.layer; });
  if (staging_ != nullptr) {
    request.set_rows_in_staging(true);
  } else if (mine != item.unsent.end()) {
    request.set_k_rows(mine->k);
    request.set_v_rows(mine->v);
  }
  PT_RETURN_IF_ERROR(item.sequence->Attend(call, &request));
  if (mine != item.unsent.end()) item.unsent.erase(mine);
  return absl::OkStatus();
}

absl::StatusOr<std::vector<absl::Status>> BatchStep::Commit(
    std::span<const std::span<const uint32_t>> tokens) {
  if (tokens.size() != items_.size()) {
    return absl::InvalidArgumentError(absl::StrCat("commit step: tokens of ", tokens.size(),
                                                   " sequences, expected ", items_.size()));
  }
  for (const Item& item : items_) {
    if (!item.is_open) {
      return absl::FailedPreconditionError(
          absl::StrCat("step of ", item.sequence->id(), " was committed already"));
    }
  }
  std::vector<absl::Status> results(items_.size());
  for (size_t begin = 0; begin < items_.size();) {
    size_t end = begin;
    for (uint64_t bytes = 0; end < items_.size(); ++end) {
      for (const UnsentRows& rows : items_[end].unsent) bytes += rows.k.size() + rows.v.size();
      if (bytes > kMaxCommitBytes && end > begin) break;
    }
    PT_RETURN_IF_ERROR(CommitCall(begin, end, tokens, &results));
    begin = end;
  }
  return results;
}

absl::Status BatchStep::CommitCall(size_t begin, size_t end,
                                   std::span<const std::span<const uint32_t>> tokens,
                                   std::vector<absl::Status>* results) {
  v1::CommitStepRequest request;
  request.set_request_id(NewRequestId());
  for (size_t i = begin; i < end; ++i) {
    Item& item = items_[i];
    v1::CommitStepRequest::Item* out = request.add_items();
    *out->mutable_sequence() = item.sequence->Ref();
    out->set_reservation_id(item.slot.reservation_id());
    out->mutable_tokens()->Add(tokens[i].begin(), tokens[i].end());
    out->set_rows_in_staging(staging_ != nullptr);
    for (UnsentRows& rows : item.unsent) {
      for (const RowKind kind : {RowKind::kK, RowKind::kV}) {
        std::string& bytes = kind == RowKind::kK ? rows.k : rows.v;
        if (bytes.empty()) continue;
        v1::RowPart* part = out->add_rows();
        part->set_group(rows.group);
        part->set_layer(rows.layer);
        part->set_kind(kind == RowKind::kK ? v1::ROW_KIND_K : v1::ROW_KIND_V);
        part->set_num_tokens(item.slot.num_tokens());
        part->set_data(bytes);
      }
    }
  }
  for (size_t i = begin; i < end; ++i) items_[i].may_be_committed = true;
  WorkerConnection& worker = items_[0].sequence->worker();
  PT_ASSIGN_OR_RETURN(
      const v1::CommitStepResponse response,
      CallUnary(worker.call_options(), worker.sequences(), &Service::CommitStep, request));
  if (static_cast<size_t>(response.results_size()) != end - begin) {
    return absl::InternalError(
        absl::StrCat("commit step: ", response.results_size(), " results, expected ", end - begin));
  }
  for (size_t i = begin; i < end; ++i) {
    const v1::CommitStepResponse::Result& result = response.results(static_cast<int>(i - begin));
    items_[i].may_be_committed = false;
    if (result.code() != 0) {
      const absl::Status status(static_cast<absl::StatusCode>(result.code()), result.message());
      (*results)[i] = result.reason().empty() ? status : WithReason(status, result.reason());
      continue;
    }
    items_[i].is_open = false;
    items_[i].sequence->state_.set_revision(result.revision());
    v1::SequenceState& state = items_[i].sequence->state_;
    state.set_end_position(state.end_position() + result.length() - state.length());
    state.set_length(result.length());
  }
  return absl::OkStatus();
}

}  // namespace pagetide
