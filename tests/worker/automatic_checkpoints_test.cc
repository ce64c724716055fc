// Automatic checkpoints: when a commit leaves one, and which of them goes first.
#include <gtest/gtest.h>

#include "tests/worker/checkpoint_fixture.h"

namespace pagetide {
namespace {

TEST(AutomaticCheckpointsTest, AutomaticOnesComeEverySoManyPages) {
  HostUnderTest t(
      {.num_groups = 2, .num_frames = 32, .window_tokens = kWindow, .checkpoint_every_pages = 2});
  const std::vector<uint32_t> tokens = Tokens(0, 160);
  auto info = t.OpenAndFill(std::vector<uint32_t>(tokens.begin(), tokens.begin() + 20));
  ASSERT_TRUE(info.ok());
  for (size_t end = 21; end <= tokens.size(); ++end) {
    info = t.Step(*info, std::vector<uint32_t>(tokens.begin(), tokens.begin() + end));
    ASSERT_TRUE(info.ok()) << info.status();
  }
  auto list = t.host->ListCheckpoints(t.tenant, info->id);
  ASSERT_TRUE(list.ok());
  ASSERT_EQ(list->size(), 5u);
  for (size_t i = 0; i < list->size(); ++i) {
    EXPECT_EQ((*list)[i].length, 32 * (i + 1));
    EXPECT_TRUE((*list)[i].is_automatic);
    EXPECT_EQ((*list)[i].scope, CheckpointScope::kNonRewindable);
  }
  // Newest first: going back voids what lies behind.
  for (size_t i = list->size(); i-- > 0;) {
    const uint64_t length = (*list)[i].length;
    auto restored = t.host->RestoreCheckpoint(t.tenant, Handle(*info), (*list)[i].id, Soon());
    ASSERT_TRUE(restored.ok()) << restored.status();
    EXPECT_EQ(
        *t.WrongRows(info->id, std::vector<uint32_t>(tokens.begin(), tokens.begin() + length)), 0u);
  }
  EXPECT_EQ(t.host->Counters().checkpoints_restored, 5u);
  // A model without such groups has none.
  HostUnderTest full({.checkpoint_every_pages = 1});
  auto plain = full.OpenAndFill(Tokens(0, 100));
  ASSERT_TRUE(plain.ok());
  EXPECT_TRUE(full.host->ListCheckpoints(full.tenant, plain->id)->empty());
}

TEST(AutomaticCheckpointsTest, TheOldestAutomaticOneGivesWayAndTheCallersNever) {
  HostUnderTest t(
      {.num_groups = 2, .num_frames = 64, .window_tokens = kWindow, .checkpoint_every_pages = 1});
  std::vector<uint32_t> tokens = Tokens(0, 16);
  auto info = t.OpenAndFill(tokens);
  ASSERT_TRUE(info.ok());
  auto own = t.host->CreateCheckpoint(t.tenant, Handle(*info), {}, Soon());
  ASSERT_TRUE(own.ok());
  for (uint32_t i = 0; i < 40; ++i) {
    tokens = Concat(tokens, Tokens(100 + 20 * i, 16));
    info = t.Append(*info, tokens);
    ASSERT_TRUE(info.ok()) << info.status();
  }
  auto list = t.host->ListCheckpoints(t.tenant, info->id);
  ASSERT_EQ(list->size(), 32u);
  EXPECT_EQ(list->front().id, own->id);
  EXPECT_EQ(list->back().length, tokens.size());
}

TEST(AutomaticCheckpointsTest, AVoidAutomaticOneGivesWayBeforeTheOldest) {
  HostUnderTest t(
      {.num_groups = 2, .num_frames = 64, .window_tokens = kWindow, .checkpoint_every_pages = 1});
  std::vector<uint32_t> tokens = Tokens(0, 16);
  auto info = t.OpenAndFill(tokens);
  for (uint32_t i = 0; i < 4 && info.ok(); ++i) {
    tokens = Concat(tokens, Tokens(100 + 20 * i, 16));
    info = t.Append(*info, tokens);
  }
  ASSERT_TRUE(info.ok()) << info.status();
  auto cut = t.host->Rewind(t.tenant, Handle(*info), 79);  // of 80
  ASSERT_TRUE(cut.ok()) << cut.status();
  for (int i = 0; i < 27; ++i) {
    ASSERT_TRUE(t.host->CreateCheckpoint(t.tenant, Handle(cut->info), {}, Soon()).ok());
  }
  auto list = t.host->ListCheckpoints(t.tenant, info->id);
  ASSERT_EQ(list->size(), 32u);
  ASSERT_TRUE((*list)[4].is_void);
  ASSERT_TRUE(t.host->CreateCheckpoint(t.tenant, Handle(cut->info), {}, Soon()).ok());
  list = t.host->ListCheckpoints(t.tenant, info->id);
  ASSERT_EQ(list->size(), 32u);
  EXPECT_EQ(list->front().length, 16u);
  for (const CheckpointInfo& checkpoint : *list) EXPECT_FALSE(checkpoint.is_void);
}

}  // namespace
}  // namespace pagetide
