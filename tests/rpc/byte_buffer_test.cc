// The bulk codec against protobuf itself: both directions, any slicing, hostile bytes.
#include "rpc/byte_buffer.h"

#include <google/protobuf/util/field_comparator.h>
#include <google/protobuf/util/message_differencer.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <future>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "rpc/channel.h"
#include "rpc/server.h"
#include "tests/rpc/echo.grpc.pb.h"
#include "tests/rpc/echo_service.h"

namespace pagetide {
namespace {

using ::google::protobuf::util::MessageDifferencer;
using test::EchoRequest;

constexpr int kPayload = EchoRequest::kPayloadFieldNumber;

std::span<const std::byte> BytesOf(const std::string& s) {
  return {reinterpret_cast<const std::byte*>(s.data()), s.size()};
}

std::string Flatten(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  EXPECT_TRUE(buffer.Dump(&slices).ok());
  std::string all;
  for (const grpc::Slice& s : slices)
    all.append(reinterpret_cast<const char*>(s.begin()), s.size());
  return all;
}

// `bytes` in slices of random sizes, empty ones among them.
grpc::ByteBuffer Sliced(const std::string& bytes, std::mt19937_64& random) {
  std::vector<grpc::Slice> slices;
  for (size_t at = 0; at < bytes.size();) {
    const size_t n = std::min<size_t>(random() % 40, bytes.size() - at);
    slices.emplace_back(bytes.data() + at, n);
    at += n;
  }
  return grpc::ByteBuffer(slices.data(), slices.size());
}

std::string RandomBytes(size_t n, std::mt19937_64& random) {
  std::string s(n, '\0');
  for (char& c : s) c = static_cast<char>(random());
  return s;
}

EchoRequest RandomHeader(std::mt19937_64& random, int depth = 0) {
  EchoRequest m;
  if (random() % 2) m.set_text(std::string(random() % 50, 'x'));
  for (int i = random() % 20; i > 0; --i) m.add_numbers(static_cast<uint32_t>(random()));
  if (random() % 2) m.set_fail_code(static_cast<int32_t>(random()));
  if (random() % 2) m.set_retry_delay_ms(static_cast<int64_t>(random()));
  if (random() % 2) (*m.mutable_labels())["k"] = "v";
  if (random() % 2) m.set_signed_number(static_cast<int64_t>(random()));
  if (random() % 2) m.set_small(static_cast<uint32_t>(random()));
  if (random() % 2) m.set_ratio(1.5);
  if (depth < 2 && random() % 3 == 0) *m.mutable_nested() = RandomHeader(random, depth + 1);
  return m;
}

TEST(ByteBufferTest, ProtobufReadsWhatWeWrite) {
  std::mt19937_64 random(1);
  for (int round = 0; round < 2000; ++round) {
    EchoRequest header = RandomHeader(random);
    const std::string payload = RandomBytes(random() % 600, random);
    EchoRequest parsed;
    ASSERT_TRUE(
        parsed.ParseFromString(Flatten(EncodeWithPayload(header, kPayload, BytesOf(payload)))))
        << "round " << round;
    header.set_payload(payload);
    ASSERT_TRUE(MessageDifferencer::Equals(parsed, header)) << "round " << round;
  }
}

TEST(ByteBufferTest, ProtobufReadsAPayloadOneLevelDown) {
  std::mt19937_64 random(11);
  for (int round = 0; round < 500; ++round) {
    EchoRequest outer;
    EchoRequest& inner = *outer.mutable_nested() = RandomHeader(random);
    const std::string payload = RandomBytes(random() % 600, random);
    const grpc::Slice halves[] = {
        grpc::Slice(payload.data(), payload.size() / 2),
        grpc::Slice(payload.data() + payload.size() / 2, payload.size() - payload.size() / 2)};
    EchoRequest parsed;
    ASSERT_TRUE(parsed.ParseFromString(
        Flatten(EncodeNestedPayload(EchoRequest::kNestedFieldNumber, inner, kPayload, halves))))
        << "round " << round;
    inner.set_payload(payload);
    ASSERT_TRUE(MessageDifferencer::Equals(parsed, outer)) << "round " << round;
  }
}

TEST(ByteBufferTest, WeReadWhatProtobufWrites) {
  std::mt19937_64 random(2);
  for (int round = 0; round < 2000; ++round) {
    EchoRequest message = RandomHeader(random);
    message.set_payload(RandomBytes(random() % 600, random));
    EchoRequest header;
    PayloadView payload;
    const absl::Status status =
        DecodeWithPayload(Sliced(message.SerializeAsString(), random), kPayload, &header, &payload);
    ASSERT_TRUE(status.ok()) << status << " round " << round;
    ASSERT_EQ(payload.ToString(), message.payload());
    std::vector<std::byte> copy(payload.size());
    ASSERT_TRUE(payload.CopyTo(copy).ok());
    ASSERT_TRUE(std::ranges::equal(copy, BytesOf(message.payload())));
    message.clear_payload();
    ASSERT_TRUE(MessageDifferencer::Equals(header, message)) << "round " << round;
  }
}

// Whatever we accept, protobuf accepts with the same meaning; what protobuf refuses, we refuse.
TEST(ByteBufferTest, NeverDisagreesWithProtobufOnDamagedBytes) {
  std::mt19937_64 random(3);
  int accepted = 0, refused = 0;
  for (int round = 0; round < 50000; ++round) {
    EchoRequest message = RandomHeader(random);
    if (random() % 4) message.set_payload(RandomBytes(random() % 200, random));
    std::string bytes = message.SerializeAsString();
    if (random() % 5 == 0) bytes += message.SerializeAsString();  // every field twice
    for (int hits = random() % 4; hits > 0 && !bytes.empty(); --hits) {
      switch (random() % 4) {
        case 0:
          bytes[random() % bytes.size()] = static_cast<char>(random());
          break;
        case 1:
          bytes.resize(random() % bytes.size());
          break;
        case 2:
          bytes.insert(random() % bytes.size(), 1, static_cast<char>(random()));
          break;
        default:
          bytes.erase(random() % bytes.size(), 1 + random() % 3);
      }
    }
    EchoRequest header, expected;
    PayloadView payload;
    const bool ours = DecodeWithPayload(Sliced(bytes, random), kPayload, &header, &payload).ok();
    const bool theirs = expected.ParseFromString(bytes);
    if (ours) {
      ++accepted;
      ASSERT_TRUE(theirs) << "round " << round;
      header.set_payload(payload.ToString());
      MessageDifferencer differencer;  // unknown fields count; NaN equals NaN
      google::protobuf::util::DefaultFieldComparator comparator;
      comparator.set_treat_nan_as_equal(true);
      differencer.set_field_comparator(&comparator);
      ASSERT_TRUE(differencer.Compare(header, expected)) << "round " << round;
    } else {
      ++refused;
    }
  }
  EXPECT_GT(accepted, 5000);
  EXPECT_GT(refused, 5000);
}

TEST(ByteBufferTest, RefusesHostileBytes) {
  const std::string kTag = "\x1a";  // field 3, length-delimited
  const struct {
    const char* what;
    std::string bytes;
  } kCases[] = {
      {"tag without an end", "\xff\xff\xff"},
      {"tag of six bytes", "\x9a\x80\x80\x80\x80\x00"},
      {"field number 0", std::string("\x02\x00", 2)},
      {"length without an end", kTag + "\xff"},
      {"length beyond the end", kTag + "\x05" + "abcd"},
      {"length of 2 GiB", kTag + "\xff\xff\xff\xff\x07"},
      {"length of 2^64 - 1", kTag + "\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"},
      {"length in six bytes", kTag + std::string("\x81\x80\x80\x80\x80\x00"
                                                 "a",
                                                 7)},
      {"varint of eleven bytes", "\x20" + std::string(10, '\xff') + "\x01"},
      {"fixed64 cut off", "\x59" + std::string(7, 'x')},
      {"fixed32 cut off", "\x55xxx"},
      {"group", "\x1b\x1c"},
      {"wire type 6", "\x1e"},
      {"wire type 7", "\x1f"},
      {"text that is not UTF-8", "\x0a\x02\xff\xfe"},
      {"nested message cut off", "\x42\x02\x0a\x05"},
  };
  std::mt19937_64 random(4);
  for (const auto& c : kCases) {
    EchoRequest header;
    PayloadView payload;
    EXPECT_EQ(DecodeWithPayload(Sliced(c.bytes, random), kPayload, &header, &payload).code(),
              absl::StatusCode::kInvalidArgument)
        << c.what;
  }
}

TEST(ByteBufferTest, RepeatedPayloadLastOneWins) {
  EchoRequest a, b;
  a.set_payload("first");
  b.set_payload("second");
  std::mt19937_64 random(5);
  EchoRequest header;
  PayloadView payload;
  ASSERT_TRUE(DecodeWithPayload(Sliced(a.SerializeAsString() + b.SerializeAsString(), random),
                                kPayload, &header, &payload)
                  .ok());
  EXPECT_EQ(payload.ToString(), "second");
}

TEST(ByteBufferTest, EmptyBufferIsAnEmptyMessage) {
  EchoRequest header;
  header.set_text("old");
  PayloadView payload;
  payload.Append(grpc::Slice(std::string("old")));
  ASSERT_TRUE(DecodeWithPayload(grpc::ByteBuffer(), kPayload, &header, &payload).ok());
  EXPECT_EQ(header.ByteSizeLong(), 0u);
  EXPECT_TRUE(payload.empty());
  EXPECT_EQ(Flatten(EncodeWithPayload(EchoRequest(), kPayload, std::span<const std::byte>())), "");
}

TEST(ByteBufferTest, CopyToRefusesAnotherSize) {
  PayloadView payload;
  payload.Append(grpc::Slice(std::string("abc")));
  std::vector<std::byte> out(4, std::byte{9});
  EXPECT_EQ(payload.CopyTo(out).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(out[0], std::byte{9});
}

TEST(ByteBufferTest, PayloadIsNotCopied) {
  const std::string bytes(1 << 20, 'p');
  const grpc::Slice lent = LendSlice(BytesOf(bytes), std::unique_ptr<int>());
  const grpc::ByteBuffer buffer = EncodeWithPayload(EchoRequest(), kPayload, lent);
  EchoRequest header;
  PayloadView payload;
  ASSERT_TRUE(DecodeWithPayload(buffer, kPayload, &header, &payload).ok());
  ASSERT_EQ(payload.num_pieces(), 1u);
  EXPECT_EQ(static_cast<const void*>(payload.piece(0).data()), bytes.data());
}

// Raw on both sides of a real connection, with a plain protobuf peer on the other.
class RawEchoService final
    : public test::EchoService::WithRawCallbackMethod_Echo<test::EchoService::Service> {
 public:
  grpc::ServerUnaryReactor* Echo(grpc::CallbackServerContext* context,
                                 const grpc::ByteBuffer* request,
                                 grpc::ByteBuffer* response) override {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    EchoRequest header;
    PayloadView payload;
    const absl::Status status = DecodeWithPayload(*request, kPayload, &header, &payload);
    if (status.ok()) {
      auto body = std::make_shared<std::string>(payload.ToString());
      test::EchoResponse answer;
      answer.set_text(header.text());
      *response = EncodeWithPayload(answer, test::EchoResponse::kPayloadFieldNumber,
                                    LendSlice(BytesOf(*body), body));
    }
    reactor->Finish(ToGrpcStatus(status));
    return reactor;
  }
};

TEST(ByteBufferTest, RawHandlerServesPlainClientAndGivesLentMemoryBack) {
  RawEchoService service;
  auto server = RpcServer::Create({}, {&service}, std::make_shared<PrometheusMetrics>());
  ASSERT_TRUE(server.ok()) << server.status();
  auto channel = MakeChannel((*server)->addresses()[0]);
  auto stub = test::EchoService::NewStub(channel);
  EchoRequest request;
  request.set_text("page");
  request.set_payload(std::string(kMaxPayloadBytes, 'k'));
  {
    grpc::ClientContext context;
    test::EchoResponse response;
    const grpc::Status status = stub->Echo(&context, request, &response);
    ASSERT_TRUE(status.ok()) << status.error_message();
    EXPECT_EQ(response.text(), "page");
    EXPECT_EQ(response.payload(), request.payload());
  }
  request.set_payload(std::string(kMaxMessageBytes, 'k'));
  grpc::ClientContext context;
  test::EchoResponse response;
  EXPECT_EQ(stub->Echo(&context, request, &response).error_code(),
            grpc::StatusCode::RESOURCE_EXHAUSTED)
      << "a message beyond the limit is refused";
}

TEST(ByteBufferTest, RawClientCallsPlainServerAndItsLentMemoryComesBack) {
  EchoServiceImpl service;
  auto server = RpcServer::Create({}, {&service}, std::make_shared<PrometheusMetrics>());
  ASSERT_TRUE(server.ok()) << server.status();
  grpc::GenericStub stub(MakeChannel((*server)->addresses()[0]));
  auto body = std::make_shared<std::string>(2 << 20, 'v');
  std::weak_ptr<std::string> watch = body;
  const std::string expected = *body;
  EchoRequest header;
  header.set_text("raw");
  grpc::ByteBuffer request, response;
  {
    const auto bytes = BytesOf(*body);
    request = EncodeWithPayload(header, kPayload, LendSlice(bytes, std::move(body)));
  }
  EXPECT_FALSE(watch.expired());
  grpc::ClientContext context;
  std::promise<grpc::Status> done;
  stub.UnaryCall(&context, "/pagetide.test.EchoService/Echo", {}, &request, &response,
                 [&](grpc::Status s) { done.set_value(std::move(s)); });
  const grpc::Status status = done.get_future().get();
  ASSERT_TRUE(status.ok()) << status.error_message();
  test::EchoResponse answer;
  PayloadView payload;
  ASSERT_TRUE(
      DecodeWithPayload(response, test::EchoResponse::kPayloadFieldNumber, &answer, &payload).ok());
  EXPECT_EQ(answer.text(), "raw");
  EXPECT_EQ(payload.ToString(), expected);
  request.Clear();
  EXPECT_TRUE(watch.expired()) << "the lent memory is still held after the call";
}

}  // namespace
}  // namespace pagetide
