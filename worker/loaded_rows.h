// LoadedRows: what a load has to bring into an engine's blocks, what of it is there, and how many
// leading tokens are of use by it. The rule of what a token needs is SequenceRows'. For one thread.
#ifndef PAGETIDE_WORKER_LOADED_ROWS_H_
#define PAGETIDE_WORKER_LOADED_ROWS_H_

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "core/sequence_rows.h"
#include "worker/engine_layout.h"
#include "worker/model_host.h"

namespace pagetide {

// One map for all groups, or one for each.
const EngineSlotMap& MapOf(std::span<const EngineSlotMap> maps, uint32_t group);

class LoadedRows {
 public:
  // Of a model whose groups all have rows. Both arguments outlive it.
  LoadedRows(const PageGeometry& geometry, std::span<const EngineSlotMap> maps);

  // Takes a sequence as the place where rows come from; one that follows another has its tokens, or
  // fewer, or more. Answers how many of its rows are worth loading: all, unless the slot maps leave
  // rows out that a token behind them would see. FAILED_PRECONDITION (WINDOW_NOT_MAPPED) when none
  // are.
  absl::StatusOr<uint64_t> Plan(SequenceContents contents);
  // What the sequence holds of rows [begin, end), the slot map wants, and is not there yet.
  std::vector<RowSpan> Wanted(uint32_t group, uint64_t begin, uint64_t end) const;
  // Rows of all the group's layers have arrived.
  void Add(uint32_t group, const RowSpan& span);

  struct Usable {
    uint64_t tokens = 0;
    // Of it the slot map leaves out what a further token needs, or such a row has not come while
    // another group has it.
    std::optional<uint32_t> limiting_group;
  };
  // Of the first `rows` rows.
  Usable UsableOf(uint64_t rows) const;
  uint64_t first_mapped() const { return first_mapped_; }

 private:
  const PageGeometry& geometry_;
  const std::span<const EngineSlotMap> maps_;
  uint64_t first_mapped_ = 0;  // the first token that any map has a slot for
  std::vector<GroupTraits> traits_;
  SequenceRows rows_;                         // tokens and positions only
  UsablePrefix planned_;                      // when all that is wanted has come
  std::vector<std::vector<RowSpan>> held_;    // [group], by the sequence
  std::vector<std::vector<RowSpan>> loaded_;  // [group], in the engine's blocks
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_LOADED_ROWS_H_
