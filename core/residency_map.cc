#include "core/residency_map.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "absl/hash/hash.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace pagetide {
namespace {

constexpr Tier kTiers[] = {Tier::kDevice, Tier::kHost, Tier::kStore};

// Bits for the sources, the empty bit, and a quarter more so that snapshots and removals rarely
// wait for a sweep.
size_t WordsFor(size_t max_sources) {
  const size_t bits = 1 + max_sources + std::max<size_t>(1, max_sources / 4);
  return (bits + 63) / 64;
}

bool TestBit(const uint64_t* words, uint32_t bit) {
  return (words[bit / 64] >> (bit % 64)) & 1;
}
void SetBit(uint64_t* words, uint32_t bit) {
  words[bit / 64] |= uint64_t{1} << (bit % 64);
}
void ClearBit(uint64_t* words, uint32_t bit) {
  words[bit / 64] &= ~(uint64_t{1} << (bit % 64));
}
bool IsZero(std::span<const uint64_t> words) {
  return std::all_of(words.begin(), words.end(), [](uint64_t w) { return w == 0; });
}

}  // namespace

size_t ResidencyMap::SlotHash::operator()(const PageName& name) const {
  return absl::HashOf(name.hint, name.group);
}

ResidencyMap::ResidencyMap(Options options)
    : options_(options),
      words_(WordsFor(options.max_sources)),
      index_(0, SlotHash{&names_}, SlotEq{&names_}),
      sources_(options.max_sources),
      visible_(words_, 0),
      free_(words_, ~uint64_t{0}),
      retired_(words_, 0),
      sweeping_(words_, 0) {
  ClearBit(free_.data(), kEmptyBit);
}

// --- sources ---

ResidencyMap::Source* ResidencyMap::Find(ResidencySourceId id) {
  return const_cast<Source*>(std::as_const(*this).Find(id));
}

const ResidencyMap::Source* ResidencyMap::Find(ResidencySourceId id) const {
  if (id == ResidencySourceId()) return nullptr;
  const Source& source = sources_[id.value() % sources_.size()];
  return source.id == id ? &source : nullptr;
}

absl::StatusOr<ResidencySourceId> ResidencyMap::AddSource(uint64_t incarnation) {
  for (size_t i = 0; i < sources_.size(); ++i) {
    // Ids grow and each goes to place id % size: never 0, never twice, found in O(1).
    const uint64_t candidate = ++next_source_;
    Source& place = sources_[candidate % sources_.size()];
    if (place.id != ResidencySourceId()) continue;
    const uint32_t bit = AllocateBit();
    if (bit == kNoBit) break;
    place = Source{.id = ResidencySourceId(candidate), .incarnation = incarnation};
    place.visible.bit = bit;
    SetBit(visible_.data(), bit);
    return place.id;
  }
  return absl::ResourceExhaustedError(
      absl::StrCat("add residency source: all ", options_.max_sources, " places are taken"));
}

void ResidencyMap::RemoveSource(ResidencySourceId id) {
  Source* source = Find(id);
  if (source == nullptr) return;
  RetireBit(source->visible.bit);
  if (source->incoming.bit != kNoBit) RetireBit(source->incoming.bit);
  *source = Source{};
}

size_t ResidencyMap::num_sources() const {
  return std::count_if(sources_.begin(), sources_.end(),
                       [](const Source& s) { return s.id != ResidencySourceId(); });
}

std::optional<ResidencyMap::SourceStats> ResidencyMap::StatsOf(ResidencySourceId id) const {
  const Source* source = Find(id);
  if (source == nullptr) return std::nullopt;
  return SourceStats{.incarnation = source->incarnation,
                     .last_number = source->last_number,
                     .is_synced = source->state == Source::State::kSynced,
                     .dropped_copies = source->visible.dropped_copies,
                     .copies = source->visible.copies};
}

// --- reports ---

ResidencyMap::ApplyResult ResidencyMap::OutOfSync(Source& source, std::string because) {
  if (source.incoming.bit != kNoBit) RetireBit(source.incoming.bit);
  source.incoming = Holding{};
  source.state = Source::State::kAwaitingSnapshot;
  return {.outcome = Outcome::kNeedSnapshot, .because = std::move(because)};
}

ResidencyMap::ApplyResult ResidencyMap::Apply(ResidencySourceId id, const ResidencyReport& report) {
  Source* source = Find(id);
  if (source == nullptr) return {.outcome = Outcome::kIgnored};
  Sweep(64 + 4 * report.changes.size());

  if (report.is_snapshot) {
    if (source->incoming.bit != kNoBit) RetireBit(source->incoming.bit);
    source->incoming = Holding{};
    if (!source->visible.IsEmpty()) {
      const uint32_t bit = AllocateBit();
      if (bit == kNoBit) {
        // No spare bit: give up the old state instead, and show the new one as it grows.
        RetireBit(source->visible.bit);
        source->visible = Holding{.bit = AllocateBit()};
        SetBit(visible_.data(), source->visible.bit);
      } else {
        source->incoming.bit = bit;
      }
    } else {
      source->visible = Holding{.bit = source->visible.bit};
    }
    source->state = Source::State::kInSnapshot;
  } else if (source->state == Source::State::kAwaitingSnapshot) {
    source->last_number = report.number;
    return {.outcome = Outcome::kIgnored};
  } else if (report.number != source->last_number + 1) {
    return OutOfSync(*source, absl::StrCat("residency report ", report.number, " after ",
                                           source->last_number, " of incarnation ",
                                           absl::Hex(source->incarnation, absl::kZeroPad16)));
  }
  source->last_number = report.number;

  const bool is_staged = source->incoming.bit != kNoBit;
  Holding& holding = is_staged ? source->incoming : source->visible;
  for (const ResidencyDelta& change : report.changes) ApplyChange(holding, change);

  if (source->state == Source::State::kInSnapshot) {
    if (!report.is_snapshot_end) return {};
    if (is_staged) {
      RetireBit(source->visible.bit);
      source->visible = std::exchange(source->incoming, Holding{});
      SetBit(visible_.data(), source->visible.bit);
    }
    source->state = Source::State::kSynced;
  }
  if (report.digests.has_value() && source->visible.dropped_copies == 0) {
    for (size_t i = 0; i < kNumResidencyBuckets; ++i) {
      const uint64_t ours = source->visible.digests[i];
      const uint64_t theirs = (*report.digests)[i];
      if (ours == theirs) continue;
      return OutOfSync(*source,
                       absl::StrCat("residency bucket ", i, " after report ", report.number,
                                    ": digest 0x", absl::Hex(ours, absl::kZeroPad16), " != 0x",
                                    absl::Hex(theirs, absl::kZeroPad16)));
    }
  }
  return {};
}

void ResidencyMap::ApplyChange(Holding& holding, const ResidencyDelta& change) {
  const PageName name{change.hint, change.group};
  uint64_t& copies = holding.copies[TierIndex(change.tier)];
  if (change.is_removed) {
    const std::optional<uint32_t> slot = FindSlot(name);
    if (!slot.has_value() || !TestBit(Bits(*slot, change.tier), holding.bit)) return;
    ClearBit(Bits(*slot, change.tier), holding.bit);
    FreeSlotIfEmpty(*slot);
    --copies;
  } else {
    const std::optional<uint32_t> slot = FindOrAddSlot(name);
    if (!slot.has_value()) {
      ++holding.dropped_copies;
      return;
    }
    if (TestBit(Bits(*slot, change.tier), holding.bit)) return;
    SetBit(Bits(*slot, change.tier), holding.bit);
    ++copies;
  }
  ToggleInDigest(holding.digests, change.hint, change.group, change.tier);
}

// --- slots ---

std::optional<uint32_t> ResidencyMap::FindSlot(const PageName& name) const {
  const auto it = index_.find(name);
  if (it == index_.end()) return std::nullopt;
  return *it;
}

std::optional<uint32_t> ResidencyMap::FindOrAddSlot(const PageName& name) {
  if (const auto it = index_.find(name); it != index_.end()) return *it;
  if (index_.size() >= options_.max_pages) return std::nullopt;
  uint32_t slot;
  if (free_slots_.empty()) {
    slot = static_cast<uint32_t>(names_.size());
    names_.push_back(name);
    bits_.resize(bits_.size() + kNumTiers * words_, 0);
  } else {
    slot = free_slots_.back();
    free_slots_.pop_back();
    names_[slot] = name;
  }
  index_.insert(slot);
  return slot;
}

void ResidencyMap::FreeSlotIfEmpty(uint32_t slot) {
  if (!IsZero({Bits(slot, Tier::kDevice), kNumTiers * words_})) return;
  index_.erase(slot);
  free_slots_.push_back(slot);
}

// --- bits ---

uint32_t ResidencyMap::AllocateBit() {
  for (;;) {
    for (size_t w = 0; w < words_; ++w) {
      if (free_[w] == 0) continue;
      const uint32_t bit = static_cast<uint32_t>(w * 64 + std::countr_zero(free_[w]));
      ClearBit(free_.data(), bit);
      return bit;
    }
    if (IsZero(retired_) && IsZero(sweeping_)) return kNoBit;
    Sweep(names_.size() + 1);
  }
}

void ResidencyMap::RetireBit(uint32_t bit) {
  ClearBit(visible_.data(), bit);
  SetBit(retired_.data(), bit);
}

bool ResidencyMap::Sweep(size_t max_slots) {
  if (IsZero(sweeping_)) {
    if (IsZero(retired_)) return false;
    // A round begins: it clears the bits retired so far from every slot that exists now. Slots
    // added later cannot have them, since a retired bit is never set.
    std::swap(sweeping_, retired_);
    sweep_cursor_ = 0;
  }
  const size_t end = std::min(names_.size(), sweep_cursor_ + max_slots);
  for (; sweep_cursor_ < end; ++sweep_cursor_) {
    const uint32_t slot = static_cast<uint32_t>(sweep_cursor_);
    bool has_changed = false;
    for (Tier tier : kTiers) {
      uint64_t* bits = Bits(slot, tier);
      for (size_t w = 0; w < words_; ++w) {
        has_changed |= (bits[w] & sweeping_[w]) != 0;
        bits[w] &= ~sweeping_[w];
      }
    }
    if (has_changed) FreeSlotIfEmpty(slot);
  }
  if (sweep_cursor_ == names_.size()) {
    for (size_t w = 0; w < words_; ++w) {
      free_[w] |= sweeping_[w];
      sweeping_[w] = 0;
    }
  }
  return !IsZero(sweeping_) || !IsZero(retired_);
}

// --- look-ups ---

bool ResidencyMap::Holds(ResidencySourceId id, const PrefixHint& hint, uint32_t group,
                         Tier tier) const {
  const Source* source = Find(id);
  if (source == nullptr) return false;
  const std::optional<uint32_t> slot = FindSlot({hint, group});
  return slot.has_value() && TestBit(Bits(*slot, tier), source->visible.bit);
}

std::vector<PageRuns> ResidencyMap::LeadingRuns(std::span<const PrefixHint> hints,
                                                uint32_t num_groups,
                                                std::span<const ResidencySourceId> sources) const {
  std::vector<PageRuns> runs(sources.size());
  std::vector<uint32_t> bit_of(sources.size());
  for (size_t i = 0; i < sources.size(); ++i) {
    const Source* source = Find(sources[i]);
    bit_of[i] = source == nullptr ? kEmptyBit : source->visible.bit;
  }

  // Sets of bits (sources) as masks. `reach[t]`: every group so far has a copy in tier t or a
  // faster one. The previous page's masks stay, so that the sources are walked only where a mask
  // changes: at the ends of runs.
  using Masks = std::array<absl::InlinedVector<uint64_t, 4>, kNumTiers>;
  Masks reach, previous;
  for (auto& mask : previous) mask.assign(words_, 0);
  uint32_t run_begin = 0;
  const auto close_runs = [&](uint32_t page) {
    if (page == run_begin) return;
    for (size_t i = 0; i < sources.size(); ++i) {
      for (Tier tier : kTiers) {
        if (!TestBit(previous[TierIndex(tier)].data(), bit_of[i])) continue;
        if (!runs[i].empty() && runs[i].back().tier == tier) {
          runs[i].back().num_pages += page - run_begin;
        } else {
          runs[i].push_back({tier, page - run_begin});
        }
        break;  // tiers ascend from fast to slow: the first that reaches is the fastest
      }
    }
    run_begin = page;
  };

  uint32_t page = 0;
  for (; page < hints.size(); ++page) {
    for (auto& mask : reach) mask.assign(words_, ~uint64_t{0});
    bool is_missing = false;
    for (uint32_t group = 0; group < num_groups; ++group) {
      const std::optional<uint32_t> slot = FindSlot({hints[page], group});
      if (!slot.has_value()) {
        is_missing = true;
        break;
      }
      const uint64_t* device = Bits(*slot, Tier::kDevice);
      const uint64_t* host = Bits(*slot, Tier::kHost);
      const uint64_t* store = Bits(*slot, Tier::kStore);
      // A store's copy serves every worker.
      bool is_stored = false;
      for (size_t w = 0; w < words_; ++w) is_stored |= (store[w] & visible_[w]) != 0;
      for (size_t w = 0; w < words_; ++w) {
        reach[0][w] &= device[w];
        reach[1][w] &= device[w] | host[w];
        reach[2][w] &= is_stored ? ~uint64_t{0} : device[w] | host[w];
      }
    }
    if (is_missing) break;
    if (page > 0) {
      // A run that ended stays ended: a source whose page before is out of reach has no later ones.
      for (size_t w = 0; w < words_; ++w) {
        for (auto& mask : reach) mask[w] &= previous[2][w];
      }
    }
    if (IsZero(reach[2])) break;
    if (page > 0 && reach != previous) close_runs(page);
    std::swap(reach, previous);
  }
  close_runs(page);
  return runs;
}

}  // namespace pagetide
