// The other process of cuda_shared_memory_test: takes a descriptor or a handle by a unix socket,
// imports the memory, and does what one byte after another tells it.
//
//   cuda_memory_peer LIBRARY SOCKET MODE
//
// MODE: read, write (access that is asked for; a handle knows only the latter), failures (makes one
// driver call after another of the import fail). Bytes: h prints the memory's hash, c whether this
// process can write into it, w writes 0x5a into its first byte. At the end of the connection it
// lets go of all and says what is still held.
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "tests/worker/emulated_driver/cuda_memory_offer.h"
#include "worker/cuda_shared_memory.h"

namespace pagetide {
namespace {

absl::StatusOr<std::unique_ptr<ImportedMemory>> Import(
    const std::shared_ptr<const CudaVmmLibrary>& library, const CudaMemoryOffer& offer, int fd,
    bool writes) {
  if (fd < 0) {
    return ImportedMemory::FromIpcHandle(
        library, 0, absl::string_view(offer.ipc_handle, sizeof(offer.ipc_handle)), offer.num_bytes);
  }
  return ImportedMemory::FromFd(
      library, 0, fd, offer.num_bytes,
      writes ? ImportedMemory::Access::kReadWrite : ImportedMemory::Access::kRead);
}

// A system call that fails instead of the signal that a plain write would be.
bool CanWrite(const ImportedMemory& memory) {
  const int zeros = open("/dev/zero", O_RDONLY | O_CLOEXEC);
  std::byte* const last = memory.data() + memory.size_bytes() - 1;
  const bool can = read(zeros, last, 1) == 1;
  close(zeros);
  return can;
}

int Run(char** arguments) {
  const std::string mode = arguments[3];
  const auto library = CudaVmmLibrary::Load(arguments[1]);
  if (!library.ok()) return 3;
  void* const driver = dlopen(arguments[1], RTLD_NOW);
  const auto fail_at = reinterpret_cast<void (*)(int)>(dlsym(driver, "emulated_cuda_fail_at"));
  const auto has_failed = reinterpret_cast<int (*)()>(dlsym(driver, "emulated_cuda_has_failed"));
  const auto num_held = reinterpret_cast<int (*)()>(dlsym(driver, "emulated_cuda_num_held"));

  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, arguments[2], sizeof(address.sun_path) - 1);
  const int plane = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (connect(plane, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) return 4;
  CudaMemoryOffer offer;
  const int fd = ReceiveOffer(plane, &offer);

  if (mode == "failures") {
    int call = 1;
    for (;; ++call) {
      fail_at(call);
      const auto memory = Import(*library, offer, fd, true);
      if (has_failed() == 0) {
        fail_at(0);
        if (!memory.ok()) return 5;
        break;
      }
      if (memory.ok() || !absl::IsFailedPrecondition(memory.status()) || num_held() != 0) {
        std::printf("call %d: held %d, %s\n", call, num_held(), memory.status().ToString().c_str());
        return 6;
      }
    }
    std::printf("cuda_memory_peer ready failures=%d held=%d\n", call - 1, num_held());
    std::fflush(stdout);
    return 0;
  }

  auto memory = Import(*library, offer, fd, mode == "write");
  if (fd >= 0) close(fd);
  if (!memory.ok()) {
    std::printf("%s\n", memory.status().ToString().c_str());
    return 7;
  }
  std::printf("cuda_memory_peer ready uuid=%s hash=%016llx\n",
              (*memory)->device_uuid().c_str() + 13, HashOf((*memory)->data(), offer.num_bytes));
  std::fflush(stdout);
  char what = 0;
  while (recv(plane, &what, 1, 0) == 1) {
    if (what == 'h') std::printf("hash %016llx\n", HashOf((*memory)->data(), offer.num_bytes));
    if (what == 'c') std::printf("can write: %d\n", CanWrite(**memory) ? 1 : 0);
    if (what == 'w') {
      (*memory)->data()[0] = std::byte{0x5a};
      std::printf("wrote\n");
    }
    std::fflush(stdout);
    if (send(plane, &what, 1, MSG_NOSIGNAL) != 1) return 8;
  }
  memory->reset();
  std::printf("left holding %d\n", num_held());
  return 0;
}

}  // namespace
}  // namespace pagetide

int main(int count, char** arguments) {
  return count == 4 ? pagetide::Run(arguments) : 2;
}
