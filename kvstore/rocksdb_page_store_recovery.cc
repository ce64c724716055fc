// Opening and closing of RocksdbPageStore: what a crash left is made consistent before the first
// call.
#include <pthread.h>

#include <algorithm>
#include <random>
#include <set>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/checksum.h"
#include "base/little_endian.h"
#include "base/log.h"
#include "kvstore/manifest_record.h"
#include "kvstore/rocksdb_page_store.h"

namespace pagetide {

using Table = StoreDatabase::Table;

namespace {

// Of the folder of the segments: in a file there, and in the index.
constexpr char kSegmentsIdFile[] = "/store.id";
constexpr char kSegmentsIdKey[] = "segments_id";
constexpr size_t kSegmentsIdBytes = 32;  // hex digits

std::string NewSegmentsId() {
  std::random_device random;
  std::string id;
  while (id.size() < kSegmentsIdBytes) absl::StrAppendFormat(&id, "%08x", random());
  return id;
}

// What the file holds of it: the id and its checksum, so that a damaged one is not taken for
// another store's.
std::string SegmentsIdText(const std::string& id) {
  return absl::StrFormat("%s %016x\n", id,
                         ChecksumOf(std::as_bytes(std::span(id.data(), id.size()))).low);
}

// Empty when the folder has none, or none that is whole.
absl::StatusOr<std::string> ReadSegmentsId(FileSystem* fs, const std::string& dir) {
  const absl::StatusOr<std::unique_ptr<File>> file = fs->OpenFile(dir + kSegmentsIdFile);
  if (absl::IsNotFound(file.status())) return std::string();
  PT_RETURN_IF_ERROR(file.status());
  std::string text = SegmentsIdText(std::string(kSegmentsIdBytes, '0'));  // as long as any
  PT_ASSIGN_OR_RETURN(const uint64_t read,
                      (*file)->ReadAt(0, std::as_writable_bytes(std::span(text)), {}));
  const std::string id = text.substr(0, kSegmentsIdBytes);
  return read == text.size() && text == SegmentsIdText(id) ? id : std::string();
}

absl::Status WriteSegmentsId(FileSystem* fs, const std::string& dir, const std::string& id) {
  absl::StatusOr<std::unique_ptr<File>> file = fs->OpenFile(dir + kSegmentsIdFile);
  if (absl::IsNotFound(file.status())) file = fs->CreateFile(dir + kSegmentsIdFile);
  PT_RETURN_IF_ERROR(file.status());
  const std::string text = SegmentsIdText(id);
  PT_RETURN_IF_ERROR((*file)->WriteAt(0, std::as_bytes(std::span(text.data(), text.size())), {}));
  PT_RETURN_IF_ERROR((*file)->Sync());
  return fs->SyncDir(dir);
}

}  // namespace

absl::StatusOr<std::unique_ptr<RocksdbPageStore>> RocksdbPageStore::Open(
    RocksdbPageStoreOptions options) {
  PT_RETURN_IF_ERROR(options.Validate());
  std::unique_ptr<RocksdbPageStore> store(new RocksdbPageStore(std::move(options)));
  const MonotonicTime start = store->options_.clock->MonotonicNow();
  PT_RETURN_IF_ERROR(store->Recover());
  store->recovery_.took = store->options_.clock->MonotonicNow() - start;
  const Recovery& r = store->recovery_;
  LogInfo("store", "opened ", store->options_.dir, ": ", r.pages, " pages, ", r.verified_records,
          " records verified, ", r.dropped_entries, " entries dropped, ", r.lost_manifest_pages,
          " manifest pages lost, ", absl::FormatDuration(r.took));
  // Counted from here, not from whenever the threads first run.
  const MonotonicTime opened = store->options_.clock->MonotonicNow();
  store->upkeep_ = std::thread([raw = store.get(), opened] { raw->RunUpkeep(opened); });
  pthread_setname_np(store->upkeep_.native_handle(), "store-upkeep");
  if (store->options_.scrub_bytes_per_second > 0) {
    store->scrubber_ = std::thread([raw = store.get(), opened] { raw->RunScrub(opened); });
    pthread_setname_np(store->scrubber_.native_handle(), "store-scrub");
  }
  return store;
}

RocksdbPageStore::~RocksdbPageStore() {
  index_.feed()->Close();
  {
    MutexLock lock(&upkeep_mu_);
    stopping_ = true;
  }
  upkeep_wake_.SignalAll();
  room_made_.SignalAll();
  scrub_wake_.SignalAll();
  if (scrubber_.joinable()) scrubber_.join();
  if (upkeep_.joinable()) upkeep_.join();
}

absl::Status RocksdbPageStore::Recover() {
  PT_RETURN_IF_ERROR(options_.file_system->CreateDirs(options_.dir));
  PT_ASSIGN_OR_RETURN(log_mark_, LogMark::Open(options_.dir + "/log.mark", options_.file_system));
  PT_RETURN_IF_ERROR(CheckLog());
  PT_ASSIGN_OR_RETURN(db_, StoreDatabase::Open({options_.dir + "/index", options_.index_env,
                                                options_.compression != PageCompression::kNone}));
  PT_ASSIGN_OR_RETURN(const Mark mark, db_->ReadMark());
  next_mark_ = std::max(mark.number, log_mark_->last().number) + 1;
  PT_ASSIGN_OR_RETURN(const auto lengths, db_->ReadDurableLengths());
  uint64_t last_known_id = 0;
  for (const auto& length : lengths) last_known_id = std::max(last_known_id, length.segment);
  PT_RETURN_IF_ERROR(CheckSegmentsFolder());
  PT_ASSIGN_OR_RETURN(segments_, SegmentFiles::Open({segments_dir_, options_.file_system,
                                                     segment_bytes_, last_known_id}));
  // RocksDB made its folder itself, and a process that was killed may have left either unsynced.
  PT_RETURN_IF_ERROR(options_.file_system->SyncDir(options_.dir));
  PT_RETURN_IF_ERROR(RecoverPages(lengths));
  PT_RETURN_IF_ERROR(ForgetAbsentSegments(lengths));
  PT_RETURN_IF_ERROR(BindSegmentsFolder());
  PT_RETURN_IF_ERROR(RecoverManifestsAndLeases());
  // Also makes durable what a killed process had left in the page cache and we just vouched for.
  PT_RETURN_IF_ERROR(SyncAll());
  MarkLog();
  index_bytes_.store(db_->PhysicalBytes(), std::memory_order_relaxed);
  return absl::OkStatus();
}

absl::Status RocksdbPageStore::CheckLog() {
  const Mark& known = log_mark_->last();
  if (known.number == 0) return absl::OkStatus();
  const absl::StatusOr<Mark> found =
      StoreDatabase::FindMark(options_.dir + "/index", options_.index_env);
  if (!found.ok() && !absl::IsDataLoss(found.status())) return found.status();
  if (found.ok() && found->number >= known.number) return absl::OkStatus();
  const std::string lost =
      !found.ok()
          ? std::string(found.status().message())
          : absl::StrCat("its log can be read up to mark ", found->number, " (",
                         absl::FormatTime(found->at, absl::UTCTimeZone()), "), mark ", known.number,
                         " (", absl::FormatTime(known.at, absl::UTCTimeZone()), ") was durable");
  if (!options_.accepted_loss.log) {
    return absl::DataLossError(absl::StrCat(
        "open store index ", options_.dir, "/index: ", lost,
        "; nothing was changed: restore the folder, or start once with accept_loss \"log\", which "
        "gives up what was written since: sessions and records go back to what they were"));
  }
  recovery_.losses_accepted.push_back("log");
  LogError("store", "index of ", options_.dir, ": ", lost, "; what was written since is given up");
  return absl::OkStatus();
}

absl::Status RocksdbPageStore::AcceptSegmentLoss(const std::string& what) {
  if (!options_.accepted_loss.segments) {
    return absl::FailedPreconditionError(
        absl::StrCat("open store ", options_.dir, ": ", what,
                     "; nothing was dropped: mount or restore the segments, or start once with "
                     "accept_loss \"segments\", which gives up the pages in them"));
  }
  std::vector<std::string>& accepted = recovery_.losses_accepted;
  if (accepted.empty() || accepted.back() != "segments") accepted.push_back("segments");
  LogError("store", options_.dir, ": ", what, "; the pages in them are given up");
  return absl::OkStatus();
}

absl::Status RocksdbPageStore::CheckSegmentsFolder() {
  PT_ASSIGN_OR_RETURN(const std::optional<std::string> known,
                      db_->Get(Table::kMeta, kSegmentsIdKey));
  if (!known.has_value()) return absl::OkStatus();  // new, or from before folders had an id
  PT_ASSIGN_OR_RETURN(const std::string found, ReadSegmentsId(options_.file_system, segments_dir_));
  if (found == *known) return absl::OkStatus();
  if (found.empty()) {
    return AcceptSegmentLoss(
        absl::StrCat(segments_dir_, kSegmentsIdFile,
                     " is absent or damaged: these are not the segments of this index"));
  }
  // Not to be accepted: what that store has there would be taken for garbage.
  return absl::FailedPreconditionError(
      absl::StrCat("open store ", options_.dir, ": the segments in ", segments_dir_,
                   " are those of another store (", found, ", not ", *known,
                   "); nothing was dropped: mount the right folder"));
}

absl::Status RocksdbPageStore::BindSegmentsFolder() {
  PT_ASSIGN_OR_RETURN(const std::optional<std::string> known,
                      db_->Get(Table::kMeta, kSegmentsIdKey));
  PT_ASSIGN_OR_RETURN(std::string id, ReadSegmentsId(options_.file_system, segments_dir_));
  if (known.has_value() && id == *known) return absl::OkStatus();
  // The folder first: an index that knows an id refuses a folder without.
  if (id.empty()) {
    id = known.has_value() ? *known : NewSegmentsId();
    PT_RETURN_IF_ERROR(WriteSegmentsId(options_.file_system, segments_dir_, id));
  }
  return known.has_value() ? absl::OkStatus() : db_->PutSynced(Table::kMeta, kSegmentsIdKey, id);
}

absl::Status RocksdbPageStore::VerifyOnDisk(const PageKey& key, const PagePlace& place,
                                            const Checksum128& checksum) {
  std::string header;
  std::vector<std::byte> stored(place.stored_bytes);
  PT_RETURN_IF_ERROR(ReadRecordAt(key, place, &header, stored));
  return VerifyPageRecord(header, stored, key, checksum);
}

absl::Status RocksdbPageStore::ForgetAbsentSegments(
    std::span<const SegmentFiles::DurableLength> lengths) {
  std::vector<SegmentFiles::DurableLength> absent;
  for (const auto& length : lengths) {
    if (segments_->Find(length.segment) == nullptr) absent.push_back({length.segment, 0});
  }
  return absent.empty() ? absl::OkStatus() : db_->WriteDurableLengths(absent);
}

absl::Status RocksdbPageStore::ReadFromDiskBeyond(Segment* segment, uint64_t durable_bytes) {
  PT_RETURN_IF_ERROR(segment->file->Sync());
  return segment->file->DropCacheFrom(durable_bytes);
}

absl::Status RocksdbPageStore::RecoverPages(std::span<const SegmentFiles::DurableLength> lengths) {
  absl::flat_hash_map<uint64_t, uint64_t> durable;
  for (const auto& length : lengths) durable[length.segment] = length.bytes;

  struct Found {
    uint64_t access_number = 0;
    PageRecordMeta meta;
    PagePlace place;
    bool quarantined = false;
  };
  std::vector<Found> found;
  std::vector<PageKey> unusable;
  std::set<uint64_t> lost_segments;  // of which durable records are not there
  uint64_t lost_pages = 0;
  absl::flat_hash_set<uint64_t> read_from_disk;  // segments
  absl::Status status;
  const auto recover = [&](const PageKey& key, const StoreDatabase::StoredPage* page) {
    PagePlace place;
    if (page != nullptr) {
      place = {segments_->Find(page->segment), page->offset, page->header_bytes,
               page->header.meta.body_bytes, page->header.stored_bytes};
    }
    if (place.segment == nullptr ||
        place.offset + place.record_bytes() > segments_->SizeOf(place.segment->id)) {
      unusable.push_back(key);
      // A barrier covered it. What was damaged before is lost already.
      if (page != nullptr && !page->quarantined &&
          page->offset + page->header_bytes + page->header.stored_bytes <= durable[page->segment]) {
        lost_segments.insert(page->segment);
        ++lost_pages;
      }
      return true;
    }
    const uint64_t durable_bytes = durable[place.segment->id];
    if (place.offset + place.record_bytes() > durable_bytes && !page->quarantined) {
      ++recovery_.verified_records;
      absl::Status ok;
      if (read_from_disk.insert(place.segment->id).second) {
        ok = ReadFromDiskBeyond(place.segment.get(), durable_bytes);
      }
      if (ok.ok()) ok = VerifyOnDisk(key, place, page->header.meta.checksum);
      if (!ok.ok() && !absl::IsDataLoss(ok) && !absl::IsUnimplemented(ok)) {
        status = ok;  // the disk cannot be read: opening would throw good pages away
        return false;
      }
      if (!ok.ok()) {
        unusable.push_back(key);
        return true;
      }
    }
    const absl::StatusOr<uint64_t> access = db_->ReadAccessNumber(key);
    found.push_back(
        {access.ok() ? *access : 0, page->header.meta, std::move(place), page->quarantined});
    return true;
  };
  PT_RETURN_IF_ERROR(db_->ForEachPage(std::nullopt, recover));
  PT_RETURN_IF_ERROR(status);
  if (lost_pages > 0) {
    PT_RETURN_IF_ERROR(AcceptSegmentLoss(absl::StrCat(
        lost_segments.size(), " segment files, the first of number ", *lost_segments.begin(),
        ", with ", lost_pages, " durable pages are absent from ", segments_dir_, " or too short, ",
        segments_->All().size(), " are there")));
  }
  // Their places will be written again: the entries have to go first (SyncAll follows in Recover).
  for (const PageKey& key : unusable) PT_RETURN_IF_ERROR(db_->DeletePage(key));
  recovery_.dropped_entries = unusable.size();
  recovery_.pages = found.size();

  std::stable_sort(found.begin(), found.end(), [](const Found& a, const Found& b) {
    return a.access_number < b.access_number;
  });
  const uint64_t last_number = found.empty() ? 0 : found.back().access_number;
  access_written_ = last_number + found.size();
  index_.StartAccessNumbersAt(last_number);
  for (const Found& f : found) {
    f.place.segment->live_bytes.fetch_add(SegmentFiles::Footprint(f.place.record_bytes()),
                                          std::memory_order_relaxed);
    index_.Publish(f.meta, f.place, f.quarantined);
  }
  PT_ASSIGN_OR_RETURN(const auto retentions, db_->ReadRetentions());
  for (const auto& [key, retention] : retentions) {
    if (!index_.SetRetention(key, retention, options_.expiry_grace) &&
        !index_.Find(key).has_value()) {
      PT_RETURN_IF_ERROR(db_->DeletePage(key));  // it has no page
    }
  }
  index_.RerankAll();
  return absl::OkStatus();
}

absl::Status RocksdbPageStore::RecoverManifestsAndLeases() {
  uint64_t manifests = 0;
  PT_RETURN_IF_ERROR(
      db_->Scan(Table::kManifests, "", "", [&](absl::string_view name, absl::string_view value) {
        ++manifests;
        const absl::StatusOr<ManifestRecord> manifest = ParseManifest(value);
        if (!manifest.ok() || manifest->name != name) {
          LogError("store", "manifest ", name, " cannot be read: ",
                   manifest.ok() ? absl::StrCat("it carries the name ", manifest->name)
                                 : manifest.status().ToString());
          MutexLock lock(&unreadable_mu_);
          unreadable_manifests_.emplace(name);
          return true;
        }
        recovery_.lost_manifest_pages += index_.Missing(manifest->pages).size();
        index_.ProtectAnyway(manifest->pages);
        if (manifest->expires_at.has_value()) {
          expiries_.Set(
              name, TwoClockEnd::At(*manifest->expires_at, *options_.clock, options_.expiry_grace));
        }
        return true;
      }));
  counters_.manifests.store(manifests, std::memory_order_relaxed);
  if (const uint64_t unreadable = num_unreadable_manifests(); unreadable > 0) {
    if (options_.accepted_loss.manifests) recovery_.losses_accepted.push_back("manifests");
    LogError("store", unreadable, " manifests cannot be read: ",
             options_.accepted_loss.manifests
                 ? "what they name may be evicted"
                 : "no page is dropped until they are deleted, or given up by accept_loss "
                   "\"manifests\"");
  }
  if (recovery_.lost_manifest_pages > 0) {
    LogError("store", recovery_.lost_manifest_pages, " pages that manifests name are absent");
  }
  return db_->Scan(Table::kLeases, "", "", [&](absl::string_view name, absl::string_view value) {
    LittleEndianReader in(value);
    StoreLease lease;
    lease.name = std::string(name);
    lease.incarnation = in.Take<uint64_t>();
    lease.epoch = in.Take<uint64_t>();
    const absl::Duration ttl = absl::Nanoseconds(static_cast<int64_t>(in.Take<uint64_t>()));
    if (in.ok()) leases_.Grant(lease, ttl);
    return true;
  });
}

}  // namespace pagetide
