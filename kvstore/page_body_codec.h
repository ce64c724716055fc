// Lossless compression of page bodies: codec 1 of the page record (docs/store_format.md).
//
// A body is cut into chunks of 256 KiB. A chunk of numbers is split into byte planes, so that signs
// and exponents, which repeat, lie apart from mantissas, which do not; each plane is then stored as
// it is or packed by lz4 or zstd, whichever its own bytes ask for. The encoder looks at a sample
// and needs to know no data type: pages of any model, and of any client, go through it.
//
// What is packed says nothing of its own integrity: the record's checksum of the raw bytes does.
#ifndef PAGETIDE_KVSTORE_PAGE_BODY_CODEC_H_
#define PAGETIDE_KVSTORE_PAGE_BODY_CODEC_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/checksum.h"
#include "core/page_store.h"

struct ZSTD_CCtx_s;
struct ZSTD_DCtx_s;

namespace pagetide {

// What the encoder may use.
enum class PageCompression : uint8_t {
  kNone = 0,
  kLz4 = 1,   // finds repeats only: cheap, and gains nothing on most rows
  kZstd = 2,  // also codes bytes by their frequency; lz4 where that packs as well
};

// "none", "lz4", "zstd".
std::optional<PageCompression> ParsePageCompression(absl::string_view name);

inline constexpr uint64_t kBodyChunkBytes = uint64_t{256} << 10;

// The least bytes that a compressed body of `raw_bytes` can have: a declared length below it is
// damage.
uint64_t MinCompressedBytes(uint64_t raw_bytes);

// Not thread-safe; reuse one for several bodies, its buffers are kept.
class PageBodyEncoder {
 public:
  explicit PageBodyEncoder(PageCompression compression) : compression_(compression) {}
  ~PageBodyEncoder();
  PageBodyEncoder(const PageBodyEncoder&) = delete;
  PageBodyEncoder& operator=(const PageBodyEncoder&) = delete;

  // The body, compressed, valid until the next call; empty when it would not get smaller by a
  // sixteenth at least: then it is to be stored raw, and reading it costs nothing.
  std::span<const std::byte> Encode(std::span<const std::byte> raw);
  // What became of the parts of the last body; meaningful if Encode returned one.
  const StoreCodecBytes& tally() const { return tally_; }

 private:
  void EncodeChunk(std::span<const std::byte> chunk);
  // Appends the plane as it is or packed, and returns its codec.
  uint8_t EncodePlane(std::span<const std::byte> plane);

  const PageCompression compression_;
  std::vector<std::byte> out_;
  std::vector<std::byte> planes_;  // of one chunk
  ZSTD_CCtx_s* zstd_ = nullptr;    // made when first needed
  StoreCodecBytes tally_;
};

// Not thread-safe; reuse one for several bodies, its buffers are kept.
class PageBodyDecoder {
 public:
  PageBodyDecoder() = default;
  ~PageBodyDecoder();
  PageBodyDecoder(const PageBodyDecoder&) = delete;
  PageBodyDecoder& operator=(const PageBodyDecoder&) = delete;

  // Fills `raw`, whose size is that of the raw body. DATA_LOSS names the chunk; then the contents
  // of `raw` are undefined. Allocates at most a chunk, whatever the bytes say.
  absl::Status Decode(std::span<const std::byte> stored, std::span<std::byte> raw);
  // The checksum of the raw body, without a place for it.
  absl::StatusOr<Checksum128> ChecksumOfRaw(std::span<const std::byte> stored, uint64_t raw_bytes);

 private:
  // Decodes the chunk at the front of *stored and drops it there.
  absl::Status DecodeChunk(std::span<const std::byte>* stored, std::span<std::byte> raw);
  absl::Status DecodeRun(uint8_t codec, std::span<const std::byte> packed,
                         std::span<std::byte> raw);

  std::vector<std::byte> planes_;
  ZSTD_DCtx_s* zstd_ = nullptr;  // made when first needed
};

}  // namespace pagetide

#endif  // PAGETIDE_KVSTORE_PAGE_BODY_CODEC_H_
