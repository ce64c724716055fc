// ModelHost: all that a worker does for one model: its frames, its pages, its open sequences. The
// gRPC services call it; it knows neither gRPC nor CUDA nor RocksDB, only the device and store
// ports.
//
// Thread-safe; one mutex, never held over device or store I/O (prepare → act → complete). Calls
// that need frames acquire all of them, first come first served, or none, and wait until their
// deadline.
//
// A sequence's committed rows never change in place. Rows of a *pending write* (an append or a
// reservation) go straight into frames behind the committed length, where nobody else looks, and
// become visible at commit by moving the length. One pending write a sequence.
#ifndef PAGETIDE_WORKER_MODEL_HOST_H_
#define PAGETIDE_WORKER_MODEL_HOST_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "base/checksum.h"
#include "base/clock.h"
#include "base/executor.h"
#include "core/ids.h"
#include "core/keys.h"
#include "core/model.h"
#include "core/page_store.h"
#include "core/reused_chunks.h"
#include "core/sequence_editor.h"
#include "core/sequence_id.h"
#include "core/session_state.h"
#include "core/tier.h"
#include "worker/device.h"

namespace pagetide {

// Who calls, from the authenticated identity.
struct Tenant {
  std::string name;
  TenantSalt salt;
};

// The caller's view of a sequence it wants to change.
struct SequenceHandle {
  SequenceId id;
  uint64_t epoch = 0;
  std::optional<uint64_t> expected_revision;
};

// That was closed because no call was made on it.
struct IdleSequence {
  SequenceId id;
  uint64_t epoch = 0;
  std::string tenant;
};

struct SequenceInfo {
  SequenceId id;
  uint64_t number = 0;  // by which edits name it; unique in the worker, never used again
  uint64_t epoch = 0;
  uint64_t revision = 0;
  uint64_t length = 0;
  uint64_t canonical_length = 0;
  int64_t end_position = 0;  // where the next token goes
  uint64_t pending_tokens = 0;
  uint64_t num_pages = 0;
  uint64_t resident_pages = 0;
  uint64_t shared_pages = 0;
};

// Values equal the proto enum ReuseLimit.
enum class ReuseLimit : uint8_t {
  kWholePrompt = 1,
  kNeverStored = 2,
  kDiverged = 3,
  kQuarantined = 4,
  kStoreUnavailable = 5,
  kSlowerThanCompute = 6,
  kGroup = 7,
  kNoFrame = 8,
};

struct PrefixReuse {
  uint64_t prompt_tokens = 0;
  uint64_t reused_tokens = 0;
  uint64_t shared_pages = 0;  // full pages of tokens, whatever the number of groups
  uint64_t partial_rows = 0;
  uint64_t device_tokens = 0;
  uint64_t host_tokens = 0;
  uint64_t store_tokens = 0;
  uint64_t chunk_tokens = 0;  // of reused_tokens, behind all others: approximate, see ReusedChunk
  ReuseLimit limit = ReuseLimit::kWholePrompt;
  uint32_t limiting_group = 0;
  std::string explanation;
};

struct PromptOptions {
  bool allow_full_reuse = false;
  bool no_reuse = false;
  bool skip_store = false;
  bool whole_pages_only = false;  // no rows of a page that begins alike
  // The rows that will be appended come from elsewhere: none of their pages gets a key, so that no
  // prompt finds them, and canonical_length stays 0 until the sequence is cut to nothing.
  bool is_private = false;
  // The rows that will be appended are copies: how fast they come says nothing about a prefill.
  // What is known of them counts whatever its restore would cost, and is not restored for it.
  bool is_copied = false;
  // Window groups give no rows up until KeepRows says which they hold.
  bool keeps_masked_rows = false;
  // Nobody's but the caller's, for the time of a job: List leaves it out, and edits of all
  // sequences of a tenant do.
  bool is_unlisted = false;
};

struct OpenResult {
  SequenceInfo info;
  PrefixReuse reuse;
  uint64_t restoring_pages = 0;
};

// The tokens that a prefill is about to compute, at a boundary of its chunks.
struct ExtendRequest {
  uint64_t expected_length = 0;  // of the sequence
  std::span<const uint32_t> tokens;
  std::span<const PositionedInput> inputs;
  bool allow_full_reuse = false;
  // > 0: claim the first page that nobody has committed, for so long.
  absl::Duration claim = absl::ZeroDuration();
  // > 0: wait at most so long for a page that another sequence has claimed.
  absl::Duration wait = absl::ZeroDuration();
};

// Values equal the proto enum ClaimState.
enum class ClaimState : uint8_t {
  kNone = 1,     // not asked for, or there is no further full page to claim
  kGranted = 2,  // the caller computes it; others may wait
  kHeld = 3,     // another sequence computes it
};

struct ExtendResult {
  SequenceInfo info;
  uint64_t extended_tokens = 0;
  uint64_t restoring_pages = 0;
  ClaimState claim = ClaimState::kNone;
  absl::Duration claim_left = absl::ZeroDuration();  // of the claim, whoever holds it
};

// Of a sequence that keeps its name over changes of its owner.
struct SequenceIdentity {
  SequenceId id;
  uint64_t epoch = 0;
};

struct Readiness {
  uint64_t resident_tokens = 0;
  uint64_t length = 0;
  bool done = false;
  std::string shortened_because;
};

// What a sequence consists of, apart from its rows.
struct SequenceContents {
  SequenceInfo info;
  std::vector<uint32_t> tokens;            // [row]
  std::vector<int32_t> positions;          // [row]; empty: row n is at position n
  std::vector<PositionedInput> inputs;     // ascending
  std::vector<std::vector<RowSpan>> held;  // [group]: rows that it holds, ascending
};

// What the leading tokens of a sequence are, as one number to compare.
struct ContentDigest {
  SequenceInfo info;
  // Equal on hosts of one deployment exactly when tokens, positions and inputs are, and both have
  // as many canonical rows among them. Absent: the sequence is shorter.
  std::optional<Checksum128> digest;
};

// A pending write: rows behind the committed length.
struct PendingSlot {
  SequenceId sequence;
  uint64_t pending_id = 0;  // unique in the process; 0 never
  uint64_t first_row = 0;
  uint64_t first_position = 0;  // of the first row; they are consecutive
  uint32_t num_tokens = 0;
  uint64_t pages_created = 0;
};

struct ReserveItem {
  SequenceHandle sequence;
  uint32_t num_tokens = 0;
  // A draft tree: for each token the index of the one before it, -1 for the last committed token.
  // Empty: each follows the one before.
  std::vector<int32_t> parents;
};

struct RowRun {
  uint32_t group = 0;
  uint32_t layer = 0;
  RowKind kind = RowKind::kK;
  uint32_t first_token = 0;  // relative to the pending write
  uint32_t num_tokens = 0;
  // Of kPage only, where layers and tokens mean nothing: which page of the write (of an opaque
  // group the first is the one that holds the first new token, from its first token on; a state is
  // page 0), and from which byte on.
  uint32_t page = 0;
  uint64_t page_offset = 0;
};

// Fills `dst` with the source's bytes from `offset` on. Called once or more a run, in order.
using RowSource = absl::FunctionRef<void(uint64_t offset, std::span<std::byte> dst)>;

struct CommitResult {
  SequenceInfo info;
  uint64_t appended_tokens = 0;
  uint64_t pages_filled = 0;
  uint64_t pages_created = 0;
};

struct AttendQuery {
  SequenceId sequence;
  uint64_t epoch = 0;
  uint64_t pending_id = 0;  // 0: committed rows only
  uint32_t group = 0;
  uint32_t layer = 0;
  uint32_t num_queries = 0;
  uint32_t query_heads = 0;
  uint64_t first_position = 0;
  float scale = 0;  // 0: 1 / sqrt(k_dim)
  // Queries may lie behind the committed rows (pending_id 0 only).
  bool allow_behind_end = false;
  std::span<const float> queries;
};

struct AttendOutput {
  std::vector<float> outputs;      // [num_queries, query_heads, v_dim]
  std::vector<float> log_sum_exp;  // [num_queries, query_heads]
};

struct ForkResult {
  SequenceInfo info;
  uint64_t shared_pages = 0;
  uint64_t copied_rows = 0;
};

struct RewindResult {
  SequenceInfo info;
  uint64_t removed_tokens = 0;
  uint64_t freed_pages = 0;
};

// What a transaction of edits did, together.
struct EditResult {
  std::vector<SequenceInfo> infos;   // of the sequences named, in that order
  std::vector<SequenceInfo> others;  // that changed besides them
  EditOutcome outcome;
  uint64_t freed_pages = 0;   // private pages that went
  uint64_t cached_pages = 0;  // shareable pages that only the cache knows now
};

struct CompactResult {
  SequenceInfo info;
  uint64_t moved_rows = 0;   // over all layer groups; 0: nothing was left to gain
  uint64_t num_extents = 0;  // after it, in the groups that changed
  uint64_t freed_pages = 0;
};

struct PositionExtents {
  uint64_t revision = 0;
  std::vector<PositionExtent> groups;
};

struct BlockTableEntry {
  uint32_t group = 0;
  uint64_t first_row = 0;
  uint64_t first_position = 0;
  int32_t shift = 0;  // K is rotated by so many positions when it is read
  uint32_t first_slot = 0;
  uint32_t count = 0;
  PageId page;
  std::string page_state;
  std::optional<FrameId> frame;
  std::optional<PageKey> key;
  uint32_t references = 0;
  uint32_t pins = 0;
};

struct BlockTable {
  SequenceInfo info;
  std::vector<BlockTableEntry> entries;
};

struct FrameEntry {
  FrameId frame;
  std::string state;  // free, resident, spilling, restoring; quarantined while it is still read
  PageId page;
  uint32_t rows = 0;
  uint32_t references = 0;
  uint32_t pins = 0;
  std::optional<PageKey> key;
  bool is_stored = false;
};

struct PoolUsage {
  uint32_t group = 0;
  uint64_t page_bytes = 0;
  uint64_t num_frames = 0;
  uint64_t free_frames = 0;
  uint64_t pinned_frames = 0;
  uint64_t evictable_frames = 0;
  uint64_t tail_frames = 0;
};

// Counters since start; all only grow.
struct HostCounters {
  uint64_t pages_spilled = 0;
  uint64_t pages_written_through = 0;
  uint64_t pages_restored = 0;
  uint64_t pages_evicted = 0;
  uint64_t restore_misses = 0;
  uint64_t checksum_failures = 0;
  uint64_t bytes_verified = 0;
  uint64_t bytes_converted_cold = 0;  // of pages, before their rows went to their cold types
  uint64_t bytes_converted_back = 0;  // of pages, after
  uint64_t store_errors = 0;
  uint64_t rows_copied = 0;
  uint64_t tokens_reused = 0;
  uint64_t chunk_tokens_reused = 0;  // of them, in chunks
  uint64_t tokens_appended = 0;
  uint64_t pages_created = 0;
  uint64_t pages_filled = 0;
  uint64_t pages_deduplicated = 0;  // that filled and gave way to an equal resident one
  uint64_t tokens_extended = 0;     // by ExtendMatch
  uint64_t claims_granted = 0;
  uint64_t claims_waited_for = 0;
  uint64_t acquire_waits = 0;
  uint64_t acquire_timeouts = 0;
  uint64_t writes_expired = 0;  // reservations whose lease ended, appends that idled
  uint64_t prefixes_lost = 0;
  uint64_t edits = 0;          // transactions that went through
  uint64_t edits_refused = 0;  // transactions refused
  uint64_t rows_removed = 0;   // by edits
  uint64_t rows_moved = 0;     // by edits: rows that got another position
  uint64_t rows_compacted = 0;
  uint64_t sequences_expired = 0;    // closed because no call was made on them
  uint64_t pages_reclaimed = 0;      // references to pages behind a window that sequences gave up
  uint64_t checkpoints_created = 0;  // automatic ones included
  uint64_t checkpoints_restored = 0;
};

// What the router wants to know about this host now.
struct HostLoad {
  uint64_t free_frames = 0;
  uint64_t evictable_frames = 0;
  uint64_t total_frames = 0;
  uint64_t open_sequences = 0;
  uint64_t running_calls = 0;
  uint64_t queued_prefill_tokens = 0;  // of open appends, not yet committed
  double prefill_tokens_per_second = 0;
  double store_bytes_per_second = 0;
  uint64_t checkpoint_host_bytes = 0;  // of copies in host memory
  bool is_store_degraded = false;
  uint64_t owed_pages = 0;  // full pages that write-through has not put yet
};

// A sequence's state at one moment, with references to its pages: it stays what it was, whatever
// happens to the sequence. Thread-safe; lives no longer than the host.
class StateSnapshot {
 public:
  struct Put {
    std::vector<ManifestPageRef> pages;  // what a manifest lists, in the order of state()
    uint64_t pages_written = 0;          // in all calls so far
    uint64_t bytes_written = 0;
    uint64_t bytes_total = 0;
  };
  virtual ~StateSnapshot() = default;
  // Numbers of the save, request and metadata are the caller's to fill in.
  virtual const SessionState& state() const = 0;
  // From here on PutPages minds only pages that hold rows of [begin, end), of one or more calls;
  // for the others `Put::pages` has empty entries. Before the first PutPages.
  virtual void SelectRows(uint64_t begin, uint64_t end) = 0;
  // Puts what the store lacks, at `level`; `missing` names pages that the store said it has lost.
  // FAILED_PRECONDITION (PREFIX_LOST) when a page's bytes are gone everywhere; the store's errors.
  virtual absl::StatusOr<Put> PutPages(std::span<const PageKey> missing, Durability level,
                                       MonotonicTime deadline) = 0;

  // A page in host memory, as PutPages would have put it.
  struct Copy {
    ManifestPageRef ref;
    std::vector<std::byte> body;  // slots without rows of the state are zero
    uint32_t rows = 0;
    bool is_full = false;  // every slot is written, whether the state has rows there or not
  };
  // Of each page, in the order of state(). Once, and not with PutPages. Errors as PutPages, but
  // those of the store.
  virtual absl::StatusOr<std::vector<Copy>> CopyPages(MonotonicTime deadline) = 0;
};

// Which layer groups a checkpoint keeps. Values equal the proto enum CheckpointScope.
enum class CheckpointScope : uint8_t {
  kAll = 1,
  // Those that cannot be rewound by cutting: behind a window rows are given up, and a recurrent
  // state is one. Of the others it needs the rows that the sequence still has.
  kNonRewindable = 2,
};

struct CheckpointOptions {
  CheckpointScope scope = CheckpointScope::kAll;
  // kDevice: references to the pages, which spill like all others. kHost: a copy in this process's
  // memory, bounded by Options::checkpoint_host_bytes. kStore: a root in the store.
  Tier tier = Tier::kDevice;
  // Of kStore only: how long the store keeps it at most, whatever becomes of this process.
  absl::Duration ttl = absl::Hours(24);
  std::optional<WriteFence> fence;  // of kStore only: what the write carries
};
inline constexpr absl::Duration kMaxCheckpointTtl = absl::Hours(24 * 366);

struct CheckpointInfo {
  uint64_t id = 0;  // unique in the process
  uint64_t length = 0;
  bool is_automatic = false;
  uint64_t num_pages = 0;
  absl::Time created_at = absl::UnixEpoch();
  CheckpointScope scope = CheckpointScope::kAll;
  Tier tier = Tier::kDevice;
  uint64_t copied_bytes = 0;  // kHost: of its copy; kStore: of page bodies that were sent
  std::optional<absl::Time> expires_at;  // kStore
  // kNonRewindable: the sequence was cut or edited in front of `length` since, so that there is
  // nothing to go back to any more. It holds neither pages nor memory nor a manifest then.
  bool is_void = false;
};

// A page entered or left a tier of this host. Private pages are not reported.
struct ResidencyChange {
  PrefixKey prefix;
  uint32_t group = 0;
  Tier tier = Tier::kDevice;
  bool removed = false;
  uint64_t page_bytes = 0;
};

class ModelHost {
 public:
  struct Options {
    // Bytes of device memory for frames. frames a group = floor(budget / bytes of one page of all
    // groups).
    uint64_t pool_bytes = 0;
    uint64_t incarnation = 0;
    // Numbers of sequences and pending writes; shared by all hosts of a worker. Null: the host's
    // own.
    std::shared_ptr<std::atomic<uint64_t>> numbers;
    // Unreferenced pages in the store that are remembered for partial matches, of all tenants.
    uint64_t max_known_stored_pages = 65536;
    // Put a page into the store as soon as it is full and keyed; later if the store refuses then.
    bool write_through = true;
    Durability write_through_level = Durability::kProcess;
    // Fractions of frames in use at which background spilling starts and stops.
    double spill_high_watermark = 0.9;
    double spill_low_watermark = 0.75;
    absl::Duration store_timeout = absl::Seconds(10);
    absl::Duration lookup_timeout = absl::Milliseconds(200);
    // How long spilling pauses after the store refused. A page that it goes on refusing waits for
    // up to 16 times as long.
    absl::Duration store_backoff = absl::Seconds(1);
    uint64_t max_open_sequences = 100000;
    // A sequence on which no call was made for so long, and that has no pending write, is closed:
    // its client died or forgot it. 0: never.
    absl::Duration sequence_idle = absl::Hours(1);
    uint64_t max_sequence_tokens = uint64_t{1} << 22;
    uint64_t max_waiting_calls = 4096;
    // An append of which no row comes for so long is aborted: it holds frames.
    absl::Duration max_append_idle = absl::Seconds(60);
    // Calls that need no frame, as all their pages are resident, may pass one that waits for
    // frames, so often: they pin pages that it may be waiting for.
    uint32_t max_overtakes = 64;
    // Memory for the copies of checkpoints of tier kHost, all sequences together.
    uint64_t checkpoint_host_bytes = uint64_t{256} << 20;
    // Every so many pages of tokens a commit leaves an automatic checkpoint of the groups that
    // cannot be rewound by cutting, if the model has any. 0: none.
    uint32_t checkpoint_every_pages = 0;
    // Tests only: do not compare checksums on restore.
    bool unsafe_skip_verify = false;
    absl::Status Validate() const;
  };

  // `store` may be null: no spilling. Executors run spills and restores. All outlive the host.
  // INVALID_ARGUMENT (POOL_TOO_SMALL) when the budget holds less than one page, with the numbers.
  static absl::StatusOr<std::unique_ptr<ModelHost>> Create(Options options,
                                                           std::shared_ptr<const Model> model,
                                                           Device* device, PageStore* store,
                                                           Executor* io, Clock* clock);
  virtual ~ModelHost() = default;

  virtual const Model& model() const = 0;
  virtual DevicePool& pool() = 0;
  // Byte offset of a frame of a group in the pool.
  virtual uint64_t FrameOffset(uint32_t group, FrameId frame) const = 0;

  // --- prefixes ---
  virtual absl::StatusOr<PrefixReuse> LookupPrefix(const Tenant& tenant,
                                                   std::span<const uint32_t> tokens,
                                                   std::span<const PositionedInput> inputs,
                                                   const PromptOptions& options) = 0;

  // --- sequences ---
  virtual absl::StatusOr<OpenResult> Open(const Tenant& tenant, std::span<const uint32_t> tokens,
                                          std::span<const PositionedInput> inputs,
                                          const PromptOptions& options) = 0;
  // Takes over pages that others have committed since the sequence was opened, for the tokens that
  // come next; rows of its own in the first of those pages are dropped for them. Does not wait for
  // restores. FAILED_PRECONDITION (LENGTH_MISMATCH; NOT_CANONICAL: nothing of it can be found),
  // INVALID_ARGUMENT (tokens).
  virtual absl::StatusOr<ExtendResult> ExtendMatch(const Tenant& tenant,
                                                   const SequenceHandle& sequence,
                                                   const ExtendRequest& request,
                                                   MonotonicTime deadline) = 0;
  // Tells `watcher` how much of a sequence is resident: at once, whenever that changed, and last
  // with `done`. When nothing of it is on its way, waits in line for the frames like a call that
  // reads it all, and keeps its place to the deadline. A restore that failed shortens a sequence
  // that nothing was appended to yet.
  //
  // The watcher is called from this thread, without locks, also while nothing changes (about ten
  // times a second). It answers whether to go on: CANCELLED if not. At the deadline
  // RESOURCE_EXHAUSTED (POOL_EXHAUSTED) in line for frames, DEADLINE_EXCEEDED while restores run.
  using ReadinessWatcher = absl::FunctionRef<bool(const Readiness&)>;
  virtual absl::Status WatchReadiness(const Tenant& tenant, SequenceId id, MonotonicTime deadline,
                                      ReadinessWatcher watcher) = 0;
  virtual absl::StatusOr<SequenceInfo> Get(const Tenant& tenant, SequenceId id) = 0;
  virtual bool Has(SequenceId id) const = 0;
  // In order of number, after `after`, at most `limit`.
  virtual std::vector<SequenceInfo> List(const Tenant& tenant, uint64_t after, size_t limit) = 0;
  virtual absl::StatusOr<SequenceContents> ReadContents(const Tenant& tenant, SequenceId id) = 0;
  // Of the first `length` tokens. Reads those behind the last keyed page, for which its key stands,
  // and looks at each page once. FAILED_PRECONDITION (STALE_EPOCH; PREFIX_LOST: some of their pages
  // are gone).
  virtual absl::StatusOr<ContentDigest> DigestContents(const Tenant& tenant,
                                                       const SequenceHandle& sequence,
                                                       uint64_t length) = 0;
  // Ends keeps_masked_rows: each group gives up what is outside held[group], spans that ascend.
  // INVALID_ARGUMENT when the next token could attend to what would go.
  virtual absl::StatusOr<SequenceInfo> KeepRows(const Tenant& tenant,
                                                const SequenceHandle& sequence,
                                                std::span<const std::vector<RowSpan>> held) = 0;
  virtual absl::StatusOr<BlockTable> GetBlockTable(const Tenant& tenant, SequenceId id) = 0;
  // OK if it is closed already. A pending write is aborted.
  virtual absl::Status Close(const Tenant& tenant, SequenceId id, uint64_t epoch) = 0;
  // The number of an open sequence, whoever's it is; 0, which none has, if it is not open.
  virtual uint64_t NumberOf(SequenceId id) const = 0;
  // Closes what was idle for Options::sequence_idle. Full pages stay in the cache, and what was
  // saved or parked stays where it is. Returns those; looks at all open sequences, at most ten
  // times in that while and once a second.
  virtual std::vector<IdleSequence> CloseIdle() = 0;
  // Only if it has the expected revision and no write is pending; else as for any change.
  virtual absl::Status CloseUnchanged(const Tenant& tenant, const SequenceHandle& sequence) = 0;
  // `is_unlisted` as PromptOptions has it.
  virtual absl::StatusOr<ForkResult> Fork(const Tenant& tenant, const SequenceHandle& source,
                                          std::optional<uint64_t> length, MonotonicTime deadline,
                                          bool is_unlisted = false) = 0;
  virtual absl::StatusOr<RewindResult> Rewind(const Tenant& tenant, const SequenceHandle& sequence,
                                              int64_t length) = 0;

  // --- edits ---
  // Applies edits in order as one transaction: all or none. `sequences` are those that the edits
  // name, as their callers believe them to be. Sequences that change besides them (MOVE_ALL, keep
  // only) are the tenant's others of this model. Never waits: edits move references, no bytes.
  // FAILED_PRECONDITION (PENDING_WRITE) if a sequence that would change has a pending write.
  virtual absl::StatusOr<EditResult> Edit(const Tenant& tenant,
                                          std::span<const SequenceHandle> sequences,
                                          std::span<const SequenceEdit> edits) = 0;
  // All rows go; the sequence stays open. `zero_data`: pages that nobody else references leave the
  // cache too, and their frames are zeroed before anybody gets them.
  virtual absl::StatusOr<EditResult> Clear(const Tenant& tenant, const SequenceHandle& sequence,
                                           bool zero_data) = 0;
  // Moves at most about `max_rows` rows so that extents become few; contents, positions and keys
  // stay. apply_shifts: K that is still to be rotated is, once and for all, which costs one
  // rounding of its type. Waits for frames. Call again until nothing moves.
  virtual absl::StatusOr<CompactResult> Compact(const Tenant& tenant,
                                                const SequenceHandle& sequence, uint64_t max_rows,
                                                bool apply_shifts, MonotonicTime deadline) = 0;
  virtual absl::StatusOr<PositionExtents> QueryExtent(const Tenant& tenant, SequenceId id) = 0;

  // --- pending writes ---
  // pin_prefix: the whole sequence is made resident and stays pinned until commit or abort, so that
  // Attend under the pending id never waits for frames. Rows must keep coming: an append that idles
  // for max_append_idle is aborted.
  virtual absl::StatusOr<PendingSlot> BeginAppend(
      const Tenant& tenant, const SequenceHandle& sequence, absl::string_view append_id,
      uint64_t expected_length, std::span<const uint32_t> tokens,
      std::span<const PositionedInput> inputs, bool pin_prefix, MonotonicTime deadline) = 0;
  // All items or none. A reservation not committed within `lease` is aborted.
  virtual absl::StatusOr<std::vector<PendingSlot>> Reserve(const Tenant& tenant,
                                                           std::span<const ReserveItem> items,
                                                           absl::Duration lease, bool pin_prefix,
                                                           MonotonicTime deadline) = 0;
  // Pending id of an open append. Waits while the append is in line for its frames, to the
  // deadline. NOT_FOUND (APPEND_NOT_FOUND) when there is none.
  virtual absl::StatusOr<uint64_t> FindAppend(const Tenant& tenant, SequenceId id,
                                              absl::string_view append_id,
                                              MonotonicTime deadline) = 0;
  // INVALID_ARGUMENT when the run lies outside the pending write or `num_bytes` is not what it
  // needs; of a page any number of its bytes, in order.
  virtual absl::Status WriteRows(const Tenant& tenant, SequenceId id, uint64_t pending_id,
                                 const RowRun& run, uint64_t num_bytes, RowSource source) = 0;
  // All rows of [0, n) must have arrived (FAILED_PRECONDITION, ROWS_MISSING, naming the first
  // missing layer). For a reservation `tokens` are the n ≤ reserved tokens; for an append they are
  // empty.
  virtual absl::StatusOr<CommitResult> Commit(const Tenant& tenant, const SequenceHandle& sequence,
                                              uint64_t pending_id,
                                              std::span<const uint32_t> tokens) = 0;
  // As Commit of a reservation, but tokens[i] takes the row at indices[i] of it; the others are
  // dropped. Indices ascend; in a draft tree they are a path from its root. Rows keep the positions
  // they were reserved at. No Attend under the reservation may run any more.
  virtual absl::StatusOr<CommitResult> Accept(const Tenant& tenant, const SequenceHandle& sequence,
                                              uint64_t pending_id,
                                              std::span<const uint32_t> indices,
                                              std::span<const uint32_t> tokens) = 0;
  // Idempotent.
  virtual absl::Status Abort(const Tenant& tenant, SequenceId id, uint64_t pending_id) = 0;

  // --- reading ---
  // Waits for staged rows of the layer under a pending id, and for frames otherwise.
  virtual absl::StatusOr<AttendOutput> Attend(const Tenant& tenant, const AttendQuery& query,
                                              MonotonicTime deadline) = 0;

  // Keeps pages in their frames until destroyed.
  class PinnedPages {
   public:
    virtual ~PinnedPages() = default;
  };
  struct PinnedTable : BlockTable {
    std::shared_ptr<const PinnedPages> pages;  // shared with the calls that answer from the table
  };
  // A sequence's table with all its pages resident and pinned, of all groups at once: each entry
  // has a frame, and what the frame holds of it stays as it is while `pages` lives.
  virtual absl::StatusOr<PinnedTable> PinTable(const Tenant& tenant, SequenceId id,
                                               MonotonicTime deadline) = 0;

  // Pins what it reads until destroyed.
  class PinnedRows : public PinnedPages {
   public:
    virtual uint64_t begin() const = 0;
    virtual uint64_t end() const = 0;
    // Consecutive runs of the rows of one layer in order, each inside one page, as offsets in
    // pool().
    struct Run {
      uint64_t first_token;  // row of the sequence
      uint32_t num_tokens;
      uint64_t offset;
      uint64_t num_bytes;
      int32_t shift;  // of K: the rows are to be turned by so many positions first
    };
    virtual std::vector<Run> Runs(uint32_t layer, RowKind kind) const = 0;
  };
  // Token range [begin, end) of a group; end 0 = the length. begin kHeldRows: from the first that
  // the group holds. Of pages that are whole all that hold rows of it, of a state the state.
  static constexpr uint64_t kHeldRows = std::numeric_limits<uint64_t>::max();
  virtual absl::StatusOr<std::shared_ptr<const PinnedRows>> PinRows(const Tenant& tenant,
                                                                    SequenceId id, uint32_t group,
                                                                    uint64_t begin, uint64_t end,
                                                                    MonotonicTime deadline) = 0;

  // --- saved state ---
  // The first `length` tokens (absent: all committed). A pending write does not disturb it and is
  // not part of it. FAILED_PRECONDITION (NO_STORE), INVALID_ARGUMENT (length).
  virtual absl::StatusOr<std::unique_ptr<StateSnapshot>> Snapshot(
      const Tenant& tenant, const SequenceHandle& sequence, std::optional<uint64_t> length) = 0;
  // A new sequence over the first `length` tokens of saved state (absent: all). Its pages are known
  // by the record's digests and restored on demand; a prefetch begins. FAILED_PRECONDITION
  // (MODEL_MISMATCH), INVALID_ARGUMENT (length), DATA_LOSS, RESOURCE_EXHAUSTED.
  // `identity` absent: a new one, of epoch 1; ALREADY_EXISTS if one of that id is open.
  virtual absl::StatusOr<OpenResult> OpenSaved(const Tenant& tenant, const SessionState& state,
                                               std::span<const ManifestPageRef> pages,
                                               std::optional<uint64_t> length,
                                               const std::optional<SequenceIdentity>& identity) = 0;

  // What OpenSaved would find where, without opening.
  virtual absl::StatusOr<PrefixReuse> LookupSaved(const Tenant& tenant, const SessionState& state,
                                                  std::span<const ManifestPageRef> pages,
                                                  std::optional<uint64_t> length) = 0;

  // As OpenSaved of the tokens in front of the first chunk, with the chunks' rows behind them where
  // the prompt has their tokens. canonical_length ends in front of the chunks: they, and what is
  // appended, get no keys. `chunks`: of FindChunks over this state, at least one; positions of the
  // state are implicit. FAILED_PRECONDITION as the edits that it takes (CANNOT_SHIFT, CANNOT_CUT,
  // ROWS_RECLAIMED): then no sequence was opened.
  virtual absl::StatusOr<OpenResult> OpenSavedChunks(const Tenant& tenant,
                                                     const SessionState& state,
                                                     std::span<const ManifestPageRef> pages,
                                                     std::span<const ReusedChunk> chunks) = 0;
  // What OpenSavedChunks would find where, or its refusal, without opening.
  virtual absl::StatusOr<PrefixReuse> LookupSavedChunks(const Tenant& tenant,
                                                        const SessionState& state,
                                                        std::span<const ManifestPageRef> pages,
                                                        std::span<const ReusedChunk> chunks) = 0;

  // --- checkpoints ---
  // The sequence as it is; ends with it. At most 32 a sequence: an automatic one gives way, a void
  // one first, then the oldest; RESOURCE_EXHAUSTED (TOO_MANY_CHECKPOINTS) without one. kHost: waits
  // for pages that are not resident; RESOURCE_EXHAUSTED (CHECKPOINT_MEMORY). kStore: durable when
  // it answers; FAILED_PRECONDITION (NO_STORE, STALE_EPOCH), INVALID_ARGUMENT (ttl), the store's
  // errors.
  virtual absl::StatusOr<CheckpointInfo> CreateCheckpoint(const Tenant& tenant,
                                                          const SequenceHandle& sequence,
                                                          const CheckpointOptions& options,
                                                          MonotonicTime deadline) = 0;
  // NOT_FOUND (CHECKPOINT_NOT_FOUND), FAILED_PRECONDITION (CHECKPOINT_VOID, CHECKPOINT_EXPIRED).
  // The checkpoint stays. If one of its pages was lost since, the sequence becomes the valid prefix
  // of it. A copy in host memory waits for frames: RESOURCE_EXHAUSTED (POOL_EXHAUSTED); of one
  // whose pages the store does not have all must fit: INVALID_ARGUMENT (POOL_TOO_SMALL).
  virtual absl::StatusOr<SequenceInfo> RestoreCheckpoint(const Tenant& tenant,
                                                         const SequenceHandle& sequence,
                                                         uint64_t checkpoint_id,
                                                         MonotonicTime deadline) = 0;
  // Oldest first.
  virtual absl::StatusOr<std::vector<CheckpointInfo>> ListCheckpoints(const Tenant& tenant,
                                                                      SequenceId id) = 0;
  // OK if there is none.
  virtual absl::Status DeleteCheckpoint(const Tenant& tenant, const SequenceHandle& sequence,
                                        uint64_t checkpoint_id) = 0;

  // --- upkeep ---
  struct EvictResult {
    uint64_t spilled_pages = 0;
    uint64_t evicted_pages = 0;
  };
  // Spills what must be kept and frees frames of unpinned pages; max_pages 0: all that can be.
  virtual absl::StatusOr<EvictResult> EvictPages(uint64_t max_pages, MonotonicTime deadline) = 0;
  // Drops cached pages that no sequence references. `zero_data`: their frames are zeroed before
  // anybody gets them.
  virtual uint64_t ClearCache(bool zero_data) = 0;
  // Aborts reservations whose lease ended and appends that idle, starts background spills, puts
  // full pages that the store did not take when they became full. Call it every 100 ms or so.
  virtual void Tick() = 0;
  // Waits for running spills and restores.
  virtual void Quiesce() = 0;

  // In order of frame, those behind `after` (0: all), at most `limit`.
  virtual std::vector<FrameEntry> DumpFrames(uint32_t group, uint32_t after, uint32_t limit) = 0;
  virtual std::vector<PoolUsage> Usage() = 0;
  virtual HostCounters Counters() = 0;
  virtual HostLoad Load() = 0;
  // Called without locks, in order, from whichever thread caused the changes. Set before first use.
  virtual void SetResidencyListener(
      std::function<void(const std::vector<ResidencyChange>&)> fn) = 0;
  // Everything resident or known stored by this host, for a snapshot.
  virtual std::vector<ResidencyChange> ResidencySnapshot() = 0;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_MODEL_HOST_H_
