// FaultyDisk: one disk under a RocksdbPageStore that can lose power, fail to sync, fill up, fail to
// read, and be slow. It has two faces: a FileSystem for segment files and a rocksdb::Env for the
// index.
//
// Everything is written through to real files; what no completed sync covered is remembered. After
// CutPower() every call fails, as on a machine that is off; DropUnsynced() then makes the real
// files what such a machine would find: unsynced bytes are gone, or torn, sector by sector; files
// and folders created, or files deleted, without a sync of their folder are back to before.
// Thread-safe. Outlives the stores that use it; DropUnsynced when none does.
#ifndef PAGETIDE_TESTS_FAULT_FAULTY_DISK_H_
#define PAGETIDE_TESTS_FAULT_FAULTY_DISK_H_

#include <atomic>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "base/mutex.h"
#include "kvstore/file_system.h"

namespace rocksdb {
class Env;
}  // namespace rocksdb

namespace pagetide {

class FaultyDisk final : public FileSystem {
 public:
  FaultyDisk();
  ~FaultyDisk() override;

  // For RocksdbPageStoreOptions::index_env.
  rocksdb::Env* env() const { return env_.get(); }

  void CutPower();
  // Applies the loss, decides by `seed` which unsynced sectors made it to the disk, and switches
  // the power on again.
  void DropUnsynced(uint64_t seed);

  // Syncs answer OK and do nothing: the planted bug "acknowledge before fsync".
  void set_ignore_syncs(bool on) { ignore_syncs_ = on; }
  // Syncs answer UNAVAILABLE, and what they should have written is clean to the kernel and not on
  // the disk: reads see it until the cache is dropped or the power, no later sync writes it.
  void set_fail_syncs(bool on) { fail_syncs_ = on; }
  // Writes of segment files answer RESOURCE_EXHAUSTED.
  void set_full(bool on) { full_ = on; }
  // Reads of segment files answer UNAVAILABLE, as EIO does.
  void set_fail_reads(bool on) { fail_reads_ = on; }
  // The same of one file, as a bad sector does; empty: of none.
  void set_unreadable_file(std::string path) ABSL_LOCKS_EXCLUDED(mu_);
  // While on, each read, write and sync of a segment file that begins waits.
  void set_stuck(bool on);
  uint64_t num_reads() const { return num_reads_; }
  // A disk of that size with nothing on it but the folder that is asked for; 0: the machine's.
  void set_disk_bytes(uint64_t bytes) { disk_bytes_ = bytes; }
  // What FreeBytes answers; 0: the truth.
  void set_free_bytes(uint64_t bytes) { free_bytes_ = bytes; }
  uint64_t num_syncs() const { return num_syncs_; }
  uint64_t dropped_bytes() const;

  absl::StatusOr<bool> CreateDir(const std::string& dir) override;
  absl::StatusOr<std::unique_ptr<File>> CreateFile(const std::string& path) override;
  absl::StatusOr<std::unique_ptr<File>> OpenFile(const std::string& path) override;
  absl::Status DeleteFile(const std::string& path) override;
  absl::Status SyncDir(const std::string& dir) override;
  absl::StatusOr<std::vector<std::string>> List(const std::string& dir) override;
  absl::StatusOr<uint64_t> FreeBytes(const std::string& dir) override;

 private:
  class SegmentFile;
  class IndexFileSystem;
  class IndexFile;

  struct Range {
    uint64_t offset = 0, bytes = 0;
    bool operator<(const Range& other) const {
      return offset != other.offset ? offset < other.offset : bytes < other.bytes;
    }
  };
  struct FileState {
    std::multiset<Range> being_written;  // a sync does not cover them
    std::multiset<Range> unsynced;
    std::vector<Range> lost;  // a sync of them failed: read as written until the cache is dropped
    uint64_t synced_size = 0;
    bool is_index = false;  // appended to only
  };

  // Waits while the disk is stuck.
  void WaitWhileStuck() const ABSL_LOCKS_EXCLUDED(stuck_mu_);
  bool IsUnreadable(const std::string& path) const ABSL_LOCKS_EXCLUDED(mu_);
  // OK or "the power is off".
  absl::Status CheckPower() const;
  // Registers the end of a write; false: the power went off in between.
  bool EndWrite(const std::string& path, Range range) ABSL_LOCKS_EXCLUDED(mu_);
  void BeginWrite(const std::string& path, Range range) ABSL_LOCKS_EXCLUDED(mu_);
  absl::Status SyncFile(const std::string& path) ABSL_LOCKS_EXCLUDED(mu_);
  absl::Status DropCache(const std::string& path, uint64_t from) ABSL_LOCKS_EXCLUDED(mu_);

  std::atomic<bool> power_off_{false};
  std::atomic<bool> ignore_syncs_{false};
  std::atomic<bool> fail_syncs_{false};
  std::atomic<bool> full_{false};
  std::atomic<bool> fail_reads_{false};
  mutable std::atomic<uint64_t> num_reads_{0};
  std::atomic<uint64_t> disk_bytes_{0};
  std::atomic<uint64_t> free_bytes_{0};
  std::atomic<uint64_t> num_syncs_{0};
  mutable Mutex stuck_mu_;
  mutable CondVar unstuck_;
  bool is_stuck_ ABSL_GUARDED_BY(stuck_mu_) = false;

  mutable Mutex mu_;
  std::string unreadable_file_ ABSL_GUARDED_BY(mu_);
  std::map<std::string, FileState> files_ ABSL_GUARDED_BY(mu_);
  std::set<std::string> created_ ABSL_GUARDED_BY(mu_);  // folder not synced since
  std::set<std::string> created_dirs_ ABSL_GUARDED_BY(mu_);
  std::set<std::string> deleted_ ABSL_GUARDED_BY(mu_);  // kept as PATH.deleted until it is
  uint64_t dropped_bytes_ ABSL_GUARDED_BY(mu_) = 0;
  std::unique_ptr<rocksdb::Env> env_;
};

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_FAULT_FAULTY_DISK_H_
