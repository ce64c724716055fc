// Between the port's types and pagetide.v1 messages; used by the client (remote_page_store) and by
// the service. Pure functions; thread-safe. Decoders check sizes: INVALID_ARGUMENT names the field.
#ifndef PAGETIDE_KVSTORE_PAGE_STORE_CODEC_H_
#define PAGETIDE_KVSTORE_PAGE_STORE_CODEC_H_

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/page_store.h"
#include "pagetide/v1/page_store.pb.h"

namespace pagetide {

// Field of the payload in PutPagesRequest and GetPagesResponse.
inline constexpr int kPageBodyField = 15;
// A part of a body on the wire.
inline constexpr uint64_t kPagePartBytes = uint64_t{1} << 20;

absl::StatusOr<PageKey> DecodePageKey(absl::string_view field, const std::string& bytes);
void EncodeChecksum(const Checksum128& checksum, v1::BodyChecksum* out);
Checksum128 DecodeChecksum(const v1::BodyChecksum& checksum);

google::protobuf::Timestamp EncodeTime(absl::Time t);
// INVALID_ARGUMENT names the field: nanos or seconds out of range.
absl::StatusOr<absl::Time> DecodeTime(absl::string_view field,
                                      const google::protobuf::Timestamp& t);

absl::StatusOr<PrefixKey> DecodePrefixKey(absl::string_view field, const std::string& bytes);
absl::StatusOr<Digest> DecodeFingerprint(absl::string_view field, const std::string& bytes);

void EncodePageHeader(const PageRecordMeta& meta, v1::PageHeader* out);
absl::StatusOr<PageRecordMeta> DecodePageHeader(const v1::PageHeader& header);

v1::Durability EncodeDurability(Durability level);
absl::StatusOr<Durability> DecodeDurability(v1::Durability level);

void EncodeManifestMessage(const ManifestRecord& manifest, v1::Manifest* out);
absl::StatusOr<ManifestRecord> DecodeManifestMessage(const v1::Manifest& manifest);

void EncodeManifestEntry(const ManifestEntry& entry, v1::ListManifestsResponse::Entry* out);
absl::StatusOr<ManifestEntry> DecodeManifestEntry(const v1::ListManifestsResponse::Entry& entry);

void EncodeRetention(const Retention& retention, v1::Retention* out);
absl::StatusOr<Retention> DecodeRetention(const v1::Retention& retention);

void EncodeStats(const StoreStats& stats, v1::GetStoreStatsResponse* out);
StoreStats DecodeStats(const v1::GetStoreStatsResponse& stats);

absl::StatusOr<absl::Duration> DecodeDuration(absl::string_view field,
                                              const google::protobuf::Duration& d);

}  // namespace pagetide

#endif  // PAGETIDE_KVSTORE_PAGE_STORE_CODEC_H_
