#include "base/digest.h"

#include <openssl/evp.h>
#include <openssl/hmac.h>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"

namespace pagetide {

std::string Digest::ToHex() const {
  return absl::BytesToHexString(view());
}

std::string Digest::ToShortHex() const {
  return absl::BytesToHexString(view().substr(0, 6));
}

absl::StatusOr<Digest> Digest::FromBytes(absl::string_view raw) {
  Digest d;
  if (raw.size() != d.bytes.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("digest has ", raw.size(), " bytes, expected ", d.bytes.size()));
  }
  std::memcpy(d.bytes.data(), raw.data(), raw.size());
  return d;
}

absl::StatusOr<Digest> Digest::FromHex(absl::string_view hex) {
  for (char c : hex) {
    if (!absl::ascii_isxdigit(c)) return absl::InvalidArgumentError("digest is not hexadecimal");
  }
  if (hex.size() != 64) {
    return absl::InvalidArgumentError(
        absl::StrCat("digest has ", hex.size(), " hex digits, expected 64"));
  }
  return FromBytes(absl::HexStringToBytes(hex));
}

struct Sha256::Context {
  EVP_MD_CTX* md = EVP_MD_CTX_new();
  ~Context() { EVP_MD_CTX_free(md); }
};

Sha256::Sha256() : context_(std::make_unique<Context>()) {
  static const EVP_MD* const kSha256 = EVP_MD_fetch(nullptr, "SHA256", nullptr);
  EVP_DigestInit_ex2(context_->md, kSha256, nullptr);
}

Sha256::~Sha256() = default;

Sha256& Sha256::Append(absl::string_view raw) {
  EVP_DigestUpdate(context_->md, raw.data(), raw.size());
  return *this;
}

Sha256& Sha256::AppendField(absl::string_view field) {
  return AppendU64(field.size()).Append(field);
}

Sha256& Sha256::AppendU32(uint32_t value) {
  char le[4];
  for (int i = 0; i < 4; ++i) le[i] = static_cast<char>(value >> (8 * i));
  return Append(absl::string_view(le, sizeof(le)));
}

Sha256& Sha256::AppendU64(uint64_t value) {
  char le[8];
  for (int i = 0; i < 8; ++i) le[i] = static_cast<char>(value >> (8 * i));
  return Append(absl::string_view(le, sizeof(le)));
}

Digest Sha256::Finish() {
  Digest d;
  unsigned int size = 0;
  EVP_DigestFinal_ex(context_->md, d.bytes.data(), &size);
  return d;
}

Digest Sha256Of(absl::string_view raw) {
  return Sha256().Append(raw).Finish();
}

Digest HmacSha256(absl::string_view key, absl::string_view message) {
  Digest d;
  unsigned int size = 0;
  HMAC(EVP_sha256(), key.data(), static_cast<int>(key.size()),
       reinterpret_cast<const unsigned char*>(message.data()), message.size(), d.bytes.data(),
       &size);
  return d;
}

}  // namespace pagetide
