// Parking: sequences that outlive the process that has them open. A parked sequence is the manifest
// "parked/<tenant>/<sequence id>", whose payload is a SessionState, and the ownership record
// {"owner", "sequence/<sequence id>"}: the record's version is the sequence's epoch, its value says
// who owns it. Every durable write of such a sequence is fenced by that record.
//
//   open on A, epoch e ──Park──▶ nobody's, e + 1 ──Resume on B──▶ open on B, e + 2
//        │ Park(keep_open): durable so far, goes on             ▲
//        └── A dies: its lease ends ──Resume on B──▶ open on B, e + 1: A's writes are refused
//
// Domain: knows neither gRPC nor protobuf. Thread-safe. Worker, store and fence outlive it. Calls
// block until done or until their deadline.
#ifndef PAGETIDE_WORKER_PARKING_H_
#define PAGETIDE_WORKER_PARKING_H_

#include <cstdint>
#include <optional>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "base/mutex.h"
#include "core/page_store.h"
#include "core/sequence_id.h"
#include "core/session_state.h"
#include "worker/worker.h"
#include "worker/worker_fence.h"

namespace pagetide {

struct ParkRequest {
  SequenceHandle sequence;
  bool keep_open = false;
  std::optional<absl::Duration> ttl;  // of the parked state; absent: until it is closed
  std::string request_id;
  Digest request_digest;  // of all that was asked for
};

struct ParkAnswer {
  uint64_t version = 0;  // of the parked state: 1 for the first, then one more each
  uint64_t epoch = 0;    // of the sequence now
  bool is_open = false;  // still, here
  uint64_t tokens = 0;
  uint64_t pages = 0;
  uint64_t pages_written = 0;
  uint64_t bytes_written = 0;
  uint64_t bytes_total = 0;
};

struct ResumedSequence {
  ModelHost* host = nullptr;
  SequenceInfo info;
  uint64_t restoring_pages = 0;
  uint64_t parked_version = 0;
  bool was_taken_over = false;  // from a worker that never gave it up
};

class Parking {
 public:
  struct Options {
    // The lease of another worker is asked for with this, to learn that it is dead.
    absl::Duration lease_ttl = absl::Seconds(5);
  };
  // `store` may be null: then Park and Resume are FAILED_PRECONDITION (NO_STORE).
  Parking(Options options, Worker* worker, PageStore* store, WorkerFence* fence);

  // See SequenceService for what holds when these answer, and for their errors.
  absl::StatusOr<ParkAnswer> Park(const Tenant& tenant, ModelHost* host, const ParkRequest& request,
                                  MonotonicTime deadline);
  // The first answer of a Park with this request_id, if it made what is parked now.
  absl::StatusOr<std::optional<ParkAnswer>> FindAnswer(const Tenant& tenant, SequenceId id,
                                                       const ParkRequest& request,
                                                       MonotonicTime deadline);
  // One at a time of a sequence: the second waits and finds it open. DEADLINE_EXCEEDED when the
  // first is not done by then.
  absl::StatusOr<ResumedSequence> Resume(const Tenant& tenant, SequenceId id,
                                         absl::string_view model_digest, MonotonicTime deadline);

  // What durable writes of a sequence that is open here carry: its own fence if it was parked or
  // resumed, the worker's otherwise. Errors of WorkerFence; FAILED_PRECONDITION (STALE_EPOCH) for a
  // handle of another epoch than the one that is owned here.
  absl::StatusOr<WriteFence> FenceOf(const SequenceHandle& sequence, MonotonicTime deadline);
  // Was it parked or resumed by this life of the worker, and not closed since?
  bool Owns(SequenceId id) const;
  // May it be moved without the store? FAILED_PRECONDITION (SEQUENCE_IS_PARKED) when Owns, ABORTED
  // (SEQUENCE_IS_PARKED) while a park of it runs. For who has made sure that no snapshot of it is
  // taken any more: a later park fails then, before it writes anything durable.
  absl::Status CheckMayMove(SequenceId id) const;
  // A write with that fence was refused as stale: the copy that is open here, if there is one of
  // that epoch, is closed.
  void NoteStale(const WriteFence& fence);
  // Deletes the parked state and the ownership record of a sequence that is nobody's or this
  // worker's, and has this epoch. False, and nothing done, otherwise.
  absl::StatusOr<bool> Drop(const Tenant& tenant, SequenceId id, uint64_t epoch,
                            MonotonicTime deadline);
  // The worker closed a sequence because no call was made on it. If it was parked or resumed here,
  // what was parked last stays, and GiveUpIdle makes it nobody's.
  void NoteIdle(SequenceId id, uint64_t epoch);
  // Lets other workers resume what NoteIdle named, without waiting for this one's lease to end.
  // What fails is tried again by the next call.
  void GiveUpIdle(MonotonicTime deadline);
  // Compares what is open here with the ownership records, and closes what another has taken over.
  // For when the worker's lease was away.
  void CheckOwned(MonotonicTime deadline);

 private:
  struct Owned {
    std::string tenant;
    uint64_t epoch = 0;
    bool is_idle = false;  // closed here; its record still names this worker
  };
  struct Parked {
    ManifestRecord manifest;
    SessionState state;
  };

  absl::Status CheckStore() const;
  std::string MyOwnerValue() const;
  absl::StatusOr<std::optional<ManifestEntry>> Stat(const Tenant& tenant, SequenceId id,
                                                    MonotonicTime deadline);
  absl::StatusOr<Parked> Read(const Tenant& tenant, SequenceId id, MonotonicTime deadline);
  // Makes the ownership record of a sequence that is open here, if it has none yet.
  absl::Status Own(const Tenant& tenant, const SequenceHandle& sequence, MonotonicTime deadline);
  // Null when another park put what is not older than the snapshot: version `expected_version`,
  // which was read before the snapshot was taken, is no longer the parked state's.
  absl::StatusOr<std::optional<ParkAnswer>> PutParked(StateSnapshot& snapshot, const Tenant& tenant,
                                                      const ParkRequest& request,
                                                      uint64_t expected_version,
                                                      MonotonicTime deadline);
  // Gives the sequence up: closed here, nobody's in the store.
  absl::Status GiveUp(const Tenant& tenant, ModelHost* host, const SequenceHandle& sequence,
                      ParkAnswer* answer, MonotonicTime deadline);
  absl::StatusOr<ResumedSequence> ResumeAlone(const Tenant& tenant, SequenceId id,
                                              absl::string_view model_digest,
                                              MonotonicTime deadline, bool* was_taken_over);
  // A resume that took the sequence over could not open it: nobody's again, now or by GiveUpIdle.
  void GiveBack(const Tenant& tenant, SequenceId id, uint64_t epoch, MonotonicTime deadline);
  // Makes the sequence ours; returns its new epoch. FAILED_PRECONDITION (SEQUENCE_MOVED) when its
  // owner is alive, ABORTED when another was faster.
  absl::StatusOr<uint64_t> TakeOver(SequenceId id, const StoreRecord& record, bool* was_taken_over,
                                    MonotonicTime deadline);
  // Ends the epoch of a dead worker's record, so that what it had under way for sequences without
  // an owner of their own is refused too. Its lease is ours meanwhile. Returns the new epoch.
  absl::StatusOr<uint64_t> FenceOff(const StoreLease& lease, MonotonicTime deadline);
  absl::StatusOr<uint64_t> Advance(SequenceId id, const StoreRecord& record,
                                   MonotonicTime deadline);
  // Both do nothing if what this worker owns of the sequence is another epoch by now.
  void Forget(SequenceId id, uint64_t epoch);
  void CloseHere(SequenceId id, uint64_t epoch);
  void Count(absl::string_view operation, const absl::Status& status) const;

  const Options options_;
  Worker* const worker_;
  PageStore* const store_;
  WorkerFence* const fence_;

  mutable Mutex mu_;
  CondVar resumed_;
  absl::flat_hash_set<SequenceId> resuming_ ABSL_GUARDED_BY(mu_);
  // Parks that run, from before their snapshots to their end.
  absl::flat_hash_map<SequenceId, uint32_t> parking_ ABSL_GUARDED_BY(mu_);
  // Sequences whose ownership record names this worker's life. Bounded by what is open, and was
  // until a moment ago.
  absl::flat_hash_map<SequenceId, Owned> owned_ ABSL_GUARDED_BY(mu_);
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_PARKING_H_
