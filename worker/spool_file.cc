#include "worker/spool_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"

namespace pagetide {

absl::StatusOr<std::unique_ptr<SpoolFile>> SpoolFile::Create(const std::string& folder,
                                                             uint64_t max_bytes) {
  const int fd = open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (fd < 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("make a spool file in ", folder, ": ", strerror(errno)));
  }
  return std::unique_ptr<SpoolFile>(new SpoolFile(fd, max_bytes));
}

SpoolFile::~SpoolFile() {
  if (mapped_ != nullptr) munmap(mapped_, size_);
  close(fd_);
}

absl::Status SpoolFile::Append(absl::string_view bytes) {
  if (bytes.size() > max_bytes_ - size_) {
    return WithReason(absl::ResourceExhaustedError(absl::StrCat(
                          "spool ", size_ + bytes.size(), " bytes: the limit is ", max_bytes_)),
                      "FILE_TOO_LARGE");
  }
  while (!bytes.empty()) {
    const ssize_t n = write(fd_, bytes.data(), bytes.size());
    if (n < 0) {
      if (errno == EINTR) continue;
      return WithReason(
          absl::ResourceExhaustedError(
              absl::StrCat("spool ", bytes.size(), " bytes behind ", size_, ": ", strerror(errno))),
          "SPOOL_FULL");
    }
    bytes.remove_prefix(static_cast<size_t>(n));
    size_ += static_cast<uint64_t>(n);
  }
  return absl::OkStatus();
}

absl::StatusOr<absl::string_view> SpoolFile::Map() {
  if (size_ == 0) return absl::string_view();
  if (mapped_ == nullptr) {
    void* const mapped = mmap(nullptr, size_, PROT_READ, MAP_SHARED, fd_, 0);
    if (mapped == MAP_FAILED) {
      return absl::ResourceExhaustedError(
          absl::StrCat("map ", size_, " spooled bytes: ", strerror(errno)));
    }
    mapped_ = mapped;
  }
  return absl::string_view(static_cast<const char*>(mapped_), size_);
}

}  // namespace pagetide
