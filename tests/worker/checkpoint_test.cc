// Checkpoints: whatever happens to a sequence, it comes back as it was.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "tests/worker/checkpoint_fixture.h"

namespace pagetide {
namespace {

TEST(CheckpointTest, ComesBackAfterRewindAndOtherAppends) {
  for (int num_groups : {1, 2}) {
    HostUnderTest t({.num_groups = num_groups});
    const std::vector<uint32_t> tokens = Tokens(0, 40);
    auto info = t.OpenAndFill(tokens);
    ASSERT_TRUE(info.ok()) << info.status();
    auto checkpoint = t.host->CreateCheckpoint(t.tenant, Handle(*info), {}, HostUnderTest::Soon());
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    EXPECT_EQ(checkpoint->length, 40u);
    EXPECT_EQ(checkpoint->num_pages, 3u * num_groups);
    for (int64_t cut : {0, 7, 16, 35, 40}) {
      auto rewound = t.host->Rewind(t.tenant, Handle(*info), cut);
      ASSERT_TRUE(rewound.ok()) << rewound.status();
      const std::vector<uint32_t> other =
          Concat(std::vector<uint32_t>(tokens.begin(), tokens.begin() + cut),
                 Tokens(5000 + static_cast<uint32_t>(cut), 25));
      auto appended = t.Append(rewound->info, other);
      ASSERT_TRUE(appended.ok()) << appended.status();
      EXPECT_EQ(*t.WrongRows(info->id, other), 0u);
      auto restored =
          t.host->RestoreCheckpoint(t.tenant, Handle(*info), checkpoint->id, HostUnderTest::Soon());
      ASSERT_TRUE(restored.ok()) << restored.status();
      EXPECT_EQ(restored->length, 40u);
      EXPECT_GT(restored->revision, appended->revision);
      EXPECT_EQ(*t.WrongRows(info->id, tokens), 0u);
      info = restored;
    }
    ASSERT_TRUE(t.host->Close(t.tenant, info->id, info->epoch).ok());
    t.host->Quiesce();
  }
}

TEST(CheckpointTest, HoldsNoFrames) {
  HostUnderTest t({.num_frames = 4});
  const std::vector<uint32_t> tokens = Tokens(0, 40);
  auto info = t.OpenAndFill(tokens);
  ASSERT_TRUE(info.ok());
  auto checkpoint = t.host->CreateCheckpoint(t.tenant, Handle(*info), {}, HostUnderTest::Soon());
  ASSERT_TRUE(checkpoint.ok());
  ASSERT_TRUE(t.host->Rewind(t.tenant, Handle(*info), 0).ok());
  for (uint32_t i = 1; i < 5; ++i) {
    const std::vector<uint32_t> other = Tokens(1000 * i, 60);
    auto filled = t.OpenAndFill(other);
    ASSERT_TRUE(filled.ok()) << filled.status();
    EXPECT_EQ(*t.WrongRows(filled->id, other), 0u);
  }
  ASSERT_TRUE(
      t.host->RestoreCheckpoint(t.tenant, Handle(*info), checkpoint->id, HostUnderTest::Soon())
          .ok());
  EXPECT_EQ(*t.WrongRows(info->id, tokens), 0u);
}

TEST(CheckpointTest, AreBoundedListedAndDeleted) {
  HostUnderTest t({});
  auto info = t.OpenAndFill(Tokens(0, 20));
  ASSERT_TRUE(info.ok());
  std::vector<uint64_t> ids;
  for (int i = 0; i < 32; ++i) {
    auto checkpoint = t.host->CreateCheckpoint(t.tenant, Handle(*info), {}, HostUnderTest::Soon());
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    ids.push_back(checkpoint->id);
  }
  const absl::Status full =
      t.host->CreateCheckpoint(t.tenant, Handle(*info), {}, HostUnderTest::Soon()).status();
  EXPECT_TRUE(absl::IsResourceExhausted(full)) << full;
  EXPECT_EQ(GetReason(full), "TOO_MANY_CHECKPOINTS");
  ASSERT_TRUE(t.host->DeleteCheckpoint(t.tenant, Handle(*info), ids[3]).ok());
  ASSERT_TRUE(t.host->DeleteCheckpoint(t.tenant, Handle(*info), ids[3]).ok());
  EXPECT_TRUE(t.host->CreateCheckpoint(t.tenant, Handle(*info), {}, HostUnderTest::Soon()).ok());
  EXPECT_EQ(t.host->ListCheckpoints(t.tenant, info->id)->size(), 32u);
  EXPECT_EQ(
      GetReason(t.host->RestoreCheckpoint(t.tenant, Handle(*info), ids[3], HostUnderTest::Soon())
                    .status()),
      "CHECKPOINT_NOT_FOUND");
  const Tenant other{"other", DeriveTenantSalt("secret", "other")};
  EXPECT_EQ(GetReason(t.host->ListCheckpoints(other, info->id).status()), "SEQUENCE_NOT_FOUND");
  EXPECT_EQ(GetReason(t.host
                          ->RestoreCheckpoint(t.tenant, {info->id, 99, std::nullopt}, ids[0],
                                              HostUnderTest::Soon())
                          .status()),
            error_reason::kStaleEpoch);
}

TEST(CheckpointTest, ASequenceWithASealedTailIsSavedOnce) {
  MemoryPageStore store;
  SessionWorker a(&store, {.write_through = false});
  const std::vector<uint32_t> tokens = Tokens(0, 40);
  auto info = a.engine->OpenAndFill(tokens);
  ASSERT_TRUE(info.ok());
  const uint64_t page = a.engine->model->geometry().bytes_per_page_of_tokens();
  EXPECT_EQ(a.Save(*info, "s")->bytes_written, 3 * page);
  ASSERT_TRUE(
      a.host()->CreateCheckpoint(a.tenant(), Handle(*info), {}, HostUnderTest::Soon()).ok());
  EXPECT_EQ(a.Save(*info, "s")->bytes_written, 0u);
  SessionWorker b(&store, {.id = "b", .incarnation = 2});
  auto loaded = b.Load("s");
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(*b.engine->WrongRows(loaded->open.info.id, tokens), 0u);
}

TEST(CheckpointTest, RandomHistories) {
  for (uint64_t seed : {1, 2, 3}) {
    SCOPED_TRACE(seed);
    std::mt19937_64 random(seed);
    HostUnderTest t({.num_frames = 12});
    auto info = t.OpenAndFill(Tokens(0, 10));
    ASSERT_TRUE(info.ok());
    std::vector<uint32_t> now = Tokens(0, 10);
    std::map<uint64_t, std::vector<uint32_t>> checkpoints;
    for (int step = 0; step < 150; ++step) {
      switch (random() % 5) {
        case 0: {
          const int64_t cut = static_cast<int64_t>(random() % (now.size() + 1));
          auto rewound = t.host->Rewind(t.tenant, Handle(*info), cut);
          ASSERT_TRUE(rewound.ok()) << rewound.status();
          info = rewound->info;
          now.resize(cut);
          break;
        }
        case 1:
        case 2: {
          if (now.size() > 120) break;
          now = Concat(now, Tokens(static_cast<uint32_t>(random() % 100000), 1 + random() % 20));
          auto appended = t.Append(*info, now);
          ASSERT_TRUE(appended.ok()) << appended.status();
          info = appended;
          break;
        }
        case 3: {
          // Every kind in turn; copies of 120 tokens in 32 checkpoints fit the host's memory.
          const Tier tier = static_cast<Tier>(random() % 3);
          auto checkpoint = t.host->CreateCheckpoint(t.tenant, Handle(*info), {.tier = tier},
                                                     HostUnderTest::Soon());
          if (absl::IsResourceExhausted(checkpoint.status())) {
            const uint64_t oldest = checkpoints.begin()->first;
            ASSERT_TRUE(t.host->DeleteCheckpoint(t.tenant, Handle(*info), oldest).ok());
            checkpoints.erase(oldest);
            break;
          }
          ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
          checkpoints[checkpoint->id] = now;
          break;
        }
        case 4: {
          if (checkpoints.empty()) break;
          auto it = std::next(checkpoints.begin(), random() % checkpoints.size());
          auto restored =
              t.host->RestoreCheckpoint(t.tenant, Handle(*info), it->first, HostUnderTest::Soon());
          ASSERT_TRUE(restored.ok()) << restored.status();
          info = restored;
          now = it->second;
          break;
        }
      }
      ASSERT_EQ(info->length, now.size());
      if (!now.empty() && step % 5 == 0) {
        ASSERT_EQ(*t.WrongRows(info->id, now), 0u);
      }
    }
    ASSERT_TRUE(t.host->Close(t.tenant, info->id, info->epoch).ok());
    t.host->Quiesce();
    EXPECT_EQ(t.host->Load().checkpoint_host_bytes, 0u);
    EXPECT_EQ(t.store->GetStats(HostUnderTest::Soon())->manifests, 0u);
  }
}

}  // namespace
}  // namespace pagetide
