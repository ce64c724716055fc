#include "kernels/attention_plan.h"

#include <algorithm>

#include "kernels/attention_mask.h"

namespace pagetide::kernels {
namespace {

// Enough thread blocks that the last ones to run, of any GPU of today, are a small part of all.
constexpr int64_t kTargetBlocks = 2048;
constexpr int64_t kMinChunkRows = 256;

int64_t RoundUp(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

Operand OperandOf(KvType k, KvType v) {
  if (k == KvType::kBF16 && v == KvType::kBF16) return Operand::kBF16;
  for (const KvType type : {k, v}) {
    if (type == KvType::kF32 || type == KvType::kBF16) return Operand::kF32;
  }
  return Operand::kF16;
}

KvType TypeOf(Operand operand) {
  return operand == Operand::kF32   ? KvType::kF32
         : operand == Operand::kF16 ? KvType::kF16
                                    : KvType::kBF16;
}

class SharedLayout {
 public:
  int32_t Take(int64_t bytes) {
    const int64_t at = bytes_;
    bytes_ += RoundUp(bytes, 16);
    return static_cast<int32_t>(at);
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

AttentionTile LayOutTile(const AttentionPlan& plan, KvType type, int32_t dim,
                         SharedLayout* shared) {
  AttentionTile tile{};
  tile.dim = dim;
  tile.padded_dim = static_cast<int32_t>(RoundUp(dim, 16));
  tile.element_bytes = GroupBytes(TypeOf(plan.operand));
  tile.head_bytes = static_cast<int32_t>(EncodedBytes(type, dim));
  // 16 bytes more than a multiple of 32: the rows of a matrix lie in different banks.
  tile.pitch = tile.padded_dim * tile.element_bytes + 16;
  const int32_t tile_bytes = plan.tile_rows * tile.pitch;
  if (type == TypeOf(plan.operand)) {
    tile.stage_bytes = tile_bytes;
    tile.at = shared->Take(int64_t{plan.stages} * tile_bytes);
  } else {
    tile.at = shared->Take(tile_bytes);
    // From the multiple of 16 before a head to the one behind it.
    tile.raw_pitch = static_cast<int32_t>(RoundUp(tile.head_bytes + 15, 16));
    tile.raw_bytes = plan.tile_rows * tile.raw_pitch;
    tile.raw_at = shared->Take(int64_t{plan.stages} * tile.raw_bytes);
  }
  return tile;
}

// Bytes of shared memory; offsets go to the plan.
int64_t LayOutShared(const AttentionBatch& batch, AttentionPlan* plan) {
  const AttentionShape& shape = batch.all.shape;
  SharedLayout shared;
  plan->k = LayOutTile(*plan, shape.k_type, shape.k_dim, &shared);
  if (batch.values_are_keys) {
    plan->v = plan->k;
    plan->v.dim = shape.v_dim;
    plan->v.padded_dim = static_cast<int32_t>(RoundUp(shape.v_dim, 16));
  } else {
    plan->v = LayOutTile(*plan, shape.v_type, shape.v_dim, &shared);
  }
  plan->q_at = shared.Take(int64_t{plan->block_rows} * plan->k.pitch);
  // The threads that share a query row, 8 or 4, read neighbouring scores: their rows lie in
  // different banks.
  plan->scores_pitch = plan->tile_rows + (plan->block_rows == kPrefillRows ? 4 : 8);
  plan->scores_at = shared.Take(int64_t{plan->block_rows} * plan->scores_pitch * 4);
  plan->weights_pitch = plan->tile_rows + 16 / plan->k.element_bytes;
  plan->weights_at =
      shared.Take(int64_t{plan->block_rows} * plan->weights_pitch * plan->k.element_bytes);
  plan->factors_at = shared.Take(int64_t{plan->block_rows} * 4);
  plan->sums_at = shared.Take(int64_t{plan->block_rows} * 4);
  plan->visible_at = shared.Take(plan->block_rows * static_cast<int64_t>(sizeof(VisiblePositions)));
  plan->tables_at = shared.Take(plan->stages * static_cast<int64_t>(sizeof(AttentionTable)));
  plan->shared_bytes = static_cast<int32_t>(shared.bytes());
  return shared.bytes();
}

}  // namespace

const char* PlanAttention(const AttentionBatch& batch, int32_t shared_limit, AttentionPlan* plan) {
  const AttentionShape& shape = batch.all.shape;
  if (const char* wrong = CheckAttentionShape(shape)) return wrong;
  if (shape.v_dim > kMaxValueDim) return "v_dim is above 512";
  if (shape.k_dim > 4096) return "k_dim is above 4096";
  if (batch.num_sequences < 0 || batch.num_sequences > 65535) {
    return "num_sequences must be 0 to 65535";
  }
  if (batch.max_rows < 0 || batch.max_rows > INT32_MAX - kTensorTile) {
    return "max_rows must be 0 to 2^31 - 65";
  }
  if (batch.max_queries < 0 || batch.all.num_queries < 0 || batch.all.num_runs < 0 ||
      batch.all.num_runs > INT32_MAX) {
    return "max_queries, num_queries and num_runs must not be negative, num_runs below 2^31";
  }
  const int64_t rows = batch.max_queries * (shape.num_q_heads / shape.num_kv_heads);
  *plan = AttentionPlan{};
  plan->operand = OperandOf(shape.k_type, shape.v_type);
  plan->tile_rows = plan->operand == Operand::kF32 ? kFloatTile : kTensorTile;
  // Blocks of many query rows read the KV rows less often. Of what does not fit, first the overlap
  // of copies and arithmetic goes, then the size of the blocks.
  bool fits = false;
  for (const int32_t block_rows : {kPrefillRows, kDecodeRows}) {
    if (block_rows == kPrefillRows && (plan->operand == Operand::kF32 || rows <= kDecodeRows)) {
      continue;
    }
    for (const int32_t stages : {2, 1}) {
      plan->block_rows = block_rows;
      plan->stages = stages;
      fits = fits || LayOutShared(batch, plan) <= shared_limit;
      if (fits) break;
    }
    if (fits) break;
  }
  if (!fits) return "the shape's tiles do not fit the device's shared memory";

  const int64_t row_blocks = (rows + plan->block_rows - 1) / plan->block_rows;
  if (row_blocks * shape.num_kv_heads > INT32_MAX) return "max_queries is too large for one call";
  plan->row_blocks = static_cast<int32_t>(row_blocks);
  const int64_t blocks =
      std::max<int64_t>(1, batch.num_sequences * shape.num_kv_heads * row_blocks);
  const int64_t most_chunks =
      std::max<int64_t>(1, (batch.max_rows + kMinChunkRows - 1) / kMinChunkRows);
  const int64_t chunks = std::clamp<int64_t>(kTargetBlocks / blocks, 1, most_chunks);
  plan->chunk_rows = static_cast<int32_t>(
      RoundUp(std::max<int64_t>(1, (batch.max_rows + chunks - 1) / chunks), plan->tile_rows));
  plan->num_chunks = static_cast<int32_t>(
      std::max<int64_t>(1, (batch.max_rows + plan->chunk_rows - 1) / plan->chunk_rows));

  int64_t bytes = 0;
  const auto take = [&bytes](int64_t size) {
    const int64_t at = bytes;
    bytes += RoundUp(size, 256);
    return at;
  };
  plan->ends_at = take(batch.all.num_runs * 4);
  plan->last_positions_at = take(batch.all.num_runs * 8);
  if (plan->num_chunks > 1) {
    const int64_t parts = plan->num_chunks * batch.all.num_queries * shape.num_q_heads;
    plan->parts_at = take(parts * 8);
    plan->values_at = take(parts * shape.v_dim * 4);
  }
  plan->workspace_bytes = bytes;
  return nullptr;
}

}  // namespace pagetide::kernels
