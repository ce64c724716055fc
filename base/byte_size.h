// Byte sizes as people write them: "512MiB", "2GiB", "65536".
#ifndef PAGETIDE_BASE_BYTE_SIZE_H_
#define PAGETIDE_BASE_BYTE_SIZE_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace pagetide {

inline constexpr uint64_t kKiB = uint64_t{1} << 10;
inline constexpr uint64_t kMiB = uint64_t{1} << 20;
inline constexpr uint64_t kGiB = uint64_t{1} << 30;

// Accepts a whole number and one of B, KiB, MiB, GiB, TiB (none = bytes). INVALID_ARGUMENT
// otherwise, and on overflow of 64 bits.
absl::StatusOr<uint64_t> ParseByteSize(absl::string_view text);
// The largest binary unit with at most one decimal: "1.5 MiB".
std::string FormatByteSize(uint64_t bytes);

}  // namespace pagetide

#endif  // PAGETIDE_BASE_BYTE_SIZE_H_
