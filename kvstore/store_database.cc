#include "kvstore/store_database.h"

#include <rocksdb/db.h>
#include <rocksdb/env.h>
#include <rocksdb/options.h>
#include <rocksdb/write_batch.h>

#include <array>
#include <atomic>
#include <cstring>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/little_endian.h"
#include "base/status_macros.h"
#include "kvstore/manifest_record.h"
#include "kvstore/retention.h"

namespace pagetide {
namespace {

using Table = StoreDatabase::Table;

constexpr std::array<const char*, StoreDatabase::kNumTables> kTableNames = {
    "pages", "durable",  "access",     "manifests", "records",         "leases",
    "meta",  "children", "child_rows", "retention", "manifest_entries"};
constexpr char kMarkKey[] = "log_mark";
constexpr uint8_t kIndexVersion = 1;
constexpr uint8_t kQuarantinedFlag = 1;
constexpr size_t kChildRowPrefix = 32 + 32;  // parent, fingerprint

rocksdb::Slice ToSlice(absl::string_view text) {
  return rocksdb::Slice(text.data(), text.size());
}
absl::string_view ToView(const rocksdb::Slice& slice) {
  return absl::string_view(slice.data(), slice.size());
}

absl::Status ToStatus(const rocksdb::Status& s, absl::string_view action) {
  if (s.ok()) return absl::OkStatus();
  const std::string text = absl::StrCat(action, ": ", s.ToString());
  if (s.IsNoSpace()) return absl::ResourceExhaustedError(text);
  if (s.IsCorruption()) return absl::DataLossError(text);
  return absl::UnavailableError(text);
}

std::string SegmentKey(uint64_t segment) {
  std::string key;
  AppendLittleEndian<uint64_t>(&key, segment);
  return key;
}

absl::StatusOr<StoreDatabase::StoredPage> ParseIndexEntry(absl::string_view value) {
  LittleEndianReader in(value);
  const uint8_t version = in.Take<uint8_t>();
  const uint8_t flags = in.Take<uint8_t>();
  StoreDatabase::StoredPage page;
  page.segment = in.Take<uint64_t>();
  page.offset = in.Take<uint64_t>();
  if (!in.ok()) return absl::DataLossError("index entry: too short");
  if (version != kIndexVersion) {
    return absl::UnimplementedError(absl::StrCat("index entry: version ", version));
  }
  PT_ASSIGN_OR_RETURN(page.header, ParsePageRecordHeader(in.rest()));
  page.header_bytes = static_cast<uint32_t>(in.rest().size());
  page.quarantined = (flags & kQuarantinedFlag) != 0;
  if (page.header_bytes != PageRecordHeaderBytes(page.header.meta)) {
    return absl::DataLossError("index entry: trailing bytes");
  }
  return page;
}

std::string DeletedVersionKey(absl::string_view name) {
  return absl::StrFormat("deleted_version.%04x", VersionBucketOf(name));
}

Mark ParseMark(absl::string_view value) {
  LittleEndianReader in(value);
  Mark mark;
  mark.number = in.Take<uint64_t>();
  mark.at = absl::FromUnixNanos(static_cast<int64_t>(in.Take<uint64_t>()));
  return in.ok() ? mark : Mark{};
}

rocksdb::DBOptions DatabaseOptions(rocksdb::Env* env) {
  rocksdb::DBOptions options;
  options.create_if_missing = true;
  options.create_missing_column_families = true;
  options.env = env;
  // A torn tail of the log is the part that no barrier covered. Damage before it looks the same to
  // RocksDB: the store compares marks before it opens the database (RocksdbPageStore::CheckLog).
  options.wal_recovery_mode = rocksdb::WALRecoveryMode::kPointInTimeRecovery;
  // Bounds what a restart replays.
  options.max_total_wal_size = 32 << 20;
  options.max_background_jobs = 2;
  options.keep_log_file_num = 2;
  options.info_log_level = rocksdb::InfoLogLevel::WARN_LEVEL;
  return options;
}

// Keeps others, of this process or another, from opening a database.
class DatabaseLock {
 public:
  DatabaseLock(rocksdb::Env* env, const std::string& dir)
      : env_(env), status_(env->LockFile(dir + "/LOCK", &lock_)) {}
  ~DatabaseLock() {
    if (status_.ok()) env_->UnlockFile(lock_);
  }
  DatabaseLock(const DatabaseLock&) = delete;
  DatabaseLock& operator=(const DatabaseLock&) = delete;
  const rocksdb::Status& status() const { return status_; }

 private:
  rocksdb::Env* const env_;
  rocksdb::FileLock* lock_ = nullptr;
  const rocksdb::Status status_;
};

}  // namespace

struct StoreDatabase::Impl {
  std::string dir;
  rocksdb::Env* env = nullptr;
  std::atomic<uint64_t> num_synced_writes{
      0};  // relaxed: a later look counts what an earlier missed
  std::unique_ptr<rocksdb::DB> db;
  std::vector<rocksdb::ColumnFamilyHandle*> families;

  ~Impl() {
    for (rocksdb::ColumnFamilyHandle* family : families) db->DestroyColumnFamilyHandle(family);
  }
  rocksdb::ColumnFamilyHandle* Of(Table table) const { return families[static_cast<int>(table)]; }
  absl::Status Write(rocksdb::WriteBatch* batch, bool sync, absl::string_view action) {
    rocksdb::WriteOptions options;
    options.sync = sync;
    PT_RETURN_IF_ERROR(ToStatus(db->Write(options, batch), action));
    if (sync) num_synced_writes.fetch_add(1, std::memory_order_relaxed);
    return absl::OkStatus();
  }
};

StoreDatabase::StoreDatabase(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
StoreDatabase::~StoreDatabase() = default;

absl::StatusOr<std::unique_ptr<StoreDatabase>> StoreDatabase::Open(Options options) {
  auto impl = std::make_unique<Impl>();
  impl->dir = options.dir;
  impl->env = options.env != nullptr ? options.env : rocksdb::Env::Default();
  const rocksdb::DBOptions db_options = DatabaseOptions(impl->env);
  rocksdb::ColumnFamilyOptions family_options;
  family_options.write_buffer_size = 8 << 20;
  std::vector<rocksdb::ColumnFamilyDescriptor> descriptors;
  descriptors.emplace_back(rocksdb::kDefaultColumnFamilyName, family_options);
  for (const char* name : kTableNames) descriptors.emplace_back(name, family_options);
  rocksdb::DB* db = nullptr;
  std::vector<rocksdb::ColumnFamilyHandle*> handles;
  PT_RETURN_IF_ERROR(
      ToStatus(rocksdb::DB::Open(db_options, options.dir, descriptors, &handles, &db),
               absl::StrCat("open store index ", options.dir)));
  impl->db.reset(db);
  db->DestroyColumnFamilyHandle(handles.front());
  impl->families.assign(handles.begin() + 1, handles.end());

  std::unique_ptr<StoreDatabase> self(new StoreDatabase(std::move(impl)));
  PT_ASSIGN_OR_RETURN(const std::optional<std::string> schema, self->Get(Table::kMeta, "schema"));
  uint32_t version = 0;
  if (schema.has_value()) {
    LittleEndianReader in(*schema);
    version = in.Take<uint32_t>();
    if (!in.ok() || version < 1 || version > kCompressedSchemaVersion) {
      return absl::FailedPreconditionError(
          absl::StrCat("open store index ", options.dir, ": schema version ", version,
                       ", this program knows ", kCompressedSchemaVersion));
    }
  }
  const uint32_t target =
      std::max(version, options.marks_compressed ? kCompressedSchemaVersion : kSchemaVersion);
  if (version < target) PT_RETURN_IF_ERROR(self->Upgrade(version, target));
  return self;
}

absl::StatusOr<Mark> StoreDatabase::FindMark(const std::string& dir, rocksdb::Env* env) {
  if (env == nullptr) env = rocksdb::Env::Default();
  const std::string action = absl::StrCat("open store index ", dir);
  const rocksdb::Status there = env->FileExists(dir + "/CURRENT");
  if (there.IsNotFound()) return Mark{};
  PT_RETURN_IF_ERROR(ToStatus(there, action));
  const DatabaseLock lock(env, dir);
  PT_RETURN_IF_ERROR(ToStatus(lock.status(), action));
  // A read-only opening replays the log into memory, of these two families only.
  const rocksdb::ColumnFamilyOptions family_options;
  const std::vector<rocksdb::ColumnFamilyDescriptor> families = {
      {rocksdb::kDefaultColumnFamilyName, family_options},
      {kTableNames[static_cast<int>(Table::kMeta)], family_options}};
  rocksdb::DB* opened = nullptr;
  std::vector<rocksdb::ColumnFamilyHandle*> handles;
  PT_RETURN_IF_ERROR(
      ToStatus(rocksdb::DB::OpenForReadOnly(DatabaseOptions(env), dir, families, &handles, &opened),
               action));
  const std::unique_ptr<rocksdb::DB> db(opened);
  std::string value;
  const rocksdb::Status read = db->Get(rocksdb::ReadOptions(), handles[1], kMarkKey, &value);
  for (rocksdb::ColumnFamilyHandle* handle : handles) db->DestroyColumnFamilyHandle(handle);
  if (read.IsNotFound()) return Mark{};
  PT_RETURN_IF_ERROR(ToStatus(read, action));
  return ParseMark(value);
}

absl::Status StoreDatabase::PutMark(const Mark& mark) {
  std::string value;
  AppendLittleEndian<uint64_t>(&value, mark.number);
  AppendLittleEndian<uint64_t>(&value, static_cast<uint64_t>(absl::ToUnixNanos(mark.at)));
  return PutSynced(Table::kMeta, kMarkKey, value);
}

absl::StatusOr<Mark> StoreDatabase::ReadMark() const {
  PT_ASSIGN_OR_RETURN(const std::optional<std::string> value, Get(Table::kMeta, kMarkKey));
  return value.has_value() ? ParseMark(*value) : Mark{};
}

uint64_t StoreDatabase::num_synced_writes() const {
  return impl_->num_synced_writes.load(std::memory_order_relaxed);
}

absl::Status StoreDatabase::PutPage(const PageKey& key, absl::string_view header, uint64_t segment,
                                    uint64_t offset, bool quarantined,
                                    absl::string_view child_row) {
  std::string value;
  AppendLittleEndian<uint8_t>(&value, kIndexVersion);
  AppendLittleEndian<uint8_t>(&value, quarantined ? kQuarantinedFlag : 0);
  AppendLittleEndian<uint64_t>(&value, segment);
  AppendLittleEndian<uint64_t>(&value, offset);
  value.append(header.data(), header.size());
  rocksdb::WriteBatch batch;
  batch.Put(impl_->Of(Table::kPages), ToSlice(key.digest.view()), value);
  if (!child_row.empty()) {
    batch.Put(impl_->Of(Table::kChildren), ToSlice(child_row), ToSlice(key.digest.view()));
    batch.Put(impl_->Of(Table::kChildRows), ToSlice(key.digest.view()), ToSlice(child_row));
  }
  return impl_->Write(&batch, /*sync=*/false, "write index entry");
}

absl::Status StoreDatabase::DeletePage(const PageKey& key) {
  PT_ASSIGN_OR_RETURN(const std::optional<std::string> child_row,
                      Get(Table::kChildRows, key.digest.view()));
  rocksdb::WriteBatch batch;
  if (child_row.has_value()) {
    batch.Delete(impl_->Of(Table::kChildren), *child_row);
    batch.Delete(impl_->Of(Table::kChildRows), ToSlice(key.digest.view()));
  }
  batch.Delete(impl_->Of(Table::kRetention), ToSlice(key.digest.view()));
  batch.Delete(impl_->Of(Table::kPages), ToSlice(key.digest.view()));
  batch.Delete(impl_->Of(Table::kAccess), ToSlice(key.digest.view()));
  return impl_->Write(&batch, /*sync=*/false, "delete index entry");
}

absl::Status StoreDatabase::MarkQuarantined(const PageKey& key) {
  PT_ASSIGN_OR_RETURN(std::optional<std::string> value, Get(Table::kPages, key.digest.view()));
  if (!value.has_value() || value->size() < 2) return absl::OkStatus();
  (*value)[1] = static_cast<char>((*value)[1] | kQuarantinedFlag);
  rocksdb::WriteBatch batch;
  batch.Put(impl_->Of(Table::kPages), ToSlice(key.digest.view()), *value);
  return impl_->Write(&batch, /*sync=*/false, "quarantine index entry");
}

std::string StoreDatabase::ChildRow(const PrefixKey& parent, const Digest& fingerprint,
                                    std::span<const uint32_t> tokens) {
  std::string row;
  row.reserve(kChildRowPrefix + tokens.size() * 4);
  row.append(parent.digest.view().data(), 32);
  row.append(fingerprint.view().data(), 32);
  for (const uint32_t token : tokens) {
    for (int shift = 24; shift >= 0; shift -= 8) row.push_back(static_cast<char>(token >> shift));
  }
  return row;
}

absl::StatusOr<std::vector<StoreDatabase::Child>> StoreDatabase::FindNeighbours(
    const PrefixKey& parent, const Digest& fingerprint, std::span<const uint32_t> tokens,
    const std::function<bool(const PageKey&)>& is_usable) const {
  const std::string from = ChildRow(parent, fingerprint, tokens);
  const absl::string_view family = absl::string_view(from).substr(0, kChildRowPrefix);
  std::unique_ptr<rocksdb::Iterator> it(
      impl_->db->NewIterator(rocksdb::ReadOptions(), impl_->Of(Table::kChildren)));
  std::vector<Child> neighbours;
  for (const bool forward : {true, false}) {
    if (forward) {
      it->Seek(from);
    } else {
      it->SeekForPrev(from);
    }
    for (int step = 0; step < kMaxChildSteps && it->Valid(); ++step) {
      const absl::string_view row = ToView(it->key());
      if (!absl::StartsWith(row, family)) break;
      const absl::StatusOr<Digest> key = Digest::FromBytes(ToView(it->value()));
      if (key.ok() && row.size() % 4 == 0 && is_usable(PageKey{*key})) {
        Child& child = neighbours.emplace_back();
        child.key = PageKey{*key};
        child.tokens.reserve((row.size() - kChildRowPrefix) / 4);
        for (size_t at = kChildRowPrefix; at < row.size(); at += 4) {
          uint32_t token = 0;
          for (size_t i = 0; i < 4; ++i) token = token << 8 | static_cast<uint8_t>(row[at + i]);
          child.tokens.push_back(token);
        }
        break;
      }
      if (forward) {
        it->Next();
      } else {
        it->Prev();
      }
    }
  }
  PT_RETURN_IF_ERROR(ToStatus(it->status(), "scan children"));
  return neighbours;
}

absl::Status StoreDatabase::PutRetention(std::span<const PageKey> keys, const Retention& retention,
                                         bool sync) {
  const std::string value = EncodeRetention(retention);
  rocksdb::WriteBatch batch;
  for (const PageKey& key : keys) {
    batch.Put(impl_->Of(Table::kRetention), ToSlice(key.digest.view()), value);
  }
  return impl_->Write(&batch, sync, "write retention");
}

absl::StatusOr<std::vector<std::pair<PageKey, Retention>>> StoreDatabase::ReadRetentions() const {
  std::vector<std::pair<PageKey, Retention>> out;
  PT_RETURN_IF_ERROR(
      Scan(Table::kRetention, "", "", [&](absl::string_view key, absl::string_view value) {
        const absl::StatusOr<Digest> digest = Digest::FromBytes(key);
        const absl::StatusOr<Retention> retention = ParseRetention(value);
        // One that cannot be read leaves its page the default.
        if (digest.ok() && retention.ok()) out.emplace_back(PageKey{*digest}, *retention);
        return true;
      }));
  return out;
}

absl::Status StoreDatabase::PutManifest(const ManifestRecord& manifest, bool sync) {
  rocksdb::WriteBatch batch;
  batch.Put(impl_->Of(Table::kManifests), manifest.name, EncodeManifest(manifest));
  batch.Put(impl_->Of(Table::kManifestEntries), manifest.name,
            EncodeManifestEntry(EntryOf(manifest)));
  return impl_->Write(&batch, sync, "write manifest");
}

absl::StatusOr<uint64_t> StoreDatabase::ReadDeletedVersion(absl::string_view name) const {
  PT_ASSIGN_OR_RETURN(const std::optional<std::string> value,
                      Get(Table::kMeta, DeletedVersionKey(name)));
  if (!value.has_value()) return 0;
  LittleEndianReader in(*value);
  const uint64_t version = in.Take<uint64_t>();
  if (!in.ok())
    return absl::DataLossError(absl::StrCat("deleted version of ", name, ": too short"));
  return version;
}

absl::Status StoreDatabase::DeleteManifest(absl::string_view name, uint64_t deleted_version,
                                           std::span<const std::pair<PageKey, Retention>> kept_by) {
  std::string value;
  AppendLittleEndian<uint64_t>(&value, deleted_version);
  rocksdb::WriteBatch batch;
  batch.Put(impl_->Of(Table::kMeta), DeletedVersionKey(name), value);
  batch.Delete(impl_->Of(Table::kManifests), ToSlice(name));
  batch.Delete(impl_->Of(Table::kManifestEntries), ToSlice(name));
  for (const auto& [key, retention] : kept_by) {
    batch.Put(impl_->Of(Table::kRetention), ToSlice(key.digest.view()), EncodeRetention(retention));
  }
  return impl_->Write(&batch, /*sync=*/true, "delete manifest");
}

absl::Status StoreDatabase::Upgrade(uint32_t from, uint32_t to) {
  std::vector<ManifestRecord> manifests;
  if (from == 1) {
    PT_RETURN_IF_ERROR(
        Scan(Table::kManifests, "", "", [&](absl::string_view, absl::string_view value) {
          absl::StatusOr<ManifestRecord> manifest = ParseManifest(value);
          if (manifest.ok()) manifests.push_back(*std::move(manifest));
          return true;
        }));
  }
  for (const ManifestRecord& manifest : manifests) PT_RETURN_IF_ERROR(PutManifest(manifest));
  std::string value;
  AppendLittleEndian<uint32_t>(&value, to);
  return PutSynced(Table::kMeta, "schema", value);
}

absl::Status StoreDatabase::ForEachPage(
    const std::optional<PageKey>& after,
    const std::function<bool(const PageKey&, const StoredPage*)>& fn) const {
  std::unique_ptr<rocksdb::Iterator> it(
      impl_->db->NewIterator(rocksdb::ReadOptions(), impl_->Of(Table::kPages)));
  if (after.has_value()) {
    it->Seek(ToSlice(after->digest.view()));
    if (it->Valid() && ToView(it->key()) == after->digest.view()) it->Next();
  } else {
    it->SeekToFirst();
  }
  for (; it->Valid(); it->Next()) {
    const absl::StatusOr<Digest> digest = Digest::FromBytes(ToView(it->key()));
    if (!digest.ok()) continue;
    const PageKey key{*digest};
    const absl::StatusOr<StoredPage> page = ParseIndexEntry(ToView(it->value()));
    const bool usable = page.ok() && page->header.meta.key == key;
    if (!fn(key, usable ? &*page : nullptr)) break;
  }
  return ToStatus(it->status(), "scan index");
}

absl::Status StoreDatabase::WriteDurableLengths(
    std::span<const SegmentFiles::DurableLength> lengths) {
  rocksdb::WriteBatch batch;
  for (const SegmentFiles::DurableLength& length : lengths) {
    if (length.bytes == 0) {
      batch.Delete(impl_->Of(Table::kDurable), SegmentKey(length.segment));
      continue;
    }
    std::string value;
    AppendLittleEndian<uint64_t>(&value, length.bytes);
    batch.Put(impl_->Of(Table::kDurable), SegmentKey(length.segment), value);
  }
  // An empty batch would not reach the log, and the barrier is about what was written before.
  // DB::SyncWAL is no way out: after a failed log write it aborts the process (RocksDB 7.8 of
  // Debian asserts), while a write is refused with the first error.
  if (batch.Count() == 0) batch.Put(impl_->Of(Table::kMeta), "barrier", "");
  return impl_->Write(&batch, /*sync=*/true, "write durable lengths");
}

absl::StatusOr<std::vector<SegmentFiles::DurableLength>> StoreDatabase::ReadDurableLengths() const {
  std::vector<SegmentFiles::DurableLength> lengths;
  PT_RETURN_IF_ERROR(
      Scan(Table::kDurable, "", "", [&](absl::string_view key, absl::string_view value) {
        LittleEndianReader k(key), v(value);
        const uint64_t segment = k.Take<uint64_t>();
        const uint64_t bytes = v.Take<uint64_t>();
        if (k.ok() && v.ok()) lengths.push_back({segment, bytes});
        return true;
      }));
  return lengths;
}

absl::Status StoreDatabase::WriteAccessNumbers(
    std::span<const std::pair<PageKey, uint64_t>> accesses) {
  rocksdb::WriteBatch batch;
  for (const auto& [key, number] : accesses) {
    std::string value;
    AppendLittleEndian<uint64_t>(&value, number);
    batch.Put(impl_->Of(Table::kAccess), ToSlice(key.digest.view()), value);
  }
  return impl_->Write(&batch, /*sync=*/false, "write access numbers");
}

absl::StatusOr<uint64_t> StoreDatabase::ReadAccessNumber(const PageKey& key) const {
  PT_ASSIGN_OR_RETURN(const std::optional<std::string> value,
                      Get(Table::kAccess, key.digest.view()));
  if (!value.has_value()) return 0;
  LittleEndianReader in(*value);
  return in.Take<uint64_t>();
}

absl::Status StoreDatabase::PutSynced(Table table, absl::string_view key, absl::string_view value) {
  rocksdb::WriteBatch batch;
  batch.Put(impl_->Of(table), ToSlice(key), ToSlice(value));
  return impl_->Write(&batch, /*sync=*/true,
                      absl::StrCat("write ", kTableNames[static_cast<int>(table)]));
}

absl::Status StoreDatabase::DeleteSynced(Table table, absl::string_view key) {
  rocksdb::WriteBatch batch;
  batch.Delete(impl_->Of(table), ToSlice(key));
  return impl_->Write(&batch, /*sync=*/true,
                      absl::StrCat("delete from ", kTableNames[static_cast<int>(table)]));
}

absl::StatusOr<std::optional<std::string>> StoreDatabase::Get(Table table,
                                                              absl::string_view key) const {
  std::string value;
  const rocksdb::Status s =
      impl_->db->Get(rocksdb::ReadOptions(), impl_->Of(table), ToSlice(key), &value);
  if (s.IsNotFound()) return std::optional<std::string>();
  PT_RETURN_IF_ERROR(ToStatus(s, absl::StrCat("read ", kTableNames[static_cast<int>(table)])));
  return std::optional<std::string>(std::move(value));
}

absl::Status StoreDatabase::Scan(
    Table table, absl::string_view prefix, absl::string_view after,
    const std::function<bool(absl::string_view key, absl::string_view value)>& fn) const {
  std::unique_ptr<rocksdb::Iterator> it(
      impl_->db->NewIterator(rocksdb::ReadOptions(), impl_->Of(table)));
  const absl::string_view from = std::max(prefix, after);
  for (it->Seek(ToSlice(from)); it->Valid(); it->Next()) {
    const absl::string_view key = ToView(it->key());
    if (!absl::StartsWith(key, prefix)) break;
    if (!after.empty() && key <= after) continue;
    if (!fn(key, ToView(it->value()))) break;
  }
  return ToStatus(it->status(), absl::StrCat("scan ", kTableNames[static_cast<int>(table)]));
}

uint64_t StoreDatabase::PhysicalBytes() const {
  std::vector<rocksdb::Env::FileAttributes> files;
  if (!impl_->env->GetChildrenFileAttributes(impl_->dir, &files).ok()) return 0;
  uint64_t total = 0;
  for (const rocksdb::Env::FileAttributes& file : files) total += file.size_bytes;
  return total;
}

}  // namespace pagetide
