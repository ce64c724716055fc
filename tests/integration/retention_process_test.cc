// Retention and pins through real processes: what a small store keeps when five times its capacity
// is written behind it, before and after it was killed.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "clients/cpp/client.h"
#include "kvstore/remote_page_store.h"
#include "rpc/channel.h"
#include "tests/contract/test_page.h"
#include "tests/support/process.h"
#include "tests/support/timing.h"
#include "tests/support/worker_client.h"

namespace pagetide {
namespace {

using ::pagetide::testing::ChildProcess;
using ::pagetide::testing::MakeTestModel;
using ::pagetide::testing::RegisterTestModel;
using ::pagetide::testing::TempDir;
using ::pagetide::testing::TestTokens;
using ::pagetide::testing::WorkerClient;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr uint64_t kPageBytes = 128 << 10;
constexpr uint64_t kCapacity = 16 << 20;

MonotonicTime In(absl::Duration d) {
  return Clock::Real()->MonotonicNow() + d;
}

class RetentionProcessTest : public ::testing::Test {
 protected:
  void SetUp() override {
    StartStore();
    model_ = std::make_shared<const Model>(
        MakeTestModel({.num_layers = 4, .kv_heads = 4, .dim = 64}));  // 8 KiB a token
    ASSERT_EQ(model_->geometry().bytes_per_page_of_tokens(), kPageBytes);
    ASSERT_TRUE(RegisterTestModel(*model_, store_.get()).ok());
    auto started = ChildProcess::Start(
        {.program = "pagetide-worker",
         .args = {"--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0", "--pool-bytes=8MiB",
                  absl::StrCat("--store=", store_process_->Address("grpc"))}});
    ASSERT_TRUE(started.ok()) << started.status();
    worker_ = *std::move(started);
    engine_ = std::make_unique<WorkerClient>(worker_->Address("grpc"), model_);
    client_ = Client::Create({.worker_address = worker_->Address("grpc")}).value();
  }
  // At the same address each time: a socket file, which nobody else can have taken meanwhile.
  void StartStore() {
    auto started = ChildProcess::Start(
        {.program = "pagetide-store",
         .args = {absl::StrCat("--listen=unix:", dir_ / "store.sock"),
                  "--metrics-listen=127.0.0.1:0", absl::StrCat("--data-dir=", dir_ / "data"),
                  absl::StrCat("--capacity=", kCapacity), "--segment-size=1MiB"}});
    ASSERT_TRUE(started.ok()) << started.status();
    store_process_ = *std::move(started);
    store_ = std::make_unique<RemotePageStore>(
        MakeChannel(store_process_->Address("grpc"), {.own_connection = true}));
    ASSERT_TRUE(store_->GetStats(In(absl::Seconds(30))).ok());
  }
  // kill -9, then the same folder at the same address.
  void KillAndRestartStore() {
    store_process_->Kill();
    StartStore();
  }
  // A sequence of four full pages, whose keys go to `keys`.
  std::unique_ptr<Sequence> Fill(uint64_t seed, std::vector<PageKey>* keys) {
    const std::vector<uint32_t> tokens = TestTokens(seed, 64);
    auto sequence = client_->Open(model_, tokens);
    EXPECT_TRUE(sequence.ok()) << sequence.status();
    EXPECT_TRUE(engine_->Append((*sequence)->state(), tokens, tokens.size()).ok());
    EXPECT_TRUE((*sequence)->Refresh().ok());
    testing::TestContext context;
    v1::GetBlockTableRequest request;
    request.set_sequence_id((*sequence)->id());
    v1::GetBlockTableResponse table;
    EXPECT_TRUE(engine_->sequences().GetBlockTable(&context, request, &table).ok());
    for (const auto& extent : table.extents()) {
      keys->push_back({Digest::FromBytes(extent.page_key()).value()});
    }
    EXPECT_EQ(keys->size(), 4u);
    return *std::move(sequence);
  }
  // Puts `bytes` of pages that nobody needs.
  void Flood(uint64_t bytes) {
    for (uint64_t put = 0; put < bytes; put += kPageBytes) {
      const TestPage page = MakeTestPage(next_flood_++, kPageBytes, /*keyed=*/false);
      const PutPage one = page.put();
      const PutPageResult result =
          store_->PutPages({&one, 1}, Durability::kProcess, In(absl::Seconds(60)))[0];
      ASSERT_TRUE(result.status.ok()) << result.status;
    }
  }
  size_t NumHeld(const std::vector<PageKey>& keys) {
    const auto found = store_->LookupPages(keys, In(absl::Seconds(30)));
    EXPECT_TRUE(found.ok()) << found.status();
    size_t held = 0;
    for (const LookupResult& page : *found) held += page.present ? 1 : 0;
    return held;
  }
  // Floods until none of these pages is left; false when they stay.
  bool FloodAway(const std::vector<PageKey>& keys) {
    for (int round = 0; round < 20; ++round) {
      Flood(kCapacity / 2);
      if (NumHeld(keys) == 0) return true;
    }
    return false;
  }
  std::string Run(std::vector<std::string> args, int expected_code = 0) {
    args.insert(args.end(), {"--worker", worker_->Address("grpc")});
    auto process = ChildProcess::Start({.program = "pagetide", .args = args, .wait_ready = false});
    EXPECT_TRUE(process.ok()) << process.status();
    EXPECT_EQ((*process)->Wait(absl::Seconds(30)).value(), expected_code) << (*process)->Log();
    return (*process)->Log();
  }

  TempDir dir_;
  std::unique_ptr<ChildProcess> store_process_, worker_;
  std::unique_ptr<RemotePageStore> store_;
  std::shared_ptr<const Model> model_;
  std::unique_ptr<WorkerClient> engine_;
  std::unique_ptr<Client> client_;
  uint64_t next_flood_ = 1000;
};

TEST_F(RetentionProcessTest, PinsAndPrioritiesOutliveFloodsAndAKilledStore) {
  Flood(kCapacity);  // what a priority is worth grows with the number of pages that are there
  std::vector<PageKey> pinned, high, plain;
  auto pinned_sequence = Fill(1, &pinned);
  auto high_sequence = Fill(2, &high);
  auto plain_sequence = Fill(3, &plain);
  auto pin = pinned_sequence->Pin("system-prompt", {.end = 64});
  ASSERT_TRUE(pin.ok()) << pin.status();
  EXPECT_EQ(pin->pin().pages(), 4u);
  EXPECT_EQ(pin->pin().bytes(), 4 * kPageBytes);
  EXPECT_FALSE(pin->pin().has_expires_at());
  const RetentionOptions important{.begin = 0, .priority = 100};
  auto set = high_sequence->SetRetention({&important, 1});
  ASSERT_TRUE(set.ok()) << set.status();
  EXPECT_EQ(set->pages(), 4u);
  const RetentionOptions last{.begin = 0, .priority = 0};
  ASSERT_TRUE(plain_sequence->SetRetention({&last, 1}).ok());
  ASSERT_TRUE(pinned_sequence->Close().ok());
  ASSERT_TRUE(high_sequence->Close().ok());
  ASSERT_TRUE(plain_sequence->Close().ok());

  KillAndRestartStore();
  Flood(kCapacity);
  EXPECT_EQ(NumHeld(plain), 0u);
  EXPECT_EQ(NumHeld(high), 4u);
  EXPECT_EQ(NumHeld(pinned), 4u);
  Flood(4 * kCapacity);
  EXPECT_EQ(NumHeld(pinned), 4u);
  auto pins = client_->ListPins();
  ASSERT_TRUE(pins.ok()) << pins.status();
  ASSERT_EQ(pins->size(), 1u);
  EXPECT_EQ(pins->front().name(), "system-prompt");
  ASSERT_TRUE(client_->Unpin("system-prompt").ok());
  // One pin, two ranges set, one unpinned.
  EXPECT_TRUE(engine_->EventuallyStat("pagetide_retention_calls_total", 4));
  EXPECT_TRUE(FloodAway(pinned)) << NumHeld(pinned) << " pages stayed after the pin was removed";
  EXPECT_EQ(GetReason(client_->Unpin("system-prompt")), "PIN_NOT_FOUND");
}

TEST_F(RetentionProcessTest, ACheckpointInTheStoreOutlivesFloodsAndAKilledStore) {
  std::vector<PageKey> keys, plain;
  auto sequence = Fill(1, &keys);
  auto plain_sequence = Fill(2, &plain);
  const std::vector<uint32_t> tokens = TestTokens(1, 64);
  auto checkpoint = sequence->CreateCheckpoint(v1::TIER_STORE);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  // Acknowledged: from here on neither kill -9 nor want of room takes it.
  KillAndRestartStore();
  ASSERT_TRUE(sequence->Rewind(0).ok());
  ASSERT_TRUE(plain_sequence->Close().ok());
  testing::TestContext context;
  v1::EvictPagesResponse evicted;
  ASSERT_TRUE(engine_->admin().EvictPages(&context, {}, &evicted).ok());
  EXPECT_TRUE(FloodAway(plain)) << NumHeld(plain) << " pages that nothing holds stayed";
  EXPECT_EQ(NumHeld(keys), 4u);
  ASSERT_TRUE(sequence->RestoreCheckpoint(*checkpoint).ok());
  EXPECT_EQ(sequence->length(), 64u);
  auto bytes = engine_->Verify(sequence->id(), tokens, 0, 64);
  ASSERT_TRUE(bytes.ok()) << bytes.status();
  EXPECT_EQ(*bytes, 4 * kPageBytes);
  ASSERT_TRUE(sequence->Close().ok());
  EXPECT_TRUE(testing::Eventually(
      [&] { return store_->GetStats(In(absl::Seconds(30)))->protected_pages == 0; }));
}

TEST_F(RetentionProcessTest, APinWithATimeToLiveEndsByItself) {
  std::vector<PageKey> keys;
  auto sequence = Fill(1, &keys);
  ASSERT_TRUE(sequence->Pin("short", {.ttl = absl::Seconds(1)}).ok());
  ASSERT_TRUE(sequence->Pin("long", {.ttl = absl::Hours(1)}).ok());
  EXPECT_TRUE(testing::Eventually([&] { return client_->ListPins("short")->empty(); }));
  auto pins = client_->ListPins();
  ASSERT_TRUE(pins.ok()) << pins.status();
  ASSERT_EQ(pins->size(), 1u);
  EXPECT_EQ(pins->front().name(), "long");
  EXPECT_TRUE(pins->front().has_expires_at());
}

TEST_F(RetentionProcessTest, TheCommandLinePinsListsRetainsAndUnpins) {
  std::vector<PageKey> keys;
  auto sequence = Fill(1, &keys);
  EXPECT_THAT(
      Run({"pins", "add", "cli", "--sequence", sequence->id(), "--end", "30", "--ttl", "2h"}),
      HasSubstr("pinned cli: tokens [0, 30), 2 pages of 256 KiB"));
  EXPECT_THAT(Run({"pins", "list", "--json"}), HasSubstr("\"name\": \"cli\""));
  EXPECT_THAT(Run({"pins", "list"}), HasSubstr("[0, 30)"));
  EXPECT_THAT(Run({"retain", "--sequence", sequence->id(), "--priority", "90", "--begin", "16"}),
              HasSubstr("set for 3 pages"));
  EXPECT_THAT(Run({"retain", "--sequence", sequence->id(), "--priority", "101"}, 1),
              HasSubstr("ranges[0].priority is 101, allowed are 0 to 100"));
  EXPECT_THAT(Run({"pins", "remove", "cli"}), HasSubstr("unpinned cli"));
  EXPECT_THAT(Run({"pins", "remove", "cli"}, 1), HasSubstr("there is no pin cli"));
  EXPECT_THAT(Run({"pins", "list"}), Not(HasSubstr("cli")));
}

TEST_F(RetentionProcessTest, RefusalsNameTheFieldAndChangeNothing) {
  std::vector<PageKey> keys;
  auto sequence = Fill(1, &keys);
  const v1::SequenceState before = sequence->state();
  const auto set = [&](v1::RangeRetention range, const std::string& text) {
    testing::TestContext context;
    v1::SetRangeRetentionRequest request;
    request.mutable_sequence()->set_sequence_id(sequence->id());
    request.mutable_sequence()->set_epoch(before.epoch());
    *request.add_ranges() = std::move(range);
    v1::SetRangeRetentionResponse response;
    const grpc::Status status = engine_->edits().SetRetention(&context, request, &response);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << status.error_message();
    EXPECT_THAT(status.error_message(), HasSubstr(text));
  };
  v1::RangeRetention range;
  range.set_begin(64);
  set(range, "ranges[0] is tokens [64, 64)");
  range.set_begin(~uint64_t{0});
  range.set_end(5);
  set(range, "ranges[0] is tokens [18446744073709551615, 5)");
  range.set_begin(0);
  range.set_priority(~uint32_t{0});
  set(range, "ranges[0].priority is 4294967295, allowed are 0 to 100");
  range.clear_priority();
  range.mutable_ttl()->set_seconds(-1);
  set(range, "ranges[0].ttl is {seconds -1");
  range.mutable_ttl()->set_seconds(367 * 86400);
  set(range, "ranges[0].ttl is 8808h");
  EXPECT_TRUE(absl::IsInvalidArgument(sequence->SetRetention({}).status()));
  for (const std::string& name : {std::string("a/b"), std::string(10000, 'x'), std::string()}) {
    EXPECT_TRUE(absl::IsInvalidArgument(sequence->Pin(name).status()));
    EXPECT_TRUE(absl::IsInvalidArgument(client_->Unpin(name)));
  }
  EXPECT_TRUE(absl::IsInvalidArgument(sequence->Pin("p", {.begin = 3, .end = 3}).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(client_->ListPins("../").status()));
  EXPECT_EQ(store_->GetStats(In(absl::Seconds(30)))->manifests, 0u);
  ASSERT_TRUE(sequence->Refresh().ok());
  EXPECT_EQ(sequence->state().revision(), before.revision());
  // A store that is away: a clear status in bounded time; afterwards it works again.
  store_process_->Kill();
  testing::TestContext context(absl::Seconds(1));
  v1::PinRangeRequest request;
  request.set_name("p");
  request.mutable_sequence()->set_sequence_id(sequence->id());
  request.mutable_sequence()->set_epoch(before.epoch());
  v1::PinRangeResponse response;
  const grpc::Status away = engine_->edits().PinRange(&context, request, &response);
  EXPECT_TRUE(away.error_code() == grpc::StatusCode::UNAVAILABLE ||
              away.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED)
      << away.error_message();
  StartStore();
  absl::Status pinned;
  testing::Eventually([&] {
    pinned = sequence->Pin("p").status();
    return pinned.ok();
  });
  EXPECT_TRUE(pinned.ok()) << pinned;
}

}  // namespace
}  // namespace pagetide
