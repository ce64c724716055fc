// Bad input: token ids, counts that disagree with the bytes, streams that are cut.
#include <grpcpp/generic/generic_stub.h>

#include "kvstore/remote_page_store.h"
#include "pagetide/v1/page_store.grpc.pb.h"
#include "tests/contract/test_page.h"
#include "tests/integration/bad_input_fixture.h"
#include "tests/support/cutting_proxy.h"

namespace pagetide::testing {
namespace {

using ::testing::HasSubstr;

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
    ASSERT_TRUE(
        Eventually([&] { return client_->Get(held.state.sequence_id())->pending_tokens() == 50; }));
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
    ASSERT_TRUE(
        Eventually([&] { return client_->Get(held.state.sequence_id())->pending_tokens() == 0; }));
  }
  ExpectUnchanged(held);
}

}  // namespace
}  // namespace pagetide::testing
