#include "services/worker_role.h"

#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/executor.h"
#include "base/log.h"
#include "base/periodic_task.h"
#include "base/status_macros.h"
#include "core/residency_digest.h"
#include "rpc/channel.h"
#include "rpc/metrics.h"
#include "rpc/model_codec.h"
#include "rpc/stream_deadlines.h"
#include "worker/choose_device.h"
#include "worker/engine_pool_service.h"
#include "worker/engine_pools.h"
#include "worker/incoming_transfers.h"
#include "worker/nccl_collective.h"
#include "worker/parking.h"
#include "worker/prefix_service.h"
#include "worker/prompt_planner.h"
#include "worker/report_journal.h"
#include "worker/request_memos.h"
#include "worker/retention.h"
#include "worker/router_link.h"
#include "worker/sequence_edit_service.h"
#include "worker/sequence_sender.h"
#include "worker/sequence_service.h"
#include "worker/session_service.h"
#include "worker/sessions.h"
#include "worker/shard_group_owner.h"
#include "worker/shard_group_service.h"
#include "worker/store_lease.h"
#include "worker/transfer_service.h"
#include "worker/worker_admin_service.h"
#include "worker/worker_fence.h"

namespace pagetide {

uint64_t RandomIncarnation() {
  uint64_t number = 0;
  while (number == 0) {
    if (getrandom(&number, sizeof(number), 0) != sizeof(number)) number = 0;
  }
  return number;
}

namespace {

// How soon others may resume a parked sequence that was idle here, and for how long a store that
// does not answer may hold up the end of this worker.
constexpr absl::Duration kGiveUpIdlePause = absl::Seconds(1);
constexpr absl::Duration kGiveUpIdleTimeout = absl::Seconds(2);
// How soon frames of transfers of which nothing comes are free, and how often the targets of moves
// in doubt are asked.
constexpr absl::Duration kExpireTransfersPause = absl::Milliseconds(200);
constexpr absl::Duration kResolveMovesPause = absl::Seconds(1);
// How soon a shard group is forgotten whose sequence here ended by itself.
constexpr absl::Duration kEndGroupsPause = absl::Seconds(2);

// Equal for processes of one running machine: its name and the id of this boot.
std::string HostName() {
  char name[256] = {};
  gethostname(name, sizeof(name) - 1);
  std::string boot;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
  return absl::StrCat(name, "/", boot);
}

v1::LoadReport MakeLoadReport(const Worker& worker, bool is_draining, bool has_store) {
  v1::LoadReport report;
  for (ModelHost* host : worker.Hosts()) {
    const HostLoad load = host->Load();
    report.set_free_frames(report.free_frames() + load.free_frames);
    report.set_evictable_frames(report.evictable_frames() + load.evictable_frames);
    report.set_total_frames(report.total_frames() + load.total_frames);
    report.set_open_sequences(report.open_sequences() + load.open_sequences);
    report.set_running_calls(report.running_calls() + load.running_calls);
    report.set_queued_prefill_tokens(report.queued_prefill_tokens() + load.queued_prefill_tokens);
    // The hosts share one processor and one store: the best that was measured is what it can do.
    report.set_prefill_tokens_per_second(
        std::max(report.prefill_tokens_per_second(), load.prefill_tokens_per_second));
    report.set_store_bytes_per_second(
        std::max(report.store_bytes_per_second(), load.store_bytes_per_second));
    report.add_model_digests(host->model().digest().ToHex());
  }
  report.set_draining(is_draining);
  report.set_loads_models_on_demand(has_store);
  return report;
}

void Journal(const std::vector<ResidencyChange>& changes, ReportJournal* journal) {
  for (const ResidencyChange& change : changes) {
    journal->OnResidencyChange(PrefixHint::Of(change.prefix), change.group, change.tier,
                               change.removed, change.page_bytes);
  }
}

// Null unless it is asked for and can be used.
std::unique_ptr<FrameLink> MakeFrameLink(const WorkerRole::Options& options, const Device& device,
                                         const Clock* clock, Metrics* metrics) {
  std::function<std::unique_ptr<FastLink>()> make = options.make_link;
  absl::string_view name = device.name();
  int gpu = 0;
  if (!make && options.link_gpus && absl::ConsumePrefix(&name, "cuda:") &&
      absl::SimpleAtoi(name, &gpu)) {
    make = [gpu, clock] {
      return std::make_unique<NcclLink>(NcclLink::Options{.gpu = gpu}, clock);
    };
  }
  if (!make) {
    if (options.link_gpus) {
      LogWarning("worker", "pages go to other workers by gRPC: frames lie in host memory");
    }
    return nullptr;
  }
  auto link = std::make_unique<FrameLink>(options.frame_link, std::move(make), clock, metrics);
  if (link->name().empty()) {
    LogWarning("worker", "pages go to other workers by gRPC: ", link->why_not());
    return nullptr;
  }
  LogInfo("worker", "pages go to other workers' GPUs by ", link->name());
  return link;
}

}  // namespace

// Members are destroyed in reverse order: first what calls, last what is called.
struct WorkerRole::Parts {
  std::string advertise;
  std::unique_ptr<Device> device;
  std::shared_ptr<PrometheusMetrics> metrics = std::make_shared<PrometheusMetrics>();
  ReportJournal journal;
  std::atomic<bool> is_draining{false};  // set once; read by the links' heartbeats
  std::unique_ptr<ThreadPoolExecutor> io;
  std::unique_ptr<Worker> worker;
  std::unique_ptr<Parking> parking;  // the lease's thread calls it
  std::unique_ptr<StoreLeaseKeeper> store_lease;
  std::unique_ptr<WorkerFence> fence;
  std::unique_ptr<ThreadPoolExecutor> engine_threads;
  std::unique_ptr<EnginePools> engine_pools;
  std::unique_ptr<LocalPlane> local_plane;
  std::unique_ptr<PeriodicTask> idle_giver;
  std::unique_ptr<RequestMemos> memos;
  std::unique_ptr<StreamDeadlines> stream_deadlines;
  std::unique_ptr<Retentions> retentions;
  std::unique_ptr<Sessions> sessions;
  std::unique_ptr<PromptPlanner> planner;
  std::unique_ptr<PrefixServiceImpl> prefix_service;
  std::unique_ptr<SequenceServiceImpl> sequence_service;
  std::unique_ptr<SequenceEditServiceImpl> sequence_edit_service;
  std::unique_ptr<SessionServiceImpl> session_service;
  std::unique_ptr<EnginePoolServiceImpl> engine_pool_service;
  std::unique_ptr<IncomingTransfers> incoming_transfers;
  std::unique_ptr<FrameLink> frame_link;  // null: pages go by gRPC
  std::unique_ptr<SequenceSender> sequence_sender;
  std::unique_ptr<GroupMailbox> group_mailbox;
  std::unique_ptr<PeriodicTask> transfer_expirer;
  std::unique_ptr<PeriodicTask> move_resolver;
  std::unique_ptr<TransferServiceImpl> transfer_service;
  std::unique_ptr<ShardGroupOwner> shard_group_owner;
  std::unique_ptr<PeriodicTask> group_ender;
  std::unique_ptr<ShardGroupServiceImpl> shard_group_service;
  std::unique_ptr<WorkerAdminService> admin_service;
  std::unique_ptr<RpcServer> server;
  std::vector<std::unique_ptr<RouterLink>> links;
};

absl::StatusOr<std::unique_ptr<WorkerRole>> WorkerRole::Start(Options options, PageStore* store,
                                                              Clock* clock) {
  auto parts = std::make_unique<Parts>();
  if (options.make_device) {
    parts->device = options.make_device();
  } else {
    PT_ASSIGN_OR_RETURN(ChosenDevice chosen,
                        ChooseDevice(options.device, options.cpu_device, options.cuda_device));
    if (!chosen.why_not_gpu.empty()) {
      LogWarning("worker", "frames lie in host memory: ", chosen.why_not_gpu);
    }
    parts->device = std::move(chosen.device);
  }
  if (options.worker.incarnation == 0) options.worker.incarnation = RandomIncarnation();
  if (options.io_threads < 1 || options.io_threads > 256) {
    return absl::InvalidArgumentError(
        absl::StrCat("io_threads is ", options.io_threads, ", must be 1 to 256"));
  }
  parts->io = std::make_unique<ThreadPoolExecutor>(ThreadPoolExecutor::Options{
      .name = "worker-io", .num_threads = options.io_threads, .max_queue = options.io_queue});
  const std::string worker_id = options.worker.id;
  ReportJournal* const journal = &parts->journal;
  Worker::Ports ports{.device = parts->device.get(),
                      .store = store,
                      .io = parts->io.get(),
                      .clock = clock,
                      .metrics = parts->metrics.get(),
                      .parse_model = ParseModelSpec};
  ports.on_host = [journal](ModelHost& host) {
    host.SetResidencyListener(
        [journal](const std::vector<ResidencyChange>& changes) { Journal(changes, journal); });
    Journal(host.ResidencySnapshot(), journal);
  };
  ports.on_sequence = [journal](const ModelHost& host, const SequenceInfo& info) {
    journal->OnSequence(info.id, host.model().digest().ToHex(), info.length);
  };
  ports.on_sequence_closed = [journal](SequenceId id) { journal->OnSequenceClosed(id); };
  // Parking and memos are there before the worker starts.
  ports.on_sequence_idle = [parts = parts.get()](const IdleSequence& idle) {
    parts->parking->NoteIdle(idle.id, idle.epoch);
    parts->memos->ForgetSequence(idle.tenant, idle.id.ToString());
  };
  ports.on_sequence_resumed = [journal](const ModelHost& host, const SequenceInfo& info) {
    journal->OnSequenceResumed(info.id, host.model().digest().ToHex(), info.length);
  };
  PT_ASSIGN_OR_RETURN(parts->worker, Worker::Create(std::move(options.worker), std::move(ports)));
  Worker* const worker = parts->worker.get();
  // Jobs of engines wait for frames and restores, so they have threads of their own.
  options.engine_pools.incarnation = worker->incarnation();
  parts->engine_threads = std::make_unique<ThreadPoolExecutor>(ThreadPoolExecutor::Options{
      .name = "engine-jobs", .num_threads = options.engine_pools.max_running, .max_queue = 64});
  parts->engine_pools = std::make_unique<EnginePools>(
      options.engine_pools, parts->engine_threads.get(), clock, parts->metrics.get());
  if (!options.local_plane.socket_path.empty()) {
    options.local_plane.on_client_gone = [pools = parts->engine_pools.get()](uint64_t client_id) {
      pools->DropClient(client_id);
    };
    PT_ASSIGN_OR_RETURN(parts->local_plane, LocalPlane::Create(options.local_plane, worker));
  }
  LocalPlane* const local_plane = parts->local_plane.get();
  parts->memos = std::make_unique<RequestMemos>(RequestMemos::Options(), clock);
  parts->stream_deadlines = std::make_unique<StreamDeadlines>(clock, parts->metrics.get());
  parts->admin_service = std::make_unique<WorkerAdminService>(worker, local_plane);
  if (store != nullptr) {
    parts->store_lease = std::make_unique<StoreLeaseKeeper>(
        StoreLeaseKeeper::Options{.name = absl::StrCat("worker/", worker_id),
                                  .incarnation = worker->incarnation(),
                                  .ttl = options.store_lease_ttl,
                                  // The parking is there before the keeper starts.
                                  .on_granted =
                                      [parts = parts.get(), clock, ttl = options.store_lease_ttl] {
                                        parts->parking->CheckOwned(clock->MonotonicNow() + ttl / 3);
                                      }},
        store, clock);
    parts->fence = std::make_unique<WorkerFence>(worker_id, worker->incarnation(),
                                                 parts->store_lease.get(), store);
  }
  parts->parking = std::make_unique<Parking>(Parking::Options{.lease_ttl = options.store_lease_ttl},
                                             worker, store, parts->fence.get());
  if (parts->store_lease) {
    parts->store_lease->Start();
    parts->idle_giver = std::make_unique<PeriodicTask>(
        "parking-idle", kGiveUpIdlePause, [parking = parts->parking.get(), clock] {
          parking->GiveUpIdle(clock->MonotonicNow() + kGiveUpIdleTimeout);
        });
  }
  parts->retentions = std::make_unique<Retentions>(worker, store, parts->fence.get());
  parts->sequence_edit_service = std::make_unique<SequenceEditServiceImpl>(
      worker, parts->memos.get(), parts->retentions.get());
  parts->sessions =
      std::make_unique<Sessions>(worker, store, parts->fence.get(), parts->parking.get());
  parts->planner = std::make_unique<PromptPlanner>(parts->sessions.get());
  parts->prefix_service =
      std::make_unique<PrefixServiceImpl>(worker, parts->memos.get(), parts->planner.get());
  parts->sequence_service = std::make_unique<SequenceServiceImpl>(
      worker, parts->memos.get(), local_plane, parts->planner.get(), parts->parking.get(),
      parts->stream_deadlines.get());
  parts->session_service =
      std::make_unique<SessionServiceImpl>(worker, parts->sessions.get(), parts->memos.get(),
                                           parts->stream_deadlines.get(), options.file_limits);
  parts->engine_pool_service =
      std::make_unique<EnginePoolServiceImpl>(worker, parts->engine_pools.get(), local_plane,
                                              parts->memos.get(), parts->stream_deadlines.get());
  parts->incoming_transfers = std::make_unique<IncomingTransfers>(
      IncomingTransfers::Options{.incarnation = worker->incarnation()}, clock,
      parts->metrics.get());
  parts->frame_link = MakeFrameLink(options, *parts->device, clock, parts->metrics.get());
  parts->sequence_sender =
      std::make_unique<SequenceSender>(SequenceSender::Options(), worker, parts->parking.get(),
                                       parts->memos.get(), parts->frame_link.get());
  parts->transfer_expirer = std::make_unique<PeriodicTask>(
      "transfer-expire", kExpireTransfersPause,
      [transfers = parts->incoming_transfers.get()] { transfers->Expire(); });
  parts->move_resolver = std::make_unique<PeriodicTask>(
      "move-resolve", kResolveMovesPause,
      [sender = parts->sequence_sender.get()] { sender->Resolve(); });
  parts->group_mailbox = std::make_unique<GroupMailbox>(clock);
  parts->transfer_service = std::make_unique<TransferServiceImpl>(
      worker, parts->incoming_transfers.get(), parts->sequence_sender.get(),
      parts->frame_link.get(), parts->group_mailbox.get(), parts->memos.get(),
      parts->stream_deadlines.get());
  parts->shard_group_owner =
      std::make_unique<ShardGroupOwner>(ShardGroupOwner::Options(), worker, parts->parking.get(),
                                        parts->memos.get(), parts->sequence_sender.get());
  parts->group_ender = std::make_unique<PeriodicTask>(
      "shard-group-end", kEndGroupsPause,
      [owner = parts->shard_group_owner.get()] { owner->EndGone(); });
  parts->shard_group_service =
      std::make_unique<ShardGroupServiceImpl>(worker, parts->shard_group_owner.get());
  worker->Start();
  PT_ASSIGN_OR_RETURN(
      parts->server,
      RpcServer::Create(options.server,
                        {parts->prefix_service.get(), parts->sequence_service.get(),
                         parts->sequence_edit_service.get(), parts->session_service.get(),
                         parts->engine_pool_service.get(), parts->transfer_service.get(),
                         parts->shard_group_service.get(), parts->admin_service.get()},
                        parts->metrics));
  // Else a drain would wait for who watches jobs.
  parts->server->OnDrain([pools = parts->engine_pools.get()] { pools->Drain(); });
  parts->advertise =
      options.advertise.empty() ? parts->server->addresses().front() : options.advertise;
  for (const std::string& router : options.routers) {
    RouterLink::Options link;
    link.router_address = router;
    link.hello.set_worker_id(worker->id());
    link.hello.set_incarnation(worker->incarnation());
    link.hello.set_address(parts->advertise);
    link.hello.set_local_socket(options.local_plane.socket_path);
    link.hello.set_role("worker");
    link.hello.set_host(HostName());
    link.hello.set_shard_group(options.shard_group);
    link.hello.set_shard_rank(options.shard_rank);
    parts->links.push_back(std::make_unique<RouterLink>(
        std::move(link), MakeChannel(router), journal,
        [worker, has_store = store != nullptr, draining = &parts->is_draining] {
          return MakeLoadReport(*worker, draining->load(), has_store);
        },
        options.on_drain_asked));
  }
  LogInfo("worker", "worker ", worker->id(), " serves at ", parts->advertise, ", incarnation ",
          absl::Hex(worker->incarnation(), absl::kZeroPad16));
  return std::unique_ptr<WorkerRole>(new WorkerRole(std::move(parts)));
}

WorkerRole::WorkerRole(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}

WorkerRole::~WorkerRole() {
  Drain(absl::ZeroDuration());
  parts_->links.clear();
  parts_->server.reset();
  parts_->local_plane.reset();
  parts_->engine_pools->Stop();
  // Before the hosts that they hold frames and sequences of.
  parts_->group_ender.reset();
  parts_->move_resolver.reset();
  parts_->transfer_expirer.reset();
  parts_->incoming_transfers.reset();
  parts_->sequence_service.reset();
  parts_->worker->Stop();
}

void WorkerRole::Drain(absl::Duration timeout) {
  parts_->is_draining = true;
  // Now: routers must not send more here until the next heartbeat.
  for (const std::unique_ptr<RouterLink>& link : parts_->links) link->ReportLoad();
  parts_->server->Drain(timeout);
}

GroupMailbox& WorkerRole::group_mailbox() {
  return *parts_->group_mailbox;
}

size_t WorkerRole::num_attached_routers() const {
  return static_cast<size_t>(
      std::count_if(parts_->links.begin(), parts_->links.end(),
                    [](const std::unique_ptr<RouterLink>& link) { return link->is_attached(); }));
}

std::string WorkerRole::address() const {
  return parts_->advertise;
}

std::string WorkerRole::metrics_address() const {
  return parts_->server->metrics_address();
}

Worker& WorkerRole::worker() {
  return *parts_->worker;
}

}  // namespace pagetide
