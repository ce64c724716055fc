#include "kvstore/page_store_codec.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace pagetide {
namespace {

absl::StatusOr<Digest> DecodeDigest(absl::string_view field, const std::string& bytes) {
  absl::StatusOr<Digest> digest = Digest::FromBytes(bytes);
  if (digest.ok()) return digest;
  return absl::InvalidArgumentError(
      absl::StrCat(field, " has ", bytes.size(), " bytes, 32 are needed"));
}

}  // namespace

absl::StatusOr<PageKey> DecodePageKey(absl::string_view field, const std::string& bytes) {
  PT_ASSIGN_OR_RETURN(const Digest digest, DecodeDigest(field, bytes));
  return PageKey{digest};
}

void EncodeChecksum(const Checksum128& checksum, v1::BodyChecksum* out) {
  out->set_low(checksum.low);
  out->set_high(checksum.high);
}

Checksum128 DecodeChecksum(const v1::BodyChecksum& checksum) {
  return {checksum.low(), checksum.high()};
}

void EncodePageHeader(const PageRecordMeta& meta, v1::PageHeader* out) {
  out->set_page_key(meta.key.digest.ToBytes());
  EncodeChecksum(meta.checksum, out->mutable_checksum());
  out->set_body_bytes(meta.body_bytes);
  out->set_fingerprint(meta.fingerprint.ToBytes());
  if (meta.prefix.has_value()) out->set_prefix_key(meta.prefix->digest.ToBytes());
  if (meta.parent.has_value()) out->set_parent_prefix_key(meta.parent->digest.ToBytes());
  out->set_numerics_id(meta.numerics_id);
  out->set_group(meta.group);
  out->set_depth(meta.depth);
}

absl::StatusOr<PageRecordMeta> DecodePageHeader(const v1::PageHeader& header) {
  PageRecordMeta meta;
  PT_ASSIGN_OR_RETURN(meta.key, DecodePageKey("header.page_key", header.page_key()));
  meta.checksum = DecodeChecksum(header.checksum());
  meta.body_bytes = header.body_bytes();
  PT_ASSIGN_OR_RETURN(meta.fingerprint, DecodeDigest("header.fingerprint", header.fingerprint()));
  if (!header.prefix_key().empty()) {
    PT_ASSIGN_OR_RETURN(const Digest d, DecodeDigest("header.prefix_key", header.prefix_key()));
    meta.prefix = PrefixKey{d};
  }
  if (!header.parent_prefix_key().empty()) {
    PT_ASSIGN_OR_RETURN(const Digest d,
                        DecodeDigest("header.parent_prefix_key", header.parent_prefix_key()));
    meta.parent = PrefixKey{d};
  }
  meta.numerics_id = header.numerics_id();
  meta.group = header.group();
  meta.depth = header.depth();
  return meta;
}

v1::Durability EncodeDurability(Durability level) {
  switch (level) {
    case Durability::kCache:
      return v1::DURABILITY_CACHE;
    case Durability::kProcess:
      return v1::DURABILITY_PROCESS;
    case Durability::kLocal:
      return v1::DURABILITY_LOCAL;
  }
  return v1::DURABILITY_UNSPECIFIED;
}

absl::StatusOr<Durability> DecodeDurability(v1::Durability level) {
  switch (level) {
    case v1::DURABILITY_CACHE:
      return Durability::kCache;
    case v1::DURABILITY_PROCESS:
      return Durability::kProcess;
    case v1::DURABILITY_LOCAL:
      return Durability::kLocal;
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("level is ", static_cast<int>(level), ": name CACHE, PROCESS or LOCAL"));
  }
}

void EncodeManifestMessage(const ManifestRecord& manifest, v1::Manifest* out) {
  out->set_name(manifest.name);
  out->set_version(manifest.version);
  for (const ManifestPageRef& ref : manifest.pages) {
    v1::ManifestPage* page = out->add_pages();
    page->set_page_key(ref.key.digest.ToBytes());
    EncodeChecksum(ref.checksum, page->mutable_checksum());
  }
  out->set_payload(manifest.payload);
  out->set_request_id(manifest.request_id);
  const int64_t nanos = absl::ToUnixNanos(manifest.saved_at);
  out->mutable_saved_at()->set_seconds(nanos / 1000000000);
  out->mutable_saved_at()->set_nanos(static_cast<int32_t>(nanos % 1000000000));
}

absl::StatusOr<ManifestRecord> DecodeManifestMessage(const v1::Manifest& manifest) {
  ManifestRecord record;
  record.name = manifest.name();
  record.version = manifest.version();
  record.pages.reserve(static_cast<size_t>(manifest.pages_size()));
  for (const v1::ManifestPage& page : manifest.pages()) {
    PT_ASSIGN_OR_RETURN(const PageKey key,
                        DecodePageKey("manifest.pages.page_key", page.page_key()));
    record.pages.push_back({key, DecodeChecksum(page.checksum())});
  }
  record.payload = manifest.payload();
  record.request_id = manifest.request_id();
  record.saved_at = absl::FromUnixSeconds(manifest.saved_at().seconds()) +
                    absl::Nanoseconds(manifest.saved_at().nanos());
  return record;
}

void EncodeStats(const StoreStats& stats, v1::GetStoreStatsResponse* out) {
  out->set_pages(stats.pages);
  out->set_logical_bytes(stats.logical_bytes);
  out->set_physical_bytes(stats.physical_bytes);
  out->set_capacity_bytes(stats.capacity_bytes);
  out->set_pages_put(stats.pages_put);
  out->set_pages_got(stats.pages_got);
  out->set_pages_missed(stats.pages_missed);
  out->set_pages_evicted(stats.pages_evicted);
  out->set_pages_quarantined(stats.pages_quarantined);
  out->set_bytes_put(stats.bytes_put);
  out->set_bytes_got(stats.bytes_got);
  out->set_pages_ever_read(stats.pages_ever_read);
  out->set_manifests(stats.manifests);
  out->set_state(stats.state);
  out->set_engine(stats.engine);
}

StoreStats DecodeStats(const v1::GetStoreStatsResponse& stats) {
  StoreStats out;
  out.pages = stats.pages();
  out.logical_bytes = stats.logical_bytes();
  out.physical_bytes = stats.physical_bytes();
  out.capacity_bytes = stats.capacity_bytes();
  out.pages_put = stats.pages_put();
  out.pages_got = stats.pages_got();
  out.pages_missed = stats.pages_missed();
  out.pages_evicted = stats.pages_evicted();
  out.pages_quarantined = stats.pages_quarantined();
  out.bytes_put = stats.bytes_put();
  out.bytes_got = stats.bytes_got();
  out.pages_ever_read = stats.pages_ever_read();
  out.manifests = stats.manifests();
  out.state = stats.state();
  out.engine = stats.engine();
  return out;
}

void EncodeDuration(absl::Duration d, google::protobuf::Duration* out) {
  const int64_t seconds = absl::ToInt64Seconds(d);
  out->set_seconds(seconds);
  out->set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(d - absl::Seconds(seconds))));
}

absl::StatusOr<absl::Duration> DecodeDuration(absl::string_view field,
                                              const google::protobuf::Duration& d) {
  if (d.nanos() <= -1000000000 || d.nanos() >= 1000000000) {
    return absl::InvalidArgumentError(absl::StrCat(field, ".nanos is ", d.nanos()));
  }
  return absl::Seconds(d.seconds()) + absl::Nanoseconds(d.nanos());
}

}  // namespace pagetide
