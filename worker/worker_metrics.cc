#include "worker/worker_metrics.h"

#include <string>

#include "absl/strings/str_cat.h"

namespace pagetide {
namespace {

struct CounterName {
  uint64_t HostCounters::*field;
  const char* name;
  const char* help;
};

constexpr CounterName kCounters[] = {
    {&HostCounters::pages_spilled, "pagetide_worker_pages_spilled_total",
     "Pages copied to the store because their frame was wanted"},
    {&HostCounters::pages_written_through, "pagetide_worker_pages_written_through_total",
     "Pages copied to the store when they became full"},
    {&HostCounters::pages_restored, "pagetide_worker_pages_restored_total",
     "Pages copied up from the store and verified"},
    {&HostCounters::pages_evicted, "pagetide_worker_pages_evicted_total",
     "Pages that lost their device frame"},
    {&HostCounters::restore_misses, "pagetide_worker_restore_misses_total",
     "Restores for which the store had no valid record"},
    {&HostCounters::checksum_failures, "pagetide_worker_checksum_failures_total",
     "Pages whose bytes did not match their checksum"},
    {&HostCounters::bytes_verified, "pagetide_worker_verified_bytes_total",
     "Page bytes whose checksum was compared"},
    {&HostCounters::bytes_converted_cold, "pagetide_worker_converted_cold_bytes_total",
     "Bytes of pages whose rows were converted to their cold types for the store"},
    {&HostCounters::bytes_converted_back, "pagetide_worker_converted_back_bytes_total",
     "Bytes of pages whose rows were converted back from their cold types"},
    {&HostCounters::store_errors, "pagetide_worker_store_errors_total", "Store calls that failed"},
    {&HostCounters::rows_copied, "pagetide_worker_rows_copied_total",
     "Rows copied on partial reuse and on fork"},
    {&HostCounters::tokens_reused, "pagetide_worker_tokens_reused_total",
     "Prompt tokens that needed no prefill"},
    {&HostCounters::chunk_tokens_reused, "pagetide_worker_chunk_tokens_reused_total",
     "Prompt tokens that needed no prefill because a saved session had them at another position"},
    {&HostCounters::tokens_appended, "pagetide_worker_tokens_appended_total",
     "Tokens committed by appends and steps"},
    {&HostCounters::pages_created, "pagetide_worker_pages_created_total", "Pages newly allocated"},
    {&HostCounters::pages_filled, "pagetide_worker_pages_filled_total", "Pages that became full"},
    {&HostCounters::pages_deduplicated, "pagetide_worker_pages_deduplicated_total",
     "Pages that became full and gave way to an equal page that was resident already"},
    {&HostCounters::tokens_extended, "pagetide_worker_tokens_extended_total",
     "Tokens that ExtendMatch took over from pages that others committed since the open"},
    {&HostCounters::claims_granted, "pagetide_worker_compute_claims_total",
     "Claims to compute a page that were granted"},
    {&HostCounters::claims_waited_for, "pagetide_worker_compute_claim_waits_total",
     "Calls that waited for a page that another sequence had claimed to compute"},
    {&HostCounters::acquire_waits, "pagetide_worker_frame_waits_total",
     "Calls that waited for frames"},
    {&HostCounters::acquire_timeouts, "pagetide_worker_frame_wait_timeouts_total",
     "Calls whose deadline passed while they waited for frames"},
    {&HostCounters::writes_expired, "pagetide_worker_writes_expired_total",
     "Reservations whose lease ended and appends of which no rows came"},
    {&HostCounters::prefixes_lost, "pagetide_worker_prefixes_lost_total",
     "Sequences cut to a valid prefix because a restore failed"},
    {&HostCounters::sequences_expired, "pagetide_worker_sequences_expired_total",
     "Sequences closed because no call was made on them"},
    {&HostCounters::edits, "pagetide_worker_edits_total",
     "Transactions of edits that went through"},
    {&HostCounters::edits_refused, "pagetide_worker_edits_refused_total",
     "Transactions of edits that were refused and changed nothing"},
    {&HostCounters::rows_removed, "pagetide_worker_rows_removed_total", "Rows removed by edits"},
    {&HostCounters::rows_moved, "pagetide_worker_rows_moved_total",
     "Rows that edits gave another position"},
    {&HostCounters::rows_compacted, "pagetide_worker_rows_compacted_total",
     "Rows that compaction moved to other pages"},
    {&HostCounters::checkpoints_created, "pagetide_worker_checkpoints_created_total",
     "Checkpoints taken, automatic ones included"},
    {&HostCounters::checkpoints_restored, "pagetide_worker_checkpoints_restored_total",
     "Sequences taken back to a checkpoint"},
    {&HostCounters::pages_reclaimed, "pagetide_worker_pages_reclaimed_total",
     "References to pages behind a window that sequences gave up"},
};

}  // namespace

void WorkerMetrics::Update(const ByteGauge& staged_rows, const std::vector<ModelHost*>& hosts,
                           size_t open_leases) {
  HostCounters total;
  uint64_t open_sequences = 0;
  uint64_t running_calls = 0;
  uint64_t owed_pages = 0;
  uint64_t checkpoint_bytes = 0;
  bool store_degraded = false;
  for (ModelHost* host : hosts) {
    const HostCounters counters = host->Counters();
    for (const CounterName& c : kCounters) total.*c.field += counters.*c.field;
    const HostLoad load = host->Load();
    open_sequences += load.open_sequences;
    running_calls += load.running_calls;
    owed_pages += load.owed_pages;
    checkpoint_bytes += load.checkpoint_host_bytes;
    store_degraded = store_degraded || load.is_store_degraded;
    const std::string model = host->model().digest().ToShortHex();
    for (const PoolUsage& usage : host->Usage()) {
      const std::string group = absl::StrCat(usage.group);
      const auto set = [&](const char* state, uint64_t frames) {
        metrics_
            ->GetGauge("pagetide_worker_frames", "Device frames by state",
                       {{"model", model}, {"group", group}, {"state", state}})
            ->Set(static_cast<double>(frames));
      };
      set("all", usage.num_frames);
      set("free", usage.free_frames);
      set("pinned", usage.pinned_frames);
      set("evictable", usage.evictable_frames);
      set("tail", usage.tail_frames);
    }
  }
  for (const CounterName& c : kCounters) {
    const uint64_t grown = total.*c.field - last_.*c.field;
    metrics_->GetCounter(c.name, c.help)->Add(static_cast<double>(grown));
  }
  last_ = total;
  metrics_->GetGauge("pagetide_worker_models", "Models with a pool")
      ->Set(static_cast<double>(hosts.size()));
  metrics_->GetGauge("pagetide_worker_open_sequences", "Open sequences")
      ->Set(static_cast<double>(open_sequences));
  metrics_->GetGauge("pagetide_worker_running_calls", "Calls at work in the hosts")
      ->Set(static_cast<double>(running_calls));
  metrics_
      ->GetGauge("pagetide_worker_append_staging_bytes",
                 "Bytes of row messages that have arrived and are not yet in frames")
      ->Set(static_cast<double>(staged_rows.now()));
  metrics_
      ->GetGauge("pagetide_worker_append_staging_peak_bytes",
                 "The most that pagetide_worker_append_staging_bytes ever was")
      ->Set(static_cast<double>(staged_rows.peak()));
  metrics_
      ->GetGauge("pagetide_worker_checkpoint_host_bytes", "Copies of checkpoints in host memory")
      ->Set(static_cast<double>(checkpoint_bytes));
  metrics_->GetGauge("pagetide_worker_pin_leases", "Open pin leases")
      ->Set(static_cast<double>(open_leases));
  metrics_
      ->GetGauge("pagetide_worker_write_through_owed_pages",
                 "Full pages that the store has not taken yet: a crash of the worker loses them")
      ->Set(static_cast<double>(owed_pages));
  metrics_
      ->GetGauge("pagetide_worker_store_degraded", "1 while spilling pauses after a store error")
      ->Set(store_degraded ? 1 : 0);
}

}  // namespace pagetide
