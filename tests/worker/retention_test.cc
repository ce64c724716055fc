// Retention and pins of token ranges over ModelHost and the memory store.
#include "worker/retention.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <vector>

#include "kvstore/decorating_page_store.h"
#include "tests/worker/session_fixture.h"

namespace pagetide {
namespace {

using ::testing::HasSubstr;

MonotonicTime Soon() {
  return HostUnderTest::Soon();
}

// Remembers what retention was set for which page, and can lose pages just before.
class WatchedStore final : public DecoratingPageStore {
 public:
  explicit WatchedStore(PageStore* inner) : DecoratingPageStore(inner) {}
  absl::StatusOr<std::vector<PageKey>> SetRetention(std::span<const PageKey> keys,
                                                    const Retention& retention,
                                                    const std::optional<WriteFence>& fence,
                                                    MonotonicTime deadline) override {
    if (num_losses > 0) {
      --num_losses;
      EXPECT_EQ(inner()->DeletePages(keys.first(1), deadline).value(), 1u);
    }
    auto missing = inner()->SetRetention(keys, retention, fence, deadline);
    if (missing.ok() && missing->empty()) {
      for (const PageKey& key : keys) set.insert_or_assign(key, retention);
    }
    return missing;
  }
  std::map<PageKey, Retention> set;
  int num_losses = 0;
};

class RetentionTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto info = worker_.engine->OpenAndFill(tokens_);
    ASSERT_TRUE(info.ok()) << info.status();
    handle_ = {info->id, info->epoch, std::nullopt};
  }
  absl::StatusOr<RetentionAnswer> Set(std::vector<RangeRetention> ranges) {
    return retentions_.Set(worker_.tenant(), worker_.host(), handle_, ranges, Soon());
  }
  absl::StatusOr<Pin> PinNamed(const std::string& name, TokenRange range,
                               std::optional<absl::Duration> ttl = std::nullopt,
                               const std::string& request_id = "") {
    return retentions_.PinRange(worker_.tenant(), worker_.host(),
                                {.sequence = handle_,
                                 .name = name,
                                 .range = range,
                                 .ttl = ttl,
                                 .request_id = request_id,
                                 .request_digest = Sha256Of(request_id)},
                                Soon());
  }
  std::vector<PageKey> KeyedPages() {
    std::vector<PageKey> keys;
    const auto table = worker_.host()->GetBlockTable(worker_.tenant(), handle_.id);
    EXPECT_TRUE(table.ok()) << table.status();
    for (const BlockTableEntry& entry : table->entries) {
      if (entry.key) keys.push_back(*entry.key);
    }
    return keys;
  }

  MemoryPageStore memory_;
  WatchedStore store_{&memory_};
  SessionWorker worker_{&store_, {.write_through = false}};
  Retentions retentions_{&worker_.worker(), &store_, &worker_.fence()};
  const std::vector<uint32_t> tokens_ = Tokens(100, 70);  // four full pages of 16 and 6 rows
  SequenceHandle handle_;
};

TEST_F(RetentionTest, SetsWholePagesAndPutsWhatTheStoreLacks) {
  auto set = Set({{.range = {20, 50}, .priority = 90, .ttl = absl::Hours(1)}});
  ASSERT_TRUE(set.ok()) << set.status();
  EXPECT_EQ(set->pages, 3u);  // tokens 16 to 63
  EXPECT_EQ(set->pages_written, 3u);
  const std::vector<PageKey> keys = KeyedPages();
  ASSERT_EQ(keys.size(), 4u);
  ASSERT_EQ(store_.set.size(), 3u);
  for (int i : {1, 2, 3}) {
    ASSERT_TRUE(store_.set.contains(keys[i]));
    EXPECT_EQ(store_.set[keys[i]].priority, 90u);
    EXPECT_TRUE(store_.set[keys[i]].expires_at.has_value());
  }
  // To the end, the partly filled page included; nothing of the first three is sent again.
  set = Set({{.range = {0, std::nullopt}, .priority = 10}});
  ASSERT_TRUE(set.ok()) << set.status();
  EXPECT_EQ(set->pages, 5u);
  EXPECT_EQ(set->pages_written, 2u);
  EXPECT_EQ(store_.set.size(), 5u);
  EXPECT_FALSE(store_.set[keys[1]].expires_at.has_value());
}

TEST_F(RetentionTest, WhereRangesMeetThePageTakesTheHigherPriority) {
  auto set = Set({{.range = {0, 24}, .priority = 20}, {.range = {24, 64}, .priority = 80}});
  ASSERT_TRUE(set.ok()) << set.status();
  EXPECT_EQ(set->pages, 4u);
  const std::vector<PageKey> keys = KeyedPages();
  EXPECT_EQ(store_.set[keys[0]].priority, 20u);
  for (int i : {1, 2, 3}) EXPECT_EQ(store_.set[keys[i]].priority, 80u);
}

TEST_F(RetentionTest, AWorkerThatWasTakenOverSetsNothing) {
  ASSERT_TRUE(Set({{.range = {0, 64}, .priority = 70}}).ok());
  const std::map<PageKey, Retention> before = std::exchange(store_.set, {});
  EXPECT_EQ(before.size(), 4u);
  // Another ends this life's epoch; its lease still seems to hold.
  const auto record = memory_.GetRecord(kOwnerRecordKind, "worker/a", Soon());
  ASSERT_TRUE(record.ok()) << record.status();
  ASSERT_TRUE(memory_
                  .CompareAndSetRecord(kOwnerRecordKind, "worker/a", record->version,
                                       "taken over by b", Soon())
                  .ok());
  const absl::Status late = Set({{.range = {0, 64}, .priority = 1}}).status();
  EXPECT_EQ(GetReason(late), error_reason::kStaleEpoch) << late;
  EXPECT_TRUE(store_.set.empty());
}

TEST_F(RetentionTest, PagesThatVanishMeanwhileArePutAgain) {
  store_.num_losses = 2;
  auto set = Set({{.range = {0, 64}, .priority = 70}});
  ASSERT_TRUE(set.ok()) << set.status();
  EXPECT_EQ(set->pages, 4u);
  EXPECT_EQ(set->pages_written, 6u);
  EXPECT_EQ(store_.set.size(), 4u);
  store_.num_losses = 100;
  EXPECT_TRUE(absl::IsAborted(Set({{.range = {0, 64}}}).status()));
}

TEST_F(RetentionTest, APinProtectsItsPagesUntilItIsRemoved) {
  auto pin = PinNamed("prompt", {16, 48});
  ASSERT_TRUE(pin.ok()) << pin.status();
  EXPECT_EQ(pin->num_pages, 2u);
  EXPECT_EQ(pin->summary.pages_written, 2u);
  EXPECT_EQ(pin->summary.bytes, 2 * worker_.engine->model->geometry().bytes_per_page_of_tokens());
  EXPECT_FALSE(pin->expires_at.has_value());
  ASSERT_TRUE(Set({{.range = {0, 64}}}).ok());  // now the store has all four
  const std::vector<PageKey> keys = KeyedPages();
  EXPECT_EQ(memory_.DeletePages(keys, Soon()).value(), 2u);
  ASSERT_TRUE(retentions_.Unpin(worker_.tenant(), "prompt", Soon()).ok());
  EXPECT_EQ(memory_.DeletePages(keys, Soon()).value(), 2u);
  EXPECT_EQ(GetReason(retentions_.Unpin(worker_.tenant(), "prompt", Soon())), "PIN_NOT_FOUND");
}

TEST_F(RetentionTest, PinsAreListedInOrderPerTenantAndReplacedByName) {
  ASSERT_TRUE(PinNamed("b", {0, 16}).ok());
  ASSERT_TRUE(PinNamed("a", {0, 70}, absl::Hours(2)).ok());
  ASSERT_TRUE(PinNamed("b", {16, 32}).ok());
  auto pins = retentions_.List(worker_.tenant(), "", "", 10, Soon());
  ASSERT_TRUE(pins.ok()) << pins.status();
  ASSERT_EQ(pins->size(), 2u);
  EXPECT_EQ((*pins)[0].name, "a");
  EXPECT_EQ((*pins)[0].num_pages, 5u);
  ASSERT_TRUE((*pins)[0].expires_at.has_value());
  EXPECT_EQ(*(*pins)[0].expires_at - (*pins)[0].pinned_at, absl::Hours(2));
  EXPECT_EQ((*pins)[1].summary.begin, 16u);
  EXPECT_EQ((*pins)[1].summary.end, 32u);
  const Tenant other{"other", DeriveTenantSalt("secret", "other")};
  EXPECT_TRUE(retentions_.List(other, "", "", 10, Soon())->empty());
  EXPECT_EQ(GetReason(retentions_.Unpin(other, "a", Soon())), "PIN_NOT_FOUND");
  EXPECT_EQ(
      GetReason(
          retentions_.PinRange(other, worker_.host(), {.sequence = handle_, .name = "x"}, Soon())
              .status()),
      "SEQUENCE_NOT_FOUND");
}

TEST_F(RetentionTest, ARetryFindsTheFirstAnswerOnAnotherWorkerToo) {
  ASSERT_TRUE(PinNamed("p", {0, 32}, std::nullopt, "r1").ok());
  SessionWorker other(&store_, {.id = "b", .incarnation = 2});
  Retentions there(&other.worker(), &store_, &other.fence());
  PinRequest again{.name = "p", .request_id = "r1", .request_digest = Sha256Of("r1")};
  auto found = there.FindAnswer(other.tenant(), again, Soon());
  ASSERT_TRUE(found.ok()) << found.status();
  ASSERT_TRUE(found->has_value());
  EXPECT_EQ((*found)->num_pages, 2u);
  EXPECT_EQ((*found)->summary.pages_written, 2u);
  again.request_digest = Sha256Of("something else");
  EXPECT_EQ(GetReason(there.FindAnswer(other.tenant(), again, Soon()).status()),
            "REQUEST_ID_REUSED");
  again.request_id = "r2";
  EXPECT_FALSE(there.FindAnswer(other.tenant(), again, Soon())->has_value());
}

TEST_F(RetentionTest, RefusalsNameTheRangeAndChangeNothing) {
  const auto refused = [&](std::vector<RangeRetention> ranges, const std::string& text) {
    const absl::Status status = Set(std::move(ranges)).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(text));
  };
  refused({}, "ranges has 0 entries, must have 1 to 64");
  refused(std::vector<RangeRetention>(65), "ranges has 65 entries");
  refused({{.range = {0, 16}}, {.range = {10, 10}}}, "ranges[1] is tokens [10, 10)");
  refused({{.range = {0, 71}}},
          "[0, 71), must be at least one token and end by the committed "
          "length 70");
  refused({{.range = {~uint64_t{0}, std::nullopt}}}, "ranges[0]");
  refused({{.range = {0, 16}, .priority = 101}}, "ranges[0].priority is 101, allowed are 0 to 100");
  refused({{.range = {0, 16}, .ttl = absl::ZeroDuration()}}, "ranges[0].ttl is 0");
  refused({{.range = {0, 16}, .ttl = absl::Hours(24 * 367)}}, "ranges[0].ttl");
  EXPECT_TRUE(store_.set.empty());
  EXPECT_EQ(memory_.GetStats(Soon())->pages, 0u);
  for (const std::string& name : {std::string("../x"), std::string(10000, 'a'), std::string()}) {
    EXPECT_TRUE(absl::IsInvalidArgument(PinNamed(name, {0, 16}).status()));
    EXPECT_TRUE(absl::IsInvalidArgument(retentions_.Unpin(worker_.tenant(), name, Soon())));
  }
  EXPECT_TRUE(absl::IsInvalidArgument(PinNamed("p", {0, 71}).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(PinNamed("p", {0, 16}, -absl::Seconds(1)).status()));
  handle_.epoch = 9;
  EXPECT_EQ(GetReason(PinNamed("p", {0, 16}).status()), error_reason::kStaleEpoch);
  EXPECT_EQ(memory_.GetStats(Soon())->manifests, 0u);
}

TEST_F(RetentionTest, SummariesRoundTripAndDamageIsDataLoss) {
  const PinSummary summary{.begin = 1,
                           .end = 70,
                           .bytes = 12345,
                           .pages_written = 2,
                           .bytes_written = 99,
                           .model_digest = Sha256Of("model"),
                           .request_digest = Sha256Of("request")};
  const std::string bytes = EncodePinSummary(summary);
  EXPECT_EQ(ParsePinSummary(bytes).value(), summary);
  for (size_t n = 0; n < bytes.size(); ++n) {
    EXPECT_TRUE(absl::IsDataLoss(ParsePinSummary(bytes.substr(0, n)).status())) << n;
  }
  EXPECT_TRUE(absl::IsDataLoss(ParsePinSummary(bytes + "x").status()));
  std::string newer = bytes;
  newer[0] = 2;
  EXPECT_TRUE(absl::IsUnimplemented(ParsePinSummary(newer).status()));
}

}  // namespace
}  // namespace pagetide
