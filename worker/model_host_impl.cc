#include "worker/model_host_impl.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "base/byte_size.h"
#include "base/error_info.h"
#include "base/log.h"
#include "base/status_macros.h"

namespace pagetide {
namespace {

absl::Status SequenceNotFound(SequenceId id) {
  return WithReason(
      absl::NotFoundError(absl::StrCat("sequence ", id.ToString(), " is not open here")),
      "SEQUENCE_NOT_FOUND");
}

// Stale private records deleted in one call.
constexpr size_t kMaxDeleteBatch = 256;

std::vector<GroupTraits> TraitsOfGroups(const PageGeometry& geometry, const DevicePool& pool) {
  std::vector<GroupTraits> traits;
  for (uint32_t g = 0; g < geometry.num_groups(); ++g) {
    traits.push_back(TraitsOf(geometry.group(g).spec()));
    traits.back().can_shift = traits.back().can_shift && pool.CanShift(geometry.group(g));
  }
  return traits;
}

}  // namespace

absl::Status ModelHost::Options::Validate() const {
  if (!(spill_low_watermark > 0 && spill_low_watermark <= spill_high_watermark &&
        spill_high_watermark <= 1)) {
    return absl::InvalidArgumentError(absl::StrCat("spill watermarks ", spill_low_watermark,
                                                   " and ", spill_high_watermark,
                                                   " are not 0 < low <= high <= 1"));
  }
  if (max_append_idle <= absl::ZeroDuration()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "max_append_idle is ", absl::FormatDuration(max_append_idle), ", must be > 0"));
  }
  if (max_open_sequences == 0 || max_sequence_tokens == 0 || max_waiting_calls == 0) {
    return absl::InvalidArgumentError(
        "max_open_sequences, max_sequence_tokens and max_waiting_calls must be > 0");
  }
  if (sequence_idle < absl::ZeroDuration()) {
    return absl::InvalidArgumentError(
        absl::StrCat("sequence_idle is ", absl::FormatDuration(sequence_idle), ", must be >= 0"));
  }
  if (store_timeout <= absl::ZeroDuration() || lookup_timeout <= absl::ZeroDuration()) {
    return absl::InvalidArgumentError("store_timeout and lookup_timeout must be > 0");
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<ModelHost>> ModelHost::Create(Options options,
                                                             std::shared_ptr<const Model> model,
                                                             Device* device, PageStore* store,
                                                             Executor* io, Clock* clock) {
  PT_RETURN_IF_ERROR(options.Validate());
  const PageGeometry& geometry = model->geometry();
  const uint64_t unit = geometry.bytes_per_page_of_tokens();
  const uint64_t num_frames = options.pool_bytes / unit;
  if (num_frames == 0) {
    return WithReason(absl::InvalidArgumentError(absl::StrCat(
                          "pool of model ", model->spec().name, ": budget ", options.pool_bytes,
                          " bytes is less than one page of ", unit, " bytes in all groups")),
                      error_reason::kPoolTooSmall);
  }
  if (num_frames >= (uint64_t{1} << 31)) {
    return absl::InvalidArgumentError(absl::StrCat("pool of model ", model->spec().name, ": ",
                                                   num_frames, " frames exceed 2^31"));
  }
  // One frame more than the budget holds: frame 0 is the null frame. On the CPU device it costs
  // address space, not memory, as nothing ever writes it.
  PT_ASSIGN_OR_RETURN(std::unique_ptr<DevicePool> pool,
                      device->CreatePool((num_frames + 1) * unit));
  if (!options.numbers) options.numbers = std::make_shared<std::atomic<uint64_t>>(0);
  for (uint32_t g = 0; g < geometry.num_groups(); ++g) {
    const LayerGroupSpec& group = geometry.group(g).spec();
    const std::string what =
        geometry.group(g).has_rows()
            ? absl::StrCat("K ", DataTypeName(group.k_type), ", V ", DataTypeName(group.v_type))
        : group.kind == LayerGroupSpec::Kind::kRecurrent ? "a state of the engine's own layout"
                                                         : "pages of the engine's own layout";
    LogInfo("worker", "pool of model ", model->spec().name, " group ", g, ": ", num_frames,
            " frames x ", FormatByteSize(geometry.group(g).page_bytes()), " = ",
            FormatByteSize(num_frames * geometry.group(g).page_bytes()), ", ", group.layers.size(),
            " layers, ", what, ", ", geometry.page_tokens(), " tokens a page, on ", device->name());
  }
  return std::unique_ptr<ModelHost>(
      new ModelHostImpl(std::move(options), std::move(model), std::move(pool),
                        static_cast<uint32_t>(num_frames), store, io, clock));
}

ModelHostImpl::ModelHostImpl(Options options, std::shared_ptr<const Model> model,
                             std::unique_ptr<DevicePool> pool, uint32_t num_frames,
                             PageStore* store, Executor* io, Clock* clock)
    : options_(std::move(options)),
      model_(std::move(model)),
      pool_(std::move(pool)),
      traits_(TraitsOfGroups(model_->geometry(), *pool_)),
      num_frames_(num_frames),
      store_(store),
      io_(io),
      clock_(clock),
      pages_(model_->geometry().num_groups(), num_frames, options_.max_known_stored_pages),
      num_spilling_(model_->geometry().num_groups(), 0) {
  uint64_t base = 0;
  for (uint32_t g = 0; g < num_groups(); ++g) {
    group_base_.push_back(base);
    base += (uint64_t{num_frames} + 1) * Geometry(g).page_bytes();
    if (traits_[g].is_whole) pages_.SetWhole(g);
  }
}

ModelHostImpl::~ModelHostImpl() {
  Quiesce();
}

absl::Status ModelHostImpl::ValidateTokens(std::span<const uint32_t> tokens,
                                           std::span<const PositionedInput> inputs,
                                           uint64_t first) const {
  if (first + tokens.size() > options_.max_sequence_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("tokens: ", first, " + ", tokens.size(),
                                                   " exceed the limit of ",
                                                   options_.max_sequence_tokens, " a sequence"));
  }
  const uint32_t vocabulary = model_->spec().vocabulary_size;
  if (vocabulary > 0) {
    for (size_t i = 0; i < tokens.size(); ++i) {
      if (tokens[i] >= vocabulary) {
        return absl::InvalidArgumentError(absl::StrCat(
            "tokens[", i, "] = ", tokens[i], " is not below vocabulary_size = ", vocabulary));
      }
    }
  }
  uint64_t last = first;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (inputs[i].position < last || inputs[i].position >= first + tokens.size()) {
      return absl::InvalidArgumentError(
          absl::StrCat("inputs[", i, "].position = ", inputs[i].position,
                       " is not ascending within [", first, ", ", first + tokens.size(), ")"));
    }
    last = inputs[i].position;
  }
  return absl::OkStatus();
}

absl::StatusOr<ModelHostImpl::SequencePtr> ModelHostImpl::FindSequence(const Tenant& tenant,
                                                                       SequenceId id) {
  const auto it = sequences_.find(NumberOfLocked(id));
  // Another tenant's sequence answers like none.
  if (it == sequences_.end() || it->second->tenant != tenant.name) return SequenceNotFound(id);
  it->second->last_call = clock_->MonotonicNow();
  return it->second;
}

absl::Status ModelHostImpl::CheckHandle(const Sequence& sequence,
                                        const SequenceHandle& handle) const {
  if (handle.epoch != sequence.epoch) {
    return WithReason(
        absl::FailedPreconditionError(absl::StrCat("sequence ", sequence.id.ToString(), ": epoch ",
                                                   handle.epoch, " != ", sequence.epoch)),
        error_reason::kStaleEpoch, {{"epoch", absl::StrCat(sequence.epoch)}});
  }
  if (handle.expected_revision && *handle.expected_revision != sequence.revision) {
    return WithReason(absl::FailedPreconditionError(
                          absl::StrCat("sequence ", sequence.id.ToString(), ": revision ",
                                       *handle.expected_revision, " != ", sequence.revision)),
                      "REVISION_MISMATCH", {{"revision", absl::StrCat(sequence.revision)}});
  }
  return absl::OkStatus();
}

absl::StatusOr<ModelHostImpl::SequencePtr> ModelHostImpl::FindForChange(
    const Tenant& tenant, const SequenceHandle& handle) {
  PT_ASSIGN_OR_RETURN(SequencePtr sequence, FindSequence(tenant, handle.id));
  PT_RETURN_IF_ERROR(CheckHandle(*sequence, handle));
  PT_RETURN_IF_ERROR(CheckMayChange("", *sequence));
  return sequence;
}

absl::Status ModelHostImpl::CheckMayChange(absl::string_view action, const Sequence& sequence) {
  const Pending* const pending = sequence.pending.get();
  if (pending == nullptr) return absl::OkStatus();
  const std::string id = sequence.id.ToString();
  if (pending->is_hold()) {
    return WithReason(
        absl::FailedPreconditionError(absl::StrCat(
            action, "sequence ", id, ": it is being moved to the worker at ", pending->moving_to)),
        error_reason::kSequenceMoved, {{"address", pending->moving_to}});
  }
  return WithReason(
      absl::FailedPreconditionError(absl::StrCat(action, "sequence ", id, ": a write of ",
                                                 pending->num_tokens, " tokens is pending")),
      error_reason::kPendingWrite, {{"sequence", id}});
}

absl::StatusOr<ModelHostImpl::Pending*> ModelHostImpl::FindPending(Sequence& sequence,
                                                                   uint64_t pending_id) {
  Pending* const pending = sequence.pending.get();
  if (pending == nullptr || pending->id != pending_id || pending->aborted || pending->is_hold() ||
      pending->state != Pending::State::kOpen) {
    return WithReason(absl::FailedPreconditionError(
                          absl::StrCat("sequence ", sequence.id.ToString(), ": write ", pending_id,
                                       " is not open (committed, aborted or expired)")),
                      "WRITE_NOT_OPEN");
  }
  return pending;
}

SequenceInfo ModelHostImpl::InfoOf(const Sequence& sequence) const {
  SequenceInfo info;
  info.id = sequence.id;
  info.number = sequence.number;
  info.epoch = sequence.epoch;
  info.revision = sequence.revision;
  info.length = sequence.length();
  info.canonical_length = sequence.canonical_rows();
  info.end_position = sequence.end_position();
  info.pending_tokens = sequence.pending ? sequence.pending->num_tokens : 0;
  for (const PageTable& table : sequence.tables) {
    absl::flat_hash_set<PageId> seen;  // an edited sequence may have several extents in a page
    for (const Extent& extent : table.extents()) {
      if (!seen.insert(extent.page).second) continue;
      const Page* page = pages_.Find(extent.page);
      ++info.num_pages;
      if (page->is_readable()) ++info.resident_pages;
      if (page->is_keyed()) ++info.shared_pages;
    }
  }
  return info;
}

uint64_t ModelHostImpl::Truncate(Sequence& sequence, uint64_t length) {
  uint64_t freed = 0;
  // Without the rows that a window needs at that length nothing of it can go on.
  if (sequence.LackedAt(traits_, length)) length = 0;
  VoidCheckpoints(sequence, length);
  for (PageId id : static_cast<SequenceRows&>(sequence).Truncate(length, page_tokens())) {
    if (pages_.Unref(pages_.Get(id))) ++freed;
  }
  SyncTails(sequence, sequence.root, page_tokens(), pages_);
  ++sequence.revision;
  changed_.SignalAll();
  return freed;
}

void ModelHostImpl::DropPending(Sequence& sequence) {
  Pending& pending = *sequence.pending;
  for (PageId id : pending.in_place) pages_.Get(id).SetBeingWritten(false);
  for (PageId id : pending.pinned) pages_.Unpin(pages_.Get(id));
  for (const std::vector<PageId>& group : pending.created) {
    for (PageId id : group) pages_.Unref(pages_.Get(id));
  }
  sequence.pending.reset();
  sequence.last_call = clock_->MonotonicNow();
  changed_.SignalAll();
}

void ModelHostImpl::Settle(Sequence& sequence) {
  if (sequence.pending && (sequence.pending->aborted || sequence.closed) &&
      !sequence.pending->is_busy()) {
    DropPending(sequence);
  }
  if (sequence.closed && !sequence.pending) {
    for (PageTable& table : sequence.tables) {
      for (PageId id : table.Truncate(0)) pages_.Unref(pages_.Get(id));
    }
    for (const Checkpoint& checkpoint : sequence.checkpoints) DropCheckpoint(checkpoint);
    sequence.checkpoints.clear();
    changed_.SignalAll();
  }
}

uint64_t ModelHostImpl::ValidLength(const Sequence& sequence) const {
  uint64_t valid = sequence.length();
  for (const PageTable& table : sequence.tables) {
    for (const Extent& extent : table.extents()) {
      if (pages_.Find(extent.page)->state() == PageState::kQuarantined) {
        valid = std::min(valid, extent.first_row);
        break;
      }
    }
  }
  return valid;
}

absl::Status ModelHostImpl::CutIfLost(Sequence& sequence) {
  if (ValidLength(sequence) == sequence.length()) return absl::OkStatus();
  const uint64_t before = sequence.length();
  Truncate(sequence, ValidLength(sequence));
  const uint64_t valid = sequence.length();
  ++counters_.prefixes_lost;
  sequence.shortened_because = absl::StrCat(
      "a page failed its checksum or left the store: ", before, " tokens became ", valid);
  return WithReason(absl::FailedPreconditionError(absl::StrCat("sequence ", sequence.id.ToString(),
                                                               ": ", sequence.shortened_because,
                                                               "; append from there again")),
                    "PREFIX_LOST", {{"length", absl::StrCat(valid)}});
}

uint64_t ModelHostImpl::ResidentTokens(const Sequence& sequence) const {
  uint64_t resident = sequence.length();
  for (const PageTable& table : sequence.tables) {
    for (const Extent& extent : table.extents()) {
      if (!pages_.Find(extent.page)->is_readable()) {
        resident = std::min(resident, extent.first_row);
        break;
      }
    }
  }
  return resident;
}

absl::StatusOr<SequenceInfo> ModelHostImpl::Get(const Tenant& tenant, SequenceId id) {
  MutexLock lock(&mu_);
  PT_ASSIGN_OR_RETURN(SequencePtr sequence, FindSequence(tenant, id));
  return InfoOf(*sequence);
}

bool ModelHostImpl::Has(SequenceId id) const {
  MutexLock lock(&mu_);
  return NumberOfLocked(id) != 0;
}

std::vector<SequenceInfo> ModelHostImpl::List(const Tenant& tenant, uint64_t after, size_t limit) {
  std::vector<SequenceInfo> out;
  MutexLock lock(&mu_);
  for (auto it = sequences_.upper_bound(after); it != sequences_.end() && out.size() < limit;
       ++it) {
    const Sequence& sequence = *it->second;
    if (sequence.tenant == tenant.name && !sequence.is_unlisted) out.push_back(InfoOf(sequence));
  }
  return out;
}

absl::Status ModelHostImpl::Close(const Tenant& tenant, SequenceId id, uint64_t epoch) {
  {
    MutexLock lock(&mu_);
    absl::StatusOr<SequencePtr> found = FindSequence(tenant, id);
    if (!found.ok()) return absl::OkStatus();  // closed before, or never: the same to the caller
    PT_RETURN_IF_ERROR(CheckHandle(**found, {id, epoch, std::nullopt}));
    // Closed here it would be open at the target.
    if ((*found)->pending && (*found)->pending->is_hold()) {
      PT_RETURN_IF_ERROR(CheckMayChange("close: ", **found));
    }
    CloseNow(**found);
  }
  Flush();
  return absl::OkStatus();
}

absl::Status ModelHostImpl::CloseUnchanged(const Tenant& tenant, const SequenceHandle& handle) {
  {
    MutexLock lock(&mu_);
    PT_ASSIGN_OR_RETURN(const SequencePtr sequence, FindForChange(tenant, handle));
    CloseNow(*sequence);
  }
  Flush();
  return absl::OkStatus();
}

uint64_t ModelHostImpl::NumberOf(SequenceId id) const {
  MutexLock lock(&mu_);
  return NumberOfLocked(id);
}

uint64_t ModelHostImpl::NumberOfLocked(SequenceId id) const {
  if (id.incarnation == options_.incarnation) {
    return sequences_.contains(id.number) ? id.number : 0;
  }
  const auto it = foreign_.find(id);
  return it == foreign_.end() ? 0 : it->second;
}

void ModelHostImpl::AddSequence(const SequencePtr& sequence,
                                const std::optional<SequenceIdentity>& identity) {
  const bool is_own = !identity || identity->id.incarnation == options_.incarnation;
  sequence->number = identity && is_own ? identity->id.number : NextNumber();
  sequence->id = identity ? identity->id : SequenceId{options_.incarnation, sequence->number};
  if (identity) sequence->epoch = identity->epoch;
  sequence->last_call = clock_->MonotonicNow();
  if (!is_own) foreign_[sequence->id] = sequence->number;
  sequences_[sequence->number] = sequence;
}

void ModelHostImpl::CloseNow(Sequence& sequence) {
  sequences_.erase(sequence.number);
  foreign_.erase(sequence.id);
  sequence.closed = true;
  claims_.ReleaseHolder(sequence.number);
  if (sequence.pending) sequence.pending->aborted = true;
  Settle(sequence);
  changed_.SignalAll();  // its calls in line leave
}

uint64_t ModelHostImpl::ClearCache(bool zero_data) {
  uint64_t dropped;
  {
    MutexLock lock(&mu_);
    dropped = pages_.DropUnreferenced(zero_data);
    changed_.SignalAll();
  }
  Flush();
  return dropped;
}

void ModelHostImpl::Tick() {
  {
    MutexLock lock(&mu_);
    const MonotonicTime now = clock_->MonotonicNow();
    StartReleases();
    ForgetRefusals();
    std::vector<SequencePtr> expired;
    for (const auto& [number, sequence] : sequences_) {
      const Pending* const pending = sequence->pending.get();
      if (pending == nullptr || pending->expires > now) continue;
      // Of an append rows are coming right now, or all have come.
      if (pending->is_append() && pending->is_busy()) continue;
      expired.push_back(sequence);
    }
    for (const SequencePtr& sequence : expired) {
      if (!sequence->pending->aborted) ++counters_.writes_expired;
      sequence->pending->aborted = true;
      Settle(*sequence);
    }
    if (CanSpill()) {
      for (uint32_t g = 0; g < num_groups(); ++g) {
        TierSnapshot snapshot;
        snapshot.num_frames = num_frames_;
        snapshot.free_frames = pages_.frames(g).num_free();
        snapshot.high_watermark = options_.spill_high_watermark;
        snapshot.low_watermark = options_.spill_low_watermark;
        const double in_use = num_frames_ - snapshot.free_frames;
        if (in_use <= snapshot.high_watermark * num_frames_) continue;
        const auto is_clean = [this](PageId id) {
          mu_.AssertHeld();
          return pages_.Get(id).is_stored();
        };
        snapshot.evictable_clean =
            static_cast<uint32_t>(pages_.policy(g).PickVictims(num_frames_, is_clean).size());
        const std::vector<PageId> coldest =
            pages_.policy(g).PickVictims(num_frames_, [](PageId) { return true; });
        snapshot.evictable_dirty = static_cast<uint32_t>(std::count_if(
            coldest.begin(), coldest.end(), [&](PageId id) { return !is_clean(id); }));
        // Clean pages stay: they go when somebody needs the frame, and not before.
        const SpillPlan plan = PlanSpill(snapshot);
        std::vector<PageId> spills;
        for (PageId id : coldest) {
          if (spills.size() + num_spilling_[g] >= plan.spill_dirty) break;
          if (!is_clean(id) && MaySpill(id)) spills.push_back(id);
        }
        StartSpills(spills, Durability::kCache);
      }
    }
    WriteThroughOwed();
    changed_.SignalAll();
  }
  Flush();
}

void ModelHostImpl::Quiesce() {
  MutexLock lock(&mu_);
  while (jobs_in_flight_ > 0) changed_.WaitWithTimeout(&mu_, absl::Milliseconds(100));
  pages_.CheckInvariants();
}

void ModelHostImpl::Flush() {
  MutexLock flush_lock(&flush_mu_);
  std::vector<FrameChange> changes;
  std::vector<PageKey> stale;
  {
    MutexLock lock(&mu_);
    pages_.TrimKnown();
    changes = pages_.TakeFrameChanges();
    stale = pages_.TakeStaleKeys();
    for (size_t at = 0; store_ != nullptr && at < stale.size(); at += kMaxDeleteBatch) {
      std::vector<PageKey> batch(stale.begin() + at,
                                 stale.begin() + std::min(stale.size(), at + kMaxDeleteBatch));
      ++jobs_in_flight_;
      const absl::Status scheduled = io_->Schedule([this, batch = std::move(batch)] {
        // What stays behind is unreferenced cache: the store evicts it by itself in time.
        store_->DeletePages(batch, clock_->MonotonicNow() + options_.store_timeout).IgnoreError();
        MutexLock job_lock(&mu_);
        --jobs_in_flight_;
        changed_.SignalAll();
      });
      if (!scheduled.ok()) --jobs_in_flight_;
    }
  }
  if (changes.empty() || !listener_) return;
  std::vector<ResidencyChange> out;
  out.reserve(changes.size());
  for (const FrameChange& change : changes) {
    out.push_back({change.prefix, change.group, Tier::kDevice, change.removed,
                   Geometry(change.group).page_bytes()});
  }
  listener_(out);
}

std::vector<FrameEntry> ModelHostImpl::DumpFrames(uint32_t group, uint32_t after, uint32_t limit) {
  std::vector<FrameEntry> out;
  if (group >= num_groups() || after >= num_frames_) return out;
  out.resize(std::min(limit, num_frames_ - after));
  MutexLock lock(&mu_);
  for (uint32_t i = 0; i < out.size(); ++i) {
    out[i].frame = FrameId(after + 1 + i);
    out[i].state = pages_.frames(group).IsFree(out[i].frame) ? "free" : "granted";
  }
  pages_.ForEachPage([&](const Page& page) {
    if (page.group() != group || !page.has_frame()) return;
    const uint32_t frame = page.frame().value();
    if (frame <= after || frame - after > out.size()) return;
    FrameEntry& entry = out[frame - after - 1];
    entry.state = std::string(PageStateName(page.state()));
    entry.page = page.id();
    entry.rows = page.rows();
    entry.references = page.refs();
    entry.pins = page.pins();
    entry.key = page.page_key();
    entry.is_stored = page.is_stored();
  });
  return out;
}

std::vector<PoolUsage> ModelHostImpl::Usage() {
  std::vector<PoolUsage> out(num_groups());
  MutexLock lock(&mu_);
  for (uint32_t g = 0; g < num_groups(); ++g) {
    out[g].group = g;
    out[g].page_bytes = Geometry(g).page_bytes();
    out[g].num_frames = num_frames_;
    out[g].free_frames = pages_.frames(g).num_free();
  }
  pages_.ForEachPage([&](const Page& page) {
    if (!page.has_frame()) return;
    PoolUsage& usage = out[page.group()];
    if (page.pins() > 0)
      ++usage.pinned_frames;
    else if (page.state() == PageState::kResident)
      ++usage.evictable_frames;
    if (!page.is_full()) ++usage.tail_frames;
  });
  return out;
}

HostCounters ModelHostImpl::Counters() {
  MutexLock lock(&mu_);
  return counters_;
}

HostLoad ModelHostImpl::Load() {
  HostLoad load;
  for (const PoolUsage& usage : Usage()) {
    load.free_frames += usage.free_frames;
    load.evictable_frames += usage.evictable_frames;
    load.total_frames += usage.num_frames;
  }
  MutexLock lock(&mu_);
  load.open_sequences = sequences_.size();
  load.running_calls = running_calls_;
  load.checkpoint_host_bytes = checkpoint_bytes_;
  for (const auto& [number, sequence] : sequences_) {
    if (sequence->pending && sequence->pending->is_append()) {
      load.queued_prefill_tokens += sequence->pending->num_tokens;
    }
  }
  load.prefill_tokens_per_second = prefill_meter_.per_second();
  load.store_bytes_per_second = store_meter_.per_second();
  load.is_store_degraded = store_ != nullptr && !CanSpill();
  if (store_ != nullptr && options_.write_through) load.owed_pages = pages_.unstored().size();
  return load;
}

void ModelHostImpl::SetResidencyListener(
    std::function<void(const std::vector<ResidencyChange>&)> fn) {
  listener_ = std::move(fn);
}

std::vector<ResidencyChange> ModelHostImpl::ResidencySnapshot() {
  std::vector<ResidencyChange> out;
  MutexLock lock(&mu_);
  pages_.ForEachPage([&](const Page& page) {
    if (!page.is_keyed() || !page.is_readable()) return;
    out.push_back({*page.prefix(), page.group(), Tier::kDevice, /*removed=*/false,
                   Geometry(page.group()).page_bytes()});
  });
  return out;
}

}  // namespace pagetide
