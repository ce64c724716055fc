#include "services/router_config.h"

#include <cmath>
#include <string>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "rpc/accept_loop.h"
#include "services/tenant.h"

namespace pagetide {
namespace {

constexpr char kDefaultListen[] = "127.0.0.1:7070";

absl::Status CheckSecretIsPrivate(const config::RouterConfig& config,
                                  const RouterRole::Options& options) {
  if (!config.deployment_secret_file().empty()) return absl::OkStatus();
  for (const std::string& text : options.server.addresses) {
    const auto address = ListenAddress::Parse(text);
    if (address.ok() && !address->is_loopback) {
      return absl::FailedPreconditionError(
          absl::StrCat("listen ", text, " is not loopback: it needs --deployment-secret-file"));
    }
  }
  return absl::OkStatus();
}

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
  options.server.addresses = {kDefaultListen};
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
  PT_RETURN_IF_ERROR(CheckSecretIsPrivate(config, options));
  PT_ASSIGN_OR_RETURN(options.deployment_secret,
                      LoadDeploymentSecret(config.deployment_secret_file()));
  PT_RETURN_IF_ERROR(options.Validate());
  return options;
}

}  // namespace pagetide
