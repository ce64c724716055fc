// Live replay: a slice of a trace driven through a running fleet, with every byte checked.
//
// For each request, in the order of the trace, `concurrency` at a time: AssignSequence and
// OpenSequence over the prompt of LiveContent, wait until what is reused is resident, read it back
// and compare each byte with its derivation, append what was not reused, decode a few tokens, read
// and compare those rows as well, close. Arrival times do not count: the next request starts when
// one ends.
//
// A request takes the time an engine would compute for: the fleet measures how fast its clients
// prefill, and restores pages only where that is faster than computing them.
#ifndef PAGETIDE_REPLAY_LIVE_REPLAY_H_
#define PAGETIDE_REPLAY_LIVE_REPLAY_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "core/model.h"
#include "replay/simulator.h"

namespace pagetide {

struct LiveReplayOptions {
  // Trace, slice, seed and placement as the simulator takes them. Its workers and pages per worker
  // are not read: the fleet says how many it has.
  ReplayOptions replay;
  std::string router_address;
  size_t concurrency = 4;

  // The model: one layer group of f16, K and V rows of row_bytes (even) each.
  uint32_t page_tokens = 16;  // that a page of the trace stands for here; at least 2
  uint32_t num_layers = 2;
  uint32_t row_bytes = 64;

  uint32_t own_tokens = 5;     // of each prompt behind the trace's pages; at least 1
  uint32_t decode_tokens = 2;  // after each prompt, at most; never more than the trace's output
  // Pages that one append carries at most, and one read.
  uint32_t append_pages = 8;
  // Tokens a second that an engine computes, a request; 0: at once.
  double prefill_tokens_per_second = 5000;
  // Another seed, other pages: nothing is known of them yet.
  uint64_t content_seed = 1;
  // The first request writes one byte that is not what its page key says, as a broken engine would.
  // The check must see it.
  bool plant_wrong_byte = false;

  // INVALID_ARGUMENT names the field and the number.
  absl::Status Validate() const;
  // The model that the fleet is asked to keep.
  absl::StatusOr<ModelSpec> MakeModelSpec() const;
};

// Sums over requests, or over workers.
struct LiveTotals {
  uint64_t requests = 0;
  uint64_t failed_requests = 0;
  uint64_t prompt_tokens = 0;
  uint64_t reused_tokens = 0;
  uint64_t computed_tokens = 0;
  uint64_t decoded_tokens = 0;
  uint64_t trace_pages = 0;
  uint64_t hit_pages = 0;         // of trace_pages; in frames or restored
  uint64_t device_hit_pages = 0;  // of hit_pages, those that were in frames at the look-up
  // Missed although another request that had yet to end computed them: each computes them for
  // itself.
  uint64_t pending_pages = 0;
  // Not in the frames of the worker that was chosen, but in those of another, by the router's map.
  uint64_t device_elsewhere_pages = 0;
  uint64_t declined_restores = 0;  // requests whose stored pages were predicted slower to restore
  uint64_t shortened = 0;          // requests whose reuse became shorter because a restore failed
  uint64_t bytes_verified = 0;
  uint64_t reused_bytes_verified = 0;  // of bytes_verified
  uint64_t wrong_bytes = 0;
  uint64_t wrong_reused_bytes = 0;  // of wrong_bytes
  void Add(const LiveTotals& other);
};

struct LiveCounters {
  uint64_t pages_spilled = 0;
  uint64_t pages_written_through = 0;
  uint64_t pages_restored = 0;
  uint64_t pages_evicted = 0;
  uint64_t checksum_failures = 0;
};

struct LiveReplayReport {
  LiveReplayOptions options;
  size_t num_workers = 0;
  size_t frames_per_worker = 0;
  uint64_t page_bytes = 0;
  uint64_t distinct_pages = 0;  // of the slice
  LiveTotals totals;
  LiveCounters counters;  // grown during the run, over all workers
  absl::Duration took;
  TtftReport ttft;
  // The same slice, simulated: workers whose caches are as large as these pools, without a store;
  // and a cache that forgets nothing, which is what a store that keeps every page makes of it.
  double simulated_hit_rate = 0;
  double simulated_unbounded_hit_rate = 0;
  std::string first_error;  // of a failed request; empty: none failed
  std::string first_wrong;  // where the first wrong byte was; empty: none was

  double hit_rate() const;
  double device_hit_rate() const;
  // OK when no request failed and no byte was wrong; with a planted byte, when wrong bytes were
  // found. DATA_LOSS for wrong bytes, INTERNAL otherwise.
  absl::Status Verdict() const;

  std::string ToTable() const;
  std::string ToJson() const;
};

// Frames that the largest request of the slice fills: a router sends it to no worker with fewer.
absl::StatusOr<uint64_t> LargestRequestFrames(const LiveReplayOptions& options);

// Needs a router with at least one serving worker, and a pool for one more model at each. Wrong
// bytes and failed requests are in the report; an error means that nothing could be replayed.
absl::StatusOr<LiveReplayReport> RunLiveReplay(const LiveReplayOptions& options);

}  // namespace pagetide

#endif  // PAGETIDE_REPLAY_LIVE_REPLAY_H_
