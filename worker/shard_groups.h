// ShardGroups: the groups that this worker owns: one sequence a rank of a sharded model, of which
// the sequence of rank 0 is open here and names the group. What changes a group takes a turn, so
// that calls of one group do not interleave; what the other ranks hold is asked for within the
// turn, and outside of the lock.
//
// Bounded, in all and by tenant; a group of another tenant is not there. Knows no gRPC.
// Thread-safe; outlives its turns. The clock outlives it.
#ifndef PAGETIDE_WORKER_SHARD_GROUPS_H_
#define PAGETIDE_WORKER_SHARD_GROUPS_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/clock.h"
#include "base/mutex.h"
#include "core/sequence_id.h"

namespace pagetide {

// The sequence of one rank. Ids of other workers are text that their worker made.
struct ShardRank {
  std::string address;  // empty for rank 0
  std::string sequence_id;
  uint64_t epoch = 0;
};

class ShardGroups {
 public:
  struct Options {
    size_t max_groups = 100'000;
    size_t max_groups_of_tenant = 50'000;
  };
  ShardGroups(Options options, Clock* clock) : options_(options), clock_(clock) {}

 private:
  struct Group;

 public:
  // The right to change a group, of one call at a time, until it goes.
  class Turn {
   public:
    ~Turn();
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;
    SequenceId id() const;
    uint64_t epoch() const;
    const std::vector<ShardRank>& ranks() const;
    uint64_t length() const;
    // What the last rewind asked for, if nothing grew since: the group is shorter where a rank was.
    // Else its length.
    uint64_t cut_length() const;
    void SetLength(uint64_t length) { SetLengths(length, length); }
    void SetLengths(uint64_t length, uint64_t cut_length);

   private:
    friend class ShardGroups;
    Turn(ShardGroups* groups, std::shared_ptr<Group> group)
        : groups_(groups), group_(std::move(group)) {}
    ShardGroups* const groups_;
    const std::shared_ptr<Group> group_;  // shared with the table until it ends
  };
  // A group at one moment.
  struct View {
    SequenceId id;
    uint64_t epoch = 0;
    uint64_t length = 0;
    std::vector<ShardRank> ranks;
  };

  // RESOURCE_EXHAUSTED (TOO_MANY_SHARD_GROUPS) with the numbers when there is no room for one more.
  absl::Status CheckRoom(absl::string_view tenant) const;
  // The same if the room went meanwhile. A group of that id that is there already gives way: its
  // sequence was another life of this one.
  absl::Status Add(absl::string_view tenant, View group);
  // Waits until no other call has the turn. NOT_FOUND (SHARD_GROUP_NOT_FOUND), FAILED_PRECONDITION
  // (STALE_EPOCH), DEADLINE_EXCEEDED.
  absl::StatusOr<std::unique_ptr<Turn>> TakeTurn(absl::string_view tenant, SequenceId id,
                                                 uint64_t epoch, MonotonicTime deadline);
  // NOT_FOUND (SHARD_GROUP_NOT_FOUND).
  absl::StatusOr<View> Find(absl::string_view tenant, SequenceId id) const;
  // It ends: nobody finds it any more, and who waits for a turn learns so. Only one of that epoch;
  // nothing if there is none.
  void End(SequenceId id, uint64_t epoch);
  // Id and epoch of each.
  std::vector<std::pair<SequenceId, uint64_t>> List() const;
  size_t size() const;

  static absl::Status NotFound(SequenceId id, absl::string_view why);

 private:
  struct Group {
    std::string tenant;
    SequenceId id;
    uint64_t epoch = 0;
    std::vector<ShardRank> ranks;
    // The rest under the mutex of the table.
    uint64_t length = 0;
    uint64_t cut_length = 0;
    bool is_taken = false;
    bool has_ended = false;
  };

  absl::Status CheckRoomLocked(absl::string_view tenant) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  std::shared_ptr<Group> FindLocked(absl::string_view tenant, SequenceId id) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void EndLocked(absl::flat_hash_map<SequenceId, std::shared_ptr<Group>>::iterator at)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const Options options_;
  Clock* const clock_;
  mutable Mutex mu_;
  CondVar changed_;  // a turn or a group ended
  absl::flat_hash_map<SequenceId, std::shared_ptr<Group>> groups_ ABSL_GUARDED_BY(mu_);
  // Of tenants that have any. Bounded by the groups.
  absl::flat_hash_map<std::string, size_t> by_tenant_ ABSL_GUARDED_BY(mu_);
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_SHARD_GROUPS_H_
