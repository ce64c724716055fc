#include "base/error_info.h"

#include <cstdint>

#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace pagetide {
namespace {

// Payload addresses inside one process; they never reach the wire.
constexpr absl::string_view kInfoUrl = "pagetide/error_info";
constexpr absl::string_view kDelayUrl = "pagetide/retry_delay_ns";

// A list of strings, each after its length as u32 LE: reason, domain, then key and value in turn.
void AppendString(std::string* out, absl::string_view s) {
  const auto n = static_cast<uint32_t>(s.size());
  for (int shift = 0; shift < 32; shift += 8) out->push_back(static_cast<char>(n >> shift));
  out->append(s.data(), s.size());
}

std::optional<std::string> TakeString(absl::string_view* in) {
  if (in->size() < 4) return std::nullopt;
  uint32_t n = 0;
  for (int i = 0; i < 4; ++i) n |= uint32_t{static_cast<uint8_t>((*in)[i])} << (8 * i);
  if (in->size() - 4 < n) return std::nullopt;
  std::string s(in->substr(4, n));
  in->remove_prefix(4 + n);
  return s;
}

}  // namespace

absl::Status WithErrorInfo(absl::Status status, const ErrorInfo& info) {
  if (status.ok()) return status;
  std::string payload;
  AppendString(&payload, info.reason);
  AppendString(&payload, info.domain);
  for (const auto& [key, value] : info.metadata) {
    AppendString(&payload, key);
    AppendString(&payload, value);
  }
  status.SetPayload(kInfoUrl, absl::Cord(std::move(payload)));
  return status;
}

absl::Status WithReason(absl::Status status, absl::string_view reason,
                        std::vector<std::pair<std::string, std::string>> metadata) {
  ErrorInfo info;
  info.reason = std::string(reason);
  info.metadata = std::move(metadata);
  return WithErrorInfo(std::move(status), info);
}

absl::Status WithRetryDelay(absl::Status status, absl::Duration delay) {
  if (status.ok()) return status;
  if (delay < absl::ZeroDuration()) delay = absl::ZeroDuration();
  status.SetPayload(kDelayUrl, absl::Cord(absl::StrCat(absl::ToInt64Nanoseconds(delay))));
  return status;
}

std::optional<ErrorInfo> GetErrorInfo(const absl::Status& status) {
  const absl::optional<absl::Cord> payload = status.GetPayload(kInfoUrl);
  if (!payload.has_value()) return std::nullopt;
  const std::string bytes(*payload);
  absl::string_view in = bytes;
  std::optional<std::string> reason = TakeString(&in);
  std::optional<std::string> domain = TakeString(&in);
  if (!reason.has_value() || !domain.has_value()) return std::nullopt;
  ErrorInfo info;
  info.reason = *std::move(reason);
  info.domain = *std::move(domain);
  while (!in.empty()) {
    std::optional<std::string> key = TakeString(&in);
    std::optional<std::string> value = TakeString(&in);
    if (!key.has_value() || !value.has_value()) return std::nullopt;
    info.metadata.emplace_back(*std::move(key), *std::move(value));
  }
  return info;
}

std::optional<absl::Duration> GetRetryDelay(const absl::Status& status) {
  const absl::optional<absl::Cord> payload = status.GetPayload(kDelayUrl);
  int64_t ns = 0;
  if (!payload.has_value() || !absl::SimpleAtoi(std::string(*payload), &ns)) return std::nullopt;
  return absl::Nanoseconds(ns);
}

std::string GetReason(const absl::Status& status) {
  std::optional<ErrorInfo> info = GetErrorInfo(status);
  return info.has_value() ? std::move(info->reason) : std::string();
}

std::string GetReasonMetadata(const absl::Status& status, absl::string_view key) {
  const std::optional<ErrorInfo> info = GetErrorInfo(status);
  if (info.has_value()) {
    for (const auto& [k, value] : info->metadata) {
      if (k == key) return value;
    }
  }
  return std::string();
}

}  // namespace pagetide
