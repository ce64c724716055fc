#include "services/router_config.h"

#include <cmath>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "rpc/default_ports.h"
#include "services/tenant.h"

namespace pagetide {
namespace {

absl::Status SetNumber(const char* field, bool is_set, double value, double min, double* out) {
  if (!is_set) return absl::OkStatus();
  if (!std::isfinite(value) || value < min) {
    return absl::InvalidArgumentError(
        absl::StrCat(field, " = ", value, " is not finite and at least ", min));
  }
  *out = value;
  return absl::OkStatus();
}

}  // namespace

std::map<std::string, std::string> RouterFlagHelp() {
  return {
      {"router_id", "Name of this router (default router-0)"},
      {"listen", absl::StrCat("gRPC address, host:port or unix:/path (repeatable; default ",
                              LoopbackAddress(kDefaultRouterPort), ")")},
      {"metrics_listen", "HTTP address of /metrics and /healthz (default 127.0.0.1:0)"},
      {"store", "Address of the page store, for models and stored pages (default: none)"},
      {"deployment_secret_file",
       "File with the secret that tenants' salts are derived from, the same at all routers and "
       "workers (default: a development secret, on loopback only)"},
      {"insecure", "Serve without TLS on addresses that are not loopback"},
      {"policy", absl::StrCat("Placement policy: ", absl::StrJoin(PlacementPolicyNames(), ", "))},
      {"prefill_weight", "Weight of a prompt's own prefill time (default 5)"},
      {"balance_gain", "Weight of a worker's recent load (default 5; 0: off)"},
      {"balance_cap", "Most that recent load may cost, in prefill times (default 0.25)"},
      {"default_prefill_tokens_per_second", "Speed of a worker that has measured none"},
      {"default_store_bytes_per_second", "Speed of restores that nobody has measured"},
      {"heartbeat_milliseconds",
       "Milliseconds between reports of a worker; silent for six, it is dead (default 500)"},
      {"io_threads", "Threads for calls that need the store (default 4)"},
      {"drain_seconds", "How long a stop waits for running calls (default 30)"},
      {"log_level", "debug, info (default), warning or error"}};
}

config::RouterConfig MergeRouterConfig(const config::RouterConfig& file,
                                       const config::RouterConfig& flags) {
  config::RouterConfig merged = file;
  if (flags.listen_size() > 0) merged.clear_listen();
  merged.MergeFrom(flags);
  return merged;
}

absl::StatusOr<RouterRole::Options> RouterOptionsFromConfig(const config::RouterConfig& config) {
  RouterRole::Options options;
  if (config.has_router_id()) options.router.router_id = config.router_id();
  options.server.addresses = {LoopbackAddress(kDefaultRouterPort)};
  if (config.listen_size() > 0) {
    options.server.addresses.assign(config.listen().begin(), config.listen().end());
  }
  if (config.has_metrics_listen()) options.server.metrics_address = config.metrics_listen();
  options.server.allow_insecure = config.insecure();
  options.store_address = config.store();
  if (config.has_policy()) options.router.policy = config.policy();
  PlacementPolicyOptions& policy = options.router.policy_options;
  PT_RETURN_IF_ERROR(SetNumber("prefill_weight", config.has_prefill_weight(),
                               config.prefill_weight(), 0, &policy.prefill_weight));
  PT_RETURN_IF_ERROR(SetNumber("balance_gain", config.has_balance_gain(), config.balance_gain(), 0,
                               &policy.balance_gain));
  PT_RETURN_IF_ERROR(SetNumber("balance_cap", config.has_balance_cap(), config.balance_cap(), 0,
                               &policy.balance_cap));
  PT_RETURN_IF_ERROR(SetNumber("default_prefill_tokens_per_second",
                               config.has_default_prefill_tokens_per_second(),
                               config.default_prefill_tokens_per_second(), 1,
                               &options.router.default_prefill_tokens_per_second));
  PT_RETURN_IF_ERROR(SetNumber(
      "default_store_bytes_per_second", config.has_default_store_bytes_per_second(),
      config.default_store_bytes_per_second(), 1, &options.router.default_store_bytes_per_second));
  if (config.has_heartbeat_milliseconds()) {
    options.heartbeat = absl::Milliseconds(config.heartbeat_milliseconds());
  }
  if (config.has_io_threads()) options.io_threads = static_cast<int>(config.io_threads());
  PT_ASSIGN_OR_RETURN(
      options.deployment_secret,
      LoadDeploymentSecret(config.deployment_secret_file(), options.server.addresses));
  PT_RETURN_IF_ERROR(options.Validate());
  return options;
}

}  // namespace pagetide
