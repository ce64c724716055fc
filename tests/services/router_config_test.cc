#include "services/router_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <string>

#include "services/text_config.h"
#include "tests/support/process.h"

namespace pagetide {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(RouterConfigTest, TheExampleLoads) {
  config::RouterConfig config;
  const absl::Status read =
      ReadTextConfig(PAGETIDE_SOURCE_DIR "/deploy/config/router.textproto", &config);
  ASSERT_TRUE(read.ok()) << read;
  const auto options = RouterOptionsFromConfig(config);
  ASSERT_TRUE(options.ok()) << options.status();
  EXPECT_EQ(options->router.router_id, "router-1");
  EXPECT_THAT(options->server.addresses, ElementsAre("127.0.0.1:7070"));
  EXPECT_EQ(options->server.metrics_address, "127.0.0.1:9170");
  EXPECT_EQ(options->store_address, "127.0.0.1:7090");
  EXPECT_EQ(options->heartbeat, absl::Milliseconds(500));
  // The example states the defaults of the policy, so that a reader sees what can be changed.
  const PlacementPolicyOptions policy;
  EXPECT_EQ(options->router.policy, std::string(PlacementPolicyNames().front()));
  EXPECT_EQ(options->router.policy_options.prefill_weight, policy.prefill_weight);
  EXPECT_EQ(options->router.policy_options.balance_gain, policy.balance_gain);
  EXPECT_EQ(options->router.policy_options.balance_cap, policy.balance_cap);
}

TEST(RouterConfigTest, AnUnknownKeyIsNamedWithItsPlace) {
  testing::TempDir dir;
  std::ofstream(dir / "c") << "# comment\nrouter_id: \"a\"\n  heartbeats: 3\n";
  config::RouterConfig config;
  const absl::Status read = ReadTextConfig(dir / "c", &config);
  EXPECT_EQ(read.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(read.message()), HasSubstr("/c:3:"));
  EXPECT_THAT(std::string(read.message()), HasSubstr("heartbeats"));
}

TEST(RouterConfigTest, FlagsWinOverTheFile) {
  config::RouterConfig file, flags;
  file.add_listen("a:1");
  file.add_listen("b:1");
  file.set_policy("least_loaded");
  file.set_store("s:1");
  flags.add_listen("c:1");
  flags.set_policy("two_choices");
  const config::RouterConfig merged = MergeRouterConfig(file, flags);
  EXPECT_THAT(merged.listen(), ElementsAre("c:1"));
  EXPECT_EQ(merged.policy(), "two_choices");
  EXPECT_EQ(merged.store(), "s:1");
}

TEST(RouterConfigTest, BadValuesAreNamedWithTheirNumbers) {
  const auto error = [](void (*spoil)(config::RouterConfig&)) {
    config::RouterConfig config;
    spoil(config);
    const absl::Status status = RouterOptionsFromConfig(config).status();
    EXPECT_FALSE(status.ok());
    return std::string(status.message());
  };
  EXPECT_THAT(error([](config::RouterConfig& c) { c.set_heartbeat_milliseconds(5); }),
              HasSubstr("heartbeat = 5ms is not 20ms to 10s"));
  EXPECT_THAT(error([](config::RouterConfig& c) { c.set_io_threads(0); }),
              HasSubstr("io_threads = 0"));
  EXPECT_THAT(error([](config::RouterConfig& c) { c.set_prefill_weight(-1); }),
              HasSubstr("prefill_weight = -1"));
  EXPECT_THAT(error([](config::RouterConfig& c) { c.set_default_prefill_tokens_per_second(0); }),
              HasSubstr("default_prefill_tokens_per_second = 0"));
  EXPECT_THAT(error([](config::RouterConfig& c) { c.set_router_id("Not A Name"); }),
              HasSubstr("router_id"));
  EXPECT_THAT(error([](config::RouterConfig& c) { c.add_listen("0.0.0.0:0"); }),
              HasSubstr("listen 0.0.0.0:0 is not loopback: it needs --deployment-secret-file"));
  EXPECT_THAT(error([](config::RouterConfig& c) { c.set_deployment_secret_file("/none"); }),
              HasSubstr("/none"));
}

}  // namespace
}  // namespace pagetide
