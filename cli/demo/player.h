// Player: answers prompts with the reference decoder over a fleet, measures, and compares every
// logit and every K and V byte with the oracle. For one thread.
#ifndef PAGETIDE_CLI_DEMO_PLAYER_H_
#define PAGETIDE_CLI_DEMO_PLAYER_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "cli/demo/oracle.h"
#include "cli/demo/report.h"
#include "clients/cpp/client.h"
#include "decoder/decoder.h"

namespace pagetide::demo {

// A growing token stream and its oracle.
struct Conversation {
  explicit Conversation(Decoder* oracle_decoder) : oracle(oracle_decoder) {}
  std::vector<uint32_t> tokens;
  Oracle oracle;
  std::vector<float> logits;           // of the service, after `tokens`
  std::unique_ptr<Sequence> sequence;  // null: closed
};

// Sums over workers since their start, those that died included as last seen.
struct WorkerCounters {
  uint64_t pages_spilled = 0;
  uint64_t pages_restored = 0;
  uint64_t bytes_verified = 0;
  uint64_t checksum_failures = 0;
};

class Player {
 public:
  // All outlive this. `decoder` computes for the service and counts, `oracle_decoder` for the
  // oracle.
  Player(Client* client, std::shared_ptr<const Model> model, Decoder* decoder,
         Decoder* oracle_decoder)
      : client_(client),
        model_(std::move(model)),
        decoder_(decoder),
        oracle_decoder_(oracle_decoder) {}

  struct PlayOptions {
    std::string name;
    int new_tokens = 0;
    // Also time the prompt with nothing reused, on a sequence of its own.
    bool measure_cold = false;
    std::string sticky_worker_id;
  };

  std::unique_ptr<Conversation> NewConversation() const {
    return std::make_unique<Conversation>(oracle_decoder_);
  }

  // Opens the conversation's tokens as a prompt (its sequence must be closed), computes what was
  // not reused, decodes, compares. The sequence stays open.
  absl::StatusOr<RequestReport> Play(Conversation& conversation, const PlayOptions& options);
  // Decodes further on the open sequence. The report's prompt fields are 0, its ttft is the time to
  // the first further token.
  absl::StatusOr<RequestReport> Continue(Conversation& conversation, const std::string& name,
                                         int new_tokens);
  // Reads all rows of the open sequence and compares them with the oracle's.
  absl::Status ReadBack(Conversation& conversation, RequestReport* report);

  // Spills and frees all frames that nothing pins, on all live workers.
  absl::Status EvictAll();
  // Waits until no worker counts on.
  absl::StatusOr<WorkerCounters> Counters();

 private:
  absl::Status Decode(Conversation& conversation, int new_tokens, RequestReport* report,
                      absl::Time start);
  absl::Status Compare(Conversation& conversation, RequestReport* report);
  absl::StatusOr<absl::Duration> TimeCold(const std::vector<uint32_t>& prompt);
  absl::StatusOr<std::vector<std::shared_ptr<WorkerConnection>>> LiveWorkers();
  absl::Status UpdateCounters();

  Client* const client_;
  const std::shared_ptr<const Model> model_;  // shared with the sequences
  Decoder* const decoder_;
  Decoder* const oracle_decoder_;
  std::map<std::string, WorkerCounters> counters_;  // by worker address
};

}  // namespace pagetide::demo

#endif  // PAGETIDE_CLI_DEMO_PLAYER_H_
