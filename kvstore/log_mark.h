// LogMark: a small file beside the index that remembers how far the index's log was durable.
//
// RocksDB takes a damaged record of its log for the end of it: what was written behind the damage,
// acknowledged as synced or not, is rolled back without a word. So every now and then the store
// writes a mark, a number that only grows, into the index with a synced write, and then the same
// mark into this file. An opening whose index holds an older mark than the file has lost writes
// that were durable. A torn tail of the log is behind the last mark that the file knows.
//
// Two slots of 4 KiB are written in turn, each with its checksum, so that a power cut during a
// write leaves the mark before (docs/store_format.md). Owned by one thread.
#ifndef PAGETIDE_KVSTORE_LOG_MARK_H_
#define PAGETIDE_KVSTORE_LOG_MARK_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kvstore/file_system.h"

namespace pagetide {

struct Mark {
  uint64_t number = 0;  // 0: none
  absl::Time at = absl::UnixEpoch();
};

class LogMark {
 public:
  static constexpr uint64_t kSlotBytes = 4096;

  // Opens or makes the file; the caller syncs its folder. A file without an undamaged slot, which
  // is also what a power cut during the first write leaves, holds no mark.
  static absl::StatusOr<std::unique_ptr<LogMark>> Open(const std::string& path, FileSystem* fs);

  const Mark& last() const { return last_; }
  // Durable when it returns OK; else the last one may still be. Numbers only grow.
  absl::Status Write(const Mark& mark);

 private:
  explicit LogMark(std::unique_ptr<File> file) : file_(std::move(file)) {}

  const std::unique_ptr<File> file_;
  Mark last_;
  uint64_t next_slot_ = 0;  // never the one that holds last_
};

}  // namespace pagetide

#endif  // PAGETIDE_KVSTORE_LOG_MARK_H_
