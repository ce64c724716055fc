// The router over real gRPC on loopback, with the memory store: models, decisions, Attach streams.
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "base/error_info.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kvstore/memory_page_store.h"
#include "pagetide/v1/admin.grpc.pb.h"
#include "services/router_role.h"
#include "tests/services/router_fixture.h"
#include "tests/support/process.h"
#include "worker/report_journal.h"
#include "worker/router_link.h"

namespace pagetide {
namespace {

using absl::StatusCode;
using testing::CallWithDeadline;
using testing::Eventually;
using testing::HandWorker;
using ::testing::HasSubstr;
using testing::TestHello;
using testing::TestKeys;
using testing::TestLoad;
using testing::TestModelSpec;
using testing::TestPrompt;
using testing::TestTokens;
using Stub = v1::RouterService::Stub;

class RouterServiceTest : public ::testing::Test {
 protected:
  static constexpr absl::Duration kHeartbeat = absl::Milliseconds(100);

  absl::Duration heartbeat_ = kHeartbeat;

  RouterServiceTest() { StartRouter("127.0.0.1:0"); }

  void StartRouter(const std::string& address) {
    RouterRole::Options options;
    options.server.addresses = {address};
    options.server.metrics_address = "";
    options.heartbeat = heartbeat_;
    options.deployment_secret = std::string(kDevelopmentSecret);
    auto role = RouterRole::Start(std::move(options), &store_, &clock_);
    ASSERT_TRUE(role.ok()) << role.status();
    role_ = *std::move(role);
    stub_ = v1::RouterService::NewStub(MakeChannel(role_->address()));
  }

  v1::Model Register(const v1::ModelSpec& spec = TestModelSpec()) {
    v1::RegisterModelRequest request;
    *request.mutable_spec() = spec;
    v1::RegisterModelResponse response;
    const absl::Status status =
        CallWithDeadline(stub_.get(), &Stub::RegisterModel, request, &response);
    EXPECT_TRUE(status.ok()) << status;
    return response.model();
  }

  absl::Status Assign(const v1::Prompt& prompt, v1::AssignSequenceResponse* response,
                      const std::string& request_id = "") {
    v1::AssignSequenceRequest request;
    *request.mutable_prompt() = prompt;
    request.set_request_id(request_id);
    return CallWithDeadline(stub_.get(), &Stub::AssignSequence, request, response);
  }

  v1::WorkerInfo Worker(const std::string& id) {
    v1::GetWorkerRequest request;
    request.set_worker_id(id);
    v1::GetWorkerResponse response;
    CallWithDeadline(stub_.get(), &Stub::GetWorker, request, &response).IgnoreError();
    return response.worker();
  }

  RouterLink::Options LinkOptions(const std::string& id, uint64_t incarnation) {
    RouterLink::Options options{.router_address = role_->address(),
                                .hello = TestHello(id, incarnation)};
    options.initial_backoff = absl::Milliseconds(10);
    options.max_backoff = absl::Milliseconds(100);
    return options;
  }

  testing::TempDir dir_;
  // The router's: nobody falls silent but where a test says so, however slow the machine.
  FakeClock clock_;
  MemoryPageStore store_{{.clock = &clock_}};
  std::unique_ptr<RouterRole> role_;
  std::unique_ptr<Stub> stub_;
};

TEST_F(RouterServiceTest, RegistersAModelOnceAndKeepsItInTheStore) {
  v1::RegisterModelRequest request;
  *request.mutable_spec() = TestModelSpec();
  v1::RegisterModelResponse first, again;
  ASSERT_TRUE(CallWithDeadline(stub_.get(), &Stub::RegisterModel, request, &first).ok());
  ASSERT_TRUE(CallWithDeadline(stub_.get(), &Stub::RegisterModel, request, &again).ok());
  EXPECT_FALSE(first.already_registered());
  EXPECT_TRUE(again.already_registered());
  EXPECT_EQ(first.model().model_digest(), again.model().model_digest());
  EXPECT_EQ(first.model().group_page_bytes(0), 16u * (8 + 8) * 4);

  // Another router knows it by name and by digest without being told.
  role_.reset();
  StartRouter("127.0.0.1:0");
  v1::AssignSequenceResponse response;
  for (const std::string& model : {std::string("tiny"), first.model().model_digest()}) {
    EXPECT_EQ(GetReason(Assign(TestPrompt(model, TestTokens(40)), &response)),
              error_reason::kNoWorker);
  }
  v1::ListModelsResponse models;
  ASSERT_TRUE(
      CallWithDeadline(stub_.get(), &Stub::ListModels, v1::ListModelsRequest(), &models).ok());
  ASSERT_EQ(models.models_size(), 1);
  EXPECT_EQ(models.models(0).spec().name(), "tiny");
}

TEST_F(RouterServiceTest, ANameThatIsTakenByAnotherDigestIsRefused) {
  Register();
  v1::RegisterModelRequest request;
  *request.mutable_spec() = TestModelSpec("tiny", 'x');
  v1::RegisterModelResponse response;
  EXPECT_EQ(CallWithDeadline(stub_.get(), &Stub::RegisterModel, request, &response).code(),
            StatusCode::kAlreadyExists);
  v1::ListModelsResponse models;
  ASSERT_TRUE(
      CallWithDeadline(stub_.get(), &Stub::ListModels, v1::ListModelsRequest(), &models).ok());
  EXPECT_EQ(models.models_size(), 1);  // the refused one left nothing behind
  // Two names of one thing are one model.
  const v1::Model other_name = Register(TestModelSpec("tiny-too"));
  EXPECT_EQ(other_name.model_digest(), models.models(0).model_digest());
  request.mutable_spec()->clear_weights_digest();
  const absl::Status bad = CallWithDeadline(stub_.get(), &Stub::RegisterModel, request, &response);
  EXPECT_EQ(bad.code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(bad.message()), HasSubstr("weights_digest"));
}

TEST_F(RouterServiceTest, UnknownModelAndNoWorkerAreTyped) {
  v1::AssignSequenceResponse response;
  const absl::Status unknown = Assign(TestPrompt("nobody", TestTokens(40)), &response);
  EXPECT_EQ(unknown.code(), StatusCode::kNotFound);
  EXPECT_EQ(GetReason(unknown), error_reason::kModelNotFound);
  Register();
  const absl::Status none = Assign(TestPrompt("tiny", TestTokens(40)), &response);
  EXPECT_EQ(none.code(), StatusCode::kUnavailable);
  EXPECT_EQ(GetReason(none), error_reason::kNoWorker);
  EXPECT_TRUE(GetRetryDelay(none).has_value());
}

TEST_F(RouterServiceTest, BadPromptsAreNamedWithTheirNumbers) {
  Register();
  struct Case {
    void (*spoil)(v1::Prompt&);
    const char* message;
  };
  const Case cases[] = {
      {[](v1::Prompt& p) { p.clear_tokens(); }, "neither tokens nor num_tokens"},
      {[](v1::Prompt& p) { p.set_tokens(3, 1000); },
       "prompt.tokens[3] is not below vocabulary_size = 1000"},
      {[](v1::Prompt& p) { p.set_tokens(0, 0xffffffff); }, "prompt.tokens[0] is not below"},
      {[](v1::Prompt& p) { p.add_prefix_keys(std::string(32, 'k')); }, "tokens as well as"},
      {[](v1::Prompt& p) { p.add_inputs()->set_digest("short"); },
       "prompt.inputs[0].digest has 5 bytes, expected 32"},
      {[](v1::Prompt& p) {
         p.add_inputs()->set_digest(std::string(32, 'i'));
         p.mutable_inputs(0)->set_position(40);
       },
       "prompt.inputs[0].position = 40 in a prompt of 40 tokens"},
      {[](v1::Prompt& p) {
         p.clear_tokens();
         p.set_num_tokens(40);
         p.add_prefix_keys("short");
       },
       "prompt.prefix_keys[0] has 5 bytes, expected 16 or 32"},
      {[](v1::Prompt& p) {
         p.clear_tokens();
         p.set_num_tokens(31);
         for (int i = 0; i < 2; ++i) p.add_prefix_keys(std::string(16, 'k'));
       },
       "has 2 entries, num_tokens = 31 has 1 full pages of 16 tokens"},
      {[](v1::Prompt& p) {
         p.clear_tokens();
         p.set_num_tokens(~uint64_t{0});
       },
       "at most 1099511627776 tokens"},
  };
  for (const Case& c : cases) {
    v1::Prompt prompt = TestPrompt("tiny", TestTokens(40));
    c.spoil(prompt);
    v1::AssignSequenceResponse response;
    const absl::Status status = Assign(prompt, &response);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << c.message;
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.message));
  }
}

TEST_F(RouterServiceTest, PlacesByTokensAndByKeysWhereThePrefixIs) {
  const v1::Model model = Register();
  const auto tokens = TestTokens(100);
  const auto keys = TestKeys(*ModelFromProto(model.spec()), tokens);
  ASSERT_EQ(keys.size(), 6u);
  HandWorker w1(role_->address()), w2(role_->address());
  ASSERT_TRUE(w1.Hello(TestHello("w1", 1)) && w1.Load(TestLoad(model.model_digest())));
  ASSERT_TRUE(w2.Hello(TestHello("w2", 2)) && w2.Load(TestLoad(model.model_digest())));
  ASSERT_TRUE(w2.Residency(w2.Report(1, keys)));
  ASSERT_TRUE(Eventually(
      [&] { return Worker("w1").total_frames() > 0 && Worker("w2").resident_pages() == 6; }));
  v1::AssignSequenceResponse response;
  ASSERT_TRUE(Assign(TestPrompt("tiny", tokens), &response).ok());
  EXPECT_EQ(response.worker_id(), "w2");
  EXPECT_EQ(response.chosen().device_tokens(), 96u);
  EXPECT_EQ(response.chosen().compute_tokens(), 4u);
  EXPECT_EQ(response.model_digest(), model.model_digest());

  v1::ExplainPlacementRequest explain;
  explain.mutable_prompt()->set_model("tiny");
  explain.mutable_prompt()->set_num_tokens(100);
  for (size_t i = 0; i < 3; ++i) {
    explain.mutable_prompt()->add_prefix_keys(
        std::string(keys[i].digest.view().substr(0, i == 0 ? 16 : 32)));
  }
  v1::ExplainPlacementResponse explained;
  ASSERT_TRUE(CallWithDeadline(stub_.get(), &Stub::ExplainPlacement, explain, &explained).ok());
  ASSERT_EQ(explained.candidates_size(), 2);
  EXPECT_EQ(explained.candidates(0).worker_id(), "w2");
  EXPECT_EQ(explained.candidates(0).device_tokens(), 48u);
  EXPECT_EQ(explained.policy(), "predicted_ttft");
  EXPECT_THAT(explained.explanation(), HasSubstr("w2: lowest score"));

  v1::ScoreWorkersRequest score;
  *score.mutable_prompt() = TestPrompt("tiny", tokens);
  score.add_candidate_worker_ids("w1");
  v1::ScoreWorkersResponse scored;
  ASSERT_TRUE(CallWithDeadline(stub_.get(), &Stub::ScoreWorkers, score, &scored).ok());
  ASSERT_EQ(scored.candidates_size(), 1);
  EXPECT_EQ(scored.candidates(0).compute_tokens(), 100u);
}

TEST_F(RouterServiceTest, ARepeatedRequestIdGivesTheSameAnswer) {
  const v1::Model model = Register();
  HandWorker w1(role_->address()), w2(role_->address());
  ASSERT_TRUE(w1.Hello(TestHello("w1", 1)) && w1.Load(TestLoad(model.model_digest())));
  ASSERT_TRUE(w2.Hello(TestHello("w2", 2)) && w2.Load(TestLoad(model.model_digest())));
  ASSERT_TRUE(Eventually(
      [&] { return Worker("w1").total_frames() > 0 && Worker("w2").total_frames() > 0; }));
  v1::AssignSequenceResponse first, again;
  ASSERT_TRUE(Assign(TestPrompt("tiny", TestTokens(40)), &first, "r1").ok());
  ASSERT_TRUE(Assign(TestPrompt("tiny", TestTokens(40)), &again, "r1").ok());
  EXPECT_EQ(first.assignment_id(), again.assignment_id());
  EXPECT_EQ(first.worker_id(), again.worker_id());
  // The same number of tokens and the same full pages, another tail.
  auto tokens = TestTokens(40);
  tokens.back() ^= 1;
  EXPECT_EQ(Assign(TestPrompt("tiny", tokens), &again, "r1").code(), StatusCode::kInvalidArgument);
}

TEST_F(RouterServiceTest, StoredPagesCountForEveryWorker) {
  const v1::Model model = Register();
  const auto core_model = ModelFromProto(model.spec());
  const auto tokens = TestTokens(100);
  HandWorker w1(role_->address());
  ASSERT_TRUE(w1.Hello(TestHello("w1", 1)) && w1.Load(TestLoad(model.model_digest())));
  const std::vector<std::byte> body(core_model->geometry().group(0).page_bytes());
  const auto keys = TestKeys(*core_model, tokens);
  for (size_t i = 0; i < 4; ++i) {
    const Digest& fingerprint = core_model->geometry().group(0).fingerprint();
    const PutPage page{.meta = {.key = MakePageKey(keys[i], fingerprint),
                                .checksum = ChecksumOf(body),
                                .body_bytes = body.size(),
                                .fingerprint = fingerprint,
                                .prefix = keys[i]},
                       .body = body};
    ASSERT_TRUE(store_.PutPages({&page, 1}, Durability::kCache, MonotonicTime::InfiniteFuture())[0]
                    .status.ok());
  }
  v1::ExplainPlacementRequest explain;
  *explain.mutable_prompt() = TestPrompt("tiny", tokens);
  v1::ExplainPlacementResponse explained;
  EXPECT_TRUE(Eventually([&] {
    return CallWithDeadline(stub_.get(), &Stub::ExplainPlacement, explain, &explained).ok() &&
           explained.candidates_size() == 1 && explained.candidates(0).eligible() &&
           explained.candidates(0).store_tokens() == 64;
  })) << explained.ShortDebugString();
  EXPECT_EQ(Worker("store").role(), "store");
  const PageKey gone = MakePageKey(keys[1], core_model->geometry().group(0).fingerprint());
  ASSERT_TRUE(store_.DeletePages({&gone, 1}, MonotonicTime::InfiniteFuture()).ok());
  EXPECT_TRUE(Eventually([&] {
    return CallWithDeadline(stub_.get(), &Stub::ExplainPlacement, explain, &explained).ok() &&
           explained.candidates_size() == 1 && explained.candidates(0).store_tokens() == 16;
  })) << explained.ShortDebugString();
}

TEST_F(RouterServiceTest, AGapInTheNumbersIsAnsweredWithASnapshotDirective) {
  const v1::Model model = Register();
  const auto keys = TestKeys(*ModelFromProto(model.spec()), TestTokens(100));
  HandWorker w1(role_->address());
  ASSERT_TRUE(w1.Hello(TestHello("w1", 1)) && w1.Load(TestLoad(model.model_digest())));
  v1::AttachResponse directive;
  ASSERT_TRUE(w1.Read(&directive));
  EXPECT_EQ(directive.welcome().router_id(), "router-0");
  EXPECT_EQ(directive.welcome().heartbeat_milliseconds(), 100u);
  ASSERT_TRUE(w1.Residency(w1.Report(1, {keys[0]})));
  ASSERT_TRUE(w1.Residency(w1.Report(3, {keys[2]})));
  ASSERT_TRUE(w1.Read(&directive));
  EXPECT_THAT(directive.send_snapshot().because(), HasSubstr("report 3 after 1"));
  // A snapshot in two parts, then a change with digests that agree.
  v1::ResidencyReport part = w1.Report(10, {keys[0], keys[1]});
  part.set_snapshot(true);
  ASSERT_TRUE(w1.Residency(part));
  part = w1.Report(11, {keys[2]});
  part.set_snapshot_end(true);
  ASSERT_TRUE(w1.Residency(part));
  ResidencyDigests digests{};
  for (size_t i = 0; i < 4; ++i) {
    ToggleInDigest(digests, PrefixHint::Of(keys[i]), 0, Tier::kDevice);
  }
  part = w1.Report(12, {keys[3]});
  part.mutable_bucket_digests()->Add(digests.begin(), digests.end());
  ASSERT_TRUE(w1.Residency(part));
  EXPECT_TRUE(Eventually([&] { return Worker("w1").resident_pages() == 4; }));
  // And one that does not: the worker holds a page it never reported.
  ToggleInDigest(digests, PrefixHint::Of(keys[5]), 0, Tier::kDevice);
  part = w1.Report(13, {});
  part.mutable_bucket_digests()->Add(digests.begin(), digests.end());
  clock_.Advance(2 * kHeartbeat);  // directives keep their distance
  ASSERT_TRUE(w1.Residency(part));
  ASSERT_TRUE(w1.Read(&directive));
  EXPECT_THAT(directive.send_snapshot().because(), HasSubstr("digest"));
}

TEST_F(RouterServiceTest, BrokenStreamsAreRefusedWithTheFieldAndKillNobody) {
  const v1::Model model = Register();
  struct Case {
    std::function<void(HandWorker&)> act;
    StatusCode code;
    const char* message;
  };
  const auto hello = [](HandWorker& w) { w.Hello(TestHello("bad", 7)); };
  const Case cases[] = {
      {[&](HandWorker& w) { w.Load(TestLoad(model.model_digest())); }, StatusCode::kInvalidArgument,
       "first message is not a hello"},
      {[&](HandWorker& w) { w.Hello(TestHello("No Good", 1)); }, StatusCode::kInvalidArgument,
       "worker_id"},
      {[&](HandWorker& w) { w.Hello(TestHello("bad", 0)); }, StatusCode::kInvalidArgument,
       "incarnation"},
      {[&](HandWorker& w) {
         v1::AttachHello h = TestHello("bad", 1);
         h.set_role("king");
         w.Hello(h);
       },
       StatusCode::kInvalidArgument, "hello.role"},
      {[&](HandWorker& w) {
         hello(w);
         hello(w);
       },
       StatusCode::kInvalidArgument, "second hello"},
      {[&](HandWorker& w) {
         hello(w);
         v1::ResidencyReport report = w.Report(1, {});
         report.add_changes()->set_prefix_hint("short");
         w.Residency(report);
       },
       StatusCode::kInvalidArgument, "residency.changes[0].prefix_hint has 5 bytes, expected 16"},
      {[&](HandWorker& w) {
         hello(w);
         v1::ResidencyReport report = w.Report(1, {PrefixKey{}});
         report.mutable_changes(0)->clear_tier();
         w.Residency(report);
       },
       StatusCode::kInvalidArgument, "tier = 0"},
      {[&](HandWorker& w) {
         hello(w);
         v1::ResidencyReport report = w.Report(1, {});
         report.add_bucket_digests(1);
         w.Residency(report);
       },
       StatusCode::kInvalidArgument, "bucket_digests has 1 entries"},
      {[&](HandWorker& w) {
         hello(w);
         v1::SequenceReport report;
         report.add_changes()->set_sequence_id("../etc");
         w.Sequences(report);
       },
       StatusCode::kInvalidArgument, "sequence_id"},
      {[&](HandWorker& w) {
         hello(w);
         v1::LoadReport load = TestLoad(model.model_digest());
         load.set_prefill_tokens_per_second(-1);
         w.Load(load);
       },
       StatusCode::kInvalidArgument, "prefill_tokens_per_second"},
  };
  for (const Case& c : cases) {
    HandWorker worker(role_->address());
    c.act(worker);
    const absl::Status status = FromGrpcStatus(worker.ReadToEnd());
    EXPECT_EQ(status.code(), c.code) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.message));
  }
  EXPECT_TRUE(Eventually([&] { return Worker("bad").state() == "dead"; }));
}

TEST_F(RouterServiceTest, AnEndedStreamIsADeadWorkerAtOnce) {
  const v1::Model model = Register();
  const auto tokens = TestTokens(100);
  auto w1 = std::make_unique<HandWorker>(role_->address());
  ASSERT_TRUE(w1->Hello(TestHello("w1", 1)) && w1->Load(TestLoad(model.model_digest())));
  ASSERT_TRUE(w1->Residency(w1->Report(1, TestKeys(*ModelFromProto(model.spec()), tokens))));
  ASSERT_TRUE(Eventually([&] { return Worker("w1").resident_pages() == 6; }));
  w1.reset();
  ASSERT_TRUE(Eventually([&] { return Worker("w1").state() == "dead"; }));
  EXPECT_EQ(Worker("w1").resident_pages(), 0u);
  v1::AssignSequenceResponse response;
  EXPECT_EQ(GetReason(Assign(TestPrompt("tiny", tokens), &response)), error_reason::kNoWorker);
}

TEST_F(RouterServiceTest, ASilentWorkersStreamIsEnded) {
  HandWorker w1(role_->address());
  v1::AttachResponse welcome;
  ASSERT_TRUE(w1.Hello(TestHello("w1", 1)) && w1.Read(&welcome));
  clock_.Advance(6 * kHeartbeat);
  const absl::Status status = FromGrpcStatus(w1.ReadToEnd());
  EXPECT_EQ(status.code(), StatusCode::kDeadlineExceeded) << status;
  EXPECT_EQ(Worker("w1").state(), "dead");
}

TEST_F(RouterServiceTest, ALaterHelloTakesTheIdOver) {
  HandWorker first(role_->address()), second(role_->address());
  v1::AttachResponse welcome;
  ASSERT_TRUE(first.Hello(TestHello("w1", 1)) && first.Read(&welcome));
  ASSERT_TRUE(second.Hello(TestHello("w1", 2)) && second.Read(&welcome));
  EXPECT_EQ(first.ReadToEnd().error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_EQ(Worker("w1").incarnation(), "0000000000000002");
  EXPECT_EQ(Worker("w1").state(), "serving");
}

TEST_F(RouterServiceTest, SequencesAreFoundAndListedInPages) {
  HandWorker w1(role_->address());
  ASSERT_TRUE(w1.Hello(TestHello("w1", 1)));
  v1::SequenceReport report;
  report.set_snapshot(true);
  for (uint64_t n = 1; n <= 5; ++n) {
    auto& change = *report.add_changes();
    change.set_sequence_id(SequenceId{1, n}.ToString());
    change.set_length(10 * n);
  }
  ASSERT_TRUE(w1.Sequences(report));
  v1::RouterGetSequenceRequest get;
  get.set_sequence_id(SequenceId{1, 5}.ToString());
  v1::RouterGetSequenceResponse got;
  ASSERT_TRUE(Eventually(
      [&] { return CallWithDeadline(stub_.get(), &Stub::GetSequence, get, &got).ok(); }));
  EXPECT_EQ(got.sequence().worker_id(), "w1");
  EXPECT_EQ(got.sequence().length(), 50u);
  v1::ListSequencesRequest list;
  list.set_page_size(2);
  v1::ListSequencesResponse page;
  std::vector<uint64_t> lengths;
  do {
    ASSERT_TRUE(CallWithDeadline(stub_.get(), &Stub::ListSequences, list, &page).ok());
    for (const auto& s : page.sequences()) lengths.push_back(s.length());
    list.set_page_token(page.next_page_token());
  } while (!page.next_page_token().empty());
  EXPECT_THAT(lengths, ::testing::ElementsAre(10, 20, 30, 40, 50));
  list.set_page_token("nonsense");
  EXPECT_EQ(CallWithDeadline(stub_.get(), &Stub::ListSequences, list, &page).code(),
            StatusCode::kInvalidArgument);
  list.set_page_size(1001);
  EXPECT_EQ(CallWithDeadline(stub_.get(), &Stub::ListSequences, list, &page).code(),
            StatusCode::kInvalidArgument);
  get.set_sequence_id(SequenceId{9, 9}.ToString());
  EXPECT_EQ(CallWithDeadline(stub_.get(), &Stub::GetSequence, get, &got).code(),
            StatusCode::kNotFound);
}

TEST_F(RouterServiceTest, ALinkReportsResidencySequencesAndLoad) {
  const v1::Model model = Register();
  const auto tokens = TestTokens(100);
  const auto keys = TestKeys(*ModelFromProto(model.spec()), tokens);
  ReportJournal journal;
  for (size_t i = 0; i < 3; ++i) {
    journal.OnResidencyChange(PrefixHint::Of(keys[i]), 0, Tier::kDevice, false, 1024);
  }
  journal.OnSequence({1, 1}, model.model_digest(), 5);
  RouterLink link(LinkOptions("w1", 1), MakeChannel(role_->address()), &journal,
                  [&] { return TestLoad(model.model_digest()); });
  ASSERT_TRUE(Eventually([&] { return Worker("w1").resident_pages() == 3; }));
  journal.OnResidencyChange(PrefixHint::Of(keys[3]), 0, Tier::kDevice, false, 1024);
  journal.OnResidencyChange(PrefixHint::Of(keys[3]), 0, Tier::kDevice, false, 1024);  // twice
  journal.OnResidencyChange(PrefixHint::Of(keys[0]), 0, Tier::kDevice, true, 1024);
  journal.OnResidencyChange(PrefixHint::Of(keys[1]), 0, Tier::kHost, false, 1024);
  EXPECT_TRUE(Eventually([&] { return Worker("w1").resident_pages() == 4; }));
  journal.OnSequence({1, 2}, model.model_digest(), 6);
  journal.OnSequenceClosed({1, 1});
  v1::ListSequencesResponse list;
  EXPECT_TRUE(Eventually([&] {
    return CallWithDeadline(stub_.get(), &Stub::ListSequences, v1::ListSequencesRequest(), &list)
               .ok() &&
           list.sequences_size() == 1 && list.sequences(0).length() == 6;
  }));
  EXPECT_EQ(link.num_snapshots(), 1u);  // digests agreed all the time
  EXPECT_EQ(link.num_attachments(), 1u);
}

TEST_F(RouterServiceTest, ALinkReportsNewsOfItsLoadBeforeTheNextHeartbeat) {
  heartbeat_ = absl::Seconds(10);
  role_.reset();
  StartRouter("127.0.0.1:0");
  const v1::Model model = Register();
  ReportJournal journal;
  std::atomic<bool> is_draining{false};
  RouterLink::Options options = LinkOptions("w1", 1);
  options.heartbeat = absl::Hours(1);  // no report by itself
  RouterLink link(options, MakeChannel(role_->address()), &journal, [&] {
    v1::LoadReport load = TestLoad(model.model_digest());
    load.set_draining(is_draining);
    return load;
  });
  // The first one came.
  ASSERT_TRUE(Eventually([&] { return Worker("w1").total_frames() == 1000; }));
  ASSERT_EQ(Worker("w1").state(), "serving");
  is_draining = true;
  link.ReportLoad();
  EXPECT_TRUE(Eventually([&] { return Worker("w1").state() == "draining"; }));
  v1::AssignSequenceResponse response;
  EXPECT_FALSE(Assign(TestPrompt("tiny", TestTokens(100)), &response).ok());
}

TEST_F(RouterServiceTest, ALinkThatFellBehindSendsASnapshot) {
  ReportJournal journal({.max_changes = 8});
  RouterLink link(LinkOptions("w1", 1), MakeChannel(role_->address()), &journal,
                  [] { return v1::LoadReport(); });
  ASSERT_TRUE(Eventually([&] { return link.is_attached() && link.num_snapshots() == 1; }));
  for (uint32_t i = 0; i < 20000; ++i) {
    journal.OnResidencyChange(PrefixHint::Of({Sha256Of(absl::StrCat(i))}), 0, Tier::kDevice, false,
                              1024);
  }
  EXPECT_TRUE(Eventually([&] { return Worker("w1").resident_pages() == 20000; }));
  EXPECT_GE(link.num_snapshots(), 2u);
}

TEST_F(RouterServiceTest, AfterARouterRestartLinksAttachAgainAndResidencyIsRebuilt) {
  // A socket file: a TCP port could be another's by then.
  const std::string address = absl::StrCat("unix:", dir_ / "router.sock");
  role_.reset();
  StartRouter(address);
  const v1::Model model = Register();
  const auto tokens = TestTokens(100);
  ReportJournal journal;
  for (const PrefixKey& key : TestKeys(*ModelFromProto(model.spec()), tokens)) {
    journal.OnResidencyChange(PrefixHint::Of(key), 0, Tier::kDevice, false, 1024);
  }
  journal.OnSequence({1, 1}, model.model_digest(), 5);
  RouterLink link(LinkOptions("w1", 1), MakeChannel(role_->address()), &journal,
                  [&] { return TestLoad(model.model_digest()); });
  ASSERT_TRUE(Eventually([&] { return Worker("w1").resident_pages() == 6; }));
  role_.reset();
  StartRouter(address);
  v1::AssignSequenceResponse response;
  ASSERT_TRUE(Eventually([&] {
    return Worker("w1").resident_pages() == 6 && Assign(TestPrompt("tiny", tokens), &response).ok();
  }));
  EXPECT_EQ(response.chosen().device_tokens(), 96u);
  v1::RouterGetSequenceRequest get;
  get.set_sequence_id(SequenceId{1, 1}.ToString());
  v1::RouterGetSequenceResponse got;
  EXPECT_TRUE(CallWithDeadline(stub_.get(), &Stub::GetSequence, get, &got).ok());
  // The router knows of the attachment before the link has its answer.
  EXPECT_TRUE(Eventually([&] { return link.num_attachments() == 2; })) << link.num_attachments();
}

TEST_F(RouterServiceTest, AdminTellsBuildRoleAndCounters) {
  const auto admin = v1::AdminService::NewStub(MakeChannel(role_->address()));
  using Admin = v1::AdminService::Stub;
  v1::GetBuildInfoResponse build;
  ASSERT_TRUE(
      CallWithDeadline(admin.get(), &Admin::GetBuildInfo, v1::GetBuildInfoRequest(), &build).ok());
  EXPECT_FALSE(build.version().empty());
  EXPECT_NE(build.version(), "unknown");
  v1::GetCapabilitiesResponse capabilities;
  ASSERT_TRUE(CallWithDeadline(admin.get(), &Admin::GetCapabilities, v1::GetCapabilitiesRequest(),
                               &capabilities)
                  .ok());
  EXPECT_EQ(capabilities.role(), "router");
  v1::AssignSequenceResponse assigned;
  Register();
  EXPECT_FALSE(Assign(TestPrompt("tiny", TestTokens(40)), &assigned).ok());
  v1::GetStatsResponse stats;
  ASSERT_TRUE(CallWithDeadline(admin.get(), &Admin::GetStats, v1::GetStatsRequest(), &stats).ok());
  EXPECT_EQ(stats.values().at("pagetide_router_refusals_total"), 1);
  v1::SetLogLevelRequest level;
  level.set_level("shout");
  v1::SetLogLevelResponse set;
  EXPECT_EQ(CallWithDeadline(admin.get(), &Admin::SetLogLevel, level, &set).code(),
            StatusCode::kInvalidArgument);
  v1::DumpFramesResponse dump;
  EXPECT_EQ(
      CallWithDeadline(admin.get(), &Admin::DumpFrames, v1::DumpFramesRequest(), &dump).code(),
      StatusCode::kUnimplemented);
}

}  // namespace
}  // namespace pagetide
