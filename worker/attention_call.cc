#include "worker/attention_call.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"

namespace pagetide {
namespace {

// Positions are kept well inside int64, so that kernels may subtract and add windows freely.
constexpr uint64_t kMaxPosition = uint64_t{1} << 62;

absl::Status CheckPositions(absl::string_view what, uint64_t first, uint64_t count) {
  if (first <= kMaxPosition && count <= kMaxPosition - first) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("attend: ", what, ": ", count, " positions from ", first, " pass 2^62"));
}

// The two enumerations list the same types in the same order; the geometry's begins at 1.
static_assert(static_cast<int>(DataType::kF32) == static_cast<int>(kernels::KvType::kF32) + 1 &&
              static_cast<int>(DataType::kIQ4NL) == static_cast<int>(kernels::KvType::kIQ4NL) + 1 &&
              kernels::kNumKvTypes == static_cast<int>(DataType::kIQ4NL));
kernels::KvType KvTypeOf(DataType type) {
  return static_cast<kernels::KvType>(static_cast<int>(type) - 1);
}

kernels::AttentionMask MaskOf(const LayerGroupSpec& spec) {
  switch (spec.window_type) {
    case LayerGroupSpec::WindowType::kNone:
      return kernels::AttentionMask::kCausal;
    case LayerGroupSpec::WindowType::kStandard:
      return kernels::AttentionMask::kWindowStandard;
    case LayerGroupSpec::WindowType::kChunked:
      return kernels::AttentionMask::kWindowChunked;
    case LayerGroupSpec::WindowType::kSymmetric:
      return kernels::AttentionMask::kWindowSymmetric;
    case LayerGroupSpec::WindowType::kRing:
      return kernels::AttentionMask::kWindowRing;
  }
  return kernels::AttentionMask::kCausal;
}

}  // namespace

absl::Status CheckPoolRange(absl::string_view action, uint64_t offset, uint64_t num_bytes,
                            uint64_t pool_bytes) {
  if (num_bytes <= pool_bytes && offset <= pool_bytes - num_bytes) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(action, " pool: ", num_bytes, " bytes at offset ",
                                                 offset, " leave its ", pool_bytes, " bytes"));
}

absl::Status CannotAttend(absl::string_view device, absl::string_view why) {
  return WithReason(absl::FailedPreconditionError(absl::StrCat("attend on ", device, ": ", why)),
                    "CANNOT_ATTEND");
}

absl::StatusOr<kernels::AttentionShape> AttentionShapeOf(const AttentionCall& call,
                                                         absl::string_view device) {
  if (call.group == nullptr) return absl::InvalidArgumentError("attend: group is null");
  const GroupGeometry& group = *call.group;
  const LayerGroupSpec& spec = group.spec();
  if (!group.can_attend()) return CannotAttend(device, "the group has no plain rows");
  const kernels::KvType k_type = KvTypeOf(spec.k_type);
  const kernels::KvType v_type = spec.v_dim == 0 ? k_type : KvTypeOf(spec.v_type);
  if (spec.scale != LayerGroupSpec::ScaleKind::kNone)
    return CannotAttend(device, "rows have scales");
  if (spec.basis != LayerGroupSpec::Basis::kPlain) {
    return CannotAttend(device, "rows are in the Hadamard basis");
  }
  if (call.layer >= group.num_layers()) {
    return absl::InvalidArgumentError(absl::StrCat("attend: layer = ", call.layer,
                                                   " is not below the group's ", group.num_layers(),
                                                   " layers"));
  }
  if (call.query_heads == 0 || call.query_heads % spec.kv_heads != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("attend: query_heads = ", call.query_heads,
                     " is not a positive multiple of kv_heads = ", spec.kv_heads));
  }
  if (!std::isfinite(call.scale)) {
    return absl::InvalidArgumentError(absl::StrCat("attend: scale = ", call.scale));
  }
  const uint64_t rows = uint64_t{call.num_queries} * call.query_heads;
  uint64_t v_dim = spec.v_dim;
  if (v_dim == 0) {
    v_dim = rows == 0 ? spec.k_dim : call.outputs.size() / rows;
    if (v_dim < 1 || v_dim > spec.k_dim || (spec.kv_heads > 1 && v_dim != spec.k_dim)) {
      return absl::InvalidArgumentError(
          absl::StrCat("attend: ", call.outputs.size(), " outputs for ", rows,
                       " query rows of a latent group with kv_heads = ", spec.kv_heads,
                       " and k_dim = ", spec.k_dim));
    }
  }
  if (call.queries.size() != rows * spec.k_dim || call.outputs.size() != rows * v_dim ||
      (!call.log_sum_exp.empty() && call.log_sum_exp.size() != rows)) {
    return absl::InvalidArgumentError(
        absl::StrCat("attend: ", call.num_queries, " queries × ", call.query_heads, " heads need ",
                     rows * spec.k_dim, " query, ", rows * v_dim, " output and ", rows,
                     " log_sum_exp elements, got ", call.queries.size(), ", ", call.outputs.size(),
                     " and ", call.log_sum_exp.size()));
  }
  kernels::AttentionShape shape;
  shape.num_q_heads = static_cast<int32_t>(call.query_heads);
  shape.num_kv_heads = static_cast<int32_t>(spec.kv_heads);
  shape.k_dim = static_cast<int32_t>(spec.k_dim);
  shape.v_dim = static_cast<int32_t>(v_dim);
  shape.k_type = k_type;
  shape.v_type = v_type;
  shape.k_row_bytes = group.k_row_bytes();
  shape.v_row_bytes = spec.v_dim == 0 ? group.k_row_bytes() : group.v_row_bytes();
  shape.scale = call.scale != 0 ? call.scale : 1.0f / std::sqrt(static_cast<float>(spec.k_dim));
  shape.mask = MaskOf(spec);
  shape.window = int64_t{spec.window_tokens} - spec.keep_tokens;
  shape.keep = spec.keep_tokens;
  return shape;
}

absl::StatusOr<uint64_t> ShiftedBytesOf(const AttentionCall& call) {
  uint64_t rows = 0;
  for (const DeviceExtent& extent : call.extents) {
    if (extent.shift != 0) rows += extent.count;
  }
  if (rows > call.extents.size() * uint64_t{call.group->page_tokens()}) {
    return absl::InvalidArgumentError(
        absl::StrCat("attend: ", rows, " shifted rows in ", call.extents.size(), " extents"));
  }
  return rows * call.group->k_row_bytes();
}

absl::StatusOr<AttentionRuns> AttentionRunsOf(const AttentionCall& call, const std::byte* base,
                                              uint64_t pool_bytes, std::byte* shifted) {
  const GroupGeometry& group = *call.group;
  const bool is_latent = group.spec().v_dim == 0;
  AttentionRuns result;
  result.runs.reserve(call.extents.size());
  uint64_t shifted_at = 0;
  for (const DeviceExtent& extent : call.extents) {
    PT_RETURN_IF_ERROR(
        CheckPoolRange("attend to page in", extent.page_offset, group.page_bytes(), pool_bytes));
    if (uint64_t{extent.first_slot} + extent.count > group.page_tokens()) {
      return absl::InvalidArgumentError(absl::StrCat("attend: extent of ", extent.count,
                                                     " rows from slot ", extent.first_slot,
                                                     " leaves its page of ", group.page_tokens()));
    }
    PT_RETURN_IF_ERROR(CheckPositions("extent", extent.first_position, extent.count));
    const std::byte* page = base + extent.page_offset;
    kernels::KvRun run;
    run.k_rows = page + group.RowOffset(call.layer, RowKind::kK, 0);
    run.v_rows = is_latent ? run.k_rows : page + group.RowOffset(call.layer, RowKind::kV, 0);
    run.first_position = static_cast<int64_t>(extent.first_position);
    run.first_slot = static_cast<int32_t>(extent.first_slot);
    run.count = static_cast<int32_t>(extent.count);
    if (extent.shift != 0) {
      std::byte* const copy = shifted + shifted_at;
      shifted_at += uint64_t{extent.count} * group.k_row_bytes();
      result.shifts.push_back({page + group.RowOffset(call.layer, RowKind::kK, extent.first_slot),
                               copy, extent.count, extent.shift});
      run.k_rows = copy;
      run.v_rows =
          is_latent ? copy : page + group.RowOffset(call.layer, RowKind::kV, extent.first_slot);
      run.first_slot = 0;
    }
    result.runs.push_back(run);
    result.num_rows += run.count;
  }
  PT_RETURN_IF_ERROR(CheckPositions("queries", call.first_position, call.num_queries));
  result.q_positions.resize(call.num_queries);
  for (uint32_t i = 0; i < call.num_queries; ++i) {
    result.q_positions[i] = static_cast<int64_t>(call.first_position + i);
  }
  return result;
}

}  // namespace pagetide
