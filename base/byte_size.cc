#include "base/byte_size.h"

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace pagetide {

absl::StatusOr<uint64_t> ParseByteSize(absl::string_view text) {
  size_t digits = 0;
  while (digits < text.size() && absl::ascii_isdigit(text[digits])) ++digits;
  uint64_t number = 0;
  if (digits == 0 || !absl::SimpleAtoi(text.substr(0, digits), &number)) {
    return absl::InvalidArgumentError(absl::StrCat("byte size '", text, "' has no number"));
  }
  const absl::string_view unit = absl::StripAsciiWhitespace(text.substr(digits));
  int shift = 0;
  if (unit == "KiB")
    shift = 10;
  else if (unit == "MiB")
    shift = 20;
  else if (unit == "GiB")
    shift = 30;
  else if (unit == "TiB")
    shift = 40;
  else if (!unit.empty() && unit != "B") {
    return absl::InvalidArgumentError(
        absl::StrCat("byte size '", text, "': unit is not B, KiB, MiB, GiB or TiB"));
  }
  if (shift > 0 && number > (~uint64_t{0} >> shift)) {
    return absl::InvalidArgumentError(absl::StrCat("byte size '", text, "' overflows 64 bits"));
  }
  return number << shift;
}

std::string FormatByteSize(uint64_t bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  int unit = 0;
  while (value >= 1024 && unit < 4) {
    value /= 1024;
    ++unit;
  }
  if (unit == 0) return absl::StrCat(bytes, " B");
  return absl::StrFormat("%.*f %s",
                         value == static_cast<double>(static_cast<uint64_t>(value)) ? 0 : 1, value,
                         kUnits[unit]);
}

}  // namespace pagetide
