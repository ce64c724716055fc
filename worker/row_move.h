// RowMove: rows of one layer that go between an engine's blocks and memory of ours, as a device
// carries it out (DevicePool::MoveRows). Functions are stateless.
#ifndef PAGETIDE_WORKER_ROW_MOVE_H_
#define PAGETIDE_WORKER_ROW_MOVE_H_

#include <cstddef>
#include <cstdint>
#include <span>

#include "absl/status/status.h"
#include "kernels/page_move.h"

namespace pagetide {

struct RowMove {
  // Consecutive rows, token-major: [slots.size()][num_heads × head_bytes].
  struct Rows {
    std::byte* host = nullptr;       // where they lie on the host; null: in the pool
    uint64_t pool_offset = 0;        // of the first one there
    std::span<const int64_t> slots;  // of the engine, none below 0
  };

  kernels::PageMoveDirection direction = kernels::PageMoveDirection::kGather;
  // In memory that the pool's device addresses; page_offset 0. That every slot lies in the memory
  // is the caller's to know.
  kernels::EnginePlane plane{};
  int32_t engine_page_tokens = 1;
  int32_t num_heads = 1;
  int64_t head_bytes = 0;
  std::span<const Rows> runs;

  uint64_t row_bytes() const {
    return static_cast<uint64_t>(num_heads) * static_cast<uint64_t>(head_bytes);
  }
};

// INVALID_ARGUMENT: rows that leave a pool of `pool_bytes`, slots below 0, sizes that cannot be.
absl::Status CheckRowMove(const RowMove& move, uint64_t pool_bytes);

// The kernel's arguments but for the arrays, which are the caller's to give addresses.
kernels::PageMoveArgs PageMoveArgsOf(const RowMove& move);

// Carries out a checked move where the host addresses all of it; `pool`: the pool's first byte.
void MoveRowsOnHost(const RowMove& move, std::byte* pool);

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_ROW_MOVE_H_
