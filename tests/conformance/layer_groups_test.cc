// FEATURES C through the service: a worker behind gRPC on loopback, models of several layer groups.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
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

using ::pagetide::testing::RegisterTestModel;
using ::pagetide::testing::TestContext;
using ::pagetide::testing::TestRow;
using ::pagetide::testing::TestTokens;
using ::pagetide::testing::WorkerClient;
using WindowType = LayerGroupSpec::WindowType;

LayerGroupSpec FullGroup(uint32_t layer) {
  LayerGroupSpec group;
  group.k_type = group.v_type = DataType::kF32;
  group.kv_heads = 1;
  group.k_dim = group.v_dim = 4;
  group.layers = {layer};
  return group;
}
LayerGroupSpec WindowGroup(uint32_t layer, WindowType type, uint32_t window_tokens) {
  LayerGroupSpec group = FullGroup(layer);
  group.kind = LayerGroupSpec::Kind::kWindow;
  group.window_type = type;
  group.window_tokens = window_tokens;
  return group;
}

class LayerGroupsTest : public ::testing::Test {
 protected:
  void Start(uint32_t page_tokens, uint64_t frames, std::vector<LayerGroupSpec> groups) {
    ModelSpec spec;
    spec.name = "groups";
    spec.weights_digest = Sha256Of(absl::StrCat("weights", page_tokens, groups.size()));
    spec.tokenizer_digest = Sha256Of("tokenizer");
    spec.geometry.page_tokens = page_tokens;
    spec.geometry.groups = std::move(groups);
    auto model = Model::Create(std::move(spec));
    ASSERT_OK(model);
    model_ = std::make_shared<const Model>(*std::move(model));
    ASSERT_OK(RegisterTestModel(*model_, &store_));
    WorkerRole::Options options;
    options.worker.pool_bytes = frames * model_->geometry().bytes_per_page_of_tokens();
    options.worker.deployment_secret = "a secret of tests";
    // What leaves the cache is gone, unless a session holds it.
    options.worker.host.write_through = false;
    options.local_plane.socket_path = dir_ / "worker.sock";
    auto role = WorkerRole::Start(options, &store_, Clock::Real());
    ASSERT_OK(role);
    role_ = *std::move(role);
    client_ = std::make_unique<WorkerClient>(role_->address(), model_);
  }

  absl::StatusOr<v1::SequenceState> OpenAndFill(const std::vector<uint32_t>& tokens) {
    PT_ASSIGN_OR_RETURN(const auto open, client_->Open({}));
    PT_ASSIGN_OR_RETURN(const auto appended, client_->Append(open.state(), tokens, tokens.size()));
    return appended.state();
  }
  std::vector<v1::GetPositionExtentResponse::Group> ExtentsOf(const v1::SequenceState& state) {
    TestContext context;
    v1::GetPositionExtentRequest request;
    request.set_sequence_id(state.sequence_id());
    v1::GetPositionExtentResponse response;
    EXPECT_TRUE(client_->edits().GetPositionExtent(&context, request, &response).ok());
    return {response.groups().begin(), response.groups().end()};
  }
  // Of all that the service shows of a sequence but its rows.
  std::string ShownOf(const v1::SequenceState& state) {
    TestContext context;
    v1::GetBlockTableRequest request;
    request.set_sequence_id(state.sequence_id());
    v1::GetBlockTableResponse table;
    EXPECT_TRUE(client_->sequences().GetBlockTable(&context, request, &table).ok());
    std::string text = client_->Get(state.sequence_id())->ShortDebugString();
    for (auto& extent : *table.mutable_extents()) {
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

  testing::TempDir dir_;
  MemoryPageStore store_;
  std::shared_ptr<const Model> model_;
  std::unique_ptr<WorkerRole> role_;
  std::unique_ptr<WorkerClient> client_;
};

// W = 4, tokens 0 to 9: before 10 comes, standard windows can do without 0–6, chunked and symmetric
// ones without 0–7. With one token a page, that is what goes.
TEST_F(LayerGroupsTest, C2RowsBehindAWindowAreReclaimed) {
  Start(1, 64,
        {FullGroup(0), WindowGroup(1, WindowType::kStandard, 4),
         WindowGroup(2, WindowType::kChunked, 4), WindowGroup(3, WindowType::kSymmetric, 4)});
  const std::vector<uint32_t> tokens = TestTokens(1, 12);
  auto state = OpenAndFill(std::vector<uint32_t>(tokens.begin(), tokens.begin() + 10));
  ASSERT_OK(state);
  auto groups = ExtentsOf(*state);
  ASSERT_EQ(groups.size(), 4u);
  EXPECT_EQ(groups[0].min(), 0);
  EXPECT_EQ(groups[1].min(), 7);
  EXPECT_EQ(groups[2].min(), 8);
  EXPECT_EQ(groups[3].min(), 8);
  for (const auto& group : groups) {
    EXPECT_EQ(group.max(), 9);
    EXPECT_EQ(group.rows(), 10 - group.min());
    EXPECT_TRUE(group.contiguous());
  }
  EXPECT_TRUE(client_->EventuallyStat("pagetide_worker_pages_reclaimed_total", 7 + 8 + 8));
  ASSERT_OK(client_->Append(*state, tokens, 12));
  groups = ExtentsOf(*state);
  EXPECT_EQ(groups[1].min(), 9);
  EXPECT_EQ(groups[2].min(), 11);  // a new chunk begins at 12: the last row stays with its page
  EXPECT_EQ(groups[3].min(), 10);
}

TEST_F(LayerGroupsTest, C2AttentionSeesTheWindow) {
  Start(4, 64,
        {FullGroup(0), WindowGroup(1, WindowType::kStandard, 6),
         WindowGroup(2, WindowType::kChunked, 8), WindowGroup(3, WindowType::kSymmetric, 10)});
  const std::vector<uint32_t> tokens = TestTokens(1, 31);
  auto state = OpenAndFill(tokens);
  ASSERT_OK(state);
  const std::string query = TestRow(model_->geometry().group(0), 5, 5, 0, RowKind::kK);
  float q[4];
  std::memcpy(q, query.data(), sizeof(q));
  const int64_t first_seen[] = {0, 25, 24, 25};  // by the query at 30
  for (uint32_t g = 0; g < 4; ++g) {
    const GroupGeometry& group = model_->geometry().group(g);
    double sum = 0;
    double expected[4] = {};
    for (int64_t at = first_seen[g]; at <= 30; ++at) {
      float k[4], v[4];
      std::memcpy(k, TestRow(group, tokens[at], at, 0, RowKind::kK).data(), sizeof(k));
      std::memcpy(v, TestRow(group, tokens[at], at, 0, RowKind::kV).data(), sizeof(v));
      double score = 0;
      for (int i = 0; i < 4; ++i) score += static_cast<double>(q[i]) * k[i];
      const double weight = std::exp(score / 2);  // 1 / sqrt(4)
      sum += weight;
      for (int i = 0; i < 4; ++i) expected[i] += weight * v[i];
    }
    auto got = Attend(*state, g, 30, query);
    ASSERT_OK(got);
    ASSERT_EQ(got->size(), 4u);
    for (int i = 0; i < 4; ++i) EXPECT_NEAR((*got)[i], expected[i] / sum, 1e-5) << "group " << g;
  }
  // A query whose window was given up has no answer, rather than a wrong one.
  EXPECT_EQ(GetReason(Attend(*state, 1, 12, query).status()), "ROWS_RECLAIMED");
  EXPECT_TRUE(Attend(*state, 0, 12, query).ok());
}

TEST_F(LayerGroupsTest, C2WhatNeedsReclaimedRowsIsRefusedAndChangesNothing) {
  Start(4, 64, {FullGroup(0), WindowGroup(1, WindowType::kStandard, 6)});
  const std::vector<uint32_t> tokens = TestTokens(1, 40);
  auto state = OpenAndFill(tokens);
  ASSERT_OK(state);
  const std::string before = ShownOf(*state);
  // Rows from 32 on are there (the page of 35): the next token sees 35 to 39.
  const auto sessions = v1::SessionService::NewStub(client_->channel());
  v1::SaveSessionRequest save;
  save.mutable_sequence()->set_sequence_id(state->sequence_id());
  save.mutable_sequence()->set_epoch(state->epoch());
  save.set_name("cut");
  save.set_keep_tokens(20);
  v1::SaveSessionResponse saved;
  TestContext save_context;
  for (const absl::Status& status :
       {client_->Rewind(*state, 36).status(), client_->Rewind(*state, 1).status(),
        client_->Fork(*state, 30).status(), ReadK(*state, 1, 0, 40).status(),
        ReadK(*state, 1, 31, 33).status(),
        FromGrpcStatus(sessions->SaveSession(&save_context, save, &saved))}) {
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
    EXPECT_EQ(GetReason(status), "ROWS_RECLAIMED") << status;
  }
  EXPECT_EQ(ShownOf(*state), before);
  EXPECT_TRUE(ReadK(*state, 0, 0, 40).ok());
  EXPECT_TRUE(ReadK(*state, 1, 32, 40).ok());
  ASSERT_OK(client_->Fork(*state, 38));
  auto cut = client_->Rewind(*state, 37);  // sees 32 to 36
  ASSERT_OK(cut);
  ASSERT_OK(client_->Append(cut->state(), tokens, 40));
  ASSERT_OK(client_->Verify(state->sequence_id(), tokens, 32, 40));
  ASSERT_OK(client_->Rewind(*state, 0));  // of nothing, nothing is needed
}

TEST_F(LayerGroupsTest, C2ACheckpointKeepsWhatAWindowWouldGiveUp) {
  Start(4, 64, {FullGroup(0), WindowGroup(1, WindowType::kStandard, 6)});
  const std::vector<uint32_t> tokens = TestTokens(1, 60);
  auto state = OpenAndFill(std::vector<uint32_t>(tokens.begin(), tokens.begin() + 30));
  ASSERT_OK(state);
  const auto sessions = v1::SessionService::NewStub(client_->channel());
  v1::CreateCheckpointRequest create;
  create.mutable_sequence()->set_sequence_id(state->sequence_id());
  create.mutable_sequence()->set_epoch(state->epoch());
  v1::CreateCheckpointResponse created;
  TestContext create_context;
  ASSERT_OK(FromGrpcStatus(sessions->CreateCheckpoint(&create_context, create, &created)));
  ASSERT_OK(client_->Append(*state, tokens, 60));
  EXPECT_EQ(GetReason(client_->Rewind(*state, 30).status()), "ROWS_RECLAIMED");
  v1::RestoreCheckpointRequest restore;
  *restore.mutable_sequence() = create.sequence();
  restore.set_checkpoint_id(created.checkpoint().checkpoint_id());
  v1::RestoreCheckpointResponse restored;
  TestContext restore_context;
  ASSERT_OK(FromGrpcStatus(sessions->RestoreCheckpoint(&restore_context, restore, &restored)));
  EXPECT_EQ(restored.state().length(), 30);
  ASSERT_OK(client_->Verify(state->sequence_id(), tokens, 24, 30));
  ASSERT_OK(client_->Append(restored.state(), tokens, 60));
  ASSERT_OK(client_->Verify(state->sequence_id(), tokens, 52, 60));
}

TEST_F(LayerGroupsTest, C2AnEndlessSequenceStaysInThePool) {
  Start(16, 8,
        {WindowGroup(0, WindowType::kStandard, 40), WindowGroup(1, WindowType::kChunked, 32)});
  const std::vector<uint32_t> tokens = TestTokens(1, 16 * 8 * 10);
  auto open = client_->Open({});
  ASSERT_OK(open);
  v1::SequenceState state = open->state();
  uint64_t most_pages = 0;
  while (state.length() < tokens.size()) {
    auto appended =
        client_->Append(state, tokens, std::min<size_t>(state.length() + 23, tokens.size()));
    ASSERT_OK(appended);
    state = appended->state();
    most_pages = std::max<uint64_t>(most_pages, state.num_pages());
  }
  EXPECT_LE(most_pages, 4u + 3u);  // of both groups; a window of 40 rows lies in 4 pages at most
  ASSERT_OK(client_->Verify(state.sequence_id(), tokens, tokens.size() - 16, tokens.size()));
}

TEST_F(LayerGroupsTest, C2AReusedPrefixIsWhatEveryGroupCanServe) {
  Start(16, 64, {FullGroup(0), WindowGroup(1, WindowType::kStandard, 20)});
  const std::vector<uint32_t> tokens = TestTokens(1, 160);
  auto state = OpenAndFill(tokens);
  ASSERT_OK(state);
  // While the window's pages are in the cache, any prefix will do.
  std::vector<uint32_t> prompt(tokens.begin(), tokens.begin() + 96);
  prompt.push_back(7);
  auto open = client_->Open(prompt);
  ASSERT_OK(open);
  EXPECT_EQ(open->reuse().reused_tokens(), 96);
  ASSERT_OK(client_->Verify(open->state().sequence_id(), tokens, 80, 96));
  EXPECT_EQ(ExtentsOf(open->state())[1].min(), 64);  // the page of 77, the first that 96 sees
  ASSERT_OK(client_->Close(open->state()));
  // Without them the window's group limits it, and the answer says so.
  TestContext context;
  v1::ClearCacheRequest clear;
  v1::ClearCacheResponse cleared;
  ASSERT_OK(FromGrpcStatus(client_->admin().ClearCache(&context, clear, &cleared)));
  EXPECT_GT(cleared.dropped_pages(), 0);
  open = client_->Open(prompt);
  ASSERT_OK(open);
  EXPECT_EQ(open->reuse().reused_tokens(), 0);
  EXPECT_EQ(open->reuse().limit(), v1::REUSE_LIMIT_GROUP);
  EXPECT_EQ(open->reuse().limiting_group(), 1);
  // The whole prompt needs the last pages only, and they are there.
  prompt = tokens;
  prompt.push_back(7);
  open = client_->Open(prompt);
  ASSERT_OK(open);
  EXPECT_EQ(open->reuse().reused_tokens(), 160);
  ASSERT_OK(client_->Verify(open->state().sequence_id(), tokens, 144, 160));
}

TEST_F(LayerGroupsTest, C2ASessionHoldsWhatItsWindowNeeds) {
  Start(16, 64, {FullGroup(0), WindowGroup(1, WindowType::kStandard, 20)});
  const std::vector<uint32_t> tokens = TestTokens(1, 150);
  auto state = OpenAndFill(std::vector<uint32_t>(tokens.begin(), tokens.begin() + 130));
  ASSERT_OK(state);
  const auto sessions = v1::SessionService::NewStub(client_->channel());
  v1::SaveSessionRequest save;
  save.mutable_sequence()->set_sequence_id(state->sequence_id());
  save.mutable_sequence()->set_epoch(state->epoch());
  save.set_name("window");
  v1::SaveSessionResponse saved;
  TestContext save_context;
  ASSERT_OK(FromGrpcStatus(sessions->SaveSession(&save_context, save, &saved)));
  const auto load = [&](std::optional<uint64_t> length) -> absl::StatusOr<v1::LoadSessionResponse> {
    v1::LoadSessionRequest request;
    request.set_name("window");
    if (length) request.set_length(*length);
    v1::LoadSessionResponse response;
    TestContext context;
    PT_RETURN_IF_ERROR(FromGrpcStatus(sessions->LoadSession(&context, request, &response)));
    return response;
  };
  ASSERT_OK(client_->Close(*state));
  TestContext context;
  v1::ClearCacheResponse cleared;
  ASSERT_OK(FromGrpcStatus(client_->admin().ClearCache(&context, {}, &cleared)));
  auto loaded = load(std::nullopt);
  ASSERT_OK(loaded);
  EXPECT_EQ(loaded->state().length(), 130);
  EXPECT_EQ(loaded->state().canonical_length(), 130);
  ASSERT_OK(client_->Verify(loaded->state().sequence_id(), tokens, 112, 130));
  ASSERT_OK(client_->Append(loaded->state(), tokens, 150));
  ASSERT_OK(client_->Verify(loaded->state().sequence_id(), tokens, 131, 150));
  EXPECT_EQ(GetReason(load(100).status()), "ROWS_RECLAIMED");
}

TEST_F(LayerGroupsTest, C1ALatentHasNoV) {
  LayerGroupSpec latent = FullGroup(0);
  latent.v_dim = 0;
  latent.k_dim = 24;
  Start(16, 16, {latent});
  const std::vector<uint32_t> tokens = TestTokens(1, 60);
  auto state = OpenAndFill(tokens);
  ASSERT_OK(state);
  EXPECT_EQ(model_->geometry().bytes_per_page_of_tokens(), 16u * 24 * sizeof(float));
  ASSERT_OK(client_->Verify(state->sequence_id(), tokens, 0, 60));
  auto open = client_->Open(tokens);
  ASSERT_OK(open);
  EXPECT_EQ(open->reuse().reused_tokens(), 59);
}

}  // namespace
}  // namespace pagetide
