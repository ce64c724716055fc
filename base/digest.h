// Digest: 32 bytes of SHA-256, and the two ways to make one. Source: FIPS 180-4, RFC 2104 (OpenSSL
// EVP).
#ifndef PAGETIDE_BASE_DIGEST_H_
#define PAGETIDE_BASE_DIGEST_H_

#include <array>
#include <compare>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace pagetide {

struct Digest {
  std::array<uint8_t, 32> bytes{};

  // Raw 32 bytes, as on the wire and in the store.
  absl::string_view view() const {
    return absl::string_view(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  }
  std::string ToBytes() const { return std::string(view()); }
  std::string ToHex() const;
  // First 12 hex digits: enough for a log line.
  std::string ToShortHex() const;
  // INVALID_ARGUMENT unless `raw` has exactly 32 bytes.
  static absl::StatusOr<Digest> FromBytes(absl::string_view raw);
  // INVALID_ARGUMENT unless `hex` is 64 hexadecimal digits.
  static absl::StatusOr<Digest> FromHex(absl::string_view hex);

  friend bool operator==(const Digest&, const Digest&) = default;
  friend auto operator<=>(const Digest&, const Digest&) = default;
  template <typename H>
  friend H AbslHashValue(H h, const Digest& d) {
    uint64_t head;  // a SHA-256 is already uniform: eight bytes of it are hash enough
    std::memcpy(&head, d.bytes.data(), sizeof(head));
    return H::combine(std::move(h), head);
  }
};

// Incremental SHA-256. Integers go in as little-endian; AppendField prefixes the length as u64 LE,
// so that no two different field lists give the same byte stream. Not thread-safe; one Finish a
// hasher.
class Sha256 {
 public:
  Sha256();
  ~Sha256();
  Sha256(const Sha256&) = delete;
  Sha256& operator=(const Sha256&) = delete;

  Sha256& Append(absl::string_view raw);
  Sha256& AppendField(absl::string_view field);
  Sha256& AppendU32(uint32_t value);
  Sha256& AppendU64(uint64_t value);
  Digest Finish();

 private:
  struct Context;
  std::unique_ptr<Context> context_;
};

Digest Sha256Of(absl::string_view raw);
Digest HmacSha256(absl::string_view key, absl::string_view message);

}  // namespace pagetide

#endif  // PAGETIDE_BASE_DIGEST_H_
