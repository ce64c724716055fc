// Upkeep of RocksdbPageStore: eviction, emptying of segments, scrub.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "kvstore/rocksdb_page_store.h"
#include "kvstore/store_errors.h"
#include "kvstore/store_lock_keys.h"

namespace pagetide {

void RocksdbPageStore::WaitForUpkeep() {
  MutexLock lock(&upkeep_mu_);
  // A round that runs now may have begun before what the caller did.
  for (const uint64_t target = upkeep_rounds_ + 2; upkeep_rounds_ < target && !stopping_;) {
    room_wanted_ = true;
    upkeep_wake_.SignalAll();
    room_made_.WaitWithTimeout(&upkeep_mu_, absl::Seconds(1));
  }
}

void RocksdbPageStore::RunUpkeep(MonotonicTime opened) {
  MonotonicTime next_access = opened + options_.access_period;
  MonotonicTime next_mark = opened + options_.mark_period;
  for (bool stop = false; !stop;) {
    uint64_t wanted_bytes = 0;
    {
      MutexLock lock(&upkeep_mu_);
      if (!stopping_ && !room_wanted_) upkeep_wake_.WaitWithTimeout(&upkeep_mu_, absl::Seconds(1));
      stop = stopping_;
      room_wanted_ = false;
      wanted_bytes = std::exchange(wanted_bytes_, 0);
    }
    MeasureIndex();
    index_.ApplyExpiries();
    if (full_.load(std::memory_order_relaxed) && HasRoomAgain()) {
      full_.store(false, std::memory_order_relaxed);
    }
    if (!stop && CheckNotFailed().ok()) {
      const absl::Status s = RemoveExpiredManifests();
      if (!s.ok()) LogWarning("store", "expired manifests: ", s.ToString());
    }
    const uint64_t target = ReclaimTarget(wanted_bytes);
    if (!stop && PhysicalBytes() > target && CheckNotFailed().ok()) {
      const auto reclaimed = ReclaimTo(target);
      if (!reclaimed.ok()) LogWarning("store", "reclaim: ", reclaimed.status().ToString());
    }
    {
      MutexLock lock(&upkeep_mu_);
      ++reclaims_done_;
    }
    room_made_.SignalAll();
    if (stop || next_access <= options_.clock->MonotonicNow()) {
      WriteAccessOrder();
      if (!stop) MakePutsDurable();
      next_access = options_.clock->MonotonicNow() + options_.access_period;
    }
    if (stop || next_mark <= options_.clock->MonotonicNow()) {
      MarkLog();
      next_mark = options_.clock->MonotonicNow() + options_.mark_period;
    }
    {
      MutexLock lock(&upkeep_mu_);
      ++upkeep_rounds_;
    }
    room_made_.SignalAll();
  }
}

void RocksdbPageStore::MakePutsDurable() {
  const uint64_t put = counters_.pages_put.load(std::memory_order_relaxed);
  if (put == durable_puts_ || !CheckNotFailed().ok()) return;
  const absl::Status s = Barrier(Durability::kLocal, MonotonicTime::InfiniteFuture());
  if (s.ok()) durable_puts_ = put;  // a failed store has said so already
}

void RocksdbPageStore::MarkLog() {
  const uint64_t writes = db_->num_synced_writes();
  if (writes == marked_writes_ || !CheckNotFailed().ok()) return;
  const Mark mark{next_mark_, options_.clock->WallNow()};
  if (const absl::Status s = db_->PutMark(mark); !s.ok()) {
    Fail(s).IgnoreError();
    return;
  }
  // From here on the number is taken: a file that is ahead of the index would refuse the opening.
  ++next_mark_;
  // Without it a later damage may not be found; what is acknowledged is no less durable.
  if (const absl::Status s = log_mark_->Write(mark); !s.ok()) {
    LogWarning("store", "how far the log is durable was not recorded: ", s.ToString());
    return;
  }
  marked_writes_ = writes + 1;
}

void RocksdbPageStore::WriteAccessOrder() {
  constexpr size_t kMaxAtOnce = 1 << 16;
  if (!CheckNotFailed().ok()) return;
  const auto accesses = index_.AccessedSince(access_written_, kMaxAtOnce);
  if (accesses.empty()) return;
  const absl::Status s = db_->WriteAccessNumbers(accesses);
  if (!s.ok()) {
    LogWarning("store", "access order not written: ", s.ToString());
    return;
  }
  access_written_ = accesses.front().second;
}

uint64_t RocksdbPageStore::EvictPages(uint64_t bytes) {
  uint64_t freed = 0;
  if (MayDropNothing()) return freed;
  // Without a capacity the disk is the bound, and what is held is what fits.
  const uint64_t capacity =
      options_.capacity_bytes != 0 ? options_.capacity_bytes : PhysicalBytes();
  const PageIndex::Grace grace{capacity / 8, options_.put_grace};
  for (const PageKey& key : index_.PickVictims(bytes, grace)) {
    const KeyedLock::Hold hold(&keys_, {PageLock(key)});
    const std::optional<PagePlace> place = index_.Erase(key);
    if (!place.has_value()) continue;  // protected or gone in the meantime
    if (const absl::Status s = db_->DeletePage(key); !s.ok()) {
      Fail(s).IgnoreError();
      return freed;
    }
    freed += SegmentFiles::Footprint(place->record_bytes());
    counters_.bytes_evicted.fetch_add(place->body_bytes, std::memory_order_relaxed);
    counters_.pages_evicted.fetch_add(1, std::memory_order_relaxed);
  }
  return freed;
}

absl::StatusOr<RoomLedger::Hold> RocksdbPageStore::HoldRoomToEmpty(const Segment& segment) {
  const uint64_t live = segment.live_bytes.load(std::memory_order_relaxed);
  if (live == 0) return RoomLedger::Hold();  // nothing to copy
  return HoldDiskRoom(absl::StrCat("empty segment ", segment.id), ReclaimReserve(), live);
}

absl::StatusOr<bool> RocksdbPageStore::EmptySegment(const std::shared_ptr<Segment>& segment) {
  struct Move {
    PageKey key;
    PagePlace from;
    SegmentFiles::Range range;
    std::string header;
  };
  std::vector<Move> moves;
  // Why something has to stay, so that the file does; what was copied moves all the same.
  absl::Status stays;
  std::vector<std::byte> body;  // as stored: a move packs and unpacks nothing
  PageBodyDecoder decoder;
  absl::Status status;
  for (const PageKey& key : index_.KeysIn(segment->id)) {
    const std::optional<IndexedPage> page = index_.Find(key);
    if (!page.has_value() || page->place.segment != segment) continue;
    const PagePlace& place = page->place;
    Move move{key, place, {}, {}};
    body.resize(place.stored_bytes);
    absl::Status verified = ReadRecordAt(key, place, &move.header, body);
    if (!verified.ok() && !absl::IsDataLoss(verified)) {
      stays.Update(verified);  // not damage: the disk may read it another time
      continue;
    }
    if (verified.ok()) {
      verified = VerifyPageRecord(move.header, body, key, page->checksum, &decoder);
    }
    if (!verified.ok()) {
      // Damaged: its bytes are of no use to anybody. A manifest that names it reads a miss.
      QuarantineAt(key, place, verified);
      const KeyedLock::Hold hold(&keys_, {PageLock(key)});
      if (index_.EraseQuarantined(key, place)) status = db_->DeletePage(key);
      if (!status.ok()) break;
      continue;
    }
    auto range = segments_->Reserve(place.record_bytes());
    if (!range.ok()) {
      stays.Update(range.status());
      break;
    }
    move.range = *std::move(range);
    const absl::Status written = move.range.segment->file->WriteAt(
        move.range.offset, std::as_bytes(std::span(move.header.data(), move.header.size())), body);
    if (!written.ok()) {
      segments_->Abandon(move.range);
      stays.Update(written);
      break;
    }
    segments_->Commit(move.range);
    moves.push_back(std::move(move));
  }
  // Bodies first, then the entries that point to them, then the end of the old place: at each
  // moment a power cut leaves an entry whose record is whole.
  if (status.ok()) status = Barrier(Durability::kLocal, MonotonicTime::InfiniteFuture());
  for (const Move& move : moves) {
    const PagePlace to{move.range.segment, move.range.offset, move.from.header_bytes,
                       move.from.body_bytes, move.from.stored_bytes};
    bool moved = false;
    if (status.ok()) {
      const KeyedLock::Hold hold(&keys_, {PageLock(move.key)});
      const std::optional<IndexedPage> now = index_.Find(move.key);
      if (now.has_value() && now->place.SameAs(move.from)) {
        status = db_->PutPage(move.key, move.header, to.segment->id, to.offset, now->quarantined);
        moved = status.ok() && index_.Relocate(move.key, move.from, to);
        if (!status.ok()) Fail(status).IgnoreError();
      }
    }
    if (!moved) {
      to.segment->live_bytes.fetch_sub(SegmentFiles::Footprint(to.record_bytes()),
                                       std::memory_order_relaxed);
    }
  }
  PT_RETURN_IF_ERROR(status);
  if (!stays.ok()) {
    LogWarning("store", "segment ", segment->id, " cannot be emptied now: ", stays.ToString());
    return false;
  }
  // What the index does not know is not dead for that: the put of a record that is committed here
  // may be about to name it. None begins here any more, for the segment was no longer written to
  // when it was chosen.
  if (segment->live_bytes.load(std::memory_order_relaxed) != 0) return false;
  for (const PageKey& key : index_.KeysIn(segment->id)) {
    const std::optional<IndexedPage> page = index_.Find(key);
    if (page.has_value() && page->place.segment == segment) {
      return absl::InternalError(absl::StrCat("empty segment ", segment->id, ": page ",
                                              key.digest.ToShortHex(), " is still there"));
    }
  }
  PT_RETURN_IF_ERROR(Barrier(Durability::kLocal, MonotonicTime::InfiniteFuture()));
  PT_RETURN_IF_ERROR(segments_->Delete(segment->id));
  index_.ForgetSegment(segment->id);
  const SegmentFiles::DurableLength forgotten{segment->id, 0};
  PT_RETURN_IF_ERROR(db_->WriteDurableLengths({&forgotten, 1}));
  return true;
}

absl::StatusOr<uint64_t> RocksdbPageStore::ReclaimTo(uint64_t target) {
  MutexLock lock(&reclaim_mu_);
  const uint64_t before = segments_->TotalBytes();
  bool may_evict = true;
  absl::flat_hash_set<uint64_t> left_out;  // cannot be emptied in this round
  std::vector<uint64_t> without_room;  // of those; an eviction may leave less to copy, or nothing
  for (;;) {
    MeasureIndex();
    if (PhysicalBytes() <= target) break;
    uint64_t dead = 0;
    const std::shared_ptr<Segment> segment = segments_->MostDead(left_out, &dead);
    // Half dead: emptying it frees at least what it copies. With nothing left to evict, any gain
    // counts.
    if (segment != nullptr && (dead * 2 >= segments_->SizeOf(segment->id) ||
                               (!may_evict && dead >= segment_bytes_ / 8))) {
      const absl::StatusOr<RoomLedger::Hold> room = HoldRoomToEmpty(*segment);
      if (!room.ok()) {
        left_out.insert(segment->id);
        without_room.push_back(segment->id);
        continue;
      }
      PT_ASSIGN_OR_RETURN(const bool is_gone, EmptySegment(segment));
      if (!is_gone) left_out.insert(segment->id);
      continue;
    }
    if (!may_evict) break;
    may_evict = EvictPages(std::max<uint64_t>(segment_bytes_ / 4, 1)) > 0;
    if (may_evict) {
      for (const uint64_t id : without_room) left_out.erase(id);
      without_room.clear();
    }
    // The head may hold the dead bytes: end it, so that it can be chosen.
    if (!may_evict) segments_->SealHead(segment_bytes_ / 8);
  }
  const uint64_t after = segments_->TotalBytes();
  return before > after ? before - after : 0;
}

absl::StatusOr<uint64_t> RocksdbPageStore::Compact(MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(CheckNotFailed());
  MutexLock lock(&reclaim_mu_);
  const uint64_t before = segments_->TotalBytes();
  segments_->SealHead(/*min_dead_bytes=*/1);
  absl::flat_hash_set<uint64_t> left_out;
  absl::Status no_room;  // for the copies of some segment
  // As many steps as there are segments now, so that this ends under concurrent writes. What is
  // nine tenths live is not worth its copying.
  for (size_t left = segments_->All().size(); left > 0; --left) {
    if (deadline <= options_.clock->MonotonicNow()) break;
    uint64_t dead = 0;
    const std::shared_ptr<Segment> best = segments_->MostDead(left_out, &dead);
    if (best == nullptr || dead * 10 < segments_->SizeOf(best->id)) break;
    const absl::StatusOr<RoomLedger::Hold> room = HoldRoomToEmpty(*best);
    if (!room.ok()) {
      no_room.Update(room.status());
      left_out.insert(best->id);
      continue;
    }
    PT_ASSIGN_OR_RETURN(const bool is_gone, EmptySegment(best));
    if (!is_gone) left_out.insert(best->id);
  }
  const uint64_t after = segments_->TotalBytes();
  if (after >= before && !no_room.ok()) return no_room;
  return before > after ? before - after : 0;
}

absl::StatusOr<ScrubResult> RocksdbPageStore::Scrub(uint64_t max_pages, MonotonicTime deadline) {
  MutexLock scrub_lock(&scrub_mu_);
  // A bounded scrub goes on where the last one ended; one of all pages begins anew.
  if (max_pages == 0) scrub_cursor_.reset();
  ScrubResult result;
  uint64_t examined = 0;
  uint64_t unreadable = 0;
  absl::Status first_unread;
  bool round_ended = false;
  while (!round_ended && (max_pages == 0 || examined < max_pages)) {
    constexpr uint64_t kChunk = 1024;
    const uint64_t left = max_pages == 0 ? kChunk : max_pages - examined;
    PT_ASSIGN_OR_RETURN(const ScrubStep step, ScrubSome(std::min(kChunk, left), deadline));
    result.verified_pages += step.result.verified_pages;
    result.quarantined_pages += step.result.quarantined_pages;
    result.verified_bytes += step.result.verified_bytes;
    examined += step.result.verified_pages + step.unreadable_pages;
    unreadable += step.unreadable_pages;
    first_unread.Update(step.first_unread);
    round_ended = step.round_ended;
  }
  if (unreadable == 0) return result;
  return absl::Status(first_unread.code(),
                      absl::StrCat("scrub: ", unreadable, " of ", examined,
                                   " pages cannot be read, the first: ", first_unread.message()));
}

absl::StatusOr<RocksdbPageStore::ScrubStep> RocksdbPageStore::ScrubSome(uint64_t max_pages,
                                                                        MonotonicTime deadline) {
  ScrubStep step;
  std::vector<PageKey> keys;
  PT_RETURN_IF_ERROR(
      db_->ForEachPage(scrub_cursor_, [&](const PageKey& key, const StoreDatabase::StoredPage*) {
        keys.push_back(key);
        return keys.size() < max_pages;
      }));
  for (const PageKey& key : keys) {
    if (deadline <= options_.clock->MonotonicNow()) {
      return absl::DeadlineExceededError(
          absl::StrCat("scrub: deadline after ", step.result.verified_pages, " pages"));
    }
    scrub_cursor_ = key;  // also past a page that cannot be read: the others have their turn
    const std::optional<IndexedPage> page = index_.Find(key);
    if (!page.has_value() || page->quarantined) continue;
    const absl::Status verified = VerifyOnDisk(key, page->place, page->checksum);
    if (absl::IsDataLoss(verified) || absl::IsUnimplemented(verified)) {
      QuarantineAt(key, page->place, verified);
      ++step.result.quarantined_pages;
    } else if (!verified.ok()) {
      ++step.unreadable_pages;
      step.first_unread.Update(verified);
      continue;
    }
    ++step.result.verified_pages;
    counters_.pages_scrubbed.fetch_add(1, std::memory_order_relaxed);
    step.result.verified_bytes += page->place.body_bytes;
  }
  step.round_ended = keys.size() < max_pages;
  if (step.round_ended) scrub_cursor_.reset();
  return step;
}

void RocksdbPageStore::RunScrub(MonotonicTime opened) {
  MonotonicTime next = opened + absl::Seconds(1);
  MonotonicTime next_round = next;
  for (;;) {
    {
      MutexLock lock(&upkeep_mu_);
      while (!stopping_ && options_.clock->MonotonicNow() < next) {
        // By the second, because the store's clock may be another than the machine's.
        const absl::Duration left = next - options_.clock->MonotonicNow();
        scrub_wake_.WaitWithTimeout(&upkeep_mu_, std::min(left, absl::Seconds(1)));
      }
      if (stopping_) return;
    }
    const MonotonicTime began = options_.clock->MonotonicNow();
    if (began >= next_round) next_round = began + options_.scrub_period;
    absl::StatusOr<ScrubStep> step;
    {
      MutexLock lock(&scrub_mu_);
      // One page a step: pages may have a gibibyte.
      step = ScrubSome(1, MonotonicTime::InfiniteFuture());
    }
    const absl::Status trouble = step.ok() ? step->first_unread : step.status();
    if (!trouble.ok()) {
      LogWarning("store", "background scrub: ", trouble.ToString());
      next = began + absl::Minutes(1);
    } else if (step->round_ended) {
      next = next_round;
    } else {
      next = began + absl::Seconds(static_cast<double>(step->result.verified_bytes) /
                                   static_cast<double>(options_.scrub_bytes_per_second));
    }
  }
}

}  // namespace pagetide
