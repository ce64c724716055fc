// Traces of LLM serving as requests over pages: what the simulator and a live replay both read.
//
// A reader turns the block ids of a public trace into PageIds of 512-token pages, dense from 0 and
// interned by (parent page, id): whatever a file claims, pages form a forest, and a page stands for
// its whole prefix.
#ifndef PAGETIDE_REPLAY_TRACE_H_
#define PAGETIDE_REPLAY_TRACE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "core/ids.h"

namespace pagetide {

// Tokens a page of a trace stands for; the block size of the Mooncake traces.
inline constexpr int64_t kTracePageTokens = 512;

// Limits on what a trace may claim, so that a short hostile line cannot ask for unbounded memory.
inline constexpr int64_t kMaxTraceTokens = int64_t{1} << 24;  // per request
inline constexpr int64_t kMaxTracePages = int64_t{1} << 26;   // sum over all requests
inline constexpr double kMaxTraceSeconds = 1e9;

struct TraceRequest {
  absl::Duration arrival;  // since the start of the trace; never decreases
  int64_t input_tokens = 0;
  int64_t output_tokens = 0;
  // The prompt's pages from token 0, kTracePageTokens each; the last may stand for a partial one
  // (Mooncake), or a partial one may have no page (WEKA).
  std::vector<PageId> pages;
  size_t line = 0;  // of the file, from 1
};

// Forward iterator over a trace. Not thread-safe.
class TraceSource {
 public:
  virtual ~TraceSource() = default;
  // The next request by arrival; nullopt at the end.
  virtual absl::StatusOr<std::optional<TraceRequest>> Next() = 0;
  // Distinct pages handed out so far: PageIds are below it.
  virtual size_t num_pages() const = 0;
};

enum class TraceFormat {
  // A request a line: {timestamp (ms), input_length, output_length, hash_ids}; an id per 512-token
  // block.
  // Source: kvcache-ai/Mooncake, FAST25-release/traces.
  kMooncake,
  // A session a line: {bs, requests: [{t (s), in, out, m, h: [[start, length]…]} or a sub-agent {t,
  // requests}]};
  // ids of bs-token blocks, local to session and model. Source: callanjfox/kv-cache-tester,
  // traces/.
  kWeka,
};

// "mooncake" or "weka"; INVALID_ARGUMENT otherwise.
absl::StatusOr<TraceFormat> ParseTraceFormat(absl::string_view name);
absl::string_view TraceFormatName(TraceFormat format);

struct TraceOptions {
  // WEKA sessions have no common clock: each starts at a seeded uniform moment of this window …
  absl::Duration session_start_window = absl::Hours(3);
  // … and people's pauses between two requests of a session are cut to this.
  absl::Duration max_idle_gap = absl::Hours(1);
  uint64_t seed = 1;
};

// Reads and checks the whole file, so that Next fails only if memory does.
// NOT_FOUND if it cannot be opened; INVALID_ARGUMENT naming file, line and field for anything that
// is not well formed or beyond the limits above, and for a file without requests.
absl::StatusOr<std::unique_ptr<TraceSource>> OpenTrace(const std::string& path, TraceFormat format,
                                                       const TraceOptions& options = {});

}  // namespace pagetide

#endif  // PAGETIDE_REPLAY_TRACE_H_
