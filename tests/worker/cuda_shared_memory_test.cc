// Memory of a GPU between processes, over a driver that runs on the CPU: real descriptors, a real
// peer. What a real driver does with the same calls: worker_device_test on a machine with a GPU.
#include "worker/cuda_shared_memory.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/error_info.h"
#include "tests/support/process.h"
#include "tests/support/timing.h"
#include "tests/worker/emulated_driver/cuda_memory_offer.h"

namespace pagetide {
namespace {

using ::pagetide::testing::ChildProcess;
using ::pagetide::testing::Eventually;
using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr uint64_t kUnit = uint64_t{2} << 20;

// An environment variable for the length of a test.
class Setting {
 public:
  Setting(const char* name, const char* value) : name_(name) { setenv(name, value, 1); }
  ~Setting() { unsetenv(name_); }

 private:
  const char* const name_;
};

class CudaSharedMemoryTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto library = CudaVmmLibrary::Load(EMULATED_CUDA_DRIVER);
    ASSERT_TRUE(library.ok()) << library.status();
    library_ = *std::move(library);
    void* const driver = dlopen(EMULATED_CUDA_DRIVER, RTLD_NOW);
    fail_at_ = reinterpret_cast<void (*)(int)>(dlsym(driver, "emulated_cuda_fail_at"));
    has_failed_ = reinterpret_cast<int (*)()>(dlsym(driver, "emulated_cuda_has_failed"));
    num_held_ = reinterpret_cast<int (*)()>(dlsym(driver, "emulated_cuda_num_held"));
    ASSERT_EQ(num_held_(), 0);
  }
  void TearDown() override { EXPECT_EQ(num_held_(), 0) << "not all was given back"; }

  std::unique_ptr<ExportableMemory> Make(uint64_t size_bytes = kUnit, int ordinal = 0) {
    auto memory = ExportableMemory::Create(library_, ordinal, size_bytes);
    EXPECT_TRUE(memory.ok()) << memory.status();
    if (!memory.ok()) return nullptr;
    for (uint64_t i = 0; i < (*memory)->size_bytes(); ++i) {
      (*memory)->data()[i] = static_cast<std::byte>(i * 7 + i / 4096);
    }
    return *std::move(memory);
  }
  absl::StatusOr<std::unique_ptr<ImportedMemory>> Import(int fd, uint64_t size_bytes = kUnit,
                                                         int ordinal = 0) {
    return ImportedMemory::FromFd(library_, ordinal, fd, size_bytes, ImportedMemory::Access::kRead);
  }
  // Each driver call of `make` fails once; what had been taken until then is given back. Says how
  // many there are.
  template <typename Make>
  int ForEachFailingCall(const Make& make) {
    const int held = num_held_();
    for (int call = 1;; ++call) {
      fail_at_(call);
      const auto made = make();
      const bool has_failed = has_failed_() != 0;
      fail_at_(0);
      const absl::Status& status = made.status();
      if (!has_failed) {
        EXPECT_TRUE(status.ok()) << status;
        return call - 1;
      }
      EXPECT_EQ(num_held_(), held) << call << ": " << status;
      EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << call << ": " << status;
      EXPECT_THAT(std::string(status.message()), HasSubstr("CUDA_ERROR_UNKNOWN (999)"));
      EXPECT_NE(GetReason(status), "") << status;
    }
  }

  std::shared_ptr<const CudaVmmLibrary> library_;
  void (*fail_at_)(int) = nullptr;
  int (*has_failed_)() = nullptr;
  int (*num_held_)() = nullptr;
};

// Another process that was offered memory.
class Peer {
 public:
  Peer(const ExportableMemory& memory, const std::string& mode) {
    const std::string path = dir_ / "peer.sock";
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path.data(), path.size());
    const int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    EXPECT_EQ(bind(listener, reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
    EXPECT_EQ(listen(listener, 1), 0);
    std::thread offer([&] {
      socket_ = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
      CudaMemoryOffer offered{.num_bytes = memory.size_bytes()};
      memory.ipc_handle().copy(offered.ipc_handle, sizeof(offered.ipc_handle));
      EXPECT_TRUE(SendOffer(socket_, offered, memory.fd()));
    });
    auto child = ChildProcess::Start(
        {.program = CUDA_MEMORY_PEER, .args = {EMULATED_CUDA_DRIVER, path, mode}});
    shutdown(listener, SHUT_RDWR);  // of a child that never came
    offer.join();
    close(listener);
    EXPECT_TRUE(child.ok()) << child.status();
    if (child.ok()) child_ = *std::move(child);
  }
  ~Peer() { HangUp(); }

  // Does it print `answer`, and a line's end, when the byte has done its work?
  bool Answers(char what, const std::string& answer) {
    EXPECT_EQ(send(socket_, &what, 1, MSG_NOSIGNAL), 1);
    EXPECT_EQ(recv(socket_, &what, 1, 0), 1);
    return Eventually([&] { return child_->Log().find(answer + "\n") != std::string::npos; });
  }
  void HangUp() {
    if (socket_ >= 0) close(socket_);
    socket_ = -1;
  }
  ChildProcess& process() { return *child_; }
  bool is_there() const { return child_ != nullptr; }
  std::string Says(absl::string_view key) const { return child_->Address(key); }

 private:
  testing::TempDir dir_;
  int socket_ = -1;
  std::unique_ptr<ChildProcess> child_;
};

std::string HashTextOf(const ExportableMemory& memory) {
  return absl::StrFormat("%016x", HashOf(memory.data(), memory.size_bytes()));
}

TEST_F(CudaSharedMemoryTest, MemoryComesInWholeUnitsAndGoesWithItsObject) {
  int fd = -1;
  {
    const auto memory = Make(kUnit + 5000);
    ASSERT_NE(memory, nullptr);
    EXPECT_EQ(memory->size_bytes(), 2 * kUnit);
    EXPECT_EQ(memory->kind(), ExportableMemory::Kind::kVmm);
    EXPECT_EQ(memory->device_uuid(), "emulated GPU no0");
    EXPECT_EQ(memory->ipc_handle(), "");
    fd = memory->fd();
    ASSERT_GE(fd, 0);
    // Children of this process are no peers.
    EXPECT_EQ(fcntl(fd, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
    memory->data()[2 * kUnit - 1] = std::byte{9};
    EXPECT_EQ(memory->data()[2 * kUnit - 1], std::byte{9});
  }
  EXPECT_EQ(fcntl(fd, F_GETFD), -1);
  EXPECT_EQ(errno, EBADF);
}

TEST_F(CudaSharedMemoryTest, APeerSeesTheBytesAndCannotWriteWhereItAskedToRead) {
  const auto memory = Make();
  Peer peer(*memory, "read");
  ASSERT_TRUE(peer.is_there());
  EXPECT_EQ(peer.Says("hash"), HashTextOf(*memory));
  memory->data()[kUnit - 1] ^= std::byte{1};
  EXPECT_TRUE(peer.Answers('h', absl::StrCat("hash ", HashTextOf(*memory))));
  EXPECT_TRUE(peer.Answers('c', "can write: 0"));
  peer.HangUp();
  EXPECT_EQ(peer.process().Wait(absl::Seconds(60)).value_or(-1), 0);
  EXPECT_THAT(peer.process().Log(), HasSubstr("left holding 0\n"));
}

TEST_F(CudaSharedMemoryTest, APeerThatAskedToWriteWrites) {
  const auto memory = Make();
  Peer peer(*memory, "write");
  ASSERT_TRUE(peer.is_there());
  EXPECT_TRUE(peer.Answers('c', "can write: 1"));
  EXPECT_TRUE(peer.Answers('w', "wrote"));
  EXPECT_EQ(memory->data()[0], std::byte{0x5a});
}

TEST_F(CudaSharedMemoryTest, WhatAPeerHasMappedOutlivesItsOwner) {
  auto memory = Make();
  Peer peer(*memory, "read");
  ASSERT_TRUE(peer.is_there());
  const std::string hash = HashTextOf(*memory);
  memory.reset();
  EXPECT_EQ(num_held_(), 0);
  EXPECT_TRUE(peer.Answers('h', absl::StrCat("hash ", hash)));
}

// The seal is refused while any process has the memory mapped.
TEST_F(CudaSharedMemoryTest, TheDeathOfAPeerReleasesItsMapping) {
  auto memory = Make();
  Peer peer(*memory, "write");
  ASSERT_TRUE(peer.is_there());
  const int kept = fcntl(memory->fd(), F_DUPFD_CLOEXEC, 0);
  memory.reset();
  EXPECT_EQ(fcntl(kept, F_ADD_SEALS, F_SEAL_WRITE), -1);
  EXPECT_EQ(errno, EBUSY);
  peer.process().Kill();
  EXPECT_TRUE(Eventually([&] { return fcntl(kept, F_ADD_SEALS, F_SEAL_WRITE) == 0; }));
  close(kept);
}

TEST_F(CudaSharedMemoryTest, WithoutDescriptorsItGoesByAHandle) {
  const Setting no_descriptors("EMULATED_CUDA_DESCRIPTORS", "0");
  const auto memory = Make(5000);
  ASSERT_NE(memory, nullptr);
  EXPECT_EQ(memory->kind(), ExportableMemory::Kind::kIpc);
  EXPECT_EQ(memory->fd(), -1);
  EXPECT_EQ(memory->ipc_handle().size(), 64u);
  EXPECT_EQ(memory->size_bytes(), kUnit) << "others' memory lies in the same unit";
  Peer peer(*memory, "write");
  ASSERT_TRUE(peer.is_there());
  EXPECT_EQ(peer.Says("hash"), HashTextOf(*memory));
  EXPECT_TRUE(peer.Answers('w', "wrote"));
  EXPECT_EQ(memory->data()[0], std::byte{0x5a});
  peer.HangUp();
  EXPECT_EQ(peer.process().Wait(absl::Seconds(60)).value_or(-1), 0);
  EXPECT_THAT(peer.process().Log(), HasSubstr("left holding 0\n"));
}

TEST_F(CudaSharedMemoryTest, HandlesThatCannotBeAreRefused) {
  const auto open = [&](absl::string_view handle, uint64_t size_bytes) {
    return ImportedMemory::FromIpcHandle(library_, 0, handle, size_bytes).status();
  };
  EXPECT_TRUE(absl::IsInvalidArgument(open(std::string(63, 'x'), kUnit)));
  const absl::Status unknown = open(std::string(64, 'x'), kUnit);
  EXPECT_EQ(GetReason(unknown), "CANNOT_IMPORT") << unknown;
  EXPECT_THAT(std::string(unknown.message()), HasSubstr("CUDA_ERROR_INVALID_VALUE (1)"));
  const Setting no_descriptors("EMULATED_CUDA_DESCRIPTORS", "0");
  const auto memory = Make();
  const absl::Status own = open(memory->ipc_handle(), kUnit);
  EXPECT_EQ(GetReason(own), "CANNOT_IMPORT") << own;
  EXPECT_THAT(std::string(own.message()), HasSubstr("CUDA_ERROR_INVALID_CONTEXT"));
}

TEST_F(CudaSharedMemoryTest, DescriptorsOfSomethingElseAreRefused) {
  const int null = open("/dev/null", O_RDWR | O_CLOEXEC);
  const int memfd = memfd_create("no GPU's", MFD_CLOEXEC);
  ASSERT_EQ(ftruncate(memfd, kUnit), 0);
  int ends[2];
  ASSERT_EQ(pipe2(ends, O_CLOEXEC), 0);
  for (const int fd : {null, memfd, ends[0], -1, 1 << 20}) {
    const absl::Status status = Import(fd).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
    EXPECT_EQ(GetReason(status), "CANNOT_IMPORT") << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("CUDA_ERROR_INVALID_VALUE (1)"));
    EXPECT_EQ(num_held_(), 0);
  }
  for (const int fd : {null, memfd, ends[0], ends[1]})
    EXPECT_EQ(close(fd), 0) << "not ours to close";
}

TEST_F(CudaSharedMemoryTest, SizesThatCannotBeMappedAreRefused) {
  const auto memory = Make();
  for (const uint64_t size : {uint64_t{0}, uint64_t{4096}, kUnit - 1, kUnit + 4096}) {
    const absl::Status status = Import(memory->fd(), size).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(absl::StrCat(size, " bytes")));
  }
  const absl::Status beyond = Import(memory->fd(), 2 * kUnit).status();
  EXPECT_EQ(GetReason(beyond), "CANNOT_IMPORT") << beyond;
  EXPECT_THAT(std::string(beyond.message()), HasSubstr("cuMemMap answers"));
  EXPECT_TRUE(absl::IsInvalidArgument(ExportableMemory::Create(library_, 0, 0).status()));
  for (const uint64_t size : {uint64_t{1} << 40, ~uint64_t{0}, ~uint64_t{0} - kUnit}) {
    const absl::Status status = ExportableMemory::Create(library_, 0, size).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  }
}

TEST_F(CudaSharedMemoryTest, MemoryOfAnotherGpuIsRefused) {
  const auto memory = Make(kUnit, 1);
  EXPECT_EQ(memory->device_uuid(), "emulated GPU no1");
  const absl::Status status = Import(memory->fd(), kUnit, 0).status();
  EXPECT_EQ(GetReason(status), "CANNOT_IMPORT") << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("not of this GPU"));
  const auto imported = Import(memory->fd(), kUnit, 1);
  ASSERT_TRUE(imported.ok()) << imported.status();
  EXPECT_EQ(std::memcmp((*imported)->data(), memory->data(), kUnit), 0);
}

TEST_F(CudaSharedMemoryTest, WithoutDriverOrGpuItSaysSo) {
  for (const char* path : {"libcuda-that-is-not-there.so.1", "libc.so.6"}) {
    const absl::Status status = CudaVmmLibrary::Load(path).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
    EXPECT_EQ(GetReason(status), "NO_GPU") << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(path));
  }
  for (const int ordinal : {-1, 2, 99}) {
    const absl::Status status = ExportableMemory::Create(library_, ordinal, kUnit).status();
    EXPECT_EQ(GetReason(status), "NO_GPU") << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("sees 2 GPUs"));
  }
  const Setting none("EMULATED_CUDA_GPUS", "0");
  for (const absl::Status& status :
       {ExportableMemory::Create(library_, 0, kUnit).status(), Import(0).status()}) {
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
    EXPECT_EQ(GetReason(status), "NO_GPU") << status;
    EXPECT_THAT(std::string(status.message()),
                AllOf(HasSubstr("cuInit"), HasSubstr("CUDA_ERROR_NO_DEVICE (100)")));
  }
}

TEST_F(CudaSharedMemoryTest, AFailingCallOfAnExportGivesAllBack) {
  const auto make = [&] { return ExportableMemory::Create(library_, 0, kUnit); };
  EXPECT_EQ(ForEachFailingCall(make), 14);
  const Setting no_descriptors("EMULATED_CUDA_DESCRIPTORS", "0");
  EXPECT_EQ(ForEachFailingCall(make), 10);
}

TEST_F(CudaSharedMemoryTest, AFailingCallOfAnImportGivesAllBack) {
  auto memory = Make();
  const int num_calls = ForEachFailingCall([&] { return Import(memory->fd()); });
  EXPECT_EQ(num_calls, 12);
  Peer peer(*memory, "failures");
  ASSERT_TRUE(peer.is_there());
  EXPECT_EQ(peer.Says("failures"), absl::StrCat(num_calls));
  EXPECT_EQ(peer.Says("held"), "0");
  memory.reset();
  const Setting no_descriptors("EMULATED_CUDA_DESCRIPTORS", "0");
  memory = Make();
  Peer by_handle(*memory, "failures");
  ASSERT_TRUE(by_handle.is_there());
  EXPECT_EQ(by_handle.Says("failures"), "8");
  EXPECT_EQ(by_handle.Says("held"), "0");
}

// With the driver of this machine, if it has one.
TEST(CudaSharedMemoryOnGpuTest, TheRealDriverTakesTheSameCalls) {
  const auto library = CudaVmmLibrary::Load("libcuda.so.1");
  if (!library.ok()) GTEST_SKIP() << library.status().message();
  const auto memory = ExportableMemory::Create(*library, 0, 5000);
  if (!memory.ok() && GetReason(memory.status()) == "NO_GPU") {
    GTEST_SKIP() << memory.status().message();
  }
  ASSERT_TRUE(memory.ok()) << memory.status();
  if ((*memory)->kind() != ExportableMemory::Kind::kVmm)
    GTEST_SKIP() << "the GPU gives no descriptors";
  // Bytes are compared in worker_device_test, which has a runtime to copy them by.
  for (const auto access : {ImportedMemory::Access::kReadWrite, ImportedMemory::Access::kRead}) {
    const auto imported =
        ImportedMemory::FromFd(*library, 0, (*memory)->fd(), (*memory)->size_bytes(), access);
    EXPECT_TRUE(imported.ok()) << imported.status();
  }
  EXPECT_EQ(
      GetReason(ImportedMemory::FromFd(*library, 0, (*memory)->fd(), 2 * (*memory)->size_bytes(),
                                       ImportedMemory::Access::kRead)
                    .status()),
      "CANNOT_IMPORT");
}

}  // namespace
}  // namespace pagetide
