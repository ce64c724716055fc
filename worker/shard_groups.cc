#include "worker/shard_groups.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "base/error_info.h"
#include "base/status_macros.h"

namespace pagetide {

absl::Status ShardGroups::NotFound(SequenceId id, absl::string_view why) {
  return WithReason(absl::NotFoundError(absl::StrCat("shard group ", id.ToString(), ": ", why)),
                    "SHARD_GROUP_NOT_FOUND");
}

ShardGroups::Turn::~Turn() {
  {
    MutexLock lock(&groups_->mu_);
    group_->is_taken = false;
  }
  groups_->changed_.SignalAll();
}

SequenceId ShardGroups::Turn::id() const {
  return group_->id;
}

uint64_t ShardGroups::Turn::epoch() const {
  return group_->epoch;
}

const std::vector<ShardRank>& ShardGroups::Turn::ranks() const {
  return group_->ranks;
}

uint64_t ShardGroups::Turn::length() const {
  MutexLock lock(&groups_->mu_);
  return group_->length;
}

uint64_t ShardGroups::Turn::cut_length() const {
  MutexLock lock(&groups_->mu_);
  return group_->cut_length;
}

void ShardGroups::Turn::SetLengths(uint64_t length, uint64_t cut_length) {
  MutexLock lock(&groups_->mu_);
  group_->length = length;
  group_->cut_length = cut_length;
}

absl::Status ShardGroups::CheckRoomLocked(absl::string_view tenant) const {
  const auto held = by_tenant_.find(tenant);
  const size_t of_tenant = held == by_tenant_.end() ? 0 : held->second;
  if (groups_.size() < options_.max_groups && of_tenant < options_.max_groups_of_tenant) {
    return absl::OkStatus();
  }
  return WithRetryDelay(
      WithReason(absl::ResourceExhaustedError(
                     absl::StrCat("open shard group: ", groups_.size(), " are open, ", of_tenant,
                                  " of this tenant; the limits are ", options_.max_groups, " and ",
                                  options_.max_groups_of_tenant)),
                 "TOO_MANY_SHARD_GROUPS"),
      absl::Seconds(1));
}

absl::Status ShardGroups::CheckRoom(absl::string_view tenant) const {
  MutexLock lock(&mu_);
  return CheckRoomLocked(tenant);
}

absl::Status ShardGroups::Add(absl::string_view tenant, View group) {
  auto added = std::make_shared<Group>();
  added->tenant = std::string(tenant);
  added->id = group.id;
  added->epoch = group.epoch;
  added->ranks = std::move(group.ranks);
  added->length = group.length;
  added->cut_length = group.length;
  {
    MutexLock lock(&mu_);
    if (const auto it = groups_.find(group.id); it != groups_.end()) EndLocked(it);
    PT_RETURN_IF_ERROR(CheckRoomLocked(tenant));
    ++by_tenant_[added->tenant];
    groups_.emplace(added->id, added);
  }
  changed_.SignalAll();
  return absl::OkStatus();
}

std::shared_ptr<ShardGroups::Group> ShardGroups::FindLocked(absl::string_view tenant,
                                                            SequenceId id) const {
  const auto it = groups_.find(id);
  return it == groups_.end() || it->second->tenant != tenant ? nullptr : it->second;
}

absl::StatusOr<std::unique_ptr<ShardGroups::Turn>> ShardGroups::TakeTurn(absl::string_view tenant,
                                                                         SequenceId id,
                                                                         uint64_t epoch,
                                                                         MonotonicTime deadline) {
  MutexLock lock(&mu_);
  const std::shared_ptr<Group> group = FindLocked(tenant, id);
  if (group == nullptr) return NotFound(id, "it is not open on this worker");
  if (group->epoch != epoch) {
    return WithReason(absl::FailedPreconditionError(absl::StrCat(
                          "shard group ", id.ToString(), ": epoch ", epoch, " != ", group->epoch)),
                      error_reason::kStaleEpoch, {{"epoch", absl::StrCat(group->epoch)}});
  }
  while (group->is_taken && !group->has_ended) {
    const absl::Duration left = deadline - clock_->MonotonicNow();
    if (left <= absl::ZeroDuration()) {
      return absl::DeadlineExceededError(
          absl::StrCat("shard group ", id.ToString(), ": another call that changes it still runs"));
    }
    changed_.WaitWithTimeout(&mu_, left);
  }
  if (group->has_ended) return NotFound(id, "it ended meanwhile");
  group->is_taken = true;
  return std::unique_ptr<Turn>(new Turn(this, group));
}

absl::StatusOr<ShardGroups::View> ShardGroups::Find(absl::string_view tenant, SequenceId id) const {
  MutexLock lock(&mu_);
  const std::shared_ptr<Group> group = FindLocked(tenant, id);
  if (group == nullptr) return NotFound(id, "it is not open on this worker");
  return View{group->id, group->epoch, group->length, group->ranks};
}

void ShardGroups::EndLocked(absl::flat_hash_map<SequenceId, std::shared_ptr<Group>>::iterator at) {
  Group& group = *at->second;
  group.has_ended = true;
  const auto held = by_tenant_.find(group.tenant);
  if (--held->second == 0) by_tenant_.erase(held);
  groups_.erase(at);
}

void ShardGroups::End(SequenceId id, uint64_t epoch) {
  {
    MutexLock lock(&mu_);
    const auto it = groups_.find(id);
    if (it == groups_.end() || it->second->epoch != epoch) return;
    EndLocked(it);
  }
  changed_.SignalAll();
}

std::vector<std::pair<SequenceId, uint64_t>> ShardGroups::List() const {
  MutexLock lock(&mu_);
  std::vector<std::pair<SequenceId, uint64_t>> list;
  list.reserve(groups_.size());
  for (const auto& [id, group] : groups_) list.emplace_back(id, group->epoch);
  return list;
}

size_t ShardGroups::size() const {
  MutexLock lock(&mu_);
  return groups_.size();
}

}  // namespace pagetide
