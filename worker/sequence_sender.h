// SequenceSender: sends sequences that are open here to other workers, by TransferService. Of a
// move it answers for one owner at a time: the sequence changes for nobody from the first byte on,
// and is closed when the target has it, or goes on when the target cannot have it any more. While
// neither is known it asks, for as long as Options::give_up says.
//
// Thread-safe. What the constructor takes outlives it.
#ifndef PAGETIDE_WORKER_SEQUENCE_SENDER_H_
#define PAGETIDE_WORKER_SEQUENCE_SENDER_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "base/mutex.h"
#include "pagetide/v1/transfer.pb.h"
#include "worker/frame_link.h"
#include "worker/parking.h"
#include "worker/request_memos.h"
#include "worker/sequence_transfer.h"
#include "worker/stream_slots.h"
#include "worker/worker.h"

namespace pagetide {

class SequenceSender {
 public:
  struct Options {
    uint32_t max_running = 16;
    uint32_t max_running_of_tenant = 8;
    // For each question to a target what became of a transfer.
    absl::Duration ask_timeout = absl::Seconds(2);
    // A target that never answers is asked so long; less than targets remember.
    absl::Duration give_up = absl::Minutes(10);
    size_t max_remembered = 1000;
  };
  // `link` may be null: all pages go by PushPages.
  SequenceSender(Options options, Worker* worker, Parking* parking, RequestMemos* memos,
                 FrameLink* link);

  // Errors: see TransferService.SendSequence.
  absl::StatusOr<v1::SendSequenceResponse> Send(const Tenant& tenant,
                                                const v1::SendSequenceRequest& request,
                                                MonotonicTime deadline);
  // Puts the keyed pages of a sequence that is open here into the cache of another worker, as those
  // of the model with that digest, whose layer groups have the same fingerprints as the sequence's
  // own.
  absl::StatusOr<v1::SendSequenceResponse> SendPages(const Tenant& tenant, ModelHost* host,
                                                     const SequenceHandle& sequence,
                                                     const Digest& model_digest,
                                                     const std::string& address,
                                                     MonotonicTime deadline);
  // Asks the targets of moves whose outcome is not known. From a ticker.
  void Resolve();
  size_t num_unresolved() const;

 private:
  class Peer;
  // A move that was, or may have been, committed.
  struct Move {
    Tenant tenant;
    ModelHost* host = nullptr;
    SequenceId id;
    uint64_t epoch = 0;  // here
    uint64_t hold = 0;
    std::string address;
    std::string transfer_id;
    // Who reserved it, and alone knows what became of it.
    std::string target_id;
    uint64_t target_incarnation = 0;
    v1::SendSequenceResponse sent;  // its answer, if it was committed
    MonotonicTime give_up;
  };
  enum class Outcome { kMoved, kNotMoved, kUnknown };

  absl::StatusOr<v1::SendSequenceResponse> SendOnce(const Tenant& tenant,
                                                    const v1::SendSequenceRequest& request,
                                                    MonotonicTime deadline);
  // What the plan says, which is the sequence's but for the model, to the target: reserves, pushes,
  // commits.
  absl::StatusOr<v1::SendSequenceResponse> Transfer(const Tenant& tenant, ModelHost* host,
                                                    SequenceId id, OutgoingSequence& outgoing,
                                                    const TransferPlan& plan,
                                                    const std::string& address,
                                                    const google::protobuf::Duration& ttl,
                                                    MonotonicTime deadline);
  // With one of the slots; counts.
  absl::StatusOr<v1::SendSequenceResponse> Counted(
      StreamSlots& slots, const Tenant& tenant,
      absl::FunctionRef<absl::StatusOr<v1::SendSequenceResponse>()> send);
  // Those of `wanted` that went from GPU to GPU; none where that is not possible, or failed.
  std::vector<uint32_t> SendByLink(Peer& peer, const Tenant& tenant, ModelHost& host,
                                   OutgoingSequence& outgoing,
                                   const v1::ReserveTransferResponse& reserved,
                                   MonotonicTime deadline, v1::SendSequenceResponse* sent);
  // Commits; of a move without a good answer asks what became of it, and remembers it if it does
  // not learn.
  absl::Status Commit(Peer& peer, OutgoingSequence& outgoing, Move move, MonotonicTime deadline,
                      v1::SendSequenceResponse* response);
  // What the target did before the transfer ended, if it did; else it never will.
  absl::StatusOr<v1::AbortTransferResponse> Abort(Peer& peer, const std::string& transfer_id) const;
  // Asks once, and acts on what it learns.
  Outcome Settle(Move& move);
  // The target has it.
  void CloseHere(const Move& move);
  // A move of it that is not resolved: asks. The answer if it was moved there, nullopt if nothing
  // is in the way of a send.
  absl::StatusOr<std::optional<v1::SendSequenceResponse>> FindEarlier(
      const Tenant& tenant, const v1::SendSequenceRequest& request, SequenceId id);
  void Count(const absl::Status& status) const;

  const Options options_;
  Worker* const worker_;
  Parking* const parking_;
  RequestMemos* const memos_;
  FrameLink* const link_;
  StreamSlots slots_;
  StreamSlots share_slots_;  // of SendPages, so that groups and clients do not wait for each other
  std::atomic<uint64_t> next_request_{1};

  mutable Mutex mu_;
  // By sequence. Bounded by what is open.
  absl::flat_hash_map<SequenceId, Move> unresolved_ ABSL_GUARDED_BY(mu_);
  // That a resolution found moved, for the retry of the call that did not learn it; the last ones.
  absl::flat_hash_map<SequenceId, Move> moved_ ABSL_GUARDED_BY(mu_);
  std::deque<SequenceId> moved_in_order_ ABSL_GUARDED_BY(mu_);
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_SEQUENCE_SENDER_H_
