// Prefills of one prompt at the same time: what fills twice is kept once, what others committed is
// taken over, and a claim makes one wait for the other. And who passes whom in line for frames.
#include <gtest/gtest.h>

#include <thread>

#include "tests/worker/model_host_fixture.h"

namespace pagetide {
namespace {

// Opens without reuse, as if all had looked before any committed.
absl::StatusOr<SequenceInfo> OpenAlone(HostUnderTest& t) {
  auto opened = t.host->Open(t.tenant, {}, {}, {.no_reuse = true});
  if (!opened.ok()) return opened.status();
  return opened->info;
}

std::vector<PageId> PagesOf(HostUnderTest& t, SequenceId id) {
  std::vector<PageId> pages;
  const auto table = t.host->GetBlockTable(t.tenant, id);
  for (const BlockTableEntry& entry : table->entries) {
    pages.push_back(entry.page);
  }
  return pages;
}

uint64_t FramesInUse(HostUnderTest& t) {
  const PoolUsage usage = t.host->Usage().front();
  return usage.num_frames - usage.free_frames;
}

SequenceHandle HandleOf(const SequenceInfo& info) {
  return {info.id, info.epoch, std::nullopt};
}

TEST(DedupTest, APageThatFillsGivesWayToTheResidentOneWithItsKey) {
  HostUnderTest t({.num_groups = 2, .batch_invariant = true});
  const std::vector<uint32_t> tokens = Tokens(0, 40);
  auto a = OpenAlone(t), b = OpenAlone(t);
  ASSERT_TRUE(a.ok() && b.ok());
  ASSERT_TRUE(t.Append(*a, tokens).ok());
  ASSERT_TRUE(t.Append(*b, tokens).ok());
  t.host->Quiesce();
  const std::vector<PageId> of_a = PagesOf(t, a->id), of_b = PagesOf(t, b->id);
  ASSERT_EQ(of_a.size(), 6u);  // two full pages and a tail in each of two groups
  for (size_t i : {0, 1, 3, 4}) EXPECT_EQ(of_a[i], of_b[i]) << i;
  for (size_t i : {2, 5}) EXPECT_NE(of_a[i], of_b[i]) << i;
  EXPECT_EQ(FramesInUse(t), 4u);  // of the first group: two shared pages, two tails
  EXPECT_EQ(t.host->Counters().pages_deduplicated, 4u);
  EXPECT_EQ(*t.WrongRows(a->id, tokens), 0u);
  EXPECT_EQ(*t.WrongRows(b->id, tokens), 0u);
  // The tail follows the resident page now: it goes before it, and both come back.
  ASSERT_TRUE(t.host->EvictPages(0, t.Soon()).ok());
  EXPECT_EQ(*t.WrongRows(b->id, tokens), 0u);
  t.host->Quiesce();
}

TEST(DedupTest, AtEveryStepOfADecodeToo) {
  HostUnderTest t({.batch_invariant = true});
  auto a = OpenAlone(t), b = OpenAlone(t);
  std::vector<uint32_t> tokens;
  for (uint32_t i = 0; i < 48; ++i) {
    tokens.push_back(i);
    a = t.Step(*a, tokens);
    ASSERT_TRUE(a.ok()) << a.status();
    b = t.Step(*b, tokens);
    ASSERT_TRUE(b.ok()) << b.status();
  }
  EXPECT_EQ(PagesOf(t, a->id), PagesOf(t, b->id));
  EXPECT_EQ(FramesInUse(t), 3u);
  EXPECT_EQ(*t.WrongRows(b->id, tokens), 0u);
  t.host->Quiesce();
}

TEST(DedupTest, NotOfAnEngineWhoseBitsDependOnTheBatch) {
  HostUnderTest t({});
  const std::vector<uint32_t> tokens = Tokens(0, 40);
  auto a = OpenAlone(t), b = OpenAlone(t);
  ASSERT_TRUE(t.Append(*a, tokens).ok());
  ASSERT_TRUE(t.Append(*b, tokens).ok());
  EXPECT_EQ(FramesInUse(t), 6u);
  EXPECT_EQ(t.host->Counters().pages_deduplicated, 0u);
  t.host->Quiesce();
}

TEST(ExtendMatchTest, TakesOverWhatOthersCommittedSinceTheOpen) {
  HostUnderTest t({.num_groups = 2});
  const std::vector<uint32_t> tokens = Tokens(0, 100);
  auto a = OpenAlone(t), b = OpenAlone(t);
  ASSERT_TRUE(t.Append(*a, tokens).ok());
  // 20 rows of its own: the last four are dropped for the page that has them too.
  b = t.Append(*b, std::span(tokens).first(20));
  ASSERT_TRUE(b.ok()) << b.status();
  const ExtendRequest request{.expected_length = 20, .tokens = std::span(tokens).subspan(20)};
  auto extended = t.host->ExtendMatch(t.tenant, HandleOf(*b), request, t.Soon());
  ASSERT_TRUE(extended.ok()) << extended.status();
  EXPECT_EQ(extended->extended_tokens, 76u);
  EXPECT_EQ(extended->info.length, 96u);
  EXPECT_EQ(extended->info.canonical_length, 96u);
  EXPECT_GT(extended->info.revision, b->revision);
  EXPECT_EQ(extended->claim, ClaimState::kNone);
  auto done = t.Append(extended->info, tokens);
  ASSERT_TRUE(done.ok()) << done.status();
  EXPECT_EQ(*t.WrongRows(b->id, tokens), 0u);
  EXPECT_EQ(*t.WrongRows(a->id, tokens), 0u);
  t.host->Quiesce();
}

TEST(ExtendMatchTest, LeavesOneTokenUnlessAllMayBeTakenOver) {
  HostUnderTest t({});
  const std::vector<uint32_t> tokens = Tokens(0, 32);
  auto a = OpenAlone(t), b = OpenAlone(t);
  ASSERT_TRUE(t.Append(*a, tokens).ok());
  ExtendRequest request{.tokens = tokens};
  auto extended = t.host->ExtendMatch(t.tenant, HandleOf(*b), request, t.Soon());
  ASSERT_TRUE(extended.ok()) << extended.status();
  EXPECT_EQ(extended->info.length, 16u);
  request.expected_length = 16;
  request.tokens = std::span(tokens).subspan(16);
  request.allow_full_reuse = true;
  EXPECT_EQ(t.host->ExtendMatch(t.tenant, HandleOf(*b), request, t.Soon())->info.length, 32u);
}

TEST(ExtendMatchTest, RefusalsChangeNothing) {
  HostUnderTest t({});
  const std::vector<uint32_t> tokens = Tokens(0, 64);
  auto a = t.OpenAndFill(std::span(tokens).first(32));
  ASSERT_TRUE(a.ok());
  const auto extend = [&](const SequenceHandle& handle, uint64_t length, size_t count) {
    return t.host
        ->ExtendMatch(t.tenant, handle,
                      {.expected_length = length, .tokens = std::span(tokens).subspan(32, count)},
                      t.Soon())
        .status();
  };
  EXPECT_EQ(GetReason(extend(HandleOf(*a), 31, 8)), "LENGTH_MISMATCH");
  EXPECT_EQ(GetReason(extend({a->id, a->epoch + 1, std::nullopt}, 32, 8)), "STALE_EPOCH");
  EXPECT_TRUE(absl::IsInvalidArgument(extend(HandleOf(*a), 32, 0)));
  EXPECT_EQ(t.host->Get(t.tenant, a->id)->revision, a->revision);
  const SequenceHandle handle = HandleOf(*a);
  const SequenceEdit edit = ShiftPositionsEdit{.sequence = a->number, .range = {8, -1}, .delta = 4};
  ASSERT_TRUE(t.host->Edit(t.tenant, {&handle, 1}, {&edit, 1}).ok());
  EXPECT_EQ(GetReason(extend(handle, 32, 8)), "NOT_CANONICAL");
}

TEST(ExtendMatchTest, TheSecondWaitsForThePageThatTheFirstClaimed) {
  HostUnderTest t({});
  const std::vector<uint32_t> tokens = Tokens(0, 40);
  auto a = OpenAlone(t), b = OpenAlone(t);
  ExtendRequest request{.tokens = tokens, .claim = absl::Seconds(60)};
  auto first = t.host->ExtendMatch(t.tenant, HandleOf(*a), request, t.Soon());
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ(first->claim, ClaimState::kGranted);
  // Without waiting it hears of the claim.
  auto second = t.host->ExtendMatch(t.tenant, HandleOf(*b), request, t.Soon());
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(second->claim, ClaimState::kHeld);
  EXPECT_GT(second->claim_left, absl::ZeroDuration());
  EXPECT_EQ(second->extended_tokens, 0u);
  request.wait = absl::Seconds(60);
  std::thread wait([&] {
    second = t.host->ExtendMatch(t.tenant, HandleOf(*b), request, t.In(absl::Seconds(120)));
  });
  while (t.host->Counters().claims_waited_for == 0) std::this_thread::yield();
  EXPECT_TRUE(t.Append(*a, tokens).ok());
  wait.join();
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(second->extended_tokens, 32u);
  EXPECT_EQ(*t.WrongRows(b->id, std::span(tokens).first(32)), 0u);
}

TEST(ExtendMatchTest, AClaimEndsWithItsTimeAndWithItsSequence) {
  HostUnderTest t({});
  const std::vector<uint32_t> tokens = Tokens(0, 40);
  auto a = OpenAlone(t), b = OpenAlone(t);
  ExtendRequest request{.tokens = tokens, .claim = absl::Milliseconds(50)};
  ASSERT_EQ(t.host->ExtendMatch(t.tenant, HandleOf(*a), request, t.Soon())->claim,
            ClaimState::kGranted);
  request.wait = absl::Seconds(60);
  request.claim = absl::Seconds(60);
  EXPECT_EQ(t.host->ExtendMatch(t.tenant, HandleOf(*b), request, t.In(absl::Seconds(120)))->claim,
            ClaimState::kGranted);
  request.wait = absl::ZeroDuration();
  EXPECT_EQ(t.host->ExtendMatch(t.tenant, HandleOf(*a), request, t.Soon())->claim,
            ClaimState::kHeld);
  ASSERT_TRUE(t.host->Close(t.tenant, b->id, b->epoch).ok());
  EXPECT_EQ(t.host->ExtendMatch(t.tenant, HandleOf(*a), request, t.Soon())->claim,
            ClaimState::kGranted);
}

TEST(AdmissionTest, CallsThatNeedNoFramePassOneThatWaitsButNotForever) {
  HostUnderTest t({.num_frames = 3, .no_store = true, .max_overtakes = 5});
  const std::vector<uint32_t> tokens = Tokens(0, 32);
  auto a = t.OpenAndFill(tokens);
  ASSERT_TRUE(a.ok());
  auto b = OpenAlone(t);
  // Two of the three frames are a's and cannot go: there is no store.
  const std::vector<uint32_t> two_pages = Tokens(500, 32);
  absl::StatusOr<PendingSlot> slot;
  std::thread append([&] {
    slot = t.host->BeginAppend(t.tenant, HandleOf(*b), "b", 0, two_pages, {}, false,
                               t.In(absl::Seconds(60)));
  });
  while (t.host->Counters().acquire_waits == 0) std::this_thread::yield();
  for (int i = 0; i < 5; ++i) {
    EXPECT_TRUE(t.host->PinRows(t.tenant, a->id, 0, 0, 0, t.Soon()).ok()) << i;
  }
  const absl::Status behind =
      t.host->PinRows(t.tenant, a->id, 0, 0, 0, t.In(absl::Milliseconds(50))).status();
  EXPECT_TRUE(absl::IsResourceExhausted(behind)) << behind;
  EXPECT_TRUE(t.host->Close(t.tenant, a->id, a->epoch).ok());
  append.join();
  ASSERT_TRUE(slot.ok()) << slot.status();
}

}  // namespace
}  // namespace pagetide
