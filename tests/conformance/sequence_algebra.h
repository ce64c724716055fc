// What the tests of FEATURES B through the service share: a worker behind gRPC on loopback, the
// calls, what rows must be, and a digest of all that the service shows of a sequence.
#ifndef PAGETIDE_TESTS_CONFORMANCE_SEQUENCE_ALGEBRA_H_
#define PAGETIDE_TESTS_CONFORMANCE_SEQUENCE_ALGEBRA_H_

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/digest.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "kvstore/memory_page_store.h"
#include "pagetide/v1/session.grpc.pb.h"
#include "rpc/status_mapping.h"
#include "services/worker_role.h"
#include "tests/conformance/assert_ok.h"
#include "tests/support/process.h"
#include "tests/support/worker_client.h"

namespace pagetide::testing {

inline constexpr uint32_t kRot = 6;  // of 8 elements: two do not turn

inline std::shared_ptr<const Model> RotaryModel(uint32_t page_tokens, bool can_shift = true) {
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
inline std::vector<float> ExpectedK(const GroupGeometry& group, const Row& row, uint32_t layer) {
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
    StartModel(RotaryModel(page_tokens, can_shift), frames);
  }
  void StartModel(std::shared_ptr<const Model> model, uint64_t frames) {
    role_.reset();
    model_ = std::move(model);
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

  TempDir dir_;
  MemoryPageStore store_;
  std::shared_ptr<const Model> model_;
  std::unique_ptr<WorkerRole> role_;
  std::unique_ptr<WorkerClient> client_;
};

}  // namespace pagetide::testing

#endif  // PAGETIDE_TESTS_CONFORMANCE_SEQUENCE_ALGEBRA_H_
