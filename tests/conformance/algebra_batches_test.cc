// FEATURES B9 to B12 through the service: K turned, transactions, beams, draft trees.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "tests/conformance/sequence_algebra.h"

namespace pagetide {
namespace {

using ::pagetide::testing::RegisterTestModel;
using ::pagetide::testing::Row;
using ::pagetide::testing::SequenceAlgebraTest;
using ::pagetide::testing::TestContext;
using ::pagetide::testing::TestRow;
using ::pagetide::testing::TestTokens;
using ::pagetide::testing::WorkerClient;
using ::testing::HasSubstr;

TEST_F(SequenceAlgebraTest, B9ARowWrittenAtSevenStandsAtFour) {
  // K [1, 2, 3, 4] turned to position 7, shifted by -3, is [1, 2, 3, 4] turned to position 4.
  const auto direct = [](int64_t at) {
    const double k[4] = {1, 2, 3, 4};
    std::vector<float> out(4);
    for (int i = 0; i < 2; ++i) {
      const double angle = static_cast<double>(at) * std::pow(10000.0, -2.0 * i / 4);
      out[2 * i] = static_cast<float>(k[2 * i] * std::cos(angle) - k[2 * i + 1] * std::sin(angle));
      out[2 * i + 1] =
          static_cast<float>(k[2 * i] * std::sin(angle) + k[2 * i + 1] * std::cos(angle));
    }
    return out;
  };
  ModelSpec spec;
  spec.name = "four-wide";
  spec.geometry.page_tokens = 16;
  LayerGroupSpec group;
  group.k_type = group.v_type = DataType::kF32;
  group.kv_heads = 1;
  group.k_dim = group.v_dim = 4;
  group.layers = {0};
  group.rope.style = RopeSpec::Style::kNorm;
  group.rope.n_rot = 4;
  spec.geometry.groups.push_back(group);
  role_.reset();
  model_ = std::make_shared<const Model>(Model::Create(std::move(spec)).value());
  ASSERT_OK(RegisterTestModel(*model_, &store_));
  WorkerRole::Options options;
  options.worker.pool_bytes = 4 * model_->geometry().bytes_per_page_of_tokens();
  options.worker.deployment_secret = "a secret of tests";
  auto role = WorkerRole::Start(options, &store_, Clock::Real());
  ASSERT_OK(role);
  role_ = *std::move(role);
  client_ = std::make_unique<WorkerClient>(role_->address(), model_);
  auto open = client_->Open({});
  ASSERT_OK(open);
  TestContext context;
  v1::AppendTokensResponse response;
  auto writer = client_->sequences().AppendTokens(&context, &response);
  v1::AppendTokensRequest message;
  *message.mutable_header()->mutable_sequence() = Ref(open->state());
  message.mutable_header()->set_append_id("a");
  for (uint32_t i = 0; i < 8; ++i) message.mutable_header()->add_tokens(i);
  writer->Write(message);
  for (v1::RowKind kind : {v1::ROW_KIND_K, v1::ROW_KIND_V}) {
    message.mutable_rows()->set_kind(kind);
    message.mutable_rows()->set_num_tokens(8);
    message.mutable_rows()->clear_data();
    for (int64_t at = 0; at < 8; ++at) {
      const std::vector<float> k = direct(at);
      message.mutable_rows()->mutable_data()->append(reinterpret_cast<const char*>(k.data()), 16);
    }
    writer->Write(message);
  }
  writer->WritesDone();
  ASSERT_TRUE(writer->Finish().ok());
  ASSERT_OK(Remove(open->state(), 4, 7));
  ASSERT_OK(Shift(open->state(), 7, 8, -3));
  auto all = Read(open->state());
  ASSERT_OK(all);
  const std::string& k = (*all)[{0, 0, v1::ROW_KIND_K}];
  ASSERT_EQ(k.size(), 5 * 16u);
  std::vector<float> got(4);
  std::memcpy(got.data(), k.data() + 4 * 16, 16);
  for (int i = 0; i < 4; ++i) EXPECT_NEAR(got[i], direct(4)[i], 1e-5);
}

TEST_F(SequenceAlgebraTest, B10ATransactionIsWholeOrNothing) {
  std::vector<Row> rows;
  const auto s = Open(16, &rows);
  std::vector<v1::SequenceEdit> edits(2);
  edits[0].mutable_remove_range()->set_p0(3);
  edits[0].mutable_remove_range()->set_p1(8);
  edits[1].mutable_shift_positions()->set_p0(8);
  edits[1].mutable_shift_positions()->set_p1(-1);
  edits[1].mutable_shift_positions()->set_delta(-5);
  const std::string before = DigestOf(s);
  edits.emplace_back().mutable_rewind()->set_length(12);
  auto refused = Edit(s, edits);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("edits[2]"));
  EXPECT_EQ(DigestOf(s), before);
  edits.pop_back();
  auto edited = Edit(s, edits);
  ASSERT_OK(edited);
  EXPECT_EQ(edited->removed_rows(), 5);
  EXPECT_EQ(edited->moved_rows(), 8);
  EXPECT_EQ(edited->state().revision(), s.revision() + 1);
  rows.erase(rows.begin() + 3, rows.begin() + 8);
  for (size_t i = 3; i < rows.size(); ++i) rows[i].position -= 5;
  ExpectRows(s, rows);
  EXPECT_EQ(Edit(s, {}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Edit(s, {v1::SequenceEdit()}).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(SequenceAlgebraTest, B11BeamsChangePlacesAndParents) {
  std::vector<Row> a, b, c;
  const auto s = Open(20, &a, 1);
  const auto t = Open(30, &b, 2);
  const auto u = Open(5, &c, 3);
  ASSERT_OK(Reorder({s, t, u}, {2, 0, 1}, false));
  ExpectRows(s, c);
  ExpectRows(t, a);
  ExpectRows(u, b);
  const std::string before = DigestOf(s) + DigestOf(t) + DigestOf(u);
  for (const std::vector<uint32_t>& bad : {std::vector<uint32_t>{0, 1}, {0, 1, 3}, {0, 0, 1}, {}}) {
    EXPECT_EQ(Reorder({s, t, u}, bad, false).status().code(), absl::StatusCode::kInvalidArgument);
  }
  EXPECT_EQ(Reorder({s, s}, {0, 1}, true).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(DigestOf(s) + DigestOf(t) + DigestOf(u), before);
  // Two beams of one parent go different ways.
  ASSERT_OK(Reorder({s, t, u}, {1, 1, 1}, true));
  std::vector<Row> left = a, right = a;
  ASSERT_OK(Append(s, {100}, &left));
  ASSERT_OK(Append(t, {200}, &right));
  ExpectRows(s, left);
  ExpectRows(t, right);
  ExpectRows(u, a);
}

TEST_F(SequenceAlgebraTest, B12APathOfADraftTreeIsAccepted) {
  std::vector<Row> rows;
  const auto s = Open(20, &rows);
  // 0 follows the last token; 1 and 2 follow 0; 3 follows 1; 4 and 5 follow 2.
  const std::vector<int32_t> parents = {-1, 0, 0, 1, 2, 2};
  const std::vector<int64_t> depth = {0, 1, 1, 2, 2, 2};
  const std::vector<uint32_t> draft = {700, 701, 702, 703, 704, 705};
  auto slot = Reserve(s, 6, parents);
  ASSERT_OK(slot);
  EXPECT_EQ(slot->first_position(), 20);
  v1::CommitStepRequest::Item item;
  *item.mutable_sequence() = Ref(s);
  item.set_reservation_id(slot->reservation_id());
  for (uint32_t g = 0; g < model_->geometry().num_groups(); ++g) {
    const GroupGeometry& group = model_->geometry().group(g);
    for (uint32_t layer = 0; layer < group.num_layers(); ++layer) {
      for (RowKind kind : {RowKind::kK, RowKind::kV}) {
        v1::RowPart* part = item.add_rows();
        part->set_group(g);
        part->set_layer(layer);
        part->set_kind(kind == RowKind::kK ? v1::ROW_KIND_K : v1::ROW_KIND_V);
        part->set_num_tokens(6);
        for (size_t i = 0; i < draft.size(); ++i) {
          *part->mutable_data() += TestRow(group, draft[i], 20 + depth[i], layer, kind);
        }
      }
    }
  }
  // Each draft token sees the committed rows, its ancestors and itself: what a sequence that goes
  // straight to it sees.
  const std::string queries = TestRow(model_->geometry().group(0), 1, 1, 0, RowKind::kK);
  const auto attend = [&](const v1::SequenceState& state, uint64_t reservation, uint64_t first,
                          uint32_t count) {
    TestContext context;
    v1::AttendRequest request;
    request.set_sequence_id(state.sequence_id());
    request.set_epoch(state.epoch());
    request.set_reservation_id(reservation);
    request.set_num_queries(count);
    request.set_query_heads(2);
    request.set_first_position(first);
    for (uint32_t i = 0; i < count; ++i) *request.mutable_queries() += queries;
    if (reservation != 0) {
      request.set_k_rows(item.rows(0).data());
      request.set_v_rows(item.rows(1).data());
    }
    v1::AttendResponse response;
    const grpc::Status status = client_->sequences().Attend(&context, request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response.outputs();
  };
  const std::string outputs = attend(s, slot->reservation_id(), 20, 6);
  ASSERT_EQ(outputs.size(), 6 * 64u);
  for (int32_t leaf = 0; leaf < 6; ++leaf) {
    std::vector<uint32_t> path;
    for (int32_t at = leaf; at >= 0; at = parents[at]) path.insert(path.begin(), draft[at]);
    const auto straight = Open();
    ASSERT_OK(Copy(s, straight, 0, -1));
    ASSERT_OK(Append(straight, path));
    EXPECT_EQ(outputs.substr(leaf * 64, 64), attend(straight, 0, 20 + depth[leaf], 1)) << leaf;
  }
  for (const std::vector<uint32_t>& bad :
       {std::vector<uint32_t>{1}, {0, 3}, {0, 2, 3}, {0, 0}, {2, 0}, {0, 6}, {}}) {
    v1::CommitStepRequest::Item wrong = item;
    wrong.mutable_indices()->Add(bad.begin(), bad.end());
    for (size_t i = 0; i < bad.size(); ++i) wrong.add_tokens(1);
    EXPECT_EQ(Accept(wrong).status().code(), absl::StatusCode::kInvalidArgument);
  }
  for (uint32_t index : {0, 2, 5}) {
    item.add_indices(index);
    item.add_tokens(draft[index]);
    rows.push_back({draft[index], 20 + depth[index], 20 + depth[index]});
  }
  auto accepted = Accept(item);
  ASSERT_OK(accepted);
  EXPECT_EQ(accepted->state().length(), 23);
  EXPECT_EQ(accepted->state().canonical_length(), 23);
  EXPECT_EQ(accepted->state().pending_tokens(), 0);
  ExpectRows(s, rows);
}

TEST_F(SequenceAlgebraTest, B12IndicesNeedNotBeAPrefix) {
  Start(16, 24);
  std::vector<Row> rows;
  const auto s = Open(14, &rows);
  auto slot = Reserve(s, 20, {});
  ASSERT_OK(slot);
  v1::CommitStepRequest::Item item;
  *item.mutable_sequence() = Ref(s);
  item.set_reservation_id(slot->reservation_id());
  for (uint32_t g = 0; g < model_->geometry().num_groups(); ++g) {
    const GroupGeometry& group = model_->geometry().group(g);
    for (uint32_t layer = 0; layer < group.num_layers(); ++layer) {
      for (RowKind kind : {RowKind::kK, RowKind::kV}) {
        v1::RowPart* part = item.add_rows();
        part->set_group(g);
        part->set_layer(layer);
        part->set_kind(kind == RowKind::kK ? v1::ROW_KIND_K : v1::ROW_KIND_V);
        part->set_num_tokens(20);
        for (uint32_t i = 0; i < 20; ++i) {
          *part->mutable_data() += TestRow(group, 800 + i, 14 + i, layer, kind);
        }
      }
    }
  }
  for (uint32_t index = 0; index < 20; index += index == 0 ? 1 : 2) {
    item.add_indices(index);
    item.add_tokens(800 + index);
    rows.push_back({800 + index, 14 + index, 14 + index});
  }
  auto accepted = Accept(item);
  ASSERT_OK(accepted);
  // Rows keep their positions; from the first gap on nothing is keyed.
  EXPECT_EQ(accepted->state().length(), 14 + 11);
  EXPECT_EQ(accepted->state().canonical_length(), 16);
  EXPECT_EQ(accepted->state().end_position(), 14 + 20);
  ExpectRows(s, rows);
  auto open = client_->Open(TestTokens(1, 14));
  ASSERT_OK(open);
  EXPECT_EQ(open->reuse().reused_tokens(), 13);
}

}  // namespace
}  // namespace pagetide
