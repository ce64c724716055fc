// One live run: the requests of a slice, driven through a fleet.
#ifndef PAGETIDE_REPLAY_LIVE_RUN_H_
#define PAGETIDE_REPLAY_LIVE_RUN_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/mutex.h"
#include "clients/cpp/client.h"
#include "replay/live_content.h"
#include "replay/live_replay.h"
#include "replay/trace_slice.h"

namespace pagetide {

// Threads take requests in the order of the trace. Run once, from one thread; what the constructor
// gets outlives it.
class LiveRun {
 public:
  LiveRun(const LiveReplayOptions* options, const TraceSlice* slice, Client* client,
          std::shared_ptr<const Model> model)
      : options_(options),
        slice_(slice),
        client_(client),
        model_(std::move(model)),
        content_(model_.get(), options->content_seed) {}

  // Runs all requests, on threads "replay-N".
  void Run();

  // After Run.
  void Report(LiveReplayReport* report);

 private:
  struct Played {
    LiveTotals totals;
    std::optional<absl::Duration> ttft;
    std::string first_wrong;
  };

  void Work();

  absl::Status Play(size_t index, Played* played);

  // The pages that a request misses and computes, from Begin to its end.
  class Computing {
   public:
    // Before the request is opened. Its first `num_pages` pages are full.
    Computing(LiveRun* run, const TraceRequest* request, size_t num_pages);
    ~Computing();
    Computing(const Computing&) = delete;
    Computing& operator=(const Computing&) = delete;

    // All pages from `first` on were missed. Returns how many of them others compute already.
    uint64_t Begin(size_t first);

   private:
    LiveRun* const run_;
    const std::span<const PageId> pages_;
    std::vector<bool> was_pending_;  // [page]
    size_t first_;                   // of those that this request computes
  };

  // Leading pages of a prompt in the frames of each worker, by the router's map.
  absl::StatusOr<std::map<std::string, uint64_t>> FramesByWorker(std::span<const uint32_t> tokens);

  // Of `hits` leading pages, those that another worker than the chosen one has in frames alone.
  static uint64_t PagesElsewhere(const std::map<std::string, uint64_t>& frames,
                                 const std::string& chosen, uint64_t hits);

  absl::Status Append(const LivePrompt& prompt, uint64_t begin, uint64_t end, bool is_planted,
                      Sequence& sequence);

  absl::Status Decode(const LivePrompt& prompt, uint64_t at, Sequence& sequence);

  // Reads rows [begin, end) of all layers and compares each byte. A few pages at a time: what is
  // read stays pinned meanwhile, and a sequence may be larger than the pool.
  absl::Status Verify(const LivePrompt& prompt, Sequence& sequence, uint64_t begin, uint64_t end,
                      bool is_reused, Played* played);

  const LiveReplayOptions* const options_;
  const TraceSlice* const slice_;
  Client* const client_;
  const std::shared_ptr<const Model> model_;  // shared with the sequences of the client
  const LiveContent content_;

  Mutex mu_;
  size_t next_ ABSL_GUARDED_BY(mu_) = 0;
  LiveTotals totals_ ABSL_GUARDED_BY(mu_);
  // Requests that compute a page now.
  absl::flat_hash_map<PageId, uint32_t> computing_ ABSL_GUARDED_BY(mu_);
  std::vector<double> ttft_seconds_ ABSL_GUARDED_BY(mu_);
  std::string first_error_ ABSL_GUARDED_BY(mu_);
  std::string first_wrong_ ABSL_GUARDED_BY(mu_);
};

}  // namespace pagetide

#endif  // PAGETIDE_REPLAY_LIVE_RUN_H_
