#include "worker/worker.h"

#include <pthread.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/log.h"
#include "base/status_macros.h"

namespace pagetide {
namespace {

constexpr char kModelRecordKind[] = "model";

absl::Status ModelNotFound(const Digest& digest, absl::string_view why) {
  return WithReason(
      absl::NotFoundError(absl::StrCat("load model ", digest.ToShortHex(), ": ", why)),
      "MODEL_NOT_FOUND");
}

}  // namespace

absl::Status Worker::Options::Validate() const {
  PT_RETURN_IF_ERROR(ValidateName("worker id", id));
  if (pool_bytes == 0)
    return absl::InvalidArgumentError("pool_bytes is 0, must be at least one page");
  if (model_pool_bytes > pool_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("model_pool_bytes ", model_pool_bytes, " is above pool_bytes ", pool_bytes));
  }
  if (max_models == 0) return absl::InvalidArgumentError("max_models is 0, must be at least 1");
  if (tick_period <= absl::ZeroDuration() || tick_period > absl::Seconds(1)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "tick_period is ", absl::FormatDuration(tick_period), ", must be above 0 and at most 1s"));
  }
  ModelHost::Options probe = host;
  probe.pool_bytes = pool_bytes;
  probe.incarnation = incarnation;
  return probe.Validate();
}

absl::StatusOr<std::unique_ptr<Worker>> Worker::Create(Options options, Ports ports) {
  PT_RETURN_IF_ERROR(options.Validate());
  return std::unique_ptr<Worker>(new Worker(std::move(options), std::move(ports)));
}

Worker::Worker(Options options, Ports ports)
    : options_(std::move(options)),
      ports_(std::move(ports)),
      leases_(options_.leases, ports_.clock),
      metrics_(ports_.metrics),
      free_bytes_(options_.pool_bytes) {}

Worker::~Worker() {
  Stop();
}

void Worker::Start() {
  ticker_ = std::thread([this] { TickLoop(); });
}

void Worker::Stop() {
  {
    MutexLock lock(&mu_);
    stopping_ = true;
  }
  changed_.SignalAll();
  if (ticker_.joinable()) ticker_.join();
  leases_.Clear();
  for (ModelHost* host : Hosts()) host->Quiesce();
}

void Worker::TickLoop() {
  pthread_setname_np(pthread_self(), "worker-tick");
  for (;;) {
    leases_.Expire();
    const std::vector<ModelHost*> hosts = Hosts();
    for (ModelHost* host : hosts) {
      host->Tick();
      for (const IdleSequence& idle : host->CloseIdle()) {
        if (ports_.on_sequence_idle) ports_.on_sequence_idle(idle);
        // It may have been resumed here meanwhile: then it is open, under another epoch.
        if (!host->Has(idle.id)) NoteClosed(*host, TenantNamed(idle.tenant), idle.id);
        LogInfo("worker", "sequence ", idle.id.ToString(),
                " is closed: no call was made on it for ",
                absl::FormatDuration(options_.host.sequence_idle));
      }
    }
    metrics_.Update(staged_rows_, hosts, leases_.size());
    const MonotonicTime next = ports_.clock->MonotonicNow() + options_.tick_period;
    MutexLock lock(&mu_);
    while (!stopping_) {
      const absl::Duration left = next - ports_.clock->MonotonicNow();
      if (left <= absl::ZeroDuration()) break;
      changed_.WaitWithTimeout(&mu_, left);
    }
    if (stopping_) return;
  }
}

absl::StatusOr<ModelHost*> Worker::HostOfModel(absl::string_view model_digest,
                                               MonotonicTime deadline) {
  absl::StatusOr<Digest> digest = Digest::FromHex(model_digest);
  if (!digest.ok()) {
    return absl::InvalidArgumentError(absl::StrCat("model_digest: ", digest.status().message()));
  }
  PT_ASSIGN_OR_RETURN(ModelHost * host, FindOrClaim(*digest, deadline));
  if (host != nullptr) return host;
  return MakeHost(ReadModel(*digest, deadline), *digest);
}

absl::StatusOr<ModelHost*> Worker::AddModel(Model model, MonotonicTime deadline) {
  const Digest digest = model.digest();
  PT_ASSIGN_OR_RETURN(ModelHost * host, FindOrClaim(digest, deadline));
  if (host != nullptr) return host;
  return MakeHost(std::move(model), digest);
}

ModelHost* Worker::FindHost(absl::string_view model_digest) const {
  const absl::StatusOr<Digest> digest = Digest::FromHex(model_digest);
  if (!digest.ok()) return nullptr;
  MutexLock lock(&mu_);
  const auto it = hosts_.find(*digest);
  return it == hosts_.end() ? nullptr : it->second.get();
}

absl::StatusOr<ModelHost*> Worker::FindOrClaim(const Digest& digest, MonotonicTime deadline) {
  MutexLock lock(&mu_);
  for (;;) {
    if (const auto it = hosts_.find(digest); it != hosts_.end()) return it->second.get();
    if (in_making_.count(digest) == 0) {
      if (hosts_.size() + in_making_.size() >= options_.max_models) {
        return absl::ResourceExhaustedError(absl::StrCat("load model ", digest.ToShortHex(), ": ",
                                                         options_.max_models,
                                                         " models are loaded, no more fit"));
      }
      in_making_.insert(digest);
      return nullptr;
    }
    const absl::Duration left = deadline - ports_.clock->MonotonicNow();
    if (left <= absl::ZeroDuration()) {
      return absl::DeadlineExceededError(
          absl::StrCat("load model ", digest.ToShortHex(), ": another call is still loading it"));
    }
    changed_.WaitWithTimeout(&mu_, left);
  }
}

absl::StatusOr<Model> Worker::ReadModel(const Digest& digest, MonotonicTime deadline) {
  if (ports_.store == nullptr) return ModelNotFound(digest, "this worker has no store to ask");
  const absl::StatusOr<StoreRecord> record =
      ports_.store->GetRecord(kModelRecordKind, digest.ToHex(), deadline);
  if (absl::IsNotFound(record.status())) {
    return ModelNotFound(digest, "it is not registered (RouterService.RegisterModel)");
  }
  if (!record.ok()) {
    return absl::Status(record.status().code(), absl::StrCat("load model ", digest.ToShortHex(),
                                                             ": ", record.status().message()));
  }
  PT_ASSIGN_OR_RETURN(Model model, ports_.parse_model(record->value));
  if (model.digest() != digest) {
    return absl::DataLossError(absl::StrCat("load model ", digest.ToShortHex(),
                                            ": its record describes model ",
                                            model.digest().ToShortHex()));
  }
  return model;
}

absl::Status Worker::CheckModel(const SessionState& state, absl::string_view model_digest,
                                MonotonicTime deadline) {
  if (model_digest.empty()) return absl::OkStatus();
  const absl::StatusOr<Digest> digest = Digest::FromHex(model_digest);
  if (!digest.ok()) {
    return absl::InvalidArgumentError(absl::StrCat("model_digest: ", digest.status().message()));
  }
  if (*digest == state.model_digest) return absl::OkStatus();
  // Its registration is enough to say what differs: no pool is made for it.
  if (const ModelHost* host = FindHost(model_digest)) {
    return CheckSameModel(state, host->model());
  }
  PT_ASSIGN_OR_RETURN(const Model model, ReadModel(*digest, deadline));
  return CheckSameModel(state, model);
}

absl::StatusOr<uint64_t> Worker::TakeBudget(const Model& model) {
  MutexLock lock(&mu_);
  const uint64_t want = options_.model_pool_bytes == 0 ? free_bytes_ : options_.model_pool_bytes;
  if (want == 0 || want > free_bytes_) {
    return absl::ResourceExhaustedError(
        absl::StrCat("load model ", model.digest().ToShortHex(), ": its pool needs ",
                     want == 0 ? model.geometry().bytes_per_page_of_tokens() : want, " bytes, ",
                     free_bytes_, " of the worker's ", options_.pool_bytes, " are left"));
  }
  free_bytes_ -= want;
  return want;
}

absl::StatusOr<ModelHost*> Worker::MakeHost(absl::StatusOr<Model> model, const Digest& digest) {
  uint64_t budget = 0;
  absl::StatusOr<std::unique_ptr<ModelHost>> host =
      [&]() -> absl::StatusOr<std::unique_ptr<ModelHost>> {
    PT_RETURN_IF_ERROR(model.status());
    PT_ASSIGN_OR_RETURN(budget, TakeBudget(*model));
    ModelHost::Options options = options_.host;
    options.pool_bytes = budget;
    options.incarnation = options_.incarnation;
    options.numbers = numbers_;
    // Shared with the pages in flight, which may outlive a call but not the host.
    return ModelHost::Create(options, std::make_shared<const Model>(*std::move(model)),
                             ports_.device, ports_.store, ports_.io, ports_.clock);
  }();
  uint64_t used = 0;
  if (host.ok()) {
    // What the frames do not need goes back: a budget is rarely a whole number of pages.
    for (const PoolUsage& usage : (*host)->Usage()) used += usage.num_frames * usage.page_bytes;
    used = std::min(used, budget);
    if (ports_.on_host) ports_.on_host(**host);
  }
  ModelHost* made = nullptr;
  {
    MutexLock lock(&mu_);
    in_making_.erase(digest);
    if (host.ok()) {
      made = host->get();
      free_bytes_ += budget - used;
      hosts_.emplace(digest, *std::move(host));
    } else {
      free_bytes_ += budget;
    }
  }
  changed_.SignalAll();
  if (made == nullptr) return host.status();
  return made;
}

absl::StatusOr<ModelHost*> Worker::HostOfSequence(SequenceId id) const {
  for (ModelHost* host : Hosts()) {
    if (host->Has(id)) return host;
  }
  return WithReason(absl::NotFoundError(absl::StrCat("sequence ", id.ToString(),
                                                     " is not open on worker ", options_.id)),
                    "SEQUENCE_NOT_FOUND");
}

std::vector<ModelHost*> Worker::Hosts() const {
  MutexLock lock(&mu_);
  std::vector<ModelHost*> hosts;
  hosts.reserve(hosts_.size());
  for (const auto& [digest, host] : hosts_) hosts.push_back(host.get());
  return hosts;
}

void Worker::NoteSequence(const ModelHost& host, const SequenceInfo& info) const {
  if (ports_.on_sequence) ports_.on_sequence(host, info);
}

void Worker::NoteClosed(ModelHost& host, const Tenant& tenant, SequenceId id) const {
  if (ports_.on_sequence_closed) ports_.on_sequence_closed(id);
  // A resume that was told between the closing and here would be lost behind it.
  const absl::StatusOr<SequenceInfo> info = host.Get(tenant, id);
  if (info.ok()) NoteResumed(host, *info);
}

void Worker::NoteResumed(const ModelHost& host, const SequenceInfo& info) const {
  if (ports_.on_sequence_resumed) ports_.on_sequence_resumed(host, info);
}

Tenant Worker::TenantNamed(absl::string_view name) const {
  return Tenant{std::string(name), DeriveTenantSalt(options_.deployment_secret, name)};
}

}  // namespace pagetide
