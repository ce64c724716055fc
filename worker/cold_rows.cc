#include "worker/cold_rows.h"

#include <vector>

#include "base/check.h"
#include "kernels/convert_rows.h"

namespace pagetide {
namespace {

kernels::KvType KvTypeOf(DataType type) {
  return static_cast<kernels::KvType>(static_cast<int>(type) - 1);
}

// Rows of all layers of one kind. `in` and `out` have the layouts of a page and of a stored page,
// or the other way round.
void Convert(const GroupGeometry& group, RowKind kind, bool to_cold, const std::byte* in,
             std::byte* out) {
  if (group.row_bytes(kind) == 0) return;
  const LayerGroupSpec& spec = group.spec();
  const bool is_k = kind == RowKind::kK;
  const DataType hot = is_k ? spec.k_type : spec.v_type;
  const DataType cold = (is_k ? spec.cold_k_type : spec.cold_v_type).value_or(hot);
  std::vector<kernels::ConvertRun> runs;
  for (uint32_t layer = 0; layer < group.num_layers(); ++layer) {
    const uint64_t hot_at = group.RowOffset(layer, kind, 0);
    const uint64_t cold_at = group.StoredRowOffset(layer, kind, 0);
    runs.push_back({in + (to_cold ? hot_at : cold_at), out + (to_cold ? cold_at : hot_at),
                    group.page_tokens()});
  }
  kernels::ConvertRowsArgs args{};
  args.in_type = KvTypeOf(to_cold ? hot : cold);
  args.out_type = KvTypeOf(to_cold ? cold : hot);
  args.row_elements = int64_t{spec.kv_heads} * (is_k ? spec.k_dim : spec.v_dim);
  args.in_row_bytes = to_cold ? group.row_bytes(kind) : group.stored_row_bytes(kind);
  args.out_row_bytes = to_cold ? group.stored_row_bytes(kind) : group.row_bytes(kind);
  args.runs = runs.data();
  args.num_runs = static_cast<int64_t>(runs.size());
  args.max_rows = group.page_tokens();
  PT_CHECK(kernels::CheckConvertRowsArgs(args) == nullptr);
  kernels::ConvertRowsHost(args);
}

}  // namespace

void EncodeColdPage(const GroupGeometry& group, std::span<const std::byte> page,
                    std::span<std::byte> cold) {
  PT_CHECK(page.size() == group.page_bytes() && cold.size() == group.stored_page_bytes());
  for (RowKind kind : {RowKind::kK, RowKind::kV}) {
    Convert(group, kind, /*to_cold=*/true, page.data(), cold.data());
  }
}

void DecodeColdPage(const GroupGeometry& group, std::span<const std::byte> cold,
                    std::span<std::byte> page) {
  PT_CHECK(page.size() == group.page_bytes() && cold.size() == group.stored_page_bytes());
  for (RowKind kind : {RowKind::kK, RowKind::kV}) {
    Convert(group, kind, /*to_cold=*/false, cold.data(), page.data());
  }
}

}  // namespace pagetide
