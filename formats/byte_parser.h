// Takes integers and byte runs off the front of a foreign file. Every read checks what is left
// before anything is done with a declared size; the error says where the file broke and what it
// wanted there. Not thread-safe; views point into the input.
#ifndef PAGETIDE_FORMATS_BYTE_PARSER_H_
#define PAGETIDE_FORMATS_BYTE_PARSER_H_

#include <cstdint>
#include <type_traits>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace pagetide {

class ByteParser {
 public:
  // `format` begins every error: "llama.cpp state". Must outlive the parser.
  ByteParser(absl::string_view format, absl::string_view bytes)
      : format_(format), begin_(bytes.data()), rest_(bytes) {}

  uint64_t offset() const { return static_cast<uint64_t>(rest_.data() - begin_); }
  uint64_t remaining() const { return rest_.size(); }
  absl::string_view rest() const { return rest_; }

  template <typename T>
  absl::StatusOr<T> TakeLittleEndian(absl::string_view what) {
    return Take<T>(what, /*big_endian=*/false);
  }
  template <typename T>
  absl::StatusOr<T> TakeBigEndian(absl::string_view what) {
    return Take<T>(what, /*big_endian=*/true);
  }

  // count × size bytes; DATA_LOSS unless they are there. The product may exceed 64 bits.
  absl::StatusOr<absl::string_view> TakeRun(absl::string_view what, uint64_t count, uint64_t size) {
    if (size != 0 && count > rest_.size() / size) {
      return DataLoss(what, " needs ", count, " × ", size, " bytes, ", rest_.size(), " are left");
    }
    const absl::string_view run = rest_.substr(0, count * size);
    rest_.remove_prefix(run.size());
    return run;
  }

  template <typename... Args>
  absl::Status DataLoss(const Args&... args) const {
    return absl::DataLossError(
        absl::StrCat("read ", format_, ": at byte ", offset(), ": ", args...));
  }

 private:
  template <typename T>
  absl::StatusOr<T> Take(absl::string_view what, bool big_endian) {
    static_assert(std::is_integral_v<T>);
    if (rest_.size() < sizeof(T)) {
      return DataLoss(what, " needs ", sizeof(T), " bytes, ", rest_.size(), " are left");
    }
    uint64_t value = 0;
    for (size_t i = 0; i < sizeof(T); ++i) {
      const size_t shift = 8 * (big_endian ? sizeof(T) - 1 - i : i);
      value |= static_cast<uint64_t>(static_cast<uint8_t>(rest_[i])) << shift;
    }
    rest_.remove_prefix(sizeof(T));
    return static_cast<T>(value);
  }

  absl::string_view format_;
  const char* begin_;
  absl::string_view rest_;
};

}  // namespace pagetide

#endif  // PAGETIDE_FORMATS_BYTE_PARSER_H_
