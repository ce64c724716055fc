// What the two trace readers share: lines of a file, checked JSON fields, and page interning.
// Included by .cc files of replay/ only.
#ifndef PAGETIDE_REPLAY_TRACE_READER_H_
#define PAGETIDE_REPLAY_TRACE_READER_H_

#include <cstdint>
#include <fstream>
#include <memory>
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "core/ids.h"
#include "nlohmann/json.hpp"
#include "replay/trace.h"

namespace pagetide::replay_internal {

// The JSON objects of a JSONL file, one a line; empty lines are skipped.
class JsonLines {
 public:
  static absl::StatusOr<JsonLines> Open(const std::string& path);

  // False at the end of the file. INVALID_ARGUMENT if a line is longer than 64 MiB or not one JSON
  // object.
  absl::StatusOr<bool> Next(nlohmann::json& object);

  size_t line() const { return line_; }
  // INVALID_ARGUMENT "read trace FILE:LINE: field FIELD: WHAT".
  absl::Status FieldError(absl::string_view field, absl::string_view what) const;

  // Checked access. `where` prefixes the field's name in errors ("requests[3].").
  absl::StatusOr<int64_t> Integer(const nlohmann::json& object, absl::string_view where,
                                  const char* field, int64_t min, int64_t max) const;
  absl::StatusOr<double> Number(const nlohmann::json& object, absl::string_view where,
                                const char* field, double min, double max) const;
  absl::StatusOr<const nlohmann::json*> Array(const nlohmann::json& object, absl::string_view where,
                                              const char* field) const;

  // Counts `pages` towards kMaxTracePages.
  absl::Status CountPages(absl::string_view field, int64_t pages);

 private:
  JsonLines(std::string path, std::ifstream file)
      : path_(std::move(path)), file_(std::move(file)) {}

  std::string path_;
  std::ifstream file_;
  size_t line_ = 0;
  int64_t total_pages_ = 0;
  std::string buffer_;
};

// An integer of JSON in [min, max]; nullopt for anything else, also for 1.0 and for numbers beyond
// 64 bits.
std::optional<int64_t> AsInteger(const nlohmann::json& value, int64_t min, int64_t max);

// (parent page, name space, id) -> dense PageId.
class PageInterner {
 public:
  PageId Intern(std::optional<PageId> parent, uint64_t name_space, int64_t id) {
    const uint64_t parent_key = parent.has_value() ? parent->value() + 1 : 0;
    const auto [it, is_new] =
        pages_.try_emplace(std::make_tuple(parent_key, name_space, id), pages_.size());
    return PageId(it->second);
  }
  size_t size() const { return pages_.size(); }

 private:
  absl::flat_hash_map<std::tuple<uint64_t, uint64_t, int64_t>, uint64_t> pages_;
};

absl::StatusOr<std::unique_ptr<TraceSource>> OpenMooncakeTrace(const std::string& path);
absl::StatusOr<std::unique_ptr<TraceSource>> OpenWekaTrace(const std::string& path,
                                                           const TraceOptions& options);

}  // namespace pagetide::replay_internal

#endif  // PAGETIDE_REPLAY_TRACE_READER_H_
