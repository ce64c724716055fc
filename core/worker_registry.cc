#include "core/worker_registry.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "core/model.h"
#include "core/rank_models.h"

namespace pagetide {
namespace {

constexpr size_t kMaxAddressBytes = 1024;
constexpr size_t kMaxModelsPerWorker = 4096;

absl::Status ValidateHello(const WorkerHello& hello) {
  PT_RETURN_IF_ERROR(ValidateName("worker_id", hello.worker_id));
  if (hello.incarnation == 0) {
    return absl::InvalidArgumentError("attach: incarnation = 0, expected the process's number");
  }
  if (hello.role == SourceRole::kWorker && hello.address.empty()) {
    return absl::InvalidArgumentError("attach: a worker needs an address");
  }
  for (const std::string* text : {&hello.address, &hello.local_socket, &hello.host}) {
    if (text->size() > kMaxAddressBytes) {
      return absl::InvalidArgumentError(absl::StrCat("attach: an address, socket or host of ",
                                                     text->size(), " bytes, at most ",
                                                     kMaxAddressBytes));
    }
  }
  if (hello.shard_group.empty()) {
    if (hello.shard_rank == 0) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("attach: shard_rank = ", hello.shard_rank, " without a shard_group"));
  }
  PT_RETURN_IF_ERROR(ValidateName("shard_group", hello.shard_group));
  if (hello.role != SourceRole::kWorker) {
    return absl::InvalidArgumentError("attach: shard_group of a store; only workers have ranks");
  }
  if (hello.shard_rank >= kMaxShardRanks) {
    return absl::InvalidArgumentError(absl::StrCat("attach: shard_rank = ", hello.shard_rank,
                                                   ", must be 0 to ", kMaxShardRanks - 1));
  }
  return absl::OkStatus();
}

absl::Status ValidateLoad(const WorkerLoad& load) {
  for (const auto& [field, rate] :
       {std::pair("prefill_tokens_per_second", load.prefill_tokens_per_second),
        std::pair("store_bytes_per_second", load.store_bytes_per_second),
        std::pair("host_bytes_per_second", load.host_bytes_per_second)}) {
    if (!std::isfinite(rate) || rate < 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("load report: ", field, " = ", rate, " is not finite and >= 0"));
    }
  }
  if (load.model_digests.size() > kMaxModelsPerWorker) {
    return absl::InvalidArgumentError(absl::StrCat("load report: ", load.model_digests.size(),
                                                   " model_digests, at most ",
                                                   kMaxModelsPerWorker));
  }
  return absl::OkStatus();
}

}  // namespace

absl::string_view WorkerStateName(WorkerState state) {
  switch (state) {
    case WorkerState::kServing:
      return "serving";
    case WorkerState::kDraining:
      return "draining";
    case WorkerState::kDead:
      return "dead";
  }
  return "unknown";
}

std::string WhyNotServing(const WorkerRecord& worker) {
  if (worker.state == WorkerState::kDead) return "dead";
  if (worker.state == WorkerState::kDraining) return "draining";
  if (!worker.load.has_value()) return "has not reported its load yet";
  return "";
}

WorkerRegistry::WorkerRegistry(Options options, Clock* clock)
    : options_(options), clock_(clock), leases_(clock, options.max_workers) {}

absl::StatusOr<WorkerRegistry::Attached> WorkerRegistry::Attach(WorkerHello hello,
                                                                ResidencySourceId source) {
  PT_RETURN_IF_ERROR(ValidateHello(hello));
  PT_ASSIGN_OR_RETURN(Lease lease,
                      leases_.TakeOver(hello.worker_id, hello.incarnation, TtlOf(hello)));
  Attached attached{.id = AttachmentId(++next_attachment_)};
  WorkerRecord& worker = workers_[hello.worker_id];
  if (worker.hello != nullptr && worker.state != WorkerState::kDead) {
    attached.replaced = Bury(worker, absl::StrCat("taken over by incarnation ",
                                                  absl::Hex(hello.incarnation, absl::kZeroPad16)));
  }
  const std::string worker_id = hello.worker_id;
  worker = WorkerRecord{.hello = std::make_shared<const WorkerHello>(std::move(hello)),
                        .attachment = attached.id,
                        .epoch = lease.epoch,
                        .source = source,
                        .last_heard = clock_->MonotonicNow()};
  worker_of_[attached.id] = worker_id;
  return attached;
}

absl::StatusOr<WorkerRecord*> WorkerRegistry::FindLive(AttachmentId attachment) {
  const auto it = worker_of_.find(attachment);
  if (it == worker_of_.end()) {
    return WithReason(absl::FailedPreconditionError(absl::StrCat("attachment ", attachment.value(),
                                                                 " has ended; attach again")),
                      error_reason::kStaleEpoch);
  }
  return &workers_.find(it->second)->second;
}

absl::Status WorkerRegistry::Heard(AttachmentId attachment) {
  PT_ASSIGN_OR_RETURN(WorkerRecord * worker, FindLive(attachment));
  PT_RETURN_IF_ERROR(leases_.Renew(worker->hello->worker_id, worker->hello->incarnation,
                                   worker->epoch, TtlOf(*worker->hello)));
  worker->last_heard = clock_->MonotonicNow();
  return absl::OkStatus();
}

absl::Status WorkerRegistry::RecordLoad(AttachmentId attachment, WorkerLoad load) {
  PT_RETURN_IF_ERROR(ValidateLoad(load));
  PT_ASSIGN_OR_RETURN(WorkerRecord * worker, FindLive(attachment));
  worker->state = load.is_draining ? WorkerState::kDraining : WorkerState::kServing;
  worker->load = std::move(load);
  worker->assigned_tokens = 0;
  return absl::OkStatus();
}

absl::Status WorkerRegistry::RecordSequences(AttachmentId attachment, bool is_snapshot,
                                             std::span<const SequenceChange> changes) {
  PT_ASSIGN_OR_RETURN(WorkerRecord * worker, FindLive(attachment));
  if (is_snapshot) worker->sequences.clear();
  size_t num_refused = 0;
  for (const SequenceChange& change : changes) {
    if (change.is_closed) {
      worker->sequences.erase(change.id);
    } else if (worker->sequences.size() < options_.max_sequences_per_worker ||
               worker->sequences.contains(change.id)) {
      worker->sequences[change.id] = {change.model_digest, change.length};
    } else {
      ++num_refused;
    }
  }
  if (num_refused == 0) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat("sequence report of ", worker->hello->worker_id,
                                                   ": ", num_refused, " not recorded, at most ",
                                                   options_.max_sequences_per_worker));
}

absl::StatusOr<ResidencySourceId> WorkerRegistry::SourceOf(AttachmentId attachment) const {
  PT_ASSIGN_OR_RETURN(WorkerRecord * worker,
                      const_cast<WorkerRegistry*>(this)->FindLive(attachment));
  return worker->source;
}

WorkerRegistry::Departure WorkerRegistry::Bury(WorkerRecord& worker, absl::string_view because) {
  Departure departure{.worker_id = worker.hello->worker_id,
                      .attachment = worker.attachment,
                      .source = worker.source,
                      .because = std::string(because)};
  worker.state = WorkerState::kDead;
  worker.sequences.clear();
  worker.assigned_tokens = 0;
  worker.source = ResidencySourceId();
  worker_of_.erase(worker.attachment);
  return departure;
}

std::optional<WorkerRegistry::Departure> WorkerRegistry::Detach(AttachmentId attachment,
                                                                absl::string_view because) {
  auto worker = FindLive(attachment);
  if (!worker.ok()) return std::nullopt;
  // OK even if it expired meanwhile: the result is the same.
  leases_.Release((*worker)->hello->worker_id, (*worker)->hello->incarnation, (*worker)->epoch)
      .IgnoreError();
  return Bury(**worker, because);
}

std::vector<WorkerRegistry::Departure> WorkerRegistry::TakeExpired() {
  std::vector<Departure> departures;
  for (const Lease& lease : leases_.TakeExpired()) {
    const auto it = workers_.find(lease.name);
    if (it == workers_.end() || it->second.epoch != lease.epoch ||
        it->second.state == WorkerState::kDead) {
      continue;
    }
    departures.push_back(
        Bury(it->second, absl::StrCat("silent for ", absl::FormatDuration(clock_->MonotonicNow() -
                                                                          it->second.last_heard))));
  }
  const MonotonicTime forget_before = clock_->MonotonicNow() - options_.dead_retention;
  for (auto it = workers_.begin(); it != workers_.end();) {
    if (it->second.state == WorkerState::kDead && it->second.last_heard <= forget_before) {
      leases_.Forget(it->first);
      it = workers_.erase(it);
    } else {
      ++it;
    }
  }
  return departures;
}

void WorkerRegistry::AddAssignedTokens(absl::string_view worker_id, uint64_t tokens) {
  const auto it = workers_.find(worker_id);
  if (it != workers_.end()) it->second.assigned_tokens += tokens;
}

const WorkerRecord* WorkerRegistry::Find(absl::string_view worker_id) const {
  const auto it = workers_.find(worker_id);
  return it == workers_.end() ? nullptr : &it->second;
}

std::optional<WorkerRegistry::SequencePlace> WorkerRegistry::FindSequence(SequenceId id) const {
  // The opener is named in the id, but a sequence may have moved: ask all, each costs O(log n).
  for (const auto& [name, worker] : workers_) {
    const auto it = worker.sequences.find(id);
    if (it != worker.sequences.end()) return SequencePlace{id, it->second, worker.hello};
  }
  return std::nullopt;
}

std::vector<WorkerRegistry::SequencePlace> WorkerRegistry::ListSequences(SequenceId after,
                                                                         size_t limit) const {
  std::vector<SequencePlace> places;
  for (const auto& [name, worker] : workers_) {
    size_t taken = 0;
    for (auto it = worker.sequences.upper_bound(after);
         it != worker.sequences.end() && taken < limit; ++it, ++taken) {
      places.push_back({it->first, it->second, worker.hello});
    }
  }
  const size_t n = std::min(limit, places.size());
  std::partial_sort(places.begin(), places.begin() + n, places.end(),
                    [](const SequencePlace& a, const SequencePlace& b) { return a.id < b.id; });
  places.resize(n);
  return places;
}

}  // namespace pagetide
