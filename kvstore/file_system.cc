#include "kvstore/file_system.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/status_macros.h"

namespace pagetide {
namespace {

absl::Status ErrnoStatus(int error, absl::string_view action, const std::string& path) {
  const std::string text = absl::StrCat(action, " ", path, ": ", std::strerror(error));
  if (error == ENOSPC || error == EDQUOT) return absl::ResourceExhaustedError(text);
  if (error == ENOENT) return absl::NotFoundError(text);
  return absl::UnavailableError(text);
}

// Moves on both buffers by `done` bytes. Span is std::span<const std::byte> or
// std::span<std::byte>.
template <typename Span>
int Fill(iovec (&iov)[2], Span first, Span second, uint64_t done) {
  int n = 0;
  for (const Span part : {first, second}) {
    const uint64_t skip = std::min<uint64_t>(done, part.size());
    done -= skip;
    if (skip == part.size()) continue;
    iov[n].iov_base = const_cast<std::byte*>(part.data()) + skip;
    iov[n].iov_len = part.size() - skip;
    ++n;
  }
  return n;
}

class PosixFile final : public File {
 public:
  PosixFile(int fd, std::string path) : fd_(fd), path_(std::move(path)) {}
  ~PosixFile() override { ::close(fd_); }

  absl::Status WriteAt(uint64_t offset, std::span<const std::byte> first,
                       std::span<const std::byte> second) override {
    const uint64_t total = first.size() + second.size();
    iovec iov[2];
    for (uint64_t done = 0; done < total;) {
      const int parts = Fill(iov, first, second, done);
      const ssize_t n = ::pwritev(fd_, iov, parts, static_cast<off_t>(offset + done));
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) return ErrnoStatus(n < 0 ? errno : EIO, "write", path_);
      done += static_cast<uint64_t>(n);
    }
    return absl::OkStatus();
  }

  absl::StatusOr<uint64_t> ReadAt(uint64_t offset, std::span<std::byte> first,
                                  std::span<std::byte> second) const override {
    const uint64_t total = first.size() + second.size();
    iovec iov[2];
    uint64_t done = 0;
    while (done < total) {
      const int parts = Fill(iov, first, second, done);
      const ssize_t n = ::preadv(fd_, iov, parts, static_cast<off_t>(offset + done));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) return ErrnoStatus(errno, "read", path_);
      if (n == 0) break;
      done += static_cast<uint64_t>(n);
    }
    return done;
  }

  absl::Status Sync() override {
    if (::fdatasync(fd_) != 0) return ErrnoStatus(errno, "fdatasync", path_);
    return absl::OkStatus();
  }

  absl::Status DropCacheFrom(uint64_t offset) override {
    // Pages of which a part is meant are dropped whole; 64 KiB is the largest page there is.
    const off_t from = static_cast<off_t>(offset / 65536 * 65536);
    const int error = ::posix_fadvise(fd_, from, /*len: to the end*/ 0, POSIX_FADV_DONTNEED);
    if (error != 0) return ErrnoStatus(error, "drop the page cache of", path_);
    return absl::OkStatus();
  }

  absl::StatusOr<uint64_t> Size() const override {
    struct stat st {};
    if (::fstat(fd_, &st) != 0) return ErrnoStatus(errno, "stat", path_);
    return static_cast<uint64_t>(st.st_size);
  }

 private:
  const int fd_;
  const std::string path_;
};

class PosixFileSystem final : public FileSystem {
 public:
  absl::StatusOr<bool> CreateDir(const std::string& dir) override {
    if (::mkdir(dir.c_str(), 0777) == 0) return true;
    const int error = errno;
    std::error_code ignored;
    if (error == EEXIST && std::filesystem::is_directory(dir, ignored)) return false;
    return ErrnoStatus(error, "create folder", dir);
  }
  absl::StatusOr<std::unique_ptr<File>> CreateFile(const std::string& path) override {
    return Open(path, O_CREAT | O_EXCL, "create");
  }
  absl::StatusOr<std::unique_ptr<File>> OpenFile(const std::string& path) override {
    return Open(path, 0, "open");
  }
  absl::Status DeleteFile(const std::string& path) override {
    if (::unlink(path.c_str()) != 0) return ErrnoStatus(errno, "delete", path);
    return absl::OkStatus();
  }
  absl::Status SyncDir(const std::string& dir) override {
    const int fd = ::open(dir.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return ErrnoStatus(errno, "open folder", dir);
    const int rc = ::fsync(fd);
    const int error = errno;
    ::close(fd);
    if (rc != 0) return ErrnoStatus(error, "fsync folder", dir);
    return absl::OkStatus();
  }
  absl::StatusOr<std::vector<std::string>> List(const std::string& dir) override {
    std::vector<std::string> names;
    std::error_code ec;
    for (std::filesystem::directory_iterator it(dir, ec), end; !ec && it != end; it.increment(ec)) {
      names.push_back(it->path().filename().string());
    }
    if (ec) return ErrnoStatus(ec.value(), "list", dir);
    return names;
  }
  absl::StatusOr<uint64_t> FreeBytes(const std::string& dir) override {
    struct statvfs vfs {};
    if (::statvfs(dir.c_str(), &vfs) != 0) return ErrnoStatus(errno, "statvfs", dir);
    return static_cast<uint64_t>(vfs.f_bavail) * vfs.f_frsize;
  }

 private:
  static absl::StatusOr<std::unique_ptr<File>> Open(const std::string& path, int flags,
                                                    absl::string_view action) {
    const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC | flags, 0600);
    if (fd < 0) return ErrnoStatus(errno, action, path);
    return std::make_unique<PosixFile>(fd, path);
  }
};

}  // namespace

absl::Status FileSystem::CreateDirs(const std::string& dir) {
  absl::StatusOr<bool> created = CreateDir(dir);
  if (created.ok() && !*created) return absl::OkStatus();
  std::filesystem::path path = std::filesystem::path(dir).lexically_normal();
  if (!path.has_filename()) path = path.parent_path();  // a slash at the end
  const std::string parent = path.has_parent_path() ? path.parent_path().string() : ".";
  if (absl::IsNotFound(created.status()) && parent != dir) {
    PT_RETURN_IF_ERROR(CreateDirs(parent));
    created = CreateDir(dir);
  }
  PT_RETURN_IF_ERROR(created.status());
  return SyncDir(parent);
}

FileSystem* FileSystem::Posix() {
  static PosixFileSystem* const fs = new PosixFileSystem;
  return fs;
}

}  // namespace pagetide
