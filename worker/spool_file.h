// SpoolFile: bytes of a stream gathered in a nameless file, then seen as one run of memory. What is
// gathered takes disk, not memory, and is gone with the object, also when the process dies.
// Not thread-safe until Map was called; then immutable.
#ifndef PAGETIDE_WORKER_SPOOL_FILE_H_
#define PAGETIDE_WORKER_SPOOL_FILE_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace pagetide {

class SpoolFile {
 public:
  // FAILED_PRECONDITION when no file can be made in `folder`.
  static absl::StatusOr<std::unique_ptr<SpoolFile>> Create(const std::string& folder,
                                                           uint64_t max_bytes);
  ~SpoolFile();
  SpoolFile(const SpoolFile&) = delete;
  SpoolFile& operator=(const SpoolFile&) = delete;

  // RESOURCE_EXHAUSTED beyond max_bytes, and when the disk is full.
  absl::Status Append(absl::string_view bytes);
  uint64_t size() const { return size_; }
  // All that was appended. Valid as long as the object; Append must not be called any more.
  absl::StatusOr<absl::string_view> Map();

 private:
  SpoolFile(int fd, uint64_t max_bytes) : fd_(fd), max_bytes_(max_bytes) {}
  const int fd_;
  const uint64_t max_bytes_;
  uint64_t size_ = 0;
  void* mapped_ = nullptr;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_SPOOL_FILE_H_
