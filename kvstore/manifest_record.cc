#include "kvstore/manifest_record.h"

#include <algorithm>
#include <cstring>
#include <span>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/checksum.h"
#include "base/little_endian.h"
#include "base/status_macros.h"
#include "kvstore/store_errors.h"

namespace pagetide {
namespace {

constexpr uint32_t kManifestMagic = 0x464d5450;  // "PTMF"
constexpr uint32_t kEntryMagic = 0x454d5450;     // "PTME"
constexpr uint16_t kVersion = 2;                 // 1 had no summary, expiry and priority
constexpr uint16_t kEntryVersion = 1;
constexpr uint8_t kExpires = 1;
constexpr size_t kHeadBytes = 4 + 2;
constexpr size_t kTrailerBytes = 16;
constexpr size_t kPageBytes = 32 + 16;

Checksum128 ChecksumOfText(absl::string_view text) {
  return ChecksumOf(std::as_bytes(std::span(text.data(), text.size())));
}

void AppendTime(std::string* out, absl::Time t) {
  AppendLittleEndian<uint64_t>(out, static_cast<uint64_t>(absl::ToUnixNanos(t)));
}
absl::Time TakeTime(LittleEndianReader* in) {
  return absl::FromUnixNanos(static_cast<int64_t>(in->Take<uint64_t>()));
}

// What both forms have: flags, times, priority.
template <typename Manifest>
void AppendTerms(std::string* out, const Manifest& manifest) {
  AppendTime(out, manifest.saved_at);
  AppendLittleEndian<uint8_t>(out, manifest.expires_at.has_value() ? kExpires : 0);
  AppendTime(out, manifest.expires_at.value_or(absl::UnixEpoch()));
  AppendLittleEndian<uint32_t>(out, manifest.priority);
}
template <typename Manifest>
void TakeTerms(LittleEndianReader* in, Manifest* manifest) {
  manifest->saved_at = TakeTime(in);
  const uint8_t flags = in->Take<uint8_t>();
  const absl::Time expires_at = TakeTime(in);
  if ((flags & kExpires) != 0) manifest->expires_at = expires_at;
  manifest->priority = in->Take<uint32_t>();
}

void AppendChecksum(std::string* out) {
  const Checksum128 checksum = ChecksumOfText(*out);
  AppendLittleEndian<uint64_t>(out, checksum.low);
  AppendLittleEndian<uint64_t>(out, checksum.high);
}

// The bytes before the checksum, which is right.
absl::StatusOr<absl::string_view> CheckedBody(absl::string_view what, absl::string_view bytes) {
  if (bytes.size() < kHeadBytes + kTrailerBytes) {
    return absl::DataLossError(absl::StrCat(what, ": ", bytes.size(), " bytes"));
  }
  const absl::string_view body = bytes.substr(0, bytes.size() - kTrailerBytes);
  LittleEndianReader trailer(bytes.substr(body.size()));
  const uint64_t low = trailer.Take<uint64_t>();
  const uint64_t high = trailer.Take<uint64_t>();
  const Checksum128 actual = ChecksumOfText(body);
  if (actual != Checksum128{low, high}) {
    return absl::DataLossError(absl::StrCat(what, ": checksum 0x", actual.ToHex(), " != 0x",
                                            Checksum128{low, high}.ToHex()));
  }
  return body;
}

absl::Status CheckHead(absl::string_view what, LittleEndianReader* in, uint32_t magic,
                       uint16_t oldest, uint16_t newest, uint16_t* version) {
  const uint32_t found = in->Take<uint32_t>();
  *version = in->Take<uint16_t>();
  if (!in->ok() || found != magic) return absl::DataLossError(absl::StrCat(what, ": magic"));
  if (*version < oldest || *version > newest) {
    return absl::UnimplementedError(absl::StrCat(what, ": version ", *version));
  }
  return absl::OkStatus();
}

}  // namespace

std::string EncodeManifest(const ManifestRecord& manifest) {
  std::string out;
  out.reserve(160 + manifest.name.size() + manifest.summary.size() +
              manifest.pages.size() * kPageBytes + manifest.payload.size());
  AppendLittleEndian<uint32_t>(&out, kManifestMagic);
  AppendLittleEndian<uint16_t>(&out, kVersion);
  AppendLittleEndian<uint64_t>(&out, manifest.version);
  AppendTerms(&out, manifest);
  AppendField(&out, manifest.name);
  AppendField(&out, manifest.request_id);
  AppendField(&out, manifest.summary);
  AppendField(&out, manifest.payload);
  AppendLittleEndian<uint64_t>(&out, manifest.pages.size());
  for (const ManifestPageRef& page : manifest.pages) {
    out.append(page.key.digest.view().data(), page.key.digest.view().size());
    AppendLittleEndian<uint64_t>(&out, page.checksum.low);
    AppendLittleEndian<uint64_t>(&out, page.checksum.high);
  }
  AppendChecksum(&out);
  return out;
}

absl::StatusOr<ManifestRecord> ParseManifest(absl::string_view bytes) {
  LittleEndianReader head(bytes);
  uint16_t version = 0;
  PT_RETURN_IF_ERROR(CheckHead("manifest", &head, kManifestMagic, 1, kVersion, &version));
  PT_ASSIGN_OR_RETURN(const absl::string_view body, CheckedBody("manifest", bytes));
  LittleEndianReader in(body.substr(kHeadBytes));
  ManifestRecord manifest;
  manifest.version = in.Take<uint64_t>();
  if (version == 1) {
    manifest.saved_at = TakeTime(&in);
  } else {
    TakeTerms(&in, &manifest);
  }
  manifest.name = std::string(in.TakeField());
  manifest.request_id = std::string(in.TakeField());
  if (version >= 2) manifest.summary = std::string(in.TakeField());
  manifest.payload = std::string(in.TakeField());
  const uint64_t num_pages = in.Take<uint64_t>();
  if (!in.ok() || num_pages > in.rest().size() / kPageBytes ||
      num_pages * kPageBytes != in.rest().size()) {
    return absl::DataLossError(
        absl::StrCat("manifest: ", num_pages, " pages in ", in.rest().size(), " bytes"));
  }
  manifest.pages.resize(num_pages);
  for (ManifestPageRef& page : manifest.pages) {
    const absl::string_view key = in.TakeBytes(32);
    std::memcpy(page.key.digest.bytes.data(), key.data(), key.size());
    page.checksum.low = in.Take<uint64_t>();
    page.checksum.high = in.Take<uint64_t>();
  }
  return manifest;
}

ManifestEntry EntryOf(const ManifestRecord& manifest) {
  ManifestEntry entry;
  entry.name = manifest.name;
  entry.version = manifest.version;
  entry.num_pages = manifest.pages.size();
  entry.payload_bytes = manifest.payload.size();
  entry.request_id = manifest.request_id;
  entry.saved_at = manifest.saved_at;
  entry.summary = manifest.summary;
  entry.expires_at = manifest.expires_at;
  entry.priority = manifest.priority;
  return entry;
}

std::string EncodeManifestEntry(const ManifestEntry& entry) {
  std::string out;
  AppendLittleEndian<uint32_t>(&out, kEntryMagic);
  AppendLittleEndian<uint16_t>(&out, kEntryVersion);
  AppendLittleEndian<uint64_t>(&out, entry.version);
  AppendTerms(&out, entry);
  AppendLittleEndian<uint64_t>(&out, entry.num_pages);
  AppendLittleEndian<uint64_t>(&out, entry.payload_bytes);
  AppendField(&out, entry.name);
  AppendField(&out, entry.request_id);
  AppendField(&out, entry.summary);
  AppendChecksum(&out);
  return out;
}

absl::StatusOr<ManifestEntry> ParseManifestEntry(absl::string_view bytes) {
  LittleEndianReader head(bytes);
  uint16_t version = 0;
  PT_RETURN_IF_ERROR(
      CheckHead("manifest entry", &head, kEntryMagic, kEntryVersion, kEntryVersion, &version));
  PT_ASSIGN_OR_RETURN(const absl::string_view body, CheckedBody("manifest entry", bytes));
  LittleEndianReader in(body.substr(kHeadBytes));
  ManifestEntry entry;
  entry.version = in.Take<uint64_t>();
  TakeTerms(&in, &entry);
  entry.num_pages = in.Take<uint64_t>();
  entry.payload_bytes = in.Take<uint64_t>();
  entry.name = std::string(in.TakeField());
  entry.request_id = std::string(in.TakeField());
  entry.summary = std::string(in.TakeField());
  if (!in.ok() || !in.rest().empty()) {
    return absl::DataLossError(
        absl::StrCat("manifest entry: fields do not fill ", bytes.size(), " bytes"));
  }
  return entry;
}

uint32_t VersionBucketOf(absl::string_view name) {
  return static_cast<uint32_t>(ChecksumOfText(name).low % kNumVersionBuckets);
}

absl::StatusOr<ManifestRecord> ComposeManifest(const ManifestRecord* present,
                                               const ManifestRecord& manifest,
                                               uint64_t deleted_version) {
  const std::string what = absl::StrCat("write manifest ", manifest.name);
  PT_RETURN_IF_ERROR(CheckStoreName("manifest name", manifest.name));
  if (manifest.priority > kMaxPriority) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, ": priority is ", manifest.priority, ", at most ", kMaxPriority));
  }
  if (manifest.summary.size() > kMaxManifestSummaryBytes) {
    return absl::InvalidArgumentError(absl::StrCat(what, ": summary has ", manifest.summary.size(),
                                                   " bytes, at most ", kMaxManifestSummaryBytes));
  }
  const uint64_t num_present = present == nullptr ? 0 : present->pages.size();
  const uint64_t bytes_present = present == nullptr ? 0 : present->payload.size();
  if (manifest.keep_pages > num_present || manifest.keep_payload_bytes > bytes_present) {
    return absl::InvalidArgumentError(absl::StrCat(
        what, ": keeps ", manifest.keep_pages, " pages and ", manifest.keep_payload_bytes,
        " payload bytes, the present version has ", num_present, " and ", bytes_present));
  }
  const uint64_t bytes = (manifest.keep_pages + manifest.pages.size()) * kManifestPageRefBytes +
                         manifest.keep_payload_bytes + manifest.payload.size();
  if (bytes > kMaxManifestBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, ": ", manifest.keep_pages + manifest.pages.size(), " pages and ",
                     manifest.keep_payload_bytes + manifest.payload.size(), " payload bytes make ",
                     bytes, ", at most ", kMaxManifestBytes));
  }
  ManifestRecord out = manifest;
  out.version = (present == nullptr ? deleted_version : present->version) + 1;
  out.keep_pages = out.keep_payload_bytes = 0;
  if (manifest.keep_pages > 0) {
    out.pages.insert(out.pages.begin(), present->pages.begin(),
                     present->pages.begin() + static_cast<ptrdiff_t>(manifest.keep_pages));
  }
  if (manifest.keep_payload_bytes > 0) {
    out.payload.insert(0, present->payload, 0, manifest.keep_payload_bytes);
  }
  return out;
}

bool IsSameSave(const ManifestRecord& present, const ManifestRecord& manifest) {
  if (manifest.request_id.empty() || present.request_id != manifest.request_id) return false;
  if (present.summary != manifest.summary || present.priority != manifest.priority) return false;
  const size_t num_sent = manifest.pages.size();
  const size_t bytes_sent = manifest.payload.size();
  // Without sums, which what a client declares could overflow.
  if (num_sent > present.pages.size() || bytes_sent > present.payload.size() ||
      present.pages.size() - num_sent != manifest.keep_pages ||
      present.payload.size() - bytes_sent != manifest.keep_payload_bytes) {
    return false;
  }
  return absl::EndsWith(present.payload, manifest.payload) &&
         std::equal(manifest.pages.begin(), manifest.pages.end(),
                    present.pages.end() - static_cast<ptrdiff_t>(num_sent),
                    [](const ManifestPageRef& a, const ManifestPageRef& b) {
                      return a.key == b.key && a.checksum == b.checksum;
                    });
}

std::vector<PageKey> WithoutRepeats(const std::vector<PageKey>& keys) {
  std::vector<PageKey> once;
  absl::flat_hash_set<PageKey> seen;
  for (const PageKey& key : keys) {
    if (seen.insert(key).second) once.push_back(key);
  }
  return once;
}

}  // namespace pagetide
