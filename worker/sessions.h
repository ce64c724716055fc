// Sessions: named saved state in the store, for all models of a worker. A session is the manifest
// "session/<tenant>/<name>"; its payload is a SessionState.
//
// Domain: knows neither gRPC nor protobuf. Thread-safe. Worker, store and fence outlive it. Calls
// block until done or until their deadline.
#ifndef PAGETIDE_WORKER_SESSIONS_H_
#define PAGETIDE_WORKER_SESSIONS_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/mutex.h"
#include "core/page_store.h"
#include "core/session_state.h"
#include "worker/parking.h"
#include "worker/worker.h"
#include "worker/worker_fence.h"

namespace pagetide {

struct SaveRequest {
  SequenceHandle sequence;
  std::string name;
  std::map<std::string, std::string> metadata;
  std::optional<uint64_t> expected_version;  // 0: none may be there; absent: replace what is there
  Durability level = Durability::kLocal;
  std::optional<uint64_t> keep_tokens;
  // First move the sequence's rows together, so that pages hold no rows that it has not.
  bool compact = false;
  std::string request_id;
  Digest request_digest;  // of all that was asked for
};

struct SaveAnswer {
  uint64_t version = 0;
  uint64_t tokens = 0;
  uint64_t canonical_length = 0;
  uint64_t pages = 0;
  uint64_t pages_written = 0;
  uint64_t bytes_written = 0;
  uint64_t bytes_total = 0;
  Durability durability = Durability::kLocal;
};

struct StoredSession {
  std::string name;
  uint64_t version = 0;
  uint64_t num_pages = 0;
  absl::Time saved_at = absl::UnixEpoch();
  SessionState state;
};

struct ListedSession {
  std::string name;
  uint64_t version = 0;
  uint64_t num_pages = 0;
  absl::Time saved_at = absl::UnixEpoch();
  SessionSummary summary;
};

struct LoadedSession {
  ModelHost* host = nullptr;
  OpenResult open;
  StoredSession session;
};

class Sessions {
 public:
  // `store` may be null: then every call is FAILED_PRECONDITION (NO_STORE).
  // `parking` may be null: then no sequence has an owner of its own.
  Sessions(Worker* worker, PageStore* store, WorkerFence* fence, Parking* parking = nullptr);

  // See SessionService for what checkpoints are; these add what a write to the store carries, and
  // count.
  absl::StatusOr<CheckpointInfo> CreateCheckpoint(const Tenant& tenant, ModelHost* host,
                                                  const SequenceHandle& sequence,
                                                  CheckpointOptions options,
                                                  MonotonicTime deadline);
  absl::StatusOr<SequenceInfo> RestoreCheckpoint(const Tenant& tenant, ModelHost* host,
                                                 const SequenceHandle& sequence,
                                                 uint64_t checkpoint_id, MonotonicTime deadline);

  // See SessionService.SaveSession for what holds when it answers, and for the errors.
  absl::StatusOr<SaveAnswer> Save(const Tenant& tenant, ModelHost* host, const SaveRequest& request,
                                  MonotonicTime deadline);
  // The first answer of a save with this request_id, if it is what the session holds now.
  // INVALID_ARGUMENT (REQUEST_ID_REUSED) when something else was asked for under that id.
  absl::StatusOr<std::optional<SaveAnswer>> FindAnswer(const Tenant& tenant,
                                                       const SaveRequest& request,
                                                       MonotonicTime deadline);
  // `model_digest` (hex) may be empty: the session's.
  absl::StatusOr<LoadedSession> Load(const Tenant& tenant, absl::string_view name,
                                     std::optional<uint64_t> version,
                                     absl::string_view model_digest, std::optional<uint64_t> length,
                                     MonotonicTime deadline);
  // A session with the pages of its manifest. NOT_FOUND (SESSION_NOT_FOUND), DATA_LOSS.
  absl::StatusOr<StoredSession> Read(const Tenant& tenant, absl::string_view name,
                                     std::vector<ManifestPageRef>* pages, MonotonicTime deadline);
  absl::StatusOr<StoredSession> Peek(const Tenant& tenant, absl::string_view name,
                                     MonotonicTime deadline);
  // In order of name, after `after`, at most `limit`.
  absl::StatusOr<std::vector<ListedSession>> List(const Tenant& tenant, absl::string_view prefix,
                                                  absl::string_view after, size_t limit,
                                                  MonotonicTime deadline);
  // Returns the version that was deleted.
  absl::StatusOr<uint64_t> Delete(const Tenant& tenant, absl::string_view name,
                                  std::optional<uint64_t> expected_version, MonotonicTime deadline);
  // How many sequences this worker loaded from the session.
  uint64_t LoadsHere(const Tenant& tenant, absl::string_view name) const;

 private:
  // The handle of the sequence once nothing is left to move.
  static absl::StatusOr<SequenceHandle> Compacted(const Tenant& tenant, ModelHost* host,
                                                  SequenceHandle sequence, MonotonicTime deadline);
  // What is there now; version 0 when nothing is.
  absl::StatusOr<ManifestEntry> Stat(const std::string& manifest, MonotonicTime deadline);
  absl::StatusOr<PutManifestResult> PutState(StateSnapshot& snapshot, const SaveRequest& request,
                                             ManifestRecord manifest, uint64_t expected_version,
                                             const WriteFence& fence, SaveAnswer* answer,
                                             MonotonicTime deadline);
  absl::Status CheckStore() const;
  // Counts `status` under its operation and reason.
  void Count(absl::string_view operation, const absl::Status& status) const;

  Worker* const worker_;
  PageStore* const store_;
  WorkerFence* const fence_;
  Parking* const parking_;
  Counter* const bytes_written_;
  Counter* const bytes_total_;

  mutable Mutex mu_;
  // By manifest name. Bounded: forgotten when there are too many.
  absl::flat_hash_map<std::string, uint64_t> loads_ ABSL_GUARDED_BY(mu_);
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_SESSIONS_H_
