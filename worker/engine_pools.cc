#include "worker/engine_pools.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "core/model.h"

namespace pagetide {
namespace {

absl::Status PoolNotFound(absl::string_view name) {
  return WithReason(
      absl::NotFoundError(absl::StrCat("engine pool \"", name, "\" is not registered here")),
      "ENGINE_POOL_NOT_FOUND");
}

// Rows are moved by one side: the host, or the device that the frames lie in.
absl::Status CheckSide(const EnginePoolSpec& spec, const EngineLayout::Memories& memories,
                       bool is_on_device) {
  const auto check = [&](const EnginePlaneSpec& plane) -> absl::Status {
    if (plane.memory >= memories.size() || memories[plane.memory]->is_on_device() == is_on_device) {
      return absl::OkStatus();
    }
    return WithReason(
        absl::FailedPreconditionError(absl::StrCat(
            "register an engine pool: memory ", plane.memory,
            is_on_device ? " lies on the host, which cannot address this worker's frames"
                         : " lies in a GPU, and this worker's frames on the host")),
        is_on_device ? "POOL_NOT_ON_HOST" : "POOL_ON_HOST");
  };
  for (const EngineGroupSpec& group : spec.groups) {
    for (const EngineGroupSpec::Layer& layer : group.layers) {
      PT_RETURN_IF_ERROR(check(layer.k));
      if (layer.v) PT_RETURN_IF_ERROR(check(*layer.v));
    }
  }
  return absl::OkStatus();
}

absl::Status StaleGeneration(const EnginePoolRef& wanted, uint64_t now) {
  return WithReason(absl::FailedPreconditionError(
                        absl::StrCat("engine pool \"", wanted.name, "\" has generation ", now,
                                     ", the call is for ", wanted.generation)),
                    "STALE_GENERATION", {{"generation", absl::StrCat(now)}});
}

}  // namespace

EnginePools::EnginePools(Options options, Executor* executor, const Clock* clock, Metrics* metrics)
    : options_(options),
      executor_(executor),
      clock_(clock),
      metrics_(metrics),
      pages_loaded_(metrics->GetCounter("pagetide_engine_loaded_pages_total",
                                        "Pages copied into blocks of engines")),
      pages_stored_(metrics->GetCounter("pagetide_engine_stored_pages_total",
                                        "Pages copied from blocks of engines")),
      pages_known_(metrics->GetCounter("pagetide_engine_known_pages_total",
                                       "Pages that engines wanted to store and that were known")),
      bytes_loaded_(metrics->GetCounter("pagetide_engine_loaded_bytes_total",
                                        "Bytes of rows copied into blocks of engines")),
      bytes_stored_(metrics->GetCounter("pagetide_engine_stored_bytes_total",
                                        "Bytes of rows copied from blocks of engines")),
      pools_gauge_(metrics->GetGauge("pagetide_engine_pools", "Pools that engines registered")),
      queued_gauge_(metrics->GetGauge("pagetide_engine_jobs", "Jobs that have not ended",
                                      {{"state", "queued"}})),
      running_gauge_(metrics->GetGauge("pagetide_engine_jobs", "Jobs that have not ended",
                                       {{"state", "running"}})),
      // 2^20 generations of one life do not meet those of another; 0 is never one.
      last_generation_(options.incarnation & ~((uint64_t{1} << 20) - 1)) {}

EnginePools::~EnginePools() {
  Stop();
}

absl::StatusOr<EnginePoolRef> EnginePools::Register(const Tenant& tenant, ModelHost* host,
                                                    Registration registration,
                                                    MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(ValidateName("name", registration.name));
  PT_RETURN_IF_ERROR(
      CheckSide(registration.spec, registration.memories, host->pool().host_view() == nullptr));
  for (size_t m = 0; m < registration.memories.size(); ++m) {
    const absl::Status allocated = registration.memories[m]->CheckAllocated();
    if (allocated.ok()) continue;
    return absl::Status(allocated.code(), absl::StrCat("register an engine pool: memory ", m, ": ",
                                                       allocated.message()));
  }
  PT_ASSIGN_OR_RETURN(EngineLayout layout,
                      EngineLayout::Create(host->model().geometry(), registration.spec,
                                           std::move(registration.memories)));
  auto pool = std::make_shared<Pool>();
  pool->tenant = tenant.name;
  pool->ref.name = registration.name;
  pool->client_id = registration.client_id;
  pool->host = host;
  pool->layout = std::make_shared<const EngineLayout>(std::move(layout));
  const PoolKey key(tenant.name, registration.name);
  for (;;) {
    Leftovers left;
    uint64_t before = 0;
    {
      MutexLock lock(&mu_);
      PT_RETURN_IF_ERROR(CheckAccepts("register an engine pool"));
      const auto at = pools_.find(key);
      if (at != pools_.end()) {
        before = at->second->ref.generation;
        EndPool(at, absl::CancelledError("its engine pool was registered again"), &left);
      } else {
        // Of a pool of this name that ended by itself a job may still be writing to its memory.
        before = UnendedGeneration(key);
        if (before == 0) {
          PT_RETURN_IF_ERROR(CheckPoolRoom(tenant.name));
          pool->ref.generation = ++last_generation_;
          ++tenants_[tenant.name].num_pools;
          const EnginePoolRef ref = pool->ref;
          pools_.emplace(key, std::move(pool));
          SetGauges();
          return ref;
        }
      }
    }
    Finish(std::move(left));
    MutexLock lock(&mu_);
    if (!AwaitJobs(before, deadline)) {
      return absl::DeadlineExceededError(absl::StrCat("register engine pool \"", registration.name,
                                                      "\": jobs of generation ", before,
                                                      " have not ended yet"));
    }
  }
}

absl::Status EnginePools::CheckPoolRoom(const std::string& tenant) const {
  const auto state = tenants_.find(tenant);
  const size_t of_tenant = state == tenants_.end() ? 0 : state->second.num_pools;
  const bool is_all = pools_.size() >= options_.max_pools;
  if (!is_all && of_tenant < options_.max_pools_per_tenant) return absl::OkStatus();
  return WithReason(absl::ResourceExhaustedError(absl::StrCat(
                        is_all ? pools_.size() : of_tenant, " engine pools of ",
                        is_all ? "all tenants" : "the tenant", " are registered, the limit is ",
                        is_all ? options_.max_pools : options_.max_pools_per_tenant)),
                    "TOO_MANY_ENGINE_POOLS");
}

absl::Status EnginePools::Unregister(const Tenant& tenant, const EnginePoolRef& ref,
                                     MonotonicTime deadline) {
  Leftovers left;
  {
    MutexLock lock(&mu_);
    const auto at = pools_.find({tenant.name, ref.name});
    if (at != pools_.end()) {
      if (at->second->ref.generation > ref.generation) {
        return StaleGeneration(ref, at->second->ref.generation);
      }
      if (at->second->ref.generation == ref.generation) {
        EndPool(at, absl::CancelledError("its engine pool was unregistered"), &left);
      }
    }
  }
  Finish(std::move(left));
  MutexLock lock(&mu_);
  if (AwaitJobs(ref.generation, deadline)) return absl::OkStatus();
  return absl::DeadlineExceededError(
      absl::StrCat("unregister engine pool \"", ref.name, "\": a job of it has not ended yet"));
}

void EnginePools::DropClient(uint64_t client_id) {
  Leftovers left;
  {
    MutexLock lock(&mu_);
    for (auto at = pools_.begin(); at != pools_.end();) {
      const auto here = at++;
      if (here->second->client_id != client_id) continue;
      EndPool(here, absl::CancelledError("its engine left"), &left);
    }
  }
  Finish(std::move(left));
}

void EnginePools::EndPool(std::map<PoolKey, PoolPtr>::iterator at, const absl::Status& because,
                          Leftovers* left) {
  const PoolPtr pool = at->second;
  pools_.erase(at);
  --tenants_[pool->tenant].num_pools;
  for (auto& [number, job] : jobs_) {
    if (job.pool == pool) StopJob(number, job, because, left);
  }
  ForgetTenantIfIdle(pool->tenant);
  SetGauges();
  left->pools.push_back(pool);
}

bool EnginePools::HasJobs(uint64_t generation) const {
  return std::any_of(jobs_.begin(), jobs_.end(), [&](const auto& entry) {
    return !entry.second.info.has_ended() && entry.second.info.pool.generation == generation;
  });
}

uint64_t EnginePools::UnendedGeneration(const PoolKey& key) const {
  for (const auto& [number, job] : jobs_) {
    if (!job.info.has_ended() && PoolKey(job.tenant, job.info.pool.name) == key) {
      return job.info.pool.generation;
    }
  }
  return 0;
}

bool EnginePools::AwaitJobs(uint64_t generation, MonotonicTime deadline) {
  while (HasJobs(generation)) {
    const absl::Duration left = deadline - clock_->MonotonicNow();
    if (left <= absl::ZeroDuration()) return false;
    changed_.WaitWithTimeout(&mu_, std::min(left, kLookAgain));
  }
  return true;
}

absl::StatusOr<EnginePools::PoolPtr> EnginePools::FindPool(const Tenant& tenant,
                                                           const EnginePoolRef& ref) const {
  const auto at = pools_.find({tenant.name, ref.name});
  if (at == pools_.end()) return PoolNotFound(ref.name);
  if (at->second->ref.generation != ref.generation) {
    return StaleGeneration(ref, at->second->ref.generation);
  }
  return at->second;
}

void EnginePools::ForgetTenantIfIdle(const std::string& tenant) {
  const auto at = tenants_.find(tenant);
  if (at == tenants_.end()) return;
  const TenantState& state = at->second;
  if (state.num_pools == 0 && state.num_active == 0 && state.ended.empty()) tenants_.erase(at);
}

void EnginePools::Drain() {
  Leftovers left;
  {
    MutexLock lock(&mu_);
    if (draining_since_) return;
    draining_since_ = clock_->MonotonicNow();
    const absl::Status because =
        WithReason(absl::CancelledError("its worker drains"), error_reason::kDraining);
    for (auto& [number, job] : jobs_) StopJob(number, job, because, &left);
    changed_.SignalAll();
  }
  Finish(std::move(left));
}

absl::Status EnginePools::CheckAccepts(absl::string_view what) const {
  if (is_stopped_) return absl::UnavailableError(absl::StrCat(what, ": the worker stops"));
  if (!draining_since_) return absl::OkStatus();
  return WithReason(absl::FailedPreconditionError(absl::StrCat(what, ": the worker drains")),
                    error_reason::kDraining);
}

void EnginePools::Stop() {
  Leftovers left;
  {
    MutexLock lock(&mu_);
    is_stopped_ = true;
    while (!pools_.empty())
      EndPool(pools_.begin(), absl::CancelledError("the worker stops"), &left);
  }
  Finish(std::move(left));
  MutexLock lock(&mu_);
  while (num_active_ > 0 || num_runners_ > 0) changed_.WaitWithTimeout(&mu_, kLookAgain);
}

void EnginePools::SetGauges() {
  pools_gauge_->Set(static_cast<double>(pools_.size()));
  queued_gauge_->Set(static_cast<double>(queue_.size()));
  running_gauge_->Set(static_cast<double>(num_active_ - queue_.size()));
}

void EnginePools::Finish(Leftovers left) {
  for (const Job::OwnSequence& sequence : left.to_close) {
    const absl::Status closed = sequence.host->Close(sequence.tenant, sequence.id, sequence.epoch);
    if (!closed.ok()) LogWarning("worker", "close the sequence of a job: ", closed.message());
  }
  for (const auto& [kind, status] : left.outcomes) {
    std::string outcome = "OK";
    if (!status.ok()) {
      outcome = GetReason(status);
      if (outcome.empty()) outcome = absl::StatusCodeToString(status.code());
    }
    metrics_
        ->GetCounter(
            "pagetide_engine_jobs_total", "Jobs of engine pools that have ended",
            {{"operation", kind == EngineJobKind::kLoad ? "load" : "store"}, {"outcome", outcome}})
        ->Increment();
  }
}

void EnginePools::CountProgress(EngineJobKind kind, const EngineProgress& before,
                                const EngineProgress& now) {
  const auto pages = static_cast<double>(now.moved_pages - before.moved_pages);
  const auto bytes = static_cast<double>(now.moved_bytes - before.moved_bytes);
  (kind == EngineJobKind::kLoad ? pages_loaded_ : pages_stored_)->Add(pages);
  (kind == EngineJobKind::kLoad ? bytes_loaded_ : bytes_stored_)->Add(bytes);
  if (now.known_pages > before.known_pages) {
    pages_known_->Add(static_cast<double>(now.known_pages - before.known_pages));
  }
}

size_t EnginePools::num_pools() const {
  MutexLock lock(&mu_);
  return pools_.size();
}

size_t EnginePools::num_active_jobs() const {
  MutexLock lock(&mu_);
  return num_active_;
}

}  // namespace pagetide
