#include "kvstore/page_body_codec.h"

#include <lz4.h>
#include <zstd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/byte_planes.h"

namespace pagetide {
namespace {

// Codecs of a run of planes. These numbers are on disks.
constexpr uint8_t kRaw = 0;
constexpr uint8_t kLz4 = 1;
constexpr uint8_t kZstd = 2;

constexpr size_t kChunkHeaderBytes = 2;  // width, runs
constexpr size_t kRunHeaderBytes = 6;    // planes, codec, u32 stored bytes
// The encoder's. Groups of block types have more, but their bytes after the scale look alike.
constexpr std::array<uint32_t, 3> kWidths = {1, 2, 4};
// zstd's other levels search longer for repeats that rows do not have.
constexpr int kZstdLevel = 1;

constexpr size_t kSampleWindows = 16;
constexpr size_t kSampleWindowBytes = 1024;
constexpr size_t kSampleBytes = kSampleWindows * kSampleWindowBytes;

// Up to kSampleBytes from all over `bytes`; windows begin at multiples of 4.
size_t TakeSample(std::span<const std::byte> bytes, std::byte* sample) {
  if (bytes.size() <= kSampleBytes) {
    std::memcpy(sample, bytes.data(), bytes.size());
    return bytes.size();
  }
  const size_t stride = (bytes.size() - kSampleWindowBytes) / (kSampleWindows - 1) / 4 * 4;
  for (size_t i = 0; i < kSampleWindows; ++i) {
    std::memcpy(sample + i * kSampleWindowBytes, bytes.data() + i * stride, kSampleWindowBytes);
  }
  return kSampleBytes;
}

// n · log2(n) for n up to a sample's size.
double NLogN(size_t n) {
  static const auto* const table = [] {
    auto* t = new std::array<float, kSampleBytes + 1>();
    for (size_t i = 2; i < t->size(); ++i) {
      (*t)[i] = static_cast<float>(i) * std::log2(static_cast<float>(i));
    }
    return t;
  }();
  return (*table)[n];
}

// Bits a byte of `bytes`, every `width`-th from `first`, by their frequencies. A small sample makes
// the entropy look small; Miller and Madow's term puts that right.
double BitsPerByte(std::span<const std::byte> bytes, size_t first, size_t width) {
  std::array<uint32_t, 256> counts{};
  size_t n = 0;
  for (size_t i = first; i < bytes.size(); i += width, ++n)
    ++counts[static_cast<uint8_t>(bytes[i])];
  if (n == 0) return 8;
  double sum = 0;
  int symbols = 0;
  for (uint32_t count : counts) {
    symbols += count > 0;
    sum += NLogN(count);
  }
  const double size = static_cast<double>(n);
  return std::min(8.0, (NLogN(n) - sum) / size + (symbols - 1) / (2 * size * std::log(2.0)));
}

// The element size whose planes differ most from each other.
uint32_t ChooseWidth(std::span<const std::byte> chunk) {
  std::array<std::byte, kSampleBytes> buffer;
  const std::span<const std::byte> sample(buffer.data(), TakeSample(chunk, buffer.data()));
  // A wider split has to earn the time that it takes.
  constexpr double kGain = 0.1;
  uint32_t best = 1;
  double least = 9;
  for (uint32_t width : kWidths) {
    if (sample.size() < width * 64) break;
    double bits = 0;
    for (uint32_t p = 0; p < width; ++p) bits += BitsPerByte(sample, p, width) / width;
    if (bits + (width == 1 ? 0 : kGain) < least) {
      least = bits;
      best = width;
    }
  }
  return best;
}

const char* Chars(const std::byte* bytes) {
  return reinterpret_cast<const char*>(bytes);
}
char* Chars(std::byte* bytes) {
  return reinterpret_cast<char*>(bytes);
}

}  // namespace

std::optional<PageCompression> ParsePageCompression(absl::string_view name) {
  if (name == "none") return PageCompression::kNone;
  if (name == "lz4") return PageCompression::kLz4;
  if (name == "zstd") return PageCompression::kZstd;
  return std::nullopt;
}

uint64_t MinCompressedBytes(uint64_t raw_bytes) {
  const uint64_t chunks = (raw_bytes + kBodyChunkBytes - 1) / kBodyChunkBytes;
  return chunks * (kChunkHeaderBytes + kRunHeaderBytes + 1);
}

// ---- encoding ----------------------------------------------------------------------------------

PageBodyEncoder::~PageBodyEncoder() {
  ZSTD_freeCCtx(zstd_);
}

std::span<const std::byte> PageBodyEncoder::Encode(std::span<const std::byte> raw) {
  if (compression_ == PageCompression::kNone) return {};
  out_.clear();
  tally_ = {};
  const size_t limit = raw.size() - raw.size() / 16;
  for (size_t at = 0; at < raw.size(); at += kBodyChunkBytes) {
    EncodeChunk(raw.subspan(at, std::min<size_t>(kBodyChunkBytes, raw.size() - at)));
    if (out_.size() > limit) return {};
  }
  return out_;
}

void PageBodyEncoder::EncodeChunk(std::span<const std::byte> chunk) {
  const uint32_t width = ChooseWidth(chunk);
  const size_t count = chunk.size() / width;
  std::span<const std::byte> planes = chunk;
  if (width > 1) {
    planes_.resize(kBodyChunkBytes);
    kernels::SplitBytePlanesHost(
        {chunk.data(), planes_.data(), static_cast<int64_t>(count), static_cast<int32_t>(width)});
    planes = planes_;
  }
  const size_t start = out_.size();
  const StoreCodecBytes tally_before = tally_;
  out_.resize(start + kChunkHeaderBytes + width * kRunHeaderBytes);
  bool is_packed = false;
  for (uint32_t p = 0; p < width; ++p) {
    const size_t body = out_.size();
    const uint8_t codec = EncodePlane(planes.subspan(p * count, count));
    is_packed = is_packed || codec != kRaw;
    const uint32_t stored = static_cast<uint32_t>(out_.size() - body);
    std::byte* const header = out_.data() + start + kChunkHeaderBytes + p * kRunHeaderBytes;
    header[0] = std::byte{1};
    header[1] = std::byte{codec};
    for (int i = 0; i < 4; ++i) header[2 + i] = static_cast<std::byte>(stored >> (8 * i));
  }
  out_[start] = static_cast<std::byte>(width);
  out_[start + 1] = static_cast<std::byte>(width);
  const std::span<const std::byte> rest = chunk.subspan(count * width);
  out_.insert(out_.end(), rest.begin(), rest.end());
  if (is_packed || width == 1) return;
  // Nothing packs: one run as it is, so that the reader need not merge planes.
  tally_ = tally_before;
  tally_.raw.in += chunk.size();
  tally_.raw.out += chunk.size();
  const uint32_t stored = static_cast<uint32_t>(chunk.size());
  out_.resize(start + kChunkHeaderBytes + kRunHeaderBytes);
  std::byte* const header = out_.data() + start;
  header[0] = header[1] = header[2] = std::byte{1};
  header[3] = std::byte{kRaw};
  for (int i = 0; i < 4; ++i) header[4 + i] = static_cast<std::byte>(stored >> (8 * i));
  out_.insert(out_.end(), chunk.begin(), chunk.end());
}

uint8_t PageBodyEncoder::EncodePlane(std::span<const std::byte> plane) {
  const size_t at = out_.size();
  std::array<std::byte, kSampleBytes> sample;
  const size_t sample_bytes = TakeSample(plane, sample.data());
  std::array<char, LZ4_COMPRESSBOUND(kSampleBytes)> packed_sample;
  const double by_lz4 =
      static_cast<double>(LZ4_compress_default(Chars(sample.data()), packed_sample.data(),
                                               static_cast<int>(sample_bytes),
                                               static_cast<int>(packed_sample.size()))) /
      static_cast<double>(std::max<size_t>(sample_bytes, 1));
  const double by_frequency = BitsPerByte(std::span(sample.data(), sample_bytes), 0, 1) / 8;
  constexpr double kPays = 15.0 / 16;
  uint8_t codec = kRaw;
  if (compression_ == PageCompression::kZstd && std::min(by_lz4, by_frequency) < kPays) {
    // lz4 unpacks several times faster; take it where it packs about as well, or to almost nothing.
    codec = by_lz4 <= std::max(by_frequency * 1.05, 1.0 / 64) ? kLz4 : kZstd;
  } else if (compression_ == PageCompression::kLz4 && by_lz4 < kPays) {
    codec = kLz4;
  }
  size_t packed = 0;
  if (codec == kLz4) {
    out_.resize(at + static_cast<size_t>(LZ4_compressBound(static_cast<int>(plane.size()))));
    packed = static_cast<size_t>(LZ4_compress_default(Chars(plane.data()), Chars(out_.data() + at),
                                                      static_cast<int>(plane.size()),
                                                      static_cast<int>(out_.size() - at)));
  } else if (codec == kZstd) {
    if (zstd_ == nullptr) zstd_ = ZSTD_createCCtx();
    out_.resize(at + ZSTD_compressBound(plane.size()));
    packed = ZSTD_compressCCtx(zstd_, out_.data() + at, out_.size() - at, plane.data(),
                               plane.size(), kZstdLevel);
    if (ZSTD_isError(packed)) packed = 0;
  }
  if (packed == 0 || packed >= plane.size()) {
    codec = kRaw;
    packed = plane.size();
    out_.resize(at);
    out_.insert(out_.end(), plane.begin(), plane.end());
  }
  out_.resize(at + packed);
  StoreCodecBytes::InOut& bytes =
      codec == kRaw ? tally_.raw : (codec == kLz4 ? tally_.lz4 : tally_.zstd);
  bytes.in += plane.size();
  bytes.out += packed;
  return codec;
}

// ---- decoding ----------------------------------------------------------------------------------

PageBodyDecoder::~PageBodyDecoder() {
  ZSTD_freeDCtx(zstd_);
}

absl::Status PageBodyDecoder::Decode(std::span<const std::byte> stored, std::span<std::byte> raw) {
  for (size_t at = 0; at < raw.size(); at += kBodyChunkBytes) {
    const absl::Status decoded =
        DecodeChunk(&stored, raw.subspan(at, std::min<size_t>(kBodyChunkBytes, raw.size() - at)));
    if (!decoded.ok()) {
      return absl::DataLossError(
          absl::StrCat("page body: chunk ", at / kBodyChunkBytes, ": ", decoded.message()));
    }
  }
  if (!stored.empty()) {
    return absl::DataLossError(
        absl::StrCat("page body: ", stored.size(), " bytes behind the last chunk"));
  }
  return absl::OkStatus();
}

absl::StatusOr<Checksum128> PageBodyDecoder::ChecksumOfRaw(std::span<const std::byte> stored,
                                                           uint64_t raw_bytes) {
  ChecksumStream checksum;
  std::vector<std::byte> chunk(std::min(raw_bytes, kBodyChunkBytes));
  for (uint64_t at = 0; at < raw_bytes; at += kBodyChunkBytes) {
    const std::span<std::byte> raw(chunk.data(), std::min(kBodyChunkBytes, raw_bytes - at));
    const absl::Status decoded = DecodeChunk(&stored, raw);
    if (!decoded.ok()) {
      return absl::DataLossError(
          absl::StrCat("page body: chunk ", at / kBodyChunkBytes, ": ", decoded.message()));
    }
    checksum.Update(raw);
  }
  if (!stored.empty()) {
    return absl::DataLossError(
        absl::StrCat("page body: ", stored.size(), " bytes behind the last chunk"));
  }
  return checksum.Get();
}

absl::Status PageBodyDecoder::DecodeChunk(std::span<const std::byte>* stored,
                                          std::span<std::byte> raw) {
  if (stored->size() < kChunkHeaderBytes) {
    return absl::DataLossError(absl::StrCat("header cut off after ", stored->size(), " bytes"));
  }
  const size_t width = static_cast<uint8_t>((*stored)[0]);
  const size_t runs = static_cast<uint8_t>((*stored)[1]);
  if (width < 1 || width > kernels::kMaxPlaneElementBytes || width > raw.size() || runs < 1 ||
      runs > width) {
    return absl::DataLossError(
        absl::StrCat(runs, " runs of ", width, " planes for ", raw.size(), " bytes"));
  }
  if (stored->size() < kChunkHeaderBytes + runs * kRunHeaderBytes) {
    return absl::DataLossError(absl::StrCat("header of ", runs, " runs cut off"));
  }
  const std::span<const std::byte> headers =
      stored->subspan(kChunkHeaderBytes, runs * kRunHeaderBytes);
  *stored = stored->subspan(kChunkHeaderBytes + headers.size());
  const size_t count = raw.size() / width;
  std::span<std::byte> planes = raw.first(count);
  if (width > 1) {
    planes_.resize(kBodyChunkBytes);
    planes = std::span(planes_).first(count * width);
  }
  size_t done = 0;  // planes
  for (size_t r = 0; r < runs; ++r) {
    const std::byte* const header = headers.data() + r * kRunHeaderBytes;
    const size_t num_planes = static_cast<uint8_t>(header[0]);
    size_t packed = 0;
    for (int i = 0; i < 4; ++i) packed |= static_cast<size_t>(header[2 + i]) << (8 * i);
    if (num_planes < 1 || num_planes > width - done) {
      return absl::DataLossError(
          absl::StrCat("run ", r, " has ", num_planes, " planes, ", width - done, " are left"));
    }
    if (packed > stored->size()) {
      return absl::DataLossError(
          absl::StrCat("run ", r, " declares ", packed, " bytes, ", stored->size(), " are left"));
    }
    PT_RETURN_IF_ERROR(DecodeRun(static_cast<uint8_t>(header[1]), stored->first(packed),
                                 planes.subspan(done * count, num_planes * count)));
    *stored = stored->subspan(packed);
    done += num_planes;
  }
  if (done != width) {
    return absl::DataLossError(absl::StrCat("runs of ", done, " planes, expected ", width));
  }
  if (width > 1) {
    kernels::MergeBytePlanesHost(
        {planes.data(), raw.data(), static_cast<int64_t>(count), static_cast<int32_t>(width)});
  }
  const std::span<std::byte> rest = raw.subspan(count * width);
  if (stored->size() < rest.size()) {
    return absl::DataLossError(absl::StrCat("the last ", rest.size(), " bytes are cut off"));
  }
  std::copy_n(stored->begin(), rest.size(), rest.begin());
  *stored = stored->subspan(rest.size());
  return absl::OkStatus();
}

absl::Status PageBodyDecoder::DecodeRun(uint8_t codec, std::span<const std::byte> packed,
                                        std::span<std::byte> raw) {
  switch (codec) {
    case kRaw:
      if (packed.size() == raw.size()) {
        std::copy(packed.begin(), packed.end(), raw.begin());
        return absl::OkStatus();
      }
      break;
    case kLz4:
      // Sizes are those of a chunk at most, so they fit lz4's int.
      if (LZ4_decompress_safe(Chars(packed.data()), Chars(raw.data()),
                              static_cast<int>(std::min<size_t>(packed.size(), INT32_MAX)),
                              static_cast<int>(raw.size())) == static_cast<int>(raw.size())) {
        return absl::OkStatus();
      }
      break;
    case kZstd:
      if (zstd_ == nullptr) zstd_ = ZSTD_createDCtx();
      if (ZSTD_decompressDCtx(zstd_, raw.data(), raw.size(), packed.data(), packed.size()) ==
          raw.size()) {
        return absl::OkStatus();
      }
      break;
    default:
      return absl::DataLossError(absl::StrCat("codec ", codec));
  }
  return absl::DataLossError(
      absl::StrCat("codec ", codec, ": ", packed.size(), " bytes do not unpack to ", raw.size()));
}

}  // namespace pagetide
