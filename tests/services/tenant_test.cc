#include "services/tenant.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <string>
#include <vector>

#include "tests/support/process.h"

namespace pagetide {
namespace {

using ::testing::HasSubstr;

absl::StatusOr<std::string> Load(const std::string& path, const std::vector<std::string>& listen) {
  return LoadDeploymentSecret(path, listen);
}

TEST(TenantTest, TheDevelopmentSecretServesLoopbackOnly) {
  for (const char* address : {"127.0.0.1:0", "127.8.9.10:7080", "[::1]:7080", "unix:/run/w.sock"}) {
    const auto secret = Load("", {address});
    ASSERT_TRUE(secret.ok()) << address << ": " << secret.status();
    EXPECT_EQ(*secret, kDevelopmentSecret);
  }
  for (const char* address : {"0.0.0.0:0", "10.0.0.1:7080", "[::]:7080"}) {
    const absl::Status refused = Load("", {"127.0.0.1:0", address}).status();
    EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition) << address;
    EXPECT_THAT(std::string(refused.message()), HasSubstr(address));
  }
  EXPECT_EQ(Load("", {"worker.example:7080"}).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(TenantTest, ASecretFileServesEveryAddress) {
  testing::TempDir dir;
  std::ofstream(dir / "secret") << "sixteen bytes ok\n";
  EXPECT_EQ(Load(dir / "secret", {"0.0.0.0:0"}).value(), "sixteen bytes ok");
  std::ofstream(dir / "short") << "fifteen bytes..\n";
  const absl::Status refused = Load(dir / "short", {"127.0.0.1:0"}).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("has 15 bytes, expected 16 to 4096"));
}

}  // namespace
}  // namespace pagetide
