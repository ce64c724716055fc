#include "kvstore/page_store_codec.h"

#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "rpc/duration_proto.h"

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

google::protobuf::Timestamp EncodeTime(absl::Time t) {
  const absl::Time whole = absl::FromUnixSeconds(absl::ToUnixSeconds(t));  // rounds down
  google::protobuf::Timestamp out;
  out.set_seconds(absl::ToUnixSeconds(t));
  out.set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(t - whole)));
  return out;
}

absl::StatusOr<absl::Time> DecodeTime(absl::string_view field,
                                      const google::protobuf::Timestamp& t) {
  // Stored are nanoseconds in 64 bits, which end in the year 2262.
  constexpr int64_t kMaxSeconds = std::numeric_limits<int64_t>::max() / 1000000000 - 1;
  if (t.seconds() < -kMaxSeconds || t.seconds() > kMaxSeconds || t.nanos() < 0 ||
      t.nanos() >= 1000000000) {
    return absl::InvalidArgumentError(absl::StrCat(field, " is ", t.seconds(), " s, ", t.nanos(),
                                                   " ns: seconds are at most ", kMaxSeconds,
                                                   " either way, nanos 0 to 999999999"));
  }
  return absl::FromUnixSeconds(t.seconds()) + absl::Nanoseconds(t.nanos());
}

absl::StatusOr<PrefixKey> DecodePrefixKey(absl::string_view field, const std::string& bytes) {
  PT_ASSIGN_OR_RETURN(const Digest digest, DecodeDigest(field, bytes));
  return PrefixKey{digest};
}

absl::StatusOr<Digest> DecodeFingerprint(absl::string_view field, const std::string& bytes) {
  return DecodeDigest(field, bytes);
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
  *out->mutable_saved_at() = EncodeTime(manifest.saved_at);
  out->set_summary(manifest.summary);
  if (manifest.expires_at.has_value())
    *out->mutable_expires_at() = EncodeTime(*manifest.expires_at);
  out->set_priority(manifest.priority);
  out->set_keep_pages(manifest.keep_pages);
  out->set_keep_payload_bytes(manifest.keep_payload_bytes);
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
  PT_ASSIGN_OR_RETURN(record.saved_at, DecodeTime("manifest.saved_at", manifest.saved_at()));
  record.summary = manifest.summary();
  if (manifest.has_expires_at()) {
    PT_ASSIGN_OR_RETURN(record.expires_at,
                        DecodeTime("manifest.expires_at", manifest.expires_at()));
  }
  if (manifest.has_priority()) record.priority = manifest.priority();
  record.keep_pages = manifest.keep_pages();
  record.keep_payload_bytes = manifest.keep_payload_bytes();
  return record;
}

void EncodeManifestEntry(const ManifestEntry& entry, v1::ListManifestsResponse::Entry* out) {
  out->set_name(entry.name);
  out->set_version(entry.version);
  out->set_num_pages(entry.num_pages);
  out->set_payload_bytes(entry.payload_bytes);
  out->set_request_id(entry.request_id);
  *out->mutable_saved_at() = EncodeTime(entry.saved_at);
  out->set_summary(entry.summary);
  if (entry.expires_at.has_value()) *out->mutable_expires_at() = EncodeTime(*entry.expires_at);
  out->set_priority(entry.priority);
}

absl::StatusOr<ManifestEntry> DecodeManifestEntry(const v1::ListManifestsResponse::Entry& entry) {
  ManifestEntry out;
  out.name = entry.name();
  out.version = entry.version();
  out.num_pages = entry.num_pages();
  out.payload_bytes = entry.payload_bytes();
  out.request_id = entry.request_id();
  PT_ASSIGN_OR_RETURN(out.saved_at, DecodeTime("manifests.saved_at", entry.saved_at()));
  out.summary = entry.summary();
  if (entry.has_expires_at()) {
    PT_ASSIGN_OR_RETURN(out.expires_at, DecodeTime("manifests.expires_at", entry.expires_at()));
  }
  out.priority = entry.priority();
  return out;
}

void EncodeRetention(const Retention& retention, v1::Retention* out) {
  out->set_priority(retention.priority);
  if (retention.expires_at.has_value()) {
    *out->mutable_expires_at() = EncodeTime(*retention.expires_at);
  }
  if (retention.pinned_until.has_value()) {
    *out->mutable_pinned_until() = EncodeTime(*retention.pinned_until);
  }
}

absl::StatusOr<Retention> DecodeRetention(const v1::Retention& retention) {
  Retention out;
  if (retention.has_priority()) out.priority = retention.priority();
  if (retention.has_expires_at()) {
    PT_ASSIGN_OR_RETURN(out.expires_at, DecodeTime("retention.expires_at", retention.expires_at()));
  }
  if (retention.has_pinned_until()) {
    PT_ASSIGN_OR_RETURN(out.pinned_until,
                        DecodeTime("retention.pinned_until", retention.pinned_until()));
  }
  return out;
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
  out->set_manifests_expired(stats.manifests_expired);
  out->set_protected_pages(stats.protected_pages);
  out->set_protected_bytes(stats.protected_bytes);
  out->set_bytes_evicted(stats.bytes_evicted);
  out->set_pages_refused(stats.pages_refused);
  out->set_disk_free_bytes(stats.disk_free_bytes);
  out->set_bytes_ever_read(stats.bytes_ever_read);
  out->set_bytes_put_since_hit(stats.bytes_put_since_hit);
  out->set_efficacy_alarm(stats.efficacy_alarm);
  out->set_pages_scrubbed(stats.pages_scrubbed);
  out->set_stored_bytes(stats.stored_bytes);
  const auto add = [out](const char* codec, const StoreCodecBytes::InOut& bytes) {
    auto* const entry = out->add_codec_bytes();
    entry->set_codec(codec);
    entry->set_in_bytes(bytes.in);
    entry->set_out_bytes(bytes.out);
  };
  add("raw", stats.codec_bytes.raw);
  add("lz4", stats.codec_bytes.lz4);
  add("zstd", stats.codec_bytes.zstd);
  *out->mutable_compress_time() = DurationToProto(stats.compress_time);
  *out->mutable_decompress_time() = DurationToProto(stats.decompress_time);
  out->set_decompressed_bytes(stats.decompressed_bytes);
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
  out.manifests_expired = stats.manifests_expired();
  out.protected_pages = stats.protected_pages();
  out.protected_bytes = stats.protected_bytes();
  out.bytes_evicted = stats.bytes_evicted();
  out.pages_refused = stats.pages_refused();
  out.disk_free_bytes = stats.disk_free_bytes();
  out.bytes_ever_read = stats.bytes_ever_read();
  out.bytes_put_since_hit = stats.bytes_put_since_hit();
  out.efficacy_alarm = stats.efficacy_alarm();
  out.pages_scrubbed = stats.pages_scrubbed();
  out.stored_bytes = stats.stored_bytes();
  for (const auto& entry : stats.codec_bytes()) {
    const StoreCodecBytes::InOut bytes{entry.in_bytes(), entry.out_bytes()};
    if (entry.codec() == "raw") out.codec_bytes.raw = bytes;
    if (entry.codec() == "lz4") out.codec_bytes.lz4 = bytes;
    if (entry.codec() == "zstd") out.codec_bytes.zstd = bytes;
  }
  // Statistics of another program: what cannot be read counts as none.
  out.compress_time = DecodeDuration("", stats.compress_time()).value_or(absl::ZeroDuration());
  out.decompress_time = DecodeDuration("", stats.decompress_time()).value_or(absl::ZeroDuration());
  out.decompressed_bytes = stats.decompressed_bytes();
  return out;
}

absl::StatusOr<absl::Duration> DecodeDuration(absl::string_view field,
                                              const google::protobuf::Duration& d) {
  if (d.nanos() <= -1000000000 || d.nanos() >= 1000000000) {
    return absl::InvalidArgumentError(absl::StrCat(field, ".nanos is ", d.nanos()));
  }
  return absl::Seconds(d.seconds()) + absl::Nanoseconds(d.nanos());
}

}  // namespace pagetide
