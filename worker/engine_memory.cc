#include "worker/engine_memory.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"

namespace pagetide {
namespace {

template <typename... Parts>
absl::Status Refused(const Parts&... parts) {
  return absl::FailedPreconditionError(absl::StrCat("map an engine's memory: ", parts...));
}

}  // namespace

absl::StatusOr<std::shared_ptr<const EngineMemory>> EngineMemory::Map(int fd, uint64_t size_bytes) {
  // First of all: it is answered for memory only, without a look at the file. Any call that follows
  // could wait for a file system in the hands of the peer (FUSE), or for a pipe's other end.
  const int seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0) return Refused("the descriptor is no memfd: ", std::strerror(errno));
  if ((seals & F_SEAL_SHRINK) == 0) {
    return Refused("it is not sealed with F_SEAL_SHRINK: it could shrink under the worker");
  }
  if ((seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE)) != 0) {
    return Refused("it is sealed against writes, and pages are loaded into it");
  }
  if ((fcntl(fd, F_GETFL) & O_ACCMODE) != O_RDWR) {
    return Refused("the descriptor is not open for reading and writing");
  }
  // Not of huge pages: those can run out at a page fault, which is a SIGBUS.
  struct statfs system {};
  if (fstatfs(fd, &system) != 0 || system.f_type != TMPFS_MAGIC) {
    return Refused("the descriptor is no memfd of ordinary pages");
  }
  struct stat info {};
  if (fstat(fd, &info) != 0) return Refused("descriptor: ", std::strerror(errno));
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
  const int own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
  if (own < 0) {
    const absl::Status status = absl::ResourceExhaustedError(
        absl::StrCat("map an engine's memory: descriptor: ", std::strerror(errno)));
    munmap(data, size_bytes);
    return status;
  }
  return std::shared_ptr<const EngineMemory>(
      new EngineMemory(own, static_cast<std::byte*>(data), size_bytes));
}

std::shared_ptr<const EngineMemory> EngineMemory::OnDevice(std::shared_ptr<const void> mapping,
                                                           std::byte* data, uint64_t size_bytes) {
  std::shared_ptr<EngineMemory> memory(new EngineMemory(-1, data, size_bytes));
  memory->mapping_ = std::move(mapping);
  return memory;
}

EngineMemory::~EngineMemory() {
  if (is_on_device()) return;
  munmap(data_, size_bytes_);
  close(fd_);
}

absl::Status EngineMemory::CheckAllocated() const {
  if (is_on_device()) return absl::OkStatus();
  // The offset is the engine's too: it finds it as it was.
  const off_t at = lseek(fd_, 0, SEEK_CUR);
  const off_t hole = lseek(fd_, 0, SEEK_HOLE);
  lseek(fd_, std::max<off_t>(0, at), SEEK_SET);
  if (hole < 0 || static_cast<uint64_t>(hole) >= size_bytes_) return absl::OkStatus();
  // Pages that were allocated and never touched count as holes to the search, and are none.
  struct stat info {};
  if (fstat(fd_, &info) != 0) {
    return absl::InternalError(absl::StrCat("look at an engine's memory: ", std::strerror(errno)));
  }
  const uint64_t allocated = static_cast<uint64_t>(info.st_blocks) * 512;
  if (allocated >= static_cast<uint64_t>(info.st_size)) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "it has a hole at or behind byte ", hole, ": ", allocated, " of its ", info.st_size,
      " bytes are allocated; allocate all of them (posix_fallocate) before they are used"));
}

}  // namespace pagetide
