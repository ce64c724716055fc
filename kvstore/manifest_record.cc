#include "kvstore/manifest_record.h"

#include <cstring>
#include <span>

#include "absl/strings/str_cat.h"
#include "base/checksum.h"
#include "base/little_endian.h"

namespace pagetide {
namespace {

constexpr uint32_t kMagic = 0x464d5450;  // "PTMF"
constexpr uint16_t kVersion = 1;
constexpr size_t kTrailerBytes = 16;
constexpr size_t kPageBytes = 32 + 16;

Checksum128 ChecksumOfText(absl::string_view text) {
  return ChecksumOf(std::as_bytes(std::span(text.data(), text.size())));
}

}  // namespace

std::string EncodeManifest(const ManifestRecord& manifest) {
  std::string out;
  out.reserve(128 + manifest.name.size() + manifest.pages.size() * kPageBytes +
              manifest.payload.size());
  AppendLittleEndian<uint32_t>(&out, kMagic);
  AppendLittleEndian<uint16_t>(&out, kVersion);
  AppendLittleEndian<uint64_t>(&out, manifest.version);
  AppendLittleEndian<uint64_t>(&out, static_cast<uint64_t>(absl::ToUnixNanos(manifest.saved_at)));
  AppendField(&out, manifest.name);
  AppendField(&out, manifest.request_id);
  AppendField(&out, manifest.payload);
  AppendLittleEndian<uint64_t>(&out, manifest.pages.size());
  for (const ManifestPageRef& page : manifest.pages) {
    out.append(page.key.digest.view().data(), page.key.digest.view().size());
    AppendLittleEndian<uint64_t>(&out, page.checksum.low);
    AppendLittleEndian<uint64_t>(&out, page.checksum.high);
  }
  const Checksum128 checksum = ChecksumOfText(out);
  AppendLittleEndian<uint64_t>(&out, checksum.low);
  AppendLittleEndian<uint64_t>(&out, checksum.high);
  return out;
}

absl::StatusOr<ManifestRecord> ParseManifest(absl::string_view bytes) {
  if (bytes.size() < kTrailerBytes) {
    return absl::DataLossError(absl::StrCat("manifest: ", bytes.size(), " bytes"));
  }
  const absl::string_view body = bytes.substr(0, bytes.size() - kTrailerBytes);
  LittleEndianReader trailer(bytes.substr(body.size()));
  const uint64_t low = trailer.Take<uint64_t>();
  const uint64_t high = trailer.Take<uint64_t>();
  LittleEndianReader in(body);
  const uint32_t magic = in.Take<uint32_t>();
  const uint16_t version = in.Take<uint16_t>();
  if (!in.ok() || magic != kMagic) return absl::DataLossError("manifest: magic");
  if (version != kVersion) {
    return absl::UnimplementedError(absl::StrCat("manifest: version ", version));
  }
  const Checksum128 actual = ChecksumOfText(body);
  if (actual != Checksum128{low, high}) {
    return absl::DataLossError(absl::StrCat("manifest: checksum 0x", actual.ToHex(), " != 0x",
                                            Checksum128{low, high}.ToHex()));
  }
  ManifestRecord manifest;
  manifest.version = in.Take<uint64_t>();
  manifest.saved_at = absl::FromUnixNanos(static_cast<int64_t>(in.Take<uint64_t>()));
  manifest.name = std::string(in.TakeField());
  manifest.request_id = std::string(in.TakeField());
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

}  // namespace pagetide
