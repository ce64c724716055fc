// Frames: the line in which calls wait for them, and what makes room.
//
// Why nobody waits for ever: a call holds frames only once it is at the head of the line or past
// it. What is past it never waits for frames again, so its frames come back; reservations that idle
// do so when their lease ends. A waiting call that is not at the head holds nothing.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "worker/model_host_impl.h"

namespace pagetide {

bool ModelHostImpl::CanSpill() const {
  return store_ != nullptr && clock_->MonotonicNow() >= spill_again_at_;
}

bool ModelHostImpl::EvictFor(uint32_t group, uint32_t count,
                             absl::FunctionRef<bool(const Page&)> may_evict) {
  const uint32_t num_free = pages_.frames(group).num_free();
  if (num_free >= count) return true;
  const std::vector<PageId> victims =
      pages_.policy(group).PickVictims(count - num_free, [&](PageId id) {
        mu_.AssertHeld();
        return may_evict(pages_.Get(id));
      });
  for (PageId id : victims) {
    pages_.Evict(pages_.Get(id));
    ++counters_.pages_evicted;
  }
  return pages_.frames(group).num_free() >= count;
}

bool ModelHostImpl::MakeRoomNow(uint32_t group, uint32_t count) {
  return EvictFor(group, count, [this](const Page& page) {
    mu_.AssertHeld();
    return MayDrop(page);
  });
}

bool ModelHostImpl::MakeRoom(uint32_t group, uint32_t count) {
  if (MakeRoomNow(group, count)) return true;
  // A call does not wait for a put of what nobody needs here.
  if (EvictFor(group, count, [](const Page& page) { return page.is_clean(); })) return true;
  const uint32_t lacking = count - pages_.frames(group).num_free();
  if (num_spilling_[group] >= lacking) return false;
  size_t wanted = lacking - num_spilling_[group];
  std::vector<PageId> dirty;
  if (CanSpill()) {
    dirty = pages_.policy(group).PickVictims(wanted, [this](PageId id) {
      mu_.AssertHeld();
      return pages_.Get(id).is_clean() || MaySpill(id);
    });
  }
  wanted -= dirty.size();
  std::erase_if(dirty, [this](PageId id) {
    mu_.AssertHeld();
    return pages_.Get(id).is_clean();
  });
  // Then pages in front of pinned ones: those that only the cache knows, and those of sequences.
  for (const bool is_used : {false, true}) {
    if (wanted == 0) break;
    const std::vector<PageId> ancestors =
        pages_.policy(group).PickAncestors(wanted, [&](PageId id) {
          mu_.AssertHeld();
          const Page& page = pages_.Get(id);
          return is_used == (page.refs() > 0) && (page.is_clean() || MaySpill(id));
        });
    wanted -= ancestors.size();
    for (PageId id : ancestors) {
      Page& page = pages_.Get(id);
      if (page.is_clean()) {
        pages_.Evict(page);
        ++counters_.pages_evicted;
      } else {
        dirty.push_back(id);
      }
    }
  }
  if (CanSpill()) StartSpills(dirty, Durability::kCache);
  return pages_.frames(group).num_free() >= count;
}

absl::StatusOr<bool> ModelHostImpl::Progress(Ticket& ticket) {
  const Need& need = *ticket.need;
  // Every page must still be there: a sequence may have been closed or cut while its call waited.
  std::vector<PageId> all = need.pages;
  all.insert(all.end(), need.writable.begin(), need.writable.end());
  for (PageId id : all) {
    const Page* page = pages_.Find(id);
    if (page == nullptr)
      return absl::AbortedError("a page of the sequence went away while waiting");
    if (page->state() == PageState::kQuarantined) {
      return WithReason(absl::FailedPreconditionError("a page of the sequence was lost"),
                        "PREFIX_LOST");
    }
  }
  if (!ticket.has_pins) {
    for (PageId id : all) pages_.Pin(pages_.Get(id));
    ticket.got.pinned = all;
    ticket.has_pins = true;
  }
  // Not again and again while it lacks frames: it stands in front of calls that need no store.
  for (PageId id : ticket.restoring) {
    if (pages_.Get(id).state() == PageState::kStored) return RestoreFailed();
  }
  bool done = true;
  std::vector<PageId> restores;
  for (uint32_t g = 0; g < num_groups(); ++g) {
    uint32_t stored = 0;
    for (PageId id : all) {
      const Page& page = pages_.Get(id);
      if (page.group() == g && page.state() == PageState::kStored) ++stored;
    }
    uint32_t wanted = stored + need.fresh[g] - static_cast<uint32_t>(ticket.got.fresh[g].size());
    if (wanted == 0) continue;
    MakeRoom(g, wanted);
    for (PageId id : all) {
      Page& page = pages_.Get(id);
      if (page.group() != g || page.state() != PageState::kStored) continue;
      const std::optional<FramePool::Grant> grant = pages_.AllocateFrame(g, ticket.tenant);
      if (!grant) break;
      pages_.BeginRestore(page, grant->frame);
      restores.push_back(id);
      --wanted;
    }
    while (ticket.got.fresh[g].size() < need.fresh[g]) {
      const std::optional<FramePool::Grant> grant = pages_.AllocateFrame(g, ticket.tenant);
      if (!grant) break;
      ticket.got.fresh[g].push_back(*grant);
      --wanted;
    }
    done = done && wanted == 0;
  }
  ticket.restoring.insert(ticket.restoring.end(), restores.begin(), restores.end());
  StartRestores(restores);
  return done;
}

absl::Status ModelHostImpl::RestoreFailed() const {
  return absl::UnavailableError(absl::StrCat("restore a page: ", last_store_error_.message()));
}

bool ModelHostImpl::MayOvertake(const Ticket& ticket) {
  if (line_.front()->num_overtaken >= options_.max_overtakes) return false;
  const Need& need = *ticket.need;
  const auto is_there = [this](PageId id, bool is_write) {
    mu_.AssertHeld();
    const Page* page = pages_.Find(id);
    if (page == nullptr) return false;
    return is_write ? page->state() == PageState::kResident : page->is_readable();
  };
  return std::all_of(need.fresh.begin(), need.fresh.end(), [](uint32_t n) { return n == 0; }) &&
         std::all_of(need.pages.begin(), need.pages.end(),
                     [&](PageId id) { return is_there(id, false); }) &&
         std::all_of(need.writable.begin(), need.writable.end(),
                     [&](PageId id) { return is_there(id, true); });
}

absl::Status ModelHostImpl::Acquire(const std::string& tenant, const Need& need,
                                    MonotonicTime deadline, Acquired* out,
                                    std::optional<absl::FunctionRef<bool()>> keep_waiting) {
  // What can never fit is the caller's error, not a matter of waiting.
  std::vector<uint64_t> needed(num_groups(), 0);
  for (uint32_t g = 0; g < num_groups(); ++g) needed[g] = need.fresh[g];
  for (PageId id : need.pages) ++needed[pages_.Get(id).group()];
  for (PageId id : need.writable) ++needed[pages_.Get(id).group()];
  for (uint32_t g = 0; g < num_groups(); ++g) {
    if (needed[g] > num_frames_) {
      return WithReason(
          absl::InvalidArgumentError(absl::StrCat("acquire frames of layer group ", g, ": needs ",
                                                  needed[g], ", the pool has ", num_frames_)),
          error_reason::kPoolTooSmall,
          {{"needed", absl::StrCat(needed[g])}, {"frames", absl::StrCat(num_frames_)}});
    }
  }
  const auto exhausted = [&](absl::string_view why, absl::Duration delay) {
    mu_.AssertHeld();
    uint64_t total_needed = 0, free = 0, evictable = 0;
    for (uint32_t g = 0; g < num_groups(); ++g) {
      total_needed += needed[g];
      free += pages_.frames(g).num_free();
      evictable += pages_.policy(g).PickVictims(num_frames_, [](PageId) { return true; }).size();
    }
    return WithRetryDelay(WithReason(absl::ResourceExhaustedError(absl::StrCat(
                                         "acquire frames: ", why, "needed ", total_needed,
                                         ", free ", free, ", evictable ", evictable)),
                                     error_reason::kPoolExhausted,
                                     {{"needed", absl::StrCat(total_needed)},
                                      {"free", absl::StrCat(free)},
                                      {"evictable", absl::StrCat(evictable)}}),
                          delay);
  };
  if (line_.size() >= options_.max_waiting_calls) {
    return exhausted(absl::StrCat(line_.size(), " calls wait already; "), absl::Milliseconds(100));
  }
  Ticket ticket;
  ticket.need = &need;
  ticket.tenant = tenant;
  ticket.got.fresh.resize(num_groups());
  line_.push_back(&ticket);
  ++running_calls_;

  bool granted = false;
  bool waited = false;
  absl::Status status;
  while (status.ok()) {
    if (!granted && (line_.front() == &ticket || MayOvertake(ticket))) {
      absl::StatusOr<bool> done = Progress(ticket);
      if (!done.ok()) {
        status = done.status();
        break;
      }
      if (*done) {
        granted = true;
        if (line_.front() != &ticket) ++line_.front()->num_overtaken;
        line_.erase(std::find(line_.begin(), line_.end(), &ticket));
        changed_.SignalAll();
      }
    }
    if (granted) {
      bool ready = true;
      for (PageId id : ticket.got.pinned) {
        const Page& page = pages_.Get(id);  // pinned: it stays known
        const bool is_write =
            std::find(need.writable.begin(), need.writable.end(), id) != need.writable.end();
        if (page.state() == PageState::kQuarantined) {
          status = WithReason(absl::FailedPreconditionError("a page of the sequence was lost"),
                              "PREFIX_LOST");
          break;
        }
        if (page.state() == PageState::kStored) {
          // Its restore was given up because the store did not answer.
          status = RestoreFailed();
          break;
        }
        ready = ready && (is_write ? page.state() == PageState::kResident : page.is_readable());
      }
      if (!status.ok() || ready) break;
    }
    const absl::Duration left = deadline - clock_->MonotonicNow();
    if (left <= absl::ZeroDuration()) {
      ++counters_.acquire_timeouts;
      if (granted) {
        status = absl::DeadlineExceededError("restore pages: the deadline passed");
        break;
      }
      ReleaseAcquired(ticket.got);  // what it has so far is free for others, and counts as free
      status = exhausted("", absl::Milliseconds(50));
      break;
    }
    if (!waited) {
      waited = true;
      ++counters_.acquire_waits;
    }
    changed_.WaitWithTimeout(&mu_, std::min(left, kLookAgain));
    // Before the next look at the frames: what changes while it unlocks is seen there.
    if (keep_waiting && !(*keep_waiting)()) {
      status = absl::CancelledError("acquire frames: the caller left");
    }
  }
  --running_calls_;
  if (!status.ok()) {
    if (!granted) {
      line_.erase(std::find(line_.begin(), line_.end(), &ticket));
      changed_.SignalAll();
    }
    ReleaseAcquired(ticket.got);
    return status;
  }
  for (PageId id : ticket.got.pinned) pages_.Touch(pages_.Get(id));
  *out = std::move(ticket.got);
  return absl::OkStatus();
}

void ModelHostImpl::ReleaseAcquired(Acquired& acquired) {
  for (PageId id : acquired.pinned) pages_.Unpin(pages_.Get(id));
  acquired.pinned.clear();
  for (uint32_t g = 0; g < acquired.fresh.size(); ++g) {
    for (const FramePool::Grant& grant : acquired.fresh[g]) pages_.ReleaseFrame(g, grant.frame);
    acquired.fresh[g].clear();
  }
  changed_.SignalAll();
}

absl::StatusOr<std::span<const std::byte>> ModelHostImpl::PageBytes(
    uint32_t group, uint64_t offset, std::vector<std::byte>& buffer) {
  const uint64_t size = Geometry(group).page_bytes();
  if (const std::byte* view = pool_->host_view()) return std::span(view + offset, size);
  buffer.resize(size);
  PT_RETURN_IF_ERROR(pool_->Read(offset, buffer));
  return std::span<const std::byte>(buffer);
}

absl::Status ModelHostImpl::CopyRows(uint32_t group, FrameId from, FrameId to, uint32_t num_rows) {
  const GroupGeometry& geometry = Geometry(group);
  const uint64_t src = FrameOffset(group, from);
  const uint64_t dst = FrameOffset(group, to);
  for (uint32_t layer = 0; layer < geometry.num_layers(); ++layer) {
    for (RowKind kind : {RowKind::kK, RowKind::kV}) {
      const uint64_t bytes = uint64_t{num_rows} * geometry.row_bytes(kind);
      if (bytes == 0) continue;
      const uint64_t at = geometry.RowOffset(layer, kind, 0);
      PT_RETURN_IF_ERROR(pool_->Copy(dst + at, src + at, bytes));
    }
  }
  return absl::OkStatus();
}

absl::Status ModelHostImpl::CopyRuns(uint32_t group, FrameId from, FrameId to,
                                     std::span<const TailPlan::SlotRun> runs) {
  const GroupGeometry& geometry = Geometry(group);
  for (const TailPlan::SlotRun& run : runs) {
    if (uint64_t{run.to_slot} + run.count > page_tokens() ||
        uint64_t{run.from_slot} + run.count > page_tokens()) {
      return absl::InternalError(absl::StrCat("copy ", run.count, " rows from slot ", run.from_slot,
                                              " to slot ", run.to_slot, " of pages of ",
                                              page_tokens()));
    }
    for (uint32_t layer = 0; layer < geometry.num_layers(); ++layer) {
      for (RowKind kind : {RowKind::kK, RowKind::kV}) {
        const uint64_t bytes = uint64_t{run.count} * geometry.row_bytes(kind);
        if (bytes == 0) continue;
        PT_RETURN_IF_ERROR(pool_->Copy(
            FrameOffset(group, to) + geometry.RowOffset(layer, kind, run.to_slot),
            FrameOffset(group, from) + geometry.RowOffset(layer, kind, run.from_slot), bytes));
      }
    }
  }
  return absl::OkStatus();
}

absl::Status ModelHostImpl::ZeroIfNeeded(uint32_t group, const FramePool::Grant& grant) {
  if (!grant.needs_zero) return absl::OkStatus();
  return pool_->Zero(FrameOffset(group, grant.frame), Geometry(group).page_bytes());
}

uint64_t ModelHostImpl::Prefetch(Sequence& sequence) {
  std::vector<PageId> restores;
  // Restoring must not evict what this very sequence already has: pin it meanwhile.
  std::vector<PageId> own;
  for (const PageTable& table : sequence.tables) {
    for (const Extent& extent : table.extents()) own.push_back(extent.page);
  }
  for (PageId id : own) pages_.Pin(pages_.Get(id));
  bool has_room = line_.empty();  // those who wait come first
  for (size_t at = 0; has_room && at < own.size(); ++at) {
    Page& page = pages_.Get(own[at]);
    if (page.state() != PageState::kStored) continue;
    has_room = MakeRoomNow(page.group(), 1);
    if (!has_room) break;
    const std::optional<FramePool::Grant> grant =
        pages_.AllocateFrame(page.group(), sequence.tenant);
    if (!grant) break;
    pages_.BeginRestore(page, grant->frame);
    restores.push_back(own[at]);
  }
  StartRestores(restores);
  for (PageId id : own) pages_.Unpin(pages_.Get(id));
  return restores.size();
}

absl::StatusOr<ModelHost::EvictResult> ModelHostImpl::EvictPages(uint64_t max_pages,
                                                                 MonotonicTime deadline) {
  EvictResult result;
  {
    MutexLock lock(&mu_);
    const uint64_t spilled_before = counters_.pages_spilled;
    const uint64_t limit = max_pages == 0 ? ~uint64_t{0} : max_pages;
    for (;;) {
      uint64_t dirty_left = 0;
      for (uint32_t g = 0; g < num_groups(); ++g) {
        const auto take = [&](auto may_evict) {
          mu_.AssertHeld();
          return pages_.policy(g).PickVictims(
              std::min<uint64_t>(num_frames_, limit - result.evicted_pages), may_evict);
        };
        for (PageId id : take([&](PageId p) {
               mu_.AssertHeld();
               // Also one that is owed to a store that refuses it.
               const Page& page = pages_.Get(p);
               return MayDrop(page) || (page.is_clean() && !MaySpill(p));
             })) {
          pages_.Evict(pages_.Get(id));
          ++counters_.pages_evicted;
          ++result.evicted_pages;
        }
        if (!CanSpill()) continue;
        std::vector<PageId> dirty = take([&](PageId p) {
          mu_.AssertHeld();
          return MayDrop(pages_.Get(p)) || MaySpill(p);
        });
        std::erase_if(dirty, [this](PageId id) {
          mu_.AssertHeld();
          return MayDrop(pages_.Get(id));
        });
        StartSpills(dirty, Durability::kCache);
        dirty_left += num_spilling_[g];
      }
      if (result.evicted_pages >= limit || dirty_left == 0) break;
      const absl::Duration left = deadline - clock_->MonotonicNow();
      if (left <= absl::ZeroDuration()) {
        return absl::DeadlineExceededError(absl::StrCat("evict pages: ", dirty_left,
                                                        " still being spilled, ",
                                                        result.evicted_pages, " evicted"));
      }
      changed_.WaitWithTimeout(&mu_, std::min(left, kLookAgain));
    }
    result.spilled_pages = counters_.pages_spilled - spilled_before;
    changed_.SignalAll();
  }
  Flush();
  return result;
}

}  // namespace pagetide
