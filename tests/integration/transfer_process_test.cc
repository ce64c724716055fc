// Sequences between real workers: only what the target lacks goes over the wire, and a kill -9 of
// either in the middle of a transfer leaves the other as it was.
#include <gtest/gtest.h>

#include <chrono>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/error_info.h"
#include "kvstore/remote_page_store.h"
#include "pagetide/v1/transfer.grpc.pb.h"
#include "rpc/channel.h"
#include "rpc/status_mapping.h"
#include "tests/support/cutting_proxy.h"
#include "tests/support/process.h"
#include "tests/support/timing.h"
#include "tests/support/worker_client.h"

namespace pagetide {
namespace {

using ::pagetide::testing::ChildProcess;
using ::pagetide::testing::CuttingProxy;
using ::pagetide::testing::Eventually;
using ::pagetide::testing::MakeTestModel;
using ::pagetide::testing::RegisterTestModel;
using ::pagetide::testing::TempDir;
using ::pagetide::testing::TestContext;
using ::pagetide::testing::TestTokens;
using ::pagetide::testing::WorkerClient;

// Pages of 1 MiB: a sequence is more than the sockets between two workers hold.
constexpr uint32_t kPageTokens = 128;
constexpr uint64_t kPageBytes = uint64_t{1} << 20;
constexpr uint64_t kFrames = 64;
constexpr size_t kLength = 40 * kPageTokens + 7;

struct WorkerProcess {
  std::unique_ptr<ChildProcess> process;
  std::unique_ptr<WorkerClient> client;
  std::unique_ptr<v1::TransferService::Stub> transfers;

  absl::StatusOr<v1::SendSequenceResponse> Send(const v1::SequenceState& state,
                                                const std::string& address, v1::TransferKind kind) {
    TestContext context;
    v1::SendSequenceRequest request;
    request.mutable_sequence()->set_sequence_id(state.sequence_id());
    request.mutable_sequence()->set_epoch(state.epoch());
    request.set_target_address(address);
    request.set_kind(kind);
    request.mutable_ttl()->set_seconds(1);
    v1::SendSequenceResponse response;
    const absl::Status status =
        FromGrpcStatus(transfers->SendSequence(&context, request, &response));
    if (!status.ok()) return status;
    return response;
  }
  // None when the worker does not answer.
  std::optional<uint64_t> FreeFrames() {
    TestContext context;
    v1::GetMemoryBreakdownResponse response;
    if (!client->admin().GetMemoryBreakdown(&context, {}, &response).ok()) return std::nullopt;
    uint64_t free = 0;
    for (const auto& pool : response.pools()) free += pool.free_frames();
    return free;
  }
  void ClearCache() {
    TestContext context;
    v1::ClearCacheResponse response;
    EXPECT_TRUE(client->admin().ClearCache(&context, {}, &response).ok());
  }
};

class TransferProcessTest : public ::testing::Test {
 protected:
  void SetUp() override {
    model_ = std::make_shared<const Model>(
        MakeTestModel({.page_tokens = kPageTokens, .num_layers = 4, .kv_heads = 4, .dim = 64}));
    ASSERT_EQ(model_->geometry().bytes_per_page_of_tokens(), kPageBytes);
    store_process_ = Start("pagetide-store", {absl::StrCat("--data-dir=", dir_ / "data")});
    RemotePageStore store(MakeChannel(store_process_->Address("grpc"), {.own_connection = true}));
    ASSERT_TRUE(RegisterTestModel(*model_, &store).ok());
    StartWorker("a", &a_);
    StartWorker("b", &b_);
  }
  std::unique_ptr<ChildProcess> Start(const std::string& program, std::vector<std::string> args) {
    args.insert(args.end(), {"--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0"});
    auto started = ChildProcess::Start({.program = program, .args = args});
    EXPECT_TRUE(started.ok()) << started.status();
    return started.ok() ? *std::move(started) : nullptr;
  }
  // The store knows the model; no page goes there.
  void StartWorker(const std::string& id, WorkerProcess* worker) {
    worker->process =
        Start("pagetide-worker", {absl::StrCat("--worker-id=", id),
                                  absl::StrCat("--store=", store_process_->Address("grpc")),
                                  absl::StrCat("--pool-bytes=", kFrames, "MiB"),
                                  "--write-through=false", "--spill-high-watermark=1"});
    worker->client = std::make_unique<WorkerClient>(worker->process->Address("grpc"), model_);
    worker->transfers = v1::TransferService::NewStub(worker->client->channel());
  }
  v1::SequenceState Fill(WorkerProcess& worker, const std::vector<uint32_t>& tokens) {
    auto opened = worker.client->Open(tokens);
    EXPECT_TRUE(opened.ok()) << opened.status();
    auto appended = worker.client->Append(opened->state(), tokens, tokens.size());
    EXPECT_TRUE(appended.ok()) << appended.status();
    return appended.ok() ? appended->state() : v1::SequenceState();
  }
  void ExpectGoesOn(WorkerProcess& worker, const v1::SequenceState& state) {
    std::vector<uint32_t> longer = tokens_;
    longer.resize(kLength + 20, 7);
    const auto appended = worker.client->Append(state, longer, longer.size());
    ASSERT_TRUE(appended.ok()) << appended.status();
    const auto verified = worker.client->Verify(state.sequence_id(), longer, 0, longer.size());
    EXPECT_TRUE(verified.ok()) << verified.status();
  }
  // Moves a sequence of `a` to `b` until some of its bytes are on their way; then `b` stands still,
  // `hurt` is called, and what the move answers is returned.
  template <typename Hurt>
  absl::Status HurtInTheMiddle(const v1::SequenceState& state, Hurt hurt) {
    CuttingProxy proxy(b_.process->Address("grpc"));
    absl::Status status;
    std::thread mover(
        [&] { status = a_.Send(state, proxy.address(), v1::TRANSFER_KIND_MOVE).status(); });
    const MonotonicTime give_up = Clock::Real()->MonotonicNow() + absl::Seconds(60);
    while (proxy.forwarded_bytes() < 4 * kPageBytes && Clock::Real()->MonotonicNow() < give_up) {
      std::this_thread::yield();
    }
    b_.process->Stop();
    EXPECT_LT(proxy.forwarded_bytes(), 40 * kPageBytes) << "the whole sequence was sent already";
    hurt();
    mover.join();
    return status;
  }

  TempDir dir_;
  std::unique_ptr<ChildProcess> store_process_;
  std::shared_ptr<const Model> model_;
  WorkerProcess a_, b_;
  const std::vector<uint32_t> tokens_ = TestTokens(1, kLength);
};

TEST_F(TransferProcessTest, OnlyTheMissingSuffixGoesOverTheWire) {
  const v1::SequenceState state = Fill(a_, tokens_);
  const std::vector<uint32_t> front(tokens_.begin(), tokens_.begin() + 30 * kPageTokens);
  ASSERT_TRUE(b_.client->Close(Fill(b_, front)).ok());
  CuttingProxy proxy(b_.process->Address("grpc"));
  const MonotonicTime began = Clock::Real()->MonotonicNow();
  auto sent = a_.Send(state, proxy.address(), v1::TRANSFER_KIND_MOVE);
  const absl::Duration took = Clock::Real()->MonotonicNow() - began;
  ASSERT_TRUE(sent.ok()) << sent.status();
  EXPECT_EQ(sent->sent_pages(), 11u);
  EXPECT_EQ(sent->sent_bytes(), 11 * kPageBytes);
  EXPECT_GE(proxy.forwarded_bytes(), 11 * kPageBytes);
  EXPECT_LT(proxy.forwarded_bytes(), 11 * kPageBytes + kPageBytes / 2);
  EXPECT_EQ(sent->committed().pages(), 41u);
  ExpectGoesOn(b_, sent->committed().state());
  // Nothing of it is open here: its frames are the cache's.
  a_.ClearCache();
  EXPECT_EQ(a_.FreeFrames(), kFrames);
  std::printf(
      "{\"test\":\"move_of_missing_suffix\",\"pages\":41,\"sent_pages\":11,\"wire_bytes\":%llu,"
      "\"took_ms\":%.1f}\n",
      static_cast<unsigned long long>(proxy.forwarded_bytes()), absl::ToDoubleMilliseconds(took));
}

TEST_F(TransferProcessTest, AKilledTargetLeavesTheSourceAsItWas) {
  const v1::SequenceState state = Fill(a_, tokens_);
  const std::optional<uint64_t> free = a_.FreeFrames();
  ASSERT_TRUE(free);
  const absl::Status status = HurtInTheMiddle(state, [&] { b_.process->Kill(); });
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_NE(GetReason(status), "TRANSFER_UNRESOLVED") << status;
  EXPECT_EQ(a_.FreeFrames(), free);
  ExpectGoesOn(a_, state);
  // Its next life takes it.
  StartWorker("b", &b_);
  auto sent = a_.Send(*a_.client->Get(state.sequence_id()), b_.process->Address("grpc"),
                      v1::TRANSFER_KIND_MOVE);
  ASSERT_TRUE(sent.ok()) << sent.status();
  EXPECT_EQ(sent->sent_pages(), 41u);
}

TEST_F(TransferProcessTest, AKilledSourceLeavesNothingAtTheTarget) {
  const v1::SequenceState state = Fill(a_, tokens_);
  const v1::SequenceState other = Fill(b_, TestTokens(5, 2 * kPageTokens));
  const std::optional<uint64_t> free = b_.FreeFrames();
  ASSERT_TRUE(free);
  const absl::Status status = HurtInTheMiddle(state, [&] {
    a_.process->Kill();
    b_.process->Continue();
  });
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_TRUE(b_.client->EventuallyStat("pagetide_transfer_ended_total", 1));
  EXPECT_TRUE(Eventually([&] { return b_.FreeFrames() == free; })) << b_.FreeFrames().value_or(0);
  EXPECT_GT(b_.client->Stat("pagetide_transfer_received_bytes_total").value_or(0), 0);
  EXPECT_EQ(GetReason(b_.client->Get(state.sequence_id()).status()), "SEQUENCE_NOT_FOUND");
  EXPECT_TRUE(b_.client->Get(other.sequence_id()).ok());
}

TEST_F(TransferProcessTest, ABrokenConnectionLeavesBothAsTheyWere) {
  const v1::SequenceState state = Fill(a_, tokens_);
  const std::optional<uint64_t> free_a = a_.FreeFrames();
  ASSERT_TRUE(free_a);
  CuttingProxy proxy(b_.process->Address("grpc"));
  absl::Status status;
  std::thread mover(
      [&] { status = a_.Send(state, proxy.address(), v1::TRANSFER_KIND_MOVE).status(); });
  while (proxy.forwarded_bytes() < 4 * kPageBytes) std::this_thread::yield();
  proxy.Cut();
  mover.join();
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_TRUE(Eventually([&] { return b_.FreeFrames() == kFrames; }));
  EXPECT_EQ(GetReason(b_.client->Get(state.sequence_id()).status()), "SEQUENCE_NOT_FOUND");
  EXPECT_EQ(a_.FreeFrames(), free_a);
  ExpectGoesOn(a_, state);
}

}  // namespace
}  // namespace pagetide
