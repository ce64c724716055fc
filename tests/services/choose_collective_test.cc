// The choice between collectives, with NCCL's refusals as this machine gives them.
#include <dlfcn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "base/error_info.h"
#include "tests/services/collective_fixture.h"
#include "worker/choose_device.h"

namespace pagetide {
namespace {

using ::testing::AnyOf;
using ::testing::HasSubstr;

TEST(ChooseCollectiveTest, WithoutNcclTheGroupGoesOverGrpc) {
  NcclLink none({.paths = {.nccl = "libnccl-that-is-not-there.so.2"}}, Clock::Real());
  EXPECT_EQ(GetReason(none.Check()), "NO_NCCL") << none.Check();
  EXPECT_EQ(GetReason(none.MakeId().status()), "NO_NCCL");
  NcclLink no_driver({.paths = {.nccl = EMULATED_NCCL, .cuda = "libcuda-that-is-not-there.so.1"}},
                     Clock::Real());
  EXPECT_EQ(GetReason(no_driver.Check()), "NO_GPU") << no_driver.Check();
  NcclLink not_nccl({.paths = {.nccl = "libc.so.6", .cuda = EMULATED_NCCL}}, Clock::Real());
  EXPECT_EQ(GetReason(not_nccl.Check()), "NO_NCCL") << not_nccl.Check();
  NcclLink no_such_gpu(Emulated(99), Clock::Real());
  EXPECT_EQ(GetReason(no_such_gpu.Check()), "NO_GPU") << no_such_gpu.Check();
  // As this machine has it: with both, it passes; else a reason is given.
  NcclLink here({}, Clock::Real());
  const absl::Status checked = here.Check();
  EXPECT_THAT(GetReason(checked), AnyOf("", "NO_NCCL", "NO_GPU")) << checked;
  EXPECT_EQ(checked.ok(), GetReason(checked).empty());

  Workers workers(3, "a secret of tests");
  auto members = workers.MakeAll("g");
  ForAll(3, [&](uint32_t rank) {
    NcclLink link({.paths = {.nccl = "libnccl-that-is-not-there.so.2"}}, Clock::Real());
    auto chosen = ChooseCollective(std::move(members[rank]), &link, Soon());
    ASSERT_TRUE(chosen.ok()) << chosen.status();
    EXPECT_EQ(chosen->collective->name(), "grpc");
    EXPECT_THAT(chosen->why_not_fast, HasSubstr("libnccl-that-is-not-there.so.2"));
    std::vector<std::byte> bytes(1000, std::byte(rank));
    EXPECT_TRUE(chosen->collective->Broadcast(2, CollectiveBuffer::Of(bytes), Soon()).ok());
    EXPECT_EQ(bytes, std::vector<std::byte>(1000, std::byte{2}));
  });
}

// The library that deploy/setup.sh --nccl installs, or one that the loader knows. Empty: there is
// none.
std::string RealNccl() {
  for (const char* path : {PAGETIDE_SOURCE_DIR "/build/tools/nccl/libnccl.so.2", "libnccl.so.2"}) {
    void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library != nullptr) return path;
  }
  return "";
}

TEST(RealNcclTest, WithoutADriverItIsRefusedBeforeAnyGpuIsAsked) {
  const std::string nccl = RealNccl();
  if (nccl.empty()) GTEST_SKIP() << "no libnccl.so.2 (deploy/setup.sh --nccl installs it)";
  NcclLink link({.paths = {.nccl = nccl}}, Clock::Real());
  const absl::Status checked = link.Check();
  if (checked.ok()) GTEST_SKIP() << "this machine has a GPU: NcclOnGpuTest is for it";
  EXPECT_EQ(checked.code(), absl::StatusCode::kFailedPrecondition) << checked;
  EXPECT_EQ(GetReason(checked), "NO_GPU") << checked;
  EXPECT_EQ(GetReason(link.MakeId().status()), "NO_GPU");
  EXPECT_EQ(GetReason(link.Join(0, 1, std::string(128, 'x'), Soon()).status()), "NO_GPU");
  // And so the group goes over gRPC.
  Workers workers(2, "a secret of tests");
  auto members = workers.MakeAll("g");
  ForAll(2, [&](uint32_t rank) {
    NcclLink of_member({.paths = {.nccl = nccl}}, Clock::Real());
    auto chosen = ChooseCollective(std::move(members[rank]), &of_member, Soon());
    ASSERT_TRUE(chosen.ok()) << chosen.status();
    EXPECT_EQ(chosen->collective->name(), "grpc");
  });
}

// With a driver's names but none behind them, the library itself has to refuse. It has every
// function that we look for, under the prototype of ours or it would not get so far.
TEST(RealNcclTest, ItsOwnRefusalIsAStatus) {
  const std::string nccl = RealNccl();
  if (nccl.empty()) GTEST_SKIP() << "no libnccl.so.2 (deploy/setup.sh --nccl installs it)";
  if (dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL) != nullptr) {
    GTEST_SKIP() << "this machine has a driver: NcclOnGpuTest is for it";
  }
  NcclLink link({.gpu = 0, .paths = {.nccl = nccl, .cuda = EMULATED_NCCL}}, Clock::Real());
  ASSERT_TRUE(link.Check().ok()) << link.Check();
  const auto id = link.MakeId();
  if (!id.ok()) {
    EXPECT_EQ(GetReason(id.status()), "NCCL_FAILED") << id.status();
    return;
  }
  const auto joined = link.Join(0, 1, *id, In(absl::Seconds(30)));
  EXPECT_EQ(joined.status().code(), absl::StatusCode::kFailedPrecondition) << joined.status();
  EXPECT_EQ(GetReason(joined.status()), "NCCL_FAILED") << joined.status();
}

TEST(ChooseCollectiveTest, OneMemberThatCannotIsEnough) {
  for (const uint32_t lame : {0, 1, 2}) {
    Workers workers(3, "a secret of tests");
    auto members = workers.MakeAll("g");
    ForAll(3, [&](uint32_t rank) {
      NcclLink link(Emulated(rank == lame ? 99 : static_cast<int>(rank)), Clock::Real());
      auto chosen = ChooseCollective(std::move(members[rank]), &link, Soon());
      ASSERT_TRUE(chosen.ok()) << chosen.status();
      EXPECT_EQ(chosen->collective->name(), "grpc");
      EXPECT_THAT(chosen->why_not_fast,
                  HasSubstr(rank == lame ? "not one of number 99" : "another member"));
      std::vector<std::byte> bytes(10, std::byte(rank));
      EXPECT_TRUE(chosen->collective->Broadcast(1, CollectiveBuffer::Of(bytes), Soon()).ok());
      EXPECT_EQ(bytes, std::vector<std::byte>(10, std::byte{1}));
    });
  }
}

TEST(ChooseCollectiveTest, TwoRanksOnOneGpuFallBack) {
  Workers workers(2, "a secret of tests");
  auto members = workers.MakeAll("g");
  ForAll(2, [&](uint32_t rank) {
    NcclLink link(Emulated(0), Clock::Real());
    auto chosen = ChooseCollective(std::move(members[rank]), &link, In(absl::Seconds(10)));
    ASSERT_TRUE(chosen.ok()) << chosen.status();
    EXPECT_EQ(chosen->collective->name(), "grpc");
    EXPECT_THAT(chosen->why_not_fast, AnyOf(HasSubstr("Duplicate GPU"), HasSubstr("another")));
    std::vector<std::byte> bytes(10, std::byte(rank));
    EXPECT_TRUE(chosen->collective->Broadcast(1, CollectiveBuffer::Of(bytes), Soon()).ok());
  });
}

TEST(ChooseCollectiveTest, WhereAllCanTheFasterOneIsTaken) {
  Workers workers(3, "a secret of tests");
  auto members = workers.MakeAll("g");
  ForAll(3, [&](uint32_t rank) {
    NcclLink link(Emulated(static_cast<int>(rank)), Clock::Real());
    auto chosen = ChooseCollective(std::move(members[rank]), &link, Soon());
    ASSERT_TRUE(chosen.ok()) << chosen.status();
    EXPECT_EQ(chosen->collective->name(), "nccl");
    EXPECT_EQ(chosen->why_not_fast, "");
    TestPool pool;
    std::fill(pool.bytes().begin(), pool.bytes().end(), std::byte(rank));
    EXPECT_TRUE(
        chosen->collective->Broadcast(1, CollectiveBuffer::Of(&pool, 0, 1000), Soon()).ok());
    EXPECT_EQ(pool.bytes()[999], std::byte{1});
    EXPECT_EQ(pool.bytes()[1000], std::byte(rank));
    // Host memory is not a GPU's.
    std::vector<std::byte> bytes(10);
    EXPECT_TRUE(absl::IsInvalidArgument(
        chosen->collective->Broadcast(1, CollectiveBuffer::Of(bytes), Soon())));
  });
}

// With one GPU: that NCCL is linked right, and that its refusal is handled. No transfer is shown.
TEST(NcclOnGpuTest, OneRankBroadcastsAndTwoRanksFallBack) {
  NcclLink link({}, Clock::Real());
  if (const absl::Status checked = link.Check(); !checked.ok()) GTEST_SKIP() << checked.message();
  const auto device = ChooseDevice("cuda", {});
  if (!device.ok()) GTEST_SKIP() << device.status().message();
  const auto pool = device->device->CreatePool(1 << 20);
  ASSERT_TRUE(pool.ok()) << pool.status();
  std::vector<std::byte> bytes(1 << 20, std::byte{5});
  ASSERT_TRUE((*pool)->Write(0, bytes).ok());
  const auto id = link.MakeId();
  ASSERT_TRUE(id.ok()) << id.status();
  {
    auto alone = link.Join(0, 1, *id, Soon());
    ASSERT_TRUE(alone.ok()) << alone.status();
    const absl::Status status =
        (*alone)->Broadcast(0, CollectiveBuffer::Of(pool->get(), 0, 1 << 20), Soon());
    EXPECT_TRUE(status.ok()) << status;
    std::vector<std::byte> after(1 << 20);
    ASSERT_TRUE((*pool)->Read(0, after).ok());
    EXPECT_EQ(after, bytes);
  }
  Workers workers(2, "a secret of tests");
  auto members = workers.MakeAll("g");
  ForAll(2, [&](uint32_t rank) {
    NcclLink same({}, Clock::Real());
    auto chosen = ChooseCollective(std::move(members[rank]), &same, Soon());
    ASSERT_TRUE(chosen.ok()) << chosen.status();
    EXPECT_EQ(chosen->collective->name(), "grpc");
    std::vector<std::byte> some(10, std::byte(rank));
    EXPECT_TRUE(chosen->collective->Broadcast(1, CollectiveBuffer::Of(some), Soon()).ok());
  });
}

TEST(ChooseCollectiveTest, AMemberThatNeverJoinsCostsTheDeadlineOnly) {
  const std::string id = NcclLink(Emulated(0), Clock::Real()).MakeId().value();
  NcclLink link(Emulated(0), Clock::Real());
  const auto joined = link.Join(0, 2, id, In(absl::Milliseconds(50)));
  EXPECT_TRUE(absl::IsDeadlineExceeded(joined.status())) << joined.status();
  EXPECT_TRUE(absl::IsInvalidArgument(link.Join(2, 2, id, Soon()).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(link.Join(0, 2, "short", Soon()).status()));
}

}  // namespace
}  // namespace pagetide
