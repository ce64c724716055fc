// The work of an engine job: pages of a ModelHost into an engine's blocks, and blocks into pages.
// Both go through a sequence of their own, which nobody else sees and which ends with them, so that
// reads are pinned, pages restored and verified, and writes committed whole, as for any client.
// Stateless; each runs on one thread.
#ifndef PAGETIDE_WORKER_ENGINE_TRANSFER_H_
#define PAGETIDE_WORKER_ENGINE_TRANSFER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "base/clock.h"
#include "worker/engine_layout.h"
#include "worker/model_host.h"

namespace pagetide {

struct EngineTransfer {
  ModelHost* host = nullptr;
  Tenant tenant;
  // Shared with the pool and its other jobs; keeps the engine's memory mapped.
  std::shared_ptr<const EngineLayout> layout;
  std::vector<EngineSlotMap> maps;  // as EngineLayout::CheckMaps wants them
  // The prompt; of a load from an open sequence that sequence, and how many of its rows.
  std::vector<uint32_t> tokens;
  std::vector<PositionedInput> inputs;
  std::optional<SequenceId> sequence;
  uint64_t num_tokens = 0;
  bool allow_full_reuse = false;
  uint32_t pages_per_step = 4;  // pages that are pinned, or written, at once
  MonotonicTime deadline;
  const Clock* clock = nullptr;
};

// What a transfer has done so far; the numbers only grow.
struct EngineProgress {
  uint64_t usable_tokens = 0;
  // Of a load: the layer group whose rows usable_tokens waits for, while another has them.
  std::optional<uint32_t> limiting_group;
  uint64_t moved_pages = 0;
  uint64_t moved_bytes = 0;
  uint64_t known_pages = 0;
  std::optional<PrefixReuse> reuse;  // of a load by tokens, once it was looked up
};

// The job as its transfer sees it. Called from the transfer's thread.
class EngineTransferJob {
 public:
  virtual ~EngineTransferJob() = default;
  // Cheap: asked between any two copies.
  virtual bool is_stopped() const = 0;
  // The sequence that the transfer works on: who stops the job closes it, so that no wait for
  // frames holds the job up. Closed at once if the job was stopped before.
  virtual void Attach(ModelHost* host, const Tenant& tenant, const SequenceInfo& info) = 0;
  virtual void Detach() = 0;
  virtual void Report(const EngineProgress& progress) = 0;
};

// The status says why it ended early; what was reported holds all the same.
absl::Status LoadIntoEngine(const EngineTransfer& transfer, EngineTransferJob* job);
absl::Status StoreFromEngine(const EngineTransfer& transfer, EngineTransferJob* job);

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_ENGINE_TRANSFER_H_
