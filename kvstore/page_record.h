// The page record: what lies in a segment file in front of a page's body (docs/store_format.md).
//
//   offset  size  field (integers little-endian)
//        0     4  magic "PTPG"
//        4     2  format version (1)
//        6     2  header bytes, numerics id included
//        8     8  body bytes: the raw page
//       16    16  XXH3-128 of the raw page, low then high
//       32    32  page key
//       64    32  component fingerprint
//       96    32  prefix key        (zero unless flag 1)
//      128    32  parent prefix key (zero unless flag 2)
//      160     4  layer group
//      164     4  depth in pages
//      168     2  codec of the stored body (0: raw, 1: page_body_codec.h)
//      170     2  flags
//      172     2  bytes of the numerics id (at most 256)
//      174     2  zero
//      176     8  stored body bytes
//      184     8  XXH3 of the header without this field
//      192     n  numerics id
// The record carries its key, so that two valid records that changed places are found out.
// Pure functions; thread-safe.
#ifndef PAGETIDE_KVSTORE_PAGE_RECORD_H_
#define PAGETIDE_KVSTORE_PAGE_RECORD_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "core/page_store.h"
#include "kvstore/page_body_codec.h"

namespace pagetide {

inline constexpr uint16_t kPageRecordVersion = 1;
inline constexpr uint32_t kPageRecordFixedBytes = 192;
inline constexpr uint32_t kMaxNumericsIdBytes = 256;
// No page is larger (core/geometry.h has the same bound).
inline constexpr uint64_t kMaxPageBodyBytes = uint64_t{1} << 30;

enum class PageCodec : uint16_t { kRaw = 0, kPlanes = 1 };

struct PageRecordHeader {
  PageRecordMeta meta;
  PageCodec codec = PageCodec::kRaw;
  uint64_t stored_bytes = 0;  // of the body in the file
};

// INVALID_ARGUMENT names the field and the numbers: numerics id or body too long, a page that is
// its own parent.
absl::Status ValidatePageMeta(const PageRecordMeta& meta);

// ValidatePageMeta, and the body is what the meta says, and the tokens make the prefix key.
absl::Status ValidatePutPage(const PutPage& page);

// Bytes that EncodePageRecordHeader makes of this meta.
uint32_t PageRecordHeaderBytes(const PageRecordMeta& meta);
// The meta is valid. Codec 0, or codec 1 with that many stored bytes, fewer than the body has.
std::string EncodePageRecordHeader(const PageRecordMeta& meta);
std::string EncodeCompressedRecordHeader(const PageRecordMeta& meta, uint64_t stored_bytes);

// Reads a header from the front of `bytes`, which may be longer. Checks every declared length
// before it is used. UNIMPLEMENTED: a version or codec of a newer program (a miss); DATA_LOSS:
// damage.
absl::StatusOr<PageRecordHeader> ParsePageRecordHeader(absl::string_view bytes);

// Whether `header_bytes` and `stored`, the body as it is stored, are the undamaged record of `key`
// (and of `checksum`). DATA_LOSS or UNIMPLEMENTED otherwise. `decoder` as below.
absl::Status VerifyPageRecord(absl::string_view header_bytes, std::span<const std::byte> stored,
                              const PageKey& key, const Checksum128& checksum,
                              PageBodyDecoder* decoder = nullptr);
// The same for a compressed body, which goes to `body` (the raw body's size). `decoder` keeps its
// buffers from call to call; null: one of its own.
absl::Status UnpackPageRecord(absl::string_view header_bytes, std::span<const std::byte> stored,
                              const PageKey& key, const Checksum128& checksum,
                              std::span<std::byte> body, PageBodyDecoder* decoder = nullptr);

}  // namespace pagetide

#endif  // PAGETIDE_KVSTORE_PAGE_RECORD_H_
