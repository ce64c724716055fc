#include "worker/router_link.h"

#include <pthread.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "rpc/model_codec.h"
#include "rpc/status_mapping.h"

namespace pagetide {
namespace {

v1::ResidencyReport::Change ChangeToProto(const ResidencyDelta& change) {
  v1::ResidencyReport::Change proto;
  proto.set_prefix_hint(change.hint.view().data(), change.hint.view().size());
  proto.set_group(change.group);
  proto.set_tier(ToProto(change.tier));
  proto.set_removed(change.is_removed);
  proto.set_page_bytes(change.page_bytes);
  return proto;
}

}  // namespace

RouterLink::RouterLink(Options options, std::shared_ptr<grpc::Channel> channel,
                       ReportJournal* journal, LoadCallback load, DrainCallback drain)
    : options_(std::move(options)),
      stub_(v1::WorkerRegistryService::NewStub(channel)),
      journal_(journal),
      load_(std::move(load)),
      drain_(std::move(drain)),
      heartbeat_(options_.heartbeat),
      thread_([this] { Run(); }) {
  pthread_setname_np(thread_.native_handle(), "router-link");
}

RouterLink::~RouterLink() {
  {
    MutexLock lock(&mu_);
    is_stopping_ = true;
    if (context_ != nullptr) context_->TryCancel();
  }
  ending_changed_.SignalAll();
  journal_->Wake();
  thread_.join();
}

void RouterLink::ReportLoad() {
  {
    MutexLock lock(&mu_);
    is_load_news_ = true;
  }
  journal_->Wake();
}

bool RouterLink::is_attached() const {
  MutexLock lock(&mu_);
  return is_attached_;
}

uint64_t RouterLink::num_attachments() const {
  MutexLock lock(&mu_);
  return num_attachments_;
}

uint64_t RouterLink::num_snapshots() const {
  MutexLock lock(&mu_);
  return num_snapshots_;
}

bool RouterLink::IsEnding() const {
  MutexLock lock(&mu_);
  return is_stopping_ || is_broken_;
}

bool RouterLink::Pause(absl::Duration duration) {
  const Clock* const clock = Clock::Real();
  const MonotonicTime until = clock->MonotonicNow() + duration;
  MutexLock lock(&mu_);
  while (!is_stopping_ && !is_broken_ && clock->MonotonicNow() < until) {
    ending_changed_.WaitWithTimeout(&mu_, until - clock->MonotonicNow());
  }
  return !is_stopping_ && !is_broken_;
}

void RouterLink::Run() {
  absl::Duration backoff = options_.initial_backoff;
  for (;;) {
    const uint64_t num_before = num_attachments();
    const absl::Status ended = RunStream();
    // A router that had welcomed us and went away is probably restarting: look for it soon.
    if (num_attachments() != num_before) backoff = options_.initial_backoff;
    {
      MutexLock lock(&mu_);
      if (is_stopping_) return;
      is_broken_ = false;
    }
    LogWarning("worker", "link to router ", options_.router_address, " ended, again in ",
               absl::FormatDuration(backoff), ": ", ended.ToString());
    if (!Pause(backoff)) return;
    backoff = std::min(2 * backoff, options_.max_backoff);
  }
}

absl::Status RouterLink::RunStream() {
  grpc::ClientContext context;
  {
    MutexLock lock(&mu_);
    if (is_stopping_) return absl::CancelledError("stopping");
    context_ = &context;
    is_snapshot_asked_ = false;
    heartbeat_ = options_.heartbeat;
  }
  const std::unique_ptr<Stream> stream = stub_->Attach(&context);
  v1::AttachRequest hello;
  *hello.mutable_hello() = options_.hello;
  if (stream->Write(hello)) {
    std::thread reader([this, &stream] { ReadDirectives(stream.get()); });
    pthread_setname_np(reader.native_handle(), "router-link-rd");
    WriteReports(stream.get());
    // Nothing is lost with the stream: the next one begins with snapshots.
    context.TryCancel();
    reader.join();
  }
  const grpc::Status status = stream->Finish();
  MutexLock lock(&mu_);
  context_ = nullptr;
  is_attached_ = false;
  return FromGrpcStatus(status);
}

void RouterLink::ReadDirectives(Stream* stream) {
  v1::AttachResponse directive;
  while (stream->Read(&directive)) {
    switch (directive.directive_case()) {
      case v1::AttachResponse::kWelcome: {
        MutexLock lock(&mu_);
        is_attached_ = true;
        ++num_attachments_;
        if (directive.welcome().heartbeat_milliseconds() > 0) {
          heartbeat_ = absl::Milliseconds(directive.welcome().heartbeat_milliseconds());
        }
        break;
      }
      case v1::AttachResponse::kSendSnapshot: {
        LogInfo("worker", "router ", options_.router_address,
                " asks for a residency snapshot: ", directive.send_snapshot().because());
        MutexLock lock(&mu_);
        is_snapshot_asked_ = true;
        break;
      }
      case v1::AttachResponse::kDrain:
        if (drain_ != nullptr) drain_();
        break;
      case v1::AttachResponse::DIRECTIVE_NOT_SET:
        break;  // of a newer router
    }
    journal_->Wake();
  }
  {
    MutexLock lock(&mu_);
    is_broken_ = true;
  }
  ending_changed_.SignalAll();
  journal_->Wake();
}

void RouterLink::WriteReports(Stream* stream) {
  const Clock* const clock = Clock::Real();
  uint64_t residency_position = 0, residency_number = 0;
  uint64_t sequence_position = 0;
  uint64_t load_number = 0;
  uint64_t seen_wakes = 0;
  MonotonicTime next_load = clock->MonotonicNow();
  while (!IsEnding()) {
    const MonotonicTime now = clock->MonotonicNow();
    bool is_load_due = now >= next_load;
    {
      MutexLock lock(&mu_);
      is_load_due = std::exchange(is_load_news_, false) || is_load_due;
    }
    if (is_load_due) {
      if (!WriteLoad(stream, ++load_number) || !WriteSequences(stream, &sequence_position)) return;
      MutexLock lock(&mu_);
      next_load = now + heartbeat_;
    }
    {
      MutexLock lock(&mu_);
      if (std::exchange(is_snapshot_asked_, false)) residency_position = 0;
    }
    bool is_idle = false;
    if (!WriteResidency(stream, &residency_position, &residency_number, &is_idle)) return;
    if (is_idle) {
      journal_->WaitForResidency(residency_position, &seen_wakes,
                                 next_load - clock->MonotonicNow());
    } else if (!Pause(std::min(options_.batch_delay, next_load - clock->MonotonicNow()))) {
      return;
    }
  }
}

bool RouterLink::WriteLoad(Stream* stream, uint64_t number) {
  v1::AttachRequest request;
  *request.mutable_load() = load_();
  request.mutable_load()->set_number(number);
  return stream->Write(request);
}

bool RouterLink::WriteSequences(Stream* stream, uint64_t* position) {
  const ReportJournal::Sequences sequences = journal_->ReadSequences(position);
  if (sequences.changes.empty() && !sequences.is_snapshot) return true;
  size_t at = 0;
  do {
    v1::AttachRequest request;
    v1::SequenceReport& report = *request.mutable_sequences();
    report.set_snapshot(sequences.is_snapshot && at == 0);
    const size_t end = std::min(sequences.changes.size(), at + options_.max_sequences_per_report);
    for (; at < end; ++at) {
      v1::SequenceReport::Change& change = *report.add_changes();
      change.set_sequence_id(sequences.changes[at].id.ToString());
      change.set_model_digest(sequences.changes[at].model_digest);
      change.set_length(sequences.changes[at].length);
      change.set_closed(sequences.changes[at].is_closed);
    }
    if (!stream->Write(request)) return false;
  } while (at < sequences.changes.size());
  return true;
}

bool RouterLink::WriteResidency(Stream* stream, uint64_t* position, uint64_t* number,
                                bool* is_idle) {
  const ReportJournal::Residency residency =
      journal_->ReadResidency(position, options_.max_changes_per_report);
  if (residency.is_snapshot) {
    MutexLock lock(&mu_);
    ++num_snapshots_;
  } else if (residency.changes.empty()) {
    *is_idle = true;
    return true;
  }
  size_t at = 0;
  do {
    v1::AttachRequest request;
    v1::ResidencyReport& report = *request.mutable_residency();
    report.set_number(++*number);
    report.set_snapshot(residency.is_snapshot && at == 0);
    const size_t end = std::min(residency.changes.size(), at + options_.max_changes_per_report);
    for (; at < end; ++at) *report.add_changes() = ChangeToProto(residency.changes[at]);
    if (at == residency.changes.size()) {
      report.set_snapshot_end(residency.is_snapshot);
      if (residency.digests.has_value()) {
        report.mutable_bucket_digests()->Add(residency.digests->begin(), residency.digests->end());
      }
    }
    if (!stream->Write(request)) return false;
  } while (at < residency.changes.size());
  return true;
}

}  // namespace pagetide
