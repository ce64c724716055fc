// Ids of the domain. Each is a StrongId, so that a page can never be passed where a frame is meant.
#ifndef PAGETIDE_CORE_IDS_H_
#define PAGETIDE_CORE_IDS_H_

#include <cstdint>

#include "base/strong_id.h"

namespace pagetide {

// A page (content) inside one process, for as long as that process knows it. Never on the wire:
// between processes a page is named by its PageKey.
using PageId = StrongId<struct PageIdTag>;

// A frame (place) of one tier's pool, 0…N-1. Frame 0 is the null frame that pads block tables.
using FrameId = StrongId<struct FrameIdTag, uint32_t>;

// A layer group of a page geometry, by its position in the geometry's list.
using GroupIndex = StrongId<struct GroupIndexTag, uint32_t>;

}  // namespace pagetide

#endif  // PAGETIDE_CORE_IDS_H_
