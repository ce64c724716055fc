#include "kvstore/page_record.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/little_endian.h"
#include "base/status_macros.h"

namespace pagetide {
namespace {

constexpr uint32_t kPageMagic = 0x47505450;  // "PTPG"
constexpr size_t kHeaderChecksumOffset = 184;
constexpr uint16_t kHasPrefix = 1;
constexpr uint16_t kHasParent = 2;

std::span<const std::byte> AsBytes(absl::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

// Of the bytes before the checksum field and of those after it.
uint64_t HeaderChecksum(absl::string_view fixed, absl::string_view numerics_id) {
  std::string covered(fixed.substr(0, kHeaderChecksumOffset));
  covered.append(numerics_id.data(), numerics_id.size());
  return ChecksumOf(AsBytes(covered)).low;
}

Digest DigestAt(absl::string_view raw) {
  Digest d;
  std::memcpy(d.bytes.data(), raw.data(), d.bytes.size());
  return d;
}

bool IsItsOwnParent(const PageRecordMeta& meta) {
  return meta.prefix.has_value() && meta.prefix == meta.parent;
}

}  // namespace

absl::Status ValidatePageMeta(const PageRecordMeta& meta) {
  if (meta.numerics_id.size() > kMaxNumericsIdBytes) {
    return absl::InvalidArgumentError(absl::StrCat("numerics_id has ", meta.numerics_id.size(),
                                                   " bytes, at most ", kMaxNumericsIdBytes));
  }
  if (meta.body_bytes == 0 || meta.body_bytes > kMaxPageBodyBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("body_bytes is ", meta.body_bytes, ", allowed are 1 to ", kMaxPageBodyBytes));
  }
  if (IsItsOwnParent(meta)) {
    return absl::InvalidArgumentError(absl::StrCat("prefix_key and parent_prefix_key are both ",
                                                   meta.prefix->digest.ToShortHex(),
                                                   ": no page continues itself"));
  }
  return absl::OkStatus();
}

absl::Status ValidatePutPage(const PutPage& page) {
  const PageRecordMeta& meta = page.meta;
  PT_RETURN_IF_ERROR(ValidatePageMeta(meta));
  const std::string what = absl::StrCat("put page ", meta.key.digest.ToShortHex());
  if (page.body.size() != meta.body_bytes) {
    return absl::InvalidArgumentError(absl::StrCat(what, ": body_bytes is ", meta.body_bytes,
                                                   ", the body has ", page.body.size()));
  }
  if (!page.tokens.empty()) {
    if (page.tokens.size() > kMaxIndexedPageTokens) {
      return absl::InvalidArgumentError(absl::StrCat(what, ": tokens has ", page.tokens.size(),
                                                     " entries, at most ", kMaxIndexedPageTokens));
    }
    // Whoever finds the page by its tokens trusts that it is theirs.
    if (!meta.prefix.has_value() || !meta.parent.has_value() ||
        NextPrefixKey(*meta.parent, page.tokens) != *meta.prefix) {
      return absl::InvalidArgumentError(
          absl::StrCat(what, ": parent and the ", page.tokens.size(),
                       " tokens do not make the prefix key of the page"));
    }
  }
  if (ChecksumOf(page.body) != meta.checksum) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, ": the body's checksum is not ", meta.checksum.ToHex()));
  }
  return absl::OkStatus();
}

uint32_t PageRecordHeaderBytes(const PageRecordMeta& meta) {
  return kPageRecordFixedBytes + static_cast<uint32_t>(meta.numerics_id.size());
}

namespace {

std::string EncodeHeader(const PageRecordMeta& meta, PageCodec codec, uint64_t stored_bytes) {
  static constexpr Digest kZero;
  std::string out;
  out.reserve(PageRecordHeaderBytes(meta));
  AppendLittleEndian<uint32_t>(&out, kPageMagic);
  AppendLittleEndian<uint16_t>(&out, kPageRecordVersion);
  AppendLittleEndian<uint16_t>(&out, static_cast<uint16_t>(PageRecordHeaderBytes(meta)));
  AppendLittleEndian<uint64_t>(&out, meta.body_bytes);
  AppendLittleEndian<uint64_t>(&out, meta.checksum.low);
  AppendLittleEndian<uint64_t>(&out, meta.checksum.high);
  for (const Digest& d :
       {meta.key.digest, meta.fingerprint, meta.prefix ? meta.prefix->digest : kZero,
        meta.parent ? meta.parent->digest : kZero}) {
    out.append(d.view().data(), d.view().size());
  }
  AppendLittleEndian<uint32_t>(&out, meta.group);
  AppendLittleEndian<uint32_t>(&out, meta.depth);
  AppendLittleEndian<uint16_t>(&out, static_cast<uint16_t>(codec));
  AppendLittleEndian<uint16_t>(
      &out, static_cast<uint16_t>((meta.prefix ? kHasPrefix : 0) | (meta.parent ? kHasParent : 0)));
  AppendLittleEndian<uint16_t>(&out, static_cast<uint16_t>(meta.numerics_id.size()));
  AppendLittleEndian<uint16_t>(&out, 0);
  AppendLittleEndian<uint64_t>(&out, stored_bytes);
  AppendLittleEndian<uint64_t>(&out, HeaderChecksum(out, meta.numerics_id));
  out += meta.numerics_id;
  return out;
}

}  // namespace

std::string EncodePageRecordHeader(const PageRecordMeta& meta) {
  return EncodeHeader(meta, PageCodec::kRaw, meta.body_bytes);
}

std::string EncodeCompressedRecordHeader(const PageRecordMeta& meta, uint64_t stored_bytes) {
  return EncodeHeader(meta, PageCodec::kPlanes, stored_bytes);
}

absl::StatusOr<PageRecordHeader> ParsePageRecordHeader(absl::string_view bytes) {
  if (bytes.size() < kPageRecordFixedBytes) {
    return absl::DataLossError(absl::StrCat(
        "page record: ", bytes.size(), " bytes, the header alone has ", kPageRecordFixedBytes));
  }
  LittleEndianReader in(bytes.substr(0, kPageRecordFixedBytes));
  const uint32_t magic = in.Take<uint32_t>();
  if (magic != kPageMagic)
    return absl::DataLossError(absl::StrCat("page record: magic 0x", absl::Hex(magic)));
  const uint16_t version = in.Take<uint16_t>();
  if (version != kPageRecordVersion) {
    return absl::UnimplementedError(
        absl::StrCat("page record: version ", version, ", known is ", kPageRecordVersion));
  }
  const uint16_t header_bytes = in.Take<uint16_t>();
  PageRecordHeader header;
  PageRecordMeta& meta = header.meta;
  meta.body_bytes = in.Take<uint64_t>();
  meta.checksum.low = in.Take<uint64_t>();
  meta.checksum.high = in.Take<uint64_t>();
  meta.key.digest = DigestAt(in.TakeBytes(32));
  meta.fingerprint = DigestAt(in.TakeBytes(32));
  const Digest prefix = DigestAt(in.TakeBytes(32));
  const Digest parent = DigestAt(in.TakeBytes(32));
  meta.group = in.Take<uint32_t>();
  meta.depth = in.Take<uint32_t>();
  const uint16_t codec = in.Take<uint16_t>();
  const uint16_t flags = in.Take<uint16_t>();
  const uint16_t id_bytes = in.Take<uint16_t>();
  in.Take<uint16_t>();
  header.stored_bytes = in.Take<uint64_t>();
  const uint64_t checksum = in.Take<uint64_t>();
  if (id_bytes > kMaxNumericsIdBytes || header_bytes != kPageRecordFixedBytes + id_bytes ||
      header_bytes > bytes.size()) {
    return absl::DataLossError(absl::StrCat("page record: header of ", header_bytes,
                                            " bytes with a numerics id of ", id_bytes, ", ",
                                            bytes.size(), " bytes given"));
  }
  const absl::string_view id = bytes.substr(kPageRecordFixedBytes, id_bytes);
  const uint64_t actual = HeaderChecksum(bytes.substr(0, kPageRecordFixedBytes), id);
  if (actual != checksum) {
    return absl::DataLossError(absl::StrCat("page record: header checksum 0x", absl::Hex(actual),
                                            " != 0x", absl::Hex(checksum)));
  }
  // From here on the bytes are those that some program wrote; a strange value is a newer one's.
  if (codec > static_cast<uint16_t>(PageCodec::kPlanes)) {
    return absl::UnimplementedError(absl::StrCat("page record: codec ", codec));
  }
  header.codec = static_cast<PageCodec>(codec);
  const bool fits = header.codec == PageCodec::kRaw
                        ? header.stored_bytes == meta.body_bytes
                        : header.stored_bytes < meta.body_bytes &&
                              header.stored_bytes >= MinCompressedBytes(meta.body_bytes);
  if (meta.body_bytes == 0 || meta.body_bytes > kMaxPageBodyBytes || !fits) {
    return absl::DataLossError(absl::StrCat("page record: body of ", meta.body_bytes,
                                            " bytes stored in ", header.stored_bytes));
  }
  if (flags & kHasPrefix) meta.prefix = PrefixKey{prefix};
  if (flags & kHasParent) meta.parent = PrefixKey{parent};
  if (IsItsOwnParent(meta)) {
    return absl::DataLossError(
        absl::StrCat("page record: prefix and parent are both ", meta.prefix->digest.ToShortHex()));
  }
  meta.numerics_id = std::string(id);
  return header;
}

namespace {

// The header, if it is that of `key` and of a body of so many stored bytes.
absl::StatusOr<PageRecordHeader> ParseHeaderOf(absl::string_view header_bytes,
                                               std::span<const std::byte> stored,
                                               const PageKey& key) {
  PT_ASSIGN_OR_RETURN(PageRecordHeader header, ParsePageRecordHeader(header_bytes));
  if (header.meta.key != key) {
    return absl::DataLossError(absl::StrCat("page record of ", key.digest.ToShortHex(),
                                            ": carries the key ",
                                            header.meta.key.digest.ToShortHex()));
  }
  if (header.stored_bytes != stored.size()) {
    return absl::DataLossError(absl::StrCat("page record of ", key.digest.ToShortHex(),
                                            ": body of ", header.stored_bytes, " bytes, expected ",
                                            stored.size()));
  }
  return header;
}

absl::Status Compare(const Checksum128& actual, const PageRecordHeader& header,
                     const Checksum128& checksum) {
  if (actual == header.meta.checksum && actual == checksum) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat("page record of ", header.meta.key.digest.ToShortHex(),
                                          ": body checksum 0x", actual.ToHex(), " != 0x",
                                          checksum.ToHex()));
}

absl::Status Of(const PageKey& key, const absl::Status& status) {
  return absl::Status(status.code(), absl::StrCat("page record of ", key.digest.ToShortHex(), ": ",
                                                  status.message()));
}

}  // namespace

absl::Status VerifyPageRecord(absl::string_view header_bytes, std::span<const std::byte> stored,
                              const PageKey& key, const Checksum128& checksum,
                              PageBodyDecoder* decoder) {
  PT_ASSIGN_OR_RETURN(const PageRecordHeader header, ParseHeaderOf(header_bytes, stored, key));
  if (header.codec == PageCodec::kRaw) return Compare(ChecksumOf(stored), header, checksum);
  PageBodyDecoder own;
  const absl::StatusOr<Checksum128> actual =
      (decoder != nullptr ? *decoder : own).ChecksumOfRaw(stored, header.meta.body_bytes);
  if (!actual.ok()) return Of(key, actual.status());
  return Compare(*actual, header, checksum);
}

absl::Status UnpackPageRecord(absl::string_view header_bytes, std::span<const std::byte> stored,
                              const PageKey& key, const Checksum128& checksum,
                              std::span<std::byte> body, PageBodyDecoder* decoder) {
  PT_ASSIGN_OR_RETURN(const PageRecordHeader header, ParseHeaderOf(header_bytes, stored, key));
  if (header.codec != PageCodec::kPlanes || header.meta.body_bytes != body.size()) {
    return Of(key, absl::DataLossError(absl::StrCat("codec ", static_cast<int>(header.codec),
                                                    " and a raw body of ", header.meta.body_bytes,
                                                    " bytes, expected codec 1 and ", body.size())));
  }
  PageBodyDecoder own;
  const absl::Status decoded = (decoder != nullptr ? *decoder : own).Decode(stored, body);
  if (!decoded.ok()) return Of(key, decoded);
  return Compare(ChecksumOf(body), header, checksum);
}

}  // namespace pagetide
