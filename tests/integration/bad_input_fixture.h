// A router, a worker and a store as children, and a sequence that bad input must not change.
// Whatever is sent, the answer names the field and the numbers, the sequence is what it was before,
// every committed row is still right, and no process dies. docs/testing.md lists which test covers
// what.
#ifndef PAGETIDE_TESTS_INTEGRATION_BAD_INPUT_FIXTURE_H_
#define PAGETIDE_TESTS_INTEGRATION_BAD_INPUT_FIXTURE_H_

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "pagetide/v1/admin.grpc.pb.h"
#include "pagetide/v1/router.grpc.pb.h"
#include "rpc/channel.h"
#include "rpc/model_codec.h"
#include "rpc/status_mapping.h"
#include "tests/support/process.h"
#include "tests/support/timing.h"
#include "tests/support/worker_client.h"

namespace pagetide::testing {

inline constexpr uint32_t kVocabulary = 1000;
inline constexpr uint64_t kFrames = 16;
inline constexpr size_t kLength = 40;  // of the sequence that must not change: two pages and a half
inline constexpr uint64_t kRowBytes = 64;

inline std::vector<uint32_t> Tokens(uint32_t seed, size_t count) {
  std::vector<uint32_t> tokens(count);
  for (size_t i = 0; i < count; ++i) {
    tokens[i] = static_cast<uint32_t>((seed * 131 + i * 7) % kVocabulary);
  }
  return tokens;
}

inline v1::RowPart Part(uint32_t layer, v1::RowKind kind, uint32_t first, uint32_t count,
                        std::string data) {
  v1::RowPart part;
  part.set_layer(layer);
  part.set_kind(kind);
  part.set_first_token(first);
  part.set_num_tokens(count);
  part.set_data(std::move(data));
  return part;
}

inline void ExpectRefused(const absl::Status& status, absl::StatusCode code,
                          absl::string_view reason, const std::string& text) {
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_EQ(GetReason(status), reason) << status;
  EXPECT_THAT(std::string(status.message()), ::testing::HasSubstr(text));
}

inline void ExpectInvalid(const absl::Status& status, const std::string& text) {
  ExpectRefused(status, absl::StatusCode::kInvalidArgument, "", text);
}

class BadInputTest : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_NO_FATAL_FAILURE(StartFleet(PoolBytes())); }

  // All processes live and stop cleanly, whatever the test did to them.
  void TearDown() override {
    // Idle channels first: they read a server's goodbye only every few seconds, and it waits.
    client_.reset();
    admin_.reset();
    router_stub_.reset();
    for (ChildProcess* process : {worker_.get(), router_.get(), store_.get()}) {
      if (process == nullptr) continue;
      EXPECT_TRUE(process->IsRunning());
      EXPECT_EQ(process->Terminate().value_or(-1), 0);
    }
  }

  uint64_t PoolBytes() const { return kFrames * model_->geometry().bytes_per_page_of_tokens(); }
  std::string store_dir() const { return dir_ / "store"; }

  // At a socket file: a TCP port could be another's by the time the store starts again.
  void StartStore(const std::string& min_free = "1MiB") {
    auto store = ChildProcess::Start({.program = "pagetide-store",
                                      .args = {absl::StrCat("--data-dir=", store_dir()),
                                               absl::StrCat("--listen=unix:", dir_ / "store.sock"),
                                               absl::StrCat("--min-free=", min_free)}});
    ASSERT_TRUE(store.ok()) << store.status();
    store_ = *std::move(store);
    store_address_ = store_->Address("grpc");
  }

  void StartFleet(uint64_t pool_bytes) {
    if (store_ == nullptr) {
      ASSERT_NO_FATAL_FAILURE(StartStore());
    }
    auto router = ChildProcess::Start(
        {.program = "pagetide-router",
         .args = {"--listen=127.0.0.1:0", absl::StrCat("--store=", store_address_),
                  "--heartbeat-milliseconds=200"}});
    ASSERT_TRUE(router.ok()) << router.status();
    router_ = *std::move(router);
    router_stub_ = v1::RouterService::NewStub(MakeChannel(router_->Address("grpc")));
    v1::RegisterModelRequest request;
    *request.mutable_spec() = ToProto(model_->spec());
    v1::RegisterModelResponse response;
    TestContext context;
    const absl::Status registered =
        FromGrpcStatus(router_stub_->RegisterModel(&context, request, &response));
    ASSERT_TRUE(registered.ok()) << registered;
    auto worker =
        ChildProcess::Start({.program = "pagetide-worker",
                             .args = {"--worker-id=w1", absl::StrCat("--store=", store_address_),
                                      absl::StrCat("--router=", router_->Address("grpc")),
                                      absl::StrCat("--pool-bytes=", pool_bytes)}});
    ASSERT_TRUE(worker.ok()) << worker.status();
    worker_ = *std::move(worker);
    client_ = std::make_unique<WorkerClient>(worker_->Address("grpc"), model_);
    admin_ = v1::AdminService::NewStub(client_->channel());
  }

  // An open sequence with its tokens, and what it looked like.
  struct Held {
    std::vector<uint32_t> tokens;
    v1::SequenceState state;
    std::string serialized;
    uint64_t free_frames = 0;
  };

  absl::StatusOr<v1::SequenceState> OpenAndFill(const std::vector<uint32_t>& tokens,
                                                v1::PrefixReuse* reuse = nullptr) {
    PT_ASSIGN_OR_RETURN(const v1::OpenSequenceResponse open, client_->Open(tokens));
    PT_RETURN_IF_ERROR(client_->WaitReady(open.state().sequence_id()).status());
    PT_ASSIGN_OR_RETURN(const v1::SequenceState state, client_->Get(open.state().sequence_id()));
    if (reuse != nullptr) *reuse = open.reuse();
    PT_ASSIGN_OR_RETURN(const v1::AppendTokensResponse appended,
                        client_->Append(state, tokens, tokens.size()));
    return appended.state();
  }

  Held Hold(uint32_t seed = 1, size_t length = kLength) {
    Held held;
    held.tokens = Tokens(seed, length + 60);
    auto state = OpenAndFill({held.tokens.begin(), held.tokens.begin() + length});
    EXPECT_TRUE(state.ok()) << state.status();
    if (!state.ok()) return held;
    held.state = *state;
    held.serialized = client_->Get(state->sequence_id())->SerializeAsString();
    held.free_frames = FreeFrames();
    return held;
  }

  // The sequence is what it was: state, frames, every row; and the next append works.
  void ExpectUnchanged(const Held& held) {
    // The server learns of a lost stream a moment later than its client.
    EXPECT_TRUE(Eventually([&] {
      const auto state = client_->Get(held.state.sequence_id());
      EXPECT_TRUE(state.ok()) << state.status();
      return !state.ok() ||
             (state->SerializeAsString() == held.serialized && FreeFrames() == held.free_frames);
    })) << "is "
        << client_->Get(held.state.sequence_id())->ShortDebugString() << "\nwas "
        << held.state.ShortDebugString();
    EXPECT_EQ(FreeFrames(), held.free_frames);
    ExpectRowsRight(held, held.state.length());
    const auto appended = client_->Append(held.state, held.tokens,
                                          std::min<size_t>(held.tokens.size(), kLength + 20));
    ASSERT_TRUE(appended.ok()) << appended.status();
    ExpectRowsRight(held, appended->state().length());
  }

  void ExpectRowsRight(const Held& held, uint64_t length) {
    const auto bytes = client_->Verify(held.state.sequence_id(), held.tokens, 0, length);
    ASSERT_TRUE(bytes.ok()) << bytes.status();
    EXPECT_EQ(*bytes, length * 2 * 2 * kRowBytes);
  }

  uint64_t FreeFrames() {
    TestContext context;
    v1::GetMemoryBreakdownResponse memory;
    EXPECT_TRUE(admin_->GetMemoryBreakdown(&context, {}, &memory).ok());
    uint64_t free = 0;
    for (const auto& pool : memory.pools()) free += pool.free_frames();
    return free;
  }

  void EvictAll() {
    TestContext context;
    v1::EvictPagesResponse evicted;
    ASSERT_TRUE(admin_->EvictPages(&context, {}, &evicted).ok());
  }

  v1::SequenceRef Ref(const Held& held, uint64_t epoch_delta = 0) {
    v1::SequenceRef ref;
    ref.set_sequence_id(held.state.sequence_id());
    ref.set_epoch(held.state.epoch() + epoch_delta);
    return ref;
  }

  absl::StatusOr<v1::ReserveSlotsResponse> Reserve(const v1::SequenceRef& ref, uint32_t tokens) {
    v1::ReserveSlotsRequest request;
    *request.add_items()->mutable_sequence() = ref;
    request.mutable_items(0)->set_num_tokens(tokens);
    v1::ReserveSlotsResponse response;
    TestContext context;
    PT_RETURN_IF_ERROR(
        FromGrpcStatus(client_->sequences().ReserveSlots(&context, request, &response)));
    return response;
  }

  absl::Status Abort(const Held& held, uint64_t reservation_id) {
    v1::AbortReservationRequest request;
    request.set_sequence_id(held.state.sequence_id());
    request.set_epoch(held.state.epoch());
    request.set_reservation_id(reservation_id);
    v1::AbortReservationResponse response;
    TestContext context;
    return FromGrpcStatus(client_->sequences().AbortReservation(&context, request, &response));
  }

  // The only item's status.
  absl::Status CommitStep(const v1::CommitStepRequest::Item& item) {
    v1::CommitStepRequest request;
    *request.add_items() = item;
    v1::CommitStepResponse response;
    TestContext context;
    PT_RETURN_IF_ERROR(
        FromGrpcStatus(client_->sequences().CommitStep(&context, request, &response)));
    if (response.results_size() != 1) return absl::InternalError("not one result");
    const auto& result = response.results(0);
    const absl::Status status(static_cast<absl::StatusCode>(result.code()), result.message());
    return result.reason().empty() ? status : WithReason(status, result.reason());
  }

  // A step of one token with its right rows.
  v1::CommitStepRequest::Item StepItem(const Held& held, uint64_t reservation_id) {
    v1::CommitStepRequest::Item item;
    *item.mutable_sequence() = Ref(held);
    item.set_reservation_id(reservation_id);
    const uint64_t at = held.state.length();
    item.add_tokens(held.tokens[at]);
    for (uint32_t layer = 0; layer < 2; ++layer) {
      for (const RowKind kind : {RowKind::kK, RowKind::kV}) {
        *item.add_rows() =
            Part(layer, kind == RowKind::kK ? v1::ROW_KIND_K : v1::ROW_KIND_V, 0, 1,
                 TestRows(model_->geometry().group(0), held.tokens, at, at + 1, layer, kind));
      }
    }
    return item;
  }

  testing::TempDir dir_;
  const std::shared_ptr<const Model> model_ =
      std::make_shared<const Model>(MakeTestModel({.vocabulary_size = kVocabulary}));
  std::string store_address_;
  std::unique_ptr<ChildProcess> store_, router_, worker_;
  std::unique_ptr<v1::RouterService::Stub> router_stub_;
  std::unique_ptr<WorkerClient> client_;
  std::unique_ptr<v1::AdminService::Stub> admin_;
};

// One append stream written by hand.
class RawAppend {
 public:
  RawAppend(v1::SequenceService::StubInterface& stub, const v1::SequenceRef& ref, uint64_t length,
            const std::vector<uint32_t>& tokens)
      : writer_(stub.AppendTokens(&context_, &response_)) {
    v1::AppendHeader* header = message_.mutable_header();
    *header->mutable_sequence() = ref;
    header->set_append_id("raw");
    header->set_expected_length(length);
    header->mutable_tokens()->Add(tokens.begin(), tokens.end());
  }
  bool SendHeader() { return writer_->Write(message_); }
  bool Send(const v1::RowPart& part) {
    *message_.mutable_rows() = part;
    return writer_->Write(message_);
  }
  void Cancel() { context_.TryCancel(); }
  absl::Status Finish() {
    writer_->WritesDone();
    return FromGrpcStatus(writer_->Finish());
  }

 private:
  TestContext context_;
  v1::AppendTokensRequest message_;
  v1::AppendTokensResponse response_;
  std::unique_ptr<grpc::ClientWriterInterface<v1::AppendTokensRequest>> writer_;
};

}  // namespace pagetide::testing

#endif  // PAGETIDE_TESTS_INTEGRATION_BAD_INPUT_FIXTURE_H_
