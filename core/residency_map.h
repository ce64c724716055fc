// ResidencyMap: which sources (workers, stores) hold which pages in which tiers, as they reported
// it. A hint, not a fact: the owner of a page decides.
//
// A page is named by (16-byte hint of its prefix key, layer group). Pages sit in dense slots; a
// slot has one bit a source and tier, so that a page on 64 workers costs no more than a page on
// one, and a prompt is matched against all workers at once, 64 to a machine word. At 1 M pages and
// up to 96 sources: 68 bytes a page and 5 to 10 for the index.
//
// A source owns a bit. A source that goes away (or replaces its report by a snapshot) loses its bit
// at once, by a mask over all look-ups; the bits in the slots are cleared later, a bounded number
// of slots a call (Sweep), and only then is the bit given to another source.
//
// Not thread-safe: the owner calls it under its lock. Neither copied nor moved (the index points
// into it).
#ifndef PAGETIDE_CORE_RESIDENCY_MAP_H_
#define PAGETIDE_CORE_RESIDENCY_MAP_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/container/inlined_vector.h"
#include "absl/status/statusor.h"
#include "base/strong_id.h"
#include "core/residency_digest.h"
#include "core/tier.h"

namespace pagetide {

// One attachment of one source. Never reused, so that a late report of a removed source changes
// nothing. The default value is a source that holds nothing.
using ResidencySourceId = StrongId<struct ResidencySourceTag>;

// One message of a source. Numbers grow by one a report within an attachment.
struct ResidencyReport {
  uint64_t number = 0;
  // First part of a snapshot, which replaces all that was reported before. Any number is accepted.
  bool is_snapshot = false;
  // Last part; parts follow each other by number. Until then the earlier state stays visible.
  bool is_snapshot_end = false;
  std::span<const ResidencyDelta> changes;
  // What the source's digests are after this report; checked if given.
  std::optional<ResidencyDigests> digests;
};

// `num_pages` consecutive pages of the prompt whose fastest copies, over all layer groups, are in
// `tier`.
struct PageRun {
  Tier tier = Tier::kDevice;
  uint32_t num_pages = 0;
  friend bool operator==(const PageRun&, const PageRun&) = default;
};
using PageRuns = absl::InlinedVector<PageRun, 4>;

class ResidencyMap {
 public:
  struct Options {
    // Pages beyond it are not remembered, and their sources are marked partial until the next
    // snapshot.
    size_t max_pages = size_t{4} << 20;
    size_t max_sources = 96;
  };

  enum class Outcome : uint8_t {
    kApplied,
    // The report does not continue what came before, or the digests differ. The source is out of
    // sync: what it reported stays as a hint, and its reports are ignored until a snapshot.
    kNeedSnapshot,
    // Ignored: a snapshot was asked for already, or the source was removed.
    kIgnored,
  };
  struct ApplyResult {
    Outcome outcome = Outcome::kApplied;
    std::string because;  // of kNeedSnapshot
  };

  struct SourceStats {
    uint64_t incarnation = 0;
    uint64_t last_number = 0;
    bool is_synced = false;
    // Copies dropped because the map was full; while > 0 digests are not compared.
    uint64_t dropped_copies = 0;
    std::array<uint64_t, kNumTiers> copies{};  // pages (of all groups) by tier
  };

  explicit ResidencyMap(Options options);
  ResidencyMap(const ResidencyMap&) = delete;
  ResidencyMap& operator=(const ResidencyMap&) = delete;

  // RESOURCE_EXHAUSTED beyond max_sources. The first report must be number 1 or a snapshot.
  absl::StatusOr<ResidencySourceId> AddSource(uint64_t incarnation);
  // All copies of the source vanish at once. Unknown ids are ignored.
  void RemoveSource(ResidencySourceId source);
  // O(changes), plus a bounded share of sweeping.
  ApplyResult Apply(ResidencySourceId source, const ResidencyReport& report);
  // Clears what removed sources left in up to `max_slots` slots. Returns false when nothing is left
  // to clear.
  bool Sweep(size_t max_slots);

  // For each of `sources`: the leading run of pages that it can use, split by tier, fastest copy
  // first. A page counts if every group 0…num_groups-1 has a copy on the source or in any source's
  // store tier; its tier is that of its slowest group. O(pages × groups) look-ups for all sources
  // together.
  std::vector<PageRuns> LeadingRuns(std::span<const PrefixHint> hints, uint32_t num_groups,
                                    std::span<const ResidencySourceId> sources) const;
  // True if the source holds a copy in that tier.
  bool Holds(ResidencySourceId source, const PrefixHint& hint, uint32_t group, Tier tier) const;

  std::optional<SourceStats> StatsOf(ResidencySourceId source) const;
  // Pages with a slot, including those that only removed sources held and that are not swept yet.
  size_t num_pages() const { return index_.size(); }
  size_t num_sources() const;

 private:
  static constexpr uint32_t kNoBit = ~uint32_t{0};
  // Bit that no slot ever has: the default source.
  static constexpr uint32_t kEmptyBit = 0;

  struct PageName {
    PrefixHint hint;
    uint32_t group = 0;
    friend bool operator==(const PageName&, const PageName&) = default;
  };
  // The index holds slot numbers and compares the names behind them, so that a name is stored once.
  struct SlotHash {
    using is_transparent = void;
    const std::vector<PageName>* names;
    size_t operator()(const PageName& name) const;
    size_t operator()(uint32_t slot) const { return (*this)((*names)[slot]); }
  };
  struct SlotEq {
    using is_transparent = void;
    const std::vector<PageName>* names;
    bool operator()(uint32_t a, uint32_t b) const { return a == b; }
    bool operator()(uint32_t slot, const PageName& name) const { return (*names)[slot] == name; }
    bool operator()(const PageName& name, uint32_t slot) const { return (*names)[slot] == name; }
  };

  // What one bit stands for: the copies reported through it.
  struct Holding {
    uint32_t bit = kNoBit;
    uint64_t dropped_copies = 0;
    std::array<uint64_t, kNumTiers> copies{};
    ResidencyDigests digests{};
    bool IsEmpty() const { return copies[0] + copies[1] + copies[2] + dropped_copies == 0; }
  };
  struct Source {
    ResidencySourceId id;  // default: the place is free
    uint64_t incarnation = 0;
    uint64_t last_number = 0;
    enum class State : uint8_t { kSynced, kInSnapshot, kAwaitingSnapshot } state = State::kSynced;
    Holding visible;
    Holding
        incoming;  // of a snapshot that has not ended; bit kNoBit if `visible` takes it directly
  };

  Source* Find(ResidencySourceId id);
  const Source* Find(ResidencySourceId id) const;
  uint64_t* Bits(uint32_t slot, Tier tier) {
    return &bits_[(size_t{slot} * kNumTiers + TierIndex(tier)) * words_];
  }
  const uint64_t* Bits(uint32_t slot, Tier tier) const {
    return &bits_[(size_t{slot} * kNumTiers + TierIndex(tier)) * words_];
  }
  std::optional<uint32_t> FindSlot(const PageName& name) const;
  // nullopt when the map is full.
  std::optional<uint32_t> FindOrAddSlot(const PageName& name);
  void FreeSlotIfEmpty(uint32_t slot);
  void ApplyChange(Holding& holding, const ResidencyDelta& change);
  ApplyResult OutOfSync(Source& source, std::string because);
  // kNoBit if all bits are in use even after a full sweep.
  uint32_t AllocateBit();
  // Takes the bit out of sight; it becomes free when swept.
  void RetireBit(uint32_t bit);

  const Options options_;
  const size_t words_;  // 64-bit words of one tier of one slot

  std::vector<PageName> names_;  // [num_slots]
  std::vector<uint64_t> bits_;   // [num_slots, kNumTiers, words_]
  std::vector<uint32_t> free_slots_;
  absl::flat_hash_set<uint32_t, SlotHash, SlotEq> index_;

  std::vector<Source> sources_;  // a handful; place = id.value() % max_sources
  uint64_t next_source_ = 0;

  using Mask = std::vector<uint64_t>;  // [words_]
  Mask visible_;                       // bits that look-ups see
  Mask free_;                          // bits that no slot has and nobody owns
  Mask retired_;                       // to be swept in the next round
  Mask sweeping_;                      // being cleared in this round
  size_t sweep_cursor_ = 0;            // next slot of this round
};

}  // namespace pagetide

#endif  // PAGETIDE_CORE_RESIDENCY_MAP_H_
