// Sessions through real programs and a real decoder: what was saved survives kill -9 of everything
// and gives the same logits on another worker; what a chat's saves write; a prompt stored once and
// computed once. Prints tables and JSON lines of what was measured.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "clients/cpp/client.h"
#include "decoder/decoder.h"
#include "decoder/local_kv_backend.h"
#include "decoder/pagetide_kv_backend.h"
#include "pagetide/v1/admin.grpc.pb.h"
#include "pagetide/v1/page_store.grpc.pb.h"
#include "pagetide/v1/session.grpc.pb.h"
#include "rpc/channel.h"
#include "tests/support/process.h"
#include "tests/support/timing.h"

namespace pagetide {
namespace {

using ::pagetide::testing::ChildProcess;
using ::pagetide::testing::TempDir;
using ::testing::HasSubstr;

class SessionProcessTest : public ::testing::Test {
 protected:
  void SetUp() override {
    decoder_ = Decoder::Create(DecoderConfig()).value();
    StartFleet(1);
  }
  // Worker ids w<first>, w<first + 1>: after a kill nobody has the name of one that died.
  void StartFleet(int first) {
    Start("pagetide-store", {absl::StrCat("--data-dir=", dir_ / "store")}, &store_);
    const std::string store = absl::StrCat("--store=", store_->Address("grpc"));
    Start("pagetide-router", {store}, &router_);
    workers_.resize(2);
    for (int i = 0; i < 2; ++i) {
      Start("pagetide-worker",
            {absl::StrCat("--worker-id=w", first + i), store,
             absl::StrCat("--router=", router_->Address("grpc")), "--pool-bytes=32MiB"},
            &workers_[i]);
    }
    client_ = Client::Create({.router_address = router_->Address("grpc")}).value();
    auto model = client_->RegisterModel(ModelSpecOf(*decoder_, "decoder-test"));
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = *model;
  }
  void KillAll() {
    for (auto& worker : workers_) worker->Kill();
    router_->Kill();
    store_->Kill();
    client_.reset();
  }
  void Start(const std::string& program, std::vector<std::string> args,
             std::unique_ptr<ChildProcess>* process) {
    args.push_back("--listen=127.0.0.1:0");
    args.push_back("--metrics-listen=127.0.0.1:0");
    auto started = ChildProcess::Start({.program = program, .args = args});
    ASSERT_TRUE(started.ok()) << started.status();
    *process = *std::move(started);
  }
  std::unique_ptr<Client> ClientOf(int worker) {
    return Client::Create({.worker_address = workers_[worker]->Address("grpc")}).value();
  }
  std::vector<float> Expected(const std::vector<uint32_t>& tokens) {
    LocalKvBackend kv(decoder_->config());
    return decoder_->Prefill(tokens, kv).value();
  }
  absl::StatusOr<std::vector<float>> Compute(Sequence& sequence,
                                             const std::vector<uint32_t>& tokens) {
    PageTideKvBackend kv(decoder_->config(), &sequence);
    return decoder_->Prefill(tokens, kv);
  }
  v1::GetStoreStatsResponse StoreStats() {
    const auto stub = v1::PageStoreService::NewStub(MakeChannel(store_->Address("grpc")));
    grpc::ClientContext context;
    v1::GetStoreStatsResponse stats;
    EXPECT_TRUE(stub->GetStoreStats(&context, {}, &stats).ok());
    return stats;
  }
  double Stat(int worker, const std::string& name) {
    const auto stats =
        ClientOf(worker)->ConnectWorker(workers_[worker]->Address("grpc"))->GetStats();
    EXPECT_TRUE(stats.ok()) << stats.status();
    const auto it = stats->find(name);
    return it == stats->end() ? 0 : it->second;
  }
  // Counters follow with the next tick: the value once it is at least `least`.
  double StatFrom(int worker, const std::string& name, double least) {
    testing::Eventually([&] { return Stat(worker, name) >= least; });
    return Stat(worker, name);
  }

  TempDir dir_;
  std::unique_ptr<ChildProcess> store_, router_;
  std::vector<std::unique_ptr<ChildProcess>> workers_;
  std::unique_ptr<Decoder> decoder_;
  std::unique_ptr<Client> client_;
  std::shared_ptr<const Model> model_;
};

std::vector<uint32_t> Tokens(size_t n, uint32_t seed) {
  std::vector<uint32_t> tokens(n);
  for (size_t i = 0; i < n; ++i) tokens[i] = static_cast<uint32_t>(i * 31 + i / 7 + seed) % 256;
  return tokens;
}

TEST_F(SessionProcessTest, SurvivesKill9OfEverythingAndGoesOnElsewhere) {
  const std::vector<uint32_t> tokens = Tokens(700, 1);
  {
    auto sequence = ClientOf(0)->Open(model_, tokens);
    ASSERT_TRUE(sequence.ok()) << sequence.status();
    ASSERT_TRUE(Compute(**sequence, tokens).ok());
    auto saved = (*sequence)->Save("chat", {.metadata = {{"title", "t"}}, .expected_version = 0});
    ASSERT_TRUE(saved.ok()) << saved.status();
    EXPECT_EQ(saved->version(), 1u);
    EXPECT_EQ(saved->tokens(), 700u);
    EXPECT_EQ(saved->durability(), v1::DURABILITY_LOCAL);
    KillAll();
  }
  StartFleet(11);
  int64_t computed_before = decoder_->computed_tokens();
  auto loaded = ClientOf(1)->LoadSession(model_, "chat");
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->tokens, tokens);
  EXPECT_EQ(loaded->sequence->length(), 700u);
  EXPECT_EQ(loaded->sequence->reuse().store_tokens(), 700u);
  std::vector<uint32_t> longer = tokens;
  for (int turn = 0; turn < 3; ++turn) {
    longer.push_back(40 + turn);
    auto logits = Compute(*loaded->sequence, longer);
    ASSERT_TRUE(logits.ok()) << logits.status();
    EXPECT_EQ(decoder_->computed_tokens() - computed_before, 1);
    EXPECT_EQ(*logits, Expected(longer));
    computed_before = decoder_->computed_tokens();
  }
  const double restored = StatFrom(1, "pagetide_worker_pages_restored_total", 3);
  EXPECT_EQ(restored, 3);  // 256 + 256 + 188 tokens
  std::printf(
      "{\"test\":\"session_kill_all\",\"tokens\":700,\"restored_pages\":%.0f,"
      "\"computed\":3,\"wrong\":0}\n",
      restored);
}

TEST_F(SessionProcessTest, TheCommandLineSavesListsLoadsAndDeletes) {
  const std::vector<uint32_t> tokens = Tokens(300, 2);
  auto sequence = ClientOf(0)->Open(model_, tokens);
  ASSERT_TRUE(sequence.ok()) << sequence.status();
  ASSERT_TRUE(Compute(**sequence, tokens).ok());
  ASSERT_TRUE((*sequence)->WaitReady().ok());
  const auto run = [&](std::vector<std::string> args, int expected_code = 0) {
    args.insert(args.begin(), "sessions");
    args.insert(args.end(), {"--worker", workers_[0]->Address("grpc")});
    auto process = ChildProcess::Start({.program = "pagetide", .args = args, .wait_ready = false});
    EXPECT_TRUE(process.ok()) << process.status();
    EXPECT_EQ((*process)->Wait(absl::Seconds(90)).value_or(-1), expected_code) << (*process)->Log();
    return (*process)->Log();
  };
  EXPECT_THAT(run({"save", "cli.1", "--sequence", (*sequence)->id(), "--metadata", "who=me",
                   "--expected-version", "0"}),
              HasSubstr("saved cli.1, version 1: 300 tokens, 2 pages"));
  EXPECT_THAT(run({"save", "cli.1", "--sequence", (*sequence)->id(), "--expected-version", "0"}, 1),
              HasSubstr("version 1 is there, not 0"));
  EXPECT_THAT(run({"list", "--prefix", "cli", "--json"}), HasSubstr("\"name\": \"cli.1\""));
  EXPECT_THAT(run({"show", "cli.1"}), HasSubstr("who"));
  EXPECT_THAT(run({"load", "cli.1"}), HasSubstr("300 tokens"));
  EXPECT_THAT(run({"delete", "cli.1"}), HasSubstr("deleted cli.1, version 1"));
  EXPECT_THAT(run({"show", "cli.1"}, 1), HasSubstr("there is no session cli.1"));
}

TEST_F(SessionProcessTest, CheckpointsAndPlansGiveTheSameLogits) {
  const std::vector<uint32_t> tokens = Tokens(300, 3);
  auto sequence = ClientOf(0)->Open(model_, tokens);
  ASSERT_TRUE(sequence.ok()) << sequence.status();
  ASSERT_TRUE(Compute(**sequence, tokens).ok());
  auto checkpoint = (*sequence)->CreateCheckpoint();
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  ASSERT_TRUE((*sequence)->Rewind(100).ok());
  std::vector<uint32_t> other(tokens.begin(), tokens.begin() + 100);
  other.insert(other.end(), {5, 6, 7, 8});
  EXPECT_EQ(Compute(**sequence, other).value(), Expected(other));
  ASSERT_TRUE((*sequence)->RestoreCheckpoint(*checkpoint).ok());
  EXPECT_EQ((*sequence)->length(), 300u);
  std::vector<uint32_t> longer = tokens;
  longer.push_back(9);
  EXPECT_EQ(Compute(**sequence, longer).value(), Expected(longer));
  EXPECT_EQ(GetReason((*sequence)->RestoreCheckpoint(12345678)), "CHECKPOINT_NOT_FOUND");

  // The saved 301 tokens serve a prompt that shares 290 of them; keys alone reach 256.
  ASSERT_TRUE((*sequence)->Save("plan").ok());
  std::vector<uint32_t> prompt(tokens.begin(), tokens.begin() + 290);
  prompt.insert(prompt.end(), {1, 2, 3});
  OpenOptions options;
  options.sessions = {"plan", "no-such-session"};
  auto planned = ClientOf(1)->Open(model_, prompt, options);
  ASSERT_TRUE(planned.ok()) << planned.status();
  EXPECT_EQ((*planned)->length(), 290u);
  EXPECT_THAT((*planned)->reuse().explanation(),
              HasSubstr("290 of 293 tokens reused from session"));
  EXPECT_EQ(Compute(**planned, prompt).value(), Expected(prompt));
  auto unplanned = ClientOf(1)->Open(model_, prompt);
  ASSERT_TRUE(unplanned.ok()) << unplanned.status();
}

TEST_F(SessionProcessTest, CheckpointsOfEveryTierGiveTheSameLogitsAfterEviction) {
  const auto admin = v1::AdminService::NewStub(MakeChannel(workers_[0]->Address("grpc")));
  uint32_t seed = 60;
  for (const v1::CheckpointScope scope :
       {v1::CHECKPOINT_SCOPE_ALL, v1::CHECKPOINT_SCOPE_NON_REWINDABLE}) {
    for (const v1::Tier tier : {v1::TIER_DEVICE, v1::TIER_HOST, v1::TIER_STORE}) {
      SCOPED_TRACE(absl::StrCat(v1::CheckpointScope_Name(scope), " ", v1::Tier_Name(tier)));
      const std::vector<uint32_t> tokens = Tokens(300, ++seed);
      auto sequence = ClientOf(0)->Open(model_, tokens);
      ASSERT_TRUE(sequence.ok()) << sequence.status();
      ASSERT_TRUE(Compute(**sequence, tokens).ok());
      auto checkpoint = (*sequence)->CreateCheckpoint(tier, scope);
      ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
      EXPECT_EQ(StoreStats().manifests(), tier == v1::TIER_STORE ? 1u : 0u);
      std::vector<uint32_t> longer = tokens;
      longer.insert(longer.end(), {5, 6, 7, 8});
      ASSERT_TRUE(Compute(**sequence, longer).ok());
      grpc::ClientContext context;
      v1::EvictPagesResponse evicted;
      ASSERT_TRUE(admin->EvictPages(&context, {}, &evicted).ok());
      EXPECT_GT(evicted.evicted_pages(), 0u);
      ASSERT_TRUE((*sequence)->RestoreCheckpoint(*checkpoint).ok());
      EXPECT_EQ((*sequence)->length(), 300u);
      std::vector<uint32_t> other = tokens;
      other.push_back(9);
      EXPECT_EQ(Compute(**sequence, other).value(), Expected(other));
      ASSERT_TRUE((*sequence)->Close().ok());
      // It ends with its sequence.
      EXPECT_TRUE(testing::Eventually([&] { return StoreStats().manifests() == 0; }));
    }
  }
  EXPECT_GE(StatFrom(0, "pagetide_worker_checkpoints_created_total", 6), 6);
  EXPECT_GE(StatFrom(0, "pagetide_worker_checkpoints_restored_total", 6), 6);
  // Bad input: the field is named, nothing is changed.
  auto sequence = ClientOf(0)->Open(model_, Tokens(10, 1));
  ASSERT_TRUE(sequence.ok());
  const auto stub = v1::SessionService::NewStub(MakeChannel(workers_[0]->Address("grpc")));
  const auto refuse = [&](v1::CreateCheckpointRequest request, const std::string& text) {
    request.mutable_sequence()->set_sequence_id((*sequence)->id());
    request.mutable_sequence()->set_epoch((*sequence)->state().epoch());
    grpc::ClientContext context;
    v1::CreateCheckpointResponse response;
    const grpc::Status status = stub->CreateCheckpoint(&context, request, &response);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << status.error_message();
    EXPECT_THAT(status.error_message(), HasSubstr(text));
  };
  v1::CreateCheckpointRequest request;
  request.set_scope(static_cast<v1::CheckpointScope>(3));
  refuse(request, "scope is 3");
  request.Clear();
  request.set_tier(static_cast<v1::Tier>(9));
  refuse(request, "tier is 9");
  request.Clear();
  request.mutable_ttl()->set_seconds(5);
  refuse(request, "ttl is of tier STORE only");
  request.set_tier(v1::TIER_STORE);
  request.mutable_ttl()->set_seconds(-5);
  refuse(request, "ttl is {seconds -5");
  request.mutable_ttl()->set_seconds(0);
  refuse(request, "ttl is 0");
  request.mutable_ttl()->set_seconds(367 * 86400);
  refuse(request, "ttl is 8808h");
  grpc::ClientContext context;
  v1::ListCheckpointsRequest list;
  list.set_sequence_id((*sequence)->id());
  v1::ListCheckpointsResponse listed;
  ASSERT_TRUE(stub->ListCheckpoints(&context, list, &listed).ok());
  EXPECT_EQ(listed.checkpoints_size(), 0);
}

TEST_F(SessionProcessTest, AChatOfTwentyTurnsWritesOnlyWhatIsNew) {
  auto client = ClientOf(0);
  auto sequence = client->Open(model_, std::vector<uint32_t>{});
  ASSERT_TRUE(sequence.ok()) << sequence.status();
  std::vector<uint32_t> tokens;
  uint64_t put_before = StoreStats().bytes_put();
  uint64_t all_written = 0, all_states = 0;
  std::printf(
      "| turn | tokens | state | written by the save | written since the last save |\n"
      "|---|---|---|---|---|\n");
  for (int turn = 1; turn <= 20; ++turn) {
    const std::vector<uint32_t> said = Tokens(60 + 13 * (turn % 5), 1000 * turn);
    tokens.insert(tokens.end(), said.begin(), said.end());
    ASSERT_TRUE(Compute(**sequence, tokens).ok());
    auto saved = (*sequence)->Save("chat", {.expected_version = turn - 1});
    ASSERT_TRUE(saved.ok()) << saved.status();
    EXPECT_EQ(saved->version(), static_cast<uint64_t>(turn));
    const uint64_t put = StoreStats().bytes_put() - put_before;
    put_before += put;
    all_written += put;
    all_states += saved->bytes_total();
    // The tail and at most the pages that this turn touched.
    EXPECT_LE(saved->bytes_written(), 2 * saved->bytes_total() / saved->pages());
    std::printf("| %d | %zu | %lu | %lu | %lu |\n", turn, tokens.size(), saved->bytes_total(),
                saved->bytes_written(), put);
  }
  EXPECT_LT(all_written * 3, all_states);
  // Saved again unchanged: nothing.
  auto saved = (*sequence)->Save("chat");
  ASSERT_TRUE(saved.ok()) << saved.status();
  EXPECT_EQ(saved->bytes_written(), 0u);
  EXPECT_EQ(saved->version(), 21u);
  std::printf(
      "{\"test\":\"session_chat\",\"turns\":20,\"bytes_written\":%lu,"
      "\"bytes_of_all_states\":%lu,\"bytes_of_last_state\":%lu}\n",
      all_written, all_states, saved->bytes_total());
}

TEST_F(SessionProcessTest, APromptForAHundredSequencesIsStoredOnceAndComputedOnce) {
  const std::vector<uint32_t> prompt = Tokens(2000, 5);
  {
    auto sequence = ClientOf(0)->Open(model_, prompt);
    ASSERT_TRUE(sequence.ok()) << sequence.status();
    ASSERT_TRUE(Compute(**sequence, prompt).ok());
    ASSERT_TRUE((*sequence)->Save("system-prompt").ok());
  }
  const uint64_t pages_stored = StoreStats().pages();
  EXPECT_EQ(pages_stored, 8u);  // 7 full pages and the tail
  const int64_t computed_before = decoder_->computed_tokens();
  auto client = ClientOf(1);
  std::vector<std::unique_ptr<Sequence>> open;
  for (uint32_t i = 0; i < 100; ++i) {
    auto loaded = client->LoadSession(model_, "system-prompt");
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    std::vector<uint32_t> own = prompt;
    own.push_back(i % 256);
    ASSERT_TRUE(Compute(*loaded->sequence, own).ok());
    open.push_back(std::move(loaded->sequence));
  }
  const int64_t computed = decoder_->computed_tokens() - computed_before;
  EXPECT_EQ(computed, 100);
  const double restored = StatFrom(1, "pagetide_worker_pages_restored_total", 8);
  EXPECT_EQ(restored, 8);
  auto peeked = client->PeekSession("system-prompt");
  ASSERT_TRUE(peeked.ok()) << peeked.status();
  EXPECT_EQ(peeked->loads_here(), 100u);
  std::vector<uint32_t> last = prompt;
  last.push_back(99);
  last.push_back(7);
  EXPECT_EQ(Compute(*open.back(), last).value(), Expected(last));
  std::printf(
      "{\"test\":\"session_static_prompt\",\"prompt_tokens\":2000,\"sequences\":100,"
      "\"pages_stored\":%lu,\"pages_restored\":%.0f,\"tokens_computed\":%ld}\n",
      pages_stored, restored, computed);
}

TEST_F(SessionProcessTest, RefusalsNameTheFieldAndChangeNothing) {
  auto client = ClientOf(0);
  const std::vector<uint32_t> tokens = Tokens(40, 9);
  auto sequence = client->Open(model_, tokens);
  ASSERT_TRUE(sequence.ok()) << sequence.status();
  ASSERT_TRUE(Compute(**sequence, tokens).ok());
  for (const std::string& name :
       {std::string(), std::string("../../etc/passwd"), std::string("a/b"), std::string("A"),
        std::string("a."), std::string(10000, 'a'), std::string("a\nb")}) {
    const absl::Status status = (*sequence)->Save(name).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("name has"));
    EXPECT_TRUE(absl::IsInvalidArgument(client->LoadSession(model_, name).status()));
    EXPECT_TRUE(absl::IsInvalidArgument(client->PeekSession(name).status()));
    EXPECT_TRUE(absl::IsInvalidArgument(client->DeleteSession(name).status()));
  }
  EXPECT_THAT(std::string((*sequence)->Save("s", {.keep_tokens = 41}).status().message()),
              HasSubstr("keep_tokens = 41 is above the sequence's length 40"));
  EXPECT_THAT(std::string((*sequence)
                              ->Save("s", {.metadata = {{"k", std::string(70000, 'x')}}})
                              .status()
                              .message()),
              HasSubstr("metadata has 70001 bytes, at most 65536"));
  EXPECT_EQ(StoreStats().manifests(), 0u);
  ASSERT_TRUE((*sequence)->Save("s", {.expected_version = 0}).ok());
  const absl::Status lost = (*sequence)->Save("s", {.expected_version = 0}).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(lost)) << lost;
  EXPECT_EQ(GetReason(lost), error_reason::kVersionMismatch);
  EXPECT_EQ(GetReasonMetadata(lost, "version"), "1");
  // Another model: its weights and its pages differ.
  ModelSpec spec = ModelSpecOf(*decoder_, "other-model", 128);
  spec.weights_digest = Sha256Of("other");
  auto other = client_->RegisterModel(spec);
  ASSERT_TRUE(other.ok()) << other.status();
  const absl::Status mismatch = client->LoadSession(*other, "s").status();
  EXPECT_TRUE(absl::IsFailedPrecondition(mismatch)) << mismatch;
  EXPECT_EQ(GetReason(mismatch), "MODEL_MISMATCH");
  EXPECT_THAT(std::string(mismatch.message()), HasSubstr("page_tokens 256 != 128"));
  EXPECT_THAT(std::string(mismatch.message()), HasSubstr("weights"));
  EXPECT_EQ(client->DeleteSession("s").value(), 1u);
  EXPECT_EQ(GetReason(client->DeleteSession("s").status()), "SESSION_NOT_FOUND");
  // Through the router it is the same fleet.
  ASSERT_TRUE((*sequence)->Save("via-router").ok());
  auto listed = client_->ListSessions("via");
  ASSERT_TRUE(listed.ok()) << listed.status();
  ASSERT_EQ(listed->size(), 1u);
  EXPECT_EQ(listed->front().tokens(), 40u);
  auto loaded = client_->LoadSession(model_, "via-router");
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->tokens, tokens);
}

}  // namespace
}  // namespace pagetide
