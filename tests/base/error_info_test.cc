#include "base/error_info.h"

#include <gtest/gtest.h>

#include <string>

#include "base/status_context.h"

namespace pagetide {
namespace {

TEST(ErrorInfoTest, CarriesReasonMetadataAndDelay) {
  absl::Status status = WithReason(absl::AbortedError("lost a race"), error_reason::kPendingWrite,
                                   {{"page", "3f"}, {"odd", std::string("a\0b", 3)}, {"none", ""}});
  status = WithRetryDelay(status, absl::Milliseconds(40));
  EXPECT_EQ(status.code(), absl::StatusCode::kAborted);
  EXPECT_EQ(status.message(), "lost a race");
  EXPECT_EQ(GetReason(status), "PENDING_WRITE");
  EXPECT_EQ(GetErrorInfo(status)->domain, "pagetide");
  EXPECT_EQ(GetReasonMetadata(status, "page"), "3f");
  EXPECT_EQ(GetReasonMetadata(status, "odd"), std::string("a\0b", 3));
  EXPECT_EQ(GetReasonMetadata(status, "none"), "");
  EXPECT_EQ(GetReasonMetadata(status, "absent"), "");
  EXPECT_EQ(GetRetryDelay(status), absl::Milliseconds(40));
}

TEST(ErrorInfoTest, PlainStatusCarriesNothing) {
  EXPECT_FALSE(GetErrorInfo(absl::InternalError("x")).has_value());
  EXPECT_FALSE(GetRetryDelay(absl::InternalError("x")).has_value());
  EXPECT_EQ(GetReason(absl::OkStatus()), "");
}

TEST(ErrorInfoTest, OkStaysOk) {
  EXPECT_EQ(WithReason(absl::OkStatus(), "R"), absl::OkStatus());
  EXPECT_EQ(WithRetryDelay(absl::OkStatus(), absl::Seconds(1)), absl::OkStatus());
}

TEST(ErrorInfoTest, LaterReasonReplacesAndNegativeDelayIsZero) {
  absl::Status status = WithReason(absl::InternalError("x"), "FIRST");
  status = WithReason(status, "SECOND");
  EXPECT_EQ(GetReason(status), "SECOND");
  EXPECT_EQ(GetRetryDelay(WithRetryDelay(status, -absl::Seconds(1))), absl::ZeroDuration());
}

TEST(ErrorInfoTest, ContextKeepsReasonAndDelay) {
  const absl::Status status = WithRetryDelay(
      WithReason(absl::AbortedError("lost a race"), "RACE", {{"page", "3f"}}), absl::Seconds(2));
  const absl::Status said = WithContext("edits[3]", status);
  EXPECT_EQ(said.code(), absl::StatusCode::kAborted);
  EXPECT_EQ(said.message(), "edits[3]: lost a race");
  EXPECT_EQ(GetReason(said), "RACE");
  EXPECT_EQ(GetReasonMetadata(said, "page"), "3f");
  EXPECT_EQ(GetRetryDelay(said), absl::Seconds(2));
  EXPECT_EQ(WithContext("x", absl::OkStatus()), absl::OkStatus());
}

}  // namespace
}  // namespace pagetide
