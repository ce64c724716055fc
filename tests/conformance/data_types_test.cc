// FEATURES B9 and D through the service: rows of every data type come back bit for bit, and K that
// an edit moved is turned, requantised, and within its type's bound (docs/kshift.md).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/convert.h"
#include "kvstore/memory_page_store.h"
#include "rpc/status_mapping.h"
#include "services/worker_role.h"
#include "tests/support/process.h"
#include "tests/support/worker_client.h"

namespace pagetide {
namespace {

using ::pagetide::testing::TestContext;
using ::pagetide::testing::WorkerClient;

constexpr uint32_t kDim = 64;
constexpr uint32_t kRot = 48;  // the last elements do not turn
constexpr uint32_t kRows = 40;

struct TypeCase {
  DataType type;
  double bound;  // of one re-encoding after a turn, as a share of the row's largest element
};

class DataTypesTest : public ::testing::TestWithParam<TypeCase> {
 protected:
  void SetUp() override {
    ModelSpec spec;
    spec.name = std::string(DataTypeName(GetParam().type));
    spec.weights_digest = Sha256Of(spec.name);
    spec.tokenizer_digest = Sha256Of("tokenizer");
    spec.geometry.page_tokens = 16;
    LayerGroupSpec group;
    group.k_type = group.v_type = GetParam().type;
    group.kv_heads = 2;
    group.k_dim = group.v_dim = kDim;
    group.layers = {0};
    group.rope.style = RopeSpec::Style::kNeox;
    group.rope.n_rot = kRot;
    spec.geometry.groups.push_back(group);
    model_ = std::make_shared<const Model>(Model::Create(std::move(spec)).value());
    ASSERT_TRUE(testing::RegisterTestModel(*model_, &store_).ok());
    WorkerRole::Options options;
    options.worker.pool_bytes = 16 * model_->geometry().bytes_per_page_of_tokens();
    options.worker.deployment_secret = "a secret of tests";
    options.local_plane.socket_path = dir_ / "worker.sock";
    auto role = WorkerRole::Start(options, &store_, Clock::Real());
    ASSERT_TRUE(role.ok()) << role.status();
    role_ = *std::move(role);
    client_ = std::make_unique<WorkerClient>(role_->address(), model_);
  }

  kernels::KvType kernel_type() const {
    return static_cast<kernels::KvType>(static_cast<int>(GetParam().type) - 1);
  }
  std::string Encode(const std::vector<float>& row) const {
    std::string bytes(model_->geometry().group(0).k_row_bytes(), '\0');
    kernels::NarrowFromF32(kernel_type(), row.data(), static_cast<int64_t>(row.size()),
                           bytes.data());
    return bytes;
  }
  std::vector<float> Decode(absl::string_view bytes) const {
    std::vector<float> row(2 * kDim);
    kernels::WidenToF32(kernel_type(), bytes.data(), static_cast<int64_t>(row.size()), row.data());
    return row;
  }
  // A sequence with these K rows, and V rows that are K's in reverse.
  absl::StatusOr<v1::SequenceState> Append(const std::vector<std::string>& rows) {
    PT_ASSIGN_OR_RETURN(const auto open, client_->Open({}));
    TestContext context;
    v1::AppendTokensResponse response;
    auto writer = client_->sequences().AppendTokens(&context, &response);
    v1::AppendTokensRequest message;
    message.mutable_header()->mutable_sequence()->set_sequence_id(open.state().sequence_id());
    message.mutable_header()->mutable_sequence()->set_epoch(open.state().epoch());
    message.mutable_header()->set_append_id("a");
    for (size_t i = 0; i < rows.size(); ++i) message.mutable_header()->add_tokens(7 + i);
    writer->Write(message);
    for (const bool is_k : {true, false}) {
      v1::RowPart* part = message.mutable_rows();
      part->set_kind(is_k ? v1::ROW_KIND_K : v1::ROW_KIND_V);
      part->set_num_tokens(static_cast<uint32_t>(rows.size()));
      part->clear_data();
      for (size_t i = 0; i < rows.size(); ++i) {
        *part->mutable_data() += rows[is_k ? i : rows.size() - 1 - i];
      }
      writer->Write(message);
    }
    writer->WritesDone();
    PT_RETURN_IF_ERROR(FromGrpcStatus(writer->Finish()));
    return response.state();
  }
  std::string Read(const v1::SequenceState& state, v1::RowKind kind) {
    TestContext context;
    v1::ReadRowsRequest request;
    request.set_sequence_id(state.sequence_id());
    auto reader = client_->sequences().ReadRows(&context, request);
    std::string rows;
    v1::ReadRowsResponse part;
    while (reader->Read(&part)) {
      if (part.kind() == kind) rows += part.data();
    }
    EXPECT_TRUE(reader->Finish().ok());
    return rows;
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

  testing::TempDir dir_;
  MemoryPageStore store_;
  std::shared_ptr<const Model> model_;
  std::unique_ptr<WorkerRole> role_;
  std::unique_ptr<WorkerClient> client_;
};

TEST_P(DataTypesTest, RowsComeBackBitForBitAndTurnWithinTheirBound) {
  std::mt19937_64 rng(20261121);
  std::normal_distribution<float> normal;
  std::vector<std::string> rows;
  std::string k, v;
  for (uint32_t i = 0; i < kRows; ++i) {
    std::vector<float> row(2 * kDim);
    // The third is all zero: it stays so, and is no NaN.
    for (float& x : row) x = i == 3 ? 0.0f : normal(rng);
    rows.push_back(Encode(row));
    k += rows.back();
  }
  for (uint32_t i = 0; i < kRows; ++i) v += rows[kRows - 1 - i];
  auto state = Append(rows);
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_EQ(Read(*state, v1::ROW_KIND_K), k);
  EXPECT_EQ(Read(*state, v1::ROW_KIND_V), v);

  // Moved twice: K is turned once, by the sum.
  auto fork = client_->Fork(*state, kRows);
  ASSERT_TRUE(fork.ok()) << fork.status();
  ASSERT_TRUE(Shift(*state, 1000).ok());
  ASSERT_TRUE(Shift(*state, 234).ok());
  ASSERT_TRUE(Shift(fork->state(), 1234).ok());
  const std::string turned = Read(*state, v1::ROW_KIND_K);
  EXPECT_EQ(turned, Read(fork->state(), v1::ROW_KIND_K));
  EXPECT_EQ(Read(*state, v1::ROW_KIND_V), v);
  ASSERT_EQ(turned.size(), k.size());
  const size_t row_bytes = rows[0].size();
  double worst = 0;
  for (uint32_t r = 0; r < kRows; ++r) {
    const std::vector<float> written = Decode(rows[r]);
    const std::vector<float> got =
        Decode(absl::string_view(turned).substr(r * row_bytes, row_bytes));
    double largest = 0;
    for (float x : written) largest = std::max(largest, std::fabs(static_cast<double>(x)));
    for (uint32_t head = 0; head < 2; ++head) {
      for (uint32_t i = 0; i < kDim; ++i) {
        const uint32_t at = head * kDim + i;
        double expected = written[at];
        if (i < kRot) {
          const uint32_t pair = i % (kRot / 2);
          const double angle = 1234 * std::pow(10000.0, -2.0 * pair / kRot);
          const double a = written[head * kDim + pair];
          const double b = written[head * kDim + pair + kRot / 2];
          expected = i < kRot / 2 ? a * std::cos(angle) - b * std::sin(angle)
                                  : a * std::sin(angle) + b * std::cos(angle);
        }
        ASSERT_TRUE(std::isfinite(got[at])) << "row " << r;
        const double error = std::fabs(got[at] - expected);
        ASSERT_LE(error, GetParam().bound * largest) << "row " << r << ", element " << at;
        if (largest > 0) worst = std::max(worst, error / largest);
      }
    }
  }
  std::printf("%s: worst error %.2g of the row's largest element, bound %.2g\n",
              std::string(DataTypeName(GetParam().type)).c_str(), worst, GetParam().bound);
}

// Bounds as in docs/kshift.md: a turn grows an element by sqrt(2) at most, encoding it again adds
// the type's error.
INSTANTIATE_TEST_SUITE_P(
    Types, DataTypesTest,
    ::testing::Values(TypeCase{DataType::kF32, 1e-6}, TypeCase{DataType::kF16, 1.2e-3},
                      TypeCase{DataType::kBF16, 9.5e-3}, TypeCase{DataType::kF8E4M3, 0.15},
                      TypeCase{DataType::kF8E5M2, 0.30}, TypeCase{DataType::kQ8_0, 1.1e-2},
                      TypeCase{DataType::kQ5_0, 0.15}, TypeCase{DataType::kQ5_1, 8.2e-2},
                      TypeCase{DataType::kQ4_0, 0.31}, TypeCase{DataType::kQ4_1, 0.17},
                      TypeCase{DataType::kIQ4NL, 0.57}),
    [](const auto& info) { return std::string(DataTypeName(info.param.type)); });

// D2: x_j = j - 16, as ggml encodes it.
TEST(EncodingTest, D2TheVectorsOfGgml) {
  float x[32];
  for (int j = 0; j < 32; ++j) x[j] = static_cast<float>(j - 16);
  const auto encoded = [&](kernels::KvType type, size_t bytes) {
    std::string out(bytes, '\0');
    kernels::NarrowFromF32(type, x, 32, out.data());
    return absl::BytesToHexString(out);
  };
  EXPECT_EQ(encoded(kernels::KvType::kQ8_0, 34),
            "083081899199a1a9b1b9c0c8d0d8e0e8f0f8000810182028303840474f575f676f77");
  EXPECT_EQ(encoded(kernels::KvType::kQ4_0, 18), "0040809191a2a2b3b3c4c4d5d5e6e6f7f7f8");
}

}  // namespace
}  // namespace pagetide
