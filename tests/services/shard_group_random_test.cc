// Random calls of a group against a model of it that a child could follow.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "tests/services/shard_group_fixture.h"

namespace pagetide::shard_group_test {
namespace {

struct NaiveGroup {
  v1::ShardGroup proto;
  uint64_t length = 0;
  std::vector<std::vector<uint32_t>> ranks;
};

class ShardGroupRandomTest : public ShardGroupTest {
 protected:
  // What the group should answer to a commit of so many tokens.
  static std::string ExpectedCommit(const NaiveGroup& group, uint64_t length) {
    if (length < group.length) return "LENGTH_MISMATCH";
    if (length == group.length) return "";
    for (const auto& tokens : group.ranks) {
      if (tokens.size() < length) return "SHARD_BEHIND";
    }
    for (const auto& tokens : group.ranks) {
      if (!std::equal(tokens.begin(), tokens.begin() + static_cast<int64_t>(length),
                      group.ranks[0].begin())) {
        return "SHARD_DIVERGED";
      }
    }
    return "";
  }
};

TEST_F(ShardGroupRandomTest, AgreesWithANaiveModel) {
  constexpr uint32_t kRanks = 3;
  constexpr int kSteps = 400;
  StartRanks(kRanks);
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  std::mt19937 random(seed);
  const auto below = [&](uint64_t n) {
    return std::uniform_int_distribution<uint64_t>(0, n - 1)(random);
  };
  std::vector<NaiveGroup> groups;
  int num_committed = 0, num_refused = 0;
  for (int step = 0; step < kSteps && !HasFailure(); ++step) {
    const uint64_t what = below(100);
    if (groups.empty() || (what < 5 && groups.size() < 4)) {
      v1::OpenShardGroupRequest request = OpenRequest({});
      request.set_no_reuse(true);
      const auto opened = Open(request);
      ASSERT_TRUE(opened.ok()) << opened.status();
      groups.push_back({opened->group(), 0, std::vector<std::vector<uint32_t>>(kRanks)});
      continue;
    }
    const size_t at = below(groups.size());
    NaiveGroup& group = groups[at];
    if (what < 45) {  // Some ranks append, mostly the same.
      for (uint32_t rank = 0; rank < kRanks; ++rank) {
        if (below(5) == 0) continue;
        std::vector<uint32_t>& has = group.ranks[rank];
        std::vector<uint32_t> tokens = has;
        const uint64_t end = group.length + 1 + below(12);
        while (tokens.size() < end && tokens.size() < 80) {
          tokens.push_back(tokens_[tokens.size()] ^ (below(40) == 0 ? 1 : 0));
        }
        if (tokens.size() == has.size()) continue;
        const absl::Status appended = Append(group.proto, rank, tokens, tokens.size());
        ASSERT_TRUE(appended.ok()) << appended;
        has = tokens;
      }
    } else if (what < 80) {
      const uint64_t length = group.length + below(10) - (group.length > 0 ? below(2) : 0);
      const auto committed = Commit(group.proto, length);
      EXPECT_EQ(GetReason(committed.status()), ExpectedCommit(group, length)) << committed.status();
      if (committed.ok()) {
        num_committed += length > group.length ? 1 : 0;
        group.length = length;
        EXPECT_EQ(committed->group().length(), length);
      } else {
        ++num_refused;
      }
    } else if (what < 95) {
      const uint64_t length = below(group.length + 2);
      const auto rewound = Rewind(group.proto, length);
      EXPECT_EQ(rewound.ok(), length <= group.length) << rewound.status();
      if (rewound.ok()) {
        group.length = length;
        for (auto& tokens : group.ranks) tokens.resize(std::min<size_t>(tokens.size(), length));
      }
    } else {
      EXPECT_TRUE(Close(group.proto).ok());
      groups.erase(groups.begin() + static_cast<int64_t>(at));
      continue;
    }
    const auto now = Get(group.proto);
    ASSERT_TRUE(now.ok()) << now.status();
    EXPECT_EQ(now->length(), group.length);
    for (uint32_t rank = 0; rank < kRanks; ++rank) {
      EXPECT_EQ(now->ranks(rank).state().length(), group.ranks[rank].size());
    }
  }
  EXPECT_GT(num_committed, 10);
  EXPECT_GT(num_refused, 10);
  for (const NaiveGroup& group : groups) {
    for (uint32_t rank = 0; rank < kRanks; ++rank) {
      const std::vector<uint32_t>& tokens = group.ranks[rank];
      if (tokens.empty()) continue;
      const std::string& id = group.proto.ranks(rank).state().sequence_id();
      EXPECT_TRUE(ranks_[rank]->client->Verify(id, tokens, 0, tokens.size()).ok());
    }
    EXPECT_TRUE(Close(group.proto).ok());
  }
  ExpectNothingIsOpen();
}

// Commits and rewinds of one group at once: its length is always one that was asked for, and no
// longer than any rank.
TEST_F(ShardGroupRandomTest, CallsOfOneGroupDoNotInterleave) {
  StartRanks(2);
  const auto opened = Open(tokens_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  const v1::ShardGroup group = opened->group();
  AppendAll(group, tokens_, 100);
  ASSERT_TRUE(Commit(group, 40).ok());
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      for (int n = 0; n < 20; ++n) {
        if (i % 2 == 0) {
          const auto committed = Commit(group, 40 + n);
          EXPECT_TRUE(!committed.ok() || committed->group().length() == 40u + n);
        } else {
          const auto cut = Rewind(group, 40);
          ASSERT_TRUE(cut.ok()) << cut.status();
          for (const auto& rank : cut->group().ranks()) EXPECT_EQ(rank.state().length(), 40u);
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const auto now = Get(group);
  ASSERT_TRUE(now.ok()) << now.status();
  EXPECT_EQ(now->length(), 40u);
}

}  // namespace
}  // namespace pagetide::shard_group_test
