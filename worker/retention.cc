#include "worker/retention.h"

#include <cstring>
#include <map>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/little_endian.h"
#include "base/status_macros.h"
#include "worker/manifest_races.h"

namespace pagetide {
namespace {

constexpr uint16_t kSummaryVersion = 1;
constexpr size_t kDigestBytes = 32;
constexpr size_t kMaxRanges = 64;

std::string PinNamePrefix(const Tenant& tenant) {
  return absl::StrCat("pin/", tenant.name, "/");
}

absl::Status PinNotFound(absl::string_view name) {
  return WithReason(absl::NotFoundError(absl::StrCat("there is no pin ", name)), "PIN_NOT_FOUND");
}

absl::Status CheckTtl(absl::string_view field, const std::optional<absl::Duration>& ttl) {
  if (!ttl || (*ttl > absl::ZeroDuration() && *ttl <= kMaxPinTime)) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(field, " is ", absl::FormatDuration(*ttl),
                                                 ", must be above 0 and at most ",
                                                 absl::FormatDuration(kMaxPinTime)));
}

// The end of `range` in a sequence of `length` tokens.
absl::StatusOr<uint64_t> EndOf(absl::string_view field, const TokenRange& range, uint64_t length) {
  const uint64_t end = range.end.value_or(length);
  if (end > length || range.begin >= end) {
    return absl::InvalidArgumentError(
        absl::StrCat(field, " is tokens [", range.begin, ", ", end,
                     "), must be at least one token and end by the committed length ", length));
  }
  return end;
}

std::string FieldOf(size_t i) {
  return absl::StrCat("ranges[", i, "]");
}

absl::Status CheckRanges(std::span<const RangeRetention> ranges) {
  if (ranges.empty() || ranges.size() > kMaxRanges) {
    return absl::InvalidArgumentError(
        absl::StrCat("ranges has ", ranges.size(), " entries, must have 1 to ", kMaxRanges));
  }
  for (size_t i = 0; i < ranges.size(); ++i) {
    if (ranges[i].priority > kMaxPriority) {
      return absl::InvalidArgumentError(absl::StrCat(
          FieldOf(i), ".priority is ", ranges[i].priority, ", allowed are 0 to ", kMaxPriority));
    }
    PT_RETURN_IF_ERROR(CheckTtl(absl::StrCat(FieldOf(i), ".ttl"), ranges[i].ttl));
  }
  return absl::OkStatus();
}

void AppendDigest(std::string* out, const Digest& digest) {
  out->append(digest.view().data(), digest.view().size());
}

Digest TakeDigest(LittleEndianReader& in) {
  Digest digest;
  const absl::string_view raw = in.TakeBytes(kDigestBytes);
  if (!raw.empty()) std::memcpy(digest.bytes.data(), raw.data(), raw.size());
  return digest;
}

absl::StatusOr<Pin> PinOf(const std::string& root, const ManifestEntry& entry) {
  PT_ASSIGN_OR_RETURN(const PinSummary summary, ParsePinSummary(entry.summary));
  return Pin{.name = entry.name.substr(root.size()),
             .num_pages = entry.num_pages,
             .pinned_at = entry.saved_at,
             .expires_at = entry.expires_at,
             .summary = summary};
}

// The entries of `pages` that are named: those of selected rows.
std::vector<ManifestPageRef> Named(const std::vector<ManifestPageRef>& pages) {
  std::vector<ManifestPageRef> named;
  for (const ManifestPageRef& page : pages) {
    if (page.key != PageKey()) named.push_back(page);
  }
  return named;
}

}  // namespace

std::string EncodePinSummary(const PinSummary& summary) {
  std::string out;
  AppendLittleEndian<uint16_t>(&out, kSummaryVersion);
  AppendLittleEndian<uint64_t>(&out, summary.begin);
  AppendLittleEndian<uint64_t>(&out, summary.end);
  AppendLittleEndian<uint64_t>(&out, summary.bytes);
  AppendLittleEndian<uint64_t>(&out, summary.pages_written);
  AppendLittleEndian<uint64_t>(&out, summary.bytes_written);
  AppendDigest(&out, summary.model_digest);
  AppendDigest(&out, summary.request_digest);
  return out;
}

absl::StatusOr<PinSummary> ParsePinSummary(absl::string_view bytes) {
  LittleEndianReader in(bytes);
  const uint16_t version = in.Take<uint16_t>();
  if (in.ok() && version != kSummaryVersion) {
    return absl::UnimplementedError(absl::StrCat("read a pin: version ", version));
  }
  PinSummary summary;
  summary.begin = in.Take<uint64_t>();
  summary.end = in.Take<uint64_t>();
  summary.bytes = in.Take<uint64_t>();
  summary.pages_written = in.Take<uint64_t>();
  summary.bytes_written = in.Take<uint64_t>();
  summary.model_digest = TakeDigest(in);
  summary.request_digest = TakeDigest(in);
  if (!in.ok() || !in.rest().empty()) {
    return absl::DataLossError(
        absl::StrCat("read a pin: its summary has ", bytes.size(), " bytes"));
  }
  return summary;
}

Retentions::Retentions(Worker* worker, PageStore* store, WorkerFence* fence)
    : worker_(worker), store_(store), fence_(fence) {}

absl::Status Retentions::CheckStore() const {
  if (store_ != nullptr && fence_ != nullptr) return absl::OkStatus();
  return WithReason(absl::FailedPreconditionError("retention: this worker has no store"),
                    "NO_STORE");
}

void Retentions::Count(absl::string_view operation, const absl::Status& status) const {
  std::string reason = "OK";
  if (!status.ok()) {
    reason = GetReason(status);
    if (reason.empty()) reason = absl::StatusCodeToString(status.code());
  }
  worker_->metrics()
      .GetCounter("pagetide_retention_calls_total", "Retentions, pins and unpins by their outcome",
                  {{"operation", std::string(operation)}, {"outcome", reason}})
      ->Increment();
}

absl::StatusOr<ManifestEntry> Retentions::Stat(const std::string& manifest,
                                               MonotonicTime deadline) {
  // The exact name is the first that begins with it.
  PT_ASSIGN_OR_RETURN(std::vector<ManifestEntry> found,
                      store_->ListManifests(manifest, "", 1, deadline));
  if (!found.empty() && found.front().name == manifest) return std::move(found.front());
  return ManifestEntry{.name = manifest};
}

// ---- retention ---------------------------------------------------------------------------------

absl::StatusOr<RetentionAnswer> Retentions::SetPages(StateSnapshot& snapshot,
                                                     std::span<const RangeRetention> ranges,
                                                     const WriteFence& fence,
                                                     MonotonicTime deadline) {
  const SessionState& state = snapshot.state();
  // By page of the state; where ranges meet in a page, the higher priority and then the longer
  // time.
  std::map<uint32_t, const RangeRetention*> chosen;
  for (size_t i = 0; i < ranges.size(); ++i) {
    const RangeRetention& range = ranges[i];
    PT_ASSIGN_OR_RETURN(const uint64_t end, EndOf(FieldOf(i), range.range, state.length()));
    snapshot.SelectRows(range.range.begin, end);
    for (const std::vector<SavedExtent>& group : state.groups) {
      for (const SavedExtent& extent : group) {
        if (extent.first_row >= end || extent.end_row() <= range.range.begin) continue;
        const RangeRetention*& best = chosen[extent.page];
        const auto worth = [](const RangeRetention& r) {
          return std::tuple(r.priority, r.ttl.value_or(absl::InfiniteDuration()));
        };
        if (best == nullptr || worth(*best) < worth(range)) best = &range;
      }
    }
  }
  const absl::Time now = worker_->clock().WallNow();
  std::vector<PageKey> missing;
  for (int attempt = 0; attempt <= kMaxPutAgain; ++attempt) {
    PT_ASSIGN_OR_RETURN(const StateSnapshot::Put put,
                        snapshot.PutPages(missing, Durability::kProcess, deadline));
    missing.clear();
    for (const RangeRetention& range : ranges) {
      std::vector<PageKey> keys;
      for (const auto& [page, best] : chosen) {
        if (best == &range) keys.push_back(put.pages[page].key);
      }
      if (keys.empty()) continue;
      Retention retention{.priority = range.priority};
      if (range.ttl) retention.expires_at = now + *range.ttl;
      PT_ASSIGN_OR_RETURN(const std::vector<PageKey> absent,
                          store_->SetRetention(keys, retention, fence, deadline));
      missing.insert(missing.end(), absent.begin(), absent.end());
    }
    if (missing.empty()) {
      return RetentionAnswer{chosen.size(), put.pages_written, put.bytes_written};
    }
  }
  return absl::AbortedError(absl::StrCat("set retention: ", missing.size(),
                                         " pages left the store again before it was set for them"));
}

absl::StatusOr<RetentionAnswer> Retentions::Set(const Tenant& tenant, ModelHost* host,
                                                const SequenceHandle& sequence,
                                                std::span<const RangeRetention> ranges,
                                                MonotonicTime deadline) {
  const auto set = [&]() -> absl::StatusOr<RetentionAnswer> {
    PT_RETURN_IF_ERROR(CheckStore());
    PT_RETURN_IF_ERROR(CheckRanges(ranges));
    // Retention is no property of the sequence: it carries the worker's fence. A life of the worker
    // that others have taken over from sets nothing, however late its call arrives.
    PT_ASSIGN_OR_RETURN(const WriteFence fence, fence_->Get(deadline));
    PT_ASSIGN_OR_RETURN(const std::unique_ptr<StateSnapshot> snapshot,
                        host->Snapshot(tenant, sequence, std::nullopt));
    return SetPages(*snapshot, ranges, fence, deadline);
  };
  absl::StatusOr<RetentionAnswer> answer = set();
  Count("set", answer.status());
  return answer;
}

// ---- pins --------------------------------------------------------------------------------------

absl::StatusOr<PutManifestResult> Retentions::PutPin(
    StateSnapshot& snapshot, const PinRequest& request, const WriteFence& fence,
    uint64_t expected_version, ManifestRecord* manifest, MonotonicTime deadline) {
  const SessionState& state = snapshot.state();
  std::vector<PageKey> missing;
  for (int attempt = 0; attempt <= kMaxPutAgain; ++attempt) {
    PT_ASSIGN_OR_RETURN(const StateSnapshot::Put put,
                        snapshot.PutPages(missing, Durability::kProcess, deadline));
    manifest->pages = Named(put.pages);
    manifest->summary = EncodePinSummary({.begin = request.range.begin,
                                          .end = request.range.end.value_or(state.length()),
                                          .bytes = put.bytes_total,
                                          .pages_written = put.pages_written,
                                          .bytes_written = put.bytes_written,
                                          .model_digest = state.model_digest,
                                          .request_digest = request.request_digest});
    PT_ASSIGN_OR_RETURN(PutManifestResult result,
                        store_->PutManifest(*manifest, expected_version, fence, deadline));
    if (result.committed) return result;
    missing = std::move(result.missing);
  }
  return absl::AbortedError(absl::StrCat("pin ", request.name, ": ", missing.size(),
                                         " pages left the store again before they could be named"));
}

absl::StatusOr<std::optional<Pin>> Retentions::FindAnswer(const Tenant& tenant,
                                                          const PinRequest& request,
                                                          MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(CheckStore());
  PT_RETURN_IF_ERROR(ValidateName("name", request.name));
  if (request.request_id.empty()) return std::nullopt;
  const std::string root = PinNamePrefix(tenant);
  PT_ASSIGN_OR_RETURN(const ManifestEntry current,
                      Stat(absl::StrCat(root, request.name), deadline));
  if (current.version == 0 || current.request_id != request.request_id) return std::nullopt;
  PT_ASSIGN_OR_RETURN(Pin pin, PinOf(root, current));
  if (pin.summary.request_digest != request.request_digest) {
    return WithReason(absl::InvalidArgumentError(absl::StrCat("pin ", request.name, ": request_id ",
                                                              request.request_id,
                                                              " was used for another request")),
                      "REQUEST_ID_REUSED");
  }
  return pin;
}

absl::StatusOr<Pin> Retentions::PinRange(const Tenant& tenant, ModelHost* host,
                                         const PinRequest& request, MonotonicTime deadline) {
  const auto pin = [&]() -> absl::StatusOr<Pin> {
    PT_RETURN_IF_ERROR(CheckStore());
    PT_RETURN_IF_ERROR(ValidateName("name", request.name));
    PT_RETURN_IF_ERROR(CheckTtl("ttl", request.ttl));
    PT_ASSIGN_OR_RETURN(const WriteFence fence, fence_->Get(deadline));
    PT_ASSIGN_OR_RETURN(const std::unique_ptr<StateSnapshot> snapshot,
                        host->Snapshot(tenant, request.sequence, std::nullopt));
    PT_ASSIGN_OR_RETURN(const uint64_t end,
                        EndOf("range", request.range, snapshot->state().length()));
    snapshot->SelectRows(request.range.begin, end);
    ManifestRecord manifest;
    manifest.name = absl::StrCat(PinNamePrefix(tenant), request.name);
    manifest.request_id = request.request_id;
    for (int race = 0; race < kMaxRaces; ++race) {
      PT_ASSIGN_OR_RETURN(const ManifestEntry current, Stat(manifest.name, deadline));
      manifest.saved_at = worker_->clock().WallNow();
      if (request.ttl) manifest.expires_at = manifest.saved_at + *request.ttl;
      const absl::StatusOr<PutManifestResult> put =
          PutPin(*snapshot, request, fence, current.version, &manifest, deadline);
      if (put.ok()) {
        PT_ASSIGN_OR_RETURN(const PinSummary summary, ParsePinSummary(manifest.summary));
        return Pin{.name = request.name,
                   .num_pages = manifest.pages.size(),
                   .pinned_at = manifest.saved_at,
                   .expires_at = manifest.expires_at,
                   .summary = summary};
      }
      if (GetReason(put.status()) != error_reason::kVersionMismatch) return put.status();
    }
    return absl::AbortedError(
        absl::StrCat("pin ", request.name, ": lost the race for it ", kMaxRaces, " times"));
  };
  absl::StatusOr<Pin> answer = pin();
  Count("pin", answer.status());
  return answer;
}

absl::Status Retentions::Unpin(const Tenant& tenant, absl::string_view name,
                               MonotonicTime deadline) {
  const auto unpin = [&]() -> absl::Status {
    PT_RETURN_IF_ERROR(CheckStore());
    PT_RETURN_IF_ERROR(ValidateName("name", name));
    PT_ASSIGN_OR_RETURN(const WriteFence fence, fence_->Get(deadline));
    const std::string manifest = absl::StrCat(PinNamePrefix(tenant), name);
    for (int race = 0; race < kMaxRaces; ++race) {
      PT_ASSIGN_OR_RETURN(const ManifestEntry current, Stat(manifest, deadline));
      if (current.version == 0) return PinNotFound(name);
      const absl::Status deleted =
          store_->DeleteManifest(manifest, current.version, fence, deadline);
      if (absl::IsNotFound(deleted)) return PinNotFound(name);
      if (GetReason(deleted) != error_reason::kVersionMismatch) return deleted;
    }
    return absl::AbortedError(
        absl::StrCat("unpin ", name, ": it was pinned again ", kMaxRaces, " times"));
  };
  const absl::Status status = unpin();
  Count("unpin", status);
  return status;
}

absl::StatusOr<std::vector<Pin>> Retentions::List(const Tenant& tenant, absl::string_view prefix,
                                                  absl::string_view after, size_t limit,
                                                  MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(CheckStore());
  const std::string root = PinNamePrefix(tenant);
  PT_ASSIGN_OR_RETURN(
      const std::vector<ManifestEntry> found,
      store_->ListManifests(absl::StrCat(root, prefix),
                            after.empty() ? "" : absl::StrCat(root, after), limit, deadline));
  std::vector<Pin> pins;
  for (const ManifestEntry& entry : found) {
    PT_ASSIGN_OR_RETURN(Pin pin, PinOf(root, entry));
    pins.push_back(std::move(pin));
  }
  return pins;
}

}  // namespace pagetide
