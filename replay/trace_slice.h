// A trace, or consecutive requests of it, in memory.
#ifndef PAGETIDE_REPLAY_TRACE_SLICE_H_
#define PAGETIDE_REPLAY_TRACE_SLICE_H_

#include <cstddef>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "replay/trace.h"

namespace pagetide {

struct TraceSliceOptions {
  std::string path;
  TraceFormat format = TraceFormat::kMooncake;
  // Seeds the session starts of WEKA.
  uint64_t seed = 1;
  // Requests by arrival: so many are left out, then at most so many are taken; 0: all that follow.
  size_t first_request = 0;
  size_t max_requests = 0;
};

struct TraceSlice {
  std::vector<TraceRequest> requests;  // never empty; page ids and arrivals as in the whole trace
  size_t num_pages = 0;                // page ids are below it
};

// The errors of OpenTrace; INVALID_ARGUMENT when the trace has no request first_request.
absl::StatusOr<TraceSlice> LoadTraceSlice(const TraceSliceOptions& options);

}  // namespace pagetide

#endif  // PAGETIDE_REPLAY_TRACE_SLICE_H_
