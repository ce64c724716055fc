#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "replay/trace_reader.h"

namespace pagetide::replay_internal {
namespace {

struct MooncakeRecord {
  double arrival_ms;
  int64_t input_tokens;
  int64_t output_tokens;
  std::vector<int64_t> ids;
  size_t line;
};

absl::StatusOr<MooncakeRecord> ParseRecord(const nlohmann::json& object, JsonLines& lines) {
  MooncakeRecord record;
  record.line = lines.line();
  PT_ASSIGN_OR_RETURN(record.arrival_ms,
                      lines.Number(object, "", "timestamp", 0, kMaxTraceSeconds * 1000));
  PT_ASSIGN_OR_RETURN(record.input_tokens,
                      lines.Integer(object, "", "input_length", 1, kMaxTraceTokens));
  PT_ASSIGN_OR_RETURN(record.output_tokens,
                      lines.Integer(object, "", "output_length", 0, kMaxTraceTokens));
  PT_ASSIGN_OR_RETURN(const nlohmann::json* ids, lines.Array(object, "", "hash_ids"));
  const int64_t num_ids = static_cast<int64_t>(ids->size());
  const int64_t full = record.input_tokens / kTracePageTokens;
  const int64_t partial = record.input_tokens % kTracePageTokens != 0 ? 1 : 0;
  if (num_ids < full || num_ids > full + partial) {
    return lines.FieldError(
        "hash_ids", absl::StrCat(num_ids, " ids for input_length ", record.input_tokens, ", not ",
                                 full, " to ", full + partial));
  }
  PT_RETURN_IF_ERROR(lines.CountPages("hash_ids", num_ids));
  record.ids.reserve(ids->size());
  for (size_t i = 0; i < ids->size(); ++i) {
    const std::optional<int64_t> id = AsInteger((*ids)[i], 0, std::numeric_limits<int64_t>::max());
    if (!id.has_value()) {
      return lines.FieldError(absl::StrCat("hash_ids[", i, "]"), "not an integer >= 0");
    }
    record.ids.push_back(*id);
  }
  return record;
}

class MooncakeTrace final : public TraceSource {
 public:
  // `records` by arrival.
  explicit MooncakeTrace(std::vector<MooncakeRecord> records) : records_(std::move(records)) {}

  absl::StatusOr<std::optional<TraceRequest>> Next() override {
    if (next_ == records_.size()) return std::nullopt;
    const MooncakeRecord& record = records_[next_++];
    TraceRequest request;
    request.arrival = absl::Milliseconds(record.arrival_ms);
    request.input_tokens = record.input_tokens;
    request.output_tokens = record.output_tokens;
    request.line = record.line;
    request.pages.reserve(record.ids.size());
    std::optional<PageId> parent;
    for (int64_t id : record.ids) {
      parent = interner_.Intern(parent, /*name_space=*/0, id);
      request.pages.push_back(*parent);
    }
    return request;
  }

  size_t num_pages() const override { return interner_.size(); }

 private:
  const std::vector<MooncakeRecord> records_;
  size_t next_ = 0;
  PageInterner interner_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<TraceSource>> OpenMooncakeTrace(const std::string& path) {
  PT_ASSIGN_OR_RETURN(JsonLines lines, JsonLines::Open(path));
  std::vector<MooncakeRecord> records;
  nlohmann::json object;
  while (true) {
    PT_ASSIGN_OR_RETURN(const bool has_line, lines.Next(object));
    if (!has_line) break;
    PT_ASSIGN_OR_RETURN(MooncakeRecord record, ParseRecord(object, lines));
    records.push_back(std::move(record));
  }
  if (records.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("read trace ", path, ": no requests"));
  }
  std::stable_sort(
      records.begin(), records.end(),
      [](const MooncakeRecord& a, const MooncakeRecord& b) { return a.arrival_ms < b.arrival_ms; });
  return std::make_unique<MooncakeTrace>(std::move(records));
}

}  // namespace pagetide::replay_internal
