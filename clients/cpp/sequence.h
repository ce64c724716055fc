// Sequence: one open sequence on a worker, and the two ways to write to it.
//
//   PendingAppend  prefill: rows of many tokens, layer by layer, over one stream; commits whole or
//   not. PendingStep    decode: reserved slots; rows through memory shared with the worker where it
//   is on
//                  this host, in the calls otherwise.
//
// Rows written to a pending append or step are visible to its own Attend at once and to nobody else
// before Commit. A pending object must not outlive its sequence; one pending write a sequence.
//
// Every call bounds its waits by the client's timeout. UNAVAILABLE is retried inside where that is
// safe and returned when the worker stays away: then open the tokens again, on whatever worker the
// router finds. None of these classes is thread-safe; different sequences are independent.
#ifndef PAGETIDE_CLIENTS_CPP_SEQUENCE_H_
#define PAGETIDE_CLIENTS_CPP_SEQUENCE_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "clients/cpp/worker_connection.h"
#include "core/geometry.h"
#include "core/keys.h"
#include "core/model.h"
#include "pagetide/v1/sequence.pb.h"
#include "pagetide/v1/sequence_edit.pb.h"
#include "pagetide/v1/session.pb.h"
#include "rpc/byte_buffer.h"
#include "rpc/raw_stream.h"

namespace pagetide {

// Attention in one layer. Queries are consecutive from first_position on; a query at position p
// sees keys at positions <= p.
struct AttendCall {
  uint32_t group = 0;
  uint32_t layer = 0;        // index within the group
  uint32_t query_heads = 0;  // a multiple of the group's kv_heads
  uint64_t first_position = 0;
  float scale = 0;                 // 0: 1 / sqrt(k_dim)
  bool allow_behind_end = false;   // queries may lie behind the rows: of a part of a context
  std::span<const float> queries;  // [num_queries, query_heads, k_dim]
  std::span<float> outputs;        // [num_queries, query_heads, v_dim]
  std::span<float> log_sum_exp;    // [num_queries, query_heads], or empty: not wanted
};

// Rows as ReadRows delivers them, valid during the call.
struct RowsPart {
  uint32_t layer = 0;
  RowKind kind = RowKind::kK;
  uint64_t first_token = 0;
  uint32_t num_tokens = 0;
  std::span<const std::byte> bytes;  // [num_tokens, row_bytes]
};

// The same rows as they came from the wire, before anything was copied: pieces that may end in the
// middle of a row. Valid during the call.
struct RowsPieces {
  uint32_t layer = 0;
  RowKind kind = RowKind::kK;
  uint64_t first_token = 0;
  uint32_t num_tokens = 0;
  const PayloadView* bytes = nullptr;  // [num_tokens, row_bytes]
};

struct SaveOptions {
  std::map<std::string, std::string> metadata;  // replaces what was there
  // The version that must be there; 0: none. Absent: whatever is there is replaced.
  std::optional<uint64_t> expected_version;
  std::optional<uint64_t> keep_tokens;  // the first so many only
  bool compact = false;                 // first move the rows of an edited sequence together
};

// How long tokens [begin, end) are worth keeping in the store; end absent: the committed length.
struct RetentionOptions {
  uint64_t begin = 0;
  std::optional<uint64_t> end;
  std::optional<uint32_t> priority;   // 0 to 100, absent: 50
  std::optional<absl::Duration> ttl;  // absent: for ever
};

struct PinOptions {
  uint64_t begin = 0;
  std::optional<uint64_t> end;
  std::optional<absl::Duration> ttl;  // absent: until Client::Unpin
};

class BatchStep;
class InPlaceRows;
class PendingAppend;
class PendingStep;

class Sequence {
 public:
  // Closes the sequence on the worker (best effort, two seconds) unless Close was called.
  ~Sequence();
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;

  // As of the last answer.
  const std::string& id() const { return state_.sequence_id(); }
  uint64_t length() const { return state_.length(); }
  // Where the next token goes: the length, unless edits moved rows.
  uint64_t end_position() const { return state_.end_position(); }
  const v1::SequenceState& state() const { return state_; }
  // What the open reused, and why not more.
  const v1::PrefixReuse& reuse() const { return reuse_; }
  // Pages that were being restored from the store when the open answered.
  uint64_t restoring_pages() const { return restoring_pages_; }
  const Model& model() const { return *model_; }
  WorkerConnection& worker() const { return *worker_; }
  const std::string& worker_id() const { return state_.worker_id(); }

  // Waits until all reused pages are resident. Returns the length, which is shorter than at open if
  // a restore failed (then `shortened_because`, unless null, says why).
  absl::StatusOr<uint64_t> WaitReady(std::string* shortened_because = nullptr);
  // Fetches the state anew.
  absl::Status Refresh();

  // will_attend: the whole sequence is made resident and stays pinned until the write ends, so that
  // Attend under it never waits for frames. inputs: those at the positions of these tokens.
  absl::StatusOr<std::unique_ptr<PendingAppend>> BeginAppend(
      std::span<const uint32_t> tokens, bool will_attend = true,
      std::span<const PositionedInput> inputs = {});
  // num_tokens: 1 to 1024.
  absl::StatusOr<std::unique_ptr<PendingStep>> BeginStep(uint32_t num_tokens,
                                                         bool will_attend = true);

  // Attention over committed rows.
  absl::Status Attend(const AttendCall& call);
  // Streams verified rows [begin, end) of `layers` (empty: all) of a group; end 0: to the end. The
  // first error of `sink` ends the stream and is returned. Not retried once a part was delivered.
  absl::Status ReadRows(uint32_t group, uint64_t begin, uint64_t end,
                        std::span<const uint32_t> layers,
                        absl::FunctionRef<absl::Status(const RowsPart&)> sink);
  // The same without the copy that makes a part contiguous, for callers that move the rows on.
  absl::Status ReadRowPieces(uint32_t group, uint64_t begin, uint64_t end,
                             std::span<const uint32_t> layers,
                             absl::FunctionRef<absl::Status(const RowsPieces&)> sink);

  // Makes all committed rows resident and pins them for `lease` (at most 30 s), to be read in place
  // (clients/cpp/in_place_rows.h). FAILED_PRECONDITION when the worker shares no memory with us.
  absl::StatusOr<std::unique_ptr<InPlaceRows>> ReadInPlace(absl::Duration lease);

  // A new sequence on the same worker with the first `length` tokens (absent: all).
  absl::StatusOr<std::unique_ptr<Sequence>> Fork(std::optional<uint64_t> length = std::nullopt);
  // Saves the committed tokens under a name; durable when it returns. Only what the store does not
  // have is written. May be called while the sequence goes on.
  absl::StatusOr<v1::SaveSessionResponse> Save(absl::string_view name,
                                               const SaveOptions& options = {});
  // Replaces priority and time to live, in the store, of the pages under these ranges (1 to 64).
  absl::StatusOr<v1::SetRangeRetentionResponse> SetRetention(
      std::span<const RetentionOptions> ranges);
  // Keeps the pages under a range in the store, under a name; durable when it returns.
  absl::StatusOr<v1::PinRangeResponse> Pin(absl::string_view name, const PinOptions& options = {});
  // Makes the sequence durable under its id. It stays open if keep_open; else it is closed here,
  // and Client::Resume takes it up again on any worker.
  absl::StatusOr<v1::ParkSequenceResponse> Park(bool keep_open = false);
  // Remembers the sequence as it is; ends with it. Returns the checkpoint's id. What the scopes and
  // tiers are: proto/pagetide/v1/session.proto.
  absl::StatusOr<uint64_t> CreateCheckpoint(v1::Tier tier = v1::TIER_DEVICE,
                                            v1::CheckpointScope scope = v1::CHECKPOINT_SCOPE_ALL);
  // Makes it that again, whatever was rewound or appended since.
  absl::Status RestoreCheckpoint(uint64_t checkpoint_id);

  // Edits: proto/pagetide/v1/sequence_edit.proto states what each does. Ranges are [p0, p1) over
  // positions; p0 < 0 means 0, p1 < 0 the end. All or nothing.
  absl::StatusOr<v1::EditSequenceResponse> Edit(std::span<const v1::SequenceEdit> edits);
  absl::StatusOr<v1::EditSequenceResponse> RemoveRange(int64_t p0, int64_t p1);
  // The rows of `from` in the range, by reference. Both on one worker.
  absl::StatusOr<v1::EditSequenceResponse> CopyRange(const Sequence& from, int64_t p0, int64_t p1);
  absl::StatusOr<v1::EditSequenceResponse> ShiftPositions(int64_t p0, int64_t p1, int64_t delta);
  absl::StatusOr<v1::EditSequenceResponse> DividePositions(int64_t p0, int64_t p1, int64_t divisor);
  // Keeps the first `keep` rows, drops the next `discard`, closes the gap.
  absl::StatusOr<v1::EditSequenceResponse> ShiftWindow(int64_t keep, int64_t discard);
  // Truncates to the first `length` tokens.
  absl::Status Rewind(int64_t length);
  absl::Status Clear(bool zero_data);
  absl::StatusOr<v1::GetPositionExtentResponse> PositionExtent();
  // sequences[i] becomes what sequences[order[i]] was. All on one worker.
  static absl::Status Reorder(std::span<Sequence* const> sequences, std::span<const uint32_t> order,
                              bool allow_repeats = false);

  // Full pages stay in the worker's cache. Idempotent.
  absl::Status Close();

 private:
  friend class Client;
  friend class BatchStep;
  friend class PendingAppend;

  Sequence(std::shared_ptr<WorkerConnection> worker, std::shared_ptr<const Model> model,
           v1::SequenceState state);
  v1::SequenceRef Ref() const;
  absl::Status Attend(const AttendCall& call, v1::AttendRequest* request);

  const std::shared_ptr<WorkerConnection> worker_;  // shared with the client and other sequences
  const std::shared_ptr<const Model> model_;        // shared by all sequences of the model
  v1::SequenceState state_;
  v1::PrefixReuse reuse_;
  uint64_t restoring_pages_ = 0;
  bool is_closed_ = false;
};

// See the head of this file. The stream is cancelled, and nothing changes, if this goes away
// uncommitted.
class PendingAppend {
 public:
  ~PendingAppend();
  PendingAppend(const PendingAppend&) = delete;
  PendingAppend& operator=(const PendingAppend&) = delete;

  // Rows [first_token, …) of the append, relative to its first token: [n, row_bytes]. Layers in any
  // order, tokens in order within a layer and kind. Sent in parts of at most 1 MiB. The bytes are
  // copied.
  absl::Status WriteRows(uint32_t group, uint32_t layer, RowKind kind, uint32_t first_token,
                         std::span<const std::byte> bytes);
  // The same without the copy: `owner` keeps the bytes valid and unchanged. It is let go, on a
  // thread of the transport, when the last of them was sent or the append has failed, which may be
  // after Commit returned.
  absl::Status WriteLentRows(uint32_t group, uint32_t layer, RowKind kind, uint32_t first_token,
                             std::span<const std::byte> bytes, std::shared_ptr<const void> owner);
  // Sees committed rows and those written here.
  absl::Status Attend(const AttendCall& call);
  // All rows of all layers were written.
  absl::StatusOr<v1::AppendTokensResponse> Commit();

 private:
  friend class Sequence;
  explicit PendingAppend(Sequence* sequence) : sequence_(sequence) {}
  absl::Status Write(const grpc::ByteBuffer& message);
  // Cuts rows into parts; slice_of makes the slice of one part's bytes.
  absl::Status WriteParts(uint32_t group, uint32_t layer, RowKind kind, uint32_t first_token,
                          std::span<const std::byte> bytes,
                          absl::FunctionRef<grpc::Slice(std::span<const std::byte>)> slice_of);
  // The status with which the worker ended the stream.
  absl::Status Finish();
  absl::Status IsOver() const;

  Sequence* const sequence_;
  std::string append_id_;
  std::shared_ptr<grpc::Channel> channel_;  // shared with other streams to this worker
  grpc::ClientContext context_;
  grpc::ByteBuffer response_;
  std::unique_ptr<RawWriter> stream_;  // null: finished
  bool has_begun_ = false;             // the worker said that it has taken the header
};

// See the head of this file. The reservation is given back if this goes away uncommitted. Many
// sequences together: clients/cpp/batch_step.h.
class PendingStep {
 public:
  ~PendingStep();
  PendingStep(const PendingStep&) = delete;
  PendingStep& operator=(const PendingStep&) = delete;

  uint64_t first_position() const;
  bool is_local() const;

  // The rows of all reserved tokens in one layer: [num_tokens, row_bytes] each.
  absl::Status WriteRows(uint32_t group, uint32_t layer, std::span<const std::byte> k_rows,
                         std::span<const std::byte> v_rows);
  // Sees committed rows and those written here.
  absl::Status Attend(const AttendCall& call);
  // Fewer tokens than reserved: the rest is dropped.
  absl::Status Commit(std::span<const uint32_t> tokens);

 private:
  friend class Sequence;
  explicit PendingStep(std::unique_ptr<BatchStep> step);
  const std::unique_ptr<BatchStep> step_;  // of one sequence
};

}  // namespace pagetide

#endif  // PAGETIDE_CLIENTS_CPP_SEQUENCE_H_
