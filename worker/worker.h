// Worker: all models that one process serves. It finds the ModelHost of a model or a sequence,
// makes a host when a model is first asked for (its spec is a record of the store), carves host
// pools out of one budget, and drives the hosts' upkeep from one named thread.
//
// Domain: knows neither gRPC nor protobuf. Thread-safe. Hosts live until the worker goes; pointers
// to them may be kept.
#ifndef PAGETIDE_WORKER_WORKER_H_
#define PAGETIDE_WORKER_WORKER_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "base/byte_size.h"
#include "base/clock.h"
#include "base/digest.h"
#include "base/executor.h"
#include "base/metrics.h"
#include "base/mutex.h"
#include "core/model.h"
#include "core/page_store.h"
#include "core/sequence_id.h"
#include "core/session_state.h"
#include "worker/byte_gauge.h"
#include "worker/model_host.h"
#include "worker/pin_leases.h"
#include "worker/worker_metrics.h"

namespace pagetide {

class Worker {
 public:
  struct Options {
    std::string id = "worker";
    // One life of this process: unique among all that ever ran under this id.
    uint64_t incarnation = 0;
    // Bytes of device memory for the frames of all models.
    uint64_t pool_bytes = kGiB;
    // Bytes for each model's pool; 0: a model takes all that is left.
    uint64_t model_pool_bytes = 0;
    size_t max_models = 64;
    // Template for each host; pool_bytes and incarnation are the worker's to set.
    ModelHost::Options host;
    // From which tenant salts are derived. Routers and workers of one deployment share it.
    std::string deployment_secret;
    absl::Duration tick_period = absl::Milliseconds(50);
    PinLeases::Options leases;
    // INVALID_ARGUMENT names the field and the numbers.
    absl::Status Validate() const;
  };
  // What the worker stands on; all outlive it.
  struct Ports {
    Device* device = nullptr;
    PageStore* store = nullptr;  // may be null: no spilling, and models come by AddModel only
    Executor* io = nullptr;      // spills and restores
    Clock* clock = nullptr;
    Metrics* metrics = nullptr;
    // Makes a model of the store's record (serialized by whoever registered it).
    std::function<absl::StatusOr<Model>(absl::string_view record)> parse_model;
    // Observers; may be null. Called without locks, from the thread that caused the change.
    std::function<void(ModelHost&)> on_host;  // once a host, before its first use
    std::function<void(const ModelHost&, const SequenceInfo&)> on_sequence;  // opened or changed
    std::function<void(SequenceId)> on_sequence_closed;
    // Besides, of one that was closed because no call was made on it; from the upkeep thread.
    std::function<void(const IdleSequence&)> on_sequence_idle;
    // One that may have been open here before, and closed.
    std::function<void(const ModelHost&, const SequenceInfo&)> on_sequence_resumed;
  };

  static absl::StatusOr<std::unique_ptr<Worker>> Create(Options options, Ports ports);
  ~Worker();
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  // Starts the upkeep thread. Once.
  void Start();
  // Ends leases and the upkeep thread, waits for running spills and restores. Idempotent.
  void Stop();

  // The host of a model (64 hex digits), made now if the store knows the model. NOT_FOUND
  // (MODEL_NOT_FOUND), INVALID_ARGUMENT (digest; POOL_TOO_SMALL), RESOURCE_EXHAUSTED (no budget
  // left).
  absl::StatusOr<ModelHost*> HostOfModel(absl::string_view model_digest, MonotonicTime deadline);
  // A model as it is registered, without a host for it. NOT_FOUND (MODEL_NOT_FOUND), DATA_LOSS.
  absl::StatusOr<Model> ReadModel(const Digest& digest, MonotonicTime deadline);
  // OK if saved rows are those of the model with this hex digest, or the digest is empty.
  // FAILED_PRECONDITION (MODEL_MISMATCH), INVALID_ARGUMENT (digest), errors of ReadModel.
  absl::Status CheckModel(const SessionState& state, absl::string_view model_digest,
                          MonotonicTime deadline);
  // Makes a host for a model the store need not know. Returns the present one if there is one.
  absl::StatusOr<ModelHost*> AddModel(Model model, MonotonicTime deadline);
  // Nullptr when no host was made for it yet.
  ModelHost* FindHost(absl::string_view model_digest) const;
  // NOT_FOUND (SEQUENCE_NOT_FOUND).
  absl::StatusOr<ModelHost*> HostOfSequence(SequenceId id) const;
  std::vector<ModelHost*> Hosts() const;

  // The services tell what they did to a sequence, for those who report it to routers.
  void NoteSequence(const ModelHost& host, const SequenceInfo& info) const;
  void NoteClosed(ModelHost& host, const Tenant& tenant, SequenceId id) const;
  void NoteResumed(const ModelHost& host, const SequenceInfo& info) const;

  Tenant TenantNamed(absl::string_view name) const;
  const std::string& id() const { return options_.id; }
  uint64_t incarnation() const { return options_.incarnation; }
  absl::string_view device_name() const { return ports_.device->name(); }
  Device& device() const { return *ports_.device; }
  PinLeases& leases() { return leases_; }
  // Row messages of appends between the transport and their frames.
  ByteGauge& staged_rows() { return staged_rows_; }
  Clock& clock() const { return *ports_.clock; }
  Metrics& metrics() const { return *ports_.metrics; }

 private:
  Worker(Options options, Ports ports);
  // Waits for a host that another thread is making; claims the digest otherwise (then returns
  // null).
  absl::StatusOr<ModelHost*> FindOrClaim(const Digest& digest, MonotonicTime deadline);
  absl::StatusOr<ModelHost*> MakeHost(absl::StatusOr<Model> model, const Digest& digest);
  absl::StatusOr<uint64_t> TakeBudget(const Model& model);
  void TickLoop();

  const Options options_;
  const Ports ports_;
  // Shared with the hosts: numbers of sequences are unique in the worker.
  const std::shared_ptr<std::atomic<uint64_t>> numbers_ =
      std::make_shared<std::atomic<uint64_t>>(0);
  PinLeases leases_;
  ByteGauge staged_rows_;
  WorkerMetrics metrics_;  // owned by the upkeep thread
  std::thread ticker_;

  mutable Mutex mu_;
  CondVar changed_;
  std::map<Digest, std::unique_ptr<ModelHost>> hosts_ ABSL_GUARDED_BY(mu_);
  std::set<Digest> in_making_ ABSL_GUARDED_BY(mu_);
  uint64_t free_bytes_ ABSL_GUARDED_BY(mu_);
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_WORKER_H_
