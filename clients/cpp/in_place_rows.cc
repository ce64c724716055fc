#include "clients/cpp/in_place_rows.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/copy_bytes.h"
#include "base/error_info.h"

namespace pagetide {

absl::Status InPlaceRows::CheckLease(absl::Duration lease) {
  constexpr absl::Duration kMaxLease = absl::Seconds(30);
  if (lease > absl::ZeroDuration() && lease <= kMaxLease) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("read in place: lease is ", absl::FormatDuration(lease),
                   ", must be above 0 and at most ", absl::FormatDuration(kMaxLease)));
}

absl::StatusOr<std::unique_ptr<InPlaceRows>> InPlaceRows::Create(
    std::shared_ptr<LocalStaging> memory, std::shared_ptr<const Model> model,
    const v1::GetBlockTableResponse& table, MonotonicTime expires) {
  const PageGeometry& geometry = model->geometry();
  const uint64_t pool_bytes = memory->pool().size();
  std::vector<Extent> extents;
  for (const v1::GetBlockTableResponse::Extent& from : table.extents()) {
    const uint64_t offset = from.pool_offset();
    if (!from.has_pool_offset() || from.group() >= geometry.num_groups() || offset > pool_bytes ||
        geometry.group(from.group()).page_bytes() > pool_bytes - offset ||
        uint64_t{from.first_slot()} + from.count() > geometry.page_tokens()) {
      return absl::InternalError(
          absl::StrCat("read in place: the worker names rows [", from.first_slot(), ", +",
                       from.count(), ") of a page of group ", from.group(), " at offset ",
                       from.has_pool_offset() ? absl::StrCat(offset) : "none", " of a pool of ",
                       pool_bytes, " bytes"));
    }
    if (from.pending_shift() != 0) {
      return WithReason(absl::FailedPreconditionError(absl::StrCat(
                            "read in place: K of rows [", from.first_row(), ", +", from.count(),
                            ") of group ", from.group(), " is still to be rotated by ",
                            from.pending_shift(), " positions; compact with apply_shifts first")),
                        "ROWS_SHIFTED");
    }
    extents.push_back({from.group(), from.first_row(), from.first_slot(), from.count(), offset});
  }
  return std::unique_ptr<InPlaceRows>(new InPlaceRows(
      std::move(memory), std::move(model), table.state().length(), std::move(extents), expires));
}

InPlaceRows::InPlaceRows(std::shared_ptr<LocalStaging> memory, std::shared_ptr<const Model> model,
                         uint64_t length, std::vector<Extent> extents, MonotonicTime expires)
    : memory_(std::move(memory)),
      model_(std::move(model)),
      length_(length),
      extents_(std::move(extents)),
      expires_(expires) {}

std::vector<InPlaceRows::Run> InPlaceRows::Rows(uint32_t group, uint32_t layer,
                                                RowKind kind) const {
  std::vector<Run> runs;
  if (group >= model_->geometry().num_groups()) return runs;
  const GroupGeometry& geometry = model_->geometry().group(group);
  if (layer >= geometry.num_layers() || geometry.row_bytes(kind) == 0) return runs;
  for (const Extent& extent : extents_) {
    if (extent.group != group) continue;
    runs.push_back({extent.first_row, extent.count,
                    memory_->pool().subspan(
                        extent.pool_offset + geometry.RowOffset(layer, kind, extent.first_slot),
                        uint64_t{extent.count} * geometry.row_bytes(kind))});
  }
  return runs;
}

absl::Status InPlaceRows::CopyRows(uint32_t group, uint32_t layer, RowKind kind,
                                   std::span<std::byte> to) const {
  const std::vector<Run> runs = Rows(group, layer, kind);
  uint64_t num_bytes = 0;
  for (const Run& run : runs) num_bytes += run.bytes.size();
  if (to.size() != num_bytes) {
    return absl::InvalidArgumentError(absl::StrCat("copy rows of group ", group, ", layer ", layer,
                                                   ": ", num_bytes, " bytes into ", to.size()));
  }
  uint64_t at = 0;
  for (const Run& run : runs) {
    CopyBytes(run.bytes, to.data() + at);
    at += run.bytes.size();
  }
  return absl::OkStatus();
}

}  // namespace pagetide
