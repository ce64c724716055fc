// WorkerRegistry: the workers and stores that are attached to this router, their last load, and the
// open sequences they own, all as they reported it.
//
//   hello                 load.is_draining              stream ends, or silent for liveness_ttl
//   ─────▶ serving ◀───────────────────────▶ draining ──────────▶ dead ──(dead_retention)──▶
//   forgotten
//                                                     (from serving too; a new hello revives)
//
// Liveness is a lease per worker id in a LeaseTable, renewed by every message. A hello of another
// incarnation takes the id over: of two processes with one id the later wins, and what the earlier
// still sends is refused as stale. A dead worker's sequences are dropped: what was saved is
// reopened elsewhere.
//
// Not thread-safe: the owner calls it under its lock.
#ifndef PAGETIDE_CORE_WORKER_REGISTRY_H_
#define PAGETIDE_CORE_WORKER_REGISTRY_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "base/strong_id.h"
#include "core/lease_table.h"
#include "core/residency_map.h"
#include "core/sequence_id.h"

namespace pagetide {

// One stream of one process to this router. Never reused.
using AttachmentId = StrongId<struct AttachmentTag>;

enum class SourceRole : uint8_t { kWorker, kStore };
enum class WorkerState : uint8_t { kServing, kDraining, kDead };
// "serving", "draining", "dead".
absl::string_view WorkerStateName(WorkerState state);

struct WorkerHello {
  std::string worker_id;
  uint64_t incarnation = 0;
  std::string address;
  std::string local_socket;
  SourceRole role = SourceRole::kWorker;
  std::string host;
  // The engine whose ranks this worker and others serve together, a name, and which is this one's.
  std::string shard_group;  // empty: none
  uint32_t shard_rank = 0;
  // Reported by a part of this process, which detaches it: silence is no sign of death.
  bool is_in_process = false;
};

struct WorkerLoad {
  uint64_t free_frames = 0;
  uint64_t evictable_frames = 0;
  uint64_t total_frames = 0;
  uint64_t open_sequences = 0;
  uint64_t running_calls = 0;
  uint64_t queued_prefill_tokens = 0;
  double prefill_tokens_per_second = 0;  // 0: not measured yet
  double store_bytes_per_second = 0;     // 0: not measured yet
  double host_bytes_per_second = 0;      // 0: not measured yet
  bool is_draining = false;
  bool loads_models_on_demand = false;
  std::vector<std::string> model_digests;
};

struct SequenceChange {
  SequenceId id;
  std::string model_digest;
  uint64_t length = 0;
  bool is_closed = false;
};

struct OwnedSequence {
  std::string model_digest;
  uint64_t length = 0;
};

struct WorkerRecord {
  // Shared with placements that are being computed outside the owner's lock.
  std::shared_ptr<const WorkerHello> hello;
  AttachmentId attachment;
  uint64_t epoch = 0;
  WorkerState state = WorkerState::kServing;
  std::optional<WorkerLoad> load;  // absent until the first report
  // Prompt tokens to compute of sequences that this router assigned since the last load report.
  uint64_t assigned_tokens = 0;
  ResidencySourceId source;
  MonotonicTime last_heard;
  absl::btree_map<SequenceId, OwnedSequence> sequences;
};

// What keeps a worker from taking sequences, or an empty string.
std::string WhyNotServing(const WorkerRecord& worker);

class WorkerRegistry {
 public:
  struct Options {
    absl::Duration liveness_ttl = absl::Seconds(3);
    // How long a dead worker stays in lists.
    absl::Duration dead_retention = absl::Minutes(10);
    size_t max_workers = 96;  // stores and dead ones included
    size_t max_sequences_per_worker = 200000;
  };
  // A worker whose attachment ended: its residency is to be removed and its stream to be closed.
  struct Departure {
    std::string worker_id;
    AttachmentId attachment;
    ResidencySourceId source;
    std::string because;
  };
  struct Attached {
    AttachmentId id;
    std::optional<Departure> replaced;  // the attachment this one took over from
  };

  // `clock` outlives the registry.
  WorkerRegistry(Options options, Clock* clock);

  // INVALID_ARGUMENT for a bad name, incarnation or address; RESOURCE_EXHAUSTED beyond max_workers.
  absl::StatusOr<Attached> Attach(WorkerHello hello, ResidencySourceId source);
  // The next four: FAILED_PRECONDITION (STALE_EPOCH) when the attachment has ended or was taken
  // over.
  absl::Status Heard(AttachmentId attachment);
  absl::Status RecordLoad(AttachmentId attachment, WorkerLoad load);
  // A snapshot replaces all sequences of the worker. RESOURCE_EXHAUSTED beyond
  // max_sequences_per_worker: the rest is not known here, and calls for it go to its worker by id.
  absl::Status RecordSequences(AttachmentId attachment, bool is_snapshot,
                               std::span<const SequenceChange> changes);
  absl::StatusOr<ResidencySourceId> SourceOf(AttachmentId attachment) const;

  // The stream ended. Nullopt if the attachment had ended before.
  std::optional<Departure> Detach(AttachmentId attachment, absl::string_view because);
  // Ends attachments that were silent for liveness_ttl, and forgets workers that are long dead.
  std::vector<Departure> TakeExpired();

  // Sequences placed here until the next load report make the queue longer.
  void AddAssignedTokens(absl::string_view worker_id, uint64_t tokens);

  // Ordered by id, dead ones included.
  const std::map<std::string, WorkerRecord, std::less<>>& workers() const { return workers_; }
  const WorkerRecord* Find(absl::string_view worker_id) const;
  struct SequencePlace {
    SequenceId id;
    OwnedSequence sequence;
    std::shared_ptr<const WorkerHello> owner;
  };
  std::optional<SequencePlace> FindSequence(SequenceId id) const;
  // In order of id, after `after`, at most `limit`.
  std::vector<SequencePlace> ListSequences(SequenceId after, size_t limit) const;

 private:
  // STALE_EPOCH unless it is the current attachment of a worker that is not dead.
  absl::StatusOr<WorkerRecord*> FindLive(AttachmentId attachment);
  absl::Duration TtlOf(const WorkerHello& hello) const {
    return hello.is_in_process ? absl::InfiniteDuration() : options_.liveness_ttl;
  }
  Departure Bury(WorkerRecord& worker, absl::string_view because);

  const Options options_;
  Clock* const clock_;
  LeaseTable leases_;
  std::map<std::string, WorkerRecord, std::less<>> workers_;
  // Live attachments only.
  absl::btree_map<AttachmentId, std::string> worker_of_;
  uint64_t next_attachment_ = 0;
};

}  // namespace pagetide

#endif  // PAGETIDE_CORE_WORKER_REGISTRY_H_
