// Compressed page bodies: no bytes crash the decoder, both of its forms agree, and what the encoder
// makes of any bytes comes back.
// Input: a u8 (bit 0: decode or encode, bit 1: lz4 or zstd), a u16 (raw size, or how often the
// bytes are repeated), then the bytes.
#include "kvstore/page_body_codec.h"

#include <string>
#include <vector>

#include "tests/fuzz/fuzz_check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace pagetide;
  FuzzInput in(data, size);
  const uint8_t choice = in.Take<uint8_t>();
  const uint16_t number = in.Take<uint16_t>();
  const std::string bytes(in.rest());
  PageBodyDecoder decoder;
  if (choice & 1) {
    std::string text = bytes;
    for (uint32_t i = 0; i < number % 64 && text.size() < 600'000; ++i) text += bytes;
    const auto raw = std::as_bytes(std::span(text.data(), text.size()));
    PageBodyEncoder encoder(choice & 2 ? PageCompression::kZstd : PageCompression::kLz4);
    const std::span<const std::byte> stored = encoder.Encode(raw);
    if (stored.empty()) return 0;
    FUZZ_CHECK(stored.size() < raw.size());
    FUZZ_CHECK(stored.size() >= MinCompressedBytes(raw.size()));
    std::vector<std::byte> out(raw.size());
    FUZZ_CHECK(decoder.Decode(stored, out).ok());
    FUZZ_CHECK(std::equal(out.begin(), out.end(), raw.begin()));
    return 0;
  }
  std::vector<std::byte> out(uint64_t{number} * 8 + (choice >> 2));
  const auto stored = std::as_bytes(std::span(bytes.data(), bytes.size()));
  const absl::Status decoded = decoder.Decode(stored, out);
  const auto checksum = decoder.ChecksumOfRaw(stored, out.size());
  FUZZ_CHECK(decoded.ok() == checksum.ok());
  if (decoded.ok()) FUZZ_CHECK(*checksum == ChecksumOf(out));
  return 0;
}
