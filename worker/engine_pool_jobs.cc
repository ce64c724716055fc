// Jobs of engine pools: accepted, queued, run, watched, stopped and forgotten.
#include <algorithm>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "worker/engine_pools.h"

namespace pagetide {
namespace {

// After which a refused job may find room, or a block free.
constexpr absl::Duration kRetryDelay = absl::Milliseconds(200);

absl::Status TooManyJobs(absl::string_view whose, size_t num, size_t limit) {
  return WithRetryDelay(
      WithReason(absl::ResourceExhaustedError(absl::StrCat(
                     num, " engine jobs of ", whose, " have not ended, the limit is ", limit)),
                 "TOO_MANY_ENGINE_JOBS"),
      kRetryDelay);
}

// The blocks that the slot maps name, each once. Whatever group they are of: groups may share one
// memory.
std::vector<uint32_t> BlocksOf(const EngineTransfer& transfer) {
  std::vector<uint32_t> blocks;
  for (const EngineSlotMap& map : transfer.maps) {
    blocks.insert(blocks.end(), map.blocks.begin(), map.blocks.end());
  }
  std::sort(blocks.begin(), blocks.end());
  blocks.erase(std::unique(blocks.begin(), blocks.end()), blocks.end());
  return blocks;
}

}  // namespace

// The job as its transfer sees it. A transfer that was stopped touches no entry of the table but by
// the lock, where it finds out.
class EnginePools::Run final : public EngineTransferJob {
 public:
  Run(EnginePools* pools, uint64_t number, EngineJobKind kind,
      std::shared_ptr<std::atomic<bool>> stop)
      : pools_(pools), number_(number), kind_(kind), stop_(std::move(stop)) {}

  // Relaxed: only "soon" matters; what was done before the stop is ordered by the lock.
  bool is_stopped() const override { return stop_->load(std::memory_order_relaxed); }

  void Attach(ModelHost* host, const Tenant& tenant, const SequenceInfo& info) override {
    Job::OwnSequence own{host, tenant, info.id, info.epoch};
    {
      MutexLock lock(&pools_->mu_);
      if (!is_stopped()) {
        pools_->jobs_.at(number_).sequence = std::move(own);
        return;
      }
    }
    Leftovers left;
    left.to_close.push_back(std::move(own));
    pools_->Finish(std::move(left));
  }

  void Detach() override {
    MutexLock lock(&pools_->mu_);
    pools_->jobs_.at(number_).sequence.reset();
  }

  void Report(const EngineProgress& progress) override {
    EngineProgress before;
    {
      MutexLock lock(&pools_->mu_);
      Job& job = pools_->jobs_.at(number_);
      before = std::exchange(job.info.progress, progress);
      ++job.version;
      pools_->changed_.SignalAll();
    }
    pools_->CountProgress(kind_, before, progress);
  }

 private:
  EnginePools* const pools_;
  const uint64_t number_;
  const EngineJobKind kind_;
  const std::shared_ptr<std::atomic<bool>> stop_;  // shared with who stops the job
};

absl::Status EnginePools::CheckRoom(const Tenant& tenant) const {
  PT_RETURN_IF_ERROR(CheckAccepts("accept an engine job"));
  if (num_active_ >= options_.max_jobs) {
    return TooManyJobs("all tenants", num_active_, options_.max_jobs);
  }
  const auto state = tenants_.find(tenant.name);
  const size_t active = state == tenants_.end() ? 0 : state->second.num_active;
  if (active < options_.max_jobs_per_tenant) return absl::OkStatus();
  return TooManyJobs("the tenant", active, options_.max_jobs_per_tenant);
}

absl::StatusOr<EngineJobInfo> EnginePools::Submit(const Tenant& tenant, EngineJobKind kind,
                                                  Request request) {
  const absl::Duration limit =
      request.time_limit == absl::ZeroDuration() ? options_.default_time_limit : request.time_limit;
  if (limit < absl::ZeroDuration() || limit > options_.max_time_limit) {
    return absl::InvalidArgumentError(absl::StrCat("time_limit is ", absl::FormatDuration(limit),
                                                   ", must be above 0 and at most ",
                                                   absl::FormatDuration(options_.max_time_limit)));
  }
  PoolPtr pool;
  {
    MutexLock lock(&mu_);
    PT_ASSIGN_OR_RETURN(pool, FindPool(tenant, request.pool));
    PT_RETURN_IF_ERROR(CheckRoom(tenant));
  }
  auto transfer = std::make_shared<EngineTransfer>();
  transfer->host = pool->host;
  transfer->tenant = tenant;
  transfer->layout = pool->layout;
  transfer->maps = std::move(request.maps);
  transfer->tokens = std::move(request.tokens);
  transfer->inputs = std::move(request.inputs);
  transfer->sequence = request.sequence;
  transfer->num_tokens = transfer->tokens.size();
  transfer->allow_full_reuse = request.allow_full_reuse;
  transfer->clock = clock_;
  transfer->deadline = clock_->MonotonicNow() + limit;
  if (transfer->sequence) {
    PT_ASSIGN_OR_RETURN(const SequenceInfo info, pool->host->Get(tenant, *transfer->sequence));
    transfer->num_tokens = request.num_rows.value_or(info.length);
    if (transfer->num_tokens > info.length) {
      return absl::InvalidArgumentError(
          absl::StrCat("num_rows is ", transfer->num_tokens, ", the sequence has ", info.length));
    }
  } else if (transfer->tokens.empty()) {
    return absl::InvalidArgumentError("tokens is empty");
  }
  PT_RETURN_IF_ERROR(pool->layout->CheckMaps(transfer->maps, transfer->num_tokens));

  Leftovers left;
  EngineJobInfo info;
  bool must_schedule = false;
  uint64_t number = 0;
  {
    MutexLock lock(&mu_);
    // It may have ended meanwhile.
    PT_RETURN_IF_ERROR(FindPool(tenant, request.pool).status());
    ExpireJobs(&left);
    PT_RETURN_IF_ERROR(CheckRoom(tenant));
    PT_RETURN_IF_ERROR(TakeBlocks(*pool, kind, *transfer));
    number = ++last_job_;
    Job& job = jobs_[number];
    job.info.id =
        absl::StrCat(absl::Hex(options_.incarnation, absl::kZeroPad16), "-", absl::Hex(number));
    job.info.kind = kind;
    job.info.pool = pool->ref;
    job.info.num_tokens = transfer->num_tokens;
    job.tenant = tenant.name;
    job.pool = std::move(pool);
    job.transfer = std::move(transfer);
    job.stop = std::make_shared<std::atomic<bool>>(false);
    ++num_active_;
    ++tenants_[tenant.name].num_active;
    queue_.push_back(number);
    info = job.info;
    if (num_runners_ < options_.max_running) {
      ++num_runners_;
      must_schedule = true;
    }
    SetGauges();
  }
  Finish(std::move(left));
  if (!must_schedule) return info;
  const absl::Status scheduled = executor_->Schedule([this] { RunQueue(); });
  if (scheduled.ok()) return info;
  Leftovers refused;
  {
    MutexLock lock(&mu_);
    --num_runners_;
    if (num_runners_ == 0) {
      // Nobody would ever run it.
      const auto at = jobs_.find(number);
      if (at != jobs_.end() && at->second.info.state == EngineJobState::kQueued) {
        StopJob(number, at->second, scheduled, &refused);
      }
    }
    changed_.SignalAll();
  }
  const bool is_refused = !refused.outcomes.empty();
  Finish(std::move(refused));
  if (is_refused) return scheduled;
  return info;
}

void EnginePools::RunQueue() {
  for (;;) {
    Leftovers left;
    uint64_t number = 0;
    std::shared_ptr<const EngineTransfer> transfer;
    std::unique_ptr<Run> run;
    EngineJobKind kind = EngineJobKind::kLoad;
    {
      MutexLock lock(&mu_);
      number = TakeNext(&left);
      if (number == 0 && left.outcomes.empty()) {
        --num_runners_;
        // Who waits for the last runner may destroy this object once the lock is free.
        changed_.SignalAll();
        return;
      }
      if (number != 0) {
        Job& job = jobs_.at(number);
        transfer = job.transfer;
        kind = job.info.kind;
        run = std::make_unique<Run>(this, number, kind, job.stop);
      }
    }
    Finish(std::move(left));
    if (number == 0) continue;
    absl::Status status = kind == EngineJobKind::kLoad ? LoadIntoEngine(*transfer, run.get())
                                                       : StoreFromEngine(*transfer, run.get());
    transfer.reset();
    Leftovers ended;
    {
      MutexLock lock(&mu_);
      EndJob(number, jobs_.at(number), std::move(status), &ended);
    }
    Finish(std::move(ended));
  }
}

uint64_t EnginePools::TakeNext(Leftovers* left) {
  ExpireJobs(left);
  for (auto at = queue_.begin(); at != queue_.end(); ++at) {
    Job& job = jobs_.at(*at);
    TenantState& tenant = tenants_[job.tenant];
    if (tenant.num_running >= options_.max_running_per_tenant) continue;
    const uint64_t number = *at;
    queue_.erase(at);
    ++tenant.num_running;
    job.info.state = EngineJobState::kRunning;
    ++job.version;
    SetGauges();
    changed_.SignalAll();
    return number;
  }
  return 0;
}

void EnginePools::StopJob(uint64_t number, Job& job, const absl::Status& because, Leftovers* left) {
  if (job.info.has_ended() || job.stop->load(std::memory_order_relaxed)) return;
  job.stop->store(true, std::memory_order_relaxed);
  job.stop_because = because;
  if (job.sequence) left->to_close.push_back(*job.sequence);
  if (job.info.state == EngineJobState::kQueued) {
    queue_.erase(std::find(queue_.begin(), queue_.end(), number));
    EndJob(number, job, because, left);
  }
}

void EnginePools::EndJob(uint64_t number, Job& job, absl::Status status, Leftovers* left) {
  TenantState& tenant = tenants_[job.tenant];
  if (job.info.state == EngineJobState::kRunning) --tenant.num_running;
  // A job that was done before it noticed is done.
  if (!status.ok() && job.stop->load(std::memory_order_relaxed)) status = job.stop_because;
  job.info.state = status.ok()                 ? EngineJobState::kDone
                   : absl::IsCancelled(status) ? EngineJobState::kCancelled
                                               : EngineJobState::kFailed;
  job.info.status = std::move(status);
  ++job.version;
  GiveBlocksBack(job);
  left->outcomes.emplace_back(job.info.kind, job.info.status);
  left->transfers.push_back(std::move(job.transfer));
  left->pools.push_back(std::move(job.pool));
  job.transfer = nullptr;
  job.pool = nullptr;
  job.ended_at = clock_->MonotonicNow();
  --num_active_;
  --tenant.num_active;
  tenant.ended.push_back(number);
  if (tenant.ended.size() > options_.max_ended_per_tenant) {
    jobs_.erase(tenant.ended.front());
    tenant.ended.pop_front();
  }
  SetGauges();
  changed_.SignalAll();
}

absl::Status EnginePools::TakeBlocks(const Pool& pool, EngineJobKind kind,
                                     const EngineTransfer& transfer) {
  const bool is_write = kind == EngineJobKind::kLoad;
  const std::vector<uint32_t> blocks = BlocksOf(transfer);
  for (uint32_t block : blocks) {
    const auto at = busy_blocks_.find({pool.ref.generation, block});
    if (at == busy_blocks_.end() || (!is_write && at->second > 0)) continue;
    return WithRetryDelay(
        WithReason(absl::FailedPreconditionError(absl::StrCat(
                       "slot_maps: block ", block, " is being ",
                       at->second < 0 ? "written by another load" : "read by a store")),
                   "BLOCK_BUSY", {{"block", absl::StrCat(block)}}),
        kRetryDelay);
  }
  for (uint32_t block : blocks) {
    int& users = busy_blocks_[{pool.ref.generation, block}];
    users = is_write ? -1 : users + 1;
  }
  return absl::OkStatus();
}

void EnginePools::GiveBlocksBack(const Job& job) {
  for (uint32_t block : BlocksOf(*job.transfer)) {
    const auto at = busy_blocks_.find({job.info.pool.generation, block});
    if (--at->second <= 0) busy_blocks_.erase(at);
  }
}

void EnginePools::ExpireJobs(Leftovers* left) {
  const MonotonicTime now = clock_->MonotonicNow();
  std::vector<uint64_t> late;
  for (uint64_t number : queue_) {
    if (jobs_.at(number).transfer->deadline <= now) late.push_back(number);
  }
  for (uint64_t number : late) {
    StopJob(number, jobs_.at(number),
            absl::DeadlineExceededError("the job's time was up before it could run"), left);
  }
  for (auto at = tenants_.begin(); at != tenants_.end();) {
    const auto here = at++;
    std::deque<uint64_t>& ended = here->second.ended;
    while (!ended.empty() && jobs_.at(ended.front()).ended_at + options_.ended_ttl <= now) {
      jobs_.erase(ended.front());
      ended.pop_front();
    }
    ForgetTenantIfIdle(here->first);
  }
}

absl::StatusOr<uint64_t> EnginePools::FindJob(absl::string_view tenant,
                                              absl::string_view job_id) const {
  const std::string prefix = absl::StrCat(absl::Hex(options_.incarnation, absl::kZeroPad16), "-");
  uint64_t number = 0;
  if (job_id.size() > prefix.size() && job_id.substr(0, prefix.size()) == prefix &&
      absl::SimpleHexAtoi(job_id.substr(prefix.size()), &number)) {
    const auto at = jobs_.find(number);
    if (at != jobs_.end() && at->second.tenant == tenant && at->second.info.id == job_id) {
      return number;
    }
  }
  return WithReason(absl::NotFoundError("engine job: none of this id is known here"),
                    "ENGINE_JOB_NOT_FOUND");
}

absl::StatusOr<EngineJobInfo> EnginePools::Get(const Tenant& tenant, absl::string_view job_id) {
  Leftovers left;
  const auto get = [&]() -> absl::StatusOr<EngineJobInfo> {
    MutexLock lock(&mu_);
    ExpireJobs(&left);
    PT_ASSIGN_OR_RETURN(const uint64_t number, FindJob(tenant.name, job_id));
    return jobs_.at(number).info;
  };
  auto info = get();
  Finish(std::move(left));
  return info;
}

absl::Status EnginePools::Watch(const Tenant& tenant, absl::string_view job_id,
                                MonotonicTime deadline, Watcher watcher) {
  std::optional<uint64_t> seen;
  for (;;) {
    Leftovers left;
    std::optional<EngineJobInfo> info;
    bool is_news = false;
    bool is_draining = false;
    const auto look = [&]() -> absl::Status {
      MutexLock lock(&mu_);
      ExpireJobs(&left);
      PT_ASSIGN_OR_RETURN(uint64_t number, FindJob(tenant.name, job_id));
      is_draining = draining_since_.has_value();
      if (is_draining) deadline = std::min(deadline, *draining_since_ + kDrainWait);
      if (jobs_.at(number).version == seen) {
        changed_.WaitWithTimeout(&mu_, std::min(deadline - clock_->MonotonicNow(), kLookAgain));
        PT_ASSIGN_OR_RETURN(number, FindJob(tenant.name, job_id));
      }
      const Job& job = jobs_.at(number);
      is_news = seen != job.version;
      seen = job.version;
      info = job.info;
      return absl::OkStatus();
    };
    const absl::Status status = look();
    Finish(std::move(left));
    PT_RETURN_IF_ERROR(status);
    if (!watcher(*info, is_news)) return absl::CancelledError("watch engine job: the watcher left");
    if (info->has_ended()) return absl::OkStatus();
    if (clock_->MonotonicNow() < deadline) continue;
    const std::string what = absl::StrCat("watch engine job ", info->id, ": it has not ended yet");
    if (!is_draining) return absl::DeadlineExceededError(what);
    return WithReason(absl::FailedPreconditionError(absl::StrCat(what, ", and the worker drains")),
                      error_reason::kDraining);
  }
}

absl::StatusOr<EngineJobInfo> EnginePools::Cancel(const Tenant& tenant, absl::string_view job_id,
                                                  std::optional<MonotonicTime> deadline) {
  Leftovers left;
  const auto stop = [&]() -> absl::StatusOr<EngineJobInfo> {
    MutexLock lock(&mu_);
    PT_ASSIGN_OR_RETURN(const uint64_t number, FindJob(tenant.name, job_id));
    Job& job = jobs_.at(number);
    StopJob(number, job, absl::CancelledError("it was cancelled"), &left);
    return job.info;
  };
  auto info = stop();
  Finish(std::move(left));
  if (!info.ok() || info->has_ended() || !deadline) return info;
  PT_RETURN_IF_ERROR(Watch(tenant, job_id, *deadline, [&](const EngineJobInfo& now, bool) {
    *info = now;
    return true;
  }));
  return info;
}

}  // namespace pagetide
