#include "replay/live_run.h"

#include <pthread.h>

#include <algorithm>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"

namespace pagetide {

LiveRun::Computing::Computing(LiveRun* run, const TraceRequest* request, size_t num_pages)
    : run_(run), pages_(std::span(request->pages).first(num_pages)), first_(num_pages) {
  MutexLock lock(&run_->mu_);
  for (const PageId page : pages_) was_pending_.push_back(run_->computing_.contains(page));
}

LiveRun::Computing::~Computing() {
  MutexLock lock(&run_->mu_);
  for (const PageId page : pages_.subspan(first_)) {
    const auto found = run_->computing_.find(page);
    if (--found->second == 0) run_->computing_.erase(found);
  }
}

uint64_t LiveRun::Computing::Begin(size_t first) {
  uint64_t pending = 0;
  MutexLock lock(&run_->mu_);
  first_ = first;
  for (size_t i = first; i < pages_.size(); ++i) {
    const uint32_t others = run_->computing_[pages_[i]]++;
    pending += others > 0 || was_pending_[i] ? 1 : 0;
  }
  return pending;
}

void LiveRun::Run() {
  std::vector<std::thread> threads;
  for (size_t i = 0; i < std::min(options_->concurrency, slice_->requests.size()); ++i) {
    threads.emplace_back([this] { Work(); });
    pthread_setname_np(threads.back().native_handle(), absl::StrCat("replay-", i).c_str());
  }
  for (std::thread& thread : threads) thread.join();
}

void LiveRun::Report(LiveReplayReport* report) {
  MutexLock lock(&mu_);
  report->totals = totals_;
  report->first_error = first_error_;
  report->first_wrong = first_wrong_;
  if (!ttft_seconds_.empty()) report->ttft = SummariseTtft(ttft_seconds_);
}

void LiveRun::Work() {
  for (;;) {
    size_t index;
    {
      MutexLock lock(&mu_);
      if (next_ == slice_->requests.size()) return;
      index = next_++;
    }
    Played played;
    const absl::Status status = Play(index, &played);
    MutexLock lock(&mu_);
    totals_.Add(played.totals);
    ++totals_.requests;
    if (played.ttft) ttft_seconds_.push_back(absl::ToDoubleSeconds(*played.ttft));
    if (first_wrong_.empty()) first_wrong_ = played.first_wrong;
    if (status.ok()) continue;
    ++totals_.failed_requests;
    if (first_error_.empty()) {
      first_error_ =
          absl::StrCat("request ", options_->replay.first_request + index, " (line ",
                       slice_->requests[index].line, "): ", absl::StatusCodeToString(status.code()),
                       ": ", status.message());
    }
  }
}

absl::Status LiveRun::Play(size_t index, Played* played) {
  const TraceRequest& request = slice_->requests[index];
  const uint32_t decode =
      static_cast<uint32_t>(std::min<int64_t>(options_->decode_tokens, request.output_tokens));
  const LivePrompt prompt = content_.MakePrompt(request, options_->replay.first_request + index,
                                                options_->own_tokens, decode);
  const std::span<const uint32_t> tokens(prompt.tokens);
  const uint32_t page_tokens = model_->geometry().page_tokens();
  LiveTotals& totals = played->totals;
  PT_ASSIGN_OR_RETURN(const auto frames_before, FramesByWorker(tokens.first(prompt.prompt_tokens)));
  Computing computing(this, &request, prompt.trace_pages);

  const absl::Time start = absl::Now();
  PT_ASSIGN_OR_RETURN(const std::unique_ptr<Sequence> sequence,
                      client_->Open(model_, tokens.first(prompt.prompt_tokens)));
  const uint64_t promised = sequence->length();
  PT_ASSIGN_OR_RETURN(const uint64_t reused, sequence->WaitReady());
  const v1::PrefixReuse& reuse = sequence->reuse();
  totals.prompt_tokens += prompt.prompt_tokens;
  totals.reused_tokens += reused;
  totals.trace_pages += prompt.trace_pages;
  const uint64_t hits = std::min<uint64_t>(reused / page_tokens, prompt.trace_pages);
  totals.hit_pages += hits;
  totals.device_hit_pages += std::min<uint64_t>(reuse.device_tokens() / page_tokens, hits);
  totals.pending_pages += computing.Begin(hits);
  totals.device_elsewhere_pages += PagesElsewhere(frames_before, sequence->worker_id(), hits);
  totals.declined_restores += reuse.limit() == v1::REUSE_LIMIT_SLOWER_THAN_COMPUTE ? 1 : 0;
  totals.shortened += reused < promised ? 1 : 0;

  PT_RETURN_IF_ERROR(Verify(prompt, *sequence, 0, reused, /*is_reused=*/true, played));
  const bool is_planted = options_->plant_wrong_byte && index == 0;
  for (uint64_t at = reused; at < prompt.prompt_tokens;) {
    // To the end of a page, so that all but the last append fill what they begin.
    const uint64_t end = std::min<uint64_t>(
        (at / page_tokens + options_->append_pages) * page_tokens, prompt.prompt_tokens);
    PT_RETURN_IF_ERROR(Append(prompt, at, end, is_planted && at == reused, *sequence));
    totals.computed_tokens += end - at;
    at = end;
  }
  played->ttft = absl::Now() - start;
  for (uint64_t at = prompt.prompt_tokens; at < tokens.size(); ++at) {
    PT_RETURN_IF_ERROR(Decode(prompt, at, *sequence));
    ++totals.decoded_tokens;
  }
  PT_RETURN_IF_ERROR(Verify(prompt, *sequence, reused, tokens.size(), false, played));
  return sequence->Close();
}

absl::StatusOr<std::map<std::string, uint64_t>> LiveRun::FramesByWorker(
    std::span<const uint32_t> tokens) {
  v1::ExplainPlacementRequest request;
  request.mutable_prompt()->set_model(model_->digest().ToHex());
  request.mutable_prompt()->mutable_tokens()->Add(tokens.begin(), tokens.end());
  PT_ASSIGN_OR_RETURN(const v1::ExplainPlacementResponse explained,
                      CallUnary(CallOptions(), client_->router(),
                                &v1::RouterService::StubInterface::ExplainPlacement, request));
  std::map<std::string, uint64_t> pages;
  for (const v1::Candidate& candidate : explained.candidates()) {
    pages[candidate.worker_id()] = candidate.device_tokens() / model_->geometry().page_tokens();
  }
  return pages;
}

uint64_t LiveRun::PagesElsewhere(const std::map<std::string, uint64_t>& frames,
                                 const std::string& chosen, uint64_t hits) {
  uint64_t here = 0, elsewhere = 0;
  for (const auto& [worker, pages] : frames) {
    uint64_t& most = worker == chosen ? here : elsewhere;
    most = std::max(most, pages);
  }
  elsewhere = std::min(elsewhere, hits);
  return elsewhere > here ? elsewhere - here : 0;
}

absl::Status LiveRun::Append(const LivePrompt& prompt, uint64_t begin, uint64_t end,
                             bool is_planted, Sequence& sequence) {
  const uint64_t num_tokens = end - begin;
  PT_ASSIGN_OR_RETURN(
      const std::unique_ptr<PendingAppend> append,
      sequence.BeginAppend(std::span<const uint32_t>(prompt.tokens).subspan(begin, num_tokens),
                           /*will_attend=*/false));
  if (options_->prefill_tokens_per_second > 0) {
    absl::SleepFor(
        absl::Seconds(static_cast<double>(num_tokens) / options_->prefill_tokens_per_second));
  }
  std::vector<std::byte> rows;
  for (uint32_t layer = 0; layer < options_->num_layers; ++layer) {
    for (const RowKind kind : {RowKind::kK, RowKind::kV}) {
      rows.resize(num_tokens * options_->row_bytes);
      content_.FillRows(prompt, layer, kind, begin, rows);
      if (is_planted && layer == 0 && kind == RowKind::kK) rows.front() ^= std::byte{1};
      PT_RETURN_IF_ERROR(append->WriteRows(0, layer, kind, 0, rows));
    }
  }
  return append->Commit().status();
}

absl::Status LiveRun::Decode(const LivePrompt& prompt, uint64_t at, Sequence& sequence) {
  PT_ASSIGN_OR_RETURN(const std::unique_ptr<PendingStep> step,
                      sequence.BeginStep(1, /*will_attend=*/false));
  std::vector<std::byte> k(options_->row_bytes);
  std::vector<std::byte> v(options_->row_bytes);
  for (uint32_t layer = 0; layer < options_->num_layers; ++layer) {
    content_.FillRows(prompt, layer, RowKind::kK, at, k);
    content_.FillRows(prompt, layer, RowKind::kV, at, v);
    PT_RETURN_IF_ERROR(step->WriteRows(0, layer, k, v));
  }
  return step->Commit(std::span<const uint32_t>(prompt.tokens).subspan(at, 1));
}

absl::Status LiveRun::Verify(const LivePrompt& prompt, Sequence& sequence, uint64_t begin,
                             uint64_t end, bool is_reused, Played* played) {
  const uint64_t step = uint64_t{options_->append_pages} * options_->page_tokens;
  uint64_t verified = 0;
  uint64_t wrong = 0;
  for (uint64_t at = begin; at < end; at += step) {
    PT_RETURN_IF_ERROR(sequence.ReadRows(
        0, at, std::min(at + step, end), {}, [&](const RowsPart& part) -> absl::Status {
          if (part.first_token + part.num_tokens > prompt.tokens.size()) {
            return absl::DataLossError(absl::StrCat("read rows up to ",
                                                    part.first_token + part.num_tokens, " of ",
                                                    prompt.tokens.size()));
          }
          const uint64_t differing =
              content_.CountWrongBytes(prompt, part.layer, part.kind, part.first_token, part.bytes);
          if (differing > 0 && played->first_wrong.empty()) {
            played->first_wrong = absl::StrCat(
                differing, " bytes of ", part.kind == RowKind::kK ? "K" : "V", " rows [",
                part.first_token, ", ", part.first_token + part.num_tokens, ") of layer ",
                part.layer, " of sequence ", sequence.id(), " at ", sequence.worker_id());
          }
          wrong += differing;
          verified += part.bytes.size();
          return absl::OkStatus();
        }));
  }
  const uint64_t expected =
      end <= begin ? 0 : (end - begin) * options_->num_layers * 2 * options_->row_bytes;
  if (verified != expected) {
    return absl::DataLossError(absl::StrCat("read rows [", begin, ", ", end, ") of ", sequence.id(),
                                            ": ", verified, " bytes came, expected ", expected));
  }
  played->totals.bytes_verified += verified;
  played->totals.wrong_bytes += wrong;
  if (is_reused) {
    played->totals.reused_bytes_verified += verified;
    played->totals.wrong_reused_bytes += wrong;
  }
  return absl::OkStatus();
}

}  // namespace pagetide
