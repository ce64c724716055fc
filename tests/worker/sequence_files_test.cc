// Files that are larger than the pool they go into.
#include <gtest/gtest.h>

#include <string>

#include "tests/worker/model_host_fixture.h"
#include "worker/sequence_formats.h"

namespace pagetide {
namespace {

TEST(SequenceFilesTest, AFileLargerThanThePoolGoesInAndOutInSteps) {
  const std::vector<uint32_t> tokens = Tokens(0, 40 * 16);
  std::string file;
  {
    HostUnderTest t({.num_groups = 2, .num_frames = 64});
    const auto info = t.OpenAndFill(tokens);
    ASSERT_TRUE(info.ok()) << info.status();
    auto writer =
        SequenceExport::Begin(t.host, t.tenant, info->id, StateFormat::kNative, {}, t.Soon());
    ASSERT_TRUE(writer.ok()) << writer.status();
    const absl::Status written = (*writer)->Write([&](absl::string_view part) {
      file.append(part.data(), part.size());
      return absl::OkStatus();
    });
    ASSERT_TRUE(written.ok()) << written;
  }
  for (uint32_t num_frames : {1, 2, 5, 16}) {
    HostUnderTest t({.num_groups = 2, .num_frames = num_frames});
    const auto imported = ImportSequenceFile(t.host, t.tenant, file, {}, t.Soon());
    ASSERT_TRUE(imported.ok()) << num_frames << " frames: " << imported.status();
    ASSERT_EQ(imported->info.length, tokens.size());
    // And goes out again, with as few pages in frames at a time.
    auto writer = SequenceExport::Begin(t.host, t.tenant, imported->info.id, StateFormat::kNative,
                                        {}, t.Soon());
    ASSERT_TRUE(writer.ok()) << writer.status();
    std::string again;
    const absl::Status written = (*writer)->Write([&](absl::string_view part) {
      again.append(part.data(), part.size());
      return absl::OkStatus();
    });
    ASSERT_TRUE(written.ok()) << num_frames << " frames: " << written;
    EXPECT_EQ(again, file) << num_frames << " frames";
  }
}

}  // namespace
}  // namespace pagetide
