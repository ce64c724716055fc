#include "worker/staging_buffer.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cassert>
#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace pagetide {
namespace {

absl::Status Failed(const char* action, uint64_t num_bytes) {
  return absl::ResourceExhaustedError(
      absl::StrCat(action, " a staging buffer of ", num_bytes, " bytes: ", strerror(errno)));
}

}  // namespace

absl::StatusOr<std::shared_ptr<StagingBuffer>> StagingBuffer::Create(uint64_t num_bytes) {
  const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  num_bytes = (num_bytes + page - 1) / page * page;
  const int fd = memfd_create("pagetide-staging", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) return Failed("create", num_bytes);
  if (ftruncate(fd, static_cast<off_t>(num_bytes)) != 0 ||
      fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    const absl::Status status = Failed("size and seal", num_bytes);
    close(fd);
    return status;
  }
  void* data = mmap(nullptr, num_bytes, PROT_READ, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) {
    const absl::Status status = Failed("map", num_bytes);
    close(fd);
    return status;
  }
  return std::shared_ptr<StagingBuffer>(
      new StagingBuffer(fd, static_cast<std::byte*>(data), num_bytes));
}

StagingBuffer::StagingBuffer(int fd, std::byte* data, uint64_t num_bytes)
    : fd_(fd), data_(data), num_bytes_(num_bytes), regions_(num_bytes) {}

StagingBuffer::~StagingBuffer() {
  munmap(data_, num_bytes_);
  close(fd_);
}

absl::StatusOr<uint64_t> StagingBuffer::Allocate(uint64_t num_bytes) {
  MutexLock lock(&mu_);
  const std::optional<uint64_t> offset = regions_.Allocate(num_bytes);
  if (offset.has_value()) return *offset;
  return absl::ResourceExhaustedError(absl::StrCat("reserve ", num_bytes,
                                                   " bytes of staging: ", regions_.free_bytes(),
                                                   " of ", num_bytes_, " are free"));
}

void StagingBuffer::Free(uint64_t offset) {
  MutexLock lock(&mu_);
  const absl::Status freed = regions_.Free(offset);
  assert(freed.ok());  // the owner frees what it allocated, once
  static_cast<void>(freed);
}

}  // namespace pagetide
