// SequenceId: which process incarnation opened a sequence, and its number there. Any router can
// tell the opener from the id alone.
#ifndef PAGETIDE_CORE_SEQUENCE_ID_H_
#define PAGETIDE_CORE_SEQUENCE_ID_H_

#include <compare>
#include <cstdint>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace pagetide {

struct SequenceId {
  uint64_t incarnation = 0;
  uint64_t number = 0;
  friend auto operator<=>(const SequenceId&, const SequenceId&) = default;
  template <typename H>
  friend H AbslHashValue(H h, const SequenceId& id) {
    return H::combine(std::move(h), id.incarnation, id.number);
  }
  // "<incarnation, 16 hex digits>-<number, hex>".
  std::string ToString() const;
  // INVALID_ARGUMENT unless `text` is what ToString writes.
  static absl::StatusOr<SequenceId> Parse(absl::string_view text);
};

}  // namespace pagetide

#endif  // PAGETIDE_CORE_SEQUENCE_ID_H_
