// FEATURES B through the service: a worker behind gRPC on loopback, every number of the table, and
// every refusal, after which all that the service shows of a sequence must be what it was.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/digest.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "kvstore/memory_page_store.h"
#include "pagetide/v1/session.grpc.pb.h"
#include "rpc/status_mapping.h"
#include "services/worker_role.h"
#include "tests/support/process.h"
#include "tests/support/worker_client.h"

namespace pagetide {
namespace {

using ::pagetide::testing::RegisterTestModel;
using ::pagetide::testing::TestContext;
using ::pagetide::testing::TestRow;
using ::pagetide::testing::TestTokens;
using ::pagetide::testing::WorkerClient;
using ::testing::HasSubstr;

#define ASSERT_OK(expr)                         \
  do {                                          \
    const auto& assert_ok_ = (expr);            \
    ASSERT_TRUE(assert_ok_.ok()) << Text(expr); \
  } while (false)
template <typename T>
std::string Text(const absl::StatusOr<T>& value) {
  return value.status().ToString();
}
std::string Text(const absl::Status& status) {
  return status.ToString();
}

constexpr uint32_t kRot = 6;  // of 8 elements: two do not turn

std::shared_ptr<const Model> RotaryModel(uint32_t page_tokens, bool can_shift = true) {
  ModelSpec spec;
  spec.name = can_shift ? "rotary" : "packed";
  spec.weights_digest = Sha256Of(spec.name);
  spec.tokenizer_digest = Sha256Of("tokenizer");
  spec.geometry.page_tokens = page_tokens;
  LayerGroupSpec group;
  group.k_type = group.v_type = DataType::kF32;
  group.kv_heads = 2;
  group.k_dim = group.v_dim = 8;
  group.layers = {0, 2};
  group.rope.style = RopeSpec::Style::kNeox;
  group.rope.n_rot = kRot;
  spec.geometry.groups.push_back(group);
  // A second group whose K does not depend on the position, or whose rows hide their K.
  group.layers = {1};
  group.rope = {};
  if (!can_shift) group.packed_row_bytes = 64;
  spec.geometry.groups.push_back(group);
  return std::make_shared<const Model>(Model::Create(std::move(spec)).value());
}

// What a row must be.
struct Row {
  uint32_t token = 0;
  int64_t written_at = 0;
  int64_t position = 0;
};

// K of a row as written, turned by float64 from where it was written to where it stands.
std::vector<float> ExpectedK(const GroupGeometry& group, const Row& row, uint32_t layer) {
  const std::string written =
      TestRow(group, row.token, static_cast<uint64_t>(row.written_at), layer, RowKind::kK);
  std::vector<float> k(written.size() / sizeof(float));
  std::memcpy(k.data(), written.data(), written.size());
  const RopeSpec& rope = group.spec().rope;
  if (rope.style == RopeSpec::Style::kNone) return k;
  for (uint32_t head = 0; head < group.spec().kv_heads; ++head) {
    float* const x = k.data() + head * group.spec().k_dim;
    for (uint32_t i = 0; i < rope.n_rot / 2; ++i) {
      const double angle = static_cast<double>(row.position - row.written_at) *
                           std::pow(rope.base, -2.0 * i / rope.n_rot);
      const double a = x[i], b = x[i + rope.n_rot / 2];
      x[i] = static_cast<float>(a * std::cos(angle) - b * std::sin(angle));
      x[i + rope.n_rot / 2] = static_cast<float>(a * std::sin(angle) + b * std::cos(angle));
    }
  }
  return k;
}

class SequenceAlgebraTest : public ::testing::Test {
 protected:
  void SetUp() override { Start(256, 24); }

  void Start(uint32_t page_tokens, uint64_t frames, bool can_shift = true) {
    role_.reset();
    model_ = RotaryModel(page_tokens, can_shift);
    ASSERT_OK(RegisterTestModel(*model_, &store_));
    WorkerRole::Options options;
    options.worker.pool_bytes = frames * model_->geometry().bytes_per_page_of_tokens();
    options.worker.deployment_secret = "a secret of tests";
    options.local_plane.socket_path = dir_ / "worker.sock";
    auto role = WorkerRole::Start(options, &store_, Clock::Real());
    ASSERT_OK(role);
    role_ = *std::move(role);
    client_ = std::make_unique<WorkerClient>(role_->address(), model_);
  }

  // A call of the edit service, with the reference to `state` filled in by `fill`.
  template <typename Request, typename Response>
  absl::StatusOr<Response> Call(grpc::Status (v1::SequenceEditService::StubInterface::*method)(
                                    grpc::ClientContext*, const Request&, Response*),
                                const Request& request) {
    TestContext context;
    Response response;
    PT_RETURN_IF_ERROR(FromGrpcStatus((client_->edits().*method)(&context, request, &response)));
    return response;
  }
  static v1::SequenceRef Ref(const v1::SequenceState& state) {
    v1::SequenceRef ref;
    ref.set_sequence_id(state.sequence_id());
    ref.set_epoch(state.epoch());
    return ref;
  }

  absl::StatusOr<v1::RemoveRangeResponse> Remove(const v1::SequenceState& s, int64_t p0, int64_t p1,
                                                 const std::string& request_id = "") {
    v1::RemoveRangeRequest request;
    request.set_request_id(request_id);
    *request.mutable_sequence() = Ref(s);
    request.set_p0(p0);
    request.set_p1(p1);
    return Call(&v1::SequenceEditService::StubInterface::RemoveRange, request);
  }
  absl::StatusOr<v1::CopyRangeResponse> Copy(const v1::SequenceState& from,
                                             const v1::SequenceState& to, int64_t p0, int64_t p1,
                                             bool allow_overlap = false) {
    v1::CopyRangeRequest request;
    *request.mutable_from() = Ref(from);
    *request.mutable_to() = Ref(to);
    request.set_p0(p0);
    request.set_p1(p1);
    request.set_allow_overlap(allow_overlap);
    return Call(&v1::SequenceEditService::StubInterface::CopyRange, request);
  }
  absl::StatusOr<v1::ShiftPositionsResponse> Shift(
      const v1::SequenceState& s, int64_t p0, int64_t p1, int64_t delta,
      v1::OnShared on_shared = v1::ON_SHARED_UNSPECIFIED, bool allow_overlap = false) {
    v1::ShiftPositionsRequest request;
    *request.mutable_sequence() = Ref(s);
    request.set_p0(p0);
    request.set_p1(p1);
    request.set_delta(delta);
    request.set_on_shared(on_shared);
    request.set_allow_overlap(allow_overlap);
    return Call(&v1::SequenceEditService::StubInterface::ShiftPositions, request);
  }
  absl::StatusOr<v1::DividePositionsResponse> Divide(const v1::SequenceState& s, int64_t p0,
                                                     int64_t p1, int64_t divisor) {
    v1::DividePositionsRequest request;
    *request.mutable_sequence() = Ref(s);
    request.set_p0(p0);
    request.set_p1(p1);
    request.set_divisor(divisor);
    return Call(&v1::SequenceEditService::StubInterface::DividePositions, request);
  }
  absl::StatusOr<v1::ShiftWindowResponse> Window(
      const v1::SequenceState& s, int64_t keep,
      const std::function<void(v1::ShiftWindowRequest&)>& amount) {
    v1::ShiftWindowRequest request;
    *request.mutable_sequence() = Ref(s);
    request.set_keep(keep);
    amount(request);
    return Call(&v1::SequenceEditService::StubInterface::ShiftWindow, request);
  }
  absl::StatusOr<v1::ReorderSequencesResponse> Reorder(const std::vector<v1::SequenceState>& states,
                                                       const std::vector<uint32_t>& order,
                                                       bool allow_repeats) {
    v1::ReorderSequencesRequest request;
    for (const auto& state : states) *request.add_sequences() = Ref(state);
    request.mutable_order()->Add(order.begin(), order.end());
    request.set_allow_repeats(allow_repeats);
    return Call(&v1::SequenceEditService::StubInterface::ReorderSequences, request);
  }
  absl::StatusOr<v1::KeepOnlyResponse> KeepOnly(const std::vector<v1::SequenceState>& states) {
    v1::KeepOnlyRequest request;
    for (const auto& state : states) *request.add_sequences() = Ref(state);
    return Call(&v1::SequenceEditService::StubInterface::KeepOnly, request);
  }
  absl::StatusOr<v1::EditSequenceResponse> Edit(const v1::SequenceState& s,
                                                const std::vector<v1::SequenceEdit>& edits) {
    v1::EditSequenceRequest request;
    *request.mutable_sequence() = Ref(s);
    request.mutable_edits()->Add(edits.begin(), edits.end());
    return Call(&v1::SequenceEditService::StubInterface::EditSequence, request);
  }
  absl::StatusOr<v1::ClearSequenceResponse> Clear(const v1::SequenceState& s, bool zero_data) {
    v1::ClearSequenceRequest request;
    *request.mutable_sequence() = Ref(s);
    request.set_zero_data(zero_data);
    return Call(&v1::SequenceEditService::StubInterface::ClearSequence, request);
  }
  absl::StatusOr<v1::ReserveSlotsResponse::Slot> Reserve(const v1::SequenceState& s,
                                                         uint32_t num_tokens,
                                                         const std::vector<int32_t>& parents) {
    TestContext context;
    v1::ReserveSlotsRequest request;
    *request.add_items()->mutable_sequence() = Ref(s);
    request.mutable_items(0)->set_num_tokens(num_tokens);
    request.mutable_items(0)->mutable_parents()->Add(parents.begin(), parents.end());
    request.set_pin_prefix(true);
    v1::ReserveSlotsResponse response;
    PT_RETURN_IF_ERROR(
        FromGrpcStatus(client_->sequences().ReserveSlots(&context, request, &response)));
    return response.slots(0);
  }
  absl::StatusOr<v1::AcceptResponse> Accept(const v1::CommitStepRequest::Item& item) {
    TestContext context;
    v1::AcceptRequest request;
    *request.mutable_item() = item;
    v1::AcceptResponse response;
    PT_RETURN_IF_ERROR(FromGrpcStatus(client_->sequences().Accept(&context, request, &response)));
    return response;
  }
  std::string ExtentOf(const v1::SequenceState& s) {
    v1::GetPositionExtentRequest request;
    request.set_sequence_id(s.sequence_id());
    auto response = Call(&v1::SequenceEditService::StubInterface::GetPositionExtent, request);
    if (!response.ok()) return response.status().ToString();
    std::string text;
    for (const auto& group : response->groups()) {
      absl::StrAppend(&text, "[", group.min(), ", ", group.max(), "] ", group.rows(),
                      group.contiguous() ? " contiguous; " : "; ");
    }
    return text;
  }

  // Appends tokens; their rows are TestRow at the positions that the worker gives them.
  absl::StatusOr<v1::SequenceState> Append(const v1::SequenceState& state,
                                           const std::vector<uint32_t>& tokens,
                                           std::vector<Row>* rows = nullptr) {
    PT_ASSIGN_OR_RETURN(const v1::SequenceState now, client_->Get(state.sequence_id()));
    TestContext context;
    v1::AppendTokensResponse response;
    auto writer = client_->sequences().AppendTokens(&context, &response);
    v1::AppendTokensRequest message;
    *message.mutable_header()->mutable_sequence() = Ref(now);
    message.mutable_header()->set_append_id(absl::StrCat("append-", now.revision()));
    message.mutable_header()->set_expected_length(now.length());
    message.mutable_header()->mutable_tokens()->Add(tokens.begin(), tokens.end());
    writer->Write(message);
    for (uint32_t g = 0; g < model_->geometry().num_groups(); ++g) {
      const GroupGeometry& group = model_->geometry().group(g);
      for (uint32_t layer = 0; layer < group.num_layers(); ++layer) {
        for (RowKind kind : {RowKind::kK, RowKind::kV}) {
          if (group.row_bytes(kind) == 0) continue;
          v1::RowPart* part = message.mutable_rows();
          part->set_group(g);
          part->set_layer(layer);
          part->set_kind(kind == RowKind::kK ? v1::ROW_KIND_K : v1::ROW_KIND_V);
          part->set_num_tokens(static_cast<uint32_t>(tokens.size()));
          part->clear_data();
          for (size_t i = 0; i < tokens.size(); ++i) {
            *part->mutable_data() += TestRow(group, tokens[i], now.end_position() + i, layer, kind);
          }
          writer->Write(message);
        }
      }
    }
    writer->WritesDone();
    PT_RETURN_IF_ERROR(FromGrpcStatus(writer->Finish()));
    for (size_t i = 0; rows != nullptr && i < tokens.size(); ++i) {
      const int64_t at = static_cast<int64_t>(now.end_position() + i);
      rows->push_back({tokens[i], at, at});
    }
    return response.state();
  }
  v1::SequenceState Open(uint32_t num_tokens = 0, std::vector<Row>* rows = nullptr,
                         uint64_t seed = 1) {
    auto open = client_->Open({});
    EXPECT_TRUE(open.ok()) << open.status();
    if (!open.ok() || num_tokens == 0) return open.ok() ? open->state() : v1::SequenceState();
    auto state = Append(open->state(), TestTokens(seed, num_tokens), rows);
    EXPECT_TRUE(state.ok()) << state.status();
    return state.ok() ? *state : v1::SequenceState();
  }

  // All rows of a sequence, by (group, layer, kind).
  absl::StatusOr<std::map<std::tuple<uint32_t, uint32_t, int>, std::string>> Read(
      const v1::SequenceState& state) {
    std::map<std::tuple<uint32_t, uint32_t, int>, std::string> all;
    for (uint32_t g = 0; g < model_->geometry().num_groups(); ++g) {
      TestContext context;
      v1::ReadRowsRequest request;
      request.set_sequence_id(state.sequence_id());
      request.set_group(g);
      auto reader = client_->sequences().ReadRows(&context, request);
      v1::ReadRowsResponse part;
      while (reader->Read(&part)) all[{g, part.layer(), part.kind()}] += part.data();
      PT_RETURN_IF_ERROR(FromGrpcStatus(reader->Finish()));
    }
    return all;
  }

  void ExpectRows(const v1::SequenceState& state, const std::vector<Row>& rows) {
    auto now = client_->Get(state.sequence_id());
    ASSERT_OK(now);
    ASSERT_EQ(now->length(), rows.size());
    auto all = Read(state);
    ASSERT_OK(all);
    for (uint32_t g = 0; g < model_->geometry().num_groups(); ++g) {
      const GroupGeometry& group = model_->geometry().group(g);
      for (uint32_t layer = 0; layer < group.num_layers(); ++layer) {
        const std::string& k = (*all)[{g, layer, v1::ROW_KIND_K}];
        const std::string& v = (*all)[{g, layer, v1::ROW_KIND_V}];
        ASSERT_EQ(k.size(), rows.size() * group.k_row_bytes());
        ASSERT_EQ(v.size(), rows.size() * group.v_row_bytes());
        for (size_t i = 0; i < rows.size(); ++i) {
          const std::string at = absl::StrCat("group ", g, ", layer ", layer, ", row ", i);
          ASSERT_EQ(v.substr(i * group.v_row_bytes(), group.v_row_bytes()),
                    TestRow(group, rows[i].token, rows[i].written_at, layer, RowKind::kV))
              << at;
          const std::vector<float> expected = ExpectedK(group, rows[i], layer);
          std::vector<float> got(expected.size());
          std::memcpy(got.data(), k.data() + i * group.k_row_bytes(), group.k_row_bytes());
          for (size_t e = 0; e < got.size(); ++e) ASSERT_NEAR(got[e], expected[e], 1e-5) << at;
        }
      }
    }
  }

  // Of all that the service shows of a sequence: state, extent, page table and rows.
  std::string DigestOf(const v1::SequenceState& state) {
    auto now = client_->Get(state.sequence_id());
    EXPECT_TRUE(now.ok()) << now.status();
    auto all = Read(state);
    EXPECT_TRUE(all.ok()) << all.status();
    TestContext context;
    v1::GetBlockTableRequest request;
    request.set_sequence_id(state.sequence_id());
    v1::GetBlockTableResponse table;
    EXPECT_TRUE(client_->sequences().GetBlockTable(&context, request, &table).ok());
    if (!now.ok() || !all.ok()) return "";
    std::string text = absl::StrCat(now->ShortDebugString(), ExtentOf(state));
    for (auto& extent : *table.mutable_extents()) {
      extent.clear_pins();  // of readers
      absl::StrAppend(&text, extent.ShortDebugString());
    }
    for (const auto& [where, rows] : *all) text += rows;
    return Sha256Of(text).ToHex();
  }

  testing::TempDir dir_;
  MemoryPageStore store_;
  std::shared_ptr<const Model> model_;
  std::unique_ptr<WorkerRole> role_;
  std::unique_ptr<WorkerClient> client_;
};

TEST_F(SequenceAlgebraTest, B5RemoveThenShiftLeavesElevenRows) {
  std::vector<Row> rows;
  const auto s = Open(16, &rows);
  auto removed = Remove(s, 3, 8);
  ASSERT_OK(removed);
  EXPECT_EQ(removed->removed_rows(), 5);
  EXPECT_EQ(removed->state().canonical_length(), 3);
  EXPECT_EQ(removed->state().end_position(), 16);
  rows.erase(rows.begin() + 3, rows.begin() + 8);
  ExpectRows(s, rows);
  auto shifted = Shift(s, 8, -1, -5);
  ASSERT_OK(shifted);
  EXPECT_EQ(shifted->moved_rows(), 8);
  EXPECT_EQ(shifted->state().length(), 11);
  EXPECT_EQ(shifted->state().end_position(), 11);
  EXPECT_EQ(shifted->state().revision(), s.revision() + 2);
  EXPECT_EQ(ExtentOf(s), "[0, 10] 11 contiguous; [0, 10] 11 contiguous; ");
  for (size_t i = 3; i < rows.size(); ++i) rows[i].position -= 5;
  ExpectRows(s, rows);
}

TEST_F(SequenceAlgebraTest, B6DividesPositions) {
  std::vector<Row> rows;
  const auto s = Open(8, &rows);
  auto divided = Divide(s, 0, -1, 2);
  ASSERT_OK(divided);
  EXPECT_EQ(divided->moved_rows(), 7);
  EXPECT_EQ(ExtentOf(s), "[0, 3] 8; [0, 3] 8; ");
  for (Row& row : rows) row.position /= 2;
  ExpectRows(s, rows);
}

TEST_F(SequenceAlgebraTest, B7ShiftsAWindow) {
  std::vector<Row> rows;
  const auto s = Open(1000, &rows);
  auto shifted = Window(s, 100, [](auto& request) { request.set_fraction(0.5); });
  ASSERT_OK(shifted);
  EXPECT_EQ(shifted->removed_rows(), 450);
  EXPECT_EQ(shifted->moved_rows(), 450);
  EXPECT_EQ(ExtentOf(s), "[0, 549] 550 contiguous; [0, 549] 550 contiguous; ");
  rows.erase(rows.begin() + 100, rows.begin() + 550);
  for (size_t i = 100; i < rows.size(); ++i) rows[i].position -= 450;
  ExpectRows(s, rows);
  // Generation goes on behind it, and the next shift moves rows that were moved before.
  ASSERT_OK(Append(s, TestTokens(2, 60), &rows));
  ASSERT_OK(Window(s, 10, [](auto& request) { request.set_discard(200); }));
  rows.erase(rows.begin() + 10, rows.begin() + 210);
  for (size_t i = 10; i < rows.size(); ++i) rows[i].position -= 200;
  ExpectRows(s, rows);
}

TEST_F(SequenceAlgebraTest, B3CopiesShareTwoPagesAndATail) {
  std::vector<Row> rows;
  const auto s = Open(600, &rows);
  const auto t = Open();
  auto copied = Copy(s, t, 0, -1);
  ASSERT_OK(copied);
  EXPECT_EQ(copied->copied_rows(), 600);
  EXPECT_EQ(copied->to().num_pages(), 6);  // of two layer groups
  EXPECT_EQ(copied->to().canonical_length(), 600);
  std::vector<Row> own = rows, other = rows;
  ASSERT_OK(Append(t, TestTokens(7, 5), &other));
  ASSERT_OK(Append(s, TestTokens(8, 300), &own));
  ExpectRows(s, own);
  ExpectRows(t, other);
  ASSERT_OK(client_->Close(s));
  ExpectRows(t, other);
  EXPECT_EQ(Copy(t, t, 0, -1).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(SequenceAlgebraTest, B3PartialRangesOfSeveralSourcesMakeOneSequence) {
  std::vector<Row> a, b;
  const auto s = Open(600, &a, 1);
  const auto t = Open(500, &b, 2);
  const auto u = Open();
  ASSERT_OK(Copy(s, u, 100, 300));
  ASSERT_OK(Copy(t, u, 300, 450));
  ASSERT_OK(Copy(t, u, 0, 50));
  EXPECT_EQ(ExtentOf(u), "[0, 449] 400; [0, 449] 400; ");
  std::vector<Row> rows(b.begin(), b.begin() + 50);
  rows.insert(rows.end(), a.begin() + 100, a.begin() + 300);
  rows.insert(rows.end(), b.begin() + 300, b.begin() + 450);
  ExpectRows(u, rows);
  ASSERT_OK(Append(u, TestTokens(3, 20), &rows));
  ExpectRows(u, rows);
  ExpectRows(s, a);
  ExpectRows(t, b);
}

TEST_F(SequenceAlgebraTest, B2AnAbsentRangeIsZero) {
  const auto s = Open(20);
  const std::string before = DigestOf(s);
  auto removed = Remove(s, 20, 99);
  ASSERT_OK(removed);
  EXPECT_EQ(removed->removed_rows(), 0);
  EXPECT_EQ(removed->freed_pages(), 0);
  EXPECT_EQ(DigestOf(s), before);
  const auto empty = Open();
  EXPECT_EQ(ExtentOf(empty), "[-1, -1] 0; [-1, -1] 0; ");
}

TEST_F(SequenceAlgebraTest, B2FramesAreFreedWhenNoOwnerIsLeft) {
  const auto s = Open(600);
  const auto t = Open();
  ASSERT_OK(Copy(s, t, 0, -1));
  auto removed = Remove(s, 512, -1);
  ASSERT_OK(removed);
  EXPECT_EQ(removed->freed_pages(), 0);  // the tail still has an owner
  auto cleared = Clear(t, false);
  ASSERT_OK(cleared);
  EXPECT_EQ(cleared->removed_rows(), 600);
  EXPECT_EQ(cleared->freed_pages(), 2);  // the tail, in both groups
  cleared = Clear(s, false);
  ASSERT_OK(cleared);
  EXPECT_EQ(cleared->freed_pages(), 0);
  EXPECT_EQ(cleared->cached_pages(), 4);  // keyed: found by the next prompt
  auto again = client_->Open(TestTokens(1, 513));
  ASSERT_OK(again);
  EXPECT_EQ(again->reuse().reused_tokens(), 512);
}

TEST_F(SequenceAlgebraTest, B1ZeroDataLeavesNothingToBeFound) {
  const auto s = Open(600);
  auto cleared = Clear(s, true);
  ASSERT_OK(cleared);
  EXPECT_EQ(cleared->removed_rows(), 600);
  EXPECT_EQ(cleared->freed_pages(), 6);
  EXPECT_EQ(cleared->cached_pages(), 0);
  EXPECT_EQ(cleared->state().length(), 0);
  std::vector<Row> rows;
  ASSERT_OK(Append(s, TestTokens(4, 20), &rows));
  ExpectRows(s, rows);
}

TEST_F(SequenceAlgebraTest, B4KeepOnlyClearsTheTenantsOthers) {
  std::vector<Row> rows;
  const auto a = Open(30, nullptr, 1);
  const auto b = Open(40, &rows, 2);
  const auto c = Open(0);
  auto kept = KeepOnly({b});
  ASSERT_OK(kept);
  EXPECT_EQ(kept->cleared_sequences(), 1);
  EXPECT_EQ(kept->removed_rows(), 30);
  ExpectRows(b, rows);
  ExpectRows(a, {});
  EXPECT_EQ(client_->Get(c.sequence_id())->revision(), c.revision());
}

TEST_F(SequenceAlgebraTest, B5SharedRowsStayMoveOrRefuse) {
  for (const v1::OnShared on_shared :
       {v1::ON_SHARED_COPY_ON_WRITE, v1::ON_SHARED_MOVE_ALL, v1::ON_SHARED_REJECT}) {
    std::vector<Row> rows;
    const auto s = Open(300, &rows);
    const auto t = Open();
    ASSERT_OK(Copy(s, t, 0, 280));
    std::vector<Row> other(rows.begin(), rows.begin() + 280);
    const std::string before = DigestOf(s) + DigestOf(t);
    auto shifted = Shift(s, 200, -1, 1000, on_shared);
    if (on_shared == v1::ON_SHARED_REJECT) {
      EXPECT_EQ(GetReason(shifted.status()), "ROWS_SHARED");
      EXPECT_EQ(DigestOf(s) + DigestOf(t), before);
    } else {
      ASSERT_OK(shifted);
      const bool moves = on_shared == v1::ON_SHARED_MOVE_ALL;
      EXPECT_EQ(shifted->changed_sequences(), moves ? 1 : 0);
      for (size_t i = 200; i < rows.size(); ++i) rows[i].position += 1000;
      for (size_t i = 200; moves && i < other.size(); ++i) other[i].position += 1000;
      ExpectRows(s, rows);
      ExpectRows(t, other);
    }
    ASSERT_OK(client_->Close(s));
    ASSERT_OK(client_->Close(t));
  }
}

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

TEST_F(SequenceAlgebraTest, A10CompactionLeavesContentsAsTheyWere) {
  Start(16, 64);
  std::vector<Row> rows;
  const auto s = Open(200, &rows);
  for (int i = 0; i < 12; ++i) {
    ASSERT_OK(Remove(s, 20 + 12 * i, 27 + 12 * i));
  }
  std::erase_if(rows, [](const Row& row) {
    return row.position >= 20 && row.position < 164 && (row.position - 20) % 12 < 7;
  });
  ExpectRows(s, rows);
  ASSERT_OK(Shift(s, 60, -1, 1000));
  for (Row& row : rows) {
    if (row.position >= 60) row.position += 1000;
  }
  uint64_t moved = 0;
  const uint64_t pages_before = client_->Get(s.sequence_id())->num_pages();
  for (const bool apply : {false, true}) {
    for (int calls = 0;; ++calls) {
      ASSERT_LT(calls, 100);
      v1::CompactSequenceRequest request;
      *request.mutable_sequence() = Ref(s);
      request.set_max_rows(32);
      request.set_apply_shifts(apply);
      auto compacted = Call(&v1::SequenceEditService::StubInterface::Compact, request);
      ASSERT_OK(compacted);
      if (compacted->moved_rows() == 0) break;
      EXPECT_LE(compacted->moved_rows(), 48);  // at most one page more than asked for, a group
      moved += compacted->moved_rows();
      ExpectRows(s, rows);
    }
  }
  EXPECT_GT(moved, 0u);
  auto state = client_->Get(s.sequence_id());
  ASSERT_OK(state);
  EXPECT_LT(state->num_pages(), pages_before);
  EXPECT_EQ(state->canonical_length(), 20);
  TestContext context;
  v1::GetBlockTableRequest request;
  request.set_sequence_id(s.sequence_id());
  v1::GetBlockTableResponse table;
  ASSERT_TRUE(client_->sequences().GetBlockTable(&context, request, &table).ok());
  for (const auto& extent : table.extents()) EXPECT_EQ(extent.pending_shift(), 0);
  ASSERT_OK(Append(s, TestTokens(5, 40), &rows));
  ExpectRows(s, rows);
}

TEST_F(SequenceAlgebraTest, EditsEndCanonicityForLaterPages) {
  Start(16, 64);
  const std::vector<uint32_t> tokens = TestTokens(1, 64);
  std::vector<Row> rows;
  const auto s = Open(64, &rows);
  ASSERT_OK(Remove(s, 16, 32));
  ASSERT_OK(Shift(s, 32, -1, -16));
  ASSERT_OK(Append(s, TestTokens(9, 32)));
  EXPECT_EQ(client_->Get(s.sequence_id())->canonical_length(), 16);
  // A prompt of the tokens that remain finds the untouched page and nothing else.
  std::vector<uint32_t> remaining(tokens.begin(), tokens.begin() + 16);
  remaining.insert(remaining.end(), tokens.begin() + 32, tokens.end());
  for (uint32_t token : TestTokens(9, 32)) remaining.push_back(token);
  auto open = client_->Open(remaining);
  ASSERT_OK(open);
  EXPECT_EQ(open->reuse().reused_tokens(), 16);
  // The pages of the original prompt are still what their keys say.
  open = client_->Open(tokens);
  ASSERT_OK(open);
  EXPECT_EQ(open->reuse().reused_tokens(), 63);
  ExpectRows(open->state(), std::vector<Row>(rows.begin(), rows.begin() + 63));
}

TEST_F(SequenceAlgebraTest, EditsOfSpilledSequencesComeBackRight) {
  Start(16, 6);
  std::vector<std::vector<Row>> rows(5);
  std::vector<v1::SequenceState> states;
  for (size_t i = 0; i < rows.size(); ++i) states.push_back(Open(60, &rows[i], i + 1));
  for (size_t i = 0; i < rows.size(); ++i) {
    ASSERT_OK(Window(states[i], 5, [](auto& request) { request.set_discard(20); }));
    rows[i].erase(rows[i].begin() + 5, rows[i].begin() + 25);
    for (size_t r = 5; r < rows[i].size(); ++r) rows[i][r].position -= 20;
    ASSERT_OK(Append(states[i], TestTokens(50 + i, 7), &rows[i]));
  }
  for (size_t i = 0; i < rows.size(); ++i) ExpectRows(states[i], rows[i]);
}

TEST_F(SequenceAlgebraTest, AnEditedSequenceIsSavedAndLoadedAsItIs) {
  Start(16, 32);
  std::vector<Row> rows;
  const auto s = Open(70, &rows);
  ASSERT_OK(Remove(s, 20, 30));
  ASSERT_OK(Shift(s, 50, -1, 300));
  rows.erase(rows.begin() + 20, rows.begin() + 30);
  for (Row& row : rows) {
    if (row.position >= 50) row.position += 300;
  }
  const auto sessions = v1::SessionService::NewStub(client_->channel());
  v1::SaveSessionRequest save;
  *save.mutable_sequence() = Ref(s);
  save.set_name("edited");
  v1::SaveSessionResponse saved;
  TestContext save_context;
  absl::Status status = FromGrpcStatus(sessions->SaveSession(&save_context, save, &saved));
  ASSERT_OK(status);
  ASSERT_OK(client_->Close(s));
  v1::LoadSessionRequest load;
  load.set_name("edited");
  v1::LoadSessionResponse loaded;
  TestContext load_context;
  status = FromGrpcStatus(sessions->LoadSession(&load_context, load, &loaded));
  ASSERT_OK(status);
  EXPECT_EQ(loaded.state().canonical_length(), 20);
  EXPECT_EQ(loaded.state().end_position(), 370);
  ExpectRows(loaded.state(), rows);
  ASSERT_OK(Append(loaded.state(), TestTokens(6, 30), &rows));
  ExpectRows(loaded.state(), rows);
}

TEST_F(SequenceAlgebraTest, ARepeatedRequestReturnsTheFirstAnswer) {
  const auto s = Open(40);
  auto first = Remove(s, 5, 10, "once");
  ASSERT_OK(first);
  auto second = Remove(s, 5, 10, "once");
  ASSERT_OK(second);
  EXPECT_EQ(first->SerializeAsString(), second->SerializeAsString());
  EXPECT_EQ(client_->Get(s.sequence_id())->revision(), s.revision() + 1);
  EXPECT_EQ(GetReason(Remove(s, 5, 11, "once").status()), "REQUEST_ID_REUSED");
}

TEST_F(SequenceAlgebraTest, RefusalsChangeNothing) {
  std::vector<Row> rows;
  const auto s = Open(300, &rows);
  const auto t = Open(100, nullptr, 2);
  constexpr int64_t kMin = std::numeric_limits<int64_t>::min();
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  v1::SequenceState stale = s, unknown = s;
  stale.set_epoch(s.epoch() + 1);
  unknown.set_sequence_id(absl::StrCat(s.sequence_id().substr(0, 17), "ffffff"));
  const std::string before = DigestOf(s) + DigestOf(t);
  struct Case {
    const char* what;
    absl::StatusCode code;
    const char* reason;
    absl::Status status;
  };
  const auto window = [&](int64_t keep, std::function<void(v1::ShiftWindowRequest&)> amount) {
    return Window(s, keep, amount).status();
  };
  const auto kInvalid = absl::StatusCode::kInvalidArgument;
  const auto kFailed = absl::StatusCode::kFailedPrecondition;
  const std::vector<Case> cases = {
      {"a range that begins behind its end", kInvalid, "", Remove(s, 9, 8).status()},
      {"an unknown sequence", absl::StatusCode::kNotFound, "SEQUENCE_NOT_FOUND",
       Remove(unknown, 0, 1).status()},
      {"a stale epoch", kFailed, "STALE_EPOCH", Remove(stale, 0, 1).status()},
      {"a stale epoch of the source", kFailed, "STALE_EPOCH", Copy(stale, t, 0, 1).status()},
      {"source and target the same", kInvalid, "", Copy(s, s, 0, 1).status()},
      {"an occupied position", kFailed, "POSITION_OCCUPIED", Copy(s, t, 50, 60).status()},
      {"a shift onto others", kFailed, "POSITION_OCCUPIED", Shift(s, 100, -1, -1).status()},
      {"a shift past 2^31", kInvalid, "", Shift(s, 0, -1, int64_t{1} << 31).status()},
      {"a shift to 2^31", kInvalid, "", Shift(s, 0, -1, 2147483647 - 298).status()},
      {"the least shift", kInvalid, "", Shift(s, 0, -1, kMin).status()},
      {"the greatest shift", kInvalid, "", Shift(s, 0, -1, kMax).status()},
      {"a mode that is none", kInvalid, "",
       Shift(s, 0, -1, 1, static_cast<v1::OnShared>(9)).status()},
      {"divisor 0", kInvalid, "", Divide(s, 0, -1, 0).status()},
      {"a negative divisor", kInvalid, "", Divide(s, 0, -1, -2).status()},
      {"positions that meet", kFailed, "POSITION_OCCUPIED", Divide(s, 10, -1, 2).status()},
      {"no amount", kInvalid, "", window(1, [](auto&) {})},
      {"keep < 0", kInvalid, "", window(-1, [](auto& r) { r.set_discard(1); })},
      {"keep above the length", kInvalid, "", window(301, [](auto& r) { r.set_discard(0); })},
      {"discard above the rest", kInvalid, "", window(1, [](auto& r) { r.set_discard(300); })},
      {"fraction above 1", kInvalid, "", window(1, [](auto& r) { r.set_fraction(1.01); })},
      {"no fraction", kInvalid, "", window(1, [](auto& r) { r.set_fraction(std::nan("")); })},
      {"rewind behind the end", kInvalid, "", client_->Rewind(s, 301).status()},
      {"rewind to -1", kInvalid, "", client_->Rewind(s, -1).status()},
      {"keep only nothing", kInvalid, "", KeepOnly({}).status()},
      {"keep only unknown", absl::StatusCode::kNotFound, "SEQUENCE_NOT_FOUND",
       KeepOnly({s, unknown}).status()},
  };
  for (const Case& c : cases) {
    EXPECT_EQ(c.status.code(), c.code) << c.what << ": " << c.status;
    if (*c.reason != 0) EXPECT_EQ(GetReason(c.status), c.reason) << c.what << ": " << c.status;
    EXPECT_FALSE(c.status.message().empty()) << c.what;
  }
  v1::RemoveRangeRequest old;
  *old.mutable_sequence() = Ref(s);
  old.mutable_sequence()->set_expected_revision(s.revision() + 1);
  old.set_p1(-1);
  EXPECT_EQ(GetReason(Call(&v1::SequenceEditService::StubInterface::RemoveRange, old).status()),
            "REVISION_MISMATCH");
  EXPECT_EQ(DigestOf(s) + DigestOf(t), before);
}

TEST_F(SequenceAlgebraTest, NoEditWhileAWriteIsPending) {
  const auto s = Open(20);
  const auto t = Open(30, nullptr, 2);
  v1::ReserveSlotsRequest reserve;
  *reserve.add_items()->mutable_sequence() = Ref(s);
  reserve.mutable_items(0)->set_num_tokens(2);
  v1::ReserveSlotsResponse slots;
  TestContext context;
  ASSERT_TRUE(client_->sequences().ReserveSlots(&context, reserve, &slots).ok());
  const std::string before = DigestOf(s) + DigestOf(t);
  for (const absl::Status& status :
       {Remove(s, 0, 3).status(), Shift(s, 0, -1, 3).status(), Divide(s, 0, -1, 2).status(),
        Copy(t, s, 25, 30).status(), KeepOnly({t}).status(), Clear(s, true).status(),
        Reorder({s, t}, {1, 0}, false).status(), client_->Rewind(s, 3).status()}) {
    EXPECT_EQ(GetReason(status), "PENDING_WRITE") << status;
  }
  EXPECT_EQ(DigestOf(s) + DigestOf(t), before);
  // As a source it does no harm: its committed rows do not change.
  ASSERT_OK(Copy(s, Open(), 0, -1));
}

TEST_F(SequenceAlgebraTest, RowsThatCannotTurnCannotMove) {
  Start(16, 16, /*can_shift=*/false);
  const auto s = Open(20);
  const std::string before = DigestOf(s);
  for (const absl::Status& status : {Shift(s, 0, -1, 3).status(), Divide(s, 0, -1, 2).status(),
                                     Window(s, 2, [](auto& r) { r.set_discard(3); }).status()}) {
    EXPECT_EQ(GetReason(status), "CANNOT_SHIFT") << status;
  }
  EXPECT_EQ(DigestOf(s), before);
  ASSERT_OK(Remove(s, 3, 5));  // they can be cut
}

}  // namespace
}  // namespace pagetide
