#include "kvstore/rocksdb_page_store.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/byte_size.h"
#include "base/little_endian.h"
#include "base/log.h"
#include "kvstore/failpoint.h"
#include "kvstore/page_record.h"
#include "kvstore/store_errors.h"
#include "kvstore/store_lock_keys.h"

namespace pagetide {
namespace {

using Table = StoreDatabase::Table;

uint64_t SegmentBytesFor(const RocksdbPageStoreOptions& options) {
  if (options.segment_bytes != 0) return options.segment_bytes;
  if (options.capacity_bytes == 0) return 64 * kMiB;
  return std::clamp(options.capacity_bytes / 16, kMiB, 64 * kMiB);
}

constexpr uint64_t kRetentionRowBytes = 64;  // key and value, rounded up

absl::Status DeadlineError(absl::string_view action) {
  return absl::DeadlineExceededError(absl::StrCat(action, ": deadline passed"));
}

}  // namespace

absl::Status RocksdbPageStoreOptions::Validate() const {
  if (dir.empty()) return absl::InvalidArgumentError("store options: dir is empty");
  const uint64_t segment = SegmentBytesFor(*this);
  if (capacity_bytes != 0 && capacity_bytes < 4 * segment) {
    return absl::InvalidArgumentError(absl::StrCat("store options: capacity_bytes is ",
                                                   capacity_bytes, ", at least four segments of ",
                                                   segment, " are needed"));
  }
  return absl::OkStatus();
}

RocksdbPageStore::RocksdbPageStore(RocksdbPageStoreOptions options)
    : options_(std::move(options)),
      segment_bytes_(SegmentBytesFor(options_)),
      segments_dir_(options_.dir + "/segments"),
      index_(options_.clock),
      leases_(options_.clock),
      keys_(options_.clock) {}

// ---- durability --------------------------------------------------------------------------------

absl::Status RocksdbPageStore::CheckNotFailed() const {
  MutexLock lock(&barrier_mu_);
  return failure_.has_value() ? *failure_ : absl::OkStatus();
}

absl::Status RocksdbPageStore::Fail(const absl::Status& cause) {
  const absl::Status failure = StoreFailedError(cause.message());
  {
    MutexLock lock(&barrier_mu_);
    if (failure_.has_value()) return *failure_;
    failure_ = failure;
  }
  barrier_done_.SignalAll();
  LogError("store", "writes are refused from now on: ", cause.ToString());
  return failure;
}

absl::Status RocksdbPageStore::SyncAll() {
  PT_FAILPOINT("barrier.before_segments");
  const auto lengths = segments_->Sync();
  if (!lengths.ok()) return lengths.status();
  PT_FAILPOINT("barrier.before_lengths");
  const absl::Status written = db_->WriteDurableLengths(*lengths);
  PT_FAILPOINT("barrier.done");
  return written;
}

absl::Status RocksdbPageStore::Barrier(Durability level, MonotonicTime deadline) {
  if (level != Durability::kLocal) return CheckNotFailed();
  uint64_t ticket = 0;
  uint64_t target = 0;
  {
    MutexLock lock(&barrier_mu_);
    ticket = ++barriers_requested_;
    for (;;) {
      if (failure_.has_value()) return *failure_;
      if (barriers_done_ >= ticket) return absl::OkStatus();
      if (!barrier_running_) break;
      const absl::Duration left = deadline - options_.clock->MonotonicNow();
      if (left <= absl::ZeroDuration()) return DeadlineError("barrier");
      barrier_done_.WaitWithTimeout(&barrier_mu_, left);
    }
    barrier_running_ = true;
    target = barriers_requested_;  // everyone who asked so far is served by this fsync
  }
  const absl::Status synced = SyncAll();
  if (!synced.ok()) Fail(synced).IgnoreError();
  absl::Status result;
  {
    MutexLock lock(&barrier_mu_);
    barrier_running_ = false;
    if (!failure_.has_value()) barriers_done_ = std::max(barriers_done_, target);
    result = failure_.has_value() ? *failure_ : absl::OkStatus();
  }
  barrier_done_.SignalAll();
  return result;
}

// ---- pages -------------------------------------------------------------------------------------

struct RocksdbPageStore::PutScratch {
  PageBodyEncoder encoder;
};

struct RocksdbPageStore::GetScratch {
  std::string header;
  std::vector<std::byte> stored;
  PageBodyDecoder decoder;
};

std::span<const std::byte> RocksdbPageStore::Compress(std::span<const std::byte> body,
                                                      PageBodyEncoder* encoder) {
  std::span<const std::byte> compressed;
  if (options_.compression != PageCompression::kNone) {
    const MonotonicTime start = options_.clock->MonotonicNow();
    compressed = encoder->Encode(body);
    counters_.compress_ns.fetch_add(
        absl::ToInt64Nanoseconds(options_.clock->MonotonicNow() - start),
        std::memory_order_relaxed);
  }
  if (compressed.empty()) {
    counters_.raw_in.fetch_add(body.size(), std::memory_order_relaxed);
    return body;
  }
  const StoreCodecBytes& tally = encoder->tally();
  counters_.raw_in.fetch_add(tally.raw.in, std::memory_order_relaxed);
  counters_.lz4_in.fetch_add(tally.lz4.in, std::memory_order_relaxed);
  counters_.lz4_out.fetch_add(tally.lz4.out, std::memory_order_relaxed);
  counters_.zstd_in.fetch_add(tally.zstd.in, std::memory_order_relaxed);
  counters_.zstd_out.fetch_add(tally.zstd.out, std::memory_order_relaxed);
  return compressed;
}

PutPageResult RocksdbPageStore::PutOne(const PutPage& page, Durability level,
                                       MonotonicTime deadline, PutScratch* scratch) {
  PutPageResult result;
  const PageRecordMeta& meta = page.meta;
  result.status = ValidatePutPage(page);
  if (!result.status.ok()) return result;

  const auto is_present = [&] {
    const std::optional<IndexedPage> held = index_.Find(meta.key);
    if (!held.has_value() || held->quarantined) return false;
    index_.Touch({&meta.key, 1}, /*read=*/false);
    result.already_present = true;
    result.checksum = held->checksum;
    return true;
  };
  if (is_present()) return result;
  const std::span<const std::byte> stored = Compress(page.body, &scratch->encoder);
  const std::string header = stored.size() == page.body.size()
                                 ? EncodePageRecordHeader(meta)
                                 : EncodeCompressedRecordHeader(meta, stored.size());
  const uint64_t record_bytes = header.size() + stored.size();
  // Without the key's lock: reclaim takes it, to drop what is quarantined under this key.
  absl::StatusOr<PutRoom> room = WaitForRoom(record_bytes, level, deadline);
  if (!room.ok()) {
    counters_.pages_refused.fetch_add(1, std::memory_order_relaxed);
    result.status = room.status();
    return result;
  }
  PT_FAILPOINT("put.admitted");
  const KeyedLock::Hold hold(&keys_, {PageLock(meta.key)}, deadline);
  result.status = hold.status();
  if (!result.status.ok()) return result;
  if (is_present()) return result;  // another was faster
  auto range = segments_->Reserve(record_bytes);
  if (!range.ok()) {
    result.status = range.status();
    return result;
  }
  room->capacity.End();
  PT_FAILPOINT("put.before_body");
  const absl::Status written = range->segment->file->WriteAt(
      range->offset, std::as_bytes(std::span(header.data(), header.size())), stored);
  if (!written.ok()) {
    segments_->Abandon(*range);
    result.status = absl::IsResourceExhausted(written)
                        ? StoreFullError(written.message(), record_bytes, 0)
                        : written;
    return result;
  }
  PT_FAILPOINT("put.before_index");
  segments_->Commit(*range);
  PT_FAILPOINT("put.committed");
  PagePlace place{range->segment, range->offset, static_cast<uint32_t>(header.size()),
                  page.body.size(), stored.size()};
  std::string child_row;
  if (!page.tokens.empty()) {
    child_row = StoreDatabase::ChildRow(*meta.parent, meta.fingerprint, page.tokens);
  }
  const absl::Status indexed = db_->PutPage(meta.key, header, place.segment->id, place.offset,
                                            /*quarantined=*/false, child_row);
  if (!indexed.ok()) {
    range->segment->live_bytes.fetch_sub(SegmentFiles::Footprint(record_bytes),
                                         std::memory_order_relaxed);
    result.status = Fail(indexed);
    return result;
  }
  index_.Publish(meta, place, /*quarantined=*/false);
  PT_FAILPOINT("put.done");
  counters_.pages_put.fetch_add(1, std::memory_order_relaxed);
  counters_.bytes_put.fetch_add(page.body.size(), std::memory_order_relaxed);
  result.checksum = meta.checksum;
  return result;
}

std::vector<PutPageResult> RocksdbPageStore::PutPages(std::span<const PutPage> pages,
                                                      Durability level, MonotonicTime deadline) {
  std::vector<PutPageResult> results(pages.size());
  PutScratch scratch{PageBodyEncoder(options_.compression)};
  for (size_t i = 0; i < pages.size(); ++i) {
    results[i].status = CheckNotFailed();
    if (results[i].status.ok() && deadline <= options_.clock->MonotonicNow()) {
      results[i].status = DeadlineError("put page");
    }
    if (results[i].status.ok()) results[i] = PutOne(pages[i], level, deadline, &scratch);
  }
  if (level != Durability::kLocal ||
      std::none_of(results.begin(), results.end(),
                   [](const PutPageResult& r) { return r.status.ok(); })) {
    return results;
  }
  const absl::Status durable = Barrier(level, deadline);
  if (durable.ok()) return results;
  for (PutPageResult& result : results) {
    if (result.status.ok()) result.status = durable;
  }
  return results;
}

void RocksdbPageStore::QuarantineAt(const PageKey& key, const PagePlace& place,
                                    const absl::Status& cause) {
  const KeyedLock::Hold hold(&keys_, {PageLock(key)});
  if (!index_.Quarantine(key, place)) return;
  counters_.pages_quarantined.fetch_add(1, std::memory_order_relaxed);
  LogWarning("store", "page quarantined: ", cause.message());
  // If the flag cannot be written, the next reader finds the damage again.
  if (const absl::Status s = db_->MarkQuarantined(key); !s.ok()) {
    LogWarning("store", "quarantine not recorded: ", s.ToString());
  }
}

absl::Status RocksdbPageStore::ReadRecordAt(const PageKey& key, const PagePlace& place,
                                            std::string* header, std::span<std::byte> stored) {
  header->resize(place.header_bytes);
  PT_ASSIGN_OR_RETURN(
      const uint64_t read,
      place.segment->file->ReadAt(
          place.offset, std::as_writable_bytes(std::span(header->data(), header->size())), stored));
  if (read == place.record_bytes()) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat("page record of ", key.digest.ToShortHex(), ": ", read,
                                          " of ", place.record_bytes(), " bytes"));
}

GetPageResult RocksdbPageStore::GetOne(const GetPage& page, GetScratch* scratch) {
  GetPageResult result;
  const std::optional<IndexedPage> held = index_.Find(page.key);
  if (!held.has_value()) return result;
  if (held->quarantined) {
    result.outcome = GetOutcome::kQuarantined;
    return result;
  }
  if (page.expected.has_value() && *page.expected != held->checksum) return result;
  const PagePlace& place = held->place;
  if (page.body.size() != place.body_bytes) {
    result.status = absl::InvalidArgumentError(
        absl::StrCat("get page ", page.key.digest.ToShortHex(), ": buffer of ", page.body.size(),
                     " bytes, the page has ", place.body_bytes));
    return result;
  }
  std::span<std::byte> stored = page.body;
  if (place.is_compressed()) {
    scratch->stored.resize(place.stored_bytes);
    stored = scratch->stored;
  }
  absl::Status verified = ReadRecordAt(page.key, place, &scratch->header, stored);
  if (!verified.ok() && !absl::IsDataLoss(verified)) {
    result.status = verified;
    return result;
  }
  if (verified.ok() && !place.is_compressed()) {
    verified = VerifyPageRecord(scratch->header, stored, page.key, held->checksum);
  } else if (verified.ok()) {
    const MonotonicTime start = options_.clock->MonotonicNow();
    verified = UnpackPageRecord(scratch->header, stored, page.key, held->checksum, page.body,
                                &scratch->decoder);
    counters_.decompress_ns.fetch_add(
        absl::ToInt64Nanoseconds(options_.clock->MonotonicNow() - start),
        std::memory_order_relaxed);
    counters_.decompressed_bytes.fetch_add(place.body_bytes, std::memory_order_relaxed);
  }
  if (!verified.ok()) {
    QuarantineAt(page.key, place, verified);
    result.outcome = GetOutcome::kQuarantined;
    return result;
  }
  result.outcome = GetOutcome::kHit;
  result.checksum = held->checksum;
  return result;
}

std::vector<GetPageResult> RocksdbPageStore::GetPages(std::span<const GetPage> pages,
                                                      MonotonicTime deadline) {
  std::vector<GetPageResult> results(pages.size());
  std::vector<PageKey> hits;
  GetScratch scratch;
  for (size_t i = 0; i < pages.size(); ++i) {
    if (deadline <= options_.clock->MonotonicNow()) {
      results[i].status = DeadlineError("get page");
      continue;
    }
    results[i] = GetOne(pages[i], &scratch);
    if (!results[i].status.ok()) continue;
    if (results[i].outcome == GetOutcome::kHit) {
      hits.push_back(pages[i].key);
      counters_.pages_got.fetch_add(1, std::memory_order_relaxed);
      counters_.bytes_got.fetch_add(pages[i].body.size(), std::memory_order_relaxed);
    } else {
      counters_.pages_missed.fetch_add(1, std::memory_order_relaxed);
    }
  }
  if (!hits.empty()) {
    counters_.bytes_put_at_hit.store(counters_.bytes_put.load(std::memory_order_relaxed),
                                     std::memory_order_relaxed);
  }
  index_.Touch(hits, /*read=*/true);
  return results;
}

absl::StatusOr<std::vector<LookupResult>> RocksdbPageStore::LookupPages(
    std::span<const PageKey> keys, MonotonicTime deadline) {
  std::vector<LookupResult> results(keys.size());
  for (size_t i = 0; i < keys.size(); ++i) {
    const std::optional<IndexedPage> held = index_.Find(keys[i]);
    if (!held.has_value()) continue;
    results[i].present = !held->quarantined;
    results[i].quarantined = held->quarantined;
    results[i].checksum = held->checksum;
    results[i].body_bytes = held->place.body_bytes;
  }
  return results;
}

absl::StatusOr<uint64_t> RocksdbPageStore::DeletePages(std::span<const PageKey> keys,
                                                       MonotonicTime deadline) {
  uint64_t deleted = 0;
  if (MayDropNothing()) return deleted;
  for (const PageKey& key : keys) {
    PT_RETURN_IF_ERROR(CheckNotFailed());
    if (deadline <= options_.clock->MonotonicNow()) return DeadlineError("delete pages");
    const KeyedLock::Hold hold(&keys_, {PageLock(key)}, deadline);
    PT_RETURN_IF_ERROR(hold.status());
    if (!index_.Erase(key).has_value()) continue;
    if (const absl::Status s = db_->DeletePage(key); !s.ok()) return Fail(s);
    ++deleted;
  }
  return deleted;
}

absl::StatusOr<std::vector<PartialResult>> RocksdbPageStore::FindPartialPages(
    std::span<const PartialQuery> queries, MonotonicTime deadline) {
  std::vector<PartialResult> results(queries.size());
  for (size_t i = 0; i < queries.size(); ++i) {
    const PartialQuery& query = queries[i];
    if (deadline <= options_.clock->MonotonicNow()) return DeadlineError("find partial pages");
    PT_ASSIGN_OR_RETURN(std::vector<StoreDatabase::Child> neighbours,
                        db_->FindNeighbours(query.parent, query.fingerprint, query.tokens,
                                            [this](const PageKey& key) {
                                              const auto page = index_.Find(key);
                                              return page.has_value() && !page->quarantined;
                                            }));
    for (StoreDatabase::Child& child : neighbours) {
      const uint64_t common =
          static_cast<uint64_t>(std::mismatch(child.tokens.begin(), child.tokens.end(),
                                              query.tokens.begin(), query.tokens.end())
                                    .first -
                                child.tokens.begin());
      const std::optional<IndexedPage> page = index_.Find(child.key);
      if (common <= results[i].common_tokens || !page.has_value()) continue;
      results[i] = {common, child.key, page->checksum, page->place.body_bytes,
                    std::move(child.tokens)};
    }
  }
  return results;
}

absl::StatusOr<std::vector<PageKey>> RocksdbPageStore::SetRetention(
    std::span<const PageKey> keys, const Retention& retention,
    const std::optional<WriteFence>& fence, MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(CheckNotFailed());
  PT_RETURN_IF_ERROR(ValidateRetention(retention, options_.clock->WallNow()));
  // Held to the end: a takeover that was answered has no write of the epoch before behind it.
  std::vector<std::string> locks;
  if (fence.has_value()) locks.push_back(RecordLock("owner", fence->ownership_key));
  const KeyedLock::Hold hold(&keys_, std::move(locks), deadline);
  PT_RETURN_IF_ERROR(hold.status());
  PT_RETURN_IF_ERROR(CheckFence(fence));
  // What lets pages go is never refused: it is how room is made.
  RoomLedger::Hold room;
  if (retention.pinned_until.has_value() || retention.priority > kDefaultPriority) {
    PT_ASSIGN_OR_RETURN(room, HoldIndexRoom("set retention", keys.size() * kRetentionRowBytes));
  }
  // From here on pinned pages are protected, whatever becomes of the call: at worst too long.
  std::vector<PageKey> set;
  std::vector<PageKey> missing;
  for (const PageKey& key : keys) {
    (index_.SetRetention(key, retention, absl::ZeroDuration()) ? set : missing).push_back(key);
  }
  if (set.empty()) return missing;
  if (retention.pinned_until.has_value()) {
    PT_RETURN_IF_ERROR(Barrier(Durability::kLocal, deadline));
  }
  // Not under the keys' locks: a page that was quarantined and dropped meanwhile leaves a retention
  // without a page, which the next opening drops.
  const absl::Status written =
      db_->PutRetention(set, retention, /*sync=*/retention.pinned_until.has_value());
  if (!written.ok()) return Fail(written);
  return missing;
}

// ---- records and leases ------------------------------------------------------------------------

absl::Status RocksdbPageStore::CheckFence(const std::optional<WriteFence>& fence) const {
  if (!fence.has_value() || PT_BUG_IS_PLANTED("no_epoch_check")) return absl::OkStatus();
  PT_ASSIGN_OR_RETURN(const StoreRecord owner, ReadRecord("owner", fence->ownership_key));
  if (owner.version == fence->epoch) return absl::OkStatus();
  return StaleEpochError(absl::StrCat("owner of ", fence->ownership_key), owner.version,
                         fence->epoch);
}

absl::StatusOr<StoreRecord> RocksdbPageStore::ReadRecord(absl::string_view kind,
                                                         absl::string_view key) const {
  StoreRecord record;
  record.key = std::string(key);
  PT_ASSIGN_OR_RETURN(const std::optional<std::string> bytes,
                      db_->Get(Table::kRecords, RecordRow(kind, key)));
  if (!bytes.has_value()) return record;
  LittleEndianReader in(*bytes);
  record.version = in.Take<uint64_t>();
  if (!in.ok()) return absl::DataLossError(absl::StrCat("record ", kind, "/", key, ": too short"));
  record.value = std::string(in.rest());
  return record;
}

absl::StatusOr<uint64_t> RocksdbPageStore::CompareAndSetRecord(
    absl::string_view kind, absl::string_view key, uint64_t expected_version,
    std::optional<absl::string_view> value, MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(CheckStoreName("record kind", kind));
  PT_RETURN_IF_ERROR(CheckStoreName("record key", key));
  if (value.has_value() && value->size() > kMaxRecordValueBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("record value has ", value->size(), " bytes, at most ", kMaxRecordValueBytes));
  }
  PT_RETURN_IF_ERROR(CheckNotFailed());
  const KeyedLock::Hold hold(&keys_, {RecordLock(kind, key)}, deadline);
  PT_RETURN_IF_ERROR(hold.status());
  PT_ASSIGN_OR_RETURN(const StoreRecord current, ReadRecord(kind, key));
  if (current.version != expected_version) {
    return VersionMismatchError(absl::StrCat("record ", kind, "/", key), current.version,
                                expected_version);
  }
  const uint64_t version = expected_version + 1;
  absl::Status written;
  RoomLedger::Hold room;
  if (value.has_value()) {
    PT_ASSIGN_OR_RETURN(room, HoldIndexRoom(absl::StrCat("write record ", kind, "/", key),
                                            kind.size() + key.size() + value->size()));
    std::string bytes;
    AppendLittleEndian<uint64_t>(&bytes, version);
    bytes.append(value->data(), value->size());
    written = db_->PutSynced(Table::kRecords, RecordRow(kind, key), bytes);
  } else {
    written = db_->DeleteSynced(Table::kRecords, RecordRow(kind, key));
  }
  if (!written.ok()) return Fail(written);
  return version;
}

absl::StatusOr<StoreRecord> RocksdbPageStore::GetRecord(absl::string_view kind,
                                                        absl::string_view key,
                                                        MonotonicTime deadline) {
  PT_ASSIGN_OR_RETURN(StoreRecord record, ReadRecord(kind, key));
  if (record.version == 0) return absl::NotFoundError(absl::StrCat("record ", kind, "/", key));
  return record;
}

absl::StatusOr<std::vector<StoreRecord>> RocksdbPageStore::ListRecords(absl::string_view kind,
                                                                       absl::string_view key_prefix,
                                                                       absl::string_view after,
                                                                       size_t limit,
                                                                       MonotonicTime deadline) {
  std::vector<StoreRecord> records;
  if (limit == 0) return records;
  const std::string kind_prefix = RecordRow(kind, "");
  PT_RETURN_IF_ERROR(db_->Scan(Table::kRecords, RecordRow(kind, key_prefix),
                               after.empty() ? "" : RecordRow(kind, after),
                               [&](absl::string_view row, absl::string_view value) {
                                 LittleEndianReader in(value);
                                 StoreRecord record;
                                 record.key = std::string(row.substr(kind_prefix.size()));
                                 record.version = in.Take<uint64_t>();
                                 record.value = std::string(in.rest());
                                 if (in.ok()) records.push_back(std::move(record));
                                 return records.size() < limit;
                               }));
  return records;
}

absl::StatusOr<StoreLease> RocksdbPageStore::AcquireLease(absl::string_view name,
                                                          uint64_t incarnation, absl::Duration ttl,
                                                          MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(CheckNotFailed());
  const KeyedLock::Hold hold(&keys_, {absl::StrCat("l", name)}, deadline);
  PT_RETURN_IF_ERROR(hold.status());
  PT_ASSIGN_OR_RETURN(const StoreLease lease, leases_.Propose(name, incarnation, ttl));
  PT_ASSIGN_OR_RETURN(const RoomLedger::Hold room,
                      HoldIndexRoom(absl::StrCat("acquire lease ", name), name.size()));
  std::string value;
  AppendLittleEndian<uint64_t>(&value, lease.incarnation);
  AppendLittleEndian<uint64_t>(&value, lease.epoch);
  AppendLittleEndian<uint64_t>(&value, static_cast<uint64_t>(absl::ToInt64Nanoseconds(ttl)));
  if (const absl::Status s = db_->PutSynced(Table::kLeases, name, value); !s.ok()) return Fail(s);
  leases_.Grant(lease, ttl);
  return lease;
}

absl::Status RocksdbPageStore::RenewLease(const StoreLease& lease, absl::Duration ttl,
                                          MonotonicTime deadline) {
  return leases_.Renew(lease, ttl);
}

absl::Status RocksdbPageStore::ReleaseLease(const StoreLease& lease, MonotonicTime deadline) {
  return leases_.Release(lease);
}

// ---- residency and statistics ------------------------------------------------------------------

absl::Status RocksdbPageStore::Watch(const WatchCallback& on_events, MonotonicTime deadline) {
  return FollowResidency(
      index_.feed(), options_.clock, deadline,
      [this](uint64_t* next_number) { return index_.Snapshot(next_number); }, on_events);
}

absl::StatusOr<StoreStats> RocksdbPageStore::GetStats(MonotonicTime deadline) {
  const PageIndex::Totals totals = index_.totals();
  StoreStats stats;
  stats.pages = totals.pages;
  stats.logical_bytes = totals.logical_bytes;
  stats.stored_bytes = totals.stored_bytes;
  stats.pages_ever_read = totals.pages_ever_read;
  stats.physical_bytes = PhysicalBytes();
  stats.capacity_bytes = options_.capacity_bytes;
  stats.pages_put = counters_.pages_put.load(std::memory_order_relaxed);
  stats.pages_got = counters_.pages_got.load(std::memory_order_relaxed);
  stats.pages_missed = counters_.pages_missed.load(std::memory_order_relaxed);
  stats.pages_evicted = counters_.pages_evicted.load(std::memory_order_relaxed);
  stats.pages_quarantined = counters_.pages_quarantined.load(std::memory_order_relaxed);
  stats.bytes_put = counters_.bytes_put.load(std::memory_order_relaxed);
  stats.bytes_got = counters_.bytes_got.load(std::memory_order_relaxed);
  stats.manifests = counters_.manifests.load(std::memory_order_relaxed);
  stats.manifests_expired = counters_.manifests_expired.load(std::memory_order_relaxed);
  stats.protected_pages = totals.protected_pages;
  stats.protected_bytes = totals.protected_bytes;
  stats.bytes_ever_read = totals.bytes_ever_read;
  stats.bytes_evicted = counters_.bytes_evicted.load(std::memory_order_relaxed);
  stats.pages_refused = counters_.pages_refused.load(std::memory_order_relaxed);
  stats.pages_scrubbed = counters_.pages_scrubbed.load(std::memory_order_relaxed);
  const auto count = [](const auto& counter) { return counter.load(std::memory_order_relaxed); };
  stats.codec_bytes.raw = {count(counters_.raw_in), count(counters_.raw_in)};
  stats.codec_bytes.lz4 = {count(counters_.lz4_in), count(counters_.lz4_out)};
  stats.codec_bytes.zstd = {count(counters_.zstd_in), count(counters_.zstd_out)};
  stats.decompressed_bytes = count(counters_.decompressed_bytes);
  stats.compress_time = absl::Nanoseconds(count(counters_.compress_ns));
  stats.decompress_time = absl::Nanoseconds(count(counters_.decompress_ns));
  stats.bytes_put_since_hit =
      stats.bytes_put - counters_.bytes_put_at_hit.load(std::memory_order_relaxed);
  stats.efficacy_alarm = options_.efficacy_alarm_bytes != 0 &&
                         stats.bytes_put_since_hit >= options_.efficacy_alarm_bytes;
  if (const auto free = options_.file_system->FreeBytes(options_.dir); free.ok()) {
    stats.disk_free_bytes = *free;
  }
  stats.engine = "rocksdb+segments";
  if (!CheckNotFailed().ok()) {
    stats.state = "failed";
  } else if (full_.load(std::memory_order_relaxed)) {
    stats.state = "full";
  }
  return stats;
}

}  // namespace pagetide
