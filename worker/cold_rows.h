// Pages in the types that a store keeps: the rows of a group whose model names colder types
// (LayerGroupSpec::cold_k_type), converted as its pages leave for the store and as they come back.
// The way there is lossy; both ways are pure functions of the bytes, the same on every machine.
// Stateless; thread-safe.
#ifndef PAGETIDE_WORKER_COLD_ROWS_H_
#define PAGETIDE_WORKER_COLD_ROWS_H_

#include <cstddef>
#include <span>

#include "core/geometry.h"

namespace pagetide {

// page: page_bytes() of the group, cold: stored_page_bytes(). The group has cold types.
void EncodeColdPage(const GroupGeometry& group, std::span<const std::byte> page,
                    std::span<std::byte> cold);
void DecodeColdPage(const GroupGeometry& group, std::span<const std::byte> cold,
                    std::span<std::byte> page);

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_COLD_ROWS_H_
