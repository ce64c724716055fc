#include "services/worker_config.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/byte_size.h"
#include "base/status_macros.h"
#include "core/model.h"
#include "core/rank_models.h"
#include "kvstore/remote_page_store.h"
#include "kvstore/retrying_page_store.h"
#include "kvstore/rocksdb_page_store.h"
#include "rpc/channel.h"
#include "services/tenant.h"

namespace pagetide {
namespace {

absl::Status SetByteSize(absl::string_view field, const std::string& text, uint64_t* value) {
  const absl::StatusOr<uint64_t> bytes = ParseByteSize(text);
  if (!bytes.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(field, ": ", bytes.status().message()));
  }
  *value = *bytes;
  return absl::OkStatus();
}

absl::Status SetShardGroup(const config::WorkerConfig& config, WorkerRole::Options* options) {
  if (!config.has_shard_group()) {
    if (!config.has_shard_rank()) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat("shard_rank is ", config.shard_rank(),
                                                   " without a shard_group that it is a rank of"));
  }
  PT_RETURN_IF_ERROR(ValidateName("shard_group", config.shard_group()));
  if (config.shard_rank() >= kMaxShardRanks) {
    return absl::InvalidArgumentError(
        absl::StrCat("shard_rank is ", config.shard_rank(), ", must be 0 to ", kMaxShardRanks - 1));
  }
  options->shard_group = config.shard_group();
  options->shard_rank = config.shard_rank();
  return absl::OkStatus();
}

}  // namespace

std::map<std::string, std::string> WorkerFlagHelp() {
  return {
      {"worker_id", "Stable name of this worker's place"},
      {"listen", "gRPC address, host:port or unix:/path (repeatable; default 127.0.0.1:0)"},
      {"advertise", "Address that routers hand to clients (default: the first of --listen)"},
      {"local_socket", "Unix socket of the local data plane (default: none)"},
      {"local_staging_bytes", "Staging memory a local client (default 64MiB)"},
      {"store", "Address of the pagetide-store that all workers share"},
      {"store_dir", "Folder of an embedded store instead"},
      {"router", "Address of a router to attach to (repeatable)"},
      {"link_gpus", "Send pages to other workers' GPUs over NCCL (default false)"},
      {"device",
       "Where frames lie: cpu (default), cuda, cuda:N, or auto: a GPU if one can be used"},
      {"export_device_frames",
       "Let trusted clients of --local-socket map frames that lie in a GPU; they could write "
       "(default false)"},
      {"pool_bytes", "Bytes of frames for all models (default 1GiB)"},
      {"model_pool_bytes", "Bytes of frames for each model (default: the first takes all)"},
      {"write_through", "Put pages into the store as soon as they are full (default true)"},
      {"spill_high_watermark", "Share of frames in use at which spilling starts (default 0.9)"},
      {"spill_low_watermark", "Share of frames in use at which spilling stops (default 0.75)"},
      {"metrics_listen", "HTTP address of /metrics and /healthz (default 127.0.0.1:0)"},
      {"deployment_secret_file", "File with the secret that tenant salts are derived from"},
      {"insecure", "Serve without TLS on addresses that are not loopback"},
      {"io_threads", "Threads that spill and restore (default 4)"},
      {"checkpoint_host_bytes", "Memory for copies of checkpoints, a model (default 256MiB)"},
      {"checkpoint_every_pages", "Pages between automatic checkpoints (default 0: none)"},
      {"import_dir", "Folder where files that are imported are gathered (default /var/tmp)"},
      {"import_max_bytes", "Largest file that is imported (default 64GiB)"},
      {"import_idle_seconds", "An import that sends nothing for so long ends (default 30)"},
      {"drain_seconds", "How long a stop waits for running calls (default 30)"},
      {"store_lease_ms",
       "Milliseconds that this worker's lease in the store lives: so much later a dead worker's "
       "parked sequences can be taken over (200 to 600000, default 5000)"},
      {"sequence_idle_ms",
       "Milliseconds without a call on it after which a sequence is closed, at least 1000; 0: "
       "never "
       "(default 3600000)"},
      {"shard_group",
       "Engine whose ranks this worker and others serve together, a name (default: none)"},
      {"shard_rank", "Rank of the shard group that is this worker's (0 to 63, default 0)"},
      {"log_level", "debug, info (default), warning or error"},
      {"reserve_memory", "Take the pool's memory when a model is loaded (default false)"},
      {"unsafe_skip_verify", "Tests only: do not compare checksums on restore"}};
}

config::WorkerConfig MergeWorkerConfig(const config::WorkerConfig& file,
                                       const config::WorkerConfig& flags) {
  config::WorkerConfig merged = file;
  if (flags.listen_size() > 0) merged.clear_listen();
  if (flags.router_size() > 0) merged.clear_router();
  // One of the two stores: a flag for one overrides the file's other.
  if (flags.has_store() || flags.has_store_dir()) {
    merged.clear_store();
    merged.clear_store_dir();
  }
  merged.MergeFrom(flags);
  return merged;
}

absl::StatusOr<WorkerRole::Options> WorkerOptionsFromConfig(const config::WorkerConfig& config) {
  WorkerRole::Options options;
  Worker::Options& worker = options.worker;
  if (config.has_worker_id()) worker.id = config.worker_id();
  if (config.has_pool_bytes()) {
    PT_RETURN_IF_ERROR(SetByteSize("pool_bytes", config.pool_bytes(), &worker.pool_bytes));
  }
  if (config.has_model_pool_bytes()) {
    PT_RETURN_IF_ERROR(
        SetByteSize("model_pool_bytes", config.model_pool_bytes(), &worker.model_pool_bytes));
  }
  if (config.has_write_through()) worker.host.write_through = config.write_through();
  if (config.has_spill_high_watermark()) {
    worker.host.spill_high_watermark = config.spill_high_watermark();
  }
  if (config.has_spill_low_watermark()) {
    worker.host.spill_low_watermark = config.spill_low_watermark();
  }
  if (config.has_checkpoint_host_bytes()) {
    PT_RETURN_IF_ERROR(SetByteSize("checkpoint_host_bytes", config.checkpoint_host_bytes(),
                                   &worker.host.checkpoint_host_bytes));
  }
  if (config.has_checkpoint_every_pages()) {
    worker.host.checkpoint_every_pages = config.checkpoint_every_pages();
  }
  worker.host.unsafe_skip_verify = config.unsafe_skip_verify();
  options.device = config.device();
  options.link_gpus = config.link_gpus();
  options.cpu_device.reserve_memory = config.reserve_memory();
  options.cuda_device.export_frames = config.export_device_frames();

  if (config.listen_size() > 0) {
    options.server.addresses.assign(config.listen().begin(), config.listen().end());
  }
  PT_ASSIGN_OR_RETURN(
      worker.deployment_secret,
      LoadDeploymentSecret(config.deployment_secret_file(), options.server.addresses));
  options.server.allow_insecure = config.insecure();
  if (config.has_metrics_listen()) options.server.metrics_address = config.metrics_listen();
  options.advertise = config.advertise();
  options.local_plane.socket_path = config.local_socket();
  if (config.has_local_staging_bytes()) {
    PT_RETURN_IF_ERROR(SetByteSize("local_staging_bytes", config.local_staging_bytes(),
                                   &options.local_plane.max_staging_bytes));
  }
  options.routers.assign(config.router().begin(), config.router().end());
  if (config.has_io_threads()) options.io_threads = static_cast<int>(config.io_threads());
  if (config.has_store_lease_ms()) {
    if (config.store_lease_ms() < 200 || config.store_lease_ms() > 600000) {
      return absl::InvalidArgumentError(
          absl::StrCat("store_lease_ms is ", config.store_lease_ms(), ", must be 200 to 600000"));
    }
    options.store_lease_ttl = absl::Milliseconds(config.store_lease_ms());
  }
  if (config.has_sequence_idle_ms()) {
    if (config.sequence_idle_ms() > 0 && config.sequence_idle_ms() < 1000) {
      return absl::InvalidArgumentError(absl::StrCat("sequence_idle_ms is ",
                                                     config.sequence_idle_ms(),
                                                     ", must be 0 (never) or at least 1000"));
    }
    worker.host.sequence_idle = absl::Milliseconds(config.sequence_idle_ms());
  }
  if (config.has_import_dir()) options.file_limits.folder = config.import_dir();
  if (config.has_import_max_bytes()) {
    PT_RETURN_IF_ERROR(
        SetByteSize("import_max_bytes", config.import_max_bytes(), &options.file_limits.max_bytes));
  }
  if (config.has_import_idle_seconds()) {
    if (config.import_idle_seconds() < 1 || config.import_idle_seconds() > 3600) {
      return absl::InvalidArgumentError(absl::StrCat(
          "import_idle_seconds is ", config.import_idle_seconds(), ", must be 1 to 3600"));
    }
    options.file_limits.max_idle = absl::Seconds(config.import_idle_seconds());
  }
  PT_RETURN_IF_ERROR(SetShardGroup(config, &options));
  PT_RETURN_IF_ERROR(worker.Validate());
  return options;
}

absl::StatusOr<WorkerStore> OpenWorkerStore(const config::WorkerConfig& config) {
  if (!config.store().empty() && !config.store_dir().empty()) {
    return absl::InvalidArgumentError("store and store_dir are both set; a worker has one store");
  }
  WorkerStore store;
  if (!config.store_dir().empty()) {
    RocksdbPageStoreOptions options;
    options.dir = config.store_dir();
    PT_ASSIGN_OR_RETURN(store.engine, RocksdbPageStore::Open(options));
  } else if (!config.store().empty()) {
    // Pages in bulk must not stand in front of anyone else's calls.
    ChannelOptions channel;
    channel.own_connection = true;
    store.engine = std::make_unique<RemotePageStore>(MakeChannel(config.store(), channel));
    store.retrying = std::make_unique<RetryingPageStore>(store.engine.get(), RetryPolicy());
  }
  return store;
}

}  // namespace pagetide
