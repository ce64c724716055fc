// JSON of strangers: size, depth and number of values are limited before a tree is built, and no
// exception leaves. Private to formats/, so that JSON stays behind its .cc files.
#ifndef PAGETIDE_FORMATS_BOUNDED_JSON_H_
#define PAGETIDE_FORMATS_BOUNDED_JSON_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "nlohmann/json.hpp"

namespace pagetide {

struct JsonLimits {
  uint64_t max_bytes = uint64_t{8} << 20;
  int max_depth = 8;
  uint64_t max_values = 200000;
};

// DATA_LOSS "read WHAT: …" unless `text` is one JSON object within the limits.
absl::StatusOr<nlohmann::json> ParseJsonObject(absl::string_view what, absl::string_view text,
                                               const JsonLimits& limits = {});

}  // namespace pagetide

#endif  // PAGETIDE_FORMATS_BOUNDED_JSON_H_
