#include "cli/demo/player.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"
#include "decoder/pagetide_kv_backend.h"

namespace pagetide::demo {
namespace {

constexpr absl::Duration kCountersInterval = absl::Milliseconds(250);
constexpr int kMaxCounterReads = 20;

uint64_t CounterOf(const std::map<std::string, double>& stats, const std::string& name) {
  const auto found = stats.find(name);
  return found == stats.end() ? 0 : static_cast<uint64_t>(found->second);
}

}  // namespace

absl::StatusOr<RequestReport> Player::Play(Conversation& conversation, const PlayOptions& options) {
  RequestReport report;
  report.name = options.name;
  report.prompt_tokens = conversation.tokens.size();
  OpenOptions open;
  open.sticky_worker_id = options.sticky_worker_id;
  const int64_t computed_before = decoder_->computed_tokens();
  const absl::Time start = absl::Now();
  PT_ASSIGN_OR_RETURN(conversation.sequence, client_->Open(model_, conversation.tokens, open));
  Sequence& sequence = *conversation.sequence;
  PT_ASSIGN_OR_RETURN(report.reused_tokens, sequence.WaitReady());
  PageTideKvBackend kv(decoder_->config(), &sequence);
  PT_ASSIGN_OR_RETURN(conversation.logits, decoder_->Prefill(conversation.tokens, kv));
  report.ttft = absl::Now() - start;
  report.computed_tokens = static_cast<uint64_t>(decoder_->computed_tokens() - computed_before);
  report.worker_id = sequence.worker_id();
  report.copied_rows = sequence.reuse().partial_rows();
  PT_RETURN_IF_ERROR(Compare(conversation, &report));
  PT_RETURN_IF_ERROR(Decode(conversation, options.new_tokens, &report, start));
  PT_RETURN_IF_ERROR(sequence.Refresh());
  // Pages that a failed restore took away were not shared in the end.
  const uint64_t shared = std::min<uint64_t>(
      sequence.reuse().shared_pages(), report.reused_tokens / model_->geometry().page_tokens());
  report.new_pages = sequence.state().num_pages() - shared;
  PT_RETURN_IF_ERROR(ReadBack(conversation, &report));
  if (options.measure_cold) {
    std::vector<uint32_t> prompt = conversation.tokens;
    prompt.resize(report.prompt_tokens);
    PT_ASSIGN_OR_RETURN(report.ttft_without_reuse, TimeCold(prompt));
  }
  return report;
}

absl::StatusOr<RequestReport> Player::Continue(Conversation& conversation, const std::string& name,
                                               int new_tokens) {
  RequestReport report;
  report.name = name;
  report.worker_id = conversation.sequence->worker_id();
  const uint64_t pages_before = conversation.sequence->state().num_pages();
  PT_RETURN_IF_ERROR(Decode(conversation, new_tokens, &report, absl::Now()));
  PT_RETURN_IF_ERROR(conversation.sequence->Refresh());
  report.new_pages = conversation.sequence->state().num_pages() - pages_before;
  PT_RETURN_IF_ERROR(ReadBack(conversation, &report));
  return report;
}

absl::Status Player::Decode(Conversation& conversation, int new_tokens, RequestReport* report,
                            absl::Time start) {
  PageTideKvBackend kv(decoder_->config(), conversation.sequence.get());
  for (int i = 0; i < new_tokens; ++i) {
    const uint32_t token = Decoder::Greedy(conversation.logits);
    PT_ASSIGN_OR_RETURN(conversation.logits, decoder_->Forward({&token, 1}, kv));
    conversation.tokens.push_back(token);
    ++report->new_tokens;
    if (report->ttft == absl::ZeroDuration()) report->ttft = absl::Now() - start;
    PT_RETURN_IF_ERROR(Compare(conversation, report));
  }
  return absl::OkStatus();
}

absl::Status Player::Compare(Conversation& conversation, RequestReport* report) {
  PT_ASSIGN_OR_RETURN(const std::vector<float> expected,
                      conversation.oracle.LogitsAfter(conversation.tokens));
  ++report->logits_compared;
  if (expected.size() != conversation.logits.size() ||
      std::memcmp(expected.data(), conversation.logits.data(), expected.size() * sizeof(float)) !=
          0) {
    ++report->logits_differing;
  }
  return absl::OkStatus();
}

absl::Status Player::ReadBack(Conversation& conversation, RequestReport* report) {
  const LocalKvBackend& expected = conversation.oracle.kv();
  const size_t row_bytes = static_cast<size_t>(decoder_->config().row_bytes());
  uint64_t compared = 0;
  PT_RETURN_IF_ERROR(
      conversation.sequence->ReadRows(0, 0, 0, {}, [&](const RowsPart& part) -> absl::Status {
        const auto rows = part.kind == RowKind::kK ? expected.k_rows(static_cast<int>(part.layer))
                                                   : expected.v_rows(static_cast<int>(part.layer));
        const size_t offset = part.first_token * row_bytes;
        if (offset + part.bytes.size() > rows.size()) {
          return absl::DataLossError(absl::StrCat("read back: rows up to byte ",
                                                  offset + part.bytes.size(), " of a layer of ",
                                                  rows.size(), " bytes"));
        }
        for (size_t i = 0; i < part.bytes.size(); ++i) {
          report->wrong_bytes += part.bytes[i] != rows[offset + i];
        }
        compared += part.bytes.size();
        return absl::OkStatus();
      }));
  const uint64_t all = conversation.tokens.size() * row_bytes * 2 *
                       static_cast<uint64_t>(decoder_->config().num_layers);
  if (compared != all) {
    return absl::DataLossError(
        absl::StrCat("read back: ", compared, " bytes came, expected ", all));
  }
  report->bytes_compared += compared;
  return absl::OkStatus();
}

absl::StatusOr<absl::Duration> Player::TimeCold(const std::vector<uint32_t>& prompt) {
  const absl::Time start = absl::Now();
  OpenOptions options;
  options.no_reuse = true;
  PT_ASSIGN_OR_RETURN(const std::unique_ptr<Sequence> sequence,
                      client_->Open(model_, prompt, options));
  PageTideKvBackend kv(decoder_->config(), sequence.get());
  PT_RETURN_IF_ERROR(decoder_->Prefill(prompt, kv).status());
  const absl::Duration took = absl::Now() - start;
  PT_RETURN_IF_ERROR(sequence->Close());
  return took;
}

absl::StatusOr<std::vector<std::shared_ptr<WorkerConnection>>> Player::LiveWorkers() {
  PT_ASSIGN_OR_RETURN(const std::vector<v1::WorkerInfo> workers, client_->ListWorkers());
  std::vector<std::shared_ptr<WorkerConnection>> live;
  for (const v1::WorkerInfo& worker : workers) {
    if (worker.state() == "dead" || worker.role() == "store") continue;
    live.push_back(client_->ConnectWorker(worker.address(), worker.local_socket()));
  }
  return live;
}

absl::Status Player::EvictAll() {
  PT_ASSIGN_OR_RETURN(const auto workers, LiveWorkers());
  for (const auto& worker : workers) PT_RETURN_IF_ERROR(worker->EvictPages(0).status());
  return absl::OkStatus();
}

absl::Status Player::UpdateCounters() {
  PT_ASSIGN_OR_RETURN(const auto workers, LiveWorkers());
  for (const auto& worker : workers) {
    PT_ASSIGN_OR_RETURN(const auto stats, worker->GetStats());
    WorkerCounters& c = counters_[worker->address()];
    c.pages_spilled = CounterOf(stats, "pagetide_worker_pages_spilled_total") +
                      CounterOf(stats, "pagetide_worker_pages_written_through_total");
    c.pages_restored = CounterOf(stats, "pagetide_worker_pages_restored_total");
    c.bytes_verified = CounterOf(stats, "pagetide_worker_verified_bytes_total");
    c.checksum_failures = CounterOf(stats, "pagetide_worker_checksum_failures_total");
  }
  return absl::OkStatus();
}

absl::StatusOr<WorkerCounters> Player::Counters() {
  // Workers publish their counters a few times a second, and pages may still be on their way down.
  WorkerCounters last;
  for (int i = 0; i < kMaxCounterReads; ++i) {
    if (i > 0) absl::SleepFor(kCountersInterval);
    PT_RETURN_IF_ERROR(UpdateCounters());
    WorkerCounters sum;
    for (const auto& [address, c] : counters_) {
      sum.pages_spilled += c.pages_spilled;
      sum.pages_restored += c.pages_restored;
      sum.bytes_verified += c.bytes_verified;
      sum.checksum_failures += c.checksum_failures;
    }
    if (i > 0 && sum.pages_spilled == last.pages_spilled &&
        sum.pages_restored == last.pages_restored && sum.bytes_verified == last.bytes_verified) {
      return sum;
    }
    last = sum;
  }
  return last;
}

}  // namespace pagetide::demo
