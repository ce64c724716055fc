#include "cli/demo/report.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/byte_size.h"

namespace pagetide::demo {
namespace {

double Milliseconds(absl::Duration d) {
  return absl::ToDoubleMilliseconds(d);
}

nlohmann::json ToJson(const RequestReport& r) {
  nlohmann::json json = {{"name", r.name},
                         {"worker", r.worker_id},
                         {"prompt_tokens", r.prompt_tokens},
                         {"reused_tokens", r.reused_tokens},
                         {"computed_tokens", r.computed_tokens},
                         {"copied_rows", r.copied_rows},
                         {"new_tokens", r.new_tokens},
                         {"new_pages", r.new_pages},
                         {"ttft_ms", Milliseconds(r.ttft)},
                         {"logits_compared", r.logits_compared},
                         {"logits_differing", r.logits_differing},
                         {"logits_identical", r.logits_differing == 0},
                         {"bytes_compared", r.bytes_compared},
                         {"wrong_bytes", r.wrong_bytes}};
  if (r.ttft_without_reuse) json["ttft_without_reuse_ms"] = Milliseconds(*r.ttft_without_reuse);
  return json;
}

nlohmann::json ToJson(const SceneReport& scene) {
  nlohmann::json requests = nlohmann::json::array();
  for (const RequestReport& request : scene.requests) requests.push_back(ToJson(request));
  return {{"name", scene.name},
          {"what", scene.what},
          {"requests", std::move(requests)},
          {"reused_tokens", scene.Reused()},
          {"pages_spilled", scene.pages_spilled},
          {"pages_restored", scene.pages_restored},
          {"bytes_verified", scene.bytes_verified},
          {"checksum_failures", scene.checksum_failures},
          {"logits_identical", scene.LogitsDiffering() == 0},
          {"wrong_bytes", scene.WrongBytes()},
          {"notes", scene.notes}};
}

template <typename Get>
uint64_t Sum(const std::vector<RequestReport>& requests, Get get) {
  uint64_t sum = 0;
  for (const RequestReport& request : requests) sum += get(request);
  return sum;
}

void PrintScene(const SceneReport& scene, std::ostream& out) {
  out << "\n" << scene.name << ": " << scene.what << "\n";
  out << absl::StreamFormat("  %-26s %-14s %7s %7s %9s %7s %6s %10s %12s  %s\n", "request",
                            "worker", "prompt", "reused", "computed", "decoded", "pages", "first",
                            "first, cold", "logits");
  for (const RequestReport& r : scene.requests) {
    const std::string cold = r.ttft_without_reuse
                                 ? absl::StrFormat("%.0f ms", Milliseconds(*r.ttft_without_reuse))
                                 : "-";
    const std::string logits =
        r.logits_differing == 0
            ? absl::StrCat(r.logits_compared, " identical")
            : absl::StrCat(r.logits_differing, " of ", r.logits_compared, " DIFFER");
    out << absl::StreamFormat("  %-26s %-14s %7d %7d %9d %7d %6d %7.0f ms %12s  %s\n", r.name,
                              r.worker_id, r.prompt_tokens, r.reused_tokens, r.computed_tokens,
                              r.new_tokens, r.new_pages, Milliseconds(r.ttft), cold, logits);
  }
  const uint64_t compared =
      Sum(scene.requests, [](const RequestReport& r) { return r.bytes_compared; });
  out << absl::StreamFormat(
      "  pages spilled %d, restored %d; bytes verified %s; read back and compared %s, wrong %d\n",
      scene.pages_spilled, scene.pages_restored, FormatByteSize(scene.bytes_verified),
      FormatByteSize(compared), scene.WrongBytes());
  for (const std::string& note : scene.notes) out << "  " << note << "\n";
}

}  // namespace

uint64_t SceneReport::Reused() const {
  return Sum(requests, [](const RequestReport& r) { return r.reused_tokens; });
}
uint64_t SceneReport::LogitsDiffering() const {
  return Sum(requests, [](const RequestReport& r) { return r.logits_differing; });
}
uint64_t SceneReport::WrongBytes() const {
  return Sum(requests, [](const RequestReport& r) { return r.wrong_bytes; });
}

bool DemoReport::AllHold() const {
  return std::all_of(checks.begin(), checks.end(), [](const Check& check) { return check.holds; });
}

void PrintTable(const DemoReport& report, std::ostream& out) {
  out << absl::StreamFormat(
      "Reference decoder with %.1f M parameters; pages of %d tokens, %s; %d frames a worker.\n",
      static_cast<double>(report.model_parameters) / 1e6, report.page_tokens,
      FormatByteSize(report.page_bytes), report.frames_per_worker);
  for (const SceneReport& scene : report.scenes) PrintScene(scene, out);
  out << "\n";
  for (const Check& check : report.checks) {
    out << (check.holds ? "  ok    " : "  FAIL  ") << check.sentence << "\n";
  }
  out << absl::StreamFormat("%s in %.1f s\n", report.AllHold() ? "All checks hold" : "FAILED",
                            absl::ToDoubleSeconds(report.took));
}

void PrintJson(const DemoReport& report, std::ostream& out) {
  nlohmann::json scenes = nlohmann::json::array();
  uint64_t spilled = 0, restored = 0, verified = 0, wrong = 0;
  for (const SceneReport& scene : report.scenes) {
    scenes.push_back(ToJson(scene));
    spilled += scene.pages_spilled;
    restored += scene.pages_restored;
    verified += scene.bytes_verified;
    wrong += scene.WrongBytes();
  }
  nlohmann::json checks = nlohmann::json::array();
  for (const Check& check : report.checks) {
    checks.push_back({{"sentence", check.sentence}, {"holds", check.holds}});
  }
  const nlohmann::json json = {{"mode", report.mode},
                               {"model_parameters", report.model_parameters},
                               {"page_tokens", report.page_tokens},
                               {"page_bytes", report.page_bytes},
                               {"frames_per_worker", report.frames_per_worker},
                               {"scenes", std::move(scenes)},
                               {"pages_spilled", spilled},
                               {"pages_restored", restored},
                               {"bytes_verified", verified},
                               {"wrong_bytes", wrong},
                               {"checks", std::move(checks)},
                               {"ok", report.AllHold()},
                               {"seconds", absl::ToDoubleSeconds(report.took)}};
  out << json.dump(2) << "\n";
}

}  // namespace pagetide::demo
