#include "worker/k_shift.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "core/sequence_rows.h"

namespace pagetide {
namespace {

kernels::RopeParams ParamsOf(const RopeSpec& rope) {
  kernels::RopeParams params;
  params.style =
      rope.style == RopeSpec::Style::kNeox ? kernels::RopeStyle::kNeox : kernels::RopeStyle::kNorm;
  params.n_rot = static_cast<int32_t>(rope.n_rot);
  params.base = static_cast<float>(rope.base);
  params.factors = rope.factors.empty() ? nullptr : rope.factors.data();
  if (rope.scaling != RopeSpec::Scaling::kNone) params.scale = static_cast<float>(rope.scale);
  if (rope.scaling == RopeSpec::Scaling::kYarn) {
    params.ext_factor = static_cast<float>(rope.yarn_ext_factor);
    params.beta_fast = static_cast<float>(rope.yarn_beta_fast);
    params.beta_slow = static_cast<float>(rope.yarn_beta_slow);
    params.original_context = static_cast<int32_t>(rope.yarn_original_context);
  }
  return params;
}

}  // namespace

std::optional<kernels::RopeShiftArgs> KShiftArgsOf(const GroupGeometry& group) {
  const LayerGroupSpec& spec = group.spec();
  if (!TraitsOf(spec).rotates) return std::nullopt;
  kernels::RopeShiftArgs args{};
  args.params = ParamsOf(spec.rope);
  args.type = static_cast<kernels::KvType>(static_cast<int>(spec.k_type) - 1);
  args.num_heads = static_cast<int32_t>(spec.kv_heads);
  args.head_dim = static_cast<int32_t>(spec.k_dim);
  // A latent comes first, its rotated part behind it.
  args.rope_offset = spec.v_dim == 0 ? static_cast<int32_t>(spec.k_dim - spec.rope.n_rot) : 0;
  args.in_row_bytes = args.out_row_bytes = group.k_row_bytes();
  args.num_layers = 1;
  return args;
}

bool CanShiftOnHost(const GroupGeometry& group) {
  return TraitsOf(group.spec()).can_shift;
}

absl::Status ShiftOnHost(const GroupGeometry& group, std::span<const KShiftRun> runs) {
  const LayerGroupSpec& spec = group.spec();
  if (!CanShiftOnHost(group)) {
    return absl::InvalidArgumentError("shift K: rows of the group cannot be turned");
  }
  std::vector<kernels::RopeShiftRun> turned;
  int64_t max_rows = 0;
  for (const KShiftRun& run : runs) {
    if (run.num_rows == 0) continue;
    // Bytes that do not turn (scales behind the elements) go along.
    if (run.out != run.in) {
      std::memcpy(run.out, run.in, uint64_t{run.num_rows} * group.k_row_bytes());
    }
    if (run.delta == 0 || !TraitsOf(spec).rotates) continue;
    turned.push_back({run.out, run.out, run.num_rows, run.delta});
    max_rows = std::max<int64_t>(max_rows, run.num_rows);
  }
  if (turned.empty()) return absl::OkStatus();
  kernels::RopeShiftArgs args = *KShiftArgsOf(group);
  args.runs = turned.data();
  args.num_runs = static_cast<int64_t>(turned.size());
  args.max_rows = max_rows;
  if (const char* wrong = kernels::CheckRopeShiftArgs(args)) {
    return absl::InvalidArgumentError(absl::StrCat("shift K: ", wrong));
  }
  kernels::RopeShiftHost(args);
  return absl::OkStatus();
}

}  // namespace pagetide
