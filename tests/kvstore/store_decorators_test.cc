// Decorators of the page store, the residency feed and the lease book.
#include <gtest/gtest.h>

#include "base/metrics.h"
#include "kvstore/fault_injecting_page_store.h"
#include "kvstore/instrumented_page_store.h"
#include "kvstore/memory_page_store.h"
#include "kvstore/residency_feed.h"
#include "kvstore/retrying_page_store.h"
#include "tests/contract/test_page.h"

namespace pagetide {
namespace {

class DecoratorTest : public ::testing::Test {
 protected:
  RetryEnvironment FakeTime() {
    return {.clock = &clock_,
            .sleep =
                [this](absl::Duration d) {
                  clock_.Advance(d);
                  ++sleeps_;
                },
            .seed = 1};
  }
  MonotonicTime In(absl::Duration d) { return clock_.MonotonicNow() + d; }

  FakeClock clock_;
  int sleeps_ = 0;
  MemoryPageStore memory_{{.clock = &clock_}};
  FaultInjectingPageStore faulty_{&memory_};
  const TestPage page_ = MakeTestPage(1);
  const PutPage put_ = page_.put();
};

TEST_F(DecoratorTest, RetriesWhatIsUnavailable) {
  RetryingPageStore store(&faulty_, RetryPolicy(), FakeTime());
  faulty_.FailWith(absl::UnavailableError("down"), 3);
  const auto results = store.PutPages({&put_, 1}, Durability::kLocal, In(absl::Minutes(1)));
  EXPECT_TRUE(results[0].status.ok()) << results[0].status;
  EXPECT_EQ(sleeps_, 3);
  faulty_.FailWith(absl::UnavailableError("down"), 2);
  EXPECT_TRUE(store.LookupPages({&page_.meta.key, 1}, In(absl::Minutes(1))).ok());
}

TEST_F(DecoratorTest, DoesNotRetryAnythingElse) {
  RetryingPageStore store(&faulty_, RetryPolicy(), FakeTime());
  faulty_.FailWith(absl::ResourceExhaustedError("full"), 1);
  EXPECT_EQ(store.PutPages({&put_, 1}, Durability::kLocal, In(absl::Minutes(1)))[0].status.code(),
            absl::StatusCode::kResourceExhausted);
  // Compare-and-set without a request id: the first attempt may have happened.
  faulty_.FailWith(absl::UnavailableError("down"), 1);
  EXPECT_FALSE(store.CompareAndSetRecord("k", "k", 0, "v", In(absl::Minutes(1))).ok());
  faulty_.FailWith(absl::UnavailableError("down"), 1);
  ManifestRecord manifest;
  manifest.name = "m";
  EXPECT_FALSE(store.PutManifest(manifest, 0, std::nullopt, In(absl::Minutes(1))).ok());
  manifest.request_id = "r";
  faulty_.FailWith(absl::UnavailableError("down"), 1);
  EXPECT_TRUE(store.PutManifest(manifest, 0, std::nullopt, In(absl::Minutes(1))).ok());
  EXPECT_EQ(sleeps_, 1);
}

TEST_F(DecoratorTest, RetriesEndWithinTheDeadline) {
  RetryingPageStore store(&faulty_, {.max_attempts = 1000}, FakeTime());
  faulty_.FailWith(absl::UnavailableError("down"));
  const MonotonicTime deadline = In(absl::Seconds(3));
  EXPECT_EQ(store.PutPages({&put_, 1}, Durability::kLocal, deadline)[0].status.code(),
            absl::StatusCode::kUnavailable);
  EXPECT_LE(clock_.MonotonicNow(), deadline);
  EXPECT_GT(sleeps_, 1);
}

TEST_F(DecoratorTest, CountsCallsPagesAndBytes) {
  InMemoryMetrics metrics;
  InstrumentedPageStore store(&faulty_, &metrics, &clock_);
  const MonotonicTime deadline = In(absl::Minutes(1));
  store.PutPages({&put_, 1}, Durability::kLocal, deadline);
  store.PutPages({&put_, 1}, Durability::kLocal, deadline);
  std::vector<std::byte> body(page_.body.size());
  const GetPage hit{page_.meta.key, body, {}};
  const GetPage miss{MakeTestPage(2).meta.key, body, {}};
  store.GetPages({&hit, 1}, deadline);
  store.GetPages({&miss, 1}, deadline);
  faulty_.FailWith(absl::UnavailableError("down"), 1);
  store.GetPages({&hit, 1}, deadline);
  const auto pages = [&](const char* call, const char* outcome) {
    return metrics.Value("pagetide_store_pages_total", {{"call", call}, {"outcome", outcome}});
  };
  EXPECT_EQ(pages("put", "stored"), 1);
  EXPECT_EQ(pages("put", "already_present"), 1);
  EXPECT_EQ(pages("get", "hit"), 1);
  EXPECT_EQ(pages("get", "miss"), 1);
  EXPECT_EQ(pages("get", "failed"), 1);
  EXPECT_EQ(metrics.Value("pagetide_store_bytes_total", {{"call", "get"}}), 4096);
  EXPECT_EQ(metrics.Value("pagetide_store_calls_total", {{"call", "get"}, {"code", "UNAVAILABLE"}}),
            1);
  store.PublishStats();
  EXPECT_EQ(metrics.Value("pagetide_store_pages"), 1);
  EXPECT_EQ(metrics.Value("pagetide_store_state", {{"state", "serving"}}), 1);
}

StoreEvent Event(uint64_t n) {
  return {PrefixKey{Sha256Of(absl::StrCat(n))}, 0, n, false};
}

TEST(ResidencyFeedTest, NumbersEventsAndTellsAGap) {
  ResidencyFeed feed(/*max_events=*/4);
  uint64_t number = feed.next_number();
  std::vector<StoreEvent> events;
  EXPECT_EQ(feed.Read(&number, absl::ZeroDuration(), &events), ResidencyFeed::Outcome::kTimeout);
  for (uint64_t i = 0; i < 4; ++i) feed.Append(Event(i));
  EXPECT_EQ(feed.Read(&number, absl::ZeroDuration(), &events), ResidencyFeed::Outcome::kEvents);
  ASSERT_EQ(events.size(), 4u);
  EXPECT_EQ(events[3].body_bytes, 3u);
  for (uint64_t i = 4; i < 9; ++i) feed.Append(Event(i));
  EXPECT_EQ(feed.Read(&number, absl::ZeroDuration(), &events), ResidencyFeed::Outcome::kGap);
  feed.Close();
  EXPECT_EQ(feed.Read(&number, absl::Hours(1), &events), ResidencyFeed::Outcome::kClosed);
}

TEST(ResidencyFeedTest, AWatcherThatFellBehindGetsASnapshotAgain) {
  ResidencyFeed feed(/*max_events=*/4);
  int snapshots = 0;
  std::vector<uint64_t> seen;
  const absl::Status ended = FollowResidency(
      &feed, Clock::Real(), Clock::Real()->MonotonicNow() + absl::Seconds(10),
      [&](uint64_t* number) {
        *number = feed.next_number();
        ++snapshots;
        // More happens behind this slow watcher's back than the feed keeps.
        for (uint64_t i = 0; snapshots == 1 && i < 10; ++i) feed.Append(Event(i));
        return std::vector<StoreEvent>{Event(100)};
      },
      [&](bool snapshot, bool snapshot_end, std::span<const StoreEvent> events) {
        for (const StoreEvent& e : events) seen.push_back(e.body_bytes);
        EXPECT_EQ(snapshot, snapshot_end);
        return snapshots < 2;
      });
  EXPECT_TRUE(ended.ok()) << ended;
  EXPECT_EQ(snapshots, 2);
  EXPECT_EQ(seen, (std::vector<uint64_t>{100, 100}));
}

}  // namespace
}  // namespace pagetide
