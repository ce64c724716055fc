// Parked sequences through real processes: let go of and taken up, kept through kill -9, and taken
// over from a worker that stood still for longer than its lease and then goes on writing.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/mutex.h"
#include "base/status_macros.h"
#include "kvstore/remote_page_store.h"
#include "pagetide/v1/session.grpc.pb.h"
#include "rpc/channel.h"
#include "rpc/status_mapping.h"
#include "tests/support/process.h"
#include "tests/support/timing.h"
#include "tests/support/worker_client.h"

namespace pagetide {
namespace {

using ::pagetide::testing::ChildProcess;
using ::pagetide::testing::Eventually;
using ::pagetide::testing::MakeTestModel;
using ::pagetide::testing::RegisterTestModel;
using ::pagetide::testing::TempDir;
using ::pagetide::testing::TestContext;
using ::pagetide::testing::TestTokens;
using ::pagetide::testing::WorkerClient;
using ::testing::HasSubstr;

MonotonicTime In(absl::Duration d) {
  return Clock::Real()->MonotonicNow() + d;
}

// For what another process does by itself.
void Pause() {
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
}

struct WorkerProcess {
  std::unique_ptr<ChildProcess> process;
  std::unique_ptr<WorkerClient> client;
  std::unique_ptr<v1::SessionService::Stub> sessions;

  absl::StatusOr<v1::ParkSequenceResponse> Park(const v1::SequenceState& state, bool keep_open) {
    TestContext context;
    v1::ParkSequenceRequest request;
    request.mutable_sequence()->set_sequence_id(state.sequence_id());
    request.mutable_sequence()->set_epoch(state.epoch());
    request.set_keep_open(keep_open);
    v1::ParkSequenceResponse response;
    const absl::Status status =
        FromGrpcStatus(client->sequences().ParkSequence(&context, request, &response));
    if (!status.ok()) return status;
    return response;
  }
  absl::StatusOr<v1::ResumeSequenceResponse> Resume(const std::string& id) {
    TestContext context;
    v1::ResumeSequenceRequest request;
    request.set_sequence_id(id);
    v1::ResumeSequenceResponse response;
    const absl::Status status =
        FromGrpcStatus(client->sequences().ResumeSequence(&context, request, &response));
    if (!status.ok()) return status;
    return response;
  }
  absl::StatusOr<v1::SaveSessionResponse> Save(const v1::SequenceState& state,
                                               const std::string& name) {
    TestContext context;
    v1::SaveSessionRequest request;
    request.mutable_sequence()->set_sequence_id(state.sequence_id());
    request.mutable_sequence()->set_epoch(state.epoch());
    request.set_name(name);
    v1::SaveSessionResponse response;
    const absl::Status status = FromGrpcStatus(sessions->SaveSession(&context, request, &response));
    if (!status.ok()) return status;
    return response;
  }
};

class TakeoverProcessTest : public ::testing::Test {
 protected:
  void SetUp() override {
    store_process_ = Start("pagetide-store", {absl::StrCat("--data-dir=", dir_ / "data")});
    store_ = std::make_unique<RemotePageStore>(
        MakeChannel(store_process_->Address("grpc"), {.own_connection = true}));
    model_ = std::make_shared<const Model>(MakeTestModel());
    ASSERT_TRUE(RegisterTestModel(*model_, store_.get()).ok());
    StartWorker("a", &a_);
    StartWorker("b", &b_);
  }
  std::unique_ptr<ChildProcess> Start(const std::string& program, std::vector<std::string> args) {
    args.insert(args.end(), {"--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0"});
    auto started = ChildProcess::Start({.program = program, .args = args});
    EXPECT_TRUE(started.ok()) << started.status();
    return started.ok() ? *std::move(started) : nullptr;
  }
  void StartWorker(const std::string& id, WorkerProcess* worker,
                   std::vector<std::string> more = {}) {
    std::vector<std::string> args = {absl::StrCat("--worker-id=", id),
                                     absl::StrCat("--store=", store_process_->Address("grpc")),
                                     "--pool-bytes=16MiB", "--store-lease-ms=3000"};
    args.insert(args.end(), more.begin(), more.end());
    worker->process = Start("pagetide-worker", args);
    worker->client = std::make_unique<WorkerClient>(worker->process->Address("grpc"), model_);
    worker->sessions = v1::SessionService::NewStub(worker->client->channel());
  }
  v1::SequenceState Fill(WorkerProcess& worker, const std::vector<uint32_t>& tokens) {
    auto opened = worker.client->Open(tokens);
    EXPECT_TRUE(opened.ok()) << opened.status();
    auto appended = worker.client->Append(opened->state(), tokens, tokens.size());
    EXPECT_TRUE(appended.ok()) << appended.status();
    return appended->state();
  }
  // Until the owner's lease has ended.
  v1::ResumeSequenceResponse ResumeWhenDead(WorkerProcess& worker, const std::string& id,
                                            int* num_refused) {
    const MonotonicTime give_up = In(absl::Seconds(60));
    for (;;) {
      auto resumed = worker.Resume(id);
      if (resumed.ok()) return *resumed;
      EXPECT_EQ(GetReason(resumed.status()), error_reason::kSequenceMoved) << resumed.status();
      ++*num_refused;
      if (Clock::Real()->MonotonicNow() > give_up) {
        ADD_FAILURE() << "never resumed: " << resumed.status();
        return {};
      }
      Pause();
    }
  }

  TempDir dir_;
  std::unique_ptr<ChildProcess> store_process_;
  std::unique_ptr<RemotePageStore> store_;
  std::shared_ptr<const Model> model_;
  WorkerProcess a_, b_;
};

TEST_F(TakeoverProcessTest, AParkedSequenceGoesOnOnAnotherWorker) {
  std::vector<uint32_t> tokens = TestTokens(1, 100);
  const v1::SequenceState state = Fill(a_, tokens);
  auto parked = a_.Park(state, /*keep_open=*/false);
  ASSERT_TRUE(parked.ok()) << parked.status();
  EXPECT_FALSE(parked->is_open());
  EXPECT_EQ(parked->tokens(), 100u);
  EXPECT_EQ(GetReason(a_.client->Get(state.sequence_id()).status()), "SEQUENCE_NOT_FOUND");
  EXPECT_TRUE(a_.client->EventuallyStat("pagetide_parking_calls_total", 1));
  // Both die; what was parked does not.
  a_.process->Kill();
  b_.process->Kill();
  StartWorker("c", &b_);
  auto resumed = b_.Resume(state.sequence_id());
  ASSERT_TRUE(resumed.ok()) << resumed.status();
  EXPECT_EQ(resumed->state().sequence_id(), state.sequence_id());
  EXPECT_EQ(resumed->state().epoch(), parked->epoch() + 1);
  EXPECT_FALSE(resumed->was_taken_over());
  EXPECT_GT(b_.client->Verify(state.sequence_id(), tokens, 0, 100).value_or(0), 0u);
  const std::vector<uint32_t> more = TestTokens(2, 20);
  tokens.insert(tokens.end(), more.begin(), more.end());
  auto appended = b_.client->Append(resumed->state(), tokens, tokens.size());
  ASSERT_TRUE(appended.ok()) << appended.status();
  EXPECT_GT(b_.client->Verify(state.sequence_id(), tokens, 0, 120).value_or(0), 0u);
  ASSERT_TRUE(b_.client->Close(appended->state()).ok());
  EXPECT_EQ(GetReason(b_.Resume(state.sequence_id()).status()), "SEQUENCE_NOT_FOUND");
  EXPECT_EQ(store_->GetStats(In(absl::Seconds(30)))->manifests, 0u);
  EXPECT_TRUE(b_.client->EventuallyStat("pagetide_parking_calls_total", 2));
}

TEST_F(TakeoverProcessTest, AKilledWorkersSequenceIsTakenOverAsItWasParkedLast) {
  std::vector<uint32_t> tokens = TestTokens(1, 100);
  const v1::SequenceState state = Fill(a_, tokens);
  ASSERT_TRUE(a_.Park(state, /*keep_open=*/true).ok());
  std::vector<uint32_t> longer = tokens;
  longer.resize(130, 7);
  ASSERT_TRUE(a_.client->Append(state, longer, longer.size()).ok());  // not parked
  a_.process->Kill();
  int num_refused = 0;
  const MonotonicTime killed = Clock::Real()->MonotonicNow();
  const v1::ResumeSequenceResponse taken = ResumeWhenDead(b_, state.sequence_id(), &num_refused);
  const absl::Duration took = Clock::Real()->MonotonicNow() - killed;
  EXPECT_TRUE(taken.was_taken_over());
  EXPECT_EQ(taken.state().length(), 100u);
  EXPECT_EQ(taken.state().epoch(), 2u);
  EXPECT_GT(b_.client->Verify(state.sequence_id(), tokens, 0, 100).value_or(0), 0u);
  std::printf(
      "{\"test\":\"takeover_after_kill\",\"lease_ms\":3000,\"refused_before\":%d,"
      "\"taken_over_after_ms\":%.0f,\"lost_tokens_that_were_not_parked\":30}\n",
      num_refused, absl::ToDoubleMilliseconds(took));
}

TEST_F(TakeoverProcessTest, ASequenceThatItsClientForgotIsClosedAndItsParkedStateGoesOnElsewhere) {
  WorkerProcess c;
  StartWorker("c", &c, {"--sequence-idle-ms=1000"});
  const std::vector<uint32_t> tokens = TestTokens(7, 100);
  // A machine may be so slow that the sequence is idle between two of these calls.
  v1::SequenceState state;
  const auto fill_and_park = [&]() -> absl::Status {
    PT_ASSIGN_OR_RETURN(const v1::OpenSequenceResponse opened, c.client->Open(tokens));
    PT_ASSIGN_OR_RETURN(const v1::AppendTokensResponse appended,
                        c.client->Append(opened.state(), tokens, tokens.size()));
    state = appended.state();
    return c.Park(state, /*keep_open=*/true).status();
  };
  ASSERT_TRUE(Eventually([&] { return fill_and_park().ok(); }));
  EXPECT_TRUE(c.client->EventuallyStat("pagetide_worker_sequences_expired_total", 1));
  // Other than a call on the sequence, the list does not keep it open.
  EXPECT_TRUE(Eventually([&] {
    TestContext context;
    v1::ListWorkerSequencesResponse open;
    EXPECT_TRUE(c.client->sequences().ListWorkerSequences(&context, {}, &open).ok());
    return open.sequences().empty();
  }));
  TestContext context;
  v1::GetSequenceRequest request;
  request.set_sequence_id(state.sequence_id());
  v1::GetSequenceResponse response;
  const absl::Status gone =
      FromGrpcStatus(c.client->sequences().GetSequence(&context, request, &response));
  EXPECT_EQ(GetReason(gone), "SEQUENCE_NOT_FOUND") << gone;
  // Its worker is alive and has let go of it.
  absl::StatusOr<v1::ResumeSequenceResponse> resumed;
  ASSERT_TRUE(Eventually([&] {
    resumed = b_.Resume(state.sequence_id());
    return resumed.ok();
  })) << resumed.status();
  EXPECT_FALSE(resumed->was_taken_over());
  EXPECT_GT(b_.client->Verify(state.sequence_id(), tokens, 0, 100).value_or(0), 0u);
}

TEST_F(TakeoverProcessTest, AWorkerThatStoodStillWritesNothingAfterItWasTakenOver) {
  const std::vector<uint32_t> tokens = TestTokens(1, 100);
  const v1::SequenceState state = Fill(a_, tokens);
  const std::string id = state.sequence_id();
  // The oracle: every acknowledgement that a saver got, and when.
  Mutex mu;
  uint64_t acked_before = 0, acked_after = 0, last_version = 0;
  std::map<std::string, uint64_t> refused_after;  // by reason
  std::atomic<bool> was_taken{false}, stop{false};
  std::vector<uint64_t> late_versions;
  std::vector<std::thread> savers;
  for (int s = 0; s < 3; ++s) {
    savers.emplace_back([&, s] {
      while (!stop) {
        const bool is_session = s == 2;
        uint64_t version = 0;
        absl::Status status;
        if (is_session) {
          status = a_.Save(state, "chat").status();
        } else {
          const auto parked = a_.Park(state, /*keep_open=*/true);
          status = parked.status();
          if (parked.ok()) version = parked->version();
        }
        MutexLock lock(&mu);
        if (status.ok()) {
          ++(was_taken ? acked_after : acked_before);
          if (was_taken && !is_session) late_versions.push_back(version);
          last_version = std::max(last_version, version);
        } else if (was_taken) {
          const std::string reason = GetReason(status);
          ++refused_after[reason.empty() ? absl::StatusCodeToString(status.code()) : reason];
        }
      }
    });
  }
  const auto count = [&](uint64_t* value) {
    MutexLock lock(&mu);
    return *value;
  };
  const MonotonicTime give_up = In(absl::Seconds(60));
  while (count(&acked_before) < 20 && Clock::Real()->MonotonicNow() < give_up) Pause();
  a_.process->Stop();  // in the middle of whatever the savers asked for
  int num_refused = 0;
  const v1::ResumeSequenceResponse taken = ResumeWhenDead(b_, id, &num_refused);
  const auto session_before = store_->GetManifest("session/default/chat", In(absl::Seconds(30)));
  was_taken = true;
  EXPECT_TRUE(taken.was_taken_over());
  EXPECT_EQ(taken.state().epoch(), 2u);
  // What the old owner's writes would look like if they came now, at the store itself.
  ManifestRecord stale;
  stale.name = absl::StrCat("parked/default/", id);
  int stale_attempted = 0, stale_refused = 0;
  for (; stale_attempted < 10; ++stale_attempted) {
    const absl::Status status =
        store_
            ->PutManifest(stale, taken.parked_version(),
                          WriteFence{absl::StrCat("sequence/", id), 1}, In(absl::Seconds(30)))
            .status();
    stale_refused += GetReason(status) == error_reason::kStaleEpoch ? 1 : 0;
  }
  a_.process->Continue();
  // All savers hear of it: their calls that stood still end, and so do new ones.
  const auto num_refusals = [&] {
    MutexLock lock(&mu);
    uint64_t refused = 0;
    for (const auto& [reason, n] : refused_after) {
      if (reason == error_reason::kStaleEpoch || reason == "SEQUENCE_NOT_FOUND") refused += n;
    }
    return refused;
  };
  while (num_refusals() < 20 && Clock::Real()->MonotonicNow() < give_up) Pause();
  stop = true;
  for (std::thread& saver : savers) saver.join();

  EXPECT_EQ(stale_refused, stale_attempted);
  EXPECT_GE(num_refusals(), 20u);
  // An answer may come late; what it acknowledges was there before the takeover.
  uint64_t accepted_after = 0;
  for (const uint64_t version : late_versions) {
    accepted_after += version > taken.parked_version() ? 1 : 0;
  }
  EXPECT_LE(last_version, taken.parked_version());
  const auto parked =
      store_->GetManifest(absl::StrCat("parked/default/", id), In(absl::Seconds(30)));
  ASSERT_TRUE(parked.ok()) << parked.status();
  EXPECT_EQ(parked->version, taken.parked_version());
  const auto session = store_->GetManifest("session/default/chat", In(absl::Seconds(30)));
  ASSERT_TRUE(session.ok() && session_before.ok()) << session.status();
  accepted_after += session->version - session_before->version;
  EXPECT_EQ(accepted_after, 0u);
  EXPECT_EQ(GetReason(a_.client->Get(id).status()), "SEQUENCE_NOT_FOUND");
  // The new owner reads what was saved and goes on; the old worker has other work again.
  EXPECT_GT(b_.client->Verify(id, tokens, 0, 100).value_or(0), 0u);
  auto again = b_.Park(taken.state(), /*keep_open=*/true);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->version(), taken.parked_version() + 1);
  const v1::SequenceState other = Fill(a_, TestTokens(9, 40));
  absl::Status saved = a_.Save(other, "other").status();
  while (absl::IsUnavailable(saved) && Clock::Real()->MonotonicNow() < give_up) {
    Pause();
    saved = a_.Save(other, "other").status();
  }
  EXPECT_TRUE(saved.ok()) << saved;
  std::string reasons;
  for (const auto& [reason, n] : refused_after) {
    absl::StrAppend(&reasons, reasons.empty() ? "" : ",", "\"", reason, "\":", n);
  }
  std::printf(
      "{\"test\":\"takeover_after_sigstop\",\"acked_before\":%lu,\"acked_late\":%lu,"
      "\"resume_refused_while_alive\":%d,\"stale_at_store_attempted\":%d,"
      "\"stale_at_store_refused\":%d,\"refused_after\":{%s},\"accepted_after\":%lu}\n",
      acked_before, acked_after, num_refused, stale_attempted, stale_refused, reasons.c_str(),
      accepted_after);
}

TEST_F(TakeoverProcessTest, TheCommandLineParksAndResumes) {
  const v1::SequenceState state = Fill(a_, TestTokens(1, 40));
  const auto run = [&](const WorkerProcess& worker, std::vector<std::string> args,
                       int expected_code = 0) {
    args.insert(args.end(), {"--worker", worker.process->Address("grpc")});
    auto process = ChildProcess::Start({.program = "pagetide", .args = args, .wait_ready = false});
    EXPECT_TRUE(process.ok()) << process.status();
    EXPECT_EQ((*process)->Wait(absl::Seconds(30)).value(), expected_code) << (*process)->Log();
    return (*process)->Log();
  };
  EXPECT_THAT(run(a_, {"park", state.sequence_id(), "--keep-open"}), HasSubstr("still open"));
  EXPECT_THAT(run(a_, {"park", state.sequence_id(), "--ttl", "2h"}),
              HasSubstr("version 2, epoch 2: 40 tokens, 3 pages"));
  EXPECT_THAT(run(b_, {"resume", state.sequence_id()}), HasSubstr("on b, epoch 3: 40 tokens"));
  EXPECT_THAT(run(b_, {"resume", "0123456789abcdef-1"}, 1),
              HasSubstr("neither open here nor parked"));
}

TEST_F(TakeoverProcessTest, RefusalsNameTheFieldAndChangeNothing) {
  const v1::SequenceState state = Fill(a_, TestTokens(1, 40));
  const auto park = [&](const v1::ParkSequenceRequest& request) {
    TestContext context;
    v1::ParkSequenceResponse response;
    return FromGrpcStatus(a_.client->sequences().ParkSequence(&context, request, &response));
  };
  v1::ParkSequenceRequest request;
  for (const std::string& id : {std::string(), std::string("x"), std::string(10000, 'f')}) {
    request.mutable_sequence()->set_sequence_id(id);
    const absl::Status status = park(request);
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("sequence_id"));
    EXPECT_TRUE(absl::IsInvalidArgument(a_.Resume(id).status()));
  }
  request.mutable_sequence()->set_sequence_id("0123456789abcdef-1");
  EXPECT_EQ(GetReason(park(request)), "SEQUENCE_NOT_FOUND");
  EXPECT_EQ(GetReason(a_.Resume("0123456789abcdef-1").status()), "SEQUENCE_NOT_FOUND");
  request.mutable_sequence()->set_sequence_id(state.sequence_id());
  request.mutable_sequence()->set_epoch(17);
  EXPECT_EQ(GetReason(park(request)), error_reason::kStaleEpoch);
  request.mutable_sequence()->set_epoch(state.epoch());
  request.mutable_sequence()->set_expected_revision(state.revision() + 5);
  EXPECT_EQ(GetReason(park(request)), "REVISION_MISMATCH");
  request.mutable_sequence()->clear_expected_revision();
  request.mutable_ttl()->set_seconds(-3);
  EXPECT_THAT(std::string(park(request).message()), HasSubstr("ttl is {seconds -3"));
  request.mutable_ttl()->set_seconds(0);
  EXPECT_THAT(std::string(park(request).message()), HasSubstr("ttl is 0, must be above 0"));
  EXPECT_EQ(store_->GetStats(In(absl::Seconds(30)))->manifests, 0u);
  // It was open only, and not parked: nothing to resume.
  EXPECT_EQ(GetReason(b_.Resume(state.sequence_id()).status()), "SEQUENCE_NOT_FOUND");
  auto unchanged = a_.client->Get(state.sequence_id());
  ASSERT_TRUE(unchanged.ok()) << unchanged.status();
  EXPECT_EQ(unchanged->revision(), state.revision());
}

}  // namespace
}  // namespace pagetide
