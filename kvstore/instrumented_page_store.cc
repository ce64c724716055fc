#include "kvstore/instrumented_page_store.h"

#include <string>
#include <utility>

namespace pagetide {
namespace {

constexpr const char* kCallNames[] = {"put", "get", "lookup", "barrier", "put_manifest"};

// The worst code of a batch: the first that is not OK.
template <typename Results>
absl::StatusCode CodeOf(const Results& results) {
  for (const auto& result : results) {
    if (!result.status.ok()) return result.status.code();
  }
  return absl::StatusCode::kOk;
}

}  // namespace

InstrumentedPageStore::InstrumentedPageStore(PageStore* inner, Metrics* metrics, const Clock* clock)
    : DecoratingPageStore(inner), metrics_(metrics), clock_(clock) {
  for (int i = 0; i < kNumCalls; ++i) {
    seconds_[i] = metrics->GetHistogram("pagetide_store_call_seconds", "Time of a store call.",
                                        LatencyBounds(), {{"call", kCallNames[i]}});
  }
  const auto pages = [&](const char* call, const char* outcome) {
    return metrics->GetCounter("pagetide_store_pages_total", "Pages by call and outcome.",
                               {{"call", call}, {"outcome", outcome}});
  };
  put_stored_ = pages("put", "stored");
  put_present_ = pages("put", "already_present");
  put_refused_ = pages("put", "refused");
  get_hit_ = pages("get", "hit");
  get_miss_ = pages("get", "miss");
  get_quarantined_ = pages("get", "quarantined");
  get_failed_ = pages("get", "failed");
  put_bytes_ =
      metrics->GetCounter("pagetide_store_bytes_total", "Page bytes moved.", {{"call", "put"}});
  get_bytes_ =
      metrics->GetCounter("pagetide_store_bytes_total", "Page bytes moved.", {{"call", "get"}});
}

void InstrumentedPageStore::Record(Call call, MonotonicTime start, absl::StatusCode code) {
  seconds_[call]->Observe(clock_->MonotonicNow() - start);
  metrics_
      ->GetCounter("pagetide_store_calls_total", "Store calls by status code.",
                   {{"call", kCallNames[call]}, {"code", absl::StatusCodeToString(code)}})
      ->Increment();
}

std::vector<PutPageResult> InstrumentedPageStore::PutPages(std::span<const PutPage> pages,
                                                           Durability level,
                                                           MonotonicTime deadline) {
  const MonotonicTime start = clock_->MonotonicNow();
  std::vector<PutPageResult> results = inner()->PutPages(pages, level, deadline);
  for (size_t i = 0; i < results.size(); ++i) {
    if (!results[i].status.ok()) {
      put_refused_->Increment();
    } else if (results[i].already_present) {
      put_present_->Increment();
    } else {
      put_stored_->Increment();
      put_bytes_->Add(static_cast<double>(pages[i].body.size()));
    }
  }
  Record(kPut, start, CodeOf(results));
  return results;
}

std::vector<GetPageResult> InstrumentedPageStore::GetPages(std::span<const GetPage> pages,
                                                           MonotonicTime deadline) {
  const MonotonicTime start = clock_->MonotonicNow();
  std::vector<GetPageResult> results = inner()->GetPages(pages, deadline);
  for (size_t i = 0; i < results.size(); ++i) {
    if (!results[i].status.ok()) {
      get_failed_->Increment();
    } else if (results[i].outcome == GetOutcome::kHit) {
      get_hit_->Increment();
      get_bytes_->Add(static_cast<double>(pages[i].body.size()));
    } else {
      (results[i].outcome == GetOutcome::kMiss ? get_miss_ : get_quarantined_)->Increment();
    }
  }
  Record(kGet, start, CodeOf(results));
  return results;
}

absl::StatusOr<std::vector<LookupResult>> InstrumentedPageStore::LookupPages(
    std::span<const PageKey> keys, MonotonicTime deadline) {
  const MonotonicTime start = clock_->MonotonicNow();
  auto results = inner()->LookupPages(keys, deadline);
  Record(kLookup, start, results.status().code());
  return results;
}

absl::Status InstrumentedPageStore::Barrier(Durability level, MonotonicTime deadline) {
  const MonotonicTime start = clock_->MonotonicNow();
  absl::Status status = inner()->Barrier(level, deadline);
  Record(kBarrier, start, status.code());
  return status;
}

absl::StatusOr<PutManifestResult> InstrumentedPageStore::PutManifest(
    const ManifestRecord& manifest, uint64_t expected_version,
    const std::optional<WriteFence>& fence, MonotonicTime deadline) {
  const MonotonicTime start = clock_->MonotonicNow();
  auto result = inner()->PutManifest(manifest, expected_version, fence, deadline);
  Record(kPutManifest, start, result.status().code());
  return result;
}

void InstrumentedPageStore::PublishStats() {
  const auto stats = inner()->GetStats(clock_->MonotonicNow() + absl::Seconds(5));
  if (!stats.ok()) return;
  const auto set = [&](const char* name, const char* help, uint64_t value) {
    metrics_->GetGauge(name, help)->Set(static_cast<double>(value));
  };
  set("pagetide_store_pages", "Pages held.", stats->pages);
  set("pagetide_store_logical_bytes", "Bytes of page bodies held.", stats->logical_bytes);
  set("pagetide_store_physical_bytes", "Bytes of the store's files.", stats->physical_bytes);
  set("pagetide_store_capacity_bytes", "Bound of the physical bytes; 0 = the disk.",
      stats->capacity_bytes);
  set("pagetide_store_pages_ever_read", "Pages held that were read at least once.",
      stats->pages_ever_read);
  set("pagetide_store_pages_evicted", "Pages evicted since the start.", stats->pages_evicted);
  set("pagetide_store_pages_quarantined", "Pages found damaged since the start.",
      stats->pages_quarantined);
  set("pagetide_store_manifests", "Manifests held.", stats->manifests);
  set("pagetide_store_manifests_expired", "Manifests removed at their end since the start.",
      stats->manifests_expired);
  set("pagetide_store_protected_pages", "Pages that manifests name or that are pinned.",
      stats->protected_pages);
  set("pagetide_store_protected_bytes", "Bytes of their bodies.", stats->protected_bytes);
  set("pagetide_store_evicted_bytes", "Bytes of pages evicted since the start.",
      stats->bytes_evicted);
  set("pagetide_store_pages_refused", "Puts that found no room since the start.",
      stats->pages_refused);
  set("pagetide_store_pages_scrubbed", "Pages verified by scrubs since the start.",
      stats->pages_scrubbed);
  set("pagetide_store_disk_free_bytes", "Free bytes of the store's disk.", stats->disk_free_bytes);
  set("pagetide_store_ever_read_bytes", "Bytes of pages held that were read at least once.",
      stats->bytes_ever_read);
  set("pagetide_store_put_since_hit_bytes", "Bytes put since a page was last read.",
      stats->bytes_put_since_hit);
  set("pagetide_store_efficacy_alarm", "1: the store takes pages and never gives any back.",
      stats->efficacy_alarm ? 1 : 0);
  set("pagetide_store_stored_bytes", "Bytes of page bodies held, as they are stored.",
      stats->stored_bytes);
  set("pagetide_store_decompressed_bytes", "Raw bytes of compressed pages read since the start.",
      stats->decompressed_bytes);
  metrics_->GetGauge("pagetide_store_compress_seconds", "Time spent compressing since the start.")
      ->Set(absl::ToDoubleSeconds(stats->compress_time));
  metrics_
      ->GetGauge("pagetide_store_decompress_seconds",
                 "Time spent decompressing and verifying what was, since the start.")
      ->Set(absl::ToDoubleSeconds(stats->decompress_time));
  const StoreCodecBytes& codecs = stats->codec_bytes;
  for (const auto& [codec, bytes] : {std::pair("raw", codecs.raw), std::pair("lz4", codecs.lz4),
                                     std::pair("zstd", codecs.zstd)}) {
    metrics_
        ->GetGauge("pagetide_store_codec_in_bytes", "Bytes put since the start, by codec: before.",
                   {{"codec", codec}})
        ->Set(static_cast<double>(bytes.in));
    metrics_
        ->GetGauge("pagetide_store_codec_out_bytes", "Bytes put since the start, by codec: after.",
                   {{"codec", codec}})
        ->Set(static_cast<double>(bytes.out));
  }
  for (const char* state : {"serving", "full", "failed"}) {
    metrics_->GetGauge("pagetide_store_state", "1 for the state that holds.", {{"state", state}})
        ->Set(stats->state == state ? 1 : 0);
  }
}

}  // namespace pagetide
