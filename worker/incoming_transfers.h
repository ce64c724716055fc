// IncomingTransfers: the transfers that other workers have reserved here, from ReserveTransfer to
// their end. A transfer belongs to its tenant; for others it is not there.
//
//   open ──Commit──▶ committed (remembered for a while, so that a repeat gets the same answer)
//     │
//     └── Abort, or nothing came for its ttl ──▶ gone; its frames are free again
//
// Domain: knows neither gRPC nor protobuf. Thread-safe; no lock is held while frames are waited for
// or written. Clock, metrics and hosts outlive it.
#ifndef PAGETIDE_WORKER_INCOMING_TRANSFERS_H_
#define PAGETIDE_WORKER_INCOMING_TRANSFERS_H_

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "base/metrics.h"
#include "base/mutex.h"
#include "worker/model_host.h"
#include "worker/sequence_transfer.h"

namespace pagetide {

class IncomingTransfers {
 public:
  struct Options {
    // Of this life of the worker: ids of another's transfers are not ours.
    uint64_t incarnation = 0;
    uint32_t max_open = 64;
    uint32_t max_open_of_tenant = 32;
    absl::Duration default_ttl = absl::Seconds(10);
    absl::Duration max_ttl = absl::Seconds(60);
    // What was committed is remembered so long: longer than a source asks. Of copies and pages the
    // last so many; of moves all, and no more are taken than so many.
    absl::Duration remember = absl::Minutes(20);
    size_t max_remembered = 100'000;
  };
  IncomingTransfers(Options options, const Clock* clock, Metrics* metrics);
  // Ends all that are open. No call runs any more.
  ~IncomingTransfers();

  struct Reserved {
    std::string id;
    std::vector<uint32_t> wanted;
    uint64_t wanted_bytes = 0;
    absl::Duration ttl;
  };
  // `ttl` zero: the default. Errors of TransferHost::BeginIncoming; INVALID_ARGUMENT (ttl);
  // RESOURCE_EXHAUSTED (TOO_MANY_TRANSFERS).
  absl::StatusOr<Reserved> Reserve(const Tenant& tenant, ModelHost* host, TransferPlan plan,
                                   absl::Duration ttl, MonotonicTime deadline);

  struct Committed {
    ModelHost* host = nullptr;
    std::optional<SequenceInfo> info;  // none of kPages
    bool is_move = false;
    uint64_t pages = 0;
    uint64_t received_pages = 0;
    uint64_t received_bytes = 0;
  };
  // *is_repeat: this call did not do it. Errors: see TransferService.
  absl::StatusOr<Committed> Commit(const Tenant& tenant, absl::string_view id, bool* is_repeat);
  // What it became, if it was committed. ABORTED (TRANSFER_BUSY) while it is being committed.
  absl::StatusOr<std::optional<Committed>> Abort(const Tenant& tenant, absl::string_view id);
  // Ends what ran out. From a ticker.
  void Expire();
  size_t num_open() const;

 private:
  struct Transfer;

 public:
  // The right to push pages of one transfer, which one caller has at a time. It may end meanwhile:
  // then Write says so, and the frames go with the last who uses them.
  class Push {
   public:
    ~Push();
    Push(const Push&) = delete;
    Push& operator=(const Push&) = delete;
    // As IncomingSequence::Write; NOT_FOUND (TRANSFER_NOT_FOUND) when the transfer has ended.
    absl::Status Write(uint32_t page, uint64_t offset, std::span<const std::byte> bytes);
    // As IncomingSequence::Fill; else as Write.
    absl::Status Fill(uint32_t page, IncomingSequence::PageFill fill);
    uint64_t received_pages() const { return received_pages_; }
    uint64_t received_bytes() const { return received_bytes_; }
    uint64_t num_missing() const;

   private:
    friend class IncomingTransfers;
    Push(IncomingTransfers* transfers, std::shared_ptr<Transfer> transfer)
        : transfers_(transfers), transfer_(std::move(transfer)) {}
    IncomingTransfers* const transfers_;
    // The transfer goes on for its ttl; NOT_FOUND when it has ended.
    absl::Status Renew();
    // Counts a page that has come whole, or is damaged.
    void Count(const absl::Status& status, bool is_whole);
    const std::shared_ptr<Transfer> transfer_;  // shared with the table it may leave
    uint64_t received_pages_ = 0;
    uint64_t received_bytes_ = 0;
  };
  // NOT_FOUND (TRANSFER_NOT_FOUND), ABORTED (TRANSFER_BUSY).
  absl::StatusOr<std::unique_ptr<Push>> BeginPush(const Tenant& tenant, absl::string_view id);

 private:
  // Null when there is none of this tenant.
  std::shared_ptr<Transfer> FindOpen(const Tenant& tenant, absl::string_view id)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  const Committed* FindCommitted(const Tenant& tenant, absl::string_view id)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // What is too old.
  void ForgetPast() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Remember(const std::shared_ptr<Transfer>& transfer, const Committed& committed)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Take(Transfer& transfer) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Counter of transfers that ended so.
  Counter* Ended(absl::string_view outcome) const;

  struct Past {
    std::string tenant;
    Committed committed;
  };

  const Options options_;
  const Clock* const clock_;
  Metrics* const metrics_;
  Gauge* const num_open_gauge_;
  Counter* const received_pages_;
  Counter* const received_bytes_;
  Counter* const known_pages_;
  Counter* const damaged_pages_;

  mutable Mutex mu_;
  uint64_t next_ ABSL_GUARDED_BY(mu_) = 1;
  uint32_t num_reserving_ ABSL_GUARDED_BY(mu_) = 0;  // calls that wait for their frames
  // Open and reserving, by tenant. Bounded by Options::max_open.
  absl::flat_hash_map<std::string, uint32_t> by_tenant_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<std::string, std::shared_ptr<Transfer>> open_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<std::string, Past> past_ ABSL_GUARDED_BY(mu_);
  using InOrder = std::deque<std::pair<MonotonicTime, std::string>>;
  InOrder past_moves_ ABSL_GUARDED_BY(mu_);
  InOrder past_others_ ABSL_GUARDED_BY(mu_);
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_INCOMING_TRANSFERS_H_
