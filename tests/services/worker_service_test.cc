// The worker's services through a real gRPC server on loopback, over the real host, device and
// memory store.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "kvstore/memory_page_store.h"
#include "pagetide/v1/admin.grpc.pb.h"
#include "rpc/status_mapping.h"
#include "services/worker_role.h"
#include "tests/support/process.h"
#include "tests/support/timing.h"
#include "tests/support/worker_client.h"

namespace pagetide {
namespace {

using ::pagetide::testing::Eventually;
using ::pagetide::testing::MakeTestModel;
using ::pagetide::testing::RegisterTestModel;
using ::pagetide::testing::TestContext;
using ::pagetide::testing::TestRows;
using ::pagetide::testing::TestTokens;
using ::pagetide::testing::WorkerClient;
using ::testing::HasSubstr;

absl::Status StatusOf(const absl::Status& status) {
  return status;
}
template <typename T>
absl::Status StatusOf(const absl::StatusOr<T>& value) {
  return value.status();
}
absl::Status StatusOf(const grpc::Status& status) {
  return FromGrpcStatus(status);
}

#define ASSERT_OK(expr)                               \
  do {                                                \
    const absl::Status assert_ok_ = StatusOf((expr)); \
    ASSERT_TRUE(assert_ok_.ok()) << assert_ok_;       \
  } while (false)

class WorkerServiceTest : public ::testing::Test {
 protected:
  static constexpr uint64_t kFrames = 16;

  void SetUp() override {
    ASSERT_OK(RegisterTestModel(*model_, &store_));
    StartWorker(kFrames * model_->geometry().bytes_per_page_of_tokens());
  }
  void StartWorker(uint64_t pool_bytes) {
    WorkerRole::Options options;
    options.worker.pool_bytes = pool_bytes;
    options.worker.deployment_secret = "a secret of tests";
    options.local_plane.socket_path = dir_ / "worker.sock";
    auto role = WorkerRole::Start(options, &store_, Clock::Real());
    ASSERT_OK(role);
    role_ = *std::move(role);
    client_ = std::make_unique<WorkerClient>(role_->address(), model_);
    admin_ = v1::AdminService::NewStub(client_->channel());
  }
  v1::SequenceState OpenWith(const std::vector<uint32_t>& tokens, size_t count) {
    auto open = client_->Open({});
    EXPECT_TRUE(open.ok()) << open.status();
    if (!open.ok() || count == 0) return open.ok() ? open->state() : v1::SequenceState();
    auto appended = client_->Append(open->state(), tokens, count);
    EXPECT_TRUE(appended.ok()) << appended.status();
    return appended.ok() ? appended->state() : v1::SequenceState();
  }
  uint64_t FreeFrames() {
    TestContext context;
    v1::GetMemoryBreakdownResponse response;
    EXPECT_TRUE(admin_->GetMemoryBreakdown(&context, {}, &response).ok());
    uint64_t free = 0;
    for (const auto& pool : response.pools()) free += pool.free_frames();
    return free;
  }

  testing::TempDir dir_;
  MemoryPageStore store_;
  std::shared_ptr<const Model> model_ = std::make_shared<const Model>(MakeTestModel());
  std::unique_ptr<WorkerRole> role_;
  std::unique_ptr<WorkerClient> client_;
  std::unique_ptr<v1::AdminService::Stub> admin_;
};

TEST_F(WorkerServiceTest, CapabilitiesTellWhatReflectionCannot) {
  TestContext context;
  v1::GetCapabilitiesResponse response;
  ASSERT_TRUE(admin_->GetCapabilities(&context, {}, &response).ok());
  EXPECT_EQ(response.role(), "worker");
  EXPECT_THAT(response.capabilities(), ::testing::IsSupersetOf({"device:cpu", "format:llama_cpp"}));
}

TEST_F(WorkerServiceTest, AppendedRowsReadBackIdentical) {
  const auto tokens = TestTokens(1, 50);
  v1::SequenceState state = OpenWith(tokens, 20);
  EXPECT_EQ(state.length(), 20);
  auto appended = client_->Append(state, tokens, 50);
  ASSERT_OK(appended);
  EXPECT_EQ(appended->appended_tokens(), 30);
  EXPECT_EQ(appended->pages_filled(), 2);
  for (const auto& [begin, end] : std::vector<std::pair<int, int>>{{0, 50}, {15, 17}, {49, 50}}) {
    auto bytes = client_->Verify(state.sequence_id(), tokens, begin, end);
    ASSERT_OK(bytes);
    EXPECT_EQ(*bytes, (end - begin) * 2 * 2 * 64u);
  }
}

TEST_F(WorkerServiceTest, APromptIsReusedByASecondSequence) {
  const auto tokens = TestTokens(2, 40);
  OpenWith(tokens, 40);
  auto open = client_->Open(tokens);
  ASSERT_OK(open);
  EXPECT_EQ(open->reuse().reused_tokens(), 39);  // always one token left
  auto length = client_->WaitReady(open->state().sequence_id());
  ASSERT_OK(length);
  EXPECT_EQ(*length, 39);
  ASSERT_OK(client_->Verify(open->state().sequence_id(), tokens, 0, 39));
}

TEST_F(WorkerServiceTest, ForkAndRewindKeepTheRows) {
  const auto tokens = TestTokens(3, 40);
  const v1::SequenceState state = OpenWith(tokens, 40);
  auto fork = client_->Fork(state, 35);
  ASSERT_OK(fork);
  EXPECT_EQ(fork->state().length(), 35);
  EXPECT_EQ(fork->shared_pages(), 2);
  auto rewound = client_->Rewind(state, 10);
  ASSERT_OK(rewound);
  EXPECT_EQ(rewound->state().length(), 10);
  EXPECT_EQ(rewound->removed_tokens(), 30);
  ASSERT_OK(client_->Verify(fork->state().sequence_id(), tokens, 0, 35));
  ASSERT_OK(client_->Verify(state.sequence_id(), tokens, 0, 10));
}

TEST_F(WorkerServiceTest, CloseIsIdempotentAndThenTheSequenceIsUnknown) {
  const v1::SequenceState state = OpenWith(TestTokens(4, 20), 20);
  ASSERT_OK(client_->Close(state));
  ASSERT_OK(client_->Close(state));
  const auto got = client_->Get(state.sequence_id());
  EXPECT_EQ(got.status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(GetReason(got.status()), "SEQUENCE_NOT_FOUND");
}

TEST_F(WorkerServiceTest, UnknownModelIsNotFound) {
  WorkerClient other(role_->address(),
                     std::make_shared<const Model>(MakeTestModel({.name = "never-registered"})));
  const auto open = other.Open({1, 2, 3});
  EXPECT_EQ(open.status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(GetReason(open.status()), "MODEL_NOT_FOUND");
}

TEST_F(WorkerServiceTest, AModelDigestThatIsNoDigestIsNamed) {
  TestContext context;
  v1::OpenSequenceRequest request;
  request.set_model_digest("xyz");
  v1::OpenSequenceResponse response;
  const absl::Status status =
      StatusOf(client_->sequences().OpenSequence(&context, request, &response));
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("model_digest"));
}

TEST_F(WorkerServiceTest, SequenceIdsThatAreNoneOrForeign) {
  EXPECT_EQ(client_->Get("nonsense").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(client_->Get("").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(client_->Get(SequenceId{77, 1}.ToString()).status().code(),
            absl::StatusCode::kNotFound);
}

TEST_F(WorkerServiceTest, AWrongEpochChangesNothing) {
  const auto tokens = TestTokens(5, 40);
  const v1::SequenceState state = OpenWith(tokens, 20);
  v1::SequenceState stale = state;
  stale.set_epoch(state.epoch() + 1);
  for (const absl::Status& status :
       {client_->Append(stale, tokens, 40).status(), client_->Rewind(stale, 3).status(),
        client_->Fork(stale, 3).status(), client_->Close(stale)}) {
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
    EXPECT_EQ(GetReason(status), "STALE_EPOCH") << status;
  }
  auto now = client_->Get(state.sequence_id());
  ASSERT_OK(now);
  EXPECT_EQ(now->length(), 20);
  EXPECT_EQ(now->revision(), state.revision());
}

TEST_F(WorkerServiceTest, TokensBeyondTheVocabularyAreNamed) {
  const auto small = std::make_shared<const Model>(
      MakeTestModel({.name = "small-vocabulary", .vocabulary_size = 100}));
  ASSERT_OK(RegisterTestModel(*small, &store_));
  role_.reset();
  StartWorker(kFrames * model_->geometry().bytes_per_page_of_tokens());
  WorkerClient client(role_->address(), small);
  const auto open = client.Open({1, 2, 4294967295u});
  EXPECT_EQ(open.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(open.status().message()), HasSubstr("tokens[2] = 4294967295"));
}

TEST_F(WorkerServiceTest, RewindOutsideTheSequenceIsRefused) {
  const auto tokens = TestTokens(6, 20);
  const v1::SequenceState state = OpenWith(tokens, 20);
  for (int64_t length : {int64_t{-1}, int64_t{21}, INT64_MIN, INT64_MAX}) {
    EXPECT_EQ(client_->Rewind(state, length).status().code(), absl::StatusCode::kInvalidArgument);
  }
  ASSERT_OK(client_->Verify(state.sequence_id(), tokens, 0, 20));
}

// One append stream written by hand.
class RawAppend {
 public:
  RawAppend(WorkerClient* client, const v1::SequenceState& state,
            const std::vector<uint32_t>& tokens)
      : state_(state), writer_(client->sequences().AppendTokens(&context_, &response_)) {
    v1::AppendHeader* header = message_.mutable_header();
    header->mutable_sequence()->set_sequence_id(state.sequence_id());
    header->mutable_sequence()->set_epoch(state.epoch());
    header->set_append_id("raw");
    header->set_expected_length(state.length());
    header->mutable_tokens()->Add(tokens.begin(), tokens.end());
  }
  v1::AppendHeader* header() { return message_.mutable_header(); }
  bool SendHeader() { return writer_->Write(message_); }
  bool Send(const v1::RowPart& part) {
    *message_.mutable_rows() = part;
    return writer_->Write(message_);
  }
  absl::Status Finish() {
    writer_->WritesDone();
    return FromGrpcStatus(writer_->Finish());
  }
  absl::Status Cancel() {
    context_.TryCancel();
    return FromGrpcStatus(writer_->Finish());
  }

 private:
  const v1::SequenceState state_;
  TestContext context_;
  v1::AppendTokensRequest message_;
  v1::AppendTokensResponse response_;
  std::unique_ptr<grpc::ClientWriterInterface<v1::AppendTokensRequest>> writer_;
};

v1::RowPart Part(uint32_t layer, v1::RowKind kind, uint32_t first, uint32_t count,
                 std::string data) {
  v1::RowPart part;
  part.set_layer(layer);
  part.set_kind(kind);
  part.set_first_token(first);
  part.set_num_tokens(count);
  part.set_data(std::move(data));
  return part;
}

TEST_F(WorkerServiceTest, RowsThatDoNotMatchTheAppendAreRefusedAndNothingChanges) {
  const auto tokens = TestTokens(7, 20);
  const v1::SequenceState state = OpenWith(tokens, 10);
  const uint64_t free_frames = FreeFrames();
  struct Case {
    const char* what;
    v1::RowPart part;
  };
  const std::vector<Case> cases = {
      {"too few bytes", Part(0, v1::ROW_KIND_K, 0, 10, std::string(639, 'x'))},
      {"too many bytes", Part(0, v1::ROW_KIND_K, 0, 10, std::string(641, 'x'))},
      {"no bytes", Part(0, v1::ROW_KIND_K, 0, 10, "")},
      {"layer", Part(2, v1::ROW_KIND_K, 0, 10, std::string(640, 'x'))},
      {"kind", Part(0, v1::ROW_KIND_UNSPECIFIED, 0, 10, std::string(640, 'x'))},
      {"beyond the append", Part(0, v1::ROW_KIND_K, 1, 10, std::string(640, 'x'))},
      {"overflow", Part(0, v1::ROW_KIND_K, UINT32_MAX, 2, std::string(128, 'x'))},
      {"count", Part(0, v1::ROW_KIND_V, 0, UINT32_MAX, std::string(640, 'x'))},
      {"too large a part", Part(0, v1::ROW_KIND_K, 0, 10, std::string((1 << 20) + 1, 'x'))},
  };
  for (const Case& c : cases) {
    RawAppend append(client_.get(), state, {tokens.begin() + 10, tokens.end()});
    ASSERT_TRUE(append.SendHeader());
    append.Send(c.part);
    const absl::Status status = append.Finish();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << c.what << ": " << status;
  }
  auto now = client_->Get(state.sequence_id());
  ASSERT_OK(now);
  EXPECT_EQ(now->length(), 10);
  EXPECT_EQ(now->pending_tokens(), 0);
  EXPECT_EQ(FreeFrames(), free_frames);
  ASSERT_OK(client_->Append(state, tokens, 20));
  ASSERT_OK(client_->Verify(state.sequence_id(), tokens, 0, 20));
}

TEST_F(WorkerServiceTest, AStreamCutInTheMiddleOfALayerChangesNothing) {
  const auto tokens = TestTokens(8, 60);
  const v1::SequenceState state = OpenWith(tokens, 10);
  const uint64_t free_frames = FreeFrames();
  for (const bool cancel : {false, true}) {
    RawAppend append(client_.get(), state, {tokens.begin() + 10, tokens.end()});
    ASSERT_TRUE(append.SendHeader());
    const GroupGeometry& group = model_->geometry().group(0);
    ASSERT_TRUE(append.Send(
        Part(0, v1::ROW_KIND_K, 0, 50, TestRows(group, tokens, 10, 60, 0, RowKind::kK))));
    ASSERT_TRUE(append.Send(
        Part(0, v1::ROW_KIND_V, 0, 25, TestRows(group, tokens, 10, 35, 0, RowKind::kV))));
    const absl::Status status = cancel ? append.Cancel() : append.Finish();
    EXPECT_EQ(status.code(),
              cancel ? absl::StatusCode::kCancelled : absl::StatusCode::kFailedPrecondition)
        << status;
    if (!cancel) {
      EXPECT_EQ(GetReason(status), "ROWS_MISSING") << status;
    }
    // The server learns of a cancelled stream a moment later than the client.
    EXPECT_TRUE(
        Eventually([&] { return client_->Get(state.sequence_id())->pending_tokens() == 0; }));
    auto now = client_->Get(state.sequence_id());
    ASSERT_OK(now);
    EXPECT_EQ(now->pending_tokens(), 0);
    EXPECT_EQ(now->length(), 10);
    EXPECT_EQ(FreeFrames(), free_frames);
  }
  ASSERT_OK(client_->Append(state, tokens, 60));
  ASSERT_OK(client_->Verify(state.sequence_id(), tokens, 0, 60));
}

// The wait for frames had a deadline of a quarter second, whatever the caller's was: a fleet under
// load refused sequences that it had room for a moment later.
TEST_F(WorkerServiceTest, ReadinessWaitsForFramesAsLongAsTheCallerDoes) {
  const auto large = TestTokens(30, 160);
  const v1::SequenceState stored = OpenWith(large, 160);
  TestContext evict_context;
  v1::EvictPagesResponse evicted;
  ASSERT_OK(StatusOf(admin_->EvictPages(&evict_context, {}, &evicted)));
  ASSERT_EQ(FreeFrames(), kFrames);
  // An open append holds 8 of the 16 frames; the sequence needs 10.
  const auto tokens = TestTokens(31, 128);
  const v1::SequenceState writing = OpenWith({}, 0);
  RawAppend append(client_.get(), writing, tokens);
  ASSERT_TRUE(append.SendHeader());
  ASSERT_TRUE(Eventually([&] { return FreeFrames() == kFrames - 8; }));

  absl::StatusOr<uint64_t> length = absl::UnknownError("still waiting");
  std::atomic<bool> is_over = false;
  std::thread watch([&] {
    length = client_->WaitReady(stored.sequence_id());
    is_over = true;
  });
  for (int i = 0; i < 100 && !is_over; ++i) absl::SleepFor(absl::Milliseconds(10));
  EXPECT_FALSE(is_over) << length.status();
  // The append cannot be committed without its rows: it ends and gives its frames back.
  EXPECT_EQ(GetReason(append.Finish()), "ROWS_MISSING");
  watch.join();
  ASSERT_OK(length);
  EXPECT_EQ(*length, 160);
  ASSERT_OK(client_->Verify(stored.sequence_id(), large, 0, 160));
}

TEST_F(WorkerServiceTest, AWatcherThatLeavesNoLongerStandsInLine) {
  const auto large = TestTokens(32, 160);
  const v1::SequenceState stored = OpenWith(large, 160);
  TestContext evict_context;
  v1::EvictPagesResponse evicted;
  ASSERT_OK(StatusOf(admin_->EvictPages(&evict_context, {}, &evicted)));
  const v1::SequenceState writing = OpenWith({}, 0);
  RawAppend append(client_.get(), writing, TestTokens(33, 128));
  ASSERT_TRUE(append.SendHeader());
  ASSERT_TRUE(Eventually([&] { return FreeFrames() == kFrames - 8; }));

  TestContext watch_context(absl::Minutes(10));
  v1::WatchReadinessRequest request;
  request.set_sequence_id(stored.sequence_id());
  auto reader = client_->sequences().WatchReadiness(&watch_context, request);
  v1::WatchReadinessResponse message;
  ASSERT_TRUE(reader->Read(&message));
  EXPECT_FALSE(message.done());
  watch_context.TryCancel();
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  // A call that needs one frame stands behind it in line until it has left.
  OpenWith(TestTokens(34, 16), 16);
  EXPECT_EQ(GetReason(append.Finish()), "ROWS_MISSING");
}

TEST_F(WorkerServiceTest, AppendStreamsOfTheWrongShapeAreRefused) {
  const auto tokens = TestTokens(9, 20);
  const v1::SequenceState state = OpenWith(tokens, 0);
  {
    RawAppend empty(client_.get(), state, tokens);
    EXPECT_EQ(empty.Finish().code(), absl::StatusCode::kInvalidArgument);
  }
  {
    RawAppend rows_first(client_.get(), state, tokens);
    rows_first.Send(Part(0, v1::ROW_KIND_K, 0, 1, std::string(64, 'x')));
    EXPECT_EQ(rows_first.Finish().code(), absl::StatusCode::kInvalidArgument);
  }
  {
    RawAppend two_headers(client_.get(), state, tokens);
    ASSERT_TRUE(two_headers.SendHeader());
    two_headers.SendHeader();
    EXPECT_EQ(two_headers.Finish().code(), absl::StatusCode::kInvalidArgument);
  }
  {
    RawAppend wrong_length(client_.get(), state, tokens);
    wrong_length.header()->set_expected_length(5);
    wrong_length.SendHeader();
    const absl::Status status = wrong_length.Finish();
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_EQ(GetReason(status), "LENGTH_MISMATCH");
  }
  auto now = client_->Get(state.sequence_id());
  ASSERT_OK(now);
  EXPECT_EQ(now->length(), 0);
}

TEST_F(WorkerServiceTest, ReadRowsOutsideTheSequenceIsRefused) {
  const v1::SequenceState state = OpenWith(TestTokens(10, 20), 20);
  struct Case {
    uint32_t group;
    uint64_t begin, end;
    uint32_t layer;
  };
  for (const Case& c : {Case{1, 0, 10, 0}, Case{0, 0, 21, 0}, Case{0, 12, 11, 0},
                        Case{0, 0, UINT64_MAX, 0}, Case{0, 0, 10, 2}}) {
    TestContext context;
    v1::ReadRowsRequest request;
    request.set_sequence_id(state.sequence_id());
    request.set_group(c.group);
    request.set_begin(c.begin);
    request.set_end(c.end);
    request.add_layers(c.layer);
    auto reader = client_->sequences().ReadRows(&context, request);
    v1::ReadRowsResponse response;
    EXPECT_FALSE(reader->Read(&response));
    EXPECT_EQ(StatusOf(reader->Finish()).code(), absl::StatusCode::kInvalidArgument)
        << c.group << " " << c.begin << " " << c.end << " " << c.layer;
  }
}

TEST_F(WorkerServiceTest, AttendNamesTheSizesItExpects) {
  const v1::SequenceState state = OpenWith(TestTokens(11, 20), 20);
  v1::AttendRequest good;
  good.set_sequence_id(state.sequence_id());
  good.set_epoch(state.epoch());
  good.set_num_queries(1);
  good.set_query_heads(2);
  good.set_first_position(19);
  good.set_queries(std::string(2 * 8 * 4, '\0'));
  const auto attend = [&](const v1::AttendRequest& request, v1::AttendResponse* response) {
    TestContext context;
    return StatusOf(client_->sequences().Attend(&context, request, response));
  };
  v1::AttendResponse response;
  ASSERT_OK(attend(good, &response));
  EXPECT_EQ(response.outputs().size(), 2 * 8 * 4);
  EXPECT_EQ(response.log_sum_exp().size(), 2 * 4);

  v1::AttendRequest bad = good;
  bad.mutable_queries()->pop_back();
  const absl::Status short_queries = attend(bad, &response);
  EXPECT_EQ(short_queries.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(short_queries.message()), HasSubstr("queries has 63 bytes"));
  bad = good;
  bad.set_num_queries(UINT32_MAX);
  bad.set_query_heads(UINT32_MAX);
  EXPECT_EQ(attend(bad, &response).code(), absl::StatusCode::kInvalidArgument);
  bad = good;
  bad.set_layer(2);
  EXPECT_EQ(attend(bad, &response).code(), absl::StatusCode::kInvalidArgument);
  bad = good;
  bad.set_k_rows(std::string(64, 'x'));
  EXPECT_EQ(attend(bad, &response).code(), absl::StatusCode::kInvalidArgument);
  bad = good;
  bad.set_epoch(99);
  EXPECT_EQ(GetReason(attend(bad, &response)), "STALE_EPOCH");
}

TEST_F(WorkerServiceTest, ARepeatedRequestIdReturnsTheFirstAnswer) {
  const auto tokens = TestTokens(12, 20);
  auto first = client_->Open(tokens, "open-1");
  ASSERT_OK(first);
  auto again = client_->Open(tokens, "open-1");
  ASSERT_OK(again);
  EXPECT_EQ(first->state().sequence_id(), again->state().sequence_id());
  const auto other = client_->Open(TestTokens(13, 20), "open-1");
  EXPECT_EQ(other.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(GetReason(other.status()), "REQUEST_ID_REUSED");

  auto appended = client_->Append(first->state(), tokens, 20, "append-1");
  ASSERT_OK(appended);
  auto repeated = client_->Append(first->state(), tokens, 20, "append-1");
  ASSERT_OK(repeated);
  EXPECT_EQ(repeated->state().revision(), appended->state().revision());
  EXPECT_EQ(client_->Get(first->state().sequence_id())->length(), 20);
}

TEST_F(WorkerServiceTest, AStepOfManySequencesCommitsEachOnItsOwn) {
  const GroupGeometry& group = model_->geometry().group(0);
  std::vector<v1::SequenceState> states;
  std::vector<std::vector<uint32_t>> tokens;
  v1::ReserveSlotsRequest reserve;
  for (int i = 0; i < 4; ++i) {
    tokens.push_back(TestTokens(20 + i, 10));
    states.push_back(OpenWith(tokens.back(), 9));
    auto* item = reserve.add_items();
    item->mutable_sequence()->set_sequence_id(states.back().sequence_id());
    item->mutable_sequence()->set_epoch(states.back().epoch());
    item->set_num_tokens(1);
  }
  TestContext reserve_context;
  v1::ReserveSlotsResponse slots;
  ASSERT_OK(StatusOf(client_->sequences().ReserveSlots(&reserve_context, reserve, &slots)));
  ASSERT_EQ(slots.slots_size(), 4);
  v1::CommitStepRequest step;
  step.set_request_id("step-1");
  for (int i = 0; i < 4; ++i) {
    auto* item = step.add_items();
    *item->mutable_sequence() = reserve.items(i).sequence();
    item->set_reservation_id(slots.slots(i).reservation_id());
    item->add_tokens(tokens[i][9]);
    for (uint32_t layer = 0; layer < 2; ++layer) {
      // The third lacks a row.
      *item->add_rows() =
          Part(layer, v1::ROW_KIND_K, 0, 1, TestRows(group, tokens[i], 9, 10, layer, RowKind::kK));
      if (i == 2 && layer == 1) continue;
      *item->add_rows() =
          Part(layer, v1::ROW_KIND_V, 0, 1, TestRows(group, tokens[i], 9, 10, layer, RowKind::kV));
    }
  }
  for (int round = 0; round < 2; ++round) {  // the repeat gives the same answers
    TestContext context;
    v1::CommitStepResponse response;
    ASSERT_OK(StatusOf(client_->sequences().CommitStep(&context, step, &response)));
    ASSERT_EQ(response.results_size(), 4);
    for (int i = 0; i < 4; ++i) {
      EXPECT_EQ(response.results(i).code() == 0, i != 2) << response.results(i).message();
      EXPECT_EQ(client_->Get(states[i].sequence_id())->length(), i == 2 ? 9 : 10);
    }
    EXPECT_EQ(response.results(2).reason(), "ROWS_MISSING");
  }
  ASSERT_OK(client_->Verify(states[0].sequence_id(), tokens[0], 0, 10));
}

TEST_F(WorkerServiceTest, LeasesAreBoundedInTime) {
  const auto tokens = TestTokens(30, 40);
  const v1::SequenceState state = OpenWith(tokens, 40);
  v1::GetBlockTableRequest request;
  request.set_sequence_id(state.sequence_id());
  request.mutable_lease()->set_seconds(31);
  v1::GetBlockTableResponse response;
  {
    TestContext context;
    EXPECT_EQ(StatusOf(client_->sequences().GetBlockTable(&context, request, &response)).code(),
              absl::StatusCode::kInvalidArgument);
  }
  request.mutable_lease()->set_seconds(0);
  request.mutable_lease()->set_nanos(200'000'000);
  TestContext context;
  ASSERT_OK(StatusOf(client_->sequences().GetBlockTable(&context, request, &response)));
  EXPECT_FALSE(response.lease_id().empty());
  ASSERT_EQ(response.extents_size(), 3);
  for (const auto& extent : response.extents()) {
    EXPECT_TRUE(extent.has_pool_offset());
    EXPECT_GE(extent.pins(), 1);
  }
  request.clear_lease();
  EXPECT_TRUE(Eventually([&] {
    TestContext poll;
    response.Clear();
    return client_->sequences().GetBlockTable(&poll, request, &response).ok() &&
           response.extents(0).pins() == 0;
  })) << response.ShortDebugString();
}

TEST_F(WorkerServiceTest, ABlockTableComesInPagesOfOneMoment) {
  const auto tokens = TestTokens(32, 60);
  v1::SequenceState state = OpenWith(tokens, 40);
  const auto get = [&](const v1::GetBlockTableRequest& request,
                       v1::GetBlockTableResponse* response) {
    TestContext context;
    response->Clear();
    return StatusOf(client_->sequences().GetBlockTable(&context, request, response));
  };
  v1::GetBlockTableRequest request;
  request.set_sequence_id(state.sequence_id());
  request.set_page_size(2);
  v1::GetBlockTableResponse first, second;
  ASSERT_OK(get(request, &first));
  ASSERT_EQ(first.extents_size(), 2);
  request.set_page_token(first.next_page_token());
  ASSERT_OK(get(request, &second));
  ASSERT_EQ(second.extents_size(), 1);
  EXPECT_EQ(second.extents(0).first_row(), 32u);
  EXPECT_EQ(second.next_page_token(), "");
  // Another revision is another table.
  auto appended = client_->Append(state, tokens, 60);
  ASSERT_OK(appended);
  const absl::Status changed = get(request, &second);
  EXPECT_EQ(changed.code(), absl::StatusCode::kAborted) << changed;
  // Of a lease it stays the same table, whatever becomes of the sequence.
  request.clear_page_token();
  request.mutable_lease()->set_seconds(30);
  ASSERT_OK(get(request, &first));
  ASSERT_EQ(first.extents_size(), 2);
  ASSERT_FALSE(first.next_page_token().empty());
  request.set_page_token(first.next_page_token());
  EXPECT_EQ(get(request, &second).code(), absl::StatusCode::kInvalidArgument) << "a second lease";
  request.clear_lease();
  request.set_lease_id(first.lease_id());
  ASSERT_OK(client_->Rewind(appended->state(), 5));
  ASSERT_OK(get(request, &second));
  ASSERT_EQ(second.extents_size(), 2);
  EXPECT_EQ(second.state().length(), 60u);
  EXPECT_EQ(second.lease_id(), first.lease_id());
  EXPECT_EQ(second.next_page_token(), "");
  for (const auto& extent : second.extents()) EXPECT_TRUE(extent.has_pool_offset());
  EXPECT_EQ(second.extents(1).first_row(), 48u);
  EXPECT_EQ(second.extents(1).count(), 12u);
  // Nobody's lease, a lease of another sequence, a token that is none.
  const v1::SequenceState other = OpenWith(TestTokens(33, 20), 20);
  v1::GetBlockTableRequest bad = request;
  bad.set_sequence_id(other.sequence_id());
  EXPECT_EQ(GetReason(get(bad, &second)), "LEASE_ENDED");
  bad = request;
  bad.set_lease_id("pin-77");
  EXPECT_EQ(GetReason(get(bad, &second)), "LEASE_ENDED");
  for (const char* token : {"garbage", "1", "1.2.3", "1.-2", "99.0", "1.99"}) {
    bad = request;
    bad.set_page_token(token);
    const absl::Status status = get(bad, &second);
    EXPECT_TRUE(absl::IsInvalidArgument(status) || absl::IsAborted(status)) << token << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("page_token"));
  }
  bad = request;
  bad.set_page_size(16385);
  EXPECT_THAT(std::string(get(bad, &second).message()), HasSubstr("16385"));
  // The rest of a leased table is there after its sequence was closed; without the lease it is not.
  ASSERT_OK(client_->Close(state));
  ASSERT_OK(get(request, &second));
  ASSERT_EQ(second.extents_size(), 2);
  EXPECT_EQ(second.state().sequence_id(), state.sequence_id());
  for (const auto& extent : second.extents()) EXPECT_TRUE(extent.has_pool_offset());
  bad = request;
  bad.clear_lease_id();
  EXPECT_EQ(GetReason(get(bad, &second)), "SEQUENCE_NOT_FOUND");
}

TEST_F(WorkerServiceTest, AnAnswerOfAttentionThatFitsNoMessageIsRefusedWithTheNumbers) {
  ModelSpec spec = model_->spec();
  spec.name = "wide";
  LayerGroupSpec& group = spec.geometry.groups.front();
  group.layers = {0};
  group.kv_heads = group.k_dim = 1;
  group.v_dim = 65536;
  const auto wide = std::make_shared<const Model>(Model::Create(spec).value());
  ASSERT_OK(RegisterTestModel(*wide, &store_));
  role_.reset();
  StartWorker(wide->geometry().bytes_per_page_of_tokens());
  WorkerClient client(role_->address(), wide);
  const auto open = client.Open({});
  ASSERT_OK(open);
  const auto tokens = TestTokens(60, 16);
  ASSERT_OK(client.Append(open->state(), tokens, 16));
  v1::AttendRequest request;
  request.set_sequence_id(open->state().sequence_id());
  request.set_epoch(open->state().epoch());
  const auto attend = [&](uint32_t num_queries, uint32_t query_heads) {
    request.set_num_queries(num_queries);
    request.set_query_heads(query_heads);
    request.set_queries(std::string(size_t{4} * num_queries * query_heads, '\0'));
    TestContext context;
    v1::AttendResponse response;
    return StatusOf(client.sequences().Attend(&context, request, &response));
  };
  const absl::Status refused = attend(16, 65536);  // 256 GiB of answer for 4 MiB of queries
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument) << refused;
  for (const char* number : {"16", "65536", "4194304"}) {
    EXPECT_THAT(std::string(refused.message()), HasSubstr(number));
  }
  EXPECT_EQ(attend(16, 1).code(), absl::StatusCode::kInvalidArgument);  // the log-sum-exps too
  ASSERT_OK(attend(15, 1));
}

TEST_F(WorkerServiceTest, ALeasedPrefixStaysResidentUnderPressure) {
  const auto tokens = TestTokens(31, 40);
  ASSERT_OK(client_->Close(OpenWith(tokens, 40)));
  v1::LookupPrefixRequest request;
  request.set_model_digest(model_->digest().ToHex());
  request.mutable_tokens()->Add(tokens.begin(), tokens.end());
  request.mutable_lease()->set_seconds(20);
  TestContext context;
  v1::LookupPrefixResponse response;
  ASSERT_OK(StatusOf(client_->prefixes().LookupPrefix(&context, request, &response)));
  EXPECT_EQ(response.reuse().reused_tokens(), 32);
  EXPECT_FALSE(response.lease_id().empty());
  for (int i = 0; i < 10; ++i) OpenWith(TestTokens(100 + i, 40), 40);  // 30 pages through 16 frames
  request.clear_lease();
  request.set_skip_store(true);
  TestContext again;
  ASSERT_OK(StatusOf(client_->prefixes().LookupPrefix(&again, request, &response)));
  EXPECT_GE(response.reuse().device_tokens(), 32);
}

TEST_F(WorkerServiceTest, APoolSmallerThanOnePageIsRefusedWithTheNumbers) {
  role_.reset();
  StartWorker(100);
  const auto open = client_->Open({1, 2, 3});
  EXPECT_EQ(open.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(GetReason(open.status()), "POOL_TOO_SMALL");
  EXPECT_THAT(std::string(open.status().message()), HasSubstr("100"));
  EXPECT_THAT(std::string(open.status().message()), HasSubstr("4096"));
}

TEST_F(WorkerServiceTest, ASecondModelThatDoesNotFitIsRefusedAndTheFirstServes) {
  const auto second = std::make_shared<const Model>(MakeTestModel({.name = "second"}));
  ASSERT_OK(RegisterTestModel(*second, &store_));
  OpenWith(TestTokens(40, 20), 20);  // the first model takes the whole pool
  WorkerClient other(role_->address(), second);
  EXPECT_EQ(other.Open({1}).status().code(), absl::StatusCode::kResourceExhausted);
  OpenWith(TestTokens(41, 20), 20);
}

TEST_F(WorkerServiceTest, ListGivesEverySequenceOnce) {
  for (int i = 0; i < 5; ++i) OpenWith({}, 0);
  std::vector<std::string> found;
  v1::ListWorkerSequencesRequest request;
  request.set_page_size(2);
  for (int page = 0; page < 3; ++page) {
    TestContext context;
    v1::ListWorkerSequencesResponse response;
    ASSERT_OK(StatusOf(client_->sequences().ListWorkerSequences(&context, request, &response)));
    for (const auto& state : response.sequences()) found.push_back(state.sequence_id());
    request.set_page_token(response.next_page_token());
  }
  EXPECT_EQ(request.page_token(), "");
  EXPECT_EQ(found.size(), 5);
  request.set_page_token("garbage");
  TestContext context;
  v1::ListWorkerSequencesResponse response;
  EXPECT_EQ(StatusOf(client_->sequences().ListWorkerSequences(&context, request, &response)).code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(WorkerServiceTest, AdminTellsFramesAndStats) {
  OpenWith(TestTokens(50, 40), 40);
  TestContext frames_context;
  v1::DumpFramesRequest frames;
  frames.set_model_digest(model_->digest().ToHex());
  v1::DumpFramesResponse dump;
  ASSERT_OK(StatusOf(admin_->DumpFrames(&frames_context, frames, &dump)));
  int held = 0;  // full pages may be on their way to the store
  for (const auto& frame : dump.frames()) {
    held += frame.state() == "resident" || frame.state() == "spilling" ? 1 : 0;
  }
  EXPECT_EQ(held, 3);
  EXPECT_EQ(dump.next_page_token(), "");
  std::vector<uint32_t> numbers;
  frames.set_page_size(6);
  do {
    TestContext context;
    v1::DumpFramesResponse page;
    ASSERT_OK(StatusOf(admin_->DumpFrames(&context, frames, &page)));
    EXPECT_LE(page.frames_size(), 6);
    for (const auto& frame : page.frames()) numbers.push_back(frame.frame());
    frames.set_page_token(page.next_page_token());
  } while (!frames.page_token().empty() && numbers.size() < 2 * kFrames);
  ASSERT_EQ(numbers.size(), kFrames);
  for (uint32_t i = 0; i < kFrames; ++i) EXPECT_EQ(numbers[i], i + 1);
  for (const auto& [size, token] : {std::pair(16385u, ""), std::pair(6u, "garbage")}) {
    frames.set_page_size(size);
    frames.set_page_token(token);
    TestContext context;
    EXPECT_EQ(StatusOf(admin_->DumpFrames(&context, frames, &dump)).code(),
              absl::StatusCode::kInvalidArgument);
  }
  frames.clear_page_size();
  frames.clear_page_token();
  frames.set_group(7);
  TestContext bad_context;
  EXPECT_EQ(StatusOf(admin_->DumpFrames(&bad_context, frames, &dump)).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(Eventually([&] {  // counters follow with the next tick
    TestContext context;
    v1::GetStatsResponse stats;
    return admin_->GetStats(&context, {}, &stats).ok() &&
           stats.values().at("pagetide_worker_tokens_appended_total") == 40;
  })) << "40 appended tokens never reached the metrics";
}

}  // namespace
}  // namespace pagetide
