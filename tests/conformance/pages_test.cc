// FEATURES A through the service: a worker behind gRPC on loopback, pages of 256 tokens.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "kvstore/memory_page_store.h"
#include "rpc/status_mapping.h"
#include "services/worker_role.h"
#include "tests/conformance/assert_ok.h"
#include "tests/support/process.h"
#include "tests/support/worker_client.h"

namespace pagetide {
namespace {

using ::pagetide::testing::TestContext;
using ::pagetide::testing::TestRows;
using ::pagetide::testing::TestTokens;
using ::pagetide::testing::WorkerClient;

std::vector<uint32_t> Concat(std::vector<uint32_t> a, const std::vector<uint32_t>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

class PagesTest : public ::testing::Test {
 protected:
  // `spare_bytes` of the budget are less than a page.
  void Start(uint32_t page_tokens, uint64_t frames, uint64_t spare_bytes = 0) {
    model_ = std::make_shared<const Model>(testing::MakeTestModel(
        {.page_tokens = page_tokens, .num_layers = 1, .kv_heads = 1, .dim = 2}));
    ASSERT_OK(testing::RegisterTestModel(*model_, &store_));
    WorkerRole::Options options;
    options.worker.pool_bytes =
        frames * model_->geometry().bytes_per_page_of_tokens() + spare_bytes;
    options.worker.deployment_secret = "a secret of tests";
    options.worker.host.write_through = false;  // what is evicted is gone
    options.local_plane.socket_path = dir_ / "worker.sock";
    auto role = WorkerRole::Start(options, &store_, Clock::Real());
    ASSERT_OK(role);
    role_ = *std::move(role);
    client_ = std::make_unique<WorkerClient>(role_->address(), model_);
  }
  absl::StatusOr<v1::PrefixReuse> Lookup(const std::vector<uint32_t>& tokens) {
    TestContext context;
    v1::LookupPrefixRequest request;
    request.set_model_digest(model_->digest().ToHex());
    request.mutable_tokens()->Add(tokens.begin(), tokens.end());
    v1::LookupPrefixResponse response;
    PT_RETURN_IF_ERROR(
        FromGrpcStatus(client_->prefixes().LookupPrefix(&context, request, &response)));
    return response.reuse();
  }

  testing::TempDir dir_;
  MemoryPageStore store_;
  std::shared_ptr<const Model> model_;
  std::unique_ptr<WorkerRole> role_;
  std::unique_ptr<WorkerClient> client_;
};

TEST_F(PagesTest, A1FramesAreTheBudgetByTheBytesOfAPage) {
  Start(256, 7, /*spare_bytes=*/256 * 2 * 8 - 1);
  ASSERT_EQ(model_->geometry().bytes_per_page_of_tokens(), 256u * 2 * 8);
  const std::vector<uint32_t> tokens = TestTokens(1, 256 * 8);
  auto open = client_->Open({});
  ASSERT_OK(open);
  // Seven pages fit; eight never will, and the answer has the numbers.
  const absl::Status too_much = client_->Append(open->state(), tokens, 256 * 8).status();
  EXPECT_EQ(too_much.code(), absl::StatusCode::kInvalidArgument) << too_much;
  EXPECT_NE(too_much.message().find("8"), std::string::npos) << too_much;
  EXPECT_NE(too_much.message().find("7"), std::string::npos) << too_much;
  auto appended = client_->Append(open->state(), tokens, 256 * 7);
  ASSERT_OK(appended);
  EXPECT_EQ(appended->pages_created(), 7);
}

// P = 400, M = 200 and suffixes of 80, 81 and 82 tokens, 300 new tokens each, one after another.
TEST_F(PagesTest, A5ThreePromptsThatShareSixHundredTokens) {
  Start(256, 32);
  const std::vector<uint32_t> shared = TestTokens(1, 600);
  const uint64_t computed[] = {680, 81, 82}, reused[] = {0, 600, 600}, new_pages[] = {4, 2, 2};
  for (int i = 0; i < 3; ++i) {
    const std::vector<uint32_t> prompt = Concat(shared, TestTokens(10 + i, 80 + i));
    const std::vector<uint32_t> all = Concat(prompt, TestTokens(20 + i, 300));
    auto open = client_->Open(prompt);
    ASSERT_OK(open);
    EXPECT_EQ(open->reuse().reused_tokens(), reused[i]);
    EXPECT_EQ(open->reuse().shared_pages(), i == 0 ? 0 : 2);
    EXPECT_EQ(open->reuse().partial_rows(), i == 0 ? 0 : 88);
    auto prefill = client_->Append(open->state(), all, prompt.size());
    ASSERT_OK(prefill);
    EXPECT_EQ(prefill->appended_tokens(), computed[i]);
    auto decode = client_->Append(prefill->state(), all, all.size());
    ASSERT_OK(decode);
    EXPECT_EQ(prefill->pages_created() + decode->pages_created(), new_pages[i]);
    ASSERT_OK(client_->Verify(open->state().sequence_id(), all, 0, all.size()));
    ASSERT_OK(client_->Close(decode->state()));
  }
}

TEST_F(PagesTest, A3OfChildrenThatBeginAlikeTheLongestRunIsTaken) {
  Start(16, 64);
  const std::vector<uint32_t> parent = TestTokens(1, 16);
  std::vector<std::vector<uint32_t>> known;
  for (uint32_t n : {3u, 9u, 6u}) {
    // The first n tokens of a page are common, then they differ.
    known.push_back(parent);
    for (uint32_t i = 0; i < 20; ++i) known.back().push_back(i < n ? 1000 + i : 5000 + 100 * n + i);
    auto open = client_->Open({});
    ASSERT_OK(open);
    ASSERT_OK(client_->Append(open->state(), known.back(), known.back().size()));
  }
  std::vector<uint32_t> prompt = parent;
  for (uint32_t i = 0; i < 14; ++i) prompt.push_back(1000 + i);
  auto open = client_->Open(prompt);
  ASSERT_OK(open);
  EXPECT_EQ(open->reuse().shared_pages(), 1);
  EXPECT_EQ(open->reuse().partial_rows(), 9);
  ASSERT_OK(client_->Append(open->state(), prompt, prompt.size()));
  ASSERT_OK(client_->Verify(open->state().sequence_id(), prompt, 0, prompt.size()));
}

TEST_F(PagesTest, A4OneTokenIsLeftUnlessAllMayBeReused) {
  Start(16, 64);
  const std::vector<uint32_t> tokens = TestTokens(1, 64);
  auto open = client_->Open({});
  ASSERT_OK(open);
  ASSERT_OK(client_->Append(open->state(), tokens, 64));
  auto again = client_->Open(tokens);
  ASSERT_OK(again);
  EXPECT_EQ(again->reuse().reused_tokens(), 63);
  TestContext context;
  v1::OpenSequenceRequest request;
  request.set_model_digest(model_->digest().ToHex());
  request.mutable_tokens()->Add(tokens.begin(), tokens.end());
  request.set_allow_full_reuse(true);
  v1::OpenSequenceResponse response;
  ASSERT_OK(FromGrpcStatus(client_->sequences().OpenSequence(&context, request, &response)));
  EXPECT_EQ(response.reuse().reused_tokens(), 64);
}

// A chain of four pages that nobody references; two frames are needed: the last two go.
TEST_F(PagesTest, A11TheEndOfAChainGoesFirst) {
  Start(256, 4);
  const std::vector<uint32_t> chain = TestTokens(1, 1024);
  auto open = client_->Open({});
  ASSERT_OK(open);
  auto appended = client_->Append(open->state(), chain, 1024);
  ASSERT_OK(appended);
  ASSERT_OK(client_->Close(appended->state()));
  std::vector<uint32_t> prompt = chain;
  prompt.push_back(1);
  EXPECT_EQ(Lookup(prompt)->reused_tokens(), 1024);
  auto other = client_->Open({});
  ASSERT_OK(other);
  ASSERT_OK(client_->Append(other->state(), TestTokens(2, 512), 512));
  EXPECT_EQ(Lookup(prompt)->reused_tokens(), 512);
}

TEST_F(PagesTest, A13OneStepOf256Sequences) {
  Start(16, 300);
  constexpr int kSequences = 256;
  const GroupGeometry& group = model_->geometry().group(0);
  std::vector<v1::SequenceState> states;
  std::vector<std::vector<uint32_t>> tokens;
  v1::ReserveSlotsRequest reserve;
  for (int i = 0; i < kSequences; ++i) {
    tokens.push_back(TestTokens(100 + i, 4));
    auto open = client_->Open({});
    ASSERT_OK(open);
    auto appended = client_->Append(open->state(), tokens.back(), 3);
    ASSERT_OK(appended);
    states.push_back(appended->state());
    auto* item = reserve.add_items();
    item->mutable_sequence()->set_sequence_id(states.back().sequence_id());
    item->mutable_sequence()->set_epoch(states.back().epoch());
    item->set_num_tokens(1);
  }
  TestContext reserve_context;
  v1::ReserveSlotsResponse slots;
  ASSERT_OK(FromGrpcStatus(client_->sequences().ReserveSlots(&reserve_context, reserve, &slots)));
  v1::CommitStepRequest step;
  for (int i = 0; i < kSequences; ++i) {
    auto* item = step.add_items();
    *item->mutable_sequence() = reserve.items(i).sequence();
    item->set_reservation_id(slots.slots(i).reservation_id());
    item->add_tokens(tokens[i][3]);
    for (RowKind kind : {RowKind::kK, RowKind::kV}) {
      v1::RowPart* part = item->add_rows();
      part->set_kind(kind == RowKind::kK ? v1::ROW_KIND_K : v1::ROW_KIND_V);
      part->set_num_tokens(1);
      part->set_data(TestRows(group, tokens[i], 3, 4, 0, kind));
    }
  }
  TestContext step_context;
  v1::CommitStepResponse response;
  ASSERT_OK(FromGrpcStatus(client_->sequences().CommitStep(&step_context, step, &response)));
  ASSERT_EQ(response.results_size(), kSequences);
  for (int i = 0; i < kSequences; ++i) {
    EXPECT_EQ(response.results(i).code(), 0) << response.results(i).message();
    EXPECT_EQ(response.results(i).length(), 4);
  }
  for (int i = 0; i < kSequences; i += 51) {
    ASSERT_OK(client_->Verify(states[i].sequence_id(), tokens[i], 0, 4));
  }
}

}  // namespace
}  // namespace pagetide
