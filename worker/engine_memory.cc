#include "worker/engine_memory.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace pagetide {
namespace {

template <typename... Parts>
absl::Status Refused(const Parts&... parts) {
  return absl::FailedPreconditionError(absl::StrCat("map an engine's memory: ", parts...));
}

}  // namespace

absl::StatusOr<std::shared_ptr<const EngineMemory>> EngineMemory::Map(int fd, uint64_t size_bytes) {
  struct stat info {};
  if (fstat(fd, &info) != 0) return Refused("descriptor: ", std::strerror(errno));
  if (!S_ISREG(info.st_mode)) return Refused("the descriptor is no memfd");
  // Not of huge pages: those can run out at a page fault, which is a SIGBUS.
  struct statfs system {};
  if (fstatfs(fd, &system) != 0 || system.f_type != TMPFS_MAGIC) {
    return Refused("the descriptor is no memfd of ordinary pages");
  }
  const int seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
    return Refused("it is not sealed with F_SEAL_SHRINK: it could shrink under the worker");
  }
  if ((seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE)) != 0) {
    return Refused("it is sealed against writes, and pages are loaded into it");
  }
  if ((fcntl(fd, F_GETFL) & O_ACCMODE) != O_RDWR) {
    return Refused("the descriptor is not open for reading and writing");
  }
  const auto there = static_cast<uint64_t>(info.st_size);
  if (size_bytes == 0 || size_bytes > there) {
    return absl::InvalidArgumentError(absl::StrCat("map an engine's memory: size_bytes is ",
                                                   size_bytes, ", must be 1 to the ", there,
                                                   " of its descriptor"));
  }
  void* const data = mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) {
    return absl::ResourceExhaustedError(
        absl::StrCat("map an engine's memory of ", size_bytes, " bytes: ", std::strerror(errno)));
  }
  return std::shared_ptr<const EngineMemory>(
      new EngineMemory(static_cast<std::byte*>(data), size_bytes));
}

EngineMemory::~EngineMemory() {
  munmap(data_, size_bytes_);
}

}  // namespace pagetide
