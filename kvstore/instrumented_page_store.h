// InstrumentedPageStore: counts and times the calls to a store.
//   pagetide_store_calls_total{call,code}      pagetide_store_call_seconds{call}
//   pagetide_store_pages_total{call,outcome}   pagetide_store_bytes_total{call}
//   gauges of PublishStats: pagetide_store_pages, _logical_bytes, _physical_bytes, _capacity_bytes,
//   _pages_ever_read, _pages_evicted, _pages_quarantined, _manifests, _manifests_expired,
//   _protected_pages, _protected_bytes, _evicted_bytes, _pages_refused, _pages_scrubbed,
//   _disk_free_bytes, _ever_read_bytes, _put_since_hit_bytes, _efficacy_alarm, _state{state},
//   _stored_bytes, _codec_in_bytes{codec}, _codec_out_bytes{codec}, _compress_seconds,
//   _decompress_seconds, _decompressed_bytes
// Thread-safe. Metrics and the inner store outlive it.
#ifndef PAGETIDE_KVSTORE_INSTRUMENTED_PAGE_STORE_H_
#define PAGETIDE_KVSTORE_INSTRUMENTED_PAGE_STORE_H_

#include <array>
#include <vector>

#include "base/metrics.h"
#include "kvstore/decorating_page_store.h"

namespace pagetide {

class InstrumentedPageStore final : public DecoratingPageStore {
 public:
  InstrumentedPageStore(PageStore* inner, Metrics* metrics, const Clock* clock = Clock::Real());

  std::vector<PutPageResult> PutPages(std::span<const PutPage> pages, Durability level,
                                      MonotonicTime deadline) override;
  std::vector<GetPageResult> GetPages(std::span<const GetPage> pages,
                                      MonotonicTime deadline) override;
  absl::StatusOr<std::vector<LookupResult>> LookupPages(std::span<const PageKey> keys,
                                                        MonotonicTime deadline) override;
  absl::Status Barrier(Durability level, MonotonicTime deadline) override;
  absl::StatusOr<PutManifestResult> PutManifest(const ManifestRecord& manifest,
                                                uint64_t expected_version,
                                                const std::optional<WriteFence>& fence,
                                                MonotonicTime deadline) override;

  // Sets the gauges from the store's own statistics; for a periodic caller.
  void PublishStats();

 private:
  enum Call { kPut, kGet, kLookup, kBarrier, kPutManifest, kNumCalls };

  void Record(Call call, MonotonicTime start, absl::StatusCode code);

  Metrics* const metrics_;
  const Clock* const clock_;
  std::array<Histogram*, kNumCalls> seconds_{};
  Counter* put_stored_;
  Counter* put_present_;
  Counter* put_refused_;
  Counter* put_bytes_;
  Counter* get_hit_;
  Counter* get_miss_;
  Counter* get_quarantined_;
  Counter* get_failed_;
  Counter* get_bytes_;
};

}  // namespace pagetide

#endif  // PAGETIDE_KVSTORE_INSTRUMENTED_PAGE_STORE_H_
