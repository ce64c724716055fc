#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "nlohmann/json.hpp"
#include "replay/live_replay.h"

namespace pagetide {
namespace {

double Share(uint64_t part, uint64_t whole) {
  return whole == 0 ? 0 : static_cast<double>(part) / static_cast<double>(whole);
}

}  // namespace

double LiveReplayReport::hit_rate() const {
  return Share(totals.hit_pages, totals.trace_pages);
}

double LiveReplayReport::device_hit_rate() const {
  return Share(totals.device_hit_pages, totals.trace_pages);
}

absl::Status LiveReplayReport::Verdict() const {
  if (totals.failed_requests > 0) {
    return absl::InternalError(absl::StrCat("replay live: ", totals.failed_requests, " of ",
                                            totals.requests,
                                            " requests failed; the first: ", first_error));
  }
  if (options.plant_wrong_byte) {
    if (totals.wrong_bytes > 0) return absl::OkStatus();
    return absl::InternalError(
        absl::StrCat("replay live: a wrong byte was planted and not noticed among ",
                     totals.bytes_verified, " bytes"));
  }
  if (totals.wrong_bytes == 0) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat("replay live: ", totals.wrong_bytes, " of ",
                                          totals.bytes_verified,
                                          " bytes are wrong; the first: ", first_wrong));
}

std::string LiveReplayReport::ToTable() const {
  std::string out;
  const auto row = [&out](absl::string_view label, const std::string& value) {
    absl::StrAppendFormat(&out, "%-44s %s\n", label, value);
  };
  const auto percent = [](double share) { return absl::StrFormat("%.2f %%", 100 * share); };
  const auto milliseconds = [](absl::Duration d) {
    return absl::StrFormat("%.1f", absl::ToDoubleMilliseconds(d));
  };
  const LiveTotals& t = totals;
  row("trace", absl::StrCat(options.replay.trace_path, " (", TraceFormatName(options.replay.format),
                            "), requests from ", options.replay.first_request));
  row("requests, failed, at a time",
      absl::StrCat(t.requests, ", ", t.failed_requests, ", ", options.concurrency));
  row("workers x frames, page bytes",
      absl::StrCat(num_workers, " x ", frames_per_worker, ", ", page_bytes));
  row("pages asked for, distinct", absl::StrCat(t.trace_pages, ", ", distinct_pages));
  row("prompt tokens = reused + computed",
      absl::StrCat(t.prompt_tokens, " = ", t.reused_tokens, " + ", t.computed_tokens));
  row("tokens decoded", absl::StrCat(t.decoded_tokens));
  row("block hit rate, frames and store", percent(hit_rate()));
  row("  simulated with a cache that forgets nothing", percent(simulated_unbounded_hit_rate));
  row("block hit rate, frames alone", percent(device_hit_rate()));
  row("  simulated with caches of this size", percent(simulated_hit_rate));
  row("pages missed while another computed them", absl::StrCat(t.pending_pages));
  row("pages in the frames of another worker alone", absl::StrCat(t.device_elsewhere_pages));
  row("pages written through, spilled, restored",
      absl::StrCat(counters.pages_written_through, ", ", counters.pages_spilled, ", ",
                   counters.pages_restored));
  row("pages evicted from frames", absl::StrCat(counters.pages_evicted));
  row("restores declined as slower than computing", absl::StrCat(t.declined_restores));
  row("reuse shortened by a failed restore", absl::StrCat(t.shortened));
  row("bytes verified, of them reused",
      absl::StrCat(t.bytes_verified, ", ", t.reused_bytes_verified));
  row("wrong bytes, of them reused", absl::StrCat(t.wrong_bytes, ", ", t.wrong_reused_bytes));
  row("checksum failures in the fleet", absl::StrCat(counters.checksum_failures));
  row("time to first token p50, p95, max, ms",
      absl::StrCat(milliseconds(ttft.p50), ", ", milliseconds(ttft.p95), ", ",
                   milliseconds(ttft.max)));
  row("took, requests a second",
      absl::StrFormat("%.2f s, %.0f", absl::ToDoubleSeconds(took),
                      static_cast<double>(t.requests) / absl::ToDoubleSeconds(took)));
  if (!first_error.empty()) row("first failed request", first_error);
  if (!first_wrong.empty()) row("first wrong bytes", first_wrong);
  return out;
}

std::string LiveReplayReport::ToJson() const {
  using Json = nlohmann::ordered_json;
  const auto seconds = [](absl::Duration d) { return absl::ToDoubleSeconds(d); };
  const LiveTotals& t = totals;
  Json json;
  json["trace"] = options.replay.trace_path;
  json["format"] = std::string(TraceFormatName(options.replay.format));
  json["first_request"] = options.replay.first_request;
  json["seed"] = options.replay.seed;
  json["content_seed"] = options.content_seed;
  json["concurrency"] = options.concurrency;
  json["workers"] = num_workers;
  json["frames_per_worker"] = frames_per_worker;
  json["page_tokens"] = options.page_tokens;
  json["page_bytes"] = page_bytes;
  json["requests"] = t.requests;
  json["failed_requests"] = t.failed_requests;
  json["pages"] = t.trace_pages;
  json["distinct_pages"] = distinct_pages;
  json["prompt_tokens"] = t.prompt_tokens;
  json["reused_tokens"] = t.reused_tokens;
  json["computed_tokens"] = t.computed_tokens;
  json["decoded_tokens"] = t.decoded_tokens;
  json["hit_rate"] = hit_rate();
  json["simulated_unbounded_hit_rate"] = simulated_unbounded_hit_rate;
  json["device_hit_rate"] = device_hit_rate();
  json["simulated_hit_rate"] = simulated_hit_rate;
  json["pending_pages"] = t.pending_pages;
  json["device_elsewhere_pages"] = t.device_elsewhere_pages;
  json["pages_written_through"] = counters.pages_written_through;
  json["pages_spilled"] = counters.pages_spilled;
  json["pages_restored"] = counters.pages_restored;
  json["pages_evicted"] = counters.pages_evicted;
  json["checksum_failures"] = counters.checksum_failures;
  json["declined_restores"] = t.declined_restores;
  json["shortened"] = t.shortened;
  json["bytes_verified"] = t.bytes_verified;
  json["reused_bytes_verified"] = t.reused_bytes_verified;
  json["wrong_bytes"] = t.wrong_bytes;
  json["wrong_reused_bytes"] = t.wrong_reused_bytes;
  json["planted_wrong_byte"] = options.plant_wrong_byte;
  json["ttft_seconds"] = {{"mean", seconds(ttft.mean)},
                          {"p50", seconds(ttft.p50)},
                          {"p95", seconds(ttft.p95)},
                          {"p99", seconds(ttft.p99)},
                          {"max", seconds(ttft.max)}};
  json["took_seconds"] = seconds(took);
  json["first_error"] = first_error;
  json["first_wrong"] = first_wrong;
  json["ok"] = Verdict().ok();
  // replace: a path need not be UTF-8, and dump() would throw.
  return json.dump(2, ' ', false, Json::error_handler_t::replace);
}

}  // namespace pagetide
