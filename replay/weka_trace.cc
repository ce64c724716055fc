#include <algorithm>
#include <limits>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "replay/trace_reader.h"

namespace pagetide::replay_internal {
namespace {

constexpr int kMaxAgentDepth = 8;
constexpr int64_t kMaxId = int64_t{1} << 60;

struct IdRange {
  int64_t start;
  int64_t length;  // blocks
};

// A request before its session has a place in time. The ranges stay ranges: they are a hundredth of
// the ids.
struct WekaRecord {
  double seconds;  // within the session, then within the mix
  int64_t input_tokens;
  int64_t output_tokens;
  int64_t blocks_per_page;
  uint64_t name_space;  // dense over (session, model)
  absl::InlinedVector<IdRange, 4> ranges;
  size_t line;
};

// Parses one session into `records`, its sub-agents included.
class SessionParser {
 public:
  SessionParser(JsonLines& lines, absl::flat_hash_map<std::string, uint64_t>& name_space_of_model,
                uint64_t& num_name_spaces, std::vector<WekaRecord>& records)
      : lines_(lines),
        name_space_of_model_(name_space_of_model),
        num_name_spaces_(num_name_spaces),
        records_(records) {}

  absl::Status Parse(const nlohmann::json& session) {
    PT_ASSIGN_OR_RETURN(block_tokens_, lines_.Integer(session, "", "bs", 1, kTracePageTokens));
    if (kTracePageTokens % block_tokens_ != 0) {
      return lines_.FieldError("bs", absl::StrCat(block_tokens_, " does not divide a page of ",
                                                  kTracePageTokens, " tokens"));
    }
    return ParseRequests(session, "", 0, 0);
  }

 private:
  // `start_seconds` is added to every time: a sub-agent counts from its own start.
  absl::Status ParseRequests(const nlohmann::json& owner, const std::string& where,
                             double start_seconds, int depth) {
    if (depth > kMaxAgentDepth) {
      return lines_.FieldError(where + "requests",
                               absl::StrCat("sub-agents nest deeper than ", kMaxAgentDepth));
    }
    PT_ASSIGN_OR_RETURN(const nlohmann::json* requests, lines_.Array(owner, where, "requests"));
    for (size_t i = 0; i < requests->size(); ++i) {
      const nlohmann::json& request = (*requests)[i];
      const std::string inner = absl::StrCat(where, "requests[", i, "].");
      if (!request.is_object()) {
        return lines_.FieldError(absl::StrCat(where, "requests[", i, "]"), "not an object");
      }
      PT_ASSIGN_OR_RETURN(const double t,
                          lines_.Number(request, inner, "t", 0, kMaxTraceSeconds - start_seconds));
      if (request.contains("requests")) {
        PT_RETURN_IF_ERROR(ParseRequests(request, inner, start_seconds + t, depth + 1));
      } else {
        PT_RETURN_IF_ERROR(ParseRequest(request, inner, start_seconds + t));
      }
    }
    return absl::OkStatus();
  }

  absl::Status ParseRequest(const nlohmann::json& request, const std::string& where,
                            double seconds) {
    WekaRecord record;
    record.seconds = seconds;
    record.line = lines_.line();
    record.blocks_per_page = kTracePageTokens / block_tokens_;
    PT_ASSIGN_OR_RETURN(record.input_tokens,
                        lines_.Integer(request, where, "in", 0, kMaxTraceTokens));
    PT_ASSIGN_OR_RETURN(record.output_tokens,
                        lines_.Integer(request, where, "out", 0, kMaxTraceTokens));
    const auto model = request.find("m");
    if (model == request.end() || !model->is_string()) {
      return lines_.FieldError(where + "m", "not a string");
    }
    const auto [name_space, is_new] =
        name_space_of_model_.try_emplace(model->get_ref<const std::string&>(), num_name_spaces_);
    if (is_new) ++num_name_spaces_;
    record.name_space = name_space->second;

    PT_ASSIGN_OR_RETURN(const nlohmann::json* ranges, lines_.Array(request, where, "h"));
    const int64_t max_blocks = (record.input_tokens + block_tokens_ - 1) / block_tokens_;
    int64_t num_blocks = 0;
    for (size_t i = 0; i < ranges->size(); ++i) {
      const nlohmann::json& range = (*ranges)[i];
      const std::string field = absl::StrCat(where, "h[", i, "]");
      if (!range.is_array() || range.size() != 2) {
        return lines_.FieldError(field, "not a pair [start, length]");
      }
      const std::optional<int64_t> start = AsInteger(range[0], 0, kMaxId);
      const std::optional<int64_t> length = AsInteger(range[1], 1, max_blocks - num_blocks);
      if (!start.has_value()) {
        return lines_.FieldError(field, absl::StrCat("start is not in [0, ", kMaxId, "]"));
      }
      if (!length.has_value()) {
        return lines_.FieldError(
            field,
            absl::StrCat("length is not in [1, ", max_blocks - num_blocks, "] after ", num_blocks,
                         " blocks of ", block_tokens_, " tokens with in = ", record.input_tokens));
      }
      record.ranges.push_back({*start, *length});
      num_blocks += *length;
    }
    PT_RETURN_IF_ERROR(lines_.CountPages(where + "h", num_blocks / record.blocks_per_page));
    records_.push_back(std::move(record));
    return absl::OkStatus();
  }

  JsonLines& lines_;
  absl::flat_hash_map<std::string, uint64_t>& name_space_of_model_;
  uint64_t& num_name_spaces_;
  std::vector<WekaRecord>& records_;
  int64_t block_tokens_ = 0;
};

// Sorts a session's requests, cuts pauses and moves it to `start_seconds` of the mix.
void PlaceInTime(std::vector<WekaRecord>::iterator begin, std::vector<WekaRecord>::iterator end,
                 double start_seconds, double max_gap_seconds) {
  std::stable_sort(begin, end,
                   [](const WekaRecord& a, const WekaRecord& b) { return a.seconds < b.seconds; });
  double cut = begin->seconds;  // of the session's time so far
  double previous = begin->seconds;
  for (auto it = begin; it != end; ++it) {
    cut += std::max(0.0, it->seconds - previous - max_gap_seconds);
    previous = it->seconds;
    it->seconds += start_seconds - cut;
  }
}

class WekaTrace final : public TraceSource {
 public:
  // `records` by time.
  explicit WekaTrace(std::vector<WekaRecord> records) : records_(std::move(records)) {}

  absl::StatusOr<std::optional<TraceRequest>> Next() override {
    if (next_ == records_.size()) return std::nullopt;
    const WekaRecord& record = records_[next_++];
    TraceRequest request;
    request.arrival = absl::Seconds(record.seconds);
    request.input_tokens = record.input_tokens;
    request.output_tokens = record.output_tokens;
    request.line = record.line;
    // A page is named by the last block in it, which stands for all before it. A partial page has
    // none.
    std::optional<PageId> parent;
    int64_t begin = 0;  // position of the range's first block
    for (const IdRange& range : record.ranges) {
      const int64_t blocks = record.blocks_per_page;
      for (int64_t last = (begin / blocks + 1) * blocks - 1; last < begin + range.length;
           last += blocks) {
        parent = interner_.Intern(parent, record.name_space, range.start + (last - begin));
        request.pages.push_back(*parent);
      }
      begin += range.length;
    }
    return request;
  }

  size_t num_pages() const override { return interner_.size(); }

 private:
  const std::vector<WekaRecord> records_;
  size_t next_ = 0;
  PageInterner interner_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<TraceSource>> OpenWekaTrace(const std::string& path,
                                                           const TraceOptions& options) {
  const double window = absl::ToDoubleSeconds(options.session_start_window);
  const double max_gap = absl::ToDoubleSeconds(options.max_idle_gap);
  if (!(window >= 0 && window <= kMaxTraceSeconds) || !(max_gap >= 0)) {
    return absl::InvalidArgumentError(absl::StrCat("open trace ", path, ": session_start_window ",
                                                   window, " s, max_idle_gap ", max_gap, " s"));
  }
  PT_ASSIGN_OR_RETURN(JsonLines lines, JsonLines::Open(path));
  std::vector<WekaRecord> records;
  uint64_t num_name_spaces = 0;
  // Not std::uniform_real_distribution: its values differ between standard libraries.
  std::mt19937_64 rng(options.seed);
  nlohmann::json session;
  while (true) {
    PT_ASSIGN_OR_RETURN(const bool has_line, lines.Next(session));
    if (!has_line) break;
    const size_t first = records.size();
    absl::flat_hash_map<std::string, uint64_t> name_space_of_model;
    SessionParser parser(lines, name_space_of_model, num_name_spaces, records);
    PT_RETURN_IF_ERROR(parser.Parse(session));
    const double start = static_cast<double>(rng() >> 11) * 0x1.0p-53 * window;
    if (records.size() == first) continue;
    PlaceInTime(records.begin() + static_cast<ptrdiff_t>(first), records.end(), start, max_gap);
  }
  if (records.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("read trace ", path, ": no requests"));
  }
  std::stable_sort(records.begin(), records.end(),
                   [](const WekaRecord& a, const WekaRecord& b) { return a.seconds < b.seconds; });
  return std::make_unique<WekaTrace>(std::move(records));
}

}  // namespace pagetide::replay_internal
