// ReportJournal: what a worker reports to routers, kept so that each router link reads at its own
// pace: the set of pages it holds with the newest changes, and its open sequences.
//
// One journal a worker, many readers. Writers never wait for readers: changes sit in a ring of
// bounded length, and a reader that fell behind it takes a snapshot, which is exact, since it is
// read under the same lock. Repeated changes are dropped here, so that the digests are those of a
// set.
//
// Thread-safe. Calls copy under one mutex and do nothing else; OnResidencyChange is O(1) and may be
// called under the caller's own lock.
#ifndef PAGETIDE_WORKER_REPORT_JOURNAL_H_
#define PAGETIDE_WORKER_REPORT_JOURNAL_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "base/mutex.h"
#include "core/residency_digest.h"
#include "core/sequence_id.h"

namespace pagetide {

class ReportJournal {
 public:
  struct Options {
    // Changes kept for readers. Beyond it the oldest go, and who has not read them takes a
    // snapshot.
    size_t max_changes = 65536;
    // Sequences that closed, kept so that readers hear of it.
    size_t max_closed_sequences = 16384;
  };

  explicit ReportJournal(Options options) : options_(options) {}
  ReportJournal() : ReportJournal(Options()) {}

  // --- writers ---
  void OnResidencyChange(const PrefixHint& hint, uint32_t group, Tier tier, bool is_removed,
                         uint64_t page_bytes);
  // Opened, or its length changed.
  void OnSequence(SequenceId id, absl::string_view model_digest, uint64_t length);
  // Open again under the id that it had when it was closed here.
  void OnSequenceResumed(SequenceId id, absl::string_view model_digest, uint64_t length);
  void OnSequenceClosed(SequenceId id);

  // --- readers ---
  struct Residency {
    std::vector<ResidencyDelta> changes;
    // All pages held, instead of changes since the position.
    bool is_snapshot = false;
    // After the changes; absent when more changes follow.
    std::optional<ResidencyDigests> digests;
  };
  // Changes after *position (0: a snapshot), at most `max_changes` unless it is a snapshot; moves
  // *position behind what it returns.
  Residency ReadResidency(uint64_t* position, size_t max_changes) const;

  struct Sequence {
    SequenceId id;
    std::string model_digest;
    uint64_t length = 0;
    bool is_closed = false;
  };
  struct Sequences {
    std::vector<Sequence> changes;
    bool is_snapshot = false;
  };
  // Sequences that changed after *position (0: a snapshot), each once, with its newest state.
  Sequences ReadSequences(uint64_t* position) const;

  // Waits until residency changed after `position`, a Wake() since the last wait that was given the
  // same *seen_wakes (0 at first), or the timeout.
  void WaitForResidency(uint64_t position, uint64_t* seen_wakes, absl::Duration timeout);
  // Makes all readers return from their wait, or from the next one.
  void Wake();

  size_t num_copies() const;

 private:
  struct Copy {
    PrefixHint hint;
    uint32_t group = 0;
    Tier tier = Tier::kDevice;
    friend bool operator==(const Copy&, const Copy&) = default;
    template <typename H>
    friend H AbslHashValue(H h, const Copy& copy) {
      return H::combine(std::move(h), copy.hint, copy.group, copy.tier);
    }
  };
  struct SequenceState {
    std::string model_digest;
    uint64_t length = 0;
    uint64_t version = 0;  // key in sequence_order_
    bool is_closed = false;
  };
  // Gives the sequence the newest version.
  void TouchSequence(SequenceId id, SequenceState& state) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const Options options_;
  mutable Mutex mu_;
  CondVar changed_;
  absl::flat_hash_map<Copy, uint64_t> copies_ ABSL_GUARDED_BY(mu_);  // → page bytes
  ResidencyDigests digests_ ABSL_GUARDED_BY(mu_){};
  std::deque<ResidencyDelta> ring_ ABSL_GUARDED_BY(mu_);
  uint64_t last_change_ ABSL_GUARDED_BY(mu_) = 1;  // position of ring_.back(); 0 is "nothing read"
  uint64_t num_wakes_ ABSL_GUARDED_BY(mu_) = 0;

  absl::flat_hash_map<SequenceId, SequenceState> sequences_ ABSL_GUARDED_BY(mu_);  // closed too
  std::map<uint64_t, SequenceId> sequence_order_ ABSL_GUARDED_BY(mu_);  // by version, oldest first
  std::deque<SequenceId> closed_ ABSL_GUARDED_BY(mu_);                  // oldest first
  uint64_t last_version_ ABSL_GUARDED_BY(mu_) = 1;
  // Closings up to this version are no longer known.
  uint64_t forgotten_version_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_REPORT_JOURNAL_H_
