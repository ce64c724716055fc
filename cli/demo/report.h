// What the demo measured, and its two forms: a table for people, JSON for programs.
#ifndef PAGETIDE_CLI_DEMO_REPORT_H_
#define PAGETIDE_CLI_DEMO_REPORT_H_

#include <cstdint>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include "absl/time/time.h"

namespace pagetide::demo {

// One prompt answered, or one continuation of an open sequence.
struct RequestReport {
  std::string name;
  std::string worker_id;
  uint64_t prompt_tokens = 0;
  uint64_t reused_tokens = 0;    // of the prompt, as the worker answered
  uint64_t computed_tokens = 0;  // of the prompt, as the decoder's forward pass counted
  uint64_t copied_rows = 0;      // of the reused: leading rows of a page that matches partly
  uint64_t new_tokens = 0;       // decoded
  uint64_t new_pages = 0;  // pages of the sequence at its end that were not shared at its start
  absl::Duration ttft;     // open to first logits
  std::optional<absl::Duration> ttft_without_reuse;  // the same prompt, nothing reused
  uint64_t logits_compared = 0;  // positions at which all logits were compared bit for bit
  uint64_t logits_differing = 0;
  uint64_t bytes_compared = 0;  // K and V read back and compared with the oracle
  uint64_t wrong_bytes = 0;
};

struct SceneReport {
  std::string name;
  std::string what;
  std::vector<RequestReport> requests;
  // Counted by the workers during the scene.
  uint64_t pages_spilled = 0;  // and written through
  uint64_t pages_restored = 0;
  uint64_t bytes_verified = 0;
  uint64_t checksum_failures = 0;
  std::vector<std::string> notes;

  uint64_t Reused() const;
  uint64_t LogitsDiffering() const;
  uint64_t WrongBytes() const;
};

// A sentence that must hold, and whether it does.
struct Check {
  std::string sentence;
  bool holds = false;
};

struct DemoReport {
  std::string mode;  // "verify" or "plant-flip"
  int64_t model_parameters = 0;
  uint64_t page_tokens = 0;
  uint64_t page_bytes = 0;
  uint64_t frames_per_worker = 0;
  std::vector<SceneReport> scenes;
  std::vector<Check> checks;
  absl::Duration took;

  bool AllHold() const;
};

void PrintTable(const DemoReport& report, std::ostream& out);
void PrintJson(const DemoReport& report, std::ostream& out);

}  // namespace pagetide::demo

#endif  // PAGETIDE_CLI_DEMO_REPORT_H_
