// FEATURES A9 through the service: for how long, and of how many calls, a repeat gets the first
// answer. The worker's clock can be set forward; all else is real.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/mutex.h"
#include "base/status_macros.h"
#include "kvstore/memory_page_store.h"
#include "pagetide/v1/session.grpc.pb.h"
#include "rpc/status_mapping.h"
#include "services/worker_role.h"
#include "tests/conformance/assert_ok.h"
#include "tests/support/process.h"
#include "tests/support/worker_client.h"

namespace pagetide {
namespace {

using ::pagetide::testing::TestContext;
using ::pagetide::testing::TestTokens;
using ::pagetide::testing::WorkerClient;

// The machine's clock, some time ahead. Thread-safe.
class ClockAhead final : public Clock {
 public:
  MonotonicTime MonotonicNow() const override { return Clock::Real()->MonotonicNow() + ahead(); }
  absl::Time WallNow() const override { return Clock::Real()->WallNow() + ahead(); }
  void Advance(absl::Duration d) {
    MutexLock lock(&mu_);
    ahead_ += d;
  }

 private:
  absl::Duration ahead() const {
    MutexLock lock(&mu_);
    return ahead_;
  }
  mutable Mutex mu_;
  absl::Duration ahead_ ABSL_GUARDED_BY(mu_);
};

class RepeatsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    model_ = std::make_shared<const Model>(testing::MakeTestModel({.num_layers = 1}));
    ASSERT_OK(testing::RegisterTestModel(*model_, &store_));
    Start("one");
    a_ = Fill(1);
    b_ = Fill(2);
  }
  // Ends the worker that runs, if one does.
  void Start(const std::string& id) {
    client_.reset();
    role_.reset();
    WorkerRole::Options options;
    options.worker.id = id;
    options.worker.pool_bytes = 16 * model_->geometry().bytes_per_page_of_tokens();
    options.worker.deployment_secret = "a secret of tests";
    options.local_plane.socket_path = dir_ / absl::StrCat(id, ".sock");
    auto role = WorkerRole::Start(options, &store_, &clock_);
    ASSERT_OK(role);
    role_ = *std::move(role);
    client_ = std::make_unique<WorkerClient>(role_->address(), model_);
  }
  v1::SequenceState Fill(uint64_t seed) {
    auto open = client_->Open({});
    EXPECT_TRUE(open.ok()) << open.status();
    if (!open.ok()) return {};
    auto appended = client_->Append(open->state(), TestTokens(seed, 20), 20);
    EXPECT_TRUE(appended.ok()) << appended.status();
    return appended.ok() ? appended->state() : v1::SequenceState();
  }
  // Two sequences change places, or stay: a call whose request ids are the tenant's.
  absl::StatusOr<v1::ReorderSequencesResponse> Reorder(const std::string& request_id, bool swap) {
    v1::ReorderSequencesRequest request;
    request.set_request_id(request_id);
    for (const v1::SequenceState& state : {a_, b_}) {
      v1::SequenceRef* ref = request.add_sequences();
      ref->set_sequence_id(state.sequence_id());
      ref->set_epoch(state.epoch());
    }
    request.add_order(swap ? 1 : 0);
    request.add_order(swap ? 0 : 1);
    TestContext context;
    v1::ReorderSequencesResponse response;
    PT_RETURN_IF_ERROR(
        FromGrpcStatus(client_->edits().ReorderSequences(&context, request, &response)));
    return response;
  }
  absl::StatusOr<v1::SaveSessionResponse> Save(const v1::SaveSessionRequest& request) {
    const auto sessions = v1::SessionService::NewStub(client_->channel());
    TestContext context;
    v1::SaveSessionResponse response;
    PT_RETURN_IF_ERROR(FromGrpcStatus(sessions->SaveSession(&context, request, &response)));
    return response;
  }
  uint64_t Revision() { return client_->Get(a_.sequence_id())->revision(); }

  testing::TempDir dir_;
  ClockAhead clock_;
  MemoryPageStore store_;
  std::shared_ptr<const Model> model_;
  std::unique_ptr<WorkerRole> role_;
  std::unique_ptr<WorkerClient> client_;
  v1::SequenceState a_, b_;
};

TEST_F(RepeatsTest, A9TheLast10000OfATenantAreAnsweredAgain) {
  const auto first = Reorder("first", /*swap=*/true);
  ASSERT_OK(first);
  for (int i = 1; i < 10'000; ++i) ASSERT_OK(Reorder(absl::StrCat("stay ", i), /*swap=*/false));
  const uint64_t revision = Revision();
  auto again = Reorder("first", true);
  ASSERT_OK(again);
  EXPECT_EQ(again->SerializeAsString(), first->SerializeAsString());
  EXPECT_EQ(Revision(), revision) << "the repeat had an effect";
  EXPECT_EQ(GetReason(Reorder("first", false).status()), "REQUEST_ID_REUSED");
  // One more, and the first is forgotten: its id may be used again, with an effect.
  ASSERT_OK(Reorder("stay 10000", false));
  again = Reorder("first", true);
  ASSERT_OK(again);
  EXPECT_EQ(Revision(), revision + 1);
  EXPECT_EQ(again->states(0).revision(), revision + 1);
}

TEST_F(RepeatsTest, A9AnAnswerIsGivenAgainFor10Minutes) {
  const auto first = Reorder("once", /*swap=*/true);
  ASSERT_OK(first);
  // The rest of the ten minutes is time enough for the calls.
  clock_.Advance(absl::Minutes(8));
  auto again = Reorder("once", true);
  ASSERT_OK(again);
  EXPECT_EQ(again->SerializeAsString(), first->SerializeAsString());
  const absl::Status reused = Reorder("once", false).status();
  EXPECT_TRUE(absl::IsInvalidArgument(reused)) << reused;
  EXPECT_EQ(GetReason(reused), "REQUEST_ID_REUSED");
  const uint64_t revision = Revision();
  clock_.Advance(absl::Minutes(2));
  ASSERT_OK(Reorder("once", true));
  EXPECT_EQ(Revision(), revision + 1) << "the answer was kept for longer than ten minutes";
}

TEST_F(RepeatsTest, A9ASaveIsAnsweredAgainByItsManifestWhenItsWorkerIsGone) {
  v1::SaveSessionRequest save;
  save.set_request_id("save");
  save.set_name("kept");
  save.set_expected_version(0);
  save.mutable_sequence()->set_sequence_id(a_.sequence_id());
  save.mutable_sequence()->set_epoch(a_.epoch());
  const auto first = Save(save);
  ASSERT_OK(first);
  EXPECT_EQ(first->version(), 1);
  // Its answer was lost, and the worker is another one that knows neither call nor sequence.
  Start("two");
  v1::SaveSessionRequest other = save;
  other.set_keep_tokens(10);
  const absl::Status reused = Save(other).status();
  EXPECT_TRUE(absl::IsInvalidArgument(reused)) << reused;
  EXPECT_EQ(GetReason(reused), "REQUEST_ID_REUSED");
  auto again = Save(save);
  ASSERT_OK(again);
  EXPECT_EQ(again->SerializeAsString(), first->SerializeAsString());
  // Without its id the same save is another one, of a sequence that is not there.
  save.clear_request_id();
  EXPECT_FALSE(Save(save).ok());
}

}  // namespace
}  // namespace pagetide
