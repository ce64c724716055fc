// FEATURES D3 and D5 through the service: a model whose pages the store keeps in another type. What
// comes back is what the cold type leaves of a row, to the bit and wherever it comes back; keys,
// checksums and sessions say so.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "kernels/convert.h"
#include "kvstore/memory_page_store.h"
#include "pagetide/v1/session.grpc.pb.h"
#include "rpc/status_mapping.h"
#include "services/worker_role.h"
#include "tests/support/process.h"
#include "tests/support/timing.h"
#include "tests/support/worker_client.h"

namespace pagetide {
namespace {

using ::pagetide::testing::TestContext;
using ::pagetide::testing::WorkerClient;
using ::testing::HasSubstr;

constexpr uint32_t kHeads = 2;
constexpr uint32_t kDim = 32;
constexpr uint32_t kPageTokens = 16;
constexpr uint32_t kRows = 40;  // two pages and a half

kernels::KvType KernelType(DataType type) {
  return static_cast<kernels::KvType>(static_cast<int>(type) - 1);
}

std::string Encode(DataType type, const std::vector<float>& row) {
  const auto count = static_cast<int64_t>(row.size());
  std::string bytes(static_cast<size_t>(kernels::EncodedBytes(KernelType(type), count)), '\0');
  kernels::NarrowFromF32(KernelType(type), row.data(), count, bytes.data());
  return bytes;
}

std::vector<float> Decode(DataType type, const std::string& bytes) {
  std::vector<float> row(kHeads * kDim);
  kernels::WidenToF32(KernelType(type), bytes.data(), static_cast<int64_t>(row.size()), row.data());
  return row;
}

// Apart from the worker's own way through pages: one row at a time.
std::string ThereAndBack(DataType hot, DataType cold, const std::string& row) {
  return hot == cold ? row : Encode(hot, Decode(cold, Encode(cold, Decode(hot, row))));
}

struct Types {
  DataType k, v, cold_k, cold_v;
};

std::string NameOf(const Types& t) {
  return absl::StrCat(DataTypeName(t.k), "_", DataTypeName(t.v), "_as_", DataTypeName(t.cold_k),
                      "_", DataTypeName(t.cold_v));
}

std::shared_ptr<const Model> MakeModel(
    const Types& types, LayerGroupSpec::Basis basis = LayerGroupSpec::Basis::kPlain) {
  ModelSpec spec;
  spec.name = "cold-types";
  spec.weights_digest = Sha256Of("weights");
  spec.tokenizer_digest = Sha256Of("tokenizer");
  spec.geometry.page_tokens = kPageTokens;
  LayerGroupSpec group;
  group.k_type = types.k;
  group.v_type = types.v;
  group.cold_k_type = types.cold_k;
  group.cold_v_type = types.cold_v;
  group.kv_heads = kHeads;
  group.k_dim = group.v_dim = kDim;
  group.layers = {0, 1, 2};
  group.basis = basis;
  group.rope.style = RopeSpec::Style::kNeox;
  group.rope.n_rot = kDim;
  spec.geometry.groups.push_back(group);
  return std::make_shared<const Model>(Model::Create(std::move(spec)).value());
}

// A worker, and rows that follow from a token and its position.
class Engine {
 public:
  Engine(std::shared_ptr<const Model> model, PageStore* store) : model_(std::move(model)) {
    WorkerRole::Options options;
    options.worker.pool_bytes = 16 * model_->geometry().bytes_per_page_of_tokens();
    options.worker.deployment_secret = "a secret of tests";
    options.local_plane.socket_path = dir_ / "worker.sock";
    role_ = WorkerRole::Start(options, store, Clock::Real()).value();
    client_ = std::make_unique<WorkerClient>(role_->address(), model_);
    sessions_ = v1::SessionService::NewStub(client_->channel());
  }

  const LayerGroupSpec& group() const { return model_->geometry().group(0).spec(); }
  std::string Row(uint32_t token, uint32_t layer, RowKind kind) const {
    std::mt19937_64 rng(token * 100 + layer * 10 + static_cast<uint32_t>(kind));
    std::normal_distribution<float> normal;
    std::vector<float> row(kHeads * kDim);
    // Token 3's rows are zero: they stay so, and are no NaN.
    for (float& x : row) x = token == 3 ? 0.0f : normal(rng);
    for (size_t i = 0; token == 4 && i < row.size(); ++i) {  // FEATURES D2
      row[i] = static_cast<float>(i % 32) - 16;
    }
    return Encode(kind == RowKind::kK ? group().k_type : group().v_type, row);
  }
  std::string ColdRow(uint32_t token, uint32_t layer, RowKind kind) const {
    const bool is_k = kind == RowKind::kK;
    const DataType hot = is_k ? group().k_type : group().v_type;
    return ThereAndBack(hot, (is_k ? group().cold_k_type : group().cold_v_type).value_or(hot),
                        Row(token, layer, kind));
  }

  absl::StatusOr<v1::SequenceState> Append(const v1::SequenceState& state,
                                           const std::vector<uint32_t>& tokens) {
    TestContext context;
    v1::AppendTokensResponse response;
    auto writer = client_->sequences().AppendTokens(&context, &response);
    v1::AppendTokensRequest message;
    message.mutable_header()->mutable_sequence()->set_sequence_id(state.sequence_id());
    message.mutable_header()->mutable_sequence()->set_epoch(state.epoch());
    message.mutable_header()->set_append_id("a");
    message.mutable_header()->set_expected_length(state.length());
    message.mutable_header()->mutable_tokens()->Add(tokens.begin(), tokens.end());
    writer->Write(message);
    for (uint32_t layer = 0; layer < 3; ++layer) {
      for (const RowKind kind : {RowKind::kK, RowKind::kV}) {
        v1::RowPart* part = message.mutable_rows();
        part->set_layer(layer);
        part->set_kind(kind == RowKind::kK ? v1::ROW_KIND_K : v1::ROW_KIND_V);
        part->set_num_tokens(static_cast<uint32_t>(tokens.size()));
        part->clear_data();
        for (uint32_t token : tokens) *part->mutable_data() += Row(token, layer, kind);
        writer->Write(message);
      }
    }
    writer->WritesDone();
    PT_RETURN_IF_ERROR(FromGrpcStatus(writer->Finish()));
    return response.state();
  }
  absl::StatusOr<v1::SequenceState> Fill(const std::vector<uint32_t>& tokens) {
    PT_ASSIGN_OR_RETURN(const auto open, client_->Open({}));
    return Append(open.state(), tokens);
  }
  // Every row of the sequence is the token's, cold for [0, num_cold).
  void ExpectRows(const std::string& id, const std::vector<uint32_t>& tokens, size_t num_cold) {
    TestContext context;
    v1::ReadRowsRequest request;
    request.set_sequence_id(id);
    auto reader = client_->sequences().ReadRows(&context, request);
    v1::ReadRowsResponse part;
    size_t num_rows = 0;
    while (reader->Read(&part)) {
      const RowKind kind = part.kind() == v1::ROW_KIND_K ? RowKind::kK : RowKind::kV;
      const size_t row_bytes = model_->geometry().group(0).row_bytes(kind);
      for (size_t i = 0; i * row_bytes < part.data().size(); ++i, ++num_rows) {
        const size_t at = part.first_token() + i;
        ASSERT_LT(at, tokens.size());
        ASSERT_EQ(part.data().substr(i * row_bytes, row_bytes),
                  at < num_cold ? ColdRow(tokens[at], part.layer(), kind)
                                : Row(tokens[at], part.layer(), kind))
            << "row " << at << " of layer " << part.layer();
      }
    }
    const grpc::Status status = reader->Finish();
    EXPECT_TRUE(status.ok()) << status.error_message();
    EXPECT_EQ(num_rows, tokens.size() * 6);
  }
  void EvictAll() {
    TestContext context;
    v1::EvictPagesResponse evicted;
    const grpc::Status status = client_->admin().EvictPages(&context, {}, &evicted);
    EXPECT_TRUE(status.ok()) << status.error_message();
  }
  absl::Status Save(const v1::SequenceState& state, const std::string& name) {
    TestContext context;
    v1::SaveSessionRequest request;
    request.set_name(name);
    request.mutable_sequence()->set_sequence_id(state.sequence_id());
    request.mutable_sequence()->set_epoch(state.epoch());
    v1::SaveSessionResponse response;
    return FromGrpcStatus(sessions_->SaveSession(&context, request, &response));
  }
  absl::StatusOr<std::string> Load(const std::string& name) {
    TestContext context;
    v1::LoadSessionRequest request;
    request.set_name(name);
    request.set_model_digest(model_->digest().ToHex());
    v1::LoadSessionResponse response;
    PT_RETURN_IF_ERROR(FromGrpcStatus(sessions_->LoadSession(&context, request, &response)));
    return response.state().sequence_id();
  }
  absl::Status Shift(const v1::SequenceState& state, int64_t delta) {
    TestContext context;
    v1::ShiftPositionsRequest request;
    request.mutable_sequence()->set_sequence_id(state.sequence_id());
    request.mutable_sequence()->set_epoch(state.epoch());
    request.set_p1(-1);
    request.set_delta(delta);
    v1::ShiftPositionsResponse response;
    return FromGrpcStatus(client_->edits().ShiftPositions(&context, request, &response));
  }

  const std::shared_ptr<const Model> model_;
  testing::TempDir dir_;
  std::unique_ptr<WorkerRole> role_;
  std::unique_ptr<WorkerClient> client_;
  std::unique_ptr<v1::SessionService::Stub> sessions_;
};

std::vector<uint32_t> Tokens(uint32_t first, uint32_t count) {
  std::vector<uint32_t> tokens(count);
  for (uint32_t i = 0; i < count; ++i) tokens[i] = first + i;
  return tokens;
}

class ColdTypesTest : public ::testing::TestWithParam<Types> {
 protected:
  void SetUp() override {
    model_ = MakeModel(GetParam());
    ASSERT_TRUE(testing::RegisterTestModel(*model_, &store_).ok());
  }
  StoreStats Stats() { return store_.GetStats(MonotonicTime::InfiniteFuture()).value(); }
  void AwaitPages(uint64_t count) {
    ASSERT_TRUE(testing::Eventually([&] { return Stats().pages >= count; }));
  }

  MemoryPageStore store_;
  std::shared_ptr<const Model> model_;
};

TEST_P(ColdTypesTest, WhatComesBackIsWhatTheColdTypeLeavesOfIt) {
  Engine engine(model_, &store_);
  const std::vector<uint32_t> tokens = Tokens(1, kRows);
  const auto state = engine.Fill(tokens);
  ASSERT_TRUE(state.ok()) << state.status();
  engine.ExpectRows(state->sequence_id(), tokens, 0);
  engine.EvictAll();
  // The tail's record too.
  const GroupGeometry& group = model_->geometry().group(0);
  EXPECT_EQ(Stats().pages, 3u);
  EXPECT_EQ(Stats().logical_bytes, 3 * group.stored_page_bytes());
  EXPECT_LT(group.stored_page_bytes(), group.page_bytes());
  engine.ExpectRows(state->sequence_id(), tokens, kRows);
  // Nothing is lost a second time: the stored record stands for the page.
  engine.EvictAll();
  engine.ExpectRows(state->sequence_id(), tokens, kRows);
  EXPECT_TRUE(engine.client_->EventuallyStat("pagetide_worker_converted_back_bytes_total",
                                             static_cast<double>(6 * group.page_bytes())));
  EXPECT_EQ(engine.client_->Stat("pagetide_worker_checksum_failures_total").value_or(-1), 0);
  // And the tail goes on: hot rows behind cold ones, in one page.
  const std::vector<uint32_t> more = Tokens(1 + kRows, 20);
  std::vector<uint32_t> all = tokens;
  all.insert(all.end(), more.begin(), more.end());
  const auto longer = engine.Append(*engine.client_->Get(state->sequence_id()), more);
  ASSERT_TRUE(longer.ok()) << longer.status();
  engine.ExpectRows(state->sequence_id(), all, kRows);
}

TEST_P(ColdTypesTest, AnotherWorkerReusesTheStoredRows) {
  const std::vector<uint32_t> tokens = Tokens(1, kRows);
  {
    Engine engine(model_, &store_);
    ASSERT_TRUE(engine.Fill(tokens).ok());
    AwaitPages(2);
  }
  Engine engine(model_, &store_);
  const auto open = engine.client_->Open(tokens);
  ASSERT_TRUE(open.ok()) << open.status();
  EXPECT_EQ(open->reuse().reused_tokens(), 2 * kPageTokens);
  const std::string id = open->state().sequence_id();
  ASSERT_EQ(engine.client_->WaitReady(id).value_or(0), 2 * kPageTokens);
  engine.ExpectRows(id, Tokens(1, 2 * kPageTokens), 2 * kPageTokens);
}

TEST_P(ColdTypesTest, ASessionIsWhatItWasStoredAs) {
  const std::vector<uint32_t> tokens = Tokens(1, kRows);
  {
    Engine engine(model_, &store_);
    const auto state = engine.Fill(tokens);
    ASSERT_TRUE(state.ok()) << state.status();
    const absl::Status saved = engine.Save(*state, "s");
    ASSERT_TRUE(saved.ok()) << saved;
    // Whoever saves keeps its own rows.
    engine.ExpectRows(state->sequence_id(), tokens, 0);
  }
  for (int worker = 0; worker < 2; ++worker) {
    Engine engine(model_, &store_);
    const auto id = engine.Load("s");
    ASSERT_TRUE(id.ok()) << id.status();
    ASSERT_EQ(engine.client_->WaitReady(*id).value_or(0), kRows);
    engine.ExpectRows(*id, tokens, kRows);
    // Saved again, nothing new is stored.
    const uint64_t pages = Stats().pages;
    ASSERT_TRUE(engine.Save(*engine.client_->Get(*id), absl::StrCat("again", worker)).ok());
    EXPECT_EQ(Stats().pages, pages);
  }
}

TEST_P(ColdTypesTest, AModelOfOtherColdTypesFindsNothing) {
  const std::vector<uint32_t> tokens = Tokens(1, kRows);
  {
    Engine engine(model_, &store_);
    const auto state = engine.Fill(tokens);
    ASSERT_TRUE(state.ok());
    ASSERT_TRUE(engine.Save(*state, "s").ok());
  }
  Types other = GetParam();
  other.cold_k = other.k;
  other.cold_v = other.v;
  const auto model = MakeModel(other);
  ModelSpec spec = model->spec();
  spec.name = "hot-types";
  const auto hot = std::make_shared<const Model>(Model::Create(std::move(spec)).value());
  EXPECT_FALSE(hot->geometry().group(0).has_cold_types());
  EXPECT_NE(hot->digest(), model_->digest());
  ASSERT_TRUE(testing::RegisterTestModel(*hot, &store_).ok());
  Engine engine(hot, &store_);
  const auto open = engine.client_->Open(tokens);
  ASSERT_TRUE(open.ok()) << open.status();
  EXPECT_EQ(open->reuse().reused_tokens(), 0u);
  const absl::Status refused = engine.Load("s").status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition) << refused;
  EXPECT_EQ(GetReason(refused), "MODEL_MISMATCH") << refused;
}

TEST_P(ColdTypesTest, ADamagedColdRecordIsAMissNeverWrongBytes) {
  Engine engine(model_, &store_);
  const std::vector<uint32_t> tokens = Tokens(1, kRows);
  const auto state = engine.Fill(tokens);
  ASSERT_TRUE(state.ok());
  engine.EvictAll();
  v1::GetBlockTableRequest request;
  request.set_sequence_id(state->sequence_id());
  v1::GetBlockTableResponse table;
  TestContext context;
  ASSERT_TRUE(engine.client_->sequences().GetBlockTable(&context, request, &table).ok());
  const PageKey second{Digest::FromBytes(table.extents(1).page_key()).value()};
  ASSERT_TRUE(store_.FlipBit(second, 1234));
  TestContext read_context;
  v1::ReadRowsRequest read;
  read.set_sequence_id(state->sequence_id());
  auto reader = engine.client_->sequences().ReadRows(&read_context, read);
  v1::ReadRowsResponse part;
  while (reader->Read(&part)) {
  }
  const absl::Status status = FromGrpcStatus(reader->Finish());
  EXPECT_EQ(GetReason(status), "PREFIX_LOST") << status;
  engine.ExpectRows(state->sequence_id(), Tokens(1, kPageTokens), kPageTokens);
}

INSTANTIATE_TEST_SUITE_P(
    Types, ColdTypesTest,
    ::testing::Values(Types{DataType::kF16, DataType::kF16, DataType::kQ8_0, DataType::kQ8_0},
                      Types{DataType::kF32, DataType::kF32, DataType::kF16, DataType::kBF16},
                      // K as it is.
                      Types{DataType::kBF16, DataType::kF16, DataType::kBF16, DataType::kQ4_0},
                      Types{DataType::kF16, DataType::kF16, DataType::kF8E4M3, DataType::kIQ4NL},
                      Types{DataType::kQ8_0, DataType::kQ8_0, DataType::kQ5_1, DataType::kQ4_1}),
    [](const auto& info) { return NameOf(info.param); });

// D2: x_j = j - 16 as ggml encodes it, as a page of the store holds it. The bytes are ggml's own
// (tests/kernels/data/make_ggml_vectors.py).
struct GgmlVector {
  DataType type;
  const char* hex;
};

class GgmlVectorTest : public ::testing::TestWithParam<GgmlVector> {};

TEST_P(GgmlVectorTest, TheStoreHoldsGgmlsBytes) {
  const auto model = MakeModel({DataType::kF32, DataType::kF32, GetParam().type, GetParam().type});
  MemoryPageStore store;
  ASSERT_TRUE(testing::RegisterTestModel(*model, &store).ok());
  Engine engine(model, &store);
  const auto state = engine.Fill(Tokens(1, kPageTokens));
  ASSERT_TRUE(state.ok()) << state.status();
  engine.EvictAll();
  v1::GetBlockTableRequest request;
  request.set_sequence_id(state->sequence_id());
  v1::GetBlockTableResponse table;
  TestContext context;
  ASSERT_TRUE(engine.client_->sequences().GetBlockTable(&context, request, &table).ok());
  const PageKey key{Digest::FromBytes(table.extents(0).page_key()).value()};
  const GroupGeometry& group = model->geometry().group(0);
  std::vector<std::byte> body(group.stored_page_bytes());
  const GetPage get{key, body, {}};
  ASSERT_EQ(store.GetPages({&get, 1}, MonotonicTime::InfiniteFuture())[0].outcome,
            GetOutcome::kHit);
  const std::string ggml = absl::HexStringToBytes(GetParam().hex);
  const auto at = [&](uint32_t layer, RowKind kind, uint32_t slot) {
    return std::string(
        reinterpret_cast<const char*>(body.data()) + group.StoredRowOffset(layer, kind, slot),
        group.stored_row_bytes(kind));
  };
  for (uint32_t layer = 0; layer < 3; ++layer) {
    for (const RowKind kind : {RowKind::kK, RowKind::kV}) {
      EXPECT_EQ(at(layer, kind, 3), ggml + ggml);  // token 4, both heads
      for (float x : Decode(GetParam().type, at(layer, kind, 2))) EXPECT_EQ(x, 0.0f);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Types, GgmlVectorTest,
    ::testing::Values(
        GgmlVector{DataType::kQ8_0,
                   "083081899199a1a9b1b9c0c8d0d8e0e8f0f8000810182028303840474f575f676f77"},
        GgmlVector{DataType::kQ5_0, "003c0000ffff00112233445566778899aabbccddeeff"},
        GgmlVector{DataType::kQ5_1, "003c00cc0000ffff00112233445566778899aabbccddeeff"},
        GgmlVector{DataType::kQ4_0, "0040809191a2a2b3b3c4c4d5d5e6e6f7f7f8"},
        GgmlVector{DataType::kQ4_1, "224000cc80809191a2a2b3b3c4c4d5d5e6e6f7f7"},
        GgmlVector{DataType::kIQ4NL, "fa2f809091a1b1b2c2c3d3d4e4e5e5f6f7f7"}),
    [](const auto& info) { return std::string(DataTypeName(info.param.type)); });

// D5: rows of another basis are other rows.
TEST(BasisTest, TheBasisIsPartOfTheIdentity) {
  const Types types{DataType::kF16, DataType::kF16, DataType::kF16, DataType::kF16};
  const auto plain = MakeModel(types);
  const auto rotated_spec = [&] {
    ModelSpec spec = MakeModel(types, LayerGroupSpec::Basis::kHadamard)->spec();
    spec.name = "rotated";
    return spec;
  }();
  const auto rotated = std::make_shared<const Model>(Model::Create(rotated_spec).value());
  EXPECT_NE(plain->digest(), rotated->digest());
  MemoryPageStore store;
  ASSERT_TRUE(testing::RegisterTestModel(*plain, &store).ok());
  ASSERT_TRUE(testing::RegisterTestModel(*rotated, &store).ok());
  const std::vector<uint32_t> tokens = Tokens(1, kRows);
  {
    Engine engine(plain, &store);
    const auto state = engine.Fill(tokens);
    ASSERT_TRUE(state.ok()) << state.status();
    ASSERT_TRUE(engine.Save(*state, "s").ok());
    EXPECT_TRUE(engine.Shift(*state, 5).ok());
  }
  Engine engine(rotated, &store);
  const auto open = engine.client_->Open(tokens);
  ASSERT_TRUE(open.ok()) << open.status();
  EXPECT_EQ(open->reuse().reused_tokens(), 0u) << "the plain rows are not its rows";
  const absl::Status refused = engine.Load("s").status();
  EXPECT_EQ(GetReason(refused), "MODEL_MISMATCH") << refused;
  // Its rows are stored and read as they are; what needs plain ones is refused.
  const auto state = engine.Fill(tokens);
  ASSERT_TRUE(state.ok()) << state.status();
  const std::string before = engine.client_->Get(state->sequence_id())->SerializeAsString();
  const absl::Status shift = engine.Shift(*state, 5);
  EXPECT_EQ(shift.code(), absl::StatusCode::kFailedPrecondition) << shift;
  EXPECT_EQ(GetReason(shift), "CANNOT_SHIFT") << shift;
  EXPECT_EQ(engine.client_->Get(state->sequence_id())->SerializeAsString(), before);
  engine.EvictAll();
  engine.ExpectRows(state->sequence_id(), tokens, 0);
}

}  // namespace
}  // namespace pagetide
