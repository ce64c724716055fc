// EngineLayout: where the rows of each layer lie in an engine's pool, and the blocks that a slot
// map names. Every byte that a block can make us touch was checked to lie in the engine's memory
// when the layout was made, so that nothing but the block's number needs to be checked later.
//
// Immutable, thread-safe. All arithmetic on offsets, strides and blocks is here.
#ifndef PAGETIDE_WORKER_ENGINE_LAYOUT_H_
#define PAGETIDE_WORKER_ENGINE_LAYOUT_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/geometry.h"
#include "worker/device.h"
#include "worker/engine_memory.h"
#include "worker/row_move.h"

namespace pagetide {

// Of a token in slot t of block b, head h lies at
// offset + b * block_stride + t * token_stride + h * head_stride. Strides of 0: dense.
struct EnginePlaneSpec {
  uint32_t memory = 0;  // index into the client's memories
  uint64_t offset = 0;
  uint64_t block_stride = 0;
  uint64_t token_stride = 0;
  uint64_t head_stride = 0;
};

// Values equal the proto enum EngineGroup.Layout.
enum class EngineHeads : uint8_t {
  kNhd = 1,  // tokens outside heads
  kHnd = 2,  // heads outside tokens
};

struct EngineGroupSpec {
  struct Layer {
    EnginePlaneSpec k;
    std::optional<EnginePlaneSpec> v;
  };
  EngineHeads heads = EngineHeads::kNhd;
  std::optional<DataType> k_type, v_type;  // none: packed rows, no V
  uint32_t kv_heads = 0;
  std::vector<Layer> layers;
};

struct EnginePoolSpec {
  uint32_t block_tokens = 0;
  uint32_t num_blocks = 0;  // with the null block
  std::vector<EngineGroupSpec> groups;
};

// Blocks that hold the tokens from first_token on.
struct EngineSlotMap {
  uint64_t first_token = 0;
  std::vector<uint32_t> blocks;
};

class EngineLayout {
 public:
  static constexpr uint32_t kNullBlock = 0;
  static constexpr uint32_t kMaxBlockTokens = 65536;

  using Memories = std::vector<std::shared_ptr<const EngineMemory>>;

  // INVALID_ARGUMENT names the field and the numbers; FAILED_PRECONDITION (NO_ROWS).
  static absl::StatusOr<EngineLayout> Create(const PageGeometry& geometry,
                                             const EnginePoolSpec& spec, Memories memories);

  uint32_t block_tokens() const { return block_tokens_; }
  uint32_t num_blocks() const { return num_blocks_; }

  // One map for all groups, or one for each, over tokens up to `num_tokens`. INVALID_ARGUMENT for
  // blocks out of range, the null block, a block twice, or too many or too few of them.
  absl::Status CheckMaps(std::span<const EngineSlotMap> maps, uint64_t num_tokens) const;
  // Slots of tokens [begin, end) of a checked map, as kernels/page_move.h numbers them.
  std::vector<int64_t> Slots(const EngineSlotMap& map, uint64_t begin, uint64_t end) const;

  enum class Direction : uint8_t { kFromEngine, kToEngine };
  using Rows = RowMove::Rows;
  // Moves rows of one layer between the engine's blocks and frames of `pool`, or the host. The
  // pool's device addresses the engine's memory.
  absl::Status Move(Direction direction, uint32_t group, uint32_t layer, RowKind kind,
                    std::span<const Rows> runs, DevicePool* pool) const;

 private:
  struct Plane {
    std::byte* base = nullptr;
    int64_t block_stride = 0;
    int64_t token_stride = 0;
    int64_t head_stride = 0;
  };
  struct Group {
    // How a row falls into pieces that the engine may lay apart: its heads, or one for all.
    int32_t num_heads = 1;
    int64_t k_head_bytes = 0;
    int64_t v_head_bytes = 0;  // 0: no V
    std::vector<Plane> k, v;   // [layer]
  };

  EngineLayout() = default;

  Memories memories_;
  uint32_t block_tokens_ = 0;
  uint32_t num_blocks_ = 0;
  std::vector<Group> groups_;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_ENGINE_LAYOUT_H_
