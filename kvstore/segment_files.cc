#include "kvstore/segment_files.h"

#include <algorithm>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"

namespace pagetide {
namespace {

constexpr absl::string_view kSuffix = ".seg";

}  // namespace

std::string SegmentFiles::PathOf(uint64_t id) const {
  return absl::StrFormat("%s/%012d%s", options_.dir, id, std::string(kSuffix));
}

absl::StatusOr<std::unique_ptr<SegmentFiles>> SegmentFiles::Open(Options options) {
  std::unique_ptr<SegmentFiles> self(new SegmentFiles(std::move(options)));
  const Options& o = self->options_;
  PT_RETURN_IF_ERROR(o.fs->CreateDirs(o.dir));
  PT_ASSIGN_OR_RETURN(const std::vector<std::string> names, o.fs->List(o.dir));
  MutexLock lock(&self->mu_);
  self->next_id_ = o.last_known_id + 1;
  uint64_t total = 0;
  for (const std::string& name : names) {
    uint64_t id = 0;
    if (!absl::EndsWith(name, kSuffix) ||
        !absl::SimpleAtoi(name.substr(0, name.size() - kSuffix.size()), &id) || id == 0) {
      continue;
    }
    PT_ASSIGN_OR_RETURN(std::unique_ptr<File> file, o.fs->OpenFile(self->PathOf(id)));
    State state;
    PT_ASSIGN_OR_RETURN(state.size, file->Size());
    state.size = Footprint(state.size);
    state.segment = std::make_shared<Segment>(id, std::move(file));
    // A process that died may have left bytes that only the kernel's page cache has.
    state.dirty = true;
    total += state.size;
    self->segments_.emplace(id, std::move(state));
    self->next_id_ = std::max(self->next_id_, id + 1);
  }
  self->dir_dirty_ = true;
  if (!self->segments_.empty()) {
    const auto last = std::prev(self->segments_.end());
    if (last->second.size < o.segment_bytes) self->head_ = last->first;
  }
  self->total_bytes_ = total;
  return self;
}

absl::StatusOr<SegmentFiles::Range> SegmentFiles::Reserve(uint64_t bytes) {
  const uint64_t aligned = Footprint(bytes);
  MutexLock lock(&mu_);
  for (;;) {
    if (head_ != 0) {
      State& head = segments_.at(head_);
      if (head.size == 0 || head.size + aligned <= options_.segment_bytes) {
        Range range{head.segment, head.size, bytes};
        head.being_written.insert(head.size);
        head.size += aligned;
        total_bytes_.fetch_add(aligned, std::memory_order_relaxed);
        return range;
      }
    }
    if (creating_) {
      created_.Wait(&mu_);  // no longer than the file system takes to make a file
      continue;
    }
    creating_ = true;
    const uint64_t id = next_id_++;
    mu_.Unlock();
    absl::StatusOr<std::unique_ptr<File>> file = options_.fs->CreateFile(PathOf(id));
    mu_.Lock();
    creating_ = false;
    created_.SignalAll();
    if (!file.ok()) return file.status();
    State state;
    state.segment = std::make_shared<Segment>(id, std::move(*file));
    segments_.emplace(id, std::move(state));
    head_ = id;
    dir_dirty_ = true;
  }
}

void SegmentFiles::Finish(const Range& range) {
  MutexLock lock(&mu_);
  const auto it = segments_.find(range.segment->id);
  if (it == segments_.end()) return;
  it->second.being_written.erase(range.offset);
  it->second.dirty = true;
}

void SegmentFiles::Commit(const Range& range) {
  range.segment->live_bytes.fetch_add(Footprint(range.bytes), std::memory_order_relaxed);
  Finish(range);
}

void SegmentFiles::Abandon(const Range& range) {
  Finish(range);
}

absl::StatusOr<std::vector<SegmentFiles::DurableLength>> SegmentFiles::Sync() {
  std::vector<DurableLength> lengths;
  std::vector<std::shared_ptr<Segment>> to_sync;
  bool sync_dir = false;
  {
    MutexLock lock(&mu_);
    for (auto& [id, state] : segments_) {
      if (!state.dirty) continue;
      state.dirty = !state.being_written.empty();
      lengths.push_back(
          {id, state.being_written.empty() ? state.size : *state.being_written.begin()});
      to_sync.push_back(state.segment);
    }
    sync_dir = std::exchange(dir_dirty_, false);
  }
  for (const auto& segment : to_sync) PT_RETURN_IF_ERROR(segment->file->Sync());
  if (sync_dir) PT_RETURN_IF_ERROR(options_.fs->SyncDir(options_.dir));
  return lengths;
}

std::shared_ptr<Segment> SegmentFiles::Find(uint64_t id) const {
  MutexLock lock(&mu_);
  const auto it = segments_.find(id);
  return it == segments_.end() ? nullptr : it->second.segment;
}

uint64_t SegmentFiles::SizeOf(uint64_t id) const {
  MutexLock lock(&mu_);
  const auto it = segments_.find(id);
  return it == segments_.end() ? 0 : it->second.size;
}

std::vector<std::shared_ptr<Segment>> SegmentFiles::All() const {
  MutexLock lock(&mu_);
  std::vector<std::shared_ptr<Segment>> all;
  all.reserve(segments_.size());
  for (const auto& [id, state] : segments_) all.push_back(state.segment);
  return all;
}

std::shared_ptr<Segment> SegmentFiles::MostDead(const absl::flat_hash_set<uint64_t>& except,
                                                uint64_t* dead_bytes) const {
  MutexLock lock(&mu_);
  std::shared_ptr<Segment> best;
  *dead_bytes = 0;
  for (const auto& [id, state] : segments_) {
    if (id == head_ || !state.being_written.empty() || except.contains(id)) continue;
    const uint64_t live = state.segment->live_bytes.load(std::memory_order_relaxed);
    const uint64_t dead = state.size > live ? state.size - live : 0;
    if (dead > *dead_bytes) {
      *dead_bytes = dead;
      best = state.segment;
    }
  }
  return best;
}

absl::Status SegmentFiles::Delete(uint64_t id) {
  {
    MutexLock lock(&mu_);
    const auto it = segments_.find(id);
    if (it == segments_.end()) return absl::OkStatus();
    total_bytes_.fetch_sub(it->second.size, std::memory_order_relaxed);
    segments_.erase(it);
    dir_dirty_ = true;
    if (head_ == id) head_ = 0;
  }
  return options_.fs->DeleteFile(PathOf(id));
}

void SegmentFiles::SealHead(uint64_t min_dead_bytes) {
  MutexLock lock(&mu_);
  if (head_ == 0) return;
  const State& head = segments_.at(head_);
  if (head.size >= head.segment->live_bytes.load(std::memory_order_relaxed) + min_dead_bytes) {
    head_ = 0;
  }
}

}  // namespace pagetide
