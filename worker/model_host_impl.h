// The one implementation of ModelHost. Its parts lie in model_host_*.cc;
// this header is private to them.
#ifndef PAGETIDE_WORKER_MODEL_HOST_IMPL_H_
#define PAGETIDE_WORKER_MODEL_HOST_IMPL_H_

#include <array>
#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/container/flat_hash_map.h"
#include "absl/time/time.h"
#include "base/mutex.h"
#include "core/compaction.h"
#include "core/compute_claims.h"
#include "core/page_directory.h"
#include "core/page_table.h"
#include "core/sequence_editor.h"
#include "core/sequence_pages.h"
#include "core/tier_planner.h"
#include "worker/filling_checksum.h"
#include "worker/model_host.h"
#include "worker/sequence_transfer.h"

namespace pagetide {

// Pages a store call carries at most, all of them in frames meanwhile.
inline constexpr size_t kBatchPages = 8;
// How often a waiting call looks again by itself, in case a wake-up came from outside (a lease that
// ended, the store's back-off).
inline constexpr absl::Duration kLookAgain = absl::Milliseconds(100);

class ModelHostImpl final : public ModelHost, public TransferHost {
 public:
  ModelHostImpl(Options options, std::shared_ptr<const Model> model,
                std::unique_ptr<DevicePool> pool, uint32_t num_frames, PageStore* store,
                Executor* io, Clock* clock);
  ~ModelHostImpl() override;

  const Model& model() const override { return *model_; }
  DevicePool& pool() override { return *pool_; }
  uint64_t FrameOffset(uint32_t group, FrameId frame) const override {
    return group_base_[group] + uint64_t{frame.value()} * Geometry(group).page_bytes();
  }
  absl::StatusOr<PrefixReuse> LookupPrefix(const Tenant&, std::span<const uint32_t>,
                                           std::span<const PositionedInput>,
                                           const PromptOptions&) override;
  absl::StatusOr<OpenResult> Open(const Tenant&, std::span<const uint32_t>,
                                  std::span<const PositionedInput>, const PromptOptions&) override;
  absl::StatusOr<ExtendResult> ExtendMatch(const Tenant&, const SequenceHandle&,
                                           const ExtendRequest&, MonotonicTime) override;
  absl::Status WatchReadiness(const Tenant&, SequenceId, MonotonicTime, ReadinessWatcher) override;
  absl::StatusOr<SequenceInfo> Get(const Tenant&, SequenceId) override;
  bool Has(SequenceId) const override;
  std::vector<SequenceInfo> List(const Tenant&, uint64_t, size_t) override;
  absl::StatusOr<SequenceContents> ReadContents(const Tenant&, SequenceId) override;
  absl::StatusOr<ContentDigest> DigestContents(const Tenant&, const SequenceHandle&,
                                               uint64_t) override;
  absl::StatusOr<SequenceInfo> KeepRows(const Tenant&, const SequenceHandle&,
                                        std::span<const std::vector<RowSpan>>) override;
  absl::StatusOr<BlockTable> GetBlockTable(const Tenant&, SequenceId) override;
  absl::StatusOr<PinnedTable> PinTable(const Tenant&, SequenceId, MonotonicTime) override;
  absl::Status Close(const Tenant&, SequenceId, uint64_t) override;
  uint64_t NumberOf(SequenceId id) const override;
  std::vector<IdleSequence> CloseIdle() override;
  absl::Status CloseUnchanged(const Tenant&, const SequenceHandle&) override;
  absl::StatusOr<ForkResult> Fork(const Tenant&, const SequenceHandle&, std::optional<uint64_t>,
                                  MonotonicTime, bool is_unlisted) override;
  absl::StatusOr<RewindResult> Rewind(const Tenant&, const SequenceHandle&, int64_t) override;
  absl::StatusOr<EditResult> Edit(const Tenant&, std::span<const SequenceHandle>,
                                  std::span<const SequenceEdit>) override;
  absl::StatusOr<EditResult> Clear(const Tenant&, const SequenceHandle&, bool) override;
  absl::StatusOr<CompactResult> Compact(const Tenant&, const SequenceHandle&, uint64_t, bool,
                                        MonotonicTime) override;
  absl::StatusOr<PositionExtents> QueryExtent(const Tenant&, SequenceId) override;
  absl::StatusOr<PendingSlot> BeginAppend(const Tenant&, const SequenceHandle&, absl::string_view,
                                          uint64_t, std::span<const uint32_t>,
                                          std::span<const PositionedInput>, bool,
                                          MonotonicTime) override;
  absl::StatusOr<std::vector<PendingSlot>> Reserve(const Tenant&, std::span<const ReserveItem>,
                                                   absl::Duration, bool, MonotonicTime) override;
  absl::StatusOr<uint64_t> FindAppend(const Tenant&, SequenceId, absl::string_view,
                                      MonotonicTime) override;
  absl::Status WriteRows(const Tenant&, SequenceId, uint64_t, const RowRun&, uint64_t,
                         RowSource) override;
  absl::StatusOr<CommitResult> Commit(const Tenant&, const SequenceHandle&, uint64_t,
                                      std::span<const uint32_t>) override;
  absl::StatusOr<CommitResult> Accept(const Tenant&, const SequenceHandle&, uint64_t,
                                      std::span<const uint32_t>,
                                      std::span<const uint32_t>) override;
  absl::Status Abort(const Tenant&, SequenceId, uint64_t) override;
  absl::StatusOr<AttendOutput> Attend(const Tenant&, const AttendQuery&, MonotonicTime) override;
  absl::StatusOr<std::shared_ptr<const PinnedRows>> PinRows(const Tenant&, SequenceId, uint32_t,
                                                            uint64_t, uint64_t,
                                                            MonotonicTime) override;
  absl::StatusOr<std::unique_ptr<StateSnapshot>> Snapshot(const Tenant&, const SequenceHandle&,
                                                          std::optional<uint64_t>) override;
  absl::StatusOr<OpenResult> OpenSaved(const Tenant&, const SessionState&,
                                       std::span<const ManifestPageRef>, std::optional<uint64_t>,
                                       const std::optional<SequenceIdentity>&) override;
  absl::StatusOr<PrefixReuse> LookupSaved(const Tenant&, const SessionState&,
                                          std::span<const ManifestPageRef>,
                                          std::optional<uint64_t>) override;
  absl::StatusOr<OpenResult> OpenSavedChunks(const Tenant&, const SessionState&,
                                             std::span<const ManifestPageRef>,
                                             std::span<const ReusedChunk>) override;
  absl::StatusOr<PrefixReuse> LookupSavedChunks(const Tenant&, const SessionState&,
                                                std::span<const ManifestPageRef>,
                                                std::span<const ReusedChunk>) override;
  absl::StatusOr<CheckpointInfo> CreateCheckpoint(const Tenant&, const SequenceHandle&,
                                                  const CheckpointOptions&, MonotonicTime) override;
  absl::StatusOr<SequenceInfo> RestoreCheckpoint(const Tenant&, const SequenceHandle&, uint64_t,
                                                 MonotonicTime) override;
  absl::StatusOr<std::vector<CheckpointInfo>> ListCheckpoints(const Tenant&, SequenceId) override;
  absl::Status DeleteCheckpoint(const Tenant&, const SequenceHandle&, uint64_t) override;
  absl::StatusOr<EvictResult> EvictPages(uint64_t, MonotonicTime) override;
  uint64_t ClearCache(bool zero_data) override;
  void Tick() override;
  void Quiesce() override;
  std::vector<FrameEntry> DumpFrames(uint32_t, uint32_t, uint32_t) override;
  std::vector<PoolUsage> Usage() override;
  HostCounters Counters() override;
  HostLoad Load() override;
  void SetResidencyListener(std::function<void(const std::vector<ResidencyChange>&)>) override;
  std::vector<ResidencyChange> ResidencySnapshot() override;
  absl::StatusOr<std::unique_ptr<OutgoingSequence>> BeginOutgoing(const Tenant&,
                                                                  const SequenceHandle&,
                                                                  TransferKind, absl::string_view,
                                                                  MonotonicTime) override;
  void EndHold(SequenceId, uint64_t) override;
  absl::Status CloseMoved(const Tenant&, SequenceId, uint64_t) override;
  bool has_device_addresses() const override;
  absl::StatusOr<std::unique_ptr<IncomingSequence>> BeginIncoming(const Tenant&, TransferPlan,
                                                                  MonotonicTime) override;

 private:
  class PinnedRowsImpl;
  class PinnedPagesImpl;
  class SnapshotImpl;
  class OutgoingImpl;
  class IncomingImpl;

  // A snapshot whose pages are also read one by one, for a transfer. Not with PutPages or
  // CopyPages.
  class PagedSnapshot : public StateSnapshot {
   public:
    virtual uint32_t num_pages() const = 0;
    virtual uint32_t GroupOf(uint32_t page) const = 0;
    // What a copy of the page would be, without its body. Reads it unless the directory knows.
    virtual absl::StatusOr<Copy> DescribePage(uint32_t page, MonotonicTime deadline) = 0;
    // Some at a time, in order. Ends with the sink's error.
    using CopySink = absl::FunctionRef<absl::Status(uint32_t page, const ManifestPageRef& ref,
                                                    std::span<const std::byte> body)>;
    virtual absl::Status ReadPages(std::span<const uint32_t> pages, MonotonicTime deadline,
                                   CopySink sink) = 0;
    // Does the page lie in a frame, all of it, with this checksum?
    virtual bool IsInFrame(uint32_t page, const Checksum128& checksum) = 0;
    // See OutgoingSequence. FAILED_PRECONDITION (NOT_IN_FRAME).
    virtual absl::Status VisitFrame(uint32_t page, const Checksum128& checksum,
                                    OutgoingSequence::FrameSink sink) = 0;
  };

  // Pins of pages, given back when it goes. Made with the lock held, destroyed without.
  class PagePins {
   public:
    PagePins(ModelHostImpl* host, std::vector<PageId> pages)
        : host_(host), pages_(std::move(pages)) {}
    ~PagePins();
    PagePins(const PagePins&) = delete;
    PagePins& operator=(const PagePins&) = delete;

   private:
    ModelHostImpl* const host_;
    const std::vector<PageId> pages_;
  };

  // Rows behind the committed length of one sequence.
  struct Pending {
    enum class State { kAcquiring, kOpen, kCommitting };
    uint64_t id = 0;
    std::string append_id;  // empty: a reservation
    State state = State::kAcquiring;
    bool aborted = false;  // clean up as soon as nobody works on it
    int num_writers = 0;   // WriteRows copying right now, without the lock
    uint64_t first_row = 0;
    int64_t first_position = 0;
    uint32_t num_tokens = 0;
    std::vector<uint32_t> tokens;  // appends only
    std::vector<int32_t> parents;  // reservations only; empty: each follows the one before
    std::vector<PositionedInput> inputs;
    std::vector<PageId> pinned;
    std::vector<PageId> in_place;  // targets with committed rows, marked as being written
    // [group]: the pages that rows go to, in order; the first may be the committed tail.
    std::vector<std::vector<PageId>> targets;
    // [group]: where in the first of targets the first row goes.
    std::vector<uint32_t> first_slot;
    // [group]: those of targets that this write created and no page table holds yet.
    std::vector<std::vector<PageId>> created;
    // [group][target]: of an append whose device the host can address; empty otherwise.
    std::vector<std::vector<FillingChecksum>> checksums;
    // [group][layer][K, V]: rows arrived, counted from the first.
    std::vector<std::vector<std::array<uint32_t, 2>>> arrived;
    // [group][target]: leading bytes arrived, of groups whose pages are whole; else empty.
    std::vector<std::vector<uint64_t>> page_bytes_arrived;
    uint64_t pages_created = 0;
    MonotonicTime began;
    // Of a reservation fixed when it opens; of an append put off by each run of rows.
    MonotonicTime expires = MonotonicTime::InfiniteFuture();
    bool pin_prefix = false;
    // Nobody writes: the sequence is being moved to the worker at this address, and until its
    // source knows the outcome it changes for nobody.
    std::string moving_to;
    bool is_append() const { return !append_id.empty(); }
    bool is_hold() const { return !moving_to.empty(); }
    bool is_busy() const { return state != State::kOpen || num_writers > 0; }
  };

  // A checkpoint's own copy, in host memory or in the store.
  struct SavedCheckpoint {
    SessionState state;
    std::vector<ManifestPageRef> pages;
    std::vector<StateSnapshot::Copy> copies;  // kHost, in the order of pages
    uint64_t host_bytes = 0;                  // kHost: of checkpoint_host_bytes, state included
    std::string manifest;                     // kStore
    uint64_t manifest_version = 0;
  };
  struct Checkpoint {
    CheckpointInfo info;
    bool is_ready = true;  // false: its copy is being made; nobody but its maker sees it
    // kDevice: one reference for each extent. Of groups that it does not keep the table is empty.
    SequenceRows rows;
    std::shared_ptr<const SavedCheckpoint> saved;  // shared with restores that wait for frames
  };

  struct Sequence : SequenceRows {
    SequenceId id;
    uint64_t number = 0;  // in this host; that of the id, unless another incarnation opened it
    std::string tenant;
    uint64_t epoch = 1;
    uint64_t revision = 1;
    PrefixKey root;
    MonotonicTime last_call;  // or the end of its last pending write
    std::unique_ptr<Pending> pending;
    std::vector<Checkpoint> checkpoints;  // oldest first
    bool was_appended = false;            // since open: then a lost prefix is the caller's to know
    bool keeps_masked_rows = false;       // until KeepRows
    bool is_unlisted = false;             // a job's own
    bool closed = false;
    std::string shortened_because;
    uint64_t length() const { return num_rows(); }
  };
  using SequencePtr =
      std::shared_ptr<Sequence>;  // shared with calls that work on it without the lock

  // What a call needs before it can run. Pages are held by id: they may vanish while it waits.
  struct Need {
    std::vector<PageId> pages;     // readable
    std::vector<PageId> writable;  // resident, and not being spilled
    std::vector<uint32_t> fresh;   // [group] new frames
  };
  struct Acquired {
    std::vector<PageId> pinned;
    std::vector<std::vector<FramePool::Grant>> fresh;  // [group]
  };
  struct Ticket {
    const Need* need = nullptr;
    std::string tenant;
    Acquired got;
    std::vector<PageId> restoring;  // those of the need whose restore it began
    bool has_pins = false;
    uint32_t num_overtaken = 0;  // calls that were served before it, though it was first in line
  };
  struct SpillItem {
    PageId page;
    PageKey key;
    uint32_t group = 0;
    uint64_t offset = 0;
    std::optional<Checksum128> expected;  // of full pages
    PageRecordMeta meta;
    PrefixIndex::Tokens tokens;  // null: others find the page by its key only
  };
  struct RestoreItem {
    PageId page;
    uint32_t group = 0;
    uint64_t offset = 0;
    PageKey key;
    Checksum128 expected;
  };
  // The leading run of known pages of a prompt and the partial page behind it.
  struct Match {
    PrefixReuse reuse;
    uint64_t num_pages = 0;                                 // full pages of tokens
    std::vector<std::vector<std::optional<PageId>>> pages;  // [page][group]; none: behind a window
    std::vector<PageId> partial;                            // [group]; empty: none
    bool is_partial_tail = false;  // of another sequence: copied now or never
  };
  // The longest prefix, in pages of tokens up to `max_pages`, of which every group knows what the
  // next token can attend to; and the group that lacks the page behind it, which another one has.
  struct UsablePages {
    uint64_t num_pages = 0;
    std::optional<uint32_t> limiting_group;
  };
  UsablePages FindUsablePages(const std::vector<PrefixKey>& keys, uint64_t max_pages)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // The first page of tokens that a group needs if `num_pages` are used, but for those it keeps.
  uint64_t FirstNeededPage(uint32_t group, uint64_t num_pages) const {
    return static_cast<uint64_t>(
               traits_[group].FirstVisible(static_cast<int64_t>(num_pages * page_tokens()))) /
           page_tokens();
  }
  // Leading pages of tokens that a group needs for every length behind them.
  uint64_t KeptPages(uint32_t group) const {
    return model_->geometry().PagesFor(static_cast<uint64_t>(traits_[group].keep_tokens));
  }
  bool IsNeeded(uint32_t group, uint64_t page, uint64_t num_pages) const {
    return page < KeptPages(group) || page >= FirstNeededPage(group, num_pages);
  }
  bool IsKnown(uint32_t group, const PrefixKey& key) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const GroupGeometry& Geometry(uint32_t group) const { return model_->geometry().group(group); }
  uint32_t num_groups() const { return model_->geometry().num_groups(); }
  uint32_t page_tokens() const { return model_->geometry().page_tokens(); }
  uint64_t NextNumber() { return options_.numbers->fetch_add(1) + 1; }
  absl::Status ValidateTokens(std::span<const uint32_t> tokens,
                              std::span<const PositionedInput> inputs, uint64_t first) const;

  // --- sequences (model_host_impl.cc) ---
  // For a call on the sequence, which is not idle then.
  absl::StatusOr<SequencePtr> FindSequence(const Tenant& tenant, SequenceId id)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // As FindSequence, and checks epoch, revision and that no write is pending.
  absl::StatusOr<SequencePtr> FindForChange(const Tenant& tenant, const SequenceHandle& handle)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status CheckHandle(const Sequence& sequence, const SequenceHandle& handle) const;
  // OK unless a write is pending, or the sequence is being moved. `action` begins the text.
  static absl::Status CheckMayChange(absl::string_view action, const Sequence& sequence);
  absl::StatusOr<Pending*> FindPending(Sequence& sequence, uint64_t pending_id)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  SequenceInfo InfoOf(const Sequence& sequence) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Cuts a sequence to `length` rows; returns the pages freed.
  uint64_t Truncate(Sequence& sequence, uint64_t length) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Gives back what a pending write holds, then removes it. Not while it is busy.
  void DropPending(Sequence& sequence) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Ends a closed sequence or an aborted write as soon as nobody works on it.
  void Settle(Sequence& sequence) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // 0: no sequence of that id is open.
  uint64_t NumberOfLocked(SequenceId id) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Names a new sequence, or gives it the name that it had elsewhere, and opens it for all.
  void AddSequence(const SequencePtr& sequence,
                   const std::optional<SequenceIdentity>& identity = std::nullopt)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Ends it, for new calls at once. The caller has a reference of its own.
  void CloseNow(Sequence& sequence) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Length up to which no page is lost.
  uint64_t ValidLength(const Sequence& sequence) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Shortens to ValidLength if it is less, and says so; OK otherwise.
  absl::Status CutIfLost(Sequence& sequence) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  uint64_t ResidentTokens(const Sequence& sequence) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Reports frame changes and deletes stale private records. Never with the lock held.
  void Flush() ABSL_LOCKS_EXCLUDED(mu_);

  // --- tables (model_host_tables.cc) ---
  // What a call is about to read of a sequence.
  struct ReadPlan {
    uint64_t first = 0;  // rows [first, last), if it is about rows of one group
    uint64_t last = 0;
    std::vector<Extent> extents;
  };
  struct PinnedPlan {
    SequencePtr sequence;
    ReadPlan plan;
    std::vector<PageId> pages;  // those of the plan's extents, resident, each pinned once
  };
  // Waits until the pages of a plan are there, then plans again: nothing is pinned while a call
  // waits, rows may be given up meanwhile and their slots written anew. What it returns is of the
  // sequence as it is then. `action` begins the text of ABORTED, when it changed again and again.
  absl::StatusOr<PinnedPlan> PinPlan(
      const Tenant& tenant, SequenceId id, absl::string_view action,
      absl::FunctionRef<absl::StatusOr<ReadPlan>(const Sequence&)> plan_of, MonotonicTime deadline)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  std::vector<BlockTableEntry> BlockTableOf(const Sequence& sequence) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // --- edits (model_host_edits.cc) ---
  class EditableSequences;
  absl::StatusOr<EditResult> EditLocked(const Tenant& tenant,
                                        std::span<const SequenceHandle> sequences,
                                        std::span<const SequenceEdit> edits)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // --- compaction (model_host_compact.cc) ---
  absl::Status CopyRun(uint32_t group, const CompactionRun& run, std::span<const FrameId> from,
                       FrameId to, bool apply_shifts);
  // ABORTED when the sequence changed while it worked without the lock.
  absl::StatusOr<CompactResult> CompactOnce(const Tenant& tenant, const SequenceHandle& handle,
                                            uint64_t max_rows, bool apply_shifts,
                                            MonotonicTime deadline)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // --- frames (model_host_frames.cc) ---
  // To read these extents.
  Need NeedOf(std::span<const Extent> extents) const;
  // Waits in line until all of `need` is there, then pins the pages and hands out the frames; all
  // or nothing. Unlocks while it waits. `keep_waiting`, if given, is asked with the lock held each
  // time the call wakes, and may unlock meanwhile; CANCELLED when it says no.
  absl::Status Acquire(const std::string& tenant, const Need& need, MonotonicTime deadline,
                       Acquired* out,
                       std::optional<absl::FunctionRef<bool()>> keep_waiting = std::nullopt)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Not first in line, but with nothing to wait for.
  bool MayOvertake(const Ticket& ticket) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status RestoreFailed() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void ReleaseAcquired(Acquired& acquired) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // One step for the head of the line. True when all its frames are assigned. UNAVAILABLE when a
  // restore that it began was given up.
  absl::StatusOr<bool> Progress(Ticket& ticket) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Tries to have `count` free frames: evicts clean pages, starts spills of others. True if there.
  bool MakeRoom(uint32_t group, uint32_t count) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // For who does without if there is none. Evicts only what MayDrop; true if `count` frames are
  // free then.
  bool MakeRoomNow(uint32_t group, uint32_t count) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // As MakeRoomNow, of other pages: none that is not clean.
  bool EvictFor(uint32_t group, uint32_t count, absl::FunctionRef<bool(const Page&)> may_evict)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool CanSpill() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Restores in prefix order into frames that are free or clean now; never waits.
  uint64_t Prefetch(Sequence& sequence) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Bytes of a page in host memory: the frame itself or a copy in `buffer`.
  absl::StatusOr<std::span<const std::byte>> PageBytes(uint32_t group, uint64_t offset,
                                                       std::vector<std::byte>& buffer);
  absl::Status CopyRows(uint32_t group, FrameId from, FrameId to, uint32_t num_rows);
  absl::Status CopyRuns(uint32_t group, FrameId from, FrameId to,
                        std::span<const TailPlan::SlotRun> runs);
  absl::Status ZeroIfNeeded(uint32_t group, const FramePool::Grant& grant);

  // --- transfers to the store and back (model_host_transfers.cc) ---
  void StartSpills(const std::vector<PageId>& pages, Durability level)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void StartRestores(const std::vector<PageId>& pages) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void RunSpills(const std::vector<SpillItem>& items, Durability level) ABSL_LOCKS_EXCLUDED(mu_);
  void RunRestores(const std::vector<RestoreItem>& items) ABSL_LOCKS_EXCLUDED(mu_);
  // Flush, then one job less. The last thing a job does.
  void FinishJob() ABSL_LOCKS_EXCLUDED(mu_);

  // --- refused puts, and write-through that is late (model_host_write_through.cc) ---
  // After a put that was refused all spills pause, for the store may be down. Unless it takes other
  // pages: then only the page itself waits, longer each time, so that it holds up nobody.
  struct Refusal {
    uint64_t taken_before = 0;  // puts_taken_ when it was refused first
    int64_t pauses = 1;         // the wait to its next put, in store_backoff
    MonotonicTime again_at;
  };
  // As CanSpill, and the page's own pause is over.
  bool MaySpill(PageId id) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void NotePutTaken(PageId id) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // `taken_before`: puts_taken_ without the pages that were put by the same call.
  void NotePutRefused(PageId id, uint64_t taken_before, const absl::Status& status)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Of pages that went away or were stored otherwise.
  void ForgetRefusals() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Full keyed pages of this host go to the store, and this one has not gone yet.
  bool IsOwed(const Page& page) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // May its frame be taken without losing anything? An unreferenced page that is owed is to go to
  // the store first, unless the store takes none now, or a call waits for its frame.
  bool MayDrop(const Page& page) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Puts pages that are owed, a bounded number of them at a time, each in its turn.
  void WriteThroughOwed() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // --- readiness (model_host_readiness.cc) ---
  // Without `done`.
  Readiness ReadinessOf(const Sequence& sequence) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool IsRestoring(const Sequence& sequence) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Calls the watcher without the lock.
  bool Tell(ReadinessWatcher watcher, const Readiness& readiness)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status WatchLocked(const Tenant& tenant, SequenceId id, MonotonicTime deadline,
                           ReadinessWatcher watcher) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // --- prefixes (model_host_prefix.cc) ---
  // Of pages that only the store has, the first of a prompt are to be forgotten last; and all of
  // them after others while a prompt's match gives mu_ up, when other calls forget what is too
  // much.
  void TouchKnownPages(const std::vector<PrefixKey>& keys, uint64_t num_pages)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::StatusOr<Match> MatchPrompt(const Tenant& tenant, const PrefixKey& root,
                                    std::span<const uint32_t> tokens,
                                    std::span<const PositionedInput> inputs,
                                    const std::vector<PrefixKey>& keys,
                                    const PromptOptions& options)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // Asks the store for pages of other workers that begin like `next`, the tokens behind the first
  // `at_page` pages, unless ours begin with all of it; what is better than ours becomes known as a
  // stored page. Gives mu_ up while it asks.
  void AdoptPartialFromStore(const Tenant& tenant, const PrefixKey& root,
                             const std::vector<PrefixKey>& keys, uint64_t at_page,
                             std::span<const uint32_t> next, bool has_inputs,
                             MonotonicTime deadline) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // --- racing prefills (model_host_extend.cc) ---
  // A sequence, the tokens behind it, and the keys of all their full pages.
  struct LongerPrompt {
    std::vector<uint32_t> tokens;
    std::vector<PositionedInput> inputs;
    std::vector<PrefixKey> keys;
  };
  LongerPrompt MakeLonger(const Sequence& sequence, const ExtendRequest& request) const;
  // Takes over the pages of `match` that lie behind the sequence's full ones. Returns the tokens
  // that it has more.
  uint64_t AdoptMatch(Sequence& sequence, const LongerPrompt& longer, const Match& match)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Of a wait for another's claim on the page `next`: it came, the claim ended, or the caller did.
  bool IsOver(const Sequence& sequence, uint64_t revision, const PrefixKey& next,
              uint32_t known_before, MonotonicTime give_up) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  uint32_t NumGroupsThatKnow(const PrefixKey& key) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // --- saved state on its way in (model_host_sessions.cc) ---
  // The length to open; the refusals of OpenSaved.
  absl::StatusOr<uint64_t> CheckSaved(const SessionState& state,
                                      std::optional<uint64_t> length) const;
  // Without the tiers.
  PrefixReuse SavedReuse(const SessionState& state, uint64_t length) const;
  bool GoesByPrefix(uint32_t group, const SavedExtent& extent, const ManifestPageRef& ref,
                    const std::vector<PrefixKey>& keys) const;
  // nullptr when this host does not know the page.
  const Page* FindSavedPage(uint32_t group, const SavedExtent& extent, const ManifestPageRef& ref,
                            const std::vector<PrefixKey>& keys) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // The page that stands for the extent of saved state that comes behind `table`. `keys`: of its
  // canonical full pages.
  Page& AdoptSavedPage(uint32_t group, const Sequence& sequence, const PageTable& table,
                       const SessionState& state, const SavedExtent& extent,
                       const ManifestPageRef& ref, const std::vector<PrefixKey>& keys)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Rows of saved state, cut to `length`, with one reference for each extent. page_of(group, table,
  // extent) gives the page of the extent that comes behind `table`.
  SequenceRows SavedRows(
      const SessionState& state, uint64_t length, const std::vector<PrefixKey>& keys,
      absl::FunctionRef<Page&(uint32_t group, const PageTable& table, const SavedExtent& extent)>
          page_of) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // The first `length` rows, or, with chunks (then no length is given), those of OpenSavedChunks.
  absl::StatusOr<OpenResult> OpenSavedRows(const Tenant& tenant, const SessionState& state,
                                           std::span<const ManifestPageRef> pages,
                                           std::optional<uint64_t> length,
                                           std::span<const ReusedChunk> chunks,
                                           const std::optional<SequenceIdentity>& identity);

  // --- chunks of it (model_host_chunks.cc) ---
  // OK when `chunks` are what OpenSavedChunks asks for.
  static absl::Status CheckChunks(const SessionState& state, std::span<const ReusedChunk> chunks);
  SequenceEditor::Options EditorOptions() const;
  // The rows of OpenSavedChunks, each page under its index in the manifest's list, from 1 on; or
  // the refusal.
  absl::StatusOr<SequenceRows> LayOutChunks(const SessionState& state,
                                            std::span<const ReusedChunk> chunks) const;
  // Of rows that nobody else sees yet only those of TakeChunks stay; when it refuses, none.
  absl::Status KeepChunks(Sequence& sequence, std::span<const ReusedChunk> chunks)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Without the tiers.
  PrefixReuse ChunkReuse(std::span<const ReusedChunk> chunks) const;

  // --- saved state on its way out (model_host_snapshots.cc) ---
  // Its end takes the lock.
  absl::StatusOr<std::unique_ptr<PagedSnapshot>> TakeSnapshot(const Tenant& tenant,
                                                              const Sequence& sequence,
                                                              std::optional<uint64_t> length,
                                                              CheckpointScope scope)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // --- checkpoints (model_host_checkpoints.cc; _checkpoint_copies.cc, _checkpoint_releases.cc) ---
  bool IsKept(CheckpointScope scope, uint32_t group) const {
    return scope == CheckpointScope::kAll || traits_[group].is_whole || traits_[group].forgets();
  }
  // Room for one more of the caller's, or an automatic one: those in the making count, automatic
  // ones do not.
  absl::Status CheckCheckpointRoom(const Sequence& sequence) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Down to as many as a sequence may have: automatic ones go, void ones first, then the oldest.
  void TrimCheckpoints(Sequence& sequence) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::StatusOr<CheckpointInfo> TakeCheckpoint(Sequence& sequence, CheckpointScope scope,
                                                bool is_automatic)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // An automatic one, if the commit of rows behind `before` passed a multiple of
  // checkpoint_every_pages.
  void TakeAutomaticCheckpoint(Sequence& sequence, uint64_t before)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::StatusOr<CheckpointInfo> CopyCheckpoint(const Tenant& tenant,
                                                const SequenceHandle& sequence,
                                                const CheckpointOptions& options,
                                                MonotonicTime deadline) ABSL_LOCKS_EXCLUDED(mu_);
  absl::Status PutCheckpoint(StateSnapshot& snapshot, const CheckpointOptions& options,
                             SavedCheckpoint* saved, CheckpointInfo* info, MonotonicTime deadline)
      ABSL_LOCKS_EXCLUDED(mu_);
  absl::StatusOr<SequenceInfo> RestoreLocked(const Tenant& tenant, const SequenceHandle& handle,
                                             uint64_t checkpoint_id, MonotonicTime deadline)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Takes `bytes` of the memory for copies; RESOURCE_EXHAUSTED (CHECKPOINT_MEMORY).
  absl::Status ReserveCopy(SequenceId id, uint64_t bytes) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  static std::vector<Checkpoint>::iterator FindCheckpoint(Sequence& sequence, uint64_t id,
                                                          bool is_ready);
  // A page of a copy in host memory, on its way back.
  struct CopiedPage {
    uint32_t page = 0;  // of the copy
    uint32_t group = 0;
    const SavedExtent* extent = nullptr;  // the first of the page
    std::optional<FrameId> frame;         // holds the copy's bytes
  };
  // What is to be done so that all pages of a copy are in frames.
  struct CopyPlan {
    std::vector<CopiedPage> copied;            // in the order of their rows, by group
    std::vector<std::optional<PageId>> known;  // [page of the copy] with a reference
    Need need;                                 // frames for those that are not known
  };
  CopyPlan PlanCopies(const std::string& tenant, const SavedCheckpoint& saved,
                      const std::vector<PrefixKey>& keys) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Hands out the frames that were acquired for a plan.
  static void AssignFrames(CopyPlan& plan, const Acquired& got);
  // ABORTED (`action` begins the text) when a page that was known was lost since.
  absl::Status CheckKnown(absl::string_view action, const CopyPlan& plan) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // [page of the copy] the pages that stand for it, with the references of `known` or one of their
  // own. The bytes of the others are in their frames.
  std::vector<PageId> AdoptCopies(const Sequence& sequence, const SavedCheckpoint& saved,
                                  CopyPlan& plan, const std::vector<PrefixKey>& keys, Acquired& got)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void DropPlan(const CopyPlan& plan, Acquired& got) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // [page of the copy] the pages that stand for it, with one reference each, which the caller gives
  // back. What is not resident is written into new frames. Unlocks while it waits for frames and
  // writes. ABORTED when the sequence changed meanwhile.
  absl::StatusOr<std::vector<PageId>> BringBack(const SequencePtr& sequence,
                                                const SavedCheckpoint& saved,
                                                const std::vector<PrefixKey>& keys,
                                                MonotonicTime deadline)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // One page of it, with one reference; its frame leaves `got` unless the page is resident by now.
  PageId AdoptCopiedPage(const Sequence& sequence, const SavedCheckpoint& saved,
                         const CopiedPage& copied, std::optional<PageId> parent,
                         const std::vector<PrefixKey>& keys, Acquired& got)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // With one reference. Full again, and keyed if it was; sealed where it was not full.
  Page& MakeCopiedPage(const Sequence& sequence, const SavedCheckpoint& saved,
                       const CopiedPage& copied, std::optional<PageId> parent,
                       const std::vector<PrefixKey>& keys) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void DropCheckpoint(const Checkpoint& checkpoint) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // The sequence keeps only `rows` of the rows it had: what checkpoints relied on behind them is
  // gone, and they let go of what they hold.
  void VoidCheckpoints(Sequence& sequence, uint64_t rows) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Leading rows that `a` and `b` have in the same slots in groups that can be rewound by cutting.
  uint64_t CommonRows(const SequenceRows& a, const SequenceRows& b) const;
  // The manifest of a checkpoint that ended is to be deleted.
  void Release(const std::string& manifest, uint64_t version) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  struct ReleasedManifest {
    std::string name;
    uint64_t version = 0;
  };
  // Begins to delete what was released: one job at a time, and none while the store is away.
  void StartReleases() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // A job: deletes in order until one finds the store away.
  void RunReleases(std::deque<ReleasedManifest> batch) ABSL_LOCKS_EXCLUDED(mu_);
  // The job is over; what it left is tried again, a little later.
  void EndReleases(std::deque<ReleasedManifest> left) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void TrimReleases() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // --- writes (model_host_writes.cc; their end: model_host_commit.cc) ---
  // A write about to begin: its sequence, what it needs, and in which groups the tail is shared or
  // still read by others, so that its rows move to a page of the write's own first.
  struct WritePlan {
    SequencePtr sequence;
    Need need;
    std::vector<TailPlan> tails;  // [group]
  };
  WritePlan PlanWrite(const SequencePtr& sequence) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Opens the pending writes that the caller has put into the sequences, all or none. Unlocks while
  // it waits and copies. On failure none of the sequences has a pending write.
  absl::Status OpenWrites(const std::string& tenant, const std::vector<SequencePtr>& sequences,
                          MonotonicTime deadline) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status OpenWrite(const WritePlan& plan, std::vector<std::vector<FramePool::Grant>> fresh)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  std::unique_ptr<Pending> NewPending(const Sequence& sequence, uint32_t num_tokens,
                                      bool pin_prefix) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  static PendingSlot SlotOf(const Sequence& sequence);
  // Position of a token of a pending write.
  static int64_t PositionIn(const Pending& pending, uint32_t index);
  // indices empty: the first of the write's rows.
  absl::StatusOr<CommitResult> CommitRows(const Tenant& tenant, const SequenceHandle& handle,
                                          uint64_t pending_id, std::span<const uint32_t> indices,
                                          std::span<const uint32_t> tokens);
  static absl::Status CheckPath(const Pending& pending, std::span<const uint32_t> indices,
                                size_t num_tokens);
  // What a write becomes in a group if `num_tokens` of it are committed: an extent for each target.
  std::vector<Extent> ExtentsOfWrite(uint32_t group, const Pending& pending,
                                     uint32_t num_tokens) const;
  // Its page is full then.
  bool IsFull(const Extent& extent) const { return extent.end_slot() == page_tokens(); }
  // FAILED_PRECONDITION (ROWS_MISSING) names what of the first `num_tokens` has not arrived.
  absl::Status CheckArrived(const Pending& pending, uint32_t num_rows, uint32_t num_tokens) const;
  // A run of kPage: where its bytes go in the pool, and into which target.
  struct PageRun {
    uint64_t offset = 0;
    uint32_t target = 0;
  };
  absl::StatusOr<PageRun> FindPageRun(const Pending& pending, const RowRun& run,
                                      uint64_t num_bytes) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Byte offset in the pool of a row of a pending write.
  uint64_t RowOffsetIn(const Pending& pending, const std::vector<FrameId>& frames, uint32_t group,
                       uint32_t layer, RowKind kind, uint32_t index) const;

  const Options options_;
  const std::shared_ptr<const Model> model_;
  const std::unique_ptr<DevicePool> pool_;
  const std::vector<GroupTraits> traits_;  // [group]
  const uint32_t num_frames_;
  PageStore* const store_;  // may be null
  Executor* const io_;
  Clock* const clock_;
  std::vector<uint64_t> group_base_;                                   // const after construction
  std::function<void(const std::vector<ResidencyChange>&)> listener_;  // set before first use

  mutable Mutex mu_;
  CondVar changed_;  // anything that a waiting call looks at
  PageDirectory pages_ ABSL_GUARDED_BY(mu_);
  absl::btree_map<uint64_t, SequencePtr> sequences_ ABSL_GUARDED_BY(mu_);  // by number
  // Numbers of the sequences that another incarnation opened.
  absl::flat_hash_map<SequenceId, uint64_t> foreign_ ABSL_GUARDED_BY(mu_);
  std::deque<Ticket*> line_ ABSL_GUARDED_BY(mu_);
  std::vector<uint32_t> num_spilling_ ABSL_GUARDED_BY(mu_);  // [group]
  uint64_t jobs_in_flight_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t checkpoint_bytes_ ABSL_GUARDED_BY(mu_) = 0;  // of copies in host memory
  // Of checkpoints that ended, to be deleted in the store, oldest first; bounded.
  std::deque<ReleasedManifest> released_manifests_ ABSL_GUARDED_BY(mu_);
  bool is_releasing_ ABSL_GUARDED_BY(mu_) = false;  // a job deletes some of them
  MonotonicTime release_again_at_ ABSL_GUARDED_BY(mu_) = {absl::ZeroDuration()};
  uint64_t running_calls_ ABSL_GUARDED_BY(mu_) = 0;
  MonotonicTime look_for_idle_at_ ABSL_GUARDED_BY(mu_) = {absl::ZeroDuration()};
  MonotonicTime spill_again_at_ ABSL_GUARDED_BY(mu_) = {absl::ZeroDuration()};
  // The last put that was answered, but for refusals of pages while the store takes others.
  bool did_put_fail_ ABSL_GUARDED_BY(mu_) = false;
  uint64_t puts_taken_ ABSL_GUARDED_BY(mu_) = 0;
  absl::flat_hash_map<PageId, Refusal> refusals_ ABSL_GUARDED_BY(mu_);
  PageId next_owed_ ABSL_GUARDED_BY(mu_);  // where WriteThroughOwed goes on
  MonotonicTime ask_partial_again_at_ ABSL_GUARDED_BY(mu_) = {absl::ZeroDuration()};
  absl::Status last_store_error_ ABSL_GUARDED_BY(mu_);
  ComputeClaims claims_ ABSL_GUARDED_BY(mu_);
  uint64_t num_waiting_claims_ ABSL_GUARDED_BY(mu_) = 0;  // calls that wait for another's claim
  HostCounters counters_ ABSL_GUARDED_BY(mu_);
  RateMeter prefill_meter_ ABSL_GUARDED_BY(mu_);
  RateMeter store_meter_ ABSL_GUARDED_BY(mu_);

  Mutex flush_mu_ ABSL_ACQUIRED_BEFORE(mu_);  // keeps residency changes in order on their way out
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_MODEL_HOST_IMPL_H_
