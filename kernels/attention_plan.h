// How AttendCuda divides a batch among thread blocks, and what lies where in their shared memory
// and in the workspace. Pure functions of the batch's sizes, no device needed; plain C++17.
//
// A thread block takes the query rows of one KV head, up to block_rows of them (a query row is one
// query under one of the heads that share the KV head), and one chunk of the sequence's KV rows. It
// walks the chunk in tiles of tile_rows, each brought to shared memory once for all query rows.
// With more than one chunk the parts go to the workspace and a second kernel merges them.
#ifndef PAGETIDE_KERNELS_ATTENTION_PLAN_H_
#define PAGETIDE_KERNELS_ATTENTION_PLAN_H_

#include <cstdint>

#include "kernels/kv_type.h"
#include "kernels/paged_attention.h"

namespace pagetide::kernels {

// Elements of tiles as the arithmetic takes them.
enum class Operand : uint8_t {
  kF32,   // f32 arithmetic, any rows
  kF16,   // tensor cores: f16, fp8 and block types, all but f32 and bf16 rows
  kBF16,  // tensor cores: bf16 rows
};

inline constexpr int kDecodeRows = 16;  // query rows of a block when there are few: one matrix tile
inline constexpr int kPrefillRows = 64;   // when there are more
inline constexpr int kTensorTile = 64;    // KV rows of a tile on tensor cores
inline constexpr int kFloatTile = 16;     // in f32 arithmetic
inline constexpr int kMaxValueDim = 512;  // accumulators are registers

// The K or the V rows of a tile in shared memory. Rows of the operand's own type are copied
// straight into the tile, of which there is one a stage; others are copied as they are (raw) and
// then converted into a single tile.
struct AttentionTile {
  int32_t dim;            // elements of a head
  int32_t padded_dim;     // up to a multiple of 16; zeros behind dim
  int32_t pitch;          // bytes from row to row of a tile
  int32_t at;             // byte of the first tile
  int32_t stage_bytes;    // from tile to tile; 0 where rows are converted
  int32_t raw_pitch;      // bytes from row to row as they are; 0: none
  int32_t raw_at;         // byte of the first
  int32_t raw_bytes;      // from stage to stage
  int32_t head_bytes;     // of a head as it lies in memory
  int32_t element_bytes;  // of the operand
};

struct AttentionPlan {
  Operand operand;
  int32_t block_rows;  // kDecodeRows or kPrefillRows
  int32_t tile_rows;
  int32_t stages;      // tiles in shared memory: one that is worked on, the others on their way
  int32_t row_blocks;  // thread blocks that share a KV head's query rows
  int32_t num_chunks;
  int32_t chunk_rows;  // a multiple of tile_rows

  // Shared memory: offsets in bytes.
  AttentionTile k;
  AttentionTile v;        // K's where values are keys
  int32_t q_at;           // [block_rows, k.padded_dim] operand, by k.pitch
  int32_t scores_at;      // [block_rows, scores_pitch] f32
  int32_t scores_pitch;   // elements
  int32_t weights_at;     // [block_rows, weights_pitch] operand
  int32_t weights_pitch;  // elements
  int32_t factors_at;     // [block_rows] f32: by how much a row's sums shrink
  int32_t sums_at;        // [block_rows] f32
  int32_t visible_at;     // [block_rows] VisiblePositions
  int32_t tables_at;      // [stages] tables of a tile's rows
  int32_t shared_bytes;

  // Workspace: offsets in bytes.
  int64_t ends_at;            // [num_runs] i32: KV rows of the sequence up to the end of each run
  int64_t last_positions_at;  // [num_runs] i64: the position of the last of them
  int64_t parts_at;           // [num_chunks, query rows] f32 pairs: maximum, sum
  int64_t values_at;          // [num_chunks, query rows, v_dim] f32
  int64_t workspace_bytes;
};

// A tile's rows: where they lie and which positions they have.
struct AttentionTable {
  const char* k[kTensorTile];     // of the KV head; null where no query of the block sees the row
  const char* v[kTensorTile];     // likewise
  int64_t position[kTensorTile];  // INT64_MAX where there is no row
  int32_t is_seen[2];             // do all query rows see the first, the last row of the tile?
};

// Null and the plan for a device whose blocks can have `shared_limit` bytes of shared memory, or a
// sentence that says why there is none. Reads no array of the batch.
const char* PlanAttention(const AttentionBatch& batch, int32_t shared_limit, AttentionPlan* plan);

}  // namespace pagetide::kernels

#endif  // PAGETIDE_KERNELS_ATTENTION_PLAN_H_
