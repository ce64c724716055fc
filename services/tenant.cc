#include "services/tenant.h"

#include <cerrno>
#include <cstring>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "rpc/accept_loop.h"

namespace pagetide {
namespace {

constexpr size_t kMinSecretBytes = 16;
constexpr size_t kMaxSecretBytes = 4096;

}  // namespace

std::string TenantOf(const grpc::ServerContextBase&) {
  return "default";
}

absl::StatusOr<std::string> LoadDeploymentSecret(const std::string& path,
                                                 std::span<const std::string> listen) {
  if (path.empty()) {
    for (const std::string& text : listen) {
      PT_ASSIGN_OR_RETURN(const ListenAddress address, ListenAddress::Parse(text));
      if (address.is_loopback) continue;
      return absl::FailedPreconditionError(
          absl::StrCat("listen ", text, " is not loopback: it needs --deployment-secret-file"));
    }
    return std::string(kDevelopmentSecret);
  }
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    return absl::InvalidArgumentError(
        absl::StrCat("read deployment secret ", path, ": ", std::strerror(errno)));
  }
  std::string secret(kMaxSecretBytes + 2, '\0');
  file.read(secret.data(), static_cast<std::streamsize>(secret.size()));
  secret.resize(static_cast<size_t>(file.gcount()));
  if (!secret.empty() && secret.back() == '\n') secret.pop_back();
  if (secret.size() < kMinSecretBytes || secret.size() > kMaxSecretBytes) {
    return absl::InvalidArgumentError(absl::StrCat("deployment secret in ", path, " has ",
                                                   secret.size(), " bytes, expected ",
                                                   kMinSecretBytes, " to ", kMaxSecretBytes));
  }
  return secret;
}

}  // namespace pagetide
