#include "worker/choose_device.h"

#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pagetide {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;

TEST(ChooseDeviceTest, TheCpuDeviceIsTheDefault) {
  for (const char* wanted : {"", "cpu"}) {
    const auto chosen = ChooseDevice(wanted, {});
    ASSERT_TRUE(chosen.ok()) << chosen.status();
    EXPECT_EQ(chosen->device->name(), "cpu");
    EXPECT_EQ(chosen->why_not_gpu, "");
  }
}

TEST(ChooseDeviceTest, OtherWordsAreNamed) {
  for (const char* wanted : {"gpu", "CUDA", "cuda:", "cuda:x", "cuda:-1", "cuda: 0", "cuda:0x1",
                             "cuda:00000", "cuda0", "auto:0", "cpu:0"}) {
    const absl::Status status = ChooseDevice(wanted, {}).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << wanted;
    EXPECT_THAT(std::string(status.message()), AllOf(HasSubstr(wanted), HasSubstr("cuda:N")));
  }
}

// No machine has so many: refused with and without CUDA, with and without GPUs.
TEST(ChooseDeviceTest, AGpuThatIsNotThereIsRefusedAndTheCpuOffered) {
  const absl::Status status = ChooseDevice("cuda:9999", {}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()),
              AllOf(StartsWith("device cuda:9999: use cuda:9999: "), HasSubstr("device cpu")));
}

TEST(ChooseDeviceTest, AutoGivesAGpuOrSaysWhyNot) {
  const auto chosen = ChooseDevice("auto", {});
  ASSERT_TRUE(chosen.ok()) << chosen.status();
  if (chosen->device->name() == "cpu") {
    EXPECT_THAT(chosen->why_not_gpu, StartsWith("use cuda:0: "));
  } else {
    EXPECT_EQ(chosen->device->name(), "cuda:0");
    EXPECT_EQ(chosen->why_not_gpu, "");
  }
  EXPECT_TRUE(chosen->device->CreatePool(4096).ok());
}

}  // namespace
}  // namespace pagetide
