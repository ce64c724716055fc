// PageStore: the port to the store of cold pages, manifests, small records and leases that all
// nodes share.
//
// Implementations: memory (reference), rocksdb (embedded), remote (gRPC client of pagetide-store);
// decorators add metrics, retries and faults. One contract suite holds them all.
// Calls block the calling thread until done or until `deadline`; callers bring their own threads.
// Thread-safe. Page bodies belong to the caller: they are read or written only during the call.
#ifndef PAGETIDE_CORE_PAGE_STORE_H_
#define PAGETIDE_CORE_PAGE_STORE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "base/checksum.h"
#include "base/clock.h"
#include "base/digest.h"
#include "core/keys.h"

namespace pagetide {

// What an acknowledged write survives.
enum class Durability : uint8_t {
  kCache = 1,    // may be lost at any time
  kProcess = 2,  // a crash of the store process
  kLocal = 3,    // power loss of the store's machine (fsynced)
};

// Identity and size of a page record; the body is apart.
struct PageRecordMeta {
  PageKey key;
  Checksum128 checksum;  // of the raw body, taken when the page was committed
  uint64_t body_bytes = 0;
  Digest fingerprint;               // component fingerprint
  std::optional<PrefixKey> prefix;  // absent for private pages
  std::optional<PrefixKey> parent;  // of the first page: its root
  std::string numerics_id;
  uint32_t group = 0;
  uint32_t depth = 0;  // position of the page in its prefix, in pages
};

// A keyed page of at most this many tokens can be found by its leading tokens (FindPartialPages).
inline constexpr uint64_t kMaxIndexedPageTokens = 4096;

struct PutPage {
  PageRecordMeta meta;
  std::span<const std::byte> body;
  // The page's token ids, all of them, or empty: then the page is found by its key only. Leave it
  // empty for pages that hold other inputs (images), whose tokens do not say what they are. Needs
  // meta.prefix and meta.parent.
  std::span<const uint32_t> tokens = {};
};

struct PutPageResult {
  absl::Status status;
  bool already_present = false;
  Checksum128 checksum;  // of the body that the store holds now
};

struct GetPage {
  PageKey key;
  std::span<std::byte> body;  // exactly body_bytes of the page; contents undefined unless kHit
  std::optional<Checksum128> expected;  // another body counts as a miss
};

enum class GetOutcome : uint8_t {
  kHit = 1,
  kMiss = 2,
  kQuarantined = 3,  // there, but failed its checksum: counts as absent
};

struct GetPageResult {
  // UNAVAILABLE, DEADLINE_EXCEEDED, INVALID_ARGUMENT (size); OK for hit, miss and quarantined.
  absl::Status status;
  GetOutcome outcome = GetOutcome::kMiss;
  Checksum128 checksum;  // of a hit; already compared with the body
};

struct LookupResult {
  bool present = false;
  bool quarantined = false;
  Checksum128 checksum;
  uint64_t body_bytes = 0;
};

// Which of the pages under `parent` (of one component) begins most like `tokens`?
struct PartialQuery {
  PrefixKey parent;  // prefix key of the page before, or the root
  Digest fingerprint;
  std::span<const uint32_t> tokens;
};

struct PartialResult {
  uint64_t common_tokens = 0;  // 0: none begins like it; the rest is empty then
  PageKey key;
  Checksum128 checksum;
  uint64_t body_bytes = 0;
  std::vector<uint32_t> tokens;  // of the page, all of them
};

inline constexpr uint32_t kMaxPriority = 100;
inline constexpr uint32_t kDefaultPriority = 50;

// How long a page is worth keeping; the default is what a page has that nobody set it for.
struct Retention {
  uint32_t priority = kDefaultPriority;  // 0 … kMaxPriority: the higher, the later it is evicted
  // From then on the page has priority 0, whatever it had. Absent: never.
  std::optional<absl::Time> expires_at;
  // Until then the page is a root, as if a manifest named it. At most kMaxPinTime ahead.
  std::optional<absl::Time> pinned_until;
};
inline constexpr absl::Duration kMaxPinTime = absl::Hours(24 * 366);

struct ManifestPageRef {
  PageKey key;
  Checksum128 checksum;
};

inline constexpr size_t kMaxManifestSummaryBytes = 4096;
// Of a manifest's pages and payload together, so that it travels in one message. What is bulky
// belongs into private pages that the manifest names: those of an earlier save are present already.
inline constexpr size_t kMaxManifestBytes = size_t{3} << 20;
inline constexpr size_t kManifestPageRefBytes = 56;  // of one page in that sum

struct ManifestRecord {
  std::string name;
  uint64_t version = 0;
  std::vector<ManifestPageRef> pages;
  std::string payload;
  std::string request_id;
  absl::Time saved_at = absl::UnixEpoch();
  // What ListManifests returns of this manifest beside its numbers; opaque to the store.
  std::string summary;
  // The store removes the manifest some time after this, never before (docs/consistency.md says by
  // which clocks). Absent: never.
  std::optional<absl::Time> expires_at;
  // That its pages keep when the manifest goes, if it is more than their own.
  uint32_t priority = kDefaultPriority;
  // In PutManifest only: the new version consists of the first keep_pages pages and the first
  // keep_payload_bytes bytes of the present version (expected_version), and `pages` and `payload`
  // come behind them. So a save that appends sends what is new.
  uint64_t keep_pages = 0;
  uint64_t keep_payload_bytes = 0;
};

// A manifest in a list: all but its pages and payload.
struct ManifestEntry {
  std::string name;
  uint64_t version = 0;
  uint64_t num_pages = 0;
  uint64_t payload_bytes = 0;
  std::string request_id;
  absl::Time saved_at = absl::UnixEpoch();
  std::string summary;
  std::optional<absl::Time> expires_at;
  uint32_t priority = kDefaultPriority;
};

// A durable write is refused (FAILED_PRECONDITION, STALE_EPOCH) unless the record {"owner",
// ownership_key} holds `epoch` as its version.
struct WriteFence {
  std::string ownership_key;
  uint64_t epoch = 0;
};

struct PutManifestResult {
  bool committed = false;
  uint64_t version = 0;
  std::vector<PageKey> missing;  // not committed: put these again
};

struct StoreRecord {
  std::string key;
  uint64_t version = 0;
  std::string value;
};

struct StoreLease {
  std::string name;
  uint64_t incarnation = 0;
  uint64_t epoch = 0;
};

// What became of bytes by the codec that took them.
struct StoreCodecBytes {
  struct InOut {
    uint64_t in = 0;   // raw
    uint64_t out = 0;  // as stored
  };
  InOut raw, lz4, zstd;
};

struct StoreStats {
  uint64_t pages = 0;
  uint64_t logical_bytes = 0;
  uint64_t physical_bytes = 0;
  uint64_t capacity_bytes = 0;  // 0: not bounded
  uint64_t pages_put = 0;
  uint64_t pages_got = 0;
  uint64_t pages_missed = 0;
  uint64_t pages_evicted = 0;
  uint64_t pages_quarantined = 0;
  uint64_t bytes_put = 0;
  uint64_t bytes_got = 0;
  uint64_t pages_ever_read = 0;
  uint64_t manifests = 0;
  uint64_t manifests_expired = 0;
  uint64_t protected_pages = 0;  // that manifests name or that are pinned
  uint64_t protected_bytes = 0;  // bodies of those
  uint64_t bytes_evicted = 0;
  uint64_t pages_refused = 0;  // puts that found no room
  uint64_t disk_free_bytes = 0;
  // Efficacy: bodies held now that were read at least once; and since the store was opened, bytes
  // put since the last page was read. The alarm says that a store that keeps taking pages never
  // gives any back.
  uint64_t bytes_ever_read = 0;
  uint64_t bytes_put_since_hit = 0;
  bool efficacy_alarm = false;
  uint64_t pages_scrubbed = 0;
  uint64_t stored_bytes = 0;  // bodies of the pages held, as they are stored
  // Compression since the store was opened: of pages put, and of pages read or verified.
  StoreCodecBytes codec_bytes;
  uint64_t decompressed_bytes = 0;  // raw
  absl::Duration compress_time, decompress_time;
  std::string state = "serving";  // serving, full, failed
  std::string engine;
};

struct ScrubResult {
  uint64_t verified_pages = 0;
  uint64_t quarantined_pages = 0;
  uint64_t verified_bytes = 0;
};

// A page that the store began or ceased to hold. Private pages are not reported.
struct StoreEvent {
  PrefixKey prefix;  // from a remote store only its first 16 bytes; the rest is zero
  uint32_t group = 0;
  uint64_t body_bytes = 0;
  bool removed = false;
};

class PageStore {
 public:
  virtual ~PageStore() = default;

  // --- pages ---
  virtual std::vector<PutPageResult> PutPages(std::span<const PutPage> pages, Durability level,
                                              MonotonicTime deadline) = 0;
  virtual std::vector<GetPageResult> GetPages(std::span<const GetPage> pages,
                                              MonotonicTime deadline) = 0;
  virtual absl::StatusOr<std::vector<LookupResult>> LookupPages(std::span<const PageKey> keys,
                                                                MonotonicTime deadline) = 0;
  // Returns how many were deleted; pages that a manifest protects stay.
  virtual absl::StatusOr<uint64_t> DeletePages(std::span<const PageKey> keys,
                                               MonotonicTime deadline) = 0;
  // One answer a query, in order. Only full, keyed pages that were put with their tokens are known.
  virtual absl::StatusOr<std::vector<PartialResult>> FindPartialPages(
      std::span<const PartialQuery> queries, MonotonicTime deadline) = 0;
  // Replaces the retention of these pages; it belongs to the page and goes with it. Returns the
  // pages that are absent (or quarantined), for which nothing was set. Survives a restart; a pin is
  // durable (LOCAL), page and all, when this returns. INVALID_ARGUMENT: priority, pinned_until.
  // FAILED_PRECONDITION (STALE_EPOCH) when the fence does not hold: nothing was set.
  virtual absl::StatusOr<std::vector<PageKey>> SetRetention(std::span<const PageKey> keys,
                                                            const Retention& retention,
                                                            const std::optional<WriteFence>& fence,
                                                            MonotonicTime deadline) = 0;
  // All that was acknowledged before survives what `level` says.
  virtual absl::Status Barrier(Durability level, MonotonicTime deadline) = 0;

  // --- manifests (roots) ---
  // In one atomic step: the version and the fence hold, every page is present with the checksum
  // named and is protected from now on, and the manifest is durable (LOCAL); or nothing changed and
  // `missing` lists each page (once) to put again. The same request_id with the same content on the
  // version it made is that save, repeated: committed. expected_version 0: must not exist; versions
  // of a name that was deleted are not used again.
  // FAILED_PRECONDITION: VERSION_MISMATCH, STALE_EPOCH. INVALID_ARGUMENT: name, priority, summary,
  // size, or more kept than the present version has.
  virtual absl::StatusOr<PutManifestResult> PutManifest(const ManifestRecord& manifest,
                                                        uint64_t expected_version,
                                                        const std::optional<WriteFence>& fence,
                                                        MonotonicTime deadline) = 0;
  virtual absl::StatusOr<ManifestRecord> GetManifest(absl::string_view name,
                                                     MonotonicTime deadline) = 0;
  // Names in order, after `after`, at most `limit`.
  virtual absl::StatusOr<std::vector<ManifestEntry>> ListManifests(absl::string_view name_prefix,
                                                                   absl::string_view after,
                                                                   size_t limit,
                                                                   MonotonicTime deadline) = 0;
  // Its pages become evictable unless something else holds them.
  virtual absl::Status DeleteManifest(absl::string_view name, uint64_t expected_version,
                                      const std::optional<WriteFence>& fence,
                                      MonotonicTime deadline) = 0;

  // --- small records: durable at kLocal when acknowledged ---
  // Returns the new version (expected_version + 1). expected_version 0: must not exist.
  // FAILED_PRECONDITION (VERSION_MISMATCH); absent value deletes.
  virtual absl::StatusOr<uint64_t> CompareAndSetRecord(absl::string_view kind,
                                                       absl::string_view key,
                                                       uint64_t expected_version,
                                                       std::optional<absl::string_view> value,
                                                       MonotonicTime deadline) = 0;
  virtual absl::StatusOr<StoreRecord> GetRecord(absl::string_view kind, absl::string_view key,
                                                MonotonicTime deadline) = 0;
  virtual absl::StatusOr<std::vector<StoreRecord>> ListRecords(absl::string_view kind,
                                                               absl::string_view key_prefix,
                                                               absl::string_view after,
                                                               size_t limit,
                                                               MonotonicTime deadline) = 0;

  // --- leases, timed by the store from receipt ---
  // Grants when the name is free, expired, or already this incarnation's. ALREADY_EXISTS otherwise.
  // The epoch grows with each grant to a new incarnation.
  virtual absl::StatusOr<StoreLease> AcquireLease(absl::string_view name, uint64_t incarnation,
                                                  absl::Duration ttl, MonotonicTime deadline) = 0;
  // FAILED_PRECONDITION (STALE_EPOCH) when the lease expired or is another's.
  virtual absl::Status RenewLease(const StoreLease& lease, absl::Duration ttl,
                                  MonotonicTime deadline) = 0;
  virtual absl::Status ReleaseLease(const StoreLease& lease, MonotonicTime deadline) = 0;

  // --- residency and upkeep ---
  // Calls `on_events(snapshot, snapshot_end, events)` from one thread at a time: first the snapshot
  // in one or more calls, then changes as they happen, until on_events returns false or `deadline`.
  using WatchCallback =
      std::function<bool(bool snapshot, bool snapshot_end, std::span<const StoreEvent> events)>;
  virtual absl::Status Watch(const WatchCallback& on_events, MonotonicTime deadline) = 0;
  virtual absl::StatusOr<StoreStats> GetStats(MonotonicTime deadline) = 0;
  virtual absl::StatusOr<ScrubResult> Scrub(uint64_t max_pages, MonotonicTime deadline) = 0;
  // Reclaims space of dropped pages now; returns the bytes given back.
  virtual absl::StatusOr<uint64_t> Compact(MonotonicTime deadline) = 0;
};

}  // namespace pagetide

#endif  // PAGETIDE_CORE_PAGE_STORE_H_
