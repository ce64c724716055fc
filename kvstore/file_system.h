// FileSystem, File: the seam between page bodies and the disk, so that tests can tear, drop, flip,
// refuse and delay what the store writes. Posix below; the index has RocksDB's own seam
// (rocksdb::Env).
//
// Both are thread-safe; writers of one file write disjoint ranges. Error codes: RESOURCE_EXHAUSTED
// when the disk is full, NOT_FOUND for a file that is not there, UNAVAILABLE for every other
// refusal.
#ifndef PAGETIDE_KVSTORE_FILE_SYSTEM_H_
#define PAGETIDE_KVSTORE_FILE_SYSTEM_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace pagetide {

class File {
 public:
  virtual ~File() = default;
  // Writes first and second back to back at `offset`; all of it or an error (some may be written).
  virtual absl::Status WriteAt(uint64_t offset, std::span<const std::byte> first,
                               std::span<const std::byte> second) = 0;
  // Fills first, then second, from `offset`. Returns the bytes read: fewer only at the end of the
  // file.
  virtual absl::StatusOr<uint64_t> ReadAt(uint64_t offset, std::span<std::byte> first,
                                          std::span<std::byte> second) const = 0;
  // Returns when data and size survive power loss. After an error nothing may be assumed of any
  // unsynced byte, and a later success proves nothing (the kernel drops the pages it could not
  // write).
  virtual absl::Status Sync() = 0;
  // Later reads at or behind `offset` come from the disk, as far as Sync had left nothing to write
  // there: what only the kernel's page cache holds, because writing it failed, is gone.
  virtual absl::Status DropCacheFrom(uint64_t offset) = 0;
  virtual absl::StatusOr<uint64_t> Size() const = 0;
};

class FileSystem {
 public:
  virtual ~FileSystem() = default;
  // Makes the folder and those above it that are absent. Each that it made survives power loss when
  // it returns.
  absl::Status CreateDirs(const std::string& dir);
  // Makes one folder, its parent not yet synced. False: it is there. NOT_FOUND: its parent is not.
  virtual absl::StatusOr<bool> CreateDir(const std::string& dir) = 0;
  // Fails if the file exists.
  virtual absl::StatusOr<std::unique_ptr<File>> CreateFile(const std::string& path) = 0;
  virtual absl::StatusOr<std::unique_ptr<File>> OpenFile(const std::string& path) = 0;
  virtual absl::Status DeleteFile(const std::string& path) = 0;
  // Makes creations and deletions in `dir` survive power loss.
  virtual absl::Status SyncDir(const std::string& dir) = 0;
  // Names without path, unordered, without "." and "..".
  virtual absl::StatusOr<std::vector<std::string>> List(const std::string& dir) = 0;
  // Bytes that an unprivileged process may still write.
  virtual absl::StatusOr<uint64_t> FreeBytes(const std::string& dir) = 0;
  // The file system of the machine; lives for ever.
  static FileSystem* Posix();
};

}  // namespace pagetide

#endif  // PAGETIDE_KVSTORE_FILE_SYSTEM_H_
