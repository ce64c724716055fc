// Bad input to real processes: a router, a worker and a store as children. Whatever is sent, the
// answer names the field and the numbers, the sequence is what it was before, every committed row
// is still right, and no process dies. docs/testing.md lists which test covers what.
#include <gmock/gmock.h>
#include <grpcpp/generic/generic_stub.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "kvstore/page_record.h"
#include "kvstore/remote_page_store.h"
#include "pagetide/v1/admin.grpc.pb.h"
#include "pagetide/v1/page_store.grpc.pb.h"
#include "pagetide/v1/router.grpc.pb.h"
#include "rpc/channel.h"
#include "rpc/model_codec.h"
#include "rpc/status_mapping.h"
#include "tests/contract/test_page.h"
#include "tests/kvstore/store_test_util.h"
#include "tests/support/cutting_proxy.h"
#include "tests/support/process.h"
#include "tests/support/worker_client.h"

namespace pagetide {
namespace {

using testing::ChildProcess;
using testing::CuttingProxy;
using ::testing::HasSubstr;
using testing::MakeTestModel;
using testing::TestContext;
using testing::TestRows;
using testing::WorkerClient;

constexpr uint32_t kVocabulary = 1000;
constexpr uint64_t kFrames = 16;
constexpr size_t kLength = 40;  // of the sequence that must not change: two pages and a half
constexpr uint64_t kRowBytes = 64;

std::vector<uint32_t> Tokens(uint32_t seed, size_t count) {
  std::vector<uint32_t> tokens(count);
  for (size_t i = 0; i < count; ++i) {
    tokens[i] = static_cast<uint32_t>((seed * 131 + i * 7) % kVocabulary);
  }
  return tokens;
}

v1::RowPart Part(uint32_t layer, v1::RowKind kind, uint32_t first, uint32_t count,
                 std::string data) {
  v1::RowPart part;
  part.set_layer(layer);
  part.set_kind(kind);
  part.set_first_token(first);
  part.set_num_tokens(count);
  part.set_data(std::move(data));
  return part;
}

void ExpectRefused(const absl::Status& status, absl::StatusCode code, absl::string_view reason,
                   const std::string& text) {
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_EQ(GetReason(status), reason) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(text));
}

void ExpectInvalid(const absl::Status& status, const std::string& text) {
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

  // On the same address as before, if there was one.
  void StartStore(const std::string& min_free = "1MiB") {
    auto store = ChildProcess::Start(
        {.program = "pagetide-store",
         .args = {
             absl::StrCat("--data-dir=", store_dir()),
             absl::StrCat("--listen=", store_address_.empty() ? "127.0.0.1:0" : store_address_),
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
                  "--heartbeat-milliseconds=50"}});
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
    std::string now;
    for (int i = 0; i < 500; ++i) {
      const auto state = client_->Get(held.state.sequence_id());
      ASSERT_TRUE(state.ok()) << state.status();
      now = state->SerializeAsString();
      if (now == held.serialized && FreeFrames() == held.free_frames) break;
      absl::SleepFor(absl::Milliseconds(10));
    }
    EXPECT_EQ(now, held.serialized)
        << "is " << client_->Get(held.state.sequence_id())->ShortDebugString() << "\nwas "
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

  double Stat(const std::string& name) {
    TestContext context;
    v1::GetStatsResponse stats;
    EXPECT_TRUE(admin_->GetStats(&context, {}, &stats).ok());
    const auto found = stats.values().find(name);
    return found == stats.values().end() ? 0 : found->second;
  }

  bool EventuallyStat(const std::string& name, double at_least) {
    for (int i = 0; i < 1000; ++i) {
      if (Stat(name) >= at_least) return true;
      absl::SleepFor(absl::Milliseconds(10));
    }
    return false;
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

// ---- unknown model or sequence -----------------------------------------------------------------

TEST_F(BadInputTest, AnUnknownModelIsNotFoundEverywhere) {
  const Held held = Hold();
  const auto other = std::make_shared<const Model>(MakeTestModel({.name = "never-registered"}));
  const std::string digest = other->digest().ToHex();
  const std::string shown = digest.substr(0, 8);
  WorkerClient stranger(worker_->Address("grpc"), other);
  ExpectRefused(stranger.Open({1, 2, 3}).status(), absl::StatusCode::kNotFound, "MODEL_NOT_FOUND",
                shown);
  v1::LookupPrefixRequest lookup;
  lookup.set_model_digest(digest);
  lookup.add_tokens(1);
  v1::LookupPrefixResponse found;
  TestContext lookup_context;
  ExpectRefused(FromGrpcStatus(client_->prefixes().LookupPrefix(&lookup_context, lookup, &found)),
                absl::StatusCode::kNotFound, "MODEL_NOT_FOUND", shown);
  v1::AssignSequenceRequest assign;
  assign.mutable_prompt()->set_model(digest);
  assign.mutable_prompt()->add_tokens(1);
  v1::AssignSequenceResponse assigned;
  TestContext assign_context;
  ExpectRefused(FromGrpcStatus(router_stub_->AssignSequence(&assign_context, assign, &assigned)),
                absl::StatusCode::kNotFound, "MODEL_NOT_FOUND", shown);
  ExpectUnchanged(held);
}

TEST_F(BadInputTest, AnUnknownSequenceIsNotFoundInEveryCall) {
  const Held held = Hold();
  // Of this worker but never opened, and of no worker that ever was.
  const std::string incarnation = held.state.sequence_id().substr(0, 16);
  for (const std::string& id :
       {absl::StrCat(incarnation, "-ffff"), std::string("00000000000000aa-1")}) {
    v1::SequenceState unknown = held.state;
    unknown.set_sequence_id(id);
    v1::SequenceRef ref;
    ref.set_sequence_id(id);
    ref.set_epoch(1);
    std::vector<absl::Status> answers = {
        client_->Get(id).status(),
        client_->WaitReady(id).status(),
        client_->Append(unknown, held.tokens, kLength + 1).status(),
        client_->Fork(unknown, 1).status(),
        client_->Rewind(unknown, 1).status(),
        client_->Verify(id, held.tokens, 0, 1).status(),
        Reserve(ref, 1).status(),
    };
    v1::GetBlockTableRequest table;
    table.set_sequence_id(id);
    v1::GetBlockTableResponse extents;
    TestContext table_context;
    answers.push_back(
        FromGrpcStatus(client_->sequences().GetBlockTable(&table_context, table, &extents)));
    v1::AttendRequest attend;
    attend.set_sequence_id(id);
    v1::AttendResponse attended;
    TestContext attend_context;
    answers.push_back(
        FromGrpcStatus(client_->sequences().Attend(&attend_context, attend, &attended)));
    v1::CommitStepRequest::Item item = StepItem(held, 1);
    *item.mutable_sequence() = ref;
    answers.push_back(CommitStep(item));
    for (size_t i = 0; i < answers.size(); ++i) {
      SCOPED_TRACE(i);
      ExpectRefused(answers[i], absl::StatusCode::kNotFound, "SEQUENCE_NOT_FOUND", id);
    }
  }
  v1::RouterGetSequenceRequest get;
  get.set_sequence_id("00000000000000aa-1");
  v1::RouterGetSequenceResponse got;
  TestContext context;
  ExpectRefused(FromGrpcStatus(router_stub_->GetSequence(&context, get, &got)),
                absl::StatusCode::kNotFound, "SEQUENCE_NOT_FOUND", "00000000000000aa-1");
  for (const char* nonsense : {"", "x", "00000000000000aa", "00000000000000aa-", "-1",
                               "0000000000000000aa-1", "00000000000000aa-1 "}) {
    SCOPED_TRACE(nonsense);
    ExpectInvalid(client_->Get(nonsense).status(), "sequence_id");
  }
  ExpectUnchanged(held);
}

// ---- wrong epoch -------------------------------------------------------------------------------

TEST_F(BadInputTest, AWrongEpochIsStaleInEveryCallThatChangesAnything) {
  const Held held = Hold();
  for (const uint64_t delta : {uint64_t{1}, ~uint64_t{0}}) {  // one later, one earlier
    v1::SequenceState stale = held.state;
    stale.set_epoch(held.state.epoch() + delta);
    const std::string numbers = absl::StrCat("epoch ", stale.epoch(), " != ", held.state.epoch());
    const absl::Status answers[] = {client_->Append(stale, held.tokens, kLength + 1).status(),
                                    client_->Rewind(stale, 3).status(),
                                    client_->Fork(stale, 3).status(), client_->Close(stale),
                                    Reserve(Ref(held, delta), 1).status()};
    for (const absl::Status& status : answers) {
      ExpectRefused(status, absl::StatusCode::kFailedPrecondition, "STALE_EPOCH", numbers);
    }
  }
  v1::SequenceRef ref = Ref(held);
  ref.set_expected_revision(held.state.revision() + 1);
  ExpectRefused(Reserve(ref, 1).status(), absl::StatusCode::kFailedPrecondition,
                "REVISION_MISMATCH", absl::StrCat("revision ", held.state.revision() + 1, " != "));
  ExpectUnchanged(held);
}

// A former owner that still writes must not reach the rows that the owner has staged.
TEST_F(BadInputTest, AWrongEpochDoesNotTouchStagedRows) {
  Held held = Hold();
  const auto slots = Reserve(Ref(held), 1);
  ASSERT_TRUE(slots.ok()) << slots.status();
  const uint64_t reservation = slots->slots(0).reservation_id();
  // The owner stages its rows under a step that is refused for a missing one.
  v1::CommitStepRequest::Item staged = StepItem(held, reservation);
  const v1::RowPart last = staged.rows(3);
  staged.mutable_rows()->RemoveLast();
  ExpectRefused(CommitStep(staged), absl::StatusCode::kFailedPrecondition, "ROWS_MISSING", "");
  v1::CommitStepRequest::Item stale = StepItem(held, reservation);
  *stale.mutable_sequence() = Ref(held, 1);
  for (v1::RowPart& part : *stale.mutable_rows()) part.set_data(std::string(kRowBytes, 'x'));
  ExpectRefused(CommitStep(stale), absl::StatusCode::kFailedPrecondition, "STALE_EPOCH", "epoch");
  v1::AttendRequest attend;
  attend.set_sequence_id(held.state.sequence_id());
  attend.set_epoch(held.state.epoch() + 1);
  attend.set_reservation_id(reservation);
  attend.set_num_queries(1);
  attend.set_query_heads(2);
  attend.set_first_position(held.state.length());
  attend.set_queries(std::string(2 * 8 * 4, '\0'));
  attend.set_k_rows(std::string(kRowBytes, 'x'));
  attend.set_v_rows(std::string(kRowBytes, 'x'));
  v1::AttendResponse attended;
  TestContext context;
  ExpectRefused(FromGrpcStatus(client_->sequences().Attend(&context, attend, &attended)),
                absl::StatusCode::kFailedPrecondition, "STALE_EPOCH", "epoch");
  // The owner sends what was missing, and nothing else.
  staged.clear_rows();
  *staged.add_rows() = last;
  const absl::Status committed = CommitStep(staged);
  ASSERT_TRUE(committed.ok()) << committed;
  ExpectRowsRight(held, held.state.length() + 1);
}

// ---- token ids ---------------------------------------------------------------------------------

TEST_F(BadInputTest, TokenIdsOutsideTheVocabularyAreNamedInEveryCall) {
  const Held held = Hold();
  for (const uint32_t bad : {kVocabulary, uint32_t{1} << 31, UINT32_MAX}) {
    const std::string number = absl::StrCat(bad);
    std::vector<uint32_t> tokens = Tokens(9, 4);
    tokens[2] = bad;
    ExpectInvalid(client_->Open(tokens).status(), absl::StrCat("tokens[2] = ", number));
    v1::LookupPrefixRequest lookup;
    lookup.set_model_digest(model_->digest().ToHex());
    lookup.mutable_tokens()->Add(tokens.begin(), tokens.end());
    v1::LookupPrefixResponse found;
    TestContext lookup_context;
    ExpectInvalid(FromGrpcStatus(client_->prefixes().LookupPrefix(&lookup_context, lookup, &found)),
                  absl::StrCat("tokens[2] = ", number));
    RawAppend append(client_->sequences(), Ref(held), kLength, tokens);
    append.SendHeader();
    ExpectInvalid(append.Finish(), absl::StrCat("tokens[2] = ", number));
    v1::AssignSequenceRequest assign;
    assign.mutable_prompt()->set_model(model_->digest().ToHex());
    assign.mutable_prompt()->mutable_tokens()->Add(tokens.begin(), tokens.end());
    v1::AssignSequenceResponse assigned;
    TestContext assign_context;
    ExpectInvalid(FromGrpcStatus(router_stub_->AssignSequence(&assign_context, assign, &assigned)),
                  "prompt.tokens[2]");
    const auto slots = Reserve(Ref(held), 1);
    ASSERT_TRUE(slots.ok()) << slots.status();
    v1::CommitStepRequest::Item item = StepItem(held, slots->slots(0).reservation_id());
    item.set_tokens(0, bad);
    ExpectInvalid(CommitStep(item), absl::StrCat("tokens[0] = ", number));
    ASSERT_TRUE(Abort(held, slots->slots(0).reservation_id()).ok());
  }
  for (const int64_t length : {int64_t{-1}, INT64_MIN, INT64_MAX, int64_t{kLength + 1}}) {
    ExpectInvalid(client_->Rewind(held.state, length).status(),
                  absl::StrCat("length = ", length, " is not 0 to ", kLength));
  }
  ExpectUnchanged(held);
}

// A client in another language may write a negative id as a ten-byte varint: protobuf keeps its low
// 32 bits, which no vocabulary has.
TEST_F(BadInputTest, ANegativeTokenIdOnTheWireIsRefused) {
  const Held held = Hold();
  v1::OpenSequenceRequest request;
  request.set_model_digest(model_->digest().ToHex());
  std::string wire = request.SerializeAsString();
  wire += '\x1a';  // field 3, tokens, packed
  wire += '\x0b';
  wire += '\x05';
  wire += std::string(9, '\xff') + '\x01';
  ASSERT_TRUE(v1::OpenSequenceRequest().ParseFromString(wire));
  grpc::GenericStub stub(client_->channel());
  TestContext context;
  grpc::CompletionQueue queue;
  const grpc::Slice slice(wire);
  auto call = stub.PrepareUnaryCall(&context, "/pagetide.v1.SequenceService/OpenSequence",
                                    grpc::ByteBuffer(&slice, 1), &queue);
  call->StartCall();
  grpc::ByteBuffer answer;
  grpc::Status status;
  call->Finish(&answer, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  ASSERT_TRUE(queue.Next(&tag, &ok));
  ExpectInvalid(FromGrpcStatus(status), "tokens[1] = 4294967295 is not below vocabulary_size");
  ExpectUnchanged(held);
}

// ---- counts and bytes --------------------------------------------------------------------------

TEST_F(BadInputTest, CountsThatDisagreeWithTheBytesAreRefusedWhole) {
  const Held held = Hold();
  struct Case {
    const char* what;
    v1::RowPart part;
    const char* text;
  };
  const Case cases[] = {
      {"too few bytes", Part(0, v1::ROW_KIND_K, 0, 10, std::string(639, 'x')), "639"},
      {"too many bytes", Part(0, v1::ROW_KIND_V, 0, 10, std::string(641, 'x')), "641"},
      {"no bytes", Part(0, v1::ROW_KIND_K, 0, 10, ""), "0"},
      {"no such layer", Part(2, v1::ROW_KIND_K, 0, 10, std::string(640, 'x')), "2"},
      {"no kind", Part(0, v1::ROW_KIND_UNSPECIFIED, 0, 10, std::string(640, 'x')), "kind"},
      {"past the end", Part(0, v1::ROW_KIND_K, 1, 10, std::string(640, 'x')), "10"},
      {"overflow", Part(0, v1::ROW_KIND_K, UINT32_MAX, 2, std::string(128, 'x')), "4294967295"},
      {"huge count", Part(0, v1::ROW_KIND_V, 0, UINT32_MAX, std::string(640, 'x')), "4294967295"},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.what);
    RawAppend append(client_->sequences(), Ref(held), kLength,
                     {held.tokens.begin() + kLength, held.tokens.begin() + kLength + 10});
    ASSERT_TRUE(append.SendHeader());
    append.Send(c.part);
    ExpectInvalid(append.Finish(), c.text);
  }
  const auto slots = Reserve(Ref(held), 1);
  ASSERT_TRUE(slots.ok()) << slots.status();
  const uint64_t reservation = slots->slots(0).reservation_id();
  v1::CommitStepRequest::Item item = StepItem(held, reservation);
  item.mutable_rows(2)->mutable_data()->pop_back();
  ExpectInvalid(CommitStep(item), "63");
  item = StepItem(held, reservation);
  item.add_tokens(1);
  ExpectInvalid(CommitStep(item), "2");
  ASSERT_TRUE(Abort(held, reservation).ok());
  EXPECT_EQ(Reserve(Ref(held), 0).status().code(), absl::StatusCode::kInvalidArgument);
  ExpectInvalid(Reserve(Ref(held), 1025).status(), "1025");
  ExpectUnchanged(held);
}

TEST_F(BadInputTest, APageWhoseBytesAreNotWhatItsHeaderSaysIsNotStored) {
  const auto store = v1::PageStoreService::NewStub(MakeChannel(store_address_));
  const TestPage page = MakeTestPage(1);
  for (const int extra : {-1, 1}) {
    TestContext context;
    v1::PutPagesResponse response;
    auto writer = store->PutPages(&context, &response);
    v1::PutPagesRequest request;
    request.set_level(v1::DURABILITY_LOCAL);
    v1::PageHeader& header = *request.mutable_header();
    header.set_page_key(page.meta.key.digest.ToBytes());
    header.set_fingerprint(page.meta.fingerprint.ToBytes());
    header.set_body_bytes(page.body.size());
    header.mutable_checksum()->set_low(page.meta.checksum.low);
    header.mutable_checksum()->set_high(page.meta.checksum.high);
    std::string body(page.body.size() + extra, '\0');
    std::memcpy(body.data(), page.body.data(), std::min(body.size(), page.body.size()));
    request.set_body(body);
    writer->Write(request);
    writer->WritesDone();
    const absl::Status status = FromGrpcStatus(writer->Finish());
    ExpectInvalid(status, absl::StrCat(page.body.size()));
  }
  RemotePageStore client(MakeChannel(store_address_));
  const auto found =
      client.LookupPages({&page.meta.key, 1}, Clock::Real()->MonotonicNow() + absl::Seconds(10));
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_FALSE((*found)[0].present);
}

// ---- a stream cut in the middle of a layer -----------------------------------------------------

TEST_F(BadInputTest, AStreamCutInTheMiddleOfALayerChangesNothing) {
  const Held held = Hold();
  CuttingProxy proxy(worker_->Address("grpc"));
  enum class How { kHalfClosed, kCancelled, kConnectionLost };
  for (const How how : {How::kHalfClosed, How::kCancelled, How::kConnectionLost}) {
    SCOPED_TRACE(static_cast<int>(how));
    WorkerClient far(proxy.address(), model_);
    RawAppend append(far.sequences(), Ref(held), kLength,
                     {held.tokens.begin() + kLength, held.tokens.begin() + kLength + 50});
    ASSERT_TRUE(append.SendHeader());
    const GroupGeometry& group = model_->geometry().group(0);
    ASSERT_TRUE(
        append.Send(Part(0, v1::ROW_KIND_K, 0, 50,
                         TestRows(group, held.tokens, kLength, kLength + 50, 0, RowKind::kK))));
    ASSERT_TRUE(
        append.Send(Part(0, v1::ROW_KIND_V, 0, 25,
                         TestRows(group, held.tokens, kLength, kLength + 25, 0, RowKind::kV))));
    // The worker has it all under way before it is cut.
    for (int i = 0; client_->Get(held.state.sequence_id())->pending_tokens() != 50; ++i) {
      ASSERT_LT(i, 500);
      absl::SleepFor(absl::Milliseconds(10));
    }
    if (how == How::kCancelled) append.Cancel();
    if (how == How::kConnectionLost) proxy.Cut();
    const absl::Status status = append.Finish();
    switch (how) {
      case How::kHalfClosed:
        ExpectRefused(status, absl::StatusCode::kFailedPrecondition, "ROWS_MISSING", "25");
        break;
      case How::kCancelled:
        EXPECT_EQ(status.code(), absl::StatusCode::kCancelled) << status;
        break;
      case How::kConnectionLost:
        EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
        break;
    }
    for (int i = 0; client_->Get(held.state.sequence_id())->pending_tokens() != 0; ++i) {
      ASSERT_LT(i, 500);
      absl::SleepFor(absl::Milliseconds(10));
    }
  }
  ExpectUnchanged(held);
}

// ---- damaged records ---------------------------------------------------------------------------

// Waits until the full pages of `held` are stored, takes their frames away, and answers their keys.
class DamagedRecordTest : public BadInputTest {
 protected:
  std::vector<PageKey> StoreAndEvict(const Held& held, size_t num_full) {
    EXPECT_TRUE(EventuallyStat("pagetide_worker_pages_written_through_total",
                               static_cast<double>(num_full)));
    EvictAll();
    v1::GetBlockTableRequest request;
    request.set_sequence_id(held.state.sequence_id());
    v1::GetBlockTableResponse table;
    TestContext context;
    EXPECT_TRUE(client_->sequences().GetBlockTable(&context, request, &table).ok());
    std::vector<PageKey> keys;
    for (const auto& extent : table.extents()) {
      EXPECT_EQ(extent.page_state(), "stored");
      if (!extent.page_key().empty()) keys.push_back({*Digest::FromBytes(extent.page_key())});
    }
    EXPECT_EQ(keys.size(), num_full);
    return keys;
  }

  // The sequence is cut to what is valid and says so; another one over the same tokens reuses the
  // same, and is whole again once the rest was computed.
  void ExpectCutTo(const Held& held, uint64_t valid) {
    const auto read = client_->Verify(held.state.sequence_id(), held.tokens, 0, kLength);
    ExpectRefused(read.status(), absl::StatusCode::kFailedPrecondition, "PREFIX_LOST",
                  absl::StrCat(kLength, " tokens became ", valid));
    const auto state = client_->Get(held.state.sequence_id());
    ASSERT_TRUE(state.ok()) << state.status();
    EXPECT_EQ(state->length(), valid);
    ExpectRowsRight(held, valid);
    v1::PrefixReuse reuse;
    const std::vector<uint32_t> prompt(held.tokens.begin(), held.tokens.begin() + kLength);
    const auto again = OpenAndFill(prompt, &reuse);
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_EQ(reuse.reused_tokens(), valid);
    const auto bytes = client_->Verify(again->sequence_id(), held.tokens, 0, kLength);
    EXPECT_TRUE(bytes.ok()) << bytes.status();
    EXPECT_TRUE(EventuallyStat("pagetide_worker_prefixes_lost_total", 1));
  }
};

TEST_F(DamagedRecordTest, OneFlippedBitIsAMissNeverWrongBytes) {
  const Held held = Hold();
  const std::vector<PageKey> keys = StoreAndEvict(held, 2);
  ASSERT_EQ(keys.size(), 2u);
  const FoundRecord record = FindStoredRecord(store_dir(), keys[1]);
  ASSERT_FALSE(record.file.empty());
  FlipFileBit(record.file, (record.offset + kPageRecordFixedBytes + 1234) * 8 + 3);
  ExpectCutTo(held, 16);
}

TEST_F(DamagedRecordTest, TwoSwappedValidRecordsAreTwoMisses) {
  const Held held = Hold();
  const std::vector<PageKey> keys = StoreAndEvict(held, 2);
  ASSERT_EQ(keys.size(), 2u);
  const FoundRecord a = FindStoredRecord(store_dir(), keys[0]);
  const FoundRecord b = FindStoredRecord(store_dir(), keys[1]);
  ASSERT_FALSE(a.file.empty());
  ASSERT_FALSE(b.file.empty());
  // The model has no numerics id: both records are of one length.
  const size_t bytes =
      kPageRecordFixedBytes + static_cast<size_t>(model_->geometry().bytes_per_page_of_tokens());
  const auto read = [&](const FoundRecord& at) {
    std::string record(bytes, '\0');
    std::ifstream in(at.file, std::ios::binary);
    in.seekg(static_cast<std::streamoff>(at.offset));
    in.read(record.data(), static_cast<std::streamsize>(bytes));
    EXPECT_TRUE(in.good());
    return record;
  };
  const auto write = [&](const FoundRecord& at, const std::string& record) {
    std::fstream out(at.file, std::ios::in | std::ios::out | std::ios::binary);
    out.seekp(static_cast<std::streamoff>(at.offset));
    out.write(record.data(), static_cast<std::streamsize>(record.size()));
    EXPECT_TRUE(out.good());
  };
  const std::string record_a = read(a), record_b = read(b);
  write(a, record_b);
  write(b, record_a);
  ExpectCutTo(held, 0);
}

// ---- a store that is down, or full -------------------------------------------------------------

TEST_F(BadInputTest, ASpilledSequenceWaitsForAStoreThatIsDown) {
  const Held held = Hold();
  ASSERT_TRUE(EventuallyStat("pagetide_worker_pages_written_through_total", 2));
  EvictAll();
  const std::string before = client_->Get(held.state.sequence_id())->SerializeAsString();
  store_->Kill();
  const auto read = client_->Verify(held.state.sequence_id(), held.tokens, 0, kLength);
  EXPECT_EQ(read.status().code(), absl::StatusCode::kUnavailable) << read.status();
  const auto state = client_->Get(held.state.sequence_id());
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_EQ(state->SerializeAsString(), before);
  const auto fresh = OpenAndFill(Tokens(2, 30));  // new work needs no store
  EXPECT_TRUE(fresh.ok()) << fresh.status();
  ASSERT_NO_FATAL_FAILURE(StartStore());
  for (int i = 0; i < 100; ++i) {  // the channel finds the store again after its back-off
    if (client_->Verify(held.state.sequence_id(), held.tokens, 0, kLength).ok()) break;
    absl::SleepFor(absl::Milliseconds(50));
  }
  ExpectRowsRight(held, kLength);
}

TEST_F(BadInputTest, AFullStoreStopsSpillsAndNothingElse) {
  const Held held = Hold();
  ASSERT_TRUE(EventuallyStat("pagetide_worker_pages_written_through_total", 2));
  ASSERT_EQ(store_->Terminate().value_or(-1), 0);
  ASSERT_NO_FATAL_FAILURE(StartStore("1024TiB"));  // more than any disk: full from the start
  // Sequences until the frames are full of what nobody can spill.
  std::vector<std::pair<v1::SequenceState, std::vector<uint32_t>>> open;
  absl::Status refused;
  for (uint32_t seed = 100; seed < 140 && refused.ok(); ++seed) {
    const std::vector<uint32_t> tokens = Tokens(seed, 48);
    TestContext context(absl::Seconds(1));
    v1::OpenSequenceRequest request;
    request.set_model_digest(model_->digest().ToHex());
    v1::OpenSequenceResponse response;
    const absl::Status opened =
        FromGrpcStatus(client_->sequences().OpenSequence(&context, request, &response));
    ASSERT_TRUE(opened.ok()) << opened;
    v1::SequenceRef ref;
    ref.set_sequence_id(response.state().sequence_id());
    ref.set_epoch(response.state().epoch());
    v1::ReserveSlotsRequest reserve;
    *reserve.add_items()->mutable_sequence() = ref;
    reserve.mutable_items(0)->set_num_tokens(48);
    v1::ReserveSlotsResponse slots;
    TestContext reserve_context(absl::Seconds(1));
    refused = FromGrpcStatus(client_->sequences().ReserveSlots(&reserve_context, reserve, &slots));
    if (!refused.ok()) break;
    v1::AbortReservationRequest abort;
    abort.set_sequence_id(ref.sequence_id());
    abort.set_epoch(ref.epoch());
    abort.set_reservation_id(slots.slots(0).reservation_id());
    v1::AbortReservationResponse aborted;
    TestContext abort_context;
    ASSERT_TRUE(client_->sequences().AbortReservation(&abort_context, abort, &aborted).ok());
    const auto appended = client_->Append(response.state(), tokens, 48);
    ASSERT_TRUE(appended.ok()) << appended.status();
    open.emplace_back(appended->state(), tokens);
  }
  ExpectRefused(refused, absl::StatusCode::kResourceExhausted, "POOL_EXHAUSTED", "needed 3, free");
  EXPECT_TRUE(GetRetryDelay(refused).has_value());
  EXPECT_GE(open.size(), 4u);
  // Nothing that was acknowledged is lost, and the store still answers reads.
  for (const auto& [state, tokens] : open) {
    const auto bytes = client_->Verify(state.sequence_id(), tokens, 0, tokens.size());
    EXPECT_TRUE(bytes.ok()) << bytes.status();
  }
  for (const auto& [state, tokens] : open) EXPECT_TRUE(client_->Close(state).ok());
  ExpectRowsRight(held, kLength);
  // Room again: spilling resumes.
  ASSERT_EQ(store_->Terminate().value_or(-1), 0);
  ASSERT_NO_FATAL_FAILURE(StartStore());
  const std::vector<uint32_t> tokens = Tokens(200, 64);
  const auto fresh = OpenAndFill(tokens);
  ASSERT_TRUE(fresh.ok()) << fresh.status();
  uint64_t resident = 4;
  for (int i = 0; i < 500 && resident > 0; ++i) {  // after the back-offs of channel and spiller
    EvictAll();
    resident = client_->Get(fresh->sequence_id())->resident_pages();
    absl::SleepFor(absl::Milliseconds(20));
  }
  EXPECT_EQ(resident, 0u);
  const auto bytes = client_->Verify(fresh->sequence_id(), tokens, 0, 64);
  EXPECT_TRUE(bytes.ok()) << bytes.status();
}

// ---- budgets and configurations ----------------------------------------------------------------

TEST_F(BadInputTest, AFrameBudgetSmallerThanOnePageIsRefusedWithTheNumbers) {
  worker_->Kill();
  ASSERT_NO_FATAL_FAILURE(StartFleet(100));
  ExpectRefused(client_->Open({1, 2, 3}).status(), absl::StatusCode::kInvalidArgument,
                "POOL_TOO_SMALL", "100");
  ExpectRefused(client_->Open({1, 2, 3}).status(), absl::StatusCode::kInvalidArgument,
                "POOL_TOO_SMALL", "4096");
}

TEST_F(BadInputTest, APromptLargerThanEveryPoolIsRefusedAndNotRetried) {
  const Held held = Hold();  // the worker has its pool, and says so to the router
  const std::vector<uint32_t> tokens = Tokens(3, kFrames * 16 + 1);
  v1::AssignSequenceRequest assign;
  assign.mutable_prompt()->set_model(model_->digest().ToHex());
  assign.mutable_prompt()->mutable_tokens()->Add(tokens.begin(), tokens.end());
  absl::Status status;
  for (int i = 0; i < 500; ++i) {
    TestContext context;
    v1::AssignSequenceResponse assigned;
    status = FromGrpcStatus(router_stub_->AssignSequence(&context, assign, &assigned));
    if (absl::IsInvalidArgument(status)) break;  // the load report is there
    absl::SleepFor(absl::Milliseconds(10));
  }
  ExpectRefused(
      status, absl::StatusCode::kInvalidArgument, "POOL_TOO_SMALL",
      "a prompt of 257 tokens fits in none of 1 workers: w1 is too small: 256 tokens fit");
  EXPECT_FALSE(GetRetryDelay(status).has_value());
  // The worker itself says the same of an append that can never have its frames.
  const auto open = client_->Open({});
  ASSERT_TRUE(open.ok()) << open.status();
  ExpectRefused(client_->Append(open->state(), tokens, tokens.size()).status(),
                absl::StatusCode::kInvalidArgument, "POOL_TOO_SMALL", "needs 17, the pool has 16");
  ASSERT_TRUE(client_->Close(open->state()).ok());
  ExpectUnchanged(held);
}

TEST_F(BadInputTest, AnUnknownKeyInAConfigurationIsNamedWithItsLine) {
  for (const char* program : {"pagetide-worker", "pagetide-router"}) {
    const std::string path = dir_ / absl::StrCat(program, ".textproto");
    std::ofstream(path) << "# a comment\nlisten: \"127.0.0.1:0\"\nframe_budget: 3\n";
    const auto process =
        ChildProcess::Start({.program = program, .args = {absl::StrCat("--config=", path)}});
    EXPECT_EQ(process.status().code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(std::string(process.status().message()), HasSubstr(absl::StrCat(path, ":3:")));
    EXPECT_THAT(std::string(process.status().message()), HasSubstr("frame_budget"));
  }
}

}  // namespace
}  // namespace pagetide
