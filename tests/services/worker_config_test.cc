#include "services/worker_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <CLI/CLI.hpp>
#include <fstream>
#include <string>

#include "absl/strings/str_cat.h"
#include "services/config_flags.h"
#include "services/text_config.h"
#include "tests/support/process.h"

namespace pagetide {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(WorkerConfigTest, TheExampleLoads) {
  config::WorkerConfig config;
  const absl::Status read =
      ReadTextConfig(PAGETIDE_SOURCE_DIR "/deploy/config/worker.textproto", &config);
  ASSERT_TRUE(read.ok()) << read;
  const auto options = WorkerOptionsFromConfig(config);
  ASSERT_TRUE(options.ok()) << options.status();
  EXPECT_EQ(options->worker.id, "worker-1");
  EXPECT_EQ(options->worker.pool_bytes, 4 * kGiB);
  EXPECT_EQ(options->worker.model_pool_bytes, 2 * kGiB);
  EXPECT_THAT(options->server.addresses, ElementsAre("127.0.0.1:7080"));
  EXPECT_THAT(options->routers, ElementsAre("127.0.0.1:7070"));
  EXPECT_EQ(options->local_plane.max_staging_bytes, 64 * kMiB);
}

TEST(WorkerConfigTest, AnUnknownKeyIsNamedWithItsPlace) {
  testing::TempDir dir;
  std::ofstream(dir / "c") << "# comment\nworker_id: \"a\"\n  frames: 3\n";
  config::WorkerConfig config;
  const absl::Status read = ReadTextConfig(dir / "c", &config);
  EXPECT_EQ(read.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(read.message()), HasSubstr("/c:3:"));
  EXPECT_THAT(std::string(read.message()), HasSubstr("frames"));
}

TEST(WorkerConfigTest, FlagsWinOverTheFile) {
  config::WorkerConfig file;
  file.set_worker_id("from-file");
  file.set_pool_bytes("1GiB");
  file.add_router("a:1");
  file.add_router("b:1");
  file.set_store("s:1");
  file.set_write_through(true);
  config::WorkerConfig flags;
  flags.set_worker_id("from-flag");
  flags.add_router("c:1");
  flags.set_store_dir("/x");
  flags.set_write_through(false);
  const config::WorkerConfig merged = MergeWorkerConfig(file, flags);
  EXPECT_EQ(merged.worker_id(), "from-flag");
  EXPECT_EQ(merged.pool_bytes(), "1GiB");
  EXPECT_THAT(merged.router(), ElementsAre("c:1"));
  EXPECT_FALSE(merged.has_store());
  EXPECT_EQ(merged.store_dir(), "/x");
  EXPECT_FALSE(merged.write_through());
}

TEST(WorkerConfigTest, BeyondLoopbackItNeedsADeploymentSecret) {
  testing::TempDir dir;
  config::WorkerConfig config;
  config.set_insecure(true);
  config.add_listen("127.0.0.1:0");
  config.add_listen("0.0.0.0:7080");
  const absl::Status refused = WorkerOptionsFromConfig(config).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(refused.message(),
            "listen 0.0.0.0:7080 is not loopback: it needs --deployment-secret-file");
  std::ofstream(dir / "secret") << "0123456789abcdef\n";
  config.set_deployment_secret_file(dir / "secret");
  const auto options = WorkerOptionsFromConfig(config);
  ASSERT_TRUE(options.ok()) << options.status();
  EXPECT_EQ(options->worker.deployment_secret, "0123456789abcdef");
}

TEST(WorkerConfigTest, FlagsSetTheirFields) {
  config::WorkerConfig config;
  CLI::App app;
  AddConfigFlags(&app, &config, WorkerFlagHelp());
  app.parse(
      "--worker-id w --listen a:1 --listen b:2 --write-through=false --insecure "
      "--spill-high-watermark 0.5 --io-threads 3");
  EXPECT_EQ(config.worker_id(), "w");
  EXPECT_THAT(config.listen(), ElementsAre("a:1", "b:2"));
  EXPECT_TRUE(config.has_write_through());
  EXPECT_FALSE(config.write_through());
  EXPECT_TRUE(config.insecure());
  EXPECT_EQ(config.spill_high_watermark(), 0.5);
  EXPECT_EQ(config.io_threads(), 3);
  EXPECT_FALSE(config.has_pool_bytes());
}

TEST(WorkerConfigTest, CheckpointsHaveTheirFlags) {
  config::WorkerConfig config;
  CLI::App app;
  AddConfigFlags(&app, &config, WorkerFlagHelp());
  app.parse("--checkpoint-host-bytes 3MiB --checkpoint-every-pages 5");
  const auto options = WorkerOptionsFromConfig(config);
  ASSERT_TRUE(options.ok()) << options.status();
  EXPECT_EQ(options->worker.host.checkpoint_host_bytes, 3 * kMiB);
  EXPECT_EQ(options->worker.host.checkpoint_every_pages, 5u);
  const auto defaults = WorkerOptionsFromConfig({});
  ASSERT_TRUE(defaults.ok()) << defaults.status();
  EXPECT_EQ(defaults->worker.host.checkpoint_host_bytes, 256 * kMiB);
  EXPECT_EQ(defaults->worker.host.checkpoint_every_pages, 0u);
  config.set_checkpoint_host_bytes("much");
  const absl::Status refused = WorkerOptionsFromConfig(config).status();
  EXPECT_TRUE(absl::IsInvalidArgument(refused)) << refused;
  EXPECT_THAT(std::string(refused.message()), HasSubstr("checkpoint_host_bytes: "));
}

TEST(WorkerConfigTest, FramesOfAGpuAreExportedOnlyWhereItIsAskedFor) {
  config::WorkerConfig config;
  const auto defaults = WorkerOptionsFromConfig(config);
  ASSERT_TRUE(defaults.ok()) << defaults.status();
  EXPECT_FALSE(defaults->cuda_device.export_frames);
  EXPECT_EQ(defaults->cuda_device.driver, "libcuda.so.1");
  CLI::App app;
  AddConfigFlags(&app, &config, WorkerFlagHelp());
  app.parse("--export-device-frames");
  const auto options = WorkerOptionsFromConfig(config);
  ASSERT_TRUE(options.ok()) << options.status();
  EXPECT_TRUE(options->cuda_device.export_frames);
}

TEST(WorkerConfigTest, ASequenceIdlesForASecondOrMoreOrForEver) {
  config::WorkerConfig config;
  config.set_sequence_idle_ms(999);
  const absl::Status refused = WorkerOptionsFromConfig(config).status();
  EXPECT_TRUE(absl::IsInvalidArgument(refused)) << refused;
  EXPECT_EQ(refused.message(), "sequence_idle_ms is 999, must be 0 (never) or at least 1000");
  for (const uint32_t good : {0u, 1000u}) {
    config.set_sequence_idle_ms(good);
    const auto options = WorkerOptionsFromConfig(config);
    ASSERT_TRUE(options.ok()) << options.status();
    EXPECT_EQ(options->worker.host.sequence_idle, absl::Milliseconds(good));
  }
}

TEST(WorkerConfigTest, AShardGroupIsANameAndARankOfIt) {
  config::WorkerConfig config;
  CLI::App app;
  AddConfigFlags(&app, &config, WorkerFlagHelp());
  app.parse("--shard-group engine-7 --shard-rank 63");
  const auto options = WorkerOptionsFromConfig(config);
  ASSERT_TRUE(options.ok()) << options.status();
  EXPECT_EQ(options->shard_group, "engine-7");
  EXPECT_EQ(options->shard_rank, 63u);
  config.clear_shard_rank();
  EXPECT_EQ(WorkerOptionsFromConfig(config)->shard_rank, 0u);
  EXPECT_EQ(WorkerOptionsFromConfig({})->shard_group, "");

  const auto refusal = [&] {
    const absl::Status refused = WorkerOptionsFromConfig(config).status();
    EXPECT_TRUE(absl::IsInvalidArgument(refused)) << refused;
    return std::string(refused.message());
  };
  config.set_shard_rank(64);
  EXPECT_EQ(refusal(), "shard_rank is 64, must be 0 to 63");
  config.set_shard_rank(1);
  for (const char* bad : {"", "Engine", "a b", "-a"}) {
    config.set_shard_group(bad);
    EXPECT_THAT(refusal(), HasSubstr("shard_group")) << bad;
  }
  config.clear_shard_group();
  EXPECT_EQ(refusal(), "shard_rank is 1 without a shard_group that it is a rank of");
  config.set_shard_rank(0);
  EXPECT_EQ(refusal(), "shard_rank is 0 without a shard_group that it is a rank of");
}

TEST(WorkerConfigTest, AnImportIdlesForASecondToAnHour) {
  config::WorkerConfig config;
  for (const uint32_t bad : {0u, 3601u}) {
    config.set_import_idle_seconds(bad);
    const absl::Status refused = WorkerOptionsFromConfig(config).status();
    EXPECT_TRUE(absl::IsInvalidArgument(refused)) << refused;
    EXPECT_EQ(refused.message(),
              absl::StrCat("import_idle_seconds is ", bad, ", must be 1 to 3600"));
  }
  for (const uint32_t good : {1u, 3600u}) {
    config.set_import_idle_seconds(good);
    const auto options = WorkerOptionsFromConfig(config);
    ASSERT_TRUE(options.ok()) << options.status();
    EXPECT_EQ(options->file_limits.max_idle, absl::Seconds(good));
  }
}

}  // namespace
}  // namespace pagetide
