// Little-endian integers in byte strings, for stored and saved formats.
#ifndef PAGETIDE_BASE_LITTLE_ENDIAN_H_
#define PAGETIDE_BASE_LITTLE_ENDIAN_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <type_traits>

#include "absl/strings/string_view.h"

namespace pagetide {

template <typename T>
void AppendLittleEndian(std::string* out, T value) {
  static_assert(std::is_unsigned_v<T>);
  for (size_t i = 0; i < sizeof(T); ++i) {
    out->push_back(static_cast<char>(static_cast<uint64_t>(value) >> (8 * i)));
  }
}

// A u64 length, then the bytes.
inline void AppendField(std::string* out, absl::string_view field) {
  AppendLittleEndian<uint64_t>(out, field.size());
  out->append(field.data(), field.size());
}

// Takes values off the front of a byte string. Every read checks what is left; after the first
// failure all later ones fail too, so that a parser may check ok() once at the end of a fixed part.
class LittleEndianReader {
 public:
  explicit LittleEndianReader(absl::string_view bytes) : rest_(bytes) {}

  template <typename T>
  T Take() {
    static_assert(std::is_unsigned_v<T>);
    const absl::string_view raw = TakeBytes(sizeof(T));
    uint64_t value = 0;
    for (size_t i = 0; i < raw.size(); ++i) {
      value |= static_cast<uint64_t>(static_cast<uint8_t>(raw[i])) << (8 * i);
    }
    return static_cast<T>(value);
  }
  // A view into the input: empty, and ok() false, when fewer than `n` bytes are left.
  absl::string_view TakeBytes(uint64_t n) {
    if (!ok_ || n > rest_.size()) {
      ok_ = false;
      return {};
    }
    const absl::string_view out = rest_.substr(0, n);
    rest_.remove_prefix(n);
    return out;
  }
  absl::string_view TakeField() { return TakeBytes(Take<uint64_t>()); }
  bool ok() const { return ok_; }
  absl::string_view rest() const { return rest_; }

 private:
  absl::string_view rest_;
  bool ok_ = true;
};

}  // namespace pagetide

#endif  // PAGETIDE_BASE_LITTLE_ENDIAN_H_
