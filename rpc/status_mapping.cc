#include "rpc/status_mapping.h"

#include <algorithm>
#include <string>

#include "absl/strings/string_view.h"
#include "base/error_info.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "rpc/duration_proto.h"

namespace pagetide {
namespace {

// Cuts at `max_bytes` and replaces every byte that is not part of well-formed UTF-8 by '?':
// protobuf parsers of other languages refuse a string field that is not UTF-8. Source of the rules:
// RFC 3629.
std::string CleanText(absl::string_view in, size_t max_bytes) {
  std::string out;
  for (size_t i = 0; i < in.size();) {
    const auto byte = [&](size_t at) { return static_cast<uint8_t>(in[at]); };
    const uint8_t lead = byte(i);
    size_t n = lead < 0x80 ? 1 : lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
    bool good = lead < 0x80 || (lead >= 0xC2 && lead <= 0xF4 && i + n <= in.size());
    for (size_t k = 1; good && k < n; ++k) good = (byte(i + k) & 0xC0) == 0x80;
    if (good && n > 2) {  // overlong forms, surrogates, beyond U+10FFFF
      const uint8_t second = byte(i + 1);
      if (lead == 0xE0) good = second >= 0xA0;
      if (lead == 0xED) good = second < 0xA0;
      if (lead == 0xF0) good = second >= 0x90;
      if (lead == 0xF4) good = second < 0x90;
    }
    if (!good) n = 1;
    if (out.size() + n > max_bytes) break;
    out.append(good ? in.substr(i, n).data() : "?", n);
    i += n;
  }
  return out;
}

}  // namespace

grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  const auto code = static_cast<grpc::StatusCode>(status.code());
  const std::string message = CleanText(status.message(), kMaxStatusMessageBytes);
  const std::optional<ErrorInfo> info = GetErrorInfo(status);
  const std::optional<absl::Duration> delay = GetRetryDelay(status);
  if (!info.has_value() && !delay.has_value()) return grpc::Status(code, message);

  google::rpc::Status details;
  details.set_code(code);
  details.set_message(message);
  if (delay.has_value()) {
    google::rpc::RetryInfo retry;
    *retry.mutable_retry_delay() = DurationToProto(*delay);
    details.add_details()->PackFrom(retry);
  }
  if (info.has_value()) {
    google::rpc::ErrorInfo error;
    error.set_reason(CleanText(info->reason, 63));
    error.set_domain(CleanText(info->domain, 63));
    size_t left = kMaxStatusDetailBytes - message.size();
    for (const auto& [key, value] : info->metadata) {
      const size_t size = key.size() + value.size() + 16;
      if (size > left) continue;
      left -= size;
      (*error.mutable_metadata())[CleanText(key, key.size())] = CleanText(value, value.size());
    }
    details.add_details()->PackFrom(error);
  }
  return grpc::Status(code, message, details.SerializeAsString());
}

absl::Status FromGrpcStatus(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  const int code = status.error_code();
  absl::Status result(
      code >= 1 && code <= 16 ? static_cast<absl::StatusCode>(code) : absl::StatusCode::kUnknown,
      status.error_message());
  google::rpc::Status details;
  if (status.error_details().empty() || !details.ParseFromString(status.error_details())) {
    return result;
  }
  for (const google::protobuf::Any& any : details.details()) {
    google::rpc::ErrorInfo error;
    google::rpc::RetryInfo retry;
    if (any.UnpackTo(&error)) {
      ErrorInfo info;
      info.reason = error.reason();
      info.domain = error.domain();
      info.metadata.assign(error.metadata().begin(), error.metadata().end());
      std::sort(info.metadata.begin(), info.metadata.end());  // a protobuf map has no order
      result = WithErrorInfo(std::move(result), info);
    } else if (any.UnpackTo(&retry)) {
      result =
          WithRetryDelay(std::move(result), absl::Seconds(retry.retry_delay().seconds()) +
                                                absl::Nanoseconds(retry.retry_delay().nanos()));
    }
  }
  return result;
}

}  // namespace pagetide
