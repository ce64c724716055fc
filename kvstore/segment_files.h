// SegmentFiles: append-only files that hold page records, "NNNNNNNNNNNN.seg" in one folder.
//
// A writer reserves a range, writes it and commits it; ranges are never written twice. Sync() makes
// all committed ranges durable and returns, per segment, the length below which everything is: a
// *durable length* never covers a range that was still being written. A segment is deleted whole.
// Thread-safe. Readers hold the Segment itself and never take this class's lock; a deleted segment
// stays readable to those who hold it.
#ifndef PAGETIDE_KVSTORE_SEGMENT_FILES_H_
#define PAGETIDE_KVSTORE_SEGMENT_FILES_H_

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/mutex.h"
#include "kvstore/file_system.h"

namespace pagetide {

struct Segment {
  Segment(uint64_t id_in, std::unique_ptr<File> file_in) : id(id_in), file(std::move(file_in)) {}
  const uint64_t id;
  const std::unique_ptr<File> file;
  // Bytes of records that the index points to, or will when their put ends; counted from Commit on,
  // so that a segment that is no longer written to and has none is garbage. Relaxed: whoever chose
  // such a segment (MostDead) has seen the end of every Commit to it.
  std::atomic<uint64_t> live_bytes{0};
};

class SegmentFiles {
 public:
  // Records start at multiples of this.
  static constexpr uint64_t kAlignment = 64;
  // What a record of `bytes` takes up.
  static constexpr uint64_t Footprint(uint64_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }

  struct Options {
    std::string dir;
    FileSystem* fs = FileSystem::Posix();
    // A segment takes no further record once it is this long (a record may be longer).
    uint64_t segment_bytes = uint64_t{64} << 20;
    // New segments get higher ids than this one and those in the folder: what is recorded of a
    // segment that is gone must not be taken for what is known of a new one.
    uint64_t last_known_id = 0;
  };
  struct DurableLength {
    uint64_t segment = 0;
    uint64_t bytes = 0;
  };
  // A reserved range. Must end in Commit or Abandon.
  struct Range {
    std::shared_ptr<Segment> segment;  // shared: readers and reclaim outlive the table's reference
    uint64_t offset = 0;
    uint64_t bytes = 0;
  };

  // Opens what is in the folder. Files whose names are not segments are left alone.
  static absl::StatusOr<std::unique_ptr<SegmentFiles>> Open(Options options);

  absl::StatusOr<Range> Reserve(uint64_t bytes);
  void Commit(const Range& range);
  // After a failed write: the range is never read and its bytes are dead.
  void Abandon(const Range& range);

  // One caller at a time. On error the data of every unsynced range is in doubt.
  absl::StatusOr<std::vector<DurableLength>> Sync();

  // Null when there is no such segment.
  std::shared_ptr<Segment> Find(uint64_t id) const;
  uint64_t SizeOf(uint64_t id) const;
  std::vector<std::shared_ptr<Segment>> All() const;
  // The segment that is not written to now with the most dead bytes, or null when none has any.
  // Not one of `except`.
  std::shared_ptr<Segment> MostDead(const absl::flat_hash_set<uint64_t>& except,
                                    uint64_t* dead_bytes) const;
  // Deletes the file. The caller has made sure that no durable index entry needs it.
  absl::Status Delete(uint64_t id);
  // Ends the head segment if it has that many dead bytes, so that it can be reclaimed as well.
  void SealHead(uint64_t min_dead_bytes);
  uint64_t TotalBytes() const { return total_bytes_.load(std::memory_order_relaxed); }

 private:
  struct State {
    std::shared_ptr<Segment> segment;
    uint64_t size = 0;                 // end of the last reservation
    std::set<uint64_t> being_written;  // offsets of reservations not yet committed
    bool dirty = false;                // has committed bytes that no Sync covered
  };

  explicit SegmentFiles(Options options) : options_(std::move(options)) {}
  std::string PathOf(uint64_t id) const;
  void Finish(const Range& range) ABSL_LOCKS_EXCLUDED(mu_);

  const Options options_;
  std::atomic<uint64_t> total_bytes_{0};
  mutable Mutex mu_;
  std::map<uint64_t, State> segments_ ABSL_GUARDED_BY(mu_);
  uint64_t head_ ABSL_GUARDED_BY(mu_) = 0;  // 0: none
  uint64_t next_id_ ABSL_GUARDED_BY(mu_) = 1;
  bool creating_ ABSL_GUARDED_BY(mu_) = false;
  CondVar created_;
  bool dir_dirty_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace pagetide

#endif  // PAGETIDE_KVSTORE_SEGMENT_FILES_H_
