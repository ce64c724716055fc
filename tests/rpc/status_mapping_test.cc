#include "rpc/status_mapping.h"

#include <gtest/gtest.h>

#include <string>
#include <utility>

#include "base/error_info.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "rpc/duration_proto.h"

namespace pagetide {
namespace {

TEST(StatusMappingTest, EveryCodeGoesThereAndBack) {
  EXPECT_TRUE(ToGrpcStatus(absl::OkStatus()).ok());
  EXPECT_TRUE(FromGrpcStatus(grpc::Status::OK).ok());
  for (int code = 1; code <= 16; ++code) {
    const absl::Status status(static_cast<absl::StatusCode>(code), "restore page 3f2a: lost");
    const grpc::Status outside = ToGrpcStatus(status);
    EXPECT_EQ(static_cast<int>(outside.error_code()), code);
    EXPECT_TRUE(outside.error_details().empty());
    EXPECT_EQ(FromGrpcStatus(outside), status);
  }
}

TEST(StatusMappingTest, ReasonAndDelayGoThereAndBack) {
  absl::Status status = absl::ResourceExhaustedError("open sequence: 12 frames needed, 3 free");
  status = WithReason(status, error_reason::kPoolExhausted,
                      {{"evictable", "2"}, {"free", "3"}, {"needed", "12"}});
  status = WithRetryDelay(status, absl::Milliseconds(2250));
  const absl::Status back = FromGrpcStatus(ToGrpcStatus(status));
  EXPECT_EQ(back.code(), status.code());
  EXPECT_EQ(back.message(), status.message());
  EXPECT_EQ(GetErrorInfo(back), GetErrorInfo(status));
  EXPECT_EQ(GetRetryDelay(back), absl::Milliseconds(2250));
}

// What a client in another language sees with its standard library.
TEST(StatusMappingTest, DetailsAreGoogleRpcStatus) {
  const grpc::Status outside = ToGrpcStatus(
      WithReason(absl::FailedPreconditionError("moved"), "SEQUENCE_MOVED", {{"address", "h:1"}}));
  google::rpc::Status details;
  ASSERT_TRUE(details.ParseFromString(outside.error_details()));
  EXPECT_EQ(details.code(), 9);
  EXPECT_EQ(details.message(), "moved");
  ASSERT_EQ(details.details_size(), 1);
  EXPECT_EQ(details.details(0).type_url(), "type.googleapis.com/google.rpc.ErrorInfo");
  google::rpc::ErrorInfo info;
  ASSERT_TRUE(details.details(0).UnpackTo(&info));
  EXPECT_EQ(info.reason(), "SEQUENCE_MOVED");
  EXPECT_EQ(info.domain(), "pagetide");
  EXPECT_EQ(info.metadata().at("address"), "h:1");
}

TEST(StatusMappingTest, LongTextsAreCutToFitTheMetadataLimit) {
  absl::Status status = absl::InternalError(std::string(100000, 'm'));
  std::vector<std::pair<std::string, std::string>> metadata;
  for (int i = 0; i < 1000; ++i) metadata.emplace_back("key" + std::to_string(i), "value");
  const grpc::Status outside = ToGrpcStatus(WithReason(status, "LONG", metadata));
  EXPECT_EQ(outside.error_message().size(), kMaxStatusMessageBytes);
  EXPECT_LT(outside.error_details().size(), kMaxStatusDetailBytes + 512);
  EXPECT_EQ(GetReason(FromGrpcStatus(outside)), "LONG");
}

TEST(StatusMappingTest, TextThatIsNotUtf8IsMadeSo) {
  const std::string good = "p\xC3\xA4ge \xE2\x82\xAC \xF0\x9F\x8C\x8A";
  EXPECT_EQ(ToGrpcStatus(absl::InternalError(good)).error_message(), good);
  const struct {
    std::string in, out;
  } kCases[] = {{"a\xFF"
                 "b",
                 "a?b"},
                {"cut \xE2\x82", "cut ??"},
                {"overlong \xC0\xAF", "overlong ??"},
                {"overlong \xE0\x80\xAF", "overlong ???"},
                {"surrogate \xED\xA0\x80", "surrogate ???"},
                {"beyond \xF4\x90\x80\x80", "beyond ????"}};
  for (const auto& c : kCases) {
    const grpc::Status outside = ToGrpcStatus(WithReason(absl::InternalError(c.in), "R"));
    EXPECT_EQ(outside.error_message(), c.out);
    google::rpc::Status details;
    EXPECT_TRUE(details.ParseFromString(outside.error_details())) << c.out;
  }
  // A cut never falls into the middle of a character.
  const std::string euros = "x" + std::string(kMaxStatusMessageBytes - 2, 'y') + "\xE2\x82\xAC";
  EXPECT_EQ(ToGrpcStatus(absl::InternalError(euros)).error_message().size(),
            kMaxStatusMessageBytes - 1);
}

TEST(StatusMappingTest, StrangeDetailsAreIgnored) {
  EXPECT_EQ(FromGrpcStatus(grpc::Status(grpc::StatusCode::NOT_FOUND, "m", "\xFF not a proto")),
            absl::NotFoundError("m"));
  EXPECT_EQ(FromGrpcStatus(grpc::Status(grpc::StatusCode::DO_NOT_USE, "m")).code(),
            absl::StatusCode::kUnknown);
}

TEST(DurationProtoTest, SecondsAndNanosecondsHaveOneSign) {
  const auto parts = [](absl::Duration duration) {
    const google::protobuf::Duration proto = DurationToProto(duration);
    return std::pair(proto.seconds(), proto.nanos());
  };
  EXPECT_EQ(parts(absl::ZeroDuration()), std::pair(int64_t{0}, 0));
  EXPECT_EQ(parts(absl::Milliseconds(2500)), std::pair(int64_t{2}, 500'000'000));
  EXPECT_EQ(parts(-absl::Milliseconds(2500)), std::pair(int64_t{-2}, -500'000'000));
}

}  // namespace
}  // namespace pagetide
