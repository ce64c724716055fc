#include "formats/bounded_json.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace pagetide {
namespace {

// Counts brackets and commas outside strings: what a tree would hold, without building it.
absl::Status CheckLimits(absl::string_view what, absl::string_view text, const JsonLimits& limits) {
  if (text.size() > limits.max_bytes) {
    return absl::DataLossError(absl::StrCat("read ", what, ": JSON of ", text.size(),
                                            " bytes, the limit is ", limits.max_bytes));
  }
  int depth = 0;
  uint64_t values = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
      continue;
    }
    if (c == '"') in_string = true;
    if (c == '[' || c == '{') {
      ++values;
      if (++depth > limits.max_depth) {
        return absl::DataLossError(absl::StrCat("read ", what, ": JSON deeper than ",
                                                limits.max_depth, " levels at byte ", i));
      }
    }
    if (c == ']' || c == '}') --depth;
    if (c == ',') ++values;
    if (values > limits.max_values) {
      return absl::DataLossError(
          absl::StrCat("read ", what, ": JSON of more than ", limits.max_values, " values"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<nlohmann::json> ParseJsonObject(absl::string_view what, absl::string_view text,
                                               const JsonLimits& limits) {
  if (absl::Status status = CheckLimits(what, text, limits); !status.ok()) return status;
  nlohmann::json value = nlohmann::json::parse(text.begin(), text.end(), nullptr,
                                               /*allow_exceptions=*/false);
  if (!value.is_object()) {
    return absl::DataLossError(
        absl::StrCat("read ", what, ": ", text.size(), " bytes are not a JSON object"));
  }
  return value;
}

}  // namespace pagetide
