#include "kvstore/retention.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/little_endian.h"

namespace pagetide {
namespace {

constexpr uint8_t kVersion = 1;
constexpr uint8_t kExpires = 1;
constexpr uint8_t kPinned = 2;

uint64_t NanosOf(const std::optional<absl::Time>& t) {
  return t.has_value() ? static_cast<uint64_t>(absl::ToUnixNanos(*t)) : 0;
}
absl::Time TimeOf(uint64_t nanos) {
  return absl::FromUnixNanos(static_cast<int64_t>(nanos));
}

}  // namespace

absl::Status ValidateRetention(const Retention& retention, absl::Time wall_now) {
  if (retention.priority > kMaxPriority) {
    return absl::InvalidArgumentError(absl::StrCat("retention.priority is ", retention.priority,
                                                   ", allowed are 0 to ", kMaxPriority));
  }
  if (retention.pinned_until.has_value() && *retention.pinned_until > wall_now + kMaxPinTime) {
    return absl::InvalidArgumentError(absl::StrCat(
        "retention.pinned_until is ",
        absl::FormatTime(*retention.pinned_until, absl::UTCTimeZone()), ", at most ",
        absl::FormatDuration(kMaxPinTime), " after now, ",
        absl::FormatTime(wall_now, absl::UTCTimeZone()), ": a manifest keeps pages without end"));
  }
  return absl::OkStatus();
}

std::string EncodeRetention(const Retention& retention) {
  std::string out;
  AppendLittleEndian<uint8_t>(&out, kVersion);
  AppendLittleEndian<uint8_t>(
      &out, static_cast<uint8_t>((retention.expires_at.has_value() ? kExpires : 0) |
                                 (retention.pinned_until.has_value() ? kPinned : 0)));
  AppendLittleEndian<uint32_t>(&out, retention.priority);
  AppendLittleEndian<uint64_t>(&out, NanosOf(retention.expires_at));
  AppendLittleEndian<uint64_t>(&out, NanosOf(retention.pinned_until));
  return out;
}

absl::StatusOr<Retention> ParseRetention(absl::string_view bytes) {
  LittleEndianReader in(bytes);
  const uint8_t version = in.Take<uint8_t>();
  const uint8_t flags = in.Take<uint8_t>();
  Retention retention;
  retention.priority = std::min(in.Take<uint32_t>(), kMaxPriority);
  const uint64_t expires_at = in.Take<uint64_t>();
  const uint64_t pinned_until = in.Take<uint64_t>();
  if (in.ok() && version != kVersion) {
    return absl::UnimplementedError(absl::StrCat("retention: version ", version));
  }
  if (!in.ok() || !in.rest().empty()) {
    return absl::DataLossError(absl::StrCat("retention: ", bytes.size(), " bytes"));
  }
  if ((flags & kExpires) != 0) retention.expires_at = TimeOf(expires_at);
  if ((flags & kPinned) != 0) retention.pinned_until = TimeOf(pinned_until);
  return retention;
}

TwoClockEnd TwoClockEnd::OfNewManifest(const ManifestRecord& manifest, const Clock& clock) {
  const absl::Time end = *manifest.expires_at;
  absl::Duration left = end - clock.WallNow();
  if (manifest.saved_at != absl::UnixEpoch()) left = std::max(left, end - manifest.saved_at);
  return TwoClockEnd(end, left, clock, absl::ZeroDuration());
}

void ExpiryList::Set(absl::string_view name, std::optional<TwoClockEnd> end) {
  MutexLock lock(&mu_);
  if (end.has_value()) {
    ends_.insert_or_assign(std::string(name), *end);
  } else {
    ends_.erase(name);
  }
}

std::vector<std::string> ExpiryList::Passed(const Clock& clock) const {
  std::vector<std::string> names;
  MutexLock lock(&mu_);
  for (const auto& [name, end] : ends_) {
    if (end.HasPassed(clock)) names.push_back(name);
  }
  return names;
}

bool ExpiryList::HasPassed(absl::string_view name, const Clock& clock) const {
  MutexLock lock(&mu_);
  const auto it = ends_.find(name);
  return it != ends_.end() && it->second.HasPassed(clock);
}

}  // namespace pagetide
