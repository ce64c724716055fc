#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "nlohmann/json.hpp"
#include "replay/simulator.h"

namespace pagetide {

std::string ReplayReport::ToTable() const {
  std::string out;
  const auto row = [&out](absl::string_view label, const std::string& value) {
    absl::StrAppendFormat(&out, "%-34s %s\n", label, value);
  };
  const auto percent = [](double share) { return absl::StrFormat("%.2f %%", 100 * share); };
  const auto seconds = [](absl::Duration d) {
    return absl::StrFormat("%.3f s", absl::ToDoubleSeconds(d));
  };
  row("trace", absl::StrCat(options.trace_path, " (", TraceFormatName(options.format), ")"));
  row("requests, pages, distinct pages",
      absl::StrCat(num_requests, ", ", num_pages, ", ", num_distinct_pages));
  row("span", seconds(span));
  row("workers x pages", absl::StrCat(options.num_workers, " x ", options.pages_per_worker));
  row("placement policy",
      options.placement_policy == "predicted_ttft"
          ? absl::StrCat(options.placement_policy, ", prefill weight ",
                         options.placement.prefill_weight, ", balance gain ",
                         options.placement.balance_gain, ", cap ", options.placement.balance_cap)
          : options.placement_policy);
  row("seed", absl::StrCat(options.seed));
  row("prefill rate of a worker", absl::StrFormat("%.0f tokens/s (utilisation %.2f without cache)",
                                                  prefill_tokens_per_second, options.utilisation));
  row("block hit rate", percent(hit_rate));
  row("one shared LRU of the same size", percent(shared_hit_rate));
  row("block hit rate over shared LRU", percent(hit_rate_over_shared));
  if (options.with_optimum) row("optimum of the shared cache", percent(optimal_hit_rate));
  row("max:mean prefill over workers", absl::StrFormat("%.3f", max_over_mean_prefill));
  row("time to first token, mean", seconds(ttft.mean));
  row("time to first token, p50", seconds(ttft.p50));
  row("time to first token, p95", seconds(ttft.p95));
  row("time to first token, p99", seconds(ttft.p99));
  row("time to first token, max", seconds(ttft.max));
  row("placement decisions a second", absl::StrFormat("%.0f", decisions_per_second));
  absl::StrAppend(&out, "\nworker  requests       pages   hit rate     evicted  prefill\n");
  for (size_t i = 0; i < workers.size(); ++i) {
    const WorkerReport& w = workers[i];
    absl::StrAppendFormat(
        &out, "%6d %9d %11d %8.2f %% %11d  %.1f s\n", i, w.num_requests, w.num_pages,
        w.num_pages == 0
            ? 0.0
            : 100.0 * static_cast<double>(w.hit_pages) / static_cast<double>(w.num_pages),
        w.evicted_pages, absl::ToDoubleSeconds(w.prefill_time));
  }
  return out;
}

std::string ReplayReport::ToJson() const {
  using Json = nlohmann::ordered_json;
  const auto seconds = [](absl::Duration d) { return absl::ToDoubleSeconds(d); };
  Json json;
  json["trace"] = options.trace_path;
  json["format"] = std::string(TraceFormatName(options.format));
  json["first_request"] = options.first_request;
  json["requests"] = num_requests;
  json["pages"] = num_pages;
  json["distinct_pages"] = num_distinct_pages;
  json["span_seconds"] = seconds(span);
  json["workers"] = options.num_workers;
  json["pages_per_worker"] = options.pages_per_worker;
  json["policy"] = options.placement_policy;
  json["prefill_weight"] = options.placement.prefill_weight;
  json["balance_gain"] = options.placement.balance_gain;
  json["balance_cap"] = options.placement.balance_cap;
  json["seed"] = options.seed;
  json["utilisation"] = options.utilisation;
  json["prefill_tokens_per_second"] = prefill_tokens_per_second;
  json["hit_rate"] = hit_rate;
  json["shared_lru_hit_rate"] = shared_hit_rate;
  json["hit_rate_over_shared_lru"] = hit_rate_over_shared;
  if (options.with_optimum) json["optimal_hit_rate"] = optimal_hit_rate;
  json["max_over_mean_prefill"] = max_over_mean_prefill;
  json["ttft_seconds"] = {{"mean", seconds(ttft.mean)},
                          {"p50", seconds(ttft.p50)},
                          {"p95", seconds(ttft.p95)},
                          {"p99", seconds(ttft.p99)},
                          {"max", seconds(ttft.max)}};
  json["decisions_per_second"] = decisions_per_second;
  Json& per_worker = json["per_worker"] = Json::array();
  for (const WorkerReport& w : workers) {
    per_worker.push_back({{"requests", w.num_requests},
                          {"pages", w.num_pages},
                          {"hit_pages", w.hit_pages},
                          {"evicted_pages", w.evicted_pages},
                          {"prefill_seconds", seconds(w.prefill_time)}});
  }
  // replace: a path need not be UTF-8, and dump() would throw.
  return json.dump(2, ' ', false, Json::error_handler_t::replace);
}

}  // namespace pagetide
