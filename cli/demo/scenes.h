// The scenes of the demo, on real text over a real fleet. Each returns what it measured; an error
// means that a call failed, not that a check does not hold.
#ifndef PAGETIDE_CLI_DEMO_SCENES_H_
#define PAGETIDE_CLI_DEMO_SCENES_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "cli/demo/player.h"
#include "cli/demo/report.h"
#include "cli/demo/texts.h"
#include "cli/fleet.h"

namespace pagetide::demo {

// Frames a worker: two workers hold fewer pages than the scene of the small pool uses.
inline constexpr uint64_t kFramesPerWorker = 12;
inline constexpr uint32_t kPageTokens = 256;

struct Stage {
  Player* player;
  const Texts* texts;
  Fleet* fleet;
};

// FEATURES.md A5: prompts of 400 + 200 + 80, 81, 82 tokens, 300 new tokens each.
absl::StatusOr<SceneReport> PlaySharedPrefix(Stage& stage);
// A conversation whose every turn is a new request over the whole history.
absl::StatusOr<SceneReport> PlayChat(Stage& stage);
// Three questions over one document.
absl::StatusOr<SceneReport> PlayQuestions(Stage& stage);
// More open conversations than frames, taking turns.
absl::StatusOr<SceneReport> PlaySmallPool(Stage& stage);
// A byte of a stored page is flipped on disk: found, and computed again.
absl::StatusOr<SceneReport> PlayDamagedDisk(Stage& stage);
// kill -9 of the worker that holds a conversation, which goes on at the other. Leaves one worker.
absl::StatusOr<SceneReport> PlayKilledWorker(Stage& stage);
// With checksums off: a wrong byte comes back and the logits show it.
absl::StatusOr<SceneReport> PlayPlantedFlip(Stage& stage);

}  // namespace pagetide::demo

#endif  // PAGETIDE_CLI_DEMO_SCENES_H_
