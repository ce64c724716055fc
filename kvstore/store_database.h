// StoreDatabase: the RocksDB beside the segment files. Column families:
//   pages      page key → {version, flags, segment, offset, record header}
//   durable    segment → length below which its records are durable
//   access     page key → number of its last access
//   children   parent prefix key, fingerprint, tokens (u32, big-endian: in their order) → page key
//   child_rows page key → its key in children
//   retention  page key → stored retention
//   manifests  name → stored manifest
//   manifest_entries  name → stored manifest entry, always written with the manifest
//   records    kind NUL key → {version, value}
//   leases     name → {incarnation, epoch, time to live}
//   meta       "schema" → version of all this; "log_mark" → the last mark (kvstore/log_mark.h)
// Formats: docs/store_format.md. Thread-safe. Every write is in RocksDB's log when its call returns
// (it survives a crash of the process); a synced write makes itself and all earlier ones survive
// power loss.
#ifndef PAGETIDE_KVSTORE_STORE_DATABASE_H_
#define PAGETIDE_KVSTORE_STORE_DATABASE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "core/page_store.h"
#include "kvstore/log_mark.h"
#include "kvstore/page_record.h"
#include "kvstore/segment_files.h"

namespace rocksdb {
class Env;
}  // namespace rocksdb

namespace pagetide {

class StoreDatabase {
 public:
  enum class Table {
    kPages,
    kDurable,
    kAccess,
    kManifests,
    kRecords,
    kLeases,
    kMeta,
    kChildren,
    kChildRows,
    kRetention,
    kManifestEntries
  };
  static constexpr int kNumTables = 11;
  // 1 had no children, retention and manifest entries; such a folder is brought up to date.
  static constexpr uint32_t kSchemaVersion = 2;
  // As 2, and page records may be compressed. Programs that know 2 only refuse the folder: they
  // would drop such pages as unreadable.
  static constexpr uint32_t kCompressedSchemaVersion = 3;

  struct Options {
    std::string dir;
    rocksdb::Env* env = nullptr;    // null: the machine's; outlives the database
    bool marks_compressed = false;  // schema 3 from now on
  };
  struct StoredPage {
    PageRecordHeader header;
    uint32_t header_bytes = 0;
    uint64_t segment = 0;
    uint64_t offset = 0;
    bool quarantined = false;
  };

  // FAILED_PRECONDITION when a newer program wrote the folder.
  static absl::StatusOr<std::unique_ptr<StoreDatabase>> Open(Options options);
  // The mark that a database opened from the folder would hold, found without writing to it: what
  // Open does with a damaged log, dropping all behind the damage, cannot be undone. Number 0 when
  // there is no database. UNAVAILABLE while somebody has it open.
  static absl::StatusOr<Mark> FindMark(const std::string& dir, rocksdb::Env* env);
  ~StoreDatabase();

  // --- pages ---
  // `header` is EncodePageRecordHeader's; `child_row` (ChildRow, or empty) stays as it was when it
  // is empty. Not synced.
  absl::Status PutPage(const PageKey& key, absl::string_view header, uint64_t segment,
                       uint64_t offset, bool quarantined, absl::string_view child_row = "");
  // And all that belongs to it.
  absl::Status DeletePage(const PageKey& key);
  static std::string ChildRow(const PrefixKey& parent, const Digest& fingerprint,
                              std::span<const uint32_t> tokens);
  struct Child {
    PageKey key;
    std::vector<uint32_t> tokens;
  };
  // The children beside `tokens` in their order: the next at or after them for which `is_usable`,
  // and the last before them. At most kMaxChildSteps are looked at on each side.
  absl::StatusOr<std::vector<Child>> FindNeighbours(
      const PrefixKey& parent, const Digest& fingerprint, std::span<const uint32_t> tokens,
      const std::function<bool(const PageKey&)>& is_usable) const;
  static constexpr int kMaxChildSteps = 8;
  // Sets the flag in the page's entry, if it has one. The caller keeps others from writing the
  // entry.
  absl::Status MarkQuarantined(const PageKey& key);
  // Pages in key order after `after` (nullopt: from the first), until `fn` returns false. Entries
  // that cannot be parsed are reported by key with a null page.
  absl::Status ForEachPage(const std::optional<PageKey>& after,
                           const std::function<bool(const PageKey&, const StoredPage*)>& fn) const;

  // --- durability and recency ---
  // Synced, and all that was written before is durable with it.
  absl::Status PutMark(const Mark& mark);
  absl::StatusOr<Mark> ReadMark() const;
  // That were acknowledged since Open.
  uint64_t num_synced_writes() const;
  // Synced. Lengths of zero bytes forget the segment.
  absl::Status WriteDurableLengths(std::span<const SegmentFiles::DurableLength> lengths);
  absl::StatusOr<std::vector<SegmentFiles::DurableLength>> ReadDurableLengths() const;
  absl::Status WriteAccessNumbers(std::span<const std::pair<PageKey, uint64_t>> accesses);
  // 0 for a page without one.
  absl::StatusOr<uint64_t> ReadAccessNumber(const PageKey& key) const;

  absl::Status PutRetention(std::span<const PageKey> keys, const Retention& retention, bool sync);
  absl::StatusOr<std::vector<std::pair<PageKey, Retention>>> ReadRetentions() const;

  // --- manifests: record and entry change together. Synced, unless told otherwise. ---
  absl::Status PutManifest(const ManifestRecord& manifest, bool sync = true);
  // Also gives the name's bucket that deleted version and the pages `kept_by` their retention, in
  // the same write.
  absl::Status DeleteManifest(absl::string_view name, uint64_t deleted_version,
                              std::span<const std::pair<PageKey, Retention>> kept_by);
  // The highest version that was deleted in the name's bucket (VersionBucketOf); 0: none.
  absl::StatusOr<uint64_t> ReadDeletedVersion(absl::string_view name) const;

  // --- small values: manifests, records, leases ---
  absl::Status PutSynced(Table table, absl::string_view key, absl::string_view value);
  absl::Status DeleteSynced(Table table, absl::string_view key);
  absl::StatusOr<std::optional<std::string>> Get(Table table, absl::string_view key) const;
  // Keys that begin with `prefix`, in order, after `after`, until `fn` returns false.
  absl::Status Scan(
      Table table, absl::string_view prefix, absl::string_view after,
      const std::function<bool(absl::string_view key, absl::string_view value)>& fn) const;

  // Bytes of its files on disk.
  uint64_t PhysicalBytes() const;

 private:
  struct Impl;  // keeps RocksDB's headers out of this one
  explicit StoreDatabase(std::unique_ptr<Impl> impl);
  // From schema 1 manifests get entries; the rest came with their pages and is not there. `from` 0:
  // a new folder.
  absl::Status Upgrade(uint32_t from, uint32_t to);
  const std::unique_ptr<Impl> impl_;
};

}  // namespace pagetide

#endif  // PAGETIDE_KVSTORE_STORE_DATABASE_H_
