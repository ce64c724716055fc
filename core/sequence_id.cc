#include "core/sequence_id.h"

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace pagetide {

std::string SequenceId::ToString() const {
  return absl::StrCat(absl::Hex(incarnation, absl::kZeroPad16), "-", absl::Hex(number));
}

absl::StatusOr<SequenceId> SequenceId::Parse(absl::string_view text) {
  SequenceId id;
  // Formatting the result again rejects every other spelling: signs, spaces, 0x, capitals.
  if (text.size() < 18 || text.size() > 33 || text[16] != '-' ||
      !absl::SimpleHexAtoi(text.substr(0, 16), &id.incarnation) ||
      !absl::SimpleHexAtoi(text.substr(17), &id.number) || id.ToString() != text) {
    return absl::InvalidArgumentError(
        absl::StrCat("sequence_id of ", text.size(), " characters is not <16 hex>-<hex>"));
  }
  return id;
}

}  // namespace pagetide
