#include "replay/trace_slice.h"

#include <memory>
#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace pagetide {

absl::StatusOr<TraceSlice> LoadTraceSlice(const TraceSliceOptions& options) {
  TraceOptions trace_options;
  trace_options.seed = options.seed;
  PT_ASSIGN_OR_RETURN(std::unique_ptr<TraceSource> source,
                      OpenTrace(options.path, options.format, trace_options));
  TraceSlice slice;
  size_t num_read = 0;
  while (options.max_requests == 0 || slice.requests.size() < options.max_requests) {
    PT_ASSIGN_OR_RETURN(std::optional<TraceRequest> request, source->Next());
    if (!request.has_value()) break;
    if (++num_read > options.first_request) slice.requests.push_back(*std::move(request));
  }
  if (slice.requests.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("read trace ", options.path, ": first request ",
                                                   options.first_request, " of ", num_read));
  }
  slice.num_pages = source->num_pages();
  return slice;
}

}  // namespace pagetide
