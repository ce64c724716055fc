// RocksdbPageStore: the embedded page store. Bodies lie in segment files, the index, manifests,
// records and leases in RocksDB (ADR 0001, docs/store_format.md).
//
// Levels: CACHE and PROCESS are in the kernel's page cache when acknowledged; LOCAL is fsynced, in
// groups: all who wait for a barrier share one. After a failed fsync nothing is acknowledged any
// more and every write answers UNAVAILABLE (STORE_FAILED) until the store is opened again; reads go
// on. Capacity is physical bytes of segments and index. A background thread drops what no manifest
// protects, by recency and cost, empties half-dead segments, removes expired manifests and records
// the order of accesses; another verifies cold records at a bounded rate. Above the engine, a guard
// refuses puts (RESOURCE_EXHAUSTED, STORE_FULL) while the disk has less than min_free_bytes and
// nothing may be dropped for them: that room is the index's, so that manifests can still be
// written, down to the last of it. Thread-safe.
// Reads take no lock while they wait for the disk.
#ifndef PAGETIDE_KVSTORE_ROCKSDB_PAGE_STORE_H_
#define PAGETIDE_KVSTORE_ROCKSDB_PAGE_STORE_H_

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "base/mutex.h"
#include "base/status_macros.h"
#include "core/page_store.h"
#include "kvstore/file_system.h"
#include "kvstore/keyed_lock.h"
#include "kvstore/lease_book.h"
#include "kvstore/log_mark.h"
#include "kvstore/page_body_codec.h"
#include "kvstore/page_index.h"
#include "kvstore/retention.h"
#include "kvstore/room_ledger.h"
#include "kvstore/segment_files.h"
#include "kvstore/store_database.h"

namespace pagetide {

// What an opening that finds it gone gives up, instead of refusing. Each is said in the log and
// counted in Recovery::losses_accepted; to be set for one opening.
struct AcceptedLoss {
  // Writes at the end of the index's log, of which some were acknowledged as durable.
  bool log = false;
  // Segment files that the index points into: their pages are absent from then on.
  bool segments = false;
  // What manifests that cannot be read protect: their pages may be evicted. The manifests stay.
  bool manifests = false;
};

struct RocksdbPageStoreOptions {
  // Folder of the store; made if absent. One process at a time (RocksDB's lock file).
  std::string dir;
  // Physical bytes that segments and index may take. 0: bounded by the disk only; pages are dropped
  // when it is full.
  uint64_t capacity_bytes = 0;
  // Length of a segment file. 0: a sixteenth of the capacity, within 1 MiB and 64 MiB.
  uint64_t segment_bytes = 0;
  // Puts are refused while the disk has less than this free, so that the index can always be
  // written.
  uint64_t min_free_bytes = uint64_t{128} << 20;
  // How bodies are stored; each page raw where compressing it does not pay. Pages that are there
  // are read whatever they were written with. Anything but kNone also marks the folder, so that a
  // program too old to read compressed records refuses it (docs/store_format.md).
  PageCompression compression = PageCompression::kNone;
  // How long a put waits for reclaim when the store is at its capacity or the disk is full.
  absl::Duration put_wait = absl::Seconds(2);
  // A page is not evicted before an eighth of the capacity was put after it, or before this time
  // has passed: its writer may be about to name it in a manifest. The same holds from the moment at
  // which a new version of a manifest names it no more: somebody may be loading the one before.
  absl::Duration put_grace = absl::Seconds(30);
  // A store that took this many bytes since it last gave a page back raises its efficacy alarm.
  // 0: never.
  uint64_t efficacy_alarm_bytes = uint64_t{16} << 30;
  // After an opening nothing expires for this long: a machine that just started may not have set
  // its wall clock yet.
  absl::Duration expiry_grace = absl::Minutes(10);
  // The background reads and verifies what is stored at this rate, so that damage is found before
  // somebody needs the page. 0: not at all.
  uint64_t scrub_bytes_per_second = uint64_t{4} << 20;
  // A round over all pages begins no sooner than this after the one before began.
  absl::Duration scrub_period = absl::Hours(24);
  // How often access order is written, and a barrier made over what was put. What is newer is lost
  // in a crash (recency only), or has to be verified when the store opens again.
  absl::Duration access_period = absl::Seconds(10);
  // How often, while durable writes are made, it is recorded how far the index's log is durable
  // (two fsyncs, for neither of which a call waits). Damage to what is older is found by the next
  // opening.
  absl::Duration mark_period = absl::Seconds(1);
  AcceptedLoss accepted_loss;
  const Clock* clock = Clock::Real();
  FileSystem* file_system = FileSystem::Posix();
  rocksdb::Env* index_env = nullptr;  // null: the machine's

  // INVALID_ARGUMENT names the field and the numbers.
  absl::Status Validate() const;
};

class RocksdbPageStore final : public PageStore {
 public:
  struct Recovery {
    uint64_t pages = 0;
    uint64_t verified_records = 0;     // beyond the durable length: read and compared
    uint64_t dropped_entries = 0;      // whose record had not reached the disk, or is unknown
    uint64_t lost_manifest_pages = 0;  // named by a manifest and absent: must be 0
    std::vector<std::string> losses_accepted;  // "log", "segments", "manifests"
    absl::Duration took;
  };

  static absl::StatusOr<std::unique_ptr<RocksdbPageStore>> Open(RocksdbPageStoreOptions options);
  // Joins the background thread and writes the access order. Makes nothing durable that no barrier
  // did, but for what lies before the last mark of the log.
  ~RocksdbPageStore() override;

  std::vector<PutPageResult> PutPages(std::span<const PutPage> pages, Durability level,
                                      MonotonicTime deadline) override;
  std::vector<GetPageResult> GetPages(std::span<const GetPage> pages,
                                      MonotonicTime deadline) override;
  absl::StatusOr<std::vector<LookupResult>> LookupPages(std::span<const PageKey> keys,
                                                        MonotonicTime deadline) override;
  absl::StatusOr<uint64_t> DeletePages(std::span<const PageKey> keys,
                                       MonotonicTime deadline) override;
  absl::StatusOr<std::vector<PartialResult>> FindPartialPages(std::span<const PartialQuery> queries,
                                                              MonotonicTime deadline) override;
  absl::StatusOr<std::vector<PageKey>> SetRetention(std::span<const PageKey> keys,
                                                    const Retention& retention,
                                                    const std::optional<WriteFence>& fence,
                                                    MonotonicTime deadline) override;
  absl::Status Barrier(Durability level, MonotonicTime deadline) override;
  absl::StatusOr<PutManifestResult> PutManifest(const ManifestRecord& manifest,
                                                uint64_t expected_version,
                                                const std::optional<WriteFence>& fence,
                                                MonotonicTime deadline) override;
  absl::StatusOr<ManifestRecord> GetManifest(absl::string_view name,
                                             MonotonicTime deadline) override;
  absl::StatusOr<std::vector<ManifestEntry>> ListManifests(absl::string_view name_prefix,
                                                           absl::string_view after, size_t limit,
                                                           MonotonicTime deadline) override;
  absl::Status DeleteManifest(absl::string_view name, uint64_t expected_version,
                              const std::optional<WriteFence>& fence,
                              MonotonicTime deadline) override;
  absl::StatusOr<uint64_t> CompareAndSetRecord(absl::string_view kind, absl::string_view key,
                                               uint64_t expected_version,
                                               std::optional<absl::string_view> value,
                                               MonotonicTime deadline) override;
  absl::StatusOr<StoreRecord> GetRecord(absl::string_view kind, absl::string_view key,
                                        MonotonicTime deadline) override;
  absl::StatusOr<std::vector<StoreRecord>> ListRecords(absl::string_view kind,
                                                       absl::string_view key_prefix,
                                                       absl::string_view after, size_t limit,
                                                       MonotonicTime deadline) override;
  absl::StatusOr<StoreLease> AcquireLease(absl::string_view name, uint64_t incarnation,
                                          absl::Duration ttl, MonotonicTime deadline) override;
  absl::Status RenewLease(const StoreLease& lease, absl::Duration ttl,
                          MonotonicTime deadline) override;
  absl::Status ReleaseLease(const StoreLease& lease, MonotonicTime deadline) override;
  absl::Status Watch(const WatchCallback& on_events, MonotonicTime deadline) override;
  absl::StatusOr<StoreStats> GetStats(MonotonicTime deadline) override;
  absl::StatusOr<ScrubResult> Scrub(uint64_t max_pages, MonotonicTime deadline) override;
  absl::StatusOr<uint64_t> Compact(MonotonicTime deadline) override;

  // Runs the upkeep (expiry, reclaim, periodic barrier) and returns when it is done. For tests, and
  // for whoever wants the room now.
  void WaitForUpkeep();

  const Recovery& recovery() const { return recovery_; }
  // Damaged, or of a newer program, when the store was opened, and not deleted since. What they
  // name is not known: while there is one no page is dropped, unless AcceptedLoss::manifests says
  // that it may be.
  uint64_t num_unreadable_manifests() const;

 private:
  struct Counters {  // relaxed: statistics
    std::atomic<uint64_t> pages_put{0}, pages_got{0}, pages_missed{0}, pages_evicted{0};
    std::atomic<uint64_t> pages_quarantined{0}, bytes_put{0}, bytes_got{0}, manifests{0};
    std::atomic<uint64_t> manifests_expired{0}, bytes_evicted{0}, pages_refused{0};
    std::atomic<uint64_t> pages_scrubbed{0};
    std::atomic<uint64_t> bytes_put_at_hit{0};  // bytes_put when a page was last read
    std::atomic<uint64_t> raw_in{0}, lz4_in{0}, lz4_out{0}, zstd_in{0}, zstd_out{0};
    std::atomic<uint64_t> decompressed_bytes{0};
    std::atomic<int64_t> compress_ns{0}, decompress_ns{0};
  };

  explicit RocksdbPageStore(RocksdbPageStoreOptions options);
  // recovery (rocksdb_page_store_recovery.cc)
  absl::Status Recover();
  // DATA_LOSS if the index would open without writes that were durable. Changes nothing.
  absl::Status CheckLog();
  // FAILED_PRECONDITION if the folder of the segments is not the one that the index was used with.
  // Makes nothing in it.
  absl::Status CheckSegmentsFolder();
  // From then on it is.
  absl::Status BindSegmentsFolder();
  // Gives up what the index names of segments and they have not, if that may be.
  absl::Status AcceptSegmentLoss(const std::string& what);
  // What a process that died between deleting a segment and saying so had left.
  absl::Status ForgetAbsentSegments(std::span<const SegmentFiles::DurableLength> lengths);
  // What is read of the segment behind the durable length is what the disk has from here on. The
  // page cache alone proves nothing: after a failed fsync the kernel takes pages that it could not
  // write for clean, and the next fsync answers OK.
  static absl::Status ReadFromDiskBeyond(Segment* segment, uint64_t durable_bytes);
  // FAILED_PRECONDITION, and nothing was dropped, if durable records lie in files that are gone.
  absl::Status RecoverPages(std::span<const SegmentFiles::DurableLength> lengths);
  absl::Status RecoverManifestsAndLeases();
  // Whether the record at `place` is undamaged. Reads all of it.
  absl::Status VerifyOnDisk(const PageKey& key, const PagePlace& place,
                            const Checksum128& checksum);

  // Buffers that the pages of one call share.
  struct PutScratch;
  struct GetScratch;
  PutPageResult PutOne(const PutPage& page, Durability level, MonotonicTime deadline,
                       PutScratch* scratch);
  GetPageResult GetOne(const GetPage& page, GetScratch* scratch);
  // The body as it is to be stored: compressed if that pays.
  std::span<const std::byte> Compress(std::span<const std::byte> body, PageBodyEncoder* encoder);
  // Reads the record's header and its body as it is stored. DATA_LOSS if the file ends before.
  absl::Status ReadRecordAt(const PageKey& key, const PagePlace& place, std::string* header,
                            std::span<std::byte> stored);
  void QuarantineAt(const PageKey& key, const PagePlace& place, const absl::Status& cause);
  absl::Status CheckFence(const std::optional<WriteFence>& fence) const;
  // Version 0 when there is none.
  absl::StatusOr<StoreRecord> ReadRecord(absl::string_view kind, absl::string_view key) const;
  absl::StatusOr<std::optional<ManifestRecord>> ReadManifest(absl::string_view name) const;

  // The manifest's name and the deletions of its bucket are locked. Makes its pages evictable
  // unless something else holds them.
  absl::Status ForgetManifest(const ManifestRecord& manifest);
  // The same for one that cannot be read, for `cause`. What tells its version is its list entry; if
  // that cannot be read either, any version is right.
  absl::Status ForgetUnreadableManifest(absl::string_view name, uint64_t expected_version,
                                        const absl::Status& cause);
  // Whether no page may be dropped, because a manifest that cannot be read may name it.
  bool MayDropNothing() const {
    return !options_.accepted_loss.manifests && num_unreadable_manifests() > 0;
  }
  absl::Status RemoveExpiredManifests();

  // OK, or STORE_FAILED once an fsync or an index write was refused.
  absl::Status CheckNotFailed() const ABSL_LOCKS_EXCLUDED(barrier_mu_);
  // Makes the failure stick and returns it.
  absl::Status Fail(const absl::Status& cause) ABSL_LOCKS_EXCLUDED(barrier_mu_);
  absl::Status SyncAll();

  // room (rocksdb_page_store_room.cc)
  // What a write may take until the hold ends. STORE_FULL with the numbers while the disk has not
  // that much beyond `reserve` and what others hold.
  absl::StatusOr<RoomLedger::Hold> HoldDiskRoom(absl::string_view what, uint64_t reserve,
                                                uint64_t bytes);
  // No write but those that release something is let in before the disk has less than this left:
  // RocksDB's log must not meet its end.
  static constexpr uint64_t kLastFreeBytes = uint64_t{256} << 10;
  // For a value of `bytes` in the index, which takes of what the guard of puts keeps free, but not
  // the last of it. Twice the bytes: the log and, later, the table that they go to.
  absl::StatusOr<RoomLedger::Hold> HoldIndexRoom(absl::string_view what, uint64_t bytes);
  // What copies of reclaim leave of it: they make room, so they may go on when puts may not.
  uint64_t ReclaimReserve() const;
  struct PutRoom {
    RoomLedger::Hold disk;      // until the record is written
    RoomLedger::Hold capacity;  // until its range is reserved, which counts it in
  };
  absl::StatusOr<PutRoom> TryHoldPutRoom(uint64_t bytes);
  // Has reclaim make the room if there is none, and waits for it.
  absl::StatusOr<PutRoom> WaitForRoom(uint64_t bytes, Durability level, MonotonicTime deadline);
  bool HasRoomAgain() const;
  uint64_t PhysicalBytes() const {
    return segments_->TotalBytes() + index_bytes_.load(std::memory_order_relaxed);
  }
  uint64_t Slack() const;
  uint64_t HighWater() const;
  uint64_t LowWater() const;
  void MeasureIndex();

  // upkeep (rocksdb_page_store_reclaim.cc)
  // `opened`: from when the first period counts.
  void RunUpkeep(MonotonicTime opened);
  void RunScrub(MonotonicTime opened);
  struct ScrubStep {
    ScrubResult result;
    uint64_t unreadable_pages = 0;  // the disk refused, which says nothing of the pages
    absl::Status first_unread;      // why the first of them was not read
    bool round_ended = false;       // the last page was among those looked at
  };
  // Verifies up to `max_pages` from where the last call ended.
  absl::StatusOr<ScrubStep> ScrubSome(uint64_t max_pages, MonotonicTime deadline)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(scrub_mu_);
  // Physical bytes to come down to: the low water, or less where the disk itself has not the
  // `wanted` bytes that a put was refused (0: none was).
  uint64_t ReclaimTarget(uint64_t wanted) const;
  // Brings physical bytes to at most `target`. Returns bytes given back; stops when nothing may go.
  absl::StatusOr<uint64_t> ReclaimTo(uint64_t target);
  uint64_t EvictPages(uint64_t bytes);
  // For the copies that EmptySegment makes.
  absl::StatusOr<RoomLedger::Hold> HoldRoomToEmpty(const Segment& segment);
  // Moves what is live out of the segment and deletes it. False, and the file stays, if a put of a
  // record in it has not ended yet, or a record cannot be read or copied: then a later round may.
  absl::StatusOr<bool> EmptySegment(const std::shared_ptr<Segment>& segment);
  // A barrier if anything was put since the last one made here. Nobody waits for it: it bounds what
  // an opening after a crash has to read and verify to one access period's puts, also where nobody
  // saves anything.
  void MakePutsDurable();
  void WriteAccessOrder();
  // Records how far the log is durable, if it went on since it was last recorded.
  void MarkLog();

  const RocksdbPageStoreOptions options_;
  const uint64_t segment_bytes_;
  const std::string segments_dir_;
  std::unique_ptr<StoreDatabase> db_;       // const after Open
  std::unique_ptr<LogMark> log_mark_;       // const after Open; the mark is the upkeep thread's
  std::unique_ptr<SegmentFiles> segments_;  // const after Open
  Recovery recovery_;                       // const after Open
  PageIndex index_;
  ExpiryList expiries_;  // of manifests, by name
  mutable Mutex unreadable_mu_;
  absl::flat_hash_set<std::string> unreadable_manifests_ ABSL_GUARDED_BY(unreadable_mu_);
  LeaseBook leases_;
  // Keys: those of kvstore/store_lock_keys.h, and "l" + lease name. Never nested.
  KeyedLock keys_;
  Counters counters_;
  std::atomic<uint64_t> index_bytes_{0};  // relaxed: a measurement, from MeasureIndex
  std::atomic<bool> full_{false};         // relaxed: for GetStats
  RoomLedger disk_ledger_;
  RoomLedger capacity_ledger_;
  Mutex reclaim_mu_;  // one reclaim at a time; held during its I/O

  Mutex scrub_mu_;  // one scrub at a time; held during its I/O
  std::optional<PageKey> scrub_cursor_ ABSL_GUARDED_BY(scrub_mu_);

  mutable Mutex barrier_mu_;
  CondVar barrier_done_;
  uint64_t barriers_requested_ ABSL_GUARDED_BY(barrier_mu_) = 0;
  uint64_t barriers_done_ ABSL_GUARDED_BY(barrier_mu_) = 0;
  bool barrier_running_ ABSL_GUARDED_BY(barrier_mu_) = false;
  std::optional<absl::Status> failure_ ABSL_GUARDED_BY(barrier_mu_);

  Mutex upkeep_mu_;
  CondVar upkeep_wake_;
  CondVar scrub_wake_;
  CondVar room_made_;
  bool stopping_ ABSL_GUARDED_BY(upkeep_mu_) = false;
  bool room_wanted_ ABSL_GUARDED_BY(upkeep_mu_) = false;
  // The most that a put was refused since reclaim last looked.
  uint64_t wanted_bytes_ ABSL_GUARDED_BY(upkeep_mu_) = 0;
  uint64_t reclaims_done_ ABSL_GUARDED_BY(upkeep_mu_) = 0;
  uint64_t upkeep_rounds_ ABSL_GUARDED_BY(upkeep_mu_) =
      0;                         // whole rounds; reclaim is their first part
  uint64_t access_written_ = 0;  // owned by the upkeep thread
  uint64_t durable_puts_ = 0;    // owned by the upkeep thread: pages_put at its last barrier
  uint64_t next_mark_ = 1;       // owned by the upkeep thread
  uint64_t marked_writes_ = 0;   // owned by the upkeep thread: synced writes at its last mark
  std::thread upkeep_;
  std::thread scrubber_;
};

}  // namespace pagetide

#endif  // PAGETIDE_KVSTORE_ROCKSDB_PAGE_STORE_H_
