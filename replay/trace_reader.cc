#include "replay/trace_reader.h"

#include <cmath>
#include <limits>
#include <optional>

#include "absl/strings/str_cat.h"

namespace pagetide {
namespace replay_internal {
namespace {

constexpr size_t kMaxLineBytes = size_t{64} << 20;

// Reads up to the next newline or kMaxLineBytes + 1 bytes. False if nothing was left.
bool ReadLine(std::ifstream& file, std::string& line) {
  line.clear();
  std::streambuf* const in = file.rdbuf();
  for (int c = in->sbumpc(); c != std::char_traits<char>::eof(); c = in->sbumpc()) {
    if (c == '\n') return true;
    line.push_back(static_cast<char>(c));
    if (line.size() > kMaxLineBytes) return true;
  }
  return !line.empty();
}

}  // namespace

absl::StatusOr<JsonLines> JsonLines::Open(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file.is_open())
    return absl::NotFoundError(absl::StrCat("open trace ", path, ": no such file"));
  return JsonLines(path, std::move(file));
}

absl::StatusOr<bool> JsonLines::Next(nlohmann::json& object) {
  do {
    if (!ReadLine(file_, buffer_)) return false;
    ++line_;
    if (buffer_.size() > kMaxLineBytes) {
      return absl::InvalidArgumentError(absl::StrCat(
          "read trace ", path_, ":", line_, ": the line is longer than ", kMaxLineBytes, " bytes"));
    }
  } while (buffer_.find_first_not_of(" \t\r") == std::string::npos);
  object = nlohmann::json::parse(buffer_, /*cb=*/nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat("read trace ", path_, ":", line_, ": a line of ",
                                                   buffer_.size(), " bytes is not a JSON object"));
  }
  return true;
}

absl::Status JsonLines::FieldError(absl::string_view field, absl::string_view what) const {
  return absl::InvalidArgumentError(
      absl::StrCat("read trace ", path_, ":", line_, ": field ", field, ": ", what));
}

std::optional<int64_t> AsInteger(const nlohmann::json& value, int64_t min, int64_t max) {
  if (!value.is_number_integer()) return std::nullopt;
  if (value.is_number_unsigned() &&
      value.get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
    return std::nullopt;
  }
  const int64_t number = value.get<int64_t>();
  if (number < min || number > max) return std::nullopt;
  return number;
}

absl::StatusOr<int64_t> JsonLines::Integer(const nlohmann::json& object, absl::string_view where,
                                           const char* field, int64_t min, int64_t max) const {
  const auto it = object.find(field);
  if (it == object.end()) return FieldError(absl::StrCat(where, field), "missing");
  const std::optional<int64_t> number = AsInteger(*it, min, max);
  if (!number.has_value()) {
    return FieldError(absl::StrCat(where, field),
                      absl::StrCat("not an integer in [", min, ", ", max, "]"));
  }
  return *number;
}

absl::StatusOr<double> JsonLines::Number(const nlohmann::json& object, absl::string_view where,
                                         const char* field, double min, double max) const {
  const auto it = object.find(field);
  if (it == object.end()) return FieldError(absl::StrCat(where, field), "missing");
  const double number = it->is_number() ? it->get<double>() : std::nan("");
  if (!(number >= min && number <= max)) {
    return FieldError(absl::StrCat(where, field),
                      absl::StrCat("not a number in [", min, ", ", max, "]"));
  }
  return number;
}

absl::StatusOr<const nlohmann::json*> JsonLines::Array(const nlohmann::json& object,
                                                       absl::string_view where,
                                                       const char* field) const {
  const auto it = object.find(field);
  if (it == object.end()) return FieldError(absl::StrCat(where, field), "missing");
  if (!it->is_array()) return FieldError(absl::StrCat(where, field), "not an array");
  return &*it;
}

absl::Status JsonLines::CountPages(absl::string_view field, int64_t pages) {
  if (pages > kMaxTracePages - total_pages_) {
    return FieldError(field, absl::StrCat("with ", total_pages_, " + ", pages,
                                          " pages the trace is larger than ", kMaxTracePages));
  }
  total_pages_ += pages;
  return absl::OkStatus();
}

}  // namespace replay_internal

absl::StatusOr<TraceFormat> ParseTraceFormat(absl::string_view name) {
  if (name == "mooncake") return TraceFormat::kMooncake;
  if (name == "weka") return TraceFormat::kWeka;
  return absl::InvalidArgumentError(
      absl::StrCat("parse trace format: unknown name \"", name, "\"; known: mooncake, weka"));
}

absl::string_view TraceFormatName(TraceFormat format) {
  return format == TraceFormat::kMooncake ? "mooncake" : "weka";
}

absl::StatusOr<std::unique_ptr<TraceSource>> OpenTrace(const std::string& path, TraceFormat format,
                                                       const TraceOptions& options) {
  switch (format) {
    case TraceFormat::kMooncake:
      return replay_internal::OpenMooncakeTrace(path);
    case TraceFormat::kWeka:
      return replay_internal::OpenWekaTrace(path, options);
  }
  return absl::InvalidArgumentError("open trace: unknown format");
}

}  // namespace pagetide
