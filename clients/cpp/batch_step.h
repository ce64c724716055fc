// BatchStep: one decode step of many sequences: slots reserved together, all or none; rows through
// memory shared with the worker where it is on this host, in the calls otherwise; committed
// together, each sequence by itself.
//
//   auto step = BatchStep::Begin(sequences, /*num_tokens=*/1).value();
//   … step->WriteRows(i, group, layer, k, v), step->Attend(i, call) …
//   auto committed = step->Commit(tokens).value();   // one status a sequence
//
// The sequences are open on one worker, have no other pending write, and outlive the step. The
// reservations that were not committed are given back when it goes. Not thread-safe.
#ifndef PAGETIDE_CLIENTS_CPP_BATCH_STEP_H_
#define PAGETIDE_CLIENTS_CPP_BATCH_STEP_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "clients/cpp/sequence.h"
#include "pagetide/v1/sequence.pb.h"

namespace pagetide {

class BatchStep {
 public:
  // num_tokens: 1 to 1024, for each sequence. will_attend as in Sequence::BeginStep.
  // INVALID_ARGUMENT for no sequence or sequences of different workers.
  static absl::StatusOr<std::unique_ptr<BatchStep>> Begin(std::span<Sequence* const> sequences,
                                                          uint32_t num_tokens,
                                                          bool will_attend = true);
  ~BatchStep();
  BatchStep(const BatchStep&) = delete;
  BatchStep& operator=(const BatchStep&) = delete;

  size_t size() const { return items_.size(); }
  uint64_t first_position(size_t i) const { return items_[i].slot.first_position(); }
  bool is_local() const { return staging_ != nullptr; }

  // The rows of all reserved tokens of sequence i in one layer: [num_tokens, row_bytes] each.
  // FAILED_PRECONDITION when the slots are not held any more: the lease has ended (ClientOptions),
  // or a Commit took them or may have. What they were shared with may be another step's by then.
  absl::Status WriteRows(size_t i, uint32_t group, uint32_t layer,
                         std::span<const std::byte> k_rows, std::span<const std::byte> v_rows);
  // Sees committed rows of sequence i and those written here.
  absl::Status Attend(size_t i, const AttendCall& call);
  // tokens[i] are the token ids of sequence i, at most num_tokens; fewer: the rest is dropped.
  // Answers for each sequence whether it was committed; one that was not is as it was before the
  // step. Sequences whose rows do not fit one message go in several calls. An error of the whole
  // says that a call got no answer: Sequence::Refresh tells what became of its sequences.
  absl::StatusOr<std::vector<absl::Status>> Commit(
      std::span<const std::span<const uint32_t>> tokens);

 private:
  // Rows written here that the worker does not have yet.
  struct UnsentRows {
    uint32_t group;
    uint32_t layer;
    std::string k;
    std::string v;
  };
  struct Item {
    Sequence* sequence = nullptr;
    v1::ReserveSlotsResponse::Slot slot;
    std::span<std::byte> region;  // in staging_
    std::vector<UnsentRows> unsent;
    bool is_open = false;           // reserved, and neither committed nor given back
    bool may_be_committed = false;  // a commit was sent and has no answer
  };

  BatchStep() = default;
  absl::Status Reserve(uint32_t num_tokens, bool will_attend);
  absl::Status CheckHeld(const Item& item) const;
  // Commits items [begin, end) in one call.
  absl::Status CommitCall(size_t begin, size_t end,
                          std::span<const std::span<const uint32_t>> tokens,
                          std::vector<absl::Status>* results);

  std::vector<Item> items_;
  // Of the reservations, counted from before they were asked for. The worker gives their staging to
  // others a while after it.
  MonotonicTime lease_ends_;
  std::shared_ptr<LocalStaging> staging_;  // shared with the connection; null: rows go by RPC
};

}  // namespace pagetide

#endif  // PAGETIDE_CLIENTS_CPP_BATCH_STEP_H_
