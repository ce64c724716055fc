// Retentions: how long pages under token ranges stay in the store. A retention is a property of the
// pages themselves (priority, time to live); a pin is a named root, the manifest
// "pin/<tenant>/<name>", that protects its pages until it is removed or expires. Both outlive the
// sequence, the worker and a restart of the store.
//
// Domain: knows neither gRPC nor protobuf. Thread-safe. Worker, store and fence outlive it. Calls
// block until done or until their deadline.
#ifndef PAGETIDE_WORKER_RETENTION_H_
#define PAGETIDE_WORKER_RETENTION_H_

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "core/page_store.h"
#include "worker/worker.h"
#include "worker/worker_fence.h"

namespace pagetide {

// Tokens [begin, end) of a sequence; end absent: its committed length.
struct TokenRange {
  uint64_t begin = 0;
  std::optional<uint64_t> end;
};

struct RangeRetention {
  TokenRange range;
  uint32_t priority = kDefaultPriority;
  std::optional<absl::Duration> ttl;  // absent: for ever
};

struct RetentionAnswer {
  uint64_t pages = 0;
  uint64_t pages_written = 0;
  uint64_t bytes_written = 0;
};

struct PinRequest {
  SequenceHandle sequence;
  std::string name;
  TokenRange range;
  std::optional<absl::Duration> ttl;  // absent: until Unpin
  std::string request_id;
  Digest request_digest;  // of all that was asked for
};

// What a pin's manifest says of it in a list: the summary of the manifest. Stored form:
// docs/store_format.md.
struct PinSummary {
  uint64_t begin = 0;
  uint64_t end = 0;
  uint64_t bytes = 0;  // raw page bytes
  uint64_t pages_written = 0;
  uint64_t bytes_written = 0;
  Digest model_digest;
  Digest request_digest;
  friend bool operator==(const PinSummary&, const PinSummary&) = default;
};
std::string EncodePinSummary(const PinSummary& summary);
// DATA_LOSS: damage; UNIMPLEMENTED: the version of a newer program.
absl::StatusOr<PinSummary> ParsePinSummary(absl::string_view bytes);

struct Pin {
  std::string name;
  uint64_t num_pages = 0;
  absl::Time pinned_at = absl::UnixEpoch();
  std::optional<absl::Time> expires_at;
  PinSummary summary;
};

class Retentions {
 public:
  // `store` may be null: then every call is FAILED_PRECONDITION (NO_STORE).
  Retentions(Worker* worker, PageStore* store, WorkerFence* fence);

  // See SequenceEditService for what holds when these answer, and for their errors.
  absl::StatusOr<RetentionAnswer> Set(const Tenant& tenant, ModelHost* host,
                                      const SequenceHandle& sequence,
                                      std::span<const RangeRetention> ranges,
                                      MonotonicTime deadline);
  absl::StatusOr<Pin> PinRange(const Tenant& tenant, ModelHost* host, const PinRequest& request,
                               MonotonicTime deadline);
  // The first answer of a PinRange with this request_id, if its pin is what is there now.
  absl::StatusOr<std::optional<Pin>> FindAnswer(const Tenant& tenant, const PinRequest& request,
                                                MonotonicTime deadline);
  absl::Status Unpin(const Tenant& tenant, absl::string_view name, MonotonicTime deadline);
  // In order of name, after `after`, at most `limit`.
  absl::StatusOr<std::vector<Pin>> List(const Tenant& tenant, absl::string_view prefix,
                                        absl::string_view after, size_t limit,
                                        MonotonicTime deadline);

 private:
  absl::Status CheckStore() const;
  // What is there now; version 0 when nothing is.
  absl::StatusOr<ManifestEntry> Stat(const std::string& manifest, MonotonicTime deadline);
  absl::StatusOr<RetentionAnswer> SetPages(StateSnapshot& snapshot,
                                           std::span<const RangeRetention> ranges,
                                           const WriteFence& fence, MonotonicTime deadline);
  absl::StatusOr<PutManifestResult> PutPin(StateSnapshot& snapshot, const PinRequest& request,
                                           const WriteFence& fence, uint64_t expected_version,
                                           ManifestRecord* manifest, MonotonicTime deadline);
  void Count(absl::string_view operation, const absl::Status& status) const;

  Worker* const worker_;
  PageStore* const store_;
  WorkerFence* const fence_;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_RETENTION_H_
