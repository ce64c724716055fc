// How often a manifest is tried again: for saved sessions, parked sequences and pins alike.
#ifndef PAGETIDE_WORKER_MANIFEST_RACES_H_
#define PAGETIDE_WORKER_MANIFEST_RACES_H_

namespace pagetide {

// How often pages may vanish between their put and the manifest's check.
inline constexpr int kMaxPutAgain = 3;
// How often a manifest without a version of its own may lose the race for the next one.
inline constexpr int kMaxRaces = 8;

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_MANIFEST_RACES_H_
