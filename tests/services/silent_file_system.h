// A file system (FUSE) of one file, in the hands of this process, that lets the file be opened and
// never answers anything about it afterwards: what a hostile client may hand over as its memory.
#ifndef PAGETIDE_TESTS_SERVICES_SILENT_FILE_SYSTEM_H_
#define PAGETIDE_TESTS_SERVICES_SILENT_FILE_SYSTEM_H_

#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/support/process.h"

namespace pagetide::testing {

class SilentFileSystem {
 public:
  // Check why_not() before anything else.
  SilentFileSystem() {
    device_ = open("/dev/fuse", O_RDWR | O_CLOEXEC | O_NONBLOCK);
    if (device_ < 0) {
      why_not_ = absl::StrCat("/dev/fuse: ", std::strerror(errno));
      return;
    }
    const std::string options =
        absl::StrCat("fd=", device_, ",rootmode=40000,user_id=", getuid(), ",group_id=", getgid());
    if (mount("silent", dir_.path().c_str(), "fuse", MS_NOSUID | MS_NODEV, options.c_str()) != 0) {
      why_not_ = absl::StrCat("mount a FUSE file system: ", std::strerror(errno));
      return;
    }
    is_mounted_ = true;
    thread_ = std::thread([this] { Serve(); });
    file_ = open((dir_ / "file").c_str(), O_RDWR | O_CLOEXEC);
    if (file_ < 0) why_not_ = absl::StrCat("open a file there: ", std::strerror(errno));
  }
  ~SilentFileSystem() {
    is_stopping_ = true;
    if (thread_.joinable()) thread_.join();
    // Ends the connection, and with it all that waits for an answer.
    if (device_ >= 0) close(device_);
    if (file_ >= 0) close(file_);
    if (is_mounted_) umount2(dir_.path().c_str(), MNT_DETACH);
  }
  SilentFileSystem(const SilentFileSystem&) = delete;
  SilentFileSystem& operator=(const SilentFileSystem&) = delete;

  const std::string& why_not() const { return why_not_; }
  // Stays this object's. Only fcntl answers.
  int file() const { return file_; }
  // Questions about the file that were left without an answer.
  int num_unanswered() const { return num_unanswered_; }

 private:
  void Serve() {
    std::vector<char> request(1 << 17);
    while (!is_stopping_) {
      pollfd polled{device_, POLLIN, 0};
      if (poll(&polled, 1, 20) <= 0) continue;
      const ssize_t got = read(device_, request.data(), request.size());
      if (got < static_cast<ssize_t>(sizeof(fuse_in_header))) continue;
      fuse_in_header header;
      std::memcpy(&header, request.data(), sizeof(header));
      Answer(header, request.data() + sizeof(header));
    }
  }
  void Answer(const fuse_in_header& header, const char* body) {
    fuse_attr attributes{};
    attributes.ino = header.nodeid;
    attributes.size = 8192;
    attributes.nlink = 1;
    attributes.uid = getuid();
    attributes.gid = getgid();
    attributes.mode = S_IFREG | 0600;
    switch (header.opcode) {
      case FUSE_INIT: {
        fuse_init_in in;
        std::memcpy(&in, body, sizeof(in));
        fuse_init_out out{};
        out.major = FUSE_KERNEL_VERSION;
        out.minor = std::min<uint32_t>(in.minor, FUSE_KERNEL_MINOR_VERSION);
        out.max_write = 4096;
        out.max_background = 16;
        return Reply(header, 0, &out, sizeof(out));
      }
      case FUSE_LOOKUP: {
        fuse_entry_out out{};
        out.nodeid = 2;
        out.entry_valid = 3600;
        out.attr = attributes;
        out.attr.ino = 2;
        return Reply(header, 0, &out, sizeof(out));
      }
      case FUSE_GETATTR: {
        if (header.nodeid != FUSE_ROOT_ID) break;
        fuse_attr_out out{};
        out.attr = attributes;
        out.attr.mode = S_IFDIR | 0700;
        return Reply(header, 0, &out, sizeof(out));
      }
      case FUSE_OPEN: {
        fuse_open_out out{};
        return Reply(header, 0, &out, sizeof(out));
      }
      case FUSE_FLUSH:
      case FUSE_STATFS:
      case FUSE_READ:
      case FUSE_LSEEK:
      case FUSE_FALLOCATE:
        break;
      case FUSE_FORGET:
      case FUSE_INTERRUPT:
        return;
      default:
        return Reply(header, -ENOSYS, nullptr, 0);
    }
    ++num_unanswered_;
  }
  void Reply(const fuse_in_header& to, int error, const void* body, size_t size) {
    std::vector<char> answer(sizeof(fuse_out_header) + size);
    fuse_out_header header{};
    header.len = static_cast<uint32_t>(answer.size());
    header.error = error;
    header.unique = to.unique;
    std::memcpy(answer.data(), &header, sizeof(header));
    if (size > 0) std::memcpy(answer.data() + sizeof(header), body, size);
    [[maybe_unused]] const ssize_t written = write(device_, answer.data(), answer.size());
  }

  TempDir dir_;
  std::string why_not_;
  int device_ = -1;
  int file_ = -1;
  bool is_mounted_ = false;
  std::atomic<bool> is_stopping_{false};
  std::atomic<int> num_unanswered_{0};
  std::thread thread_;
};

}  // namespace pagetide::testing

#endif  // PAGETIDE_TESTS_SERVICES_SILENT_FILE_SYSTEM_H_
