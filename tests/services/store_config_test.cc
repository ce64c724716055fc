#include "services/store_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <functional>
#include <string>

#include "base/byte_size.h"
#include "services/text_config.h"
#include "tests/support/process.h"

namespace pagetide {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(StoreConfigTest, TheExampleLoads) {
  config::StoreConfig config;
  const absl::Status read =
      ReadTextConfig(PAGETIDE_SOURCE_DIR "/deploy/config/store.textproto", &config);
  ASSERT_TRUE(read.ok()) << read;
  const auto options = StoreOptionsFromConfig(config);
  ASSERT_TRUE(options.ok()) << options.status();
  EXPECT_THAT(options->role.server.addresses, ElementsAre("127.0.0.1:7090"));
  EXPECT_EQ(options->role.server.metrics_address, "127.0.0.1:9190");
  EXPECT_EQ(options->role.engine.dir, "/var/lib/pagetide/store");
  EXPECT_EQ(options->role.engine.capacity_bytes, 200 * kGiB);
  EXPECT_EQ(options->role.engine.min_free_bytes, kGiB);
  EXPECT_EQ(options->role.service.num_threads, 32);
}

TEST(StoreConfigTest, WhatIsNotSetIsTheDefault) {
  config::StoreConfig config;
  config.set_data_dir("d");
  const auto options = StoreOptionsFromConfig(config);
  ASSERT_TRUE(options.ok()) << options.status();
  EXPECT_THAT(options->role.server.addresses, ElementsAre("127.0.0.1:7090"));
  const RocksdbPageStoreOptions engine;
  EXPECT_EQ(options->role.engine.capacity_bytes, engine.capacity_bytes);
  EXPECT_EQ(options->role.engine.min_free_bytes, engine.min_free_bytes);
  EXPECT_EQ(options->role.engine.scrub_bytes_per_second, engine.scrub_bytes_per_second);
  EXPECT_EQ(options->role.engine.efficacy_alarm_bytes, engine.efficacy_alarm_bytes);
  EXPECT_EQ(options->drain_timeout, absl::Seconds(30));
}

TEST(StoreConfigTest, FlagsWinOverTheFile) {
  config::StoreConfig file, flags;
  file.add_listen("a:1");
  file.add_listen("b:1");
  file.set_data_dir("d");
  file.set_capacity("1GiB");
  flags.add_listen("c:1");
  flags.set_capacity("2GiB");
  flags.add_accept_loss("log");
  const config::StoreConfig merged = MergeStoreConfig(file, flags);
  EXPECT_THAT(merged.listen(), ElementsAre("c:1"));
  EXPECT_EQ(merged.capacity(), "2GiB");
  EXPECT_EQ(merged.data_dir(), "d");
  const auto options = StoreOptionsFromConfig(merged);
  ASSERT_TRUE(options.ok()) << options.status();
  EXPECT_TRUE(options->role.engine.accepted_loss.log);
}

TEST(StoreConfigTest, BadValuesAreNamed) {
  struct Case {
    std::function<void(config::StoreConfig*)> spoil;
    const char* message;
  };
  const Case cases[] = {
      {[](auto* c) { c->clear_data_dir(); }, "data_dir is empty"},
      {[](auto* c) { c->set_capacity("12parsecs"); }, "capacity: "},
      {[](auto* c) { c->set_segment_size("-1"); }, "segment_size: "},
      {[](auto* c) { c->add_accept_loss("everything"); }, "accept_loss = \"everything\" is not"},
      {[](auto* c) { c->set_threads(0); }, "threads = 0 is not 1 to 1024"},
      {[](auto* c) { c->set_threads(1025); }, "threads = 1025 is not 1 to 1024"},
      {[](auto* c) { c->set_drain_seconds(3601); }, "drain_seconds = 3601 is above 3600"},
  };
  for (const Case& c : cases) {
    config::StoreConfig config;
    config.set_data_dir("d");
    c.spoil(&config);
    const absl::Status status = StoreOptionsFromConfig(config).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << c.message;
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.message));
  }
}

}  // namespace
}  // namespace pagetide
