// Placement on shard groups: the workers of an engine's ranks, seen as one worker.
//
// A sequence over shards starts when its slowest rank does, and reuses what all ranks know. So a
// group is, for PlaceSequence, a worker that is at each number as bad as the worst of its ranks.
//
// Pure functions of values; thread-safe. `ranks` are snapshots that PlaceSequence takes, in order
// of rank, at least one.
#ifndef PAGETIDE_CORE_SHARD_PLACEMENT_H_
#define PAGETIDE_CORE_SHARD_PLACEMENT_H_

#include <cstddef>
#include <cstdint>

#include "absl/types/span.h"
#include "core/placement.h"

namespace pagetide {

// Waits, loads and latencies are the largest, rates and capacity the smallest; admitting if all
// are. A token of the prompt is in the slowest tier that a rank would take it from, and known as
// far as every rank knows it and can read it: behind a run in a tier without read bandwidth a rank
// knows nothing that it could use.
WorkerSnapshot MergeRanks(absl::Span<const WorkerSnapshot> ranks);

// The rank whose prefix is the shortest, counted as MergeRanks does; of equal ones the lowest.
size_t LimitingRank(absl::Span<const WorkerSnapshot> ranks);

// The rank that needs the longest for what the group does: reuse the first `reused_tokens`, which
// MergeRanks(ranks) knows, each from where it has them, and compute the rest. Of equal ones the
// lowest.
size_t SlowestRank(const PlacementRequest& request, absl::Span<const WorkerSnapshot> ranks,
                   int64_t reused_tokens);

}  // namespace pagetide

#endif  // PAGETIDE_CORE_SHARD_PLACEMENT_H_
