// Loads of models with windows, which end early in every way: what they call usable is compared
// with the bytes in the engine's blocks.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <string>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "tests/worker/model_host_fixture.h"
#include "tests/worker/test_engine.h"
#include "worker/engine_transfer.h"

namespace pagetide {
namespace {

using WindowType = LayerGroupSpec::WindowType;

constexpr uint32_t kPage = 8;

struct Window {
  WindowType type = WindowType::kStandard;
  uint32_t tokens = 0;
  uint32_t keep = 0;
};

// Full attention, and one group for each window.
std::shared_ptr<const Model> ModelWith(const std::vector<Window>& windows) {
  ModelSpec spec = TestModel(kPage)->spec();
  spec.geometry.groups[0].kv_heads = 2;
  for (uint32_t w = 0; w < windows.size(); ++w) {
    LayerGroupSpec group = spec.geometry.groups[0];
    group.layers = {10 + w};
    group.kind = LayerGroupSpec::Kind::kWindow;
    group.window_type = windows[w].type;
    group.window_tokens = windows[w].tokens;
    group.keep_tokens = windows[w].keep;
    spec.geometry.groups.push_back(group);
  }
  return std::make_shared<const Model>(Model::Create(std::move(spec)).value());
}

// A job that is stopped after so many questions whether it is.
class CountedJob : public EngineTransferJob {
 public:
  explicit CountedJob(uint64_t stops_after) : stops_after_(stops_after) {}
  bool is_stopped() const override { return num_asked_++ >= stops_after_; }
  void Attach(ModelHost*, const Tenant&, const SequenceInfo&) override {}
  void Detach() override {}
  void Report(const EngineProgress& progress) override {
    EXPECT_GE(progress.usable_tokens, last.usable_tokens);
    last = progress;
  }

  EngineProgress last;

 private:
  const uint64_t stops_after_;
  mutable uint64_t num_asked_ = 0;
};

constexpr uint64_t kNever = ~uint64_t{0};

// A host, an engine of it, and transfers between them.
class Scene {
 public:
  explicit Scene(const std::vector<Window>& windows, const TestEngine::Setup& setup = {})
      : under({.page_tokens = kPage, .num_frames = 48, .model = ModelWith(windows)}),
        engine(under.model->geometry(), setup),
        layout_(std::make_shared<const EngineLayout>(
            EngineLayout::Create(under.model->geometry(), engine.spec(),
                                 engine.Registration("e").memories)
                .value())) {}

  EngineTransfer Transfer(const std::vector<uint32_t>& tokens, std::vector<EngineSlotMap> maps) {
    EngineTransfer transfer;
    transfer.host = under.host;
    transfer.tenant = under.tenant;
    transfer.layout = layout_;
    transfer.maps = std::move(maps);
    transfer.tokens = tokens;
    transfer.num_tokens = tokens.size();
    transfer.allow_full_reuse = true;
    transfer.clock = Clock::Real();
    transfer.deadline = HostUnderTest::Soon();
    EXPECT_TRUE(layout_->CheckMaps(transfer.maps, tokens.size()).ok());
    return transfer;
  }
  // Stores the tokens, lets go of their frames, and frees the blocks.
  void Store(const std::vector<uint32_t>& tokens, std::mt19937* random) {
    const EngineSlotMap map = engine.Allocate(0, tokens.size(), random);
    engine.Compute(tokens, map, 0, tokens.size());
    CountedJob job(kNever);
    const absl::Status stored = StoreFromEngine(Transfer(tokens, {map}), &job);
    EXPECT_TRUE(stored.ok()) << stored;
    engine.Free(map);
    under.host->Quiesce();
    EXPECT_TRUE(under.host->EvictPages(0, HostUnderTest::Soon()).ok());
  }
  void Damage(const std::vector<uint32_t>& tokens, uint32_t group, uint64_t page) {
    const PrefixKey root = RootPrefixKey(under.tenant.salt, under.model->identity(), kPage);
    const std::vector<PrefixKey> keys = PrefixKeysOf(root, tokens, kPage, {});
    const PageKey key = MakePageKey(keys[page], under.model->geometry().group(group).fingerprint());
    EXPECT_TRUE(under.own_store.FlipBit(key, 77));
  }
  // A row that the next token behind `usable` tokens would need and that is not in the blocks.
  std::string Missing(const std::vector<uint32_t>& tokens, const std::vector<EngineSlotMap>& maps,
                      uint64_t usable) {
    const PageGeometry& geometry = under.model->geometry();
    for (uint32_t g = 0; g < geometry.num_groups(); ++g) {
      const GroupTraits traits = TraitsOf(geometry.group(g).spec());
      const auto first = static_cast<uint64_t>(traits.FirstVisible(static_cast<int64_t>(usable)));
      const auto kept = static_cast<uint64_t>(traits.keep_tokens);
      for (uint64_t row = 0; row < usable; ++row) {
        if (row >= kept && row < first) continue;
        if (row < maps[g].first_token) {
          // In front of a slot map full attention's rows are the engine's own.
          if (!traits.forgets()) continue;
        } else if (engine.HoldsRow(g, tokens, maps[g], row)) {
          continue;
        }
        return absl::StrCat("row ", row, " of group ", g);
      }
    }
    return "";
  }

  HostUnderTest under;
  TestEngine engine;

 private:
  const std::shared_ptr<const EngineLayout> layout_;
};

TEST(EngineWindowsTest, ALoadThatLosesAWindowsPageGoesOnWithTheLongestPrefixThatHasItsWindow) {
  // Six pages; the window of 10 tokens behind all of them lies in the last two.
  Scene scene({{WindowType::kStandard, 10}}, {.num_blocks = 64});
  std::mt19937 random(1);
  const std::vector<uint32_t> tokens = Tokens(1, 6 * kPage);
  scene.Store(tokens, &random);
  scene.Damage(tokens, /*group=*/1, /*page=*/5);
  const EngineSlotMap full = scene.engine.Allocate(0, tokens.size(), &random);
  const EngineSlotMap window = scene.engine.Allocate(0, tokens.size(), &random);
  CountedJob job(kNever);
  const absl::Status loaded = LoadIntoEngine(scene.Transfer(tokens, {full, window}), &job);
  // Five pages, whose window begins in the fourth: what the whole prompt would not have needed.
  EXPECT_EQ(GetReason(loaded), "PREFIX_LOST") << loaded;
  EXPECT_EQ(job.last.usable_tokens, 5 * kPage);
  ASSERT_TRUE(job.last.reuse.has_value());
  EXPECT_EQ(job.last.reuse->reused_tokens, 6 * kPage);
  EXPECT_EQ(scene.Missing(tokens, {full, window}, 5 * kPage), "");
  EXPECT_NE(scene.Missing(tokens, {full, window}, 6 * kPage), "");
  scene.engine.ExpectGroup(0, tokens, full, 0, 5 * kPage);
  scene.engine.ExpectGroup(1, tokens, window, 3 * kPage, 5 * kPage);
  // Full attention may have been ahead when the loss was found.
  if (scene.engine.HoldsRow(0, tokens, full, 5 * kPage)) {
    scene.engine.ExpectGroup(0, tokens, full, 5 * kPage, 6 * kPage);
    EXPECT_EQ(job.last.limiting_group, 1u);
  }
  EXPECT_EQ(scene.engine.WrongBytes(), 0);
  EXPECT_EQ(scene.under.host->Load().open_sequences, 0);
}

TEST(EngineWindowsTest, ALoadThatIsStoppedNamesTheGroupThatIsBehind) {
  Scene scene({{WindowType::kStandard, 10}}, {.num_blocks = 64});
  std::mt19937 random(2);
  const std::vector<uint32_t> tokens = Tokens(1, 6 * kPage);
  scene.Store(tokens, &random);
  bool is_named = false, is_done = false;
  for (uint64_t stops_after = 0; stops_after < 100 && !is_done; ++stops_after) {
    const EngineSlotMap full = scene.engine.Allocate(0, tokens.size(), &random);
    const EngineSlotMap window = scene.engine.Allocate(32, tokens.size(), &random);
    CountedJob job(stops_after);
    const absl::Status loaded = LoadIntoEngine(scene.Transfer(tokens, {full, window}), &job);
    is_done = loaded.ok();
    // No shorter prefix has its window in the blocks.
    EXPECT_EQ(job.last.usable_tokens, is_done ? tokens.size() : 0) << stops_after;
    EXPECT_EQ(scene.Missing(tokens, {full, window}, job.last.usable_tokens), "");
    if (is_done) {
      EXPECT_EQ(job.last.limiting_group, std::nullopt);
    } else if (job.last.moved_bytes > 0) {
      EXPECT_EQ(job.last.limiting_group, 1u) << stops_after;
      is_named = true;
    }
    scene.engine.Free(full);
    scene.engine.Free(window);
  }
  EXPECT_TRUE(is_named);
  EXPECT_TRUE(is_done);
}

TEST(EngineWindowsTest, SlotMapsThatLeaveOutTheLastChunkStillGiveTheTokensInFrontOfIt) {
  // Chunks of 16: behind 40 tokens the next one sees those from 32 on, behind 32 none.
  Scene scene({{WindowType::kChunked, 16}}, {.num_blocks = 64});
  std::mt19937 random(3);
  const std::vector<uint32_t> tokens = Tokens(1, 5 * kPage);
  scene.Store(tokens, &random);
  const EngineSlotMap full = scene.engine.Allocate(0, tokens.size(), &random);
  const EngineSlotMap window = scene.engine.Allocate(36, tokens.size(), &random);
  CountedJob job(kNever);
  const absl::Status loaded = LoadIntoEngine(scene.Transfer(tokens, {full, window}), &job);
  EXPECT_TRUE(loaded.ok()) << loaded;
  EXPECT_EQ(job.last.usable_tokens, 32u);
  EXPECT_EQ(job.last.limiting_group, 1u);
  scene.engine.ExpectGroup(0, tokens, full, 0, 32);
  EXPECT_EQ(scene.engine.WrongBytes(), 0);
}

TEST(EngineWindowsTest, WhatALoadCallsUsableIsInTheBlocksHoweverItEnds) {
  uint64_t num_whole = 0, num_part = 0, num_none = 0, num_lost = 0;
  for (uint32_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    std::mt19937 random(seed);
    const auto pick = [&](uint32_t n) { return static_cast<uint32_t>(random() % n); };
    std::vector<Window> windows(1 + pick(2));
    for (Window& window : windows) {
      window.type = static_cast<WindowType>(1 + pick(4));
      window.tokens = 2 + pick(20);
      if (window.type == WindowType::kRing) window.keep = pick(window.tokens);
    }
    const uint32_t block_tokens = 1 + pick(10);
    Scene scene(windows, {.heads = pick(2) == 0 ? EngineHeads::kNhd : EngineHeads::kHnd,
                          .is_block_major = pick(2) == 0,
                          .block_tokens = block_tokens,
                          .num_blocks = 8 + 300 / block_tokens});
    const std::vector<uint32_t> tokens = Tokens(1000 * seed, 1 + pick(90));
    scene.Store(tokens, &random);
    const uint32_t num_pages = static_cast<uint32_t>(tokens.size()) / kPage;
    const uint32_t num_damaged = num_pages == 0 ? 0 : pick(3);
    for (uint32_t d = 0; d < num_damaged; ++d) {
      scene.Damage(tokens, pick(1 + static_cast<uint32_t>(windows.size())), pick(num_pages));
    }
    std::vector<EngineSlotMap> maps;
    bool is_mapped_whole = true;
    for (size_t g = 0; g <= windows.size(); ++g) {
      const uint64_t first = pick(3) == 0 ? pick(static_cast<uint32_t>(tokens.size())) : 0;
      is_mapped_whole = is_mapped_whole && first == 0;
      maps.push_back(scene.engine.Allocate(first, tokens.size(), &random));
    }
    EngineTransfer transfer = scene.Transfer(tokens, maps);
    transfer.pages_per_step = 1 + pick(4);
    const bool may_stop = pick(2) == 0;
    CountedJob job(may_stop ? pick(60) : kNever);
    const absl::Status loaded = LoadIntoEngine(transfer, &job);
    const uint64_t usable = job.last.usable_tokens;
    EXPECT_EQ(scene.Missing(tokens, maps, usable), "") << usable << " of " << tokens.size();
    EXPECT_EQ(scene.under.host->Load().open_sequences, 0);
    if (GetReason(loaded) == "PREFIX_LOST") ++num_lost;
    if (!job.last.reuse) continue;
    const uint64_t found = job.last.reuse->reused_tokens;
    ASSERT_LE(usable, found);
    ++(usable == 0 ? num_none : usable < found ? num_part : num_whole);
    if (may_stop || !is_mapped_whole) continue;
    if (num_damaged == 0) {
      EXPECT_TRUE(loaded.ok()) << loaded;
      EXPECT_EQ(usable, found);
      continue;
    }
    // All that can be known now is there.
    const auto now =
        scene.under.host->LookupPrefix(scene.under.tenant, tokens, {}, {.allow_full_reuse = true});
    ASSERT_TRUE(now.ok()) << now.status();
    EXPECT_EQ(usable, now->reused_tokens) << loaded;
  }
  // The cases that this is about did come up.
  EXPECT_GT(num_whole, 0u);
  EXPECT_GT(num_part, 0u);
  EXPECT_GT(num_none, 0u);
  EXPECT_GT(num_lost, 0u);
}

}  // namespace
}  // namespace pagetide
