// EnginePools: the pools that engines on this host have registered, and the jobs that load pages
// into their blocks and store pages from them (proto/pagetide/v1/engine_pool.proto).
//
// A pool is named by its tenant's name for it and by a generation that no other registration has.
// It ends by Unregister, by another Register of its name, or with its client; then its jobs are
// stopped, and whoever waits is told when none touches the engine's memory any more. The memory is
// unmapped after the last of them.
//
// Jobs wait in one bounded queue and run on at most `max_running` threads of an executor, of one
// tenant on fewer, so that no tenant's waits for frames hold up all others. A block is written by
// one job at a time, and by none while another reads it.
//
// Thread-safe; one mutex, never held while rows move. The executor and the hosts outlive it; the
// executor must go on running tasks until Stop has returned.
#ifndef PAGETIDE_WORKER_ENGINE_POOLS_H_
#define PAGETIDE_WORKER_ENGINE_POOLS_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "base/executor.h"
#include "base/metrics.h"
#include "base/mutex.h"
#include "worker/engine_transfer.h"

namespace pagetide {

struct EnginePoolRef {
  std::string name;
  uint64_t generation = 0;
};

// Values equal the proto enums EngineJob.Kind and EngineJob.State.
enum class EngineJobKind : uint8_t { kLoad = 1, kStore = 2 };
enum class EngineJobState : uint8_t {
  kQueued = 1,
  kRunning = 2,
  kDone = 3,
  kFailed = 4,
  kCancelled = 5,
};

struct EngineJobInfo {
  std::string id;
  EngineJobKind kind = EngineJobKind::kLoad;
  EngineJobState state = EngineJobState::kQueued;
  EnginePoolRef pool;
  uint64_t num_tokens = 0;
  EngineProgress progress;
  absl::Status status;  // why it failed or was cancelled
  bool has_ended() const { return state >= EngineJobState::kDone; }
};

class EnginePools {
 public:
  struct Options {
    // Of the worker: part of generations and of the ids of jobs, so that none comes again.
    uint64_t incarnation = 0;
    size_t max_pools = 64;
    size_t max_pools_per_tenant = 16;
    size_t max_jobs = 1024;  // queued and running
    size_t max_jobs_per_tenant = 256;
    int max_running = 4;
    int max_running_per_tenant = 3;
    size_t max_ended_per_tenant = 1024;
    absl::Duration ended_ttl = absl::Minutes(10);
    absl::Duration default_time_limit = absl::Seconds(30);
    absl::Duration max_time_limit = absl::Minutes(10);
  };
  EnginePools(Options options, Executor* executor, const Clock* clock, Metrics* metrics);
  // Stops first.
  ~EnginePools();
  EnginePools(const EnginePools&) = delete;
  EnginePools& operator=(const EnginePools&) = delete;

  struct Registration {
    std::string name;
    uint64_t client_id = 0;  // of the local plane
    EnginePoolSpec spec;
    EngineLayout::Memories memories;
  };
  // Errors as EnginePoolService.RegisterEnginePool has them.
  absl::StatusOr<EnginePoolRef> Register(const Tenant& tenant, ModelHost* host,
                                         Registration registration, MonotonicTime deadline);
  absl::Status Unregister(const Tenant& tenant, const EnginePoolRef& ref, MonotonicTime deadline);
  // Ends all pools of a client that left. Does not wait for their jobs.
  void DropClient(uint64_t client_id);

  struct Request {
    EnginePoolRef pool;
    std::vector<uint32_t> tokens;
    std::vector<PositionedInput> inputs;
    std::optional<SequenceId> sequence;  // kLoad only, in the place of tokens
    std::optional<uint64_t> num_rows;    // of it; absent: all
    std::vector<EngineSlotMap> maps;
    bool allow_full_reuse = false;
    absl::Duration time_limit = absl::ZeroDuration();  // 0: the default
  };
  // Accepts a job.
  absl::StatusOr<EngineJobInfo> Submit(const Tenant& tenant, EngineJobKind kind, Request request);
  absl::StatusOr<EngineJobInfo> Get(const Tenant& tenant, absl::string_view job_id);
  // Tells `watcher` the job's state: at once, when it changed, and last when it has ended. Called
  // without locks from this thread, also while nothing changes (about ten times a second, with
  // false); it answers whether to go on: CANCELLED if not. DEADLINE_EXCEEDED.
  using Watcher = absl::FunctionRef<bool(const EngineJobInfo&, bool is_news)>;
  absl::Status Watch(const Tenant& tenant, absl::string_view job_id, MonotonicTime deadline,
                     Watcher watcher);
  // Stops a job; waits for its end until `deadline`, if there is one.
  absl::StatusOr<EngineJobInfo> Cancel(const Tenant& tenant, absl::string_view job_id,
                                       std::optional<MonotonicTime> deadline);

  // The worker is about to end: jobs are stopped and neither jobs nor pools accepted any more, with
  // the reason DRAINING. Does not wait: who watches a job is told its end, or after a moment that
  // it has not come. Idempotent.
  void Drain();
  // Ends all pools, waits for all jobs. Nothing is accepted any more. Idempotent.
  void Stop();

  size_t num_pools() const;
  size_t num_active_jobs() const;

 private:
  // Immutable but for what other structures say of it.
  struct Pool {
    std::string tenant;
    EnginePoolRef ref;
    uint64_t client_id = 0;
    ModelHost* host = nullptr;
    std::shared_ptr<const EngineLayout> layout;
  };
  // Shared by the table, the jobs and the calls that look at it without the lock.
  using PoolPtr = std::shared_ptr<const Pool>;
  struct Job {
    EngineJobInfo info;
    std::string tenant;
    PoolPtr pool;                                    // null once it has ended
    std::shared_ptr<const EngineTransfer> transfer;  // shared with its run; null once it has ended
    std::shared_ptr<std::atomic<bool>> stop;         // the same; set once, under the lock
    absl::Status stop_because;
    uint64_t version = 0;  // changes with `info`
    struct OwnSequence {
      ModelHost* host = nullptr;
      Tenant tenant;
      SequenceId id;
      uint64_t epoch = 0;
    };
    std::optional<OwnSequence> sequence;  // while it runs
    MonotonicTime ended_at;
  };
  struct TenantState {
    size_t num_pools = 0;
    size_t num_active = 0;
    int num_running = 0;
    std::deque<uint64_t> ended;  // jobs, in that order
  };
  class Run;
  // What is to be done, or destroyed, without the lock.
  struct Leftovers {
    std::vector<Job::OwnSequence> to_close;
    std::vector<std::shared_ptr<const EngineTransfer>> transfers;
    std::vector<PoolPtr> pools;
    std::vector<std::pair<EngineJobKind, absl::Status>> outcomes;
  };
  // How soon who waits looks at the clock again.
  static constexpr absl::Duration kLookAgain = absl::Milliseconds(100);
  // How long who watches a job waits for it once the worker drains.
  static constexpr absl::Duration kDrainWait = absl::Seconds(2);

  using PoolKey = std::pair<std::string, std::string>;  // tenant, name
  using Block = std::pair<uint64_t, uint64_t>;          // generation, block

  void RunQueue();
  // The next job that may run now, made to run; 0: none.
  uint64_t TakeNext(Leftovers* left) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::StatusOr<PoolPtr> FindPool(const Tenant& tenant, const EnginePoolRef& ref) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // The job's number.
  absl::StatusOr<uint64_t> FindJob(absl::string_view tenant, absl::string_view job_id) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // UNAVAILABLE when it is stopped, FAILED_PRECONDITION (DRAINING).
  absl::Status CheckAccepts(absl::string_view what) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status CheckRoom(const Tenant& tenant) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status CheckPoolRoom(const std::string& tenant) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // FAILED_PRECONDITION (BLOCK_BUSY) and nothing taken, or all.
  absl::Status TakeBlocks(const Pool& pool, EngineJobKind kind, const EngineTransfer& transfer)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void GiveBlocksBack(const Job& job) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void StopJob(uint64_t number, Job& job, const absl::Status& because, Leftovers* left)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void EndJob(uint64_t number, Job& job, absl::Status status, Leftovers* left)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void EndPool(std::map<PoolKey, PoolPtr>::iterator at, const absl::Status& because,
               Leftovers* left) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool HasJobs(uint64_t generation) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Of a pool of this name, registered or not, that has jobs which have not ended; 0: none.
  uint64_t UnendedGeneration(const PoolKey& key) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // False when some still run at the deadline.
  bool AwaitJobs(uint64_t generation, MonotonicTime deadline) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // A queued job whose time is up ends; ended ones are forgotten after a while.
  void ExpireJobs(Leftovers* left) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void ForgetTenantIfIdle(const std::string& tenant) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void SetGauges() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Finish(Leftovers left);
  void CountProgress(EngineJobKind kind, const EngineProgress& before, const EngineProgress& now);

  const Options options_;
  Executor* const executor_;
  const Clock* const clock_;
  Metrics* const metrics_;
  Counter* const pages_loaded_;
  Counter* const pages_stored_;
  Counter* const pages_known_;
  Counter* const bytes_loaded_;
  Counter* const bytes_stored_;
  Gauge* const pools_gauge_;
  Gauge* const queued_gauge_;
  Gauge* const running_gauge_;

  mutable Mutex mu_;
  CondVar changed_;
  bool is_stopped_ ABSL_GUARDED_BY(mu_) = false;
  std::optional<MonotonicTime> draining_since_ ABSL_GUARDED_BY(mu_);
  uint64_t last_generation_ ABSL_GUARDED_BY(mu_);
  uint64_t last_job_ ABSL_GUARDED_BY(mu_) = 0;
  std::map<PoolKey, PoolPtr> pools_ ABSL_GUARDED_BY(mu_);
  std::map<uint64_t, Job> jobs_ ABSL_GUARDED_BY(mu_);  // by number
  std::deque<uint64_t> queue_ ABSL_GUARDED_BY(mu_);    // jobs; of those that were stopped none
  size_t num_active_ ABSL_GUARDED_BY(mu_) = 0;         // queued and running
  int num_runners_ ABSL_GUARDED_BY(mu_) = 0;           // tasks of the executor
  std::map<std::string, TenantState> tenants_ ABSL_GUARDED_BY(mu_);
  // Of blocks that jobs work on: how many read it; -1: one writes it.
  absl::flat_hash_map<Block, int> busy_blocks_ ABSL_GUARDED_BY(mu_);
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_ENGINE_POOLS_H_
