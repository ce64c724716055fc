// FEATURES C3 to C5 through a real worker process: rings that keep their first rows, states that
// cannot be cut, pages in the engine's own layout.
#include <gmock/gmock.h>
#include <grpcpp/channel.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/error_info.h"
#include "pagetide/v1/session.grpc.pb.h"
#include "tests/conformance/worker_process.h"

namespace pagetide {
namespace {

using ::pagetide::testing::TestContext;
using ::pagetide::testing::TestPageBytes;
using ::pagetide::testing::TestRow;
using ::pagetide::testing::TestTokens;
using ::testing::HasSubstr;
using EditStub = v1::SequenceEditService::StubInterface;

LayerGroupSpec FullGroup(uint32_t layer) {
  LayerGroupSpec group;
  group.k_type = group.v_type = DataType::kF32;
  group.kv_heads = 1;
  group.k_dim = group.v_dim = 4;
  group.layers = {layer};
  return group;
}
LayerGroupSpec RingGroup(uint32_t layer, uint32_t max, uint32_t keep) {
  LayerGroupSpec group = FullGroup(layer);
  group.kind = LayerGroupSpec::Kind::kWindow;
  group.window_type = LayerGroupSpec::WindowType::kRing;
  group.window_tokens = max;
  group.keep_tokens = keep;
  return group;
}
LayerGroupSpec WholeGroup(LayerGroupSpec::Kind kind, uint32_t layer, uint64_t bytes) {
  LayerGroupSpec group;
  group.kind = kind;
  group.layers = {layer};
  group.opaque_bytes = bytes;
  return group;
}
// Larger than a part of a stream.
constexpr uint64_t kStateBytes = (1 << 20) + 4321;
LayerGroupSpec StateGroup(uint32_t layer) {
  return WholeGroup(LayerGroupSpec::Kind::kRecurrent, layer, kStateBytes);
}
LayerGroupSpec OpaqueGroup(uint32_t layer) {
  return WholeGroup(LayerGroupSpec::Kind::kOpaque, layer, 5000);
}

class LayerKindsTest : public testing::WorkerProcessFixture {
 protected:
  absl::Status StartGroups(uint32_t page_tokens, uint64_t frames,
                           std::vector<LayerGroupSpec> groups) {
    ModelSpec spec;
    spec.name = "kinds";
    spec.weights_digest = Sha256Of("weights");
    spec.tokenizer_digest = Sha256Of("tokenizer");
    spec.geometry.page_tokens = page_tokens;
    spec.geometry.groups = std::move(groups);
    PT_ASSIGN_OR_RETURN(Model model, Model::Create(std::move(spec)));
    frames_ = frames;
    return Start(std::make_shared<const Model>(std::move(model)), frames);
  }
  // kill -9, and another life over the same store.
  absl::Status Restart() {
    client_.reset();
    worker_->Kill();
    return StartWorker(frames_ * model_->geometry().bytes_per_page_of_tokens());
  }
  template <typename Request, typename Response>
  absl::Status Edit(grpc::Status (EditStub::*method)(grpc::ClientContext*, const Request&,
                                                     Response*),
                    const v1::SequenceState& state, const std::function<void(Request&)>& fill) {
    TestContext context;
    Request request;
    Refer(state, request.mutable_sequence());
    fill(request);
    Response response;
    return FromGrpcStatus((client_->edits().*method)(&context, request, &response));
  }
  absl::Status Remove(const v1::SequenceState& state, int64_t p0, int64_t p1) {
    return Edit<v1::RemoveRangeRequest>(&EditStub::RemoveRange, state, [&](auto& request) {
      request.set_p0(p0);
      request.set_p1(p1);
    });
  }
  absl::Status Shift(const v1::SequenceState& state, int64_t delta) {
    return Edit<v1::ShiftPositionsRequest>(&EditStub::ShiftPositions, state, [&](auto& request) {
      request.set_p1(-1);
      request.set_delta(delta);
    });
  }
  absl::Status Divide(const v1::SequenceState& state) {
    return Edit<v1::DividePositionsRequest>(&EditStub::DividePositions, state, [](auto& request) {
      request.set_p1(-1);
      request.set_divisor(2);
    });
  }
  absl::Status Window(const v1::SequenceState& state) {
    return Edit<v1::ShiftWindowRequest>(&EditStub::ShiftWindow, state, [](auto& request) {
      request.set_keep(2);
      request.set_discard(2);
    });
  }
  std::vector<v1::GetPositionExtentResponse::Group> ExtentsOf(const v1::SequenceState& state) {
    TestContext context;
    v1::GetPositionExtentRequest request;
    request.set_sequence_id(state.sequence_id());
    v1::GetPositionExtentResponse response;
    EXPECT_TRUE(client_->edits().GetPositionExtent(&context, request, &response).ok());
    return {response.groups().begin(), response.groups().end()};
  }
  std::string ShownOf(const v1::SequenceState& state) {
    std::string text = client_->Get(state.sequence_id())->ShortDebugString();
    auto table = BlockTable(state);
    EXPECT_TRUE(table.ok()) << table.status();
    for (auto& extent : *table->mutable_extents()) {
      extent.clear_pins();
      absl::StrAppend(&text, extent.ShortDebugString());
    }
    return text;
  }
  absl::StatusOr<std::string> ReadK(const v1::SequenceState& state, uint32_t group, uint64_t begin,
                                    uint64_t end) {
    TestContext context;
    v1::ReadRowsRequest request;
    request.set_sequence_id(state.sequence_id());
    request.set_group(group);
    request.set_begin(begin);
    request.set_end(end);
    auto reader = client_->sequences().ReadRows(&context, request);
    std::string rows;
    v1::ReadRowsResponse part;
    while (reader->Read(&part)) {
      if (part.kind() == v1::ROW_KIND_K) rows += part.data();
    }
    PT_RETURN_IF_ERROR(FromGrpcStatus(reader->Finish()));
    return rows;
  }
  absl::StatusOr<std::vector<float>> Attend(const v1::SequenceState& state, uint32_t group,
                                            uint64_t position, const std::string& query) {
    TestContext context;
    v1::AttendRequest request;
    request.set_sequence_id(state.sequence_id());
    request.set_epoch(state.epoch());
    request.set_group(group);
    request.set_num_queries(1);
    request.set_query_heads(1);
    request.set_first_position(position);
    request.set_queries(query);
    v1::AttendResponse response;
    PT_RETURN_IF_ERROR(FromGrpcStatus(client_->sequences().Attend(&context, request, &response)));
    std::vector<float> out(response.outputs().size() / sizeof(float));
    std::memcpy(out.data(), response.outputs().data(), response.outputs().size());
    return out;
  }
  absl::StatusOr<uint64_t> CreateCheckpoint(const v1::SequenceState& state) {
    TestContext context;
    v1::CreateCheckpointRequest request;
    Refer(state, request.mutable_sequence());
    v1::CreateCheckpointResponse response;
    PT_RETURN_IF_ERROR(FromGrpcStatus(Sessions()->CreateCheckpoint(&context, request, &response)));
    return response.checkpoint().checkpoint_id();
  }
  absl::StatusOr<v1::SequenceState> RestoreCheckpoint(const v1::SequenceState& state, uint64_t id) {
    TestContext context;
    v1::RestoreCheckpointRequest request;
    Refer(state, request.mutable_sequence());
    request.set_checkpoint_id(id);
    v1::RestoreCheckpointResponse response;
    PT_RETURN_IF_ERROR(FromGrpcStatus(Sessions()->RestoreCheckpoint(&context, request, &response)));
    return response.state();
  }
  absl::Status Save(const v1::SequenceState& state, const std::string& name) {
    TestContext context;
    v1::SaveSessionRequest request;
    Refer(state, request.mutable_sequence());
    request.set_name(name);
    v1::SaveSessionResponse response;
    return FromGrpcStatus(Sessions()->SaveSession(&context, request, &response));
  }
  absl::StatusOr<v1::SequenceState> Load(const std::string& name,
                                         std::optional<uint64_t> length = std::nullopt) {
    TestContext context;
    v1::LoadSessionRequest request;
    request.set_name(name);
    if (length) request.set_length(*length);
    v1::LoadSessionResponse response;
    PT_RETURN_IF_ERROR(FromGrpcStatus(Sessions()->LoadSession(&context, request, &response)));
    return response.state();
  }
  std::unique_ptr<v1::SessionService::Stub> Sessions() {
    return v1::SessionService::NewStub(client_->channel());
  }

  uint64_t frames_ = 0;
};

void ExpectRefused(const absl::Status& status, const char* reason, const char* group) {
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_EQ(GetReason(status), reason) << status;
  EXPECT_EQ(GetReasonMetadata(status, "group"), group) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(absl::StrCat("layer group ", group)));
}

TEST_F(LayerKindsTest, C3ARingKeepsItsFirstRowsAndTheNewest) {
  // {max 8, keep 2}: with the row of position 20, 8 rows are there.
  ASSERT_OK(StartGroups(1, 64, {FullGroup(0), RingGroup(1, 8, 2)}));
  const std::vector<uint32_t> tokens = TestTokens(1, 40);
  auto state = OpenAndFill({tokens.begin(), tokens.begin() + 20});
  ASSERT_OK(state);
  auto groups = ExtentsOf(*state);
  EXPECT_EQ(groups[0].rows(), 20);
  EXPECT_EQ(groups[1].min(), 0);
  EXPECT_EQ(groups[1].max(), 19);
  EXPECT_EQ(groups[1].rows(), 2 + 5);
  EXPECT_FALSE(groups[1].contiguous());
  EXPECT_TRUE(client_->EventuallyStat("pagetide_worker_pages_reclaimed_total", 13));
  // Rows go by absolute position.
  const GroupGeometry& ring = model_->geometry().group(1);
  EXPECT_EQ(ReadK(*state, 1, 0, 2).value_or(""),
            testing::TestRows(ring, tokens, 0, 2, 0, RowKind::kK));
  EXPECT_EQ(ReadK(*state, 1, 15, 20).value_or(""),
            testing::TestRows(ring, tokens, 15, 20, 0, RowKind::kK));
  EXPECT_EQ(GetReason(ReadK(*state, 1, 1, 16).status()), "ROWS_RECLAIMED");
  const std::string before = ShownOf(*state);
  for (const absl::Status& status :
       {client_->Rewind(*state, 19).status(), client_->Fork(*state, 12).status()}) {
    EXPECT_EQ(GetReason(status), "ROWS_RECLAIMED") << status;
  }
  EXPECT_EQ(ShownOf(*state), before);
  ASSERT_OK(client_->Rewind(*state, 0));
}

TEST_F(LayerKindsTest, C3AttentionSeesWhatIsKeptAndTheRing) {
  ASSERT_OK(StartGroups(4, 64, {FullGroup(0), RingGroup(1, 10, 3)}));
  const std::vector<uint32_t> tokens = TestTokens(1, 31);
  auto state = OpenAndFill(tokens);
  ASSERT_OK(state);
  const GroupGeometry& ring = model_->geometry().group(1);
  const std::string query = TestRow(ring, 5, 5, 0, RowKind::kK);
  float q[4];
  std::memcpy(q, query.data(), sizeof(q));
  double sum = 0;
  double expected[4] = {};
  for (const int64_t at : {0, 1, 2, 24, 25, 26, 27, 28, 29, 30}) {
    float k[4], v[4];
    std::memcpy(k, TestRow(ring, tokens[at], at, 0, RowKind::kK).data(), sizeof(k));
    std::memcpy(v, TestRow(ring, tokens[at], at, 0, RowKind::kV).data(), sizeof(v));
    double score = 0;
    for (int i = 0; i < 4; ++i) score += static_cast<double>(q[i]) * k[i];
    const double weight = std::exp(score / 2);  // 1 / sqrt(4)
    sum += weight;
    for (int i = 0; i < 4; ++i) expected[i] += weight * v[i];
  }
  auto got = Attend(*state, 1, 30, query);
  ASSERT_OK(got);
  ASSERT_EQ(got->size(), 4u);
  for (int i = 0; i < 4; ++i) EXPECT_NEAR((*got)[i], expected[i] / sum, 1e-5);
  EXPECT_EQ(GetReason(Attend(*state, 1, 20, query).status()), "ROWS_RECLAIMED");
}

TEST_F(LayerKindsTest, C3AnEndlessRingStaysInThePoolAndIsReused) {
  ASSERT_OK(StartGroups(16, 12, {RingGroup(0, 64, 20)}));
  const std::vector<uint32_t> tokens = TestTokens(1, 16 * 12 * 10);
  auto state = OpenAlone();
  ASSERT_OK(state);
  uint64_t most_pages = 0;
  while (state->length() < tokens.size()) {
    auto appended =
        client_->Append(*state, tokens, std::min<size_t>(state->length() + 23, tokens.size()));
    ASSERT_OK(appended);
    *state = appended->state();
    most_pages = std::max<uint64_t>(most_pages, state->num_pages());
  }
  EXPECT_LE(most_pages, 2u + 4u);  // what is kept; 44 rows of the ring lie in 4 pages at most
  ASSERT_OK(client_->Verify(state->sequence_id(), tokens, 0, 20));
  ASSERT_OK(client_->Verify(state->sequence_id(), tokens, tokens.size() - 43, tokens.size()));
  // The pages that the ring holds are all that a prompt needs.
  std::vector<uint32_t> prompt = tokens;
  prompt.push_back(1);
  EXPECT_EQ(ReusedTokens(prompt).value_or(0), tokens.size());
}

TEST_F(LayerKindsTest, C4WhatWouldCutAStateIsRefusedBeforeAnyGroupChanges) {
  ASSERT_OK(StartGroups(16, 16, {FullGroup(0), StateGroup(1)}));
  const std::vector<uint32_t> tokens = TestTokens(1, 64);
  auto state = OpenAndFill({tokens.begin(), tokens.begin() + 40});
  ASSERT_OK(state);
  ASSERT_OK(client_->Verify(state->sequence_id(), tokens, 0, 40));
  const std::string before = ShownOf(*state);
  ExpectRefused(Remove(*state, 3, 9), "CANNOT_CUT", "1");
  ExpectRefused(client_->Rewind(*state, 32).status(), "CANNOT_CUT", "1");
  ExpectRefused(client_->Fork(*state, 39).status(), "CANNOT_CUT", "1");
  ExpectRefused(Window(*state), "CANNOT_CUT", "1");
  ExpectRefused(Shift(*state, 3), "CANNOT_SHIFT", "1");
  ExpectRefused(Divide(*state), "CANNOT_SHIFT", "1");
  EXPECT_EQ(GetReason(Attend(*state, 1, 39, std::string(16, '\0')).status()), "CANNOT_ATTEND");
  EXPECT_EQ(ShownOf(*state), before);
  ASSERT_OK(client_->Verify(state->sequence_id(), tokens, 0, 40));
  ASSERT_OK(Remove(*state, 0, -1));  // of nothing there is no state
  auto again = client_->Append(*client_->Get(state->sequence_id()), tokens, 64);
  ASSERT_OK(again);
  ASSERT_OK(client_->Verify(state->sequence_id(), tokens, 0, 64));
}

TEST_F(LayerKindsTest, C4AForkHasAStateOfItsOwn) {
  ASSERT_OK(StartGroups(16, 16, {FullGroup(0), StateGroup(1)}));
  const std::vector<uint32_t> tokens = TestTokens(1, 64);
  auto state = OpenAndFill({tokens.begin(), tokens.begin() + 40});
  ASSERT_OK(state);
  auto fork = client_->Fork(*state, 40);
  ASSERT_OK(fork);
  std::vector<uint32_t> other(tokens.begin(), tokens.begin() + 40);
  other.insert(other.end(), {1, 2, 3});
  ASSERT_OK(client_->Append(fork->state(), other, 43));
  ASSERT_OK(client_->Append(*state, tokens, 64));
  ASSERT_OK(client_->Verify(fork->state().sequence_id(), other, 0, 43));
  ASSERT_OK(client_->Verify(state->sequence_id(), tokens, 0, 64));
}

TEST_F(LayerKindsTest, C4CheckpointsAreTheRewindPoints) {
  ASSERT_OK(StartGroups(16, 16, {FullGroup(0), StateGroup(1)}));
  const std::vector<uint32_t> tokens = TestTokens(1, 64);
  auto state = OpenAndFill({tokens.begin(), tokens.begin() + 21});
  ASSERT_OK(state);
  auto checkpoint = CreateCheckpoint(*state);
  ASSERT_OK(checkpoint);
  ASSERT_OK(client_->Append(*state, tokens, 64));
  ExpectRefused(client_->Rewind(*state, 21).status(), "CANNOT_CUT", "1");
  auto back = RestoreCheckpoint(*state, *checkpoint);
  ASSERT_OK(back);
  EXPECT_EQ(back->length(), 21);
  ASSERT_OK(client_->Verify(state->sequence_id(), tokens, 0, 21));
  ASSERT_OK(client_->Append(*back, tokens, 50));
  ASSERT_OK(client_->Verify(state->sequence_id(), tokens, 0, 50));
}

TEST_F(LayerKindsTest, E3AutomaticCheckpointsAreRewindPointsOfAState) {
  more_flags_ = {"--checkpoint-every-pages=1"};
  ASSERT_OK(StartGroups(16, 32, {FullGroup(0), StateGroup(1)}));
  const std::vector<uint32_t> tokens = TestTokens(1, 80);
  auto state = OpenAlone();
  ASSERT_OK(state);
  for (size_t end = 16; end <= tokens.size(); end += 16) {
    auto appended = client_->Append(*state, tokens, end);
    ASSERT_OK(appended);
    state = appended->state();
  }
  const auto list = [&] {
    TestContext context;
    v1::ListCheckpointsRequest request;
    request.set_sequence_id(state->sequence_id());
    v1::ListCheckpointsResponse response;
    EXPECT_TRUE(Sessions()->ListCheckpoints(&context, request, &response).ok());
    return response;
  };
  const v1::ListCheckpointsResponse made = list();
  ASSERT_EQ(made.checkpoints_size(), 5);
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(made.checkpoints(i).length(), 16u * (i + 1));
    EXPECT_TRUE(made.checkpoints(i).automatic());
    EXPECT_EQ(made.checkpoints(i).scope(), v1::CHECKPOINT_SCOPE_NON_REWINDABLE);
    EXPECT_EQ(made.checkpoints(i).pages(), 1u);  // the state
  }
  EXPECT_TRUE(client_->EventuallyStat("pagetide_worker_checkpoints_created_total", 5));
  ExpectRefused(client_->Rewind(*state, 48).status(), "CANNOT_CUT", "1");
  auto back = RestoreCheckpoint(*state, made.checkpoints(2).checkpoint_id());
  ASSERT_OK(back);
  EXPECT_EQ(back->length(), 48);
  ASSERT_OK(client_->Verify(state->sequence_id(), tokens, 0, 48));
  std::vector<uint32_t> other(tokens.begin(), tokens.begin() + 48);
  other.insert(other.end(), {5, 6, 7});
  auto appended = client_->Append(*back, other, 51);
  ASSERT_OK(appended);
  ASSERT_OK(client_->Verify(state->sequence_id(), other, 0, 51));
  // Behind the tokens that are others now there is nothing to go back to.
  const v1::ListCheckpointsResponse left = list();
  ASSERT_EQ(left.checkpoints_size(), 5);
  for (int i = 0; i < 5; ++i) EXPECT_EQ(left.checkpoints(i).is_void(), i > 2) << i;
  EXPECT_EQ(
      GetReason(RestoreCheckpoint(appended->state(), left.checkpoints(3).checkpoint_id()).status()),
      "CHECKPOINT_VOID");
  ASSERT_OK(client_->Verify(state->sequence_id(), other, 0, 51));
}

TEST_F(LayerKindsTest, C4ThePrefixEndsWhereThereIsAStateAndTheAnswerNamesTheGroup) {
  ASSERT_OK(StartGroups(16, 32, {FullGroup(0), StateGroup(1)}));
  const std::vector<uint32_t> tokens = TestTokens(1, 100);
  // States behind tokens 32 and 90.
  auto state = OpenAndFill({tokens.begin(), tokens.begin() + 32});
  ASSERT_OK(state);
  ASSERT_OK(client_->Append(*state, tokens, 90));
  auto open = client_->Open(tokens);
  ASSERT_OK(open);
  EXPECT_EQ(open->reuse().reused_tokens(), 32);
  EXPECT_EQ(open->reuse().limit(), v1::REUSE_LIMIT_GROUP);
  EXPECT_EQ(open->reuse().limiting_group(), 1);
  ASSERT_OK(client_->Verify(open->state().sequence_id(), tokens, 0, 32));
  ASSERT_OK(client_->Append(open->state(), tokens, 100));
  ASSERT_OK(client_->Verify(open->state().sequence_id(), tokens, 0, 100));
}

TEST_F(LayerKindsTest, C4ASessionHoldsTheState) {
  ASSERT_OK(StartGroups(16, 16, {FullGroup(0), StateGroup(1), OpaqueGroup(2)}));
  const std::vector<uint32_t> tokens = TestTokens(1, 70);
  auto state = OpenAndFill({tokens.begin(), tokens.begin() + 50});
  ASSERT_OK(state);
  ASSERT_OK(Save(*state, "whole"));
  ASSERT_OK(Restart());
  ExpectRefused(Load("whole", 32).status(), "CANNOT_CUT", "1");
  auto loaded = Load("whole");
  ASSERT_OK(loaded);
  EXPECT_EQ(loaded->length(), 50);
  ASSERT_OK(client_->Verify(loaded->sequence_id(), tokens, 0, 50));
  ASSERT_OK(client_->Append(*loaded, tokens, 70));
  ASSERT_OK(client_->Verify(loaded->sequence_id(), tokens, 0, 70));
}

TEST_F(LayerKindsTest, C5AlgebraThatNeedsALayoutIsRefusedByName) {
  ASSERT_OK(StartGroups(16, 32, {FullGroup(0), OpaqueGroup(1)}));
  const std::vector<uint32_t> tokens = TestTokens(1, 60);
  auto state = OpenAndFill({tokens.begin(), tokens.begin() + 40});
  ASSERT_OK(state);
  ASSERT_OK(client_->Verify(state->sequence_id(), tokens, 0, 40));
  const std::string before = ShownOf(*state);
  ExpectRefused(Remove(*state, 3, 9), "CANNOT_CUT", "1");
  ExpectRefused(Window(*state), "CANNOT_CUT", "1");
  ExpectRefused(client_->Rewind(*state, 39).status(), "CANNOT_CUT", "1");
  ExpectRefused(client_->Fork(*state, 33).status(), "CANNOT_CUT", "1");
  ExpectRefused(Shift(*state, 3), "CANNOT_SHIFT", "1");
  ExpectRefused(Divide(*state), "CANNOT_SHIFT", "1");
  EXPECT_EQ(GetReason(Attend(*state, 1, 39, std::string(16, '\0')).status()), "CANNOT_ATTEND");
  EXPECT_EQ(ShownOf(*state), before);
  // What needs none goes: whole pages, forks and cuts between them.
  ASSERT_OK(client_->Fork(*state, 32));
  auto cut = client_->Rewind(*state, 16);
  ASSERT_OK(cut);
  ASSERT_OK(client_->Append(cut->state(), tokens, 60));
  ASSERT_OK(client_->Verify(state->sequence_id(), tokens, 0, 60));
  // Two pages and half of the third are known: two are reused.
  std::vector<uint32_t> prompt(tokens.begin(), tokens.begin() + 40);
  prompt.push_back(7);
  auto open = client_->Open(prompt);
  ASSERT_OK(open);
  EXPECT_EQ(open->reuse().reused_tokens(), 32);
  EXPECT_EQ(open->reuse().limit(), v1::REUSE_LIMIT_GROUP);
  EXPECT_EQ(open->reuse().limiting_group(), 1);
}

TEST_F(LayerKindsTest, C5PagesComeBackFromTheStore) {
  ASSERT_OK(StartGroups(16, 8, {FullGroup(0), OpaqueGroup(1), StateGroup(2)}));
  std::vector<std::pair<v1::SequenceState, std::vector<uint32_t>>> open;
  for (int i = 0; i < 6; ++i) {
    const std::vector<uint32_t> tokens = TestTokens(100 + i, 50);
    auto state = OpenAndFill(tokens);
    ASSERT_OK(state);
    open.emplace_back(*state, tokens);
  }
  for (const auto& [state, tokens] : open) {
    ASSERT_OK(client_->Verify(state.sequence_id(), tokens, 0, 50));
  }
  EXPECT_TRUE(client_->EventuallyStat("pagetide_worker_pages_restored_total", 8));
}

TEST_F(LayerKindsTest, BytesThatDoNotFitAreRefusedAndChangeNothing) {
  ASSERT_OK(StartGroups(16, 16, {FullGroup(0), OpaqueGroup(1)}));
  const std::vector<uint32_t> tokens = TestTokens(1, 20);
  auto state = OpenAndFill({tokens.begin(), tokens.begin() + 10});
  ASSERT_OK(state);
  const std::string before = ShownOf(*state);
  const auto append = [&](const std::vector<v1::RowPart>& parts) {
    TestContext context;
    v1::AppendTokensResponse response;
    auto writer = client_->sequences().AppendTokens(&context, &response);
    v1::AppendTokensRequest message;
    Refer(*state, message.mutable_header()->mutable_sequence());
    message.mutable_header()->set_append_id("bad");
    message.mutable_header()->set_expected_length(10);
    message.mutable_header()->mutable_tokens()->Add(tokens.begin() + 10, tokens.end());
    writer->Write(message);
    for (const v1::RowPart& part : parts) {
      *message.mutable_rows() = part;
      if (!writer->Write(message)) break;
    }
    writer->WritesDone();
    return FromGrpcStatus(writer->Finish());
  };
  const auto page = [](uint32_t number, uint32_t offset, size_t bytes) {
    v1::RowPart part;
    part.set_group(1);
    part.set_kind(v1::ROW_KIND_PAGE);
    part.set_page(number);
    part.set_page_offset(offset);
    part.set_data(std::string(bytes, 'x'));
    return part;
  };
  v1::RowPart row = page(0, 0, 16);
  row.set_kind(v1::ROW_KIND_K);
  row.set_num_tokens(1);
  v1::RowPart other = page(0, 0, 16);
  other.set_group(0);
  for (const auto& [parts, text] : std::vector<std::pair<std::vector<v1::RowPart>, std::string>>{
           {{page(2, 0, 5000)}, "page 2 of group 1 is not among the 2"},
           {{page(0, 0, 5001)}, "0 of 5000 have arrived"},
           {{page(0, 0, 100), page(0, 101, 100)}, "100 of 5000 have arrived"},
           {{page(0, 0, 0)}, "0 of 5000 have arrived"},
           {{row}, "ROW_KIND_PAGE"},
           {{other}, "which has rows of K and V"}}) {
    const absl::Status status = append(parts);
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(text));
  }
  EXPECT_EQ(GetReason(append({page(0, 0, 5000), page(1, 0, 4999)})), "ROWS_MISSING");
  EXPECT_EQ(ShownOf(*state), before);
  ASSERT_OK(client_->Verify(state->sequence_id(), tokens, 0, 10));
  ASSERT_OK(client_->Append(*state, tokens, 20));
  ASSERT_OK(client_->Verify(state->sequence_id(), tokens, 0, 20));
}

}  // namespace
}  // namespace pagetide
