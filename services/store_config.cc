#include "services/store_config.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "base/byte_size.h"
#include "base/status_macros.h"
#include "rpc/default_ports.h"

namespace pagetide {
namespace {

constexpr uint32_t kMaxThreads = 1024;
constexpr uint32_t kMaxDrainSeconds = 3600;

absl::Status SetByteSize(const char* field, bool is_set, const std::string& text, uint64_t* value) {
  if (!is_set) return absl::OkStatus();
  const absl::StatusOr<uint64_t> bytes = ParseByteSize(text);
  if (!bytes.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(field, ": ", bytes.status().message()));
  }
  *value = *bytes;
  return absl::OkStatus();
}

}  // namespace

std::map<std::string, std::string> StoreFlagHelp() {
  return {
      {"listen", absl::StrCat("gRPC address, host:port or unix:/path (repeatable; default ",
                              LoopbackAddress(kDefaultStorePort), ")")},
      {"metrics_listen", "HTTP address of /metrics and /healthz (default 127.0.0.1:0)"},
      {"insecure", "Serve without TLS on addresses that are not loopback"},
      {"data_dir", "Folder of the store; made if absent"},
      {"capacity",
       "Bytes on disk, such as 200GiB; beyond it what no manifest holds is evicted, by recency "
       "and cost (default 0: bounded by the disk)"},
      {"segment_size",
       "Length of a segment file (default 0: a sixteenth of the capacity, 1MiB to 64MiB)"},
      {"min_free", "Refuse puts while the disk has less than this (default 128MiB)"},
      {"scrub_rate",
       "Bytes a second that the background verifies, each page at most once a day; 0: none "
       "(default 4MiB)"},
      {"efficacy_alarm",
       "Raise the efficacy alarm when this much was put since a page was last read; 0: never "
       "(default 16GiB)"},
      {"compression",
       "How page bodies are stored: none, lz4 or zstd; lossless, a page stays raw where it does "
       "not "
       "pay (default none)"},
      {"accept_loss",
       "Give up, for this start, what was durable and is gone, instead of refusing: log, "
       "segments or manifests (repeatable)"},
      {"threads", "Threads that wait for the disk (default 32)"},
      {"drain_seconds", "How long a stop waits for running calls (default 30)"},
      {"log_level", "debug, info (default), warning or error"}};
}

config::StoreConfig MergeStoreConfig(const config::StoreConfig& file,
                                     const config::StoreConfig& flags) {
  config::StoreConfig merged = file;
  if (flags.listen_size() > 0) merged.clear_listen();
  if (flags.accept_loss_size() > 0) merged.clear_accept_loss();
  merged.MergeFrom(flags);
  return merged;
}

absl::StatusOr<StoreOptions> StoreOptionsFromConfig(const config::StoreConfig& config) {
  StoreOptions options;
  options.role.server.addresses = {LoopbackAddress(kDefaultStorePort)};
  if (config.listen_size() > 0) {
    options.role.server.addresses.assign(config.listen().begin(), config.listen().end());
  }
  if (config.has_metrics_listen()) options.role.server.metrics_address = config.metrics_listen();
  options.role.server.allow_insecure = config.insecure();

  RocksdbPageStoreOptions& engine = options.role.engine;
  if (config.data_dir().empty()) {
    return absl::InvalidArgumentError("data_dir is empty, must name the store's folder");
  }
  engine.dir = config.data_dir();
  PT_RETURN_IF_ERROR(
      SetByteSize("capacity", config.has_capacity(), config.capacity(), &engine.capacity_bytes));
  PT_RETURN_IF_ERROR(SetByteSize("segment_size", config.has_segment_size(), config.segment_size(),
                                 &engine.segment_bytes));
  PT_RETURN_IF_ERROR(
      SetByteSize("min_free", config.has_min_free(), config.min_free(), &engine.min_free_bytes));
  PT_RETURN_IF_ERROR(SetByteSize("scrub_rate", config.has_scrub_rate(), config.scrub_rate(),
                                 &engine.scrub_bytes_per_second));
  PT_RETURN_IF_ERROR(SetByteSize("efficacy_alarm", config.has_efficacy_alarm(),
                                 config.efficacy_alarm(), &engine.efficacy_alarm_bytes));
  if (config.has_compression()) {
    const std::optional<PageCompression> compression = ParsePageCompression(config.compression());
    if (!compression.has_value()) {
      return absl::InvalidArgumentError(
          absl::StrCat("compression = \"", config.compression(), "\" is not none, lz4 or zstd"));
    }
    engine.compression = *compression;
  }
  for (const std::string& kind : config.accept_loss()) {
    if (kind == "log") {
      engine.accepted_loss.log = true;
    } else if (kind == "segments") {
      engine.accepted_loss.segments = true;
    } else if (kind == "manifests") {
      engine.accepted_loss.manifests = true;
    } else {
      return absl::InvalidArgumentError(
          absl::StrCat("accept_loss = \"", kind, "\" is not log, segments or manifests"));
    }
  }
  PT_RETURN_IF_ERROR(engine.Validate());

  if (config.has_threads()) {
    if (config.threads() < 1 || config.threads() > kMaxThreads) {
      return absl::InvalidArgumentError(
          absl::StrCat("threads = ", config.threads(), " is not 1 to ", kMaxThreads));
    }
    options.role.service.num_threads = static_cast<int>(config.threads());
  }
  if (config.has_drain_seconds()) {
    if (config.drain_seconds() > kMaxDrainSeconds) {
      return absl::InvalidArgumentError(
          absl::StrCat("drain_seconds = ", config.drain_seconds(), " is above ", kMaxDrainSeconds));
    }
    options.drain_timeout = absl::Seconds(config.drain_seconds());
  }
  return options;
}

}  // namespace pagetide
