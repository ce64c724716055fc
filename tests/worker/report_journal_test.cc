#include "worker/report_journal.h"

#include <iterator>
#include <map>
#include <random>
#include <set>
#include <string>
#include <tuple>

#include "base/digest.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pagetide {
namespace {

PrefixHint Hint(uint32_t n) {
  return PrefixHint::Of({Sha256Of(std::to_string(n))});
}

TEST(ReportJournalTest, AnEmptyJournalIsOneEmptySnapshot) {
  ReportJournal journal;
  uint64_t position = 0;
  const auto first = journal.ReadResidency(&position, 10);
  EXPECT_TRUE(first.is_snapshot);
  EXPECT_EQ(first.digests, ResidencyDigests{});
  const auto second = journal.ReadResidency(&position, 10);
  EXPECT_FALSE(second.is_snapshot);
  EXPECT_TRUE(second.changes.empty());
  uint64_t sequences = 0;
  EXPECT_TRUE(journal.ReadSequences(&sequences).is_snapshot);
  EXPECT_FALSE(journal.ReadSequences(&sequences).is_snapshot);
}

TEST(ReportJournalTest, DigestsComeOnlyWithTheNewestState) {
  ReportJournal journal;
  uint64_t position = 0;
  journal.ReadResidency(&position, 10);
  for (uint32_t i = 0; i < 5; ++i) {
    journal.OnResidencyChange(Hint(i), 0, Tier::kDevice, false, 1);
  }
  EXPECT_FALSE(journal.ReadResidency(&position, 3).digests.has_value());
  EXPECT_TRUE(journal.ReadResidency(&position, 3).digests.has_value());
}

TEST(ReportJournalTest, AReaderBehindTheRingTakesASnapshot) {
  ReportJournal journal({.max_changes = 4});
  uint64_t position = 0;
  journal.ReadResidency(&position, 10);
  for (uint32_t i = 0; i < 4; ++i) {
    journal.OnResidencyChange(Hint(i), 0, Tier::kDevice, false, 1);
  }
  uint64_t slow = position;
  EXPECT_FALSE(journal.ReadResidency(&position, 10).is_snapshot);
  journal.OnResidencyChange(Hint(9), 0, Tier::kDevice, false, 1);
  EXPECT_FALSE(journal.ReadResidency(&position, 10).is_snapshot);
  const auto snapshot = journal.ReadResidency(&slow, 2);
  EXPECT_TRUE(snapshot.is_snapshot);
  EXPECT_EQ(snapshot.changes.size(), 5u);
  EXPECT_EQ(slow, position);
}

TEST(ReportJournalTest, WakeIsNotLostBetweenLookAndWait) {
  ReportJournal journal;
  uint64_t position = 0, seen_wakes = 0;
  journal.ReadResidency(&position, 10);
  journal.Wake();
  // Would wait for a day if the wake before were forgotten.
  journal.WaitForResidency(position, &seen_wakes, absl::Hours(24));
  EXPECT_EQ(seen_wakes, 1u);
}

TEST(ReportJournalTest, AClosedSequenceStaysClosed) {
  ReportJournal journal;
  uint64_t position = 0;
  journal.ReadSequences(&position);
  journal.OnSequence({1, 1}, "m", 5);
  journal.OnSequence({1, 1}, "m", 9);
  journal.OnSequenceClosed({1, 1});
  journal.OnSequence({1, 1}, "m", 10);  // a commit's report that came late
  const auto changes = journal.ReadSequences(&position).changes;
  ASSERT_EQ(changes.size(), 1u);
  EXPECT_TRUE(changes[0].is_closed);
}

TEST(ReportJournalTest, AResumedSequenceIsOpenAgainUnderItsId) {
  ReportJournal journal({.max_closed_sequences = 1});
  uint64_t position = 0;
  journal.ReadSequences(&position);
  journal.OnSequence({1, 1}, "m", 5);
  journal.OnSequenceClosed({1, 1});
  journal.OnSequenceResumed({1, 1}, "m", 5);
  // Not forgotten with those that are closed.
  for (uint64_t n = 2; n < 5; ++n) {
    journal.OnSequence({1, n}, "m", 1);
    journal.OnSequenceClosed({1, n});
  }
  const auto sequences = journal.ReadSequences(&position).changes;
  ASSERT_FALSE(sequences.empty());
  EXPECT_EQ(sequences[0].id, (SequenceId{1, 1}));
  EXPECT_FALSE(sequences[0].is_closed);
  EXPECT_EQ(sequences[0].length, 5u);
}

// Readers at their own pace always end up with the set and the sequences of the writer.
TEST(ReportJournalTest, ReadersConvergeToTheWritersState) {
  using Copy = std::tuple<PrefixHint, uint32_t, Tier>;
  for (uint32_t seed = 1; seed <= 20; ++seed) {
    std::mt19937 rng(seed);
    ReportJournal journal({.max_changes = 16, .max_closed_sequences = 4});
    std::set<Copy> truth;
    std::map<uint64_t, uint64_t> open;
    uint64_t next_sequence = 1;
    struct Reader {
      uint64_t position = 0, sequence_position = 0;
      std::set<Copy> copies;
      std::map<uint64_t, uint64_t> sequences;
      int snapshots = 0;
    } readers[3];
    for (int step = 0; step < 3000; ++step) {
      switch (rng() % 6) {
        case 0:
        case 1:
        case 2: {
          const Copy copy{Hint(rng() % 20), rng() % 2, static_cast<Tier>(rng() % 3)};
          const bool is_removed = rng() % 2 == 0;
          journal.OnResidencyChange(std::get<0>(copy), std::get<1>(copy), std::get<2>(copy),
                                    is_removed, 1);
          if (is_removed) {
            truth.erase(copy);
          } else {
            truth.insert(copy);
          }
          break;
        }
        case 3:
          open[next_sequence] = 1;
          journal.OnSequence({1, next_sequence++}, "m", 1);
          break;
        case 4:
          if (!open.empty()) {
            const uint64_t id = std::next(open.begin(), rng() % open.size())->first;
            if (rng() % 2 == 0) {
              journal.OnSequence({1, id}, "m", ++open[id]);
            } else {
              open.erase(id);
              journal.OnSequenceClosed({1, id});
            }
          }
          break;
        case 5: {
          // The first reader reads often, the last rarely.
          const size_t i = rng() % 10 == 0 ? 2 : rng() % 2;
          Reader& reader = readers[i];
          const auto residency = journal.ReadResidency(&reader.position, 1 + rng() % 8);
          if (residency.is_snapshot) {
            reader.copies.clear();
            ++reader.snapshots;
          }
          for (const auto& c : residency.changes) {
            if (c.is_removed) {
              ASSERT_EQ(reader.copies.erase({c.hint, c.group, c.tier}), 1u);
            } else {
              ASSERT_TRUE(reader.copies.insert({c.hint, c.group, c.tier}).second);
            }
          }
          if (residency.digests.has_value()) {
            ASSERT_EQ(reader.copies, truth) << "seed " << seed << " step " << step;
            ResidencyDigests digests{};
            for (const auto& [hint, group, tier] : truth)
              ToggleInDigest(digests, hint, group, tier);
            ASSERT_EQ(*residency.digests, digests);
          }
          const auto sequences = journal.ReadSequences(&reader.sequence_position);
          if (sequences.is_snapshot) reader.sequences.clear();
          for (const auto& s : sequences.changes) {
            if (s.is_closed) {
              reader.sequences.erase(s.id.number);
            } else {
              reader.sequences[s.id.number] = s.length;
            }
          }
          ASSERT_EQ(reader.sequences, open) << "seed " << seed << " step " << step;
          break;
        }
      }
    }
    EXPECT_GT(readers[2].snapshots, 1) << "seed " << seed;
  }
}

}  // namespace
}  // namespace pagetide
