// Several clients of a real worker process at once, on forks of one sequence: appends, removals,
// shifts, rewinds, forks and reads. Each compares every row that it reads with what it wrote, and
// what one does shows in none of the others.
#include <gtest/gtest.h>

#include <cstdio>
#include <memory>
#include <random>
#include <thread>

#include "tests/conformance/worker_process.h"

namespace pagetide {
namespace {

using ::pagetide::testing::MakeTestModel;
using ::pagetide::testing::TestContext;
using ::pagetide::testing::TestRow;
using ::pagetide::testing::TestTokens;
using ::pagetide::testing::WorkerClient;

constexpr int kClients = 4;
constexpr int kSteps = 60;

struct Row {
  uint32_t token = 0;
  uint64_t written_at = 0;
  int64_t position = 0;
};

class ForkedClient {
 public:
  ForkedClient(const std::string& address, std::shared_ptr<const Model> model, uint64_t seed)
      : client_(address, std::move(model)), rng_(seed) {}

  absl::Status Run(const v1::SequenceState& base, const std::vector<Row>& rows) {
    PT_ASSIGN_OR_RETURN(const auto fork, client_.Fork(base, rows.size()));
    id_ = fork.state().sequence_id();
    epoch_ = fork.state().epoch();
    rows_ = rows;
    for (int step = 0; step < kSteps; ++step) {
      PT_RETURN_IF_ERROR(Step());
    }
    PT_RETURN_IF_ERROR(Verify());
    PT_ASSIGN_OR_RETURN(const v1::SequenceState state, client_.Get(id_));
    return client_.Close(state);
  }
  uint64_t rows_checked() const { return rows_checked_; }

 private:
  v1::SequenceRef Ref() const {
    v1::SequenceRef ref;
    ref.set_sequence_id(id_);
    ref.set_epoch(epoch_);
    return ref;
  }
  absl::Status Step() {
    TestContext context;
    switch (rng_() % 6) {
      case 0:
        return rows_.size() > 300 ? absl::OkStatus() : Append(1 + rng_() % 20);
      case 1: {
        v1::RemoveRangeRequest request;
        *request.mutable_sequence() = Ref();
        const int64_t p0 = rng_() % 120, p1 = p0 + rng_() % 15;
        request.set_p0(p0);
        request.set_p1(p1);
        v1::RemoveRangeResponse response;
        std::erase_if(rows_,
                      [&](const Row& row) { return row.position >= p0 && row.position < p1; });
        return FromGrpcStatus(client_.edits().RemoveRange(&context, request, &response));
      }
      case 2: {
        v1::ShiftPositionsRequest request;
        *request.mutable_sequence() = Ref();
        const int64_t from = rng_() % 100;
        request.set_p0(from);
        request.set_p1(-1);
        request.set_delta(2);
        v1::ShiftPositionsResponse response;
        for (Row& row : rows_) row.position += row.position >= from ? 2 : 0;
        return FromGrpcStatus(client_.edits().ShiftPositions(&context, request, &response));
      }
      case 3: {
        if (rows_.size() < 40) return Append(20);
        const uint64_t length = rows_.size() - rng_() % 10;
        PT_ASSIGN_OR_RETURN(const v1::SequenceState state, client_.Get(id_));
        rows_.resize(length);
        return client_.Rewind(state, static_cast<int64_t>(length)).status();
      }
      case 4: {  // goes on with a fork, and lets go of what it was forked from
        PT_ASSIGN_OR_RETURN(const v1::SequenceState state, client_.Get(id_));
        PT_ASSIGN_OR_RETURN(const auto fork, client_.Fork(state, rows_.size()));
        id_ = fork.state().sequence_id();
        epoch_ = fork.state().epoch();
        return client_.Close(state);
      }
      default:
        return Verify();
    }
  }
  absl::Status Append(uint32_t count) {
    PT_ASSIGN_OR_RETURN(const v1::SequenceState now, client_.Get(id_));
    TestContext context;
    v1::AppendTokensResponse response;
    auto writer = client_.sequences().AppendTokens(&context, &response);
    v1::AppendTokensRequest message;
    *message.mutable_header()->mutable_sequence() = Ref();
    message.mutable_header()->set_append_id("a");
    message.mutable_header()->set_expected_length(now.length());
    std::vector<Row> added;
    for (uint32_t i = 0; i < count; ++i) {
      const uint64_t at = now.end_position() + i;
      added.push_back({static_cast<uint32_t>(rng_() >> 33), at, static_cast<int64_t>(at)});
      message.mutable_header()->add_tokens(added.back().token);
    }
    writer->Write(message);
    const GroupGeometry& group = client_.model().geometry().group(0);
    for (uint32_t layer = 0; layer < group.num_layers(); ++layer) {
      for (RowKind kind : {RowKind::kK, RowKind::kV}) {
        v1::RowPart* part = message.mutable_rows();
        part->Clear();
        part->set_layer(layer);
        part->set_kind(kind == RowKind::kK ? v1::ROW_KIND_K : v1::ROW_KIND_V);
        part->set_num_tokens(count);
        for (const Row& row : added) {
          *part->mutable_data() += TestRow(group, row.token, row.written_at, layer, kind);
        }
        writer->Write(message);
      }
    }
    writer->WritesDone();
    rows_.insert(rows_.end(), added.begin(), added.end());
    return FromGrpcStatus(writer->Finish());
  }
  absl::Status Verify() {
    TestContext context;
    v1::ReadRowsRequest request;
    request.set_sequence_id(id_);
    auto reader = client_.sequences().ReadRows(&context, request);
    const GroupGeometry& group = client_.model().geometry().group(0);
    v1::ReadRowsResponse part;
    uint64_t num_rows = 0;
    absl::Status wrong;
    while (reader->Read(&part)) {
      const RowKind kind = part.kind() == v1::ROW_KIND_K ? RowKind::kK : RowKind::kV;
      for (uint32_t i = 0; i < part.num_tokens(); ++i) {
        const uint64_t at = part.first_token() + i;
        const uint32_t bytes = group.row_bytes(kind);
        if (at >= rows_.size() ||
            part.data().substr(i * bytes, bytes) !=
                TestRow(group, rows_[at].token, rows_[at].written_at, part.layer(), kind)) {
          wrong = absl::DataLossError(absl::StrCat("row ", at, " of ", id_, " of ", rows_.size()));
        }
        ++num_rows;
      }
    }
    PT_RETURN_IF_ERROR(FromGrpcStatus(reader->Finish()));
    PT_RETURN_IF_ERROR(wrong);
    if (num_rows != rows_.size() * group.num_layers() * 2) {
      return absl::DataLossError(absl::StrCat(num_rows, " rows of ", rows_.size(), " came"));
    }
    rows_checked_ += num_rows;
    return absl::OkStatus();
  }

  WorkerClient client_;
  std::mt19937_64 rng_;
  std::string id_;
  uint64_t epoch_ = 0;
  std::vector<Row> rows_;
  uint64_t rows_checked_ = 0;
};

class ConcurrentClientsTest : public testing::WorkerProcessFixture {};

TEST_F(ConcurrentClientsTest, ForksOfOneSequenceAreEditedAtOnce) {
  constexpr uint64_t kSeed = 20261121;
  std::printf("seed %llu\n", static_cast<unsigned long long>(kSeed));
  ASSERT_OK(Start(std::make_shared<const Model>(MakeTestModel()), 64));
  const std::vector<uint32_t> tokens = TestTokens(1, 200);
  auto base = OpenAndFill(tokens);
  ASSERT_OK(base);
  std::vector<Row> rows;
  for (size_t i = 0; i < tokens.size(); ++i) {
    rows.push_back({tokens[i], i, static_cast<int64_t>(i)});
  }
  std::vector<std::unique_ptr<ForkedClient>> clients;
  std::vector<absl::Status> results(kClients);
  std::vector<std::thread> threads;
  for (int n = 0; n < kClients; ++n) {
    clients.push_back(std::make_unique<ForkedClient>(worker_->Address("grpc"), model_, kSeed + n));
    threads.emplace_back([&, n] { results[n] = clients[n]->Run(*base, rows); });
  }
  for (std::thread& thread : threads) thread.join();
  uint64_t rows_checked = 0;
  for (int n = 0; n < kClients; ++n) {
    EXPECT_TRUE(results[n].ok()) << "client " << n << ": " << results[n];
    rows_checked += clients[n]->rows_checked();
  }
  EXPECT_GT(rows_checked, 5000u);
  clients.clear();
  ASSERT_OK(client_->Verify(base->sequence_id(), tokens, 0, tokens.size()));
}

}  // namespace
}  // namespace pagetide
