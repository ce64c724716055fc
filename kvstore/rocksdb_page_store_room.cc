// Room of RocksdbPageStore: what a write asks before it takes any of the disk or of the capacity.
#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kvstore/rocksdb_page_store.h"
#include "kvstore/store_errors.h"

namespace pagetide {

// What a put leaves free beside its own room: a segment for the survivors of reclaim, and a part of
// one for the index, which writes new files before it drops the old ones.
uint64_t RocksdbPageStore::Slack() const {
  return segment_bytes_ + segment_bytes_ / 4;
}
// Reclaim starts above the high water and goes down to the low one, so that puts rarely wait. Puts
// need their slack, hence the second terms.
uint64_t RocksdbPageStore::HighWater() const {
  return std::min(options_.capacity_bytes / 16 * 15,
                  options_.capacity_bytes - Slack() - segment_bytes_ / 2);
}
uint64_t RocksdbPageStore::LowWater() const {
  return std::min(options_.capacity_bytes / 16 * 14,
                  options_.capacity_bytes - Slack() - segment_bytes_);
}

void RocksdbPageStore::MeasureIndex() {
  index_bytes_.store(db_->PhysicalBytes(), std::memory_order_relaxed);
}

uint64_t RocksdbPageStore::ReclaimReserve() const {
  return std::max(options_.min_free_bytes / 4, kLastFreeBytes);
}

absl::StatusOr<RoomLedger::Hold> RocksdbPageStore::HoldDiskRoom(absl::string_view what,
                                                                uint64_t reserve, uint64_t bytes) {
  const uint64_t mark = disk_ledger_.Mark();
  PT_ASSIGN_OR_RETURN(const uint64_t free, options_.file_system->FreeBytes(options_.dir));
  std::optional<RoomLedger::Hold> hold;
  if (free >= reserve) hold = disk_ledger_.TryHold(bytes, free - reserve, mark);
  if (hold.has_value()) return *std::move(hold);
  return StoreFullError(absl::StrCat(what, ": disk"),
                        reserve + disk_ledger_.Outstanding(mark) + bytes, free);
}

absl::StatusOr<RoomLedger::Hold> RocksdbPageStore::HoldIndexRoom(absl::string_view what,
                                                                 uint64_t bytes) {
  absl::StatusOr<RoomLedger::Hold> hold = HoldDiskRoom(what, kLastFreeBytes, 2 * bytes);
  if (absl::IsResourceExhausted(hold.status())) full_.store(true, std::memory_order_relaxed);
  return hold;
}

absl::StatusOr<RocksdbPageStore::PutRoom> RocksdbPageStore::TryHoldPutRoom(uint64_t bytes) {
  PutRoom room;
  PT_ASSIGN_OR_RETURN(room.disk, HoldDiskRoom("put page", options_.min_free_bytes, bytes));
  if (options_.capacity_bytes == 0) return room;
  const uint64_t mark = capacity_ledger_.Mark();
  // The slack stays free, or reclaim itself could not go on.
  const uint64_t used = PhysicalBytes() + Slack();
  const uint64_t left = options_.capacity_bytes > used ? options_.capacity_bytes - used : 0;
  std::optional<RoomLedger::Hold> hold = capacity_ledger_.TryHold(bytes, left, mark);
  if (!hold.has_value()) {
    return StoreFullError("put page: capacity", capacity_ledger_.Outstanding(mark) + bytes, left);
  }
  room.capacity = *std::move(hold);
  return room;
}

absl::StatusOr<RocksdbPageStore::PutRoom> RocksdbPageStore::WaitForRoom(uint64_t bytes,
                                                                        Durability level,
                                                                        MonotonicTime deadline) {
  // In a store that is full what may be lost is dropped at once; a save waits for its room.
  const bool is_dropped = level == Durability::kCache && full_.load(std::memory_order_relaxed);
  const MonotonicTime give_up =
      std::min(deadline, options_.clock->MonotonicNow() +
                             (is_dropped ? absl::ZeroDuration() : options_.put_wait));
  if (options_.capacity_bytes != 0 && PhysicalBytes() + bytes > HighWater()) {
    MeasureIndex();  // here a few hundred kilobytes count, and upkeep may be long at work
    MutexLock lock(&upkeep_mu_);
    room_wanted_ = true;
    upkeep_wake_.SignalAll();
  }
  std::optional<uint64_t> reclaims_seen;
  for (;;) {
    absl::StatusOr<PutRoom> room = TryHoldPutRoom(bytes);
    if (room.ok()) full_.store(false, std::memory_order_relaxed);
    if (!absl::IsResourceExhausted(room.status())) return room;
    MutexLock lock(&upkeep_mu_);
    if (!reclaims_seen.has_value()) reclaims_seen = reclaims_done_;
    const absl::Duration left = give_up - options_.clock->MonotonicNow();
    // Also for who cannot wait: the next one finds room then.
    room_wanted_ = true;
    wanted_bytes_ = std::max(wanted_bytes_, bytes);
    upkeep_wake_.SignalAll();
    // Two rounds of reclaim that made no room: everything that is left is protected.
    if (left <= absl::ZeroDuration() || reclaims_done_ >= *reclaims_seen + 2 || stopping_) {
      full_.store(true, std::memory_order_relaxed);
      return room;
    }
    room_made_.WaitWithTimeout(&upkeep_mu_, left);
  }
}

uint64_t RocksdbPageStore::ReclaimTarget(uint64_t wanted) const {
  const uint64_t target =
      options_.capacity_bytes != 0 ? LowWater() : std::numeric_limits<uint64_t>::max();
  if (wanted == 0) return target;
  const uint64_t mark = disk_ledger_.Mark();
  const absl::StatusOr<uint64_t> free = options_.file_system->FreeBytes(options_.dir);
  if (!free.ok()) return target;  // the put that wants them says so
  const uint64_t needed = options_.min_free_bytes + disk_ledger_.Outstanding(mark) + wanted;
  if (*free >= needed) return target;
  // No more at once than the put and a segment, whatever is lacking: where somebody else fills the
  // disk, one refused put must not cost all that is held. Half a segment beyond, so that not every
  // put has to wait.
  const uint64_t step = std::min(needed - *free, wanted + segment_bytes_) + segment_bytes_ / 2;
  const uint64_t physical = PhysicalBytes();
  return std::min(target, physical > step ? physical - step : 0);
}

bool RocksdbPageStore::HasRoomAgain() const {
  const auto free = options_.file_system->FreeBytes(options_.dir);
  return free.ok() && *free >= options_.min_free_bytes &&
         (options_.capacity_bytes == 0 || PhysicalBytes() <= HighWater());
}

}  // namespace pagetide
