#include "core/residency_map.h"

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pagetide {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using Outcome = ResidencyMap::Outcome;

PrefixHint Hint(uint32_t n) {
  PrefixHint hint;
  const Digest digest = Sha256Of(std::string(1, static_cast<char>(n)) + std::to_string(n));
  std::copy_n(digest.bytes.begin(), hint.bytes.size(), hint.bytes.begin());
  return hint;
}

std::vector<PrefixHint> Hints(uint32_t n) {
  std::vector<PrefixHint> hints;
  for (uint32_t i = 0; i < n; ++i) hints.push_back(Hint(i));
  return hints;
}

ResidencyDelta Add(uint32_t page, Tier tier = Tier::kDevice, uint32_t group = 0) {
  return {.hint = Hint(page), .group = group, .tier = tier};
}

ResidencyDelta Remove(uint32_t page, Tier tier = Tier::kDevice, uint32_t group = 0) {
  return {.hint = Hint(page), .group = group, .tier = tier, .is_removed = true};
}

ResidencyDigests DigestsOf(const std::vector<ResidencyDelta>& copies) {
  ResidencyDigests digests{};
  for (const auto& c : copies) ToggleInDigest(digests, c.hint, c.group, c.tier);
  return digests;
}

Outcome Report(ResidencyMap& map, ResidencySourceId source, uint64_t number,
               const std::vector<ResidencyDelta>& changes) {
  return map.Apply(source, {.number = number, .changes = changes}).outcome;
}

TEST(ResidencyDigestTest, HashIsPartOfTheProtocol) {
  PrefixHint hint;
  for (size_t i = 0; i < hint.bytes.size(); ++i) hint.bytes[i] = static_cast<uint8_t>(i * 16 + 1);
  // Golden: a change breaks every worker of another version.
  EXPECT_EQ(ResidencyHash(hint, 3, Tier::kHost), uint64_t{1366565722656298373u});
  EXPECT_EQ(ResidencyBucket(hint), 0u);
  hint.bytes[0] = 0xa7;
  EXPECT_EQ(ResidencyBucket(hint), 10u);
}

TEST(ResidencyMapTest, SplitsTheLeadingRunByFastestTier) {
  ResidencyMap map({});
  const auto worker = *map.AddSource(1);
  const auto other = *map.AddSource(2);
  const auto store = *map.AddSource(3);
  ASSERT_EQ(
      Report(map, worker, 1, {Add(0), Add(1), Add(2, Tier::kHost), Add(4), Add(1, Tier::kHost)}),
      Outcome::kApplied);
  ASSERT_EQ(Report(map, other, 1, {Add(0)}), Outcome::kApplied);
  ASSERT_EQ(Report(map, store, 1, {Add(3, Tier::kStore), Add(1, Tier::kStore)}), Outcome::kApplied);
  const auto hints = Hints(8);
  const ResidencySourceId sources[] = {worker, other, ResidencySourceId()};
  const auto runs = map.LeadingRuns(hints, 1, sources);
  EXPECT_THAT(runs[0], ElementsAre(PageRun{Tier::kDevice, 2}, PageRun{Tier::kHost, 1},
                                   PageRun{Tier::kStore, 1}, PageRun{Tier::kDevice, 1}));
  EXPECT_THAT(runs[1], ElementsAre(PageRun{Tier::kDevice, 1}, PageRun{Tier::kStore, 1}));
  EXPECT_THAT(runs[2], IsEmpty());  // holds nothing, and page 0 is not in the store
}

TEST(ResidencyMapTest, APageCountsOnlyIfAllGroupsHaveIt) {
  ResidencyMap map({});
  const auto worker = *map.AddSource(1);
  ASSERT_EQ(Report(map, worker, 1,
                   {Add(0, Tier::kDevice, 0), Add(0, Tier::kHost, 1), Add(1, Tier::kDevice, 0)}),
            Outcome::kApplied);
  const auto hints = Hints(2);
  const ResidencySourceId sources[] = {worker};
  EXPECT_THAT(map.LeadingRuns(hints, 1, sources)[0], ElementsAre(PageRun{Tier::kDevice, 2}));
  // The slowest group decides the tier; page 1 lacks group 1.
  EXPECT_THAT(map.LeadingRuns(hints, 2, sources)[0], ElementsAre(PageRun{Tier::kHost, 1}));
  EXPECT_THAT(map.LeadingRuns(hints, 3, sources)[0], IsEmpty());
}

TEST(ResidencyMapTest, AGapAsksForOneSnapshotAndIgnoresTheRest) {
  ResidencyMap map({});
  const auto worker = *map.AddSource(7);
  ASSERT_EQ(Report(map, worker, 1, {Add(0)}), Outcome::kApplied);
  const std::vector<ResidencyDelta> changes = {Add(1)};
  const auto gap = map.Apply(worker, {.number = 3, .changes = changes});
  EXPECT_EQ(gap.outcome, Outcome::kNeedSnapshot);
  EXPECT_THAT(gap.because, HasSubstr("report 3 after 1"));
  EXPECT_EQ(Report(map, worker, 4, {Add(2)}), Outcome::kIgnored);
  EXPECT_FALSE(map.StatsOf(worker)->is_synced);
  EXPECT_TRUE(map.Holds(worker, Hint(0), 0, Tier::kDevice));  // still a hint

  const std::vector<ResidencyDelta> first = {Add(5)}, last = {Add(6)};
  EXPECT_EQ(map.Apply(worker, {.number = 9, .is_snapshot = true, .changes = first}).outcome,
            Outcome::kApplied);
  EXPECT_TRUE(map.Holds(worker, Hint(0), 0, Tier::kDevice));  // old until the snapshot ends
  EXPECT_FALSE(map.Holds(worker, Hint(5), 0, Tier::kDevice));
  EXPECT_EQ(map.Apply(worker, {.number = 10, .is_snapshot_end = true, .changes = last}).outcome,
            Outcome::kApplied);
  EXPECT_FALSE(map.Holds(worker, Hint(0), 0, Tier::kDevice));
  EXPECT_TRUE(map.Holds(worker, Hint(5), 0, Tier::kDevice));
  EXPECT_TRUE(map.Holds(worker, Hint(6), 0, Tier::kDevice));
  EXPECT_TRUE(map.StatsOf(worker)->is_synced);
  EXPECT_EQ(Report(map, worker, 11, {Remove(6)}), Outcome::kApplied);
}

TEST(ResidencyMapTest, AGapInsideASnapshotStartsOver) {
  ResidencyMap map({});
  const auto worker = *map.AddSource(7);
  ASSERT_EQ(Report(map, worker, 1, {Add(0)}), Outcome::kApplied);
  const std::vector<ResidencyDelta> part = {Add(5)};
  ASSERT_EQ(map.Apply(worker, {.number = 2, .is_snapshot = true, .changes = part}).outcome,
            Outcome::kApplied);
  EXPECT_EQ(map.Apply(worker, {.number = 4, .is_snapshot_end = true}).outcome,
            Outcome::kNeedSnapshot);
  EXPECT_TRUE(map.Holds(worker, Hint(0), 0, Tier::kDevice));
  EXPECT_FALSE(map.Holds(worker, Hint(5), 0, Tier::kDevice));
}

TEST(ResidencyMapTest, ADifferingBucketDigestAsksForASnapshot) {
  ResidencyMap map({});
  const auto worker = *map.AddSource(7);
  const std::vector<ResidencyDelta> changes = {Add(0), Add(1), Add(1, Tier::kHost, 2)};
  const ResidencyDigests right = DigestsOf(changes);
  ASSERT_EQ(map.Apply(worker, {.number = 1, .changes = changes, .digests = right}).outcome,
            Outcome::kApplied);
  // The worker holds page 2 as well, but its report got lost somewhere.
  ResidencyDigests differing = right;
  ToggleInDigest(differing, Hint(2), 0, Tier::kDevice);
  const auto result = map.Apply(worker, {.number = 2, .digests = differing});
  EXPECT_EQ(result.outcome, Outcome::kNeedSnapshot);
  EXPECT_THAT(result.because, HasSubstr("bucket"));
}

TEST(ResidencyMapTest, RepeatedChangesCountOnce) {
  ResidencyMap map({});
  const auto worker = *map.AddSource(7);
  const ResidencyDigests one = DigestsOf({Add(0)});
  const std::vector<ResidencyDelta> twice = {Add(0), Add(0), Remove(9)};
  EXPECT_EQ(map.Apply(worker, {.number = 1, .changes = twice, .digests = one}).outcome,
            Outcome::kApplied);
  EXPECT_EQ(map.StatsOf(worker)->copies[TierIndex(Tier::kDevice)], 1u);
}

TEST(ResidencyMapTest, ARemovedSourceVanishesAtOnceAndItsSlotsLater) {
  ResidencyMap map({});
  const auto worker = *map.AddSource(1);
  const auto other = *map.AddSource(2);
  std::vector<ResidencyDelta> changes;
  for (uint32_t i = 0; i < 200; ++i) changes.push_back(Add(i));
  ASSERT_EQ(Report(map, worker, 1, changes), Outcome::kApplied);
  ASSERT_EQ(Report(map, other, 1, {Add(0)}), Outcome::kApplied);
  map.RemoveSource(worker);
  EXPECT_EQ(map.num_sources(), 1u);
  const ResidencySourceId sources[] = {worker, other};
  const auto runs = map.LeadingRuns(Hints(3), 1, sources);
  EXPECT_THAT(runs[0], IsEmpty());
  EXPECT_THAT(runs[1], ElementsAre(PageRun{Tier::kDevice, 1}));
  EXPECT_EQ(map.num_pages(), 200u);
  EXPECT_EQ(Report(map, worker, 2, {Add(3)}), Outcome::kIgnored);
  while (map.Sweep(50)) {
  }
  EXPECT_EQ(map.num_pages(), 1u);
}

TEST(ResidencyMapTest, BitsAreReusedOnlyAfterTheyWereCleared) {
  ResidencyMap map({.max_pages = 1000, .max_sources = 4});
  for (uint32_t round = 0; round < 300; ++round) {
    const auto worker = map.AddSource(round + 1);
    ASSERT_TRUE(worker.ok()) << worker.status();
    ASSERT_EQ(Report(map, *worker, 1, {Add(round % 20)}), Outcome::kApplied);
    for (uint32_t page = 0; page < 20; ++page) {
      const ResidencySourceId sources[] = {*worker};
      const PrefixHint hints[] = {Hint(page)};
      EXPECT_EQ(map.LeadingRuns(hints, 1, sources)[0].empty(), page != round % 20);
    }
    map.RemoveSource(*worker);
  }
}

TEST(ResidencyMapTest, TablesAreBounded) {
  ResidencyMap map({.max_pages = 2, .max_sources = 2});
  const auto a = *map.AddSource(1);
  ASSERT_TRUE(map.AddSource(2).ok());
  EXPECT_EQ(map.AddSource(3).status().code(), absl::StatusCode::kResourceExhausted);
  // A full map drops pages; the digests of all three are not held against it.
  const std::vector<ResidencyDelta> changes = {Add(0), Add(1), Add(2)};
  const auto result =
      map.Apply(a, {.number = 1, .changes = changes, .digests = DigestsOf(changes)});
  EXPECT_EQ(result.outcome, Outcome::kApplied);
  EXPECT_EQ(map.StatsOf(a)->dropped_copies, 1u);
  EXPECT_EQ(map.num_pages(), 2u);
}

// The map against plain sets, over random reports, gaps, snapshots in parts and removals.
class NaiveMap {
 public:
  using Copy = std::tuple<PrefixHint, uint32_t, Tier>;
  using Copies = std::set<Copy>;

  static void Apply(Copies& copies, const ResidencyDelta& change) {
    const Copy copy{change.hint, change.group, change.tier};
    if (change.is_removed) {
      copies.erase(copy);
    } else {
      copies.insert(copy);
    }
  }

  std::map<ResidencySourceId, Copies> sources;

  PageRuns LeadingRun(const std::vector<PrefixHint>& hints, uint32_t num_groups,
                      ResidencySourceId source) const {
    PageRuns runs;
    for (const PrefixHint& hint : hints) {
      Tier slowest = Tier::kDevice;
      for (uint32_t group = 0; group < num_groups; ++group) {
        const auto holds = [&](ResidencySourceId id, Tier tier) {
          const auto it = sources.find(id);
          return it != sources.end() && it->second.contains({hint, group, tier});
        };
        Tier tier;
        if (holds(source, Tier::kDevice)) {
          tier = Tier::kDevice;
        } else if (holds(source, Tier::kHost)) {
          tier = Tier::kHost;
        } else if (std::any_of(sources.begin(), sources.end(),
                               [&](const auto& s) { return holds(s.first, Tier::kStore); })) {
          tier = Tier::kStore;
        } else {
          return runs;
        }
        slowest = std::max(slowest, tier);
      }
      if (!runs.empty() && runs.back().tier == slowest) {
        ++runs.back().num_pages;
      } else {
        runs.push_back({slowest, 1});
      }
    }
    return runs;
  }
};

class ResidencyMapModelTest : public ::testing::TestWithParam<uint32_t> {};

TEST_P(ResidencyMapModelTest, AgreesWithPlainSets) {
  std::mt19937 rng(GetParam());
  const auto below = [&](uint32_t n) { return static_cast<uint32_t>(rng() % n); };
  constexpr uint32_t kPages = 6, kGroups = 2;
  size_t num_split_runs = 0;  // the test is worth something only if answers are not empty
  ResidencyMap map({.max_pages = 10000, .max_sources = 3 + below(90)});
  NaiveMap naive;
  struct Peer {
    ResidencySourceId id;
    uint64_t number = 0;
    bool is_lost = false;  // waits for a snapshot
    bool in_snapshot = false;
    bool is_staged = false;  // the snapshot is not visible before its end
    NaiveMap::Copies truth;  // what the map should think once all parts arrived
  };
  std::vector<Peer> peers;
  const auto random_changes = [&](bool only_adds) {
    std::vector<ResidencyDelta> changes(below(6));
    for (auto& c : changes) {
      c.hint = Hint(below(kPages));
      c.group = below(kGroups);
      c.tier = static_cast<Tier>(below(3));
      c.is_removed = !only_adds && below(3) == 0;
    }
    return changes;
  };
  const auto digests_of = [](const NaiveMap::Copies& copies) {
    ResidencyDigests digests{};
    for (const auto& [hint, group, tier] : copies) ToggleInDigest(digests, hint, group, tier);
    return digests;
  };
  for (int step = 0; step < 2000; ++step) {
    const uint32_t action = below(100);
    if (peers.size() < 3 && action < 10) {
      const auto id = map.AddSource(step + 1);
      ASSERT_TRUE(id.ok()) << id.status();
      peers.push_back({.id = *id});
      naive.sources[*id];
    } else if (!peers.empty() && action < 13) {
      const size_t i = below(peers.size());
      map.RemoveSource(peers[i].id);
      naive.sources.erase(peers[i].id);
      peers.erase(peers.begin() + i);
    } else if (!peers.empty() && action < 20) {  // a snapshot begins
      Peer& peer = peers[below(peers.size())];
      const bool is_end = below(2) == 0;
      // The first part alone of a source with nothing visible shows at once.
      peer.is_staged = !naive.sources[peer.id].empty();
      peer.truth.clear();
      const auto changes = random_changes(true);
      for (const auto& c : changes) NaiveMap::Apply(peer.truth, c);
      peer.number += 1 + below(5);
      const auto result = map.Apply(
          peer.id, {.number = peer.number,
                    .is_snapshot = true,
                    .is_snapshot_end = is_end,
                    .changes = changes,
                    .digests = is_end ? std::make_optional(digests_of(peer.truth)) : std::nullopt});
      ASSERT_EQ(result.outcome, Outcome::kApplied);
      peer.is_lost = false;
      peer.in_snapshot = !is_end;
      if (is_end || !peer.is_staged) naive.sources[peer.id] = peer.truth;
    } else if (!peers.empty() && action < 24) {  // a gap
      Peer& peer = peers[below(peers.size())];
      peer.number += 2;
      const auto result = map.Apply(peer.id, {.number = peer.number});
      ASSERT_EQ(result.outcome, peer.is_lost ? Outcome::kIgnored : Outcome::kNeedSnapshot);
      peer.is_lost = true;
      peer.in_snapshot = false;
    } else if (!peers.empty() && action < 27) {  // the peer holds more than it reported
      Peer& peer = peers[below(peers.size())];
      ResidencyDigests wrong = digests_of(peer.truth);
      wrong[below(16)] ^= 1;
      const bool is_checked = !peer.is_lost && !peer.in_snapshot;
      const auto result = map.Apply(peer.id, {.number = ++peer.number, .digests = wrong});
      if (is_checked) {
        ASSERT_EQ(result.outcome, Outcome::kNeedSnapshot);
        peer.is_lost = true;
      } else {
        // Digests of a part are those of the whole only at its end; the router does not send them
        // there.
        peer.is_lost = peer.is_lost || result.outcome == Outcome::kNeedSnapshot;
        peer.in_snapshot = peer.in_snapshot && !peer.is_lost;
      }
    } else if (!peers.empty() && action < 95) {
      Peer& peer = peers[below(peers.size())];
      const auto changes = random_changes(peer.in_snapshot);
      const bool is_end = peer.in_snapshot && below(3) == 0;
      NaiveMap::Copies after = peer.truth;
      for (const auto& c : changes) NaiveMap::Apply(after, c);
      const bool has_digests = is_end || !peer.in_snapshot;
      const auto result = map.Apply(
          peer.id, {.number = ++peer.number,
                    .is_snapshot_end = is_end,
                    .changes = changes,
                    .digests = has_digests ? std::make_optional(digests_of(after)) : std::nullopt});
      if (peer.is_lost) {
        ASSERT_EQ(result.outcome, Outcome::kIgnored);
      } else {
        ASSERT_EQ(result.outcome, Outcome::kApplied) << result.because;
        peer.truth = after;
        if (!peer.in_snapshot || is_end || !peer.is_staged) naive.sources[peer.id] = after;
        if (is_end) peer.in_snapshot = false;
      }
    } else {
      map.Sweep(below(20));
    }

    std::vector<PrefixHint> prompt;
    for (uint32_t n = below(8); n > 0; --n) prompt.push_back(Hint(below(kPages)));
    std::vector<ResidencySourceId> ids = {ResidencySourceId()};
    for (const Peer& peer : peers) ids.push_back(peer.id);
    const uint32_t num_groups = 1 + below(kGroups);
    const auto runs = map.LeadingRuns(prompt, num_groups, ids);
    for (size_t i = 0; i < ids.size(); ++i) {
      ASSERT_EQ(runs[i], naive.LeadingRun(prompt, num_groups, ids[i])) << "step " << step;
      num_split_runs += runs[i].size() >= 2;
    }
    for (const Peer& peer : peers) {
      const auto stats = map.StatsOf(peer.id);
      ASSERT_TRUE(stats.has_value());
      ASSERT_EQ(stats->copies[0] + stats->copies[1] + stats->copies[2],
                naive.sources[peer.id].size());
    }
  }
  EXPECT_GE(num_split_runs, 200u);
  for (const Peer& peer : peers) map.RemoveSource(peer.id);
  while (map.Sweep(100)) {
  }
  EXPECT_EQ(map.num_pages(), 0u);
}

INSTANTIATE_TEST_SUITE_P(Seeds, ResidencyMapModelTest, ::testing::Range(1u, 21u));

}  // namespace
}  // namespace pagetide
