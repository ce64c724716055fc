// Who calls, and the secret that keeps tenants' keys apart.
//
// Thread-safe.
#ifndef PAGETIDE_SERVICES_TENANT_H_
#define PAGETIDE_SERVICES_TENANT_H_

#include <grpcpp/server_context.h>

#include <span>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "core/keys.h"

namespace pagetide {

// The tenant of a call, from its authenticated identity only. Until callers are authenticated there
// is one.
std::string TenantOf(const grpc::ServerContextBase& context);

// Fixed secret for development on one machine: anyone can compute keys with it.
inline constexpr absl::string_view kDevelopmentSecret =
    "pagetide development secret, loopback only";

// The secret in `path`, without a newline at its end; INVALID_ARGUMENT unless it has 16 to 4096
// bytes. The development secret if `path` is empty: FAILED_PRECONDITION then if one of the
// addresses that the program listens on is not loopback, because keys made with a secret that
// everyone knows say nothing to a stranger only as long as no stranger can ask. INVALID_ARGUMENT
// for what is no address.
absl::StatusOr<std::string> LoadDeploymentSecret(const std::string& path,
                                                 std::span<const std::string> listen);

// Derives the salt of each tenant from the deployment secret. Routers and workers of one deployment
// hold the same secret; clients and the store never do.
class TenantSalts {
 public:
  explicit TenantSalts(std::string deployment_secret)
      : deployment_secret_(std::move(deployment_secret)),
        default_salt_(DeriveTenantSalt(deployment_secret_, "default")) {}
  TenantSalt SaltOf(absl::string_view tenant) const {
    return tenant == "default" ? default_salt_ : DeriveTenantSalt(deployment_secret_, tenant);
  }

 private:
  const std::string deployment_secret_;
  const TenantSalt default_salt_;
};

}  // namespace pagetide

#endif  // PAGETIDE_SERVICES_TENANT_H_
