#include "worker/collective.h"

#include <array>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace pagetide {
namespace {

// How much of the time for a group the faster way may take, so that the slower one can still be
// agreed on.
constexpr double kShareOfJoin = 0.5;

// True if `mine` is true at all members: rank 0 hears all, and tells all.
absl::StatusOr<bool> AllOf(Collective& group, bool mine, MonotonicTime deadline) {
  std::array<std::byte, 1> vote = {std::byte{mine ? uint8_t{1} : uint8_t{0}}};
  const CollectiveBuffer buffer = CollectiveBuffer::Of(vote);
  if (group.rank() == 0) {
    bool all = mine;
    for (uint32_t from = 1; from < group.size(); ++from) {
      PT_RETURN_IF_ERROR(group.Receive(from, buffer, deadline));
      all = all && vote[0] == std::byte{1};
    }
    vote[0] = std::byte{all ? uint8_t{1} : uint8_t{0}};
  } else {
    PT_RETURN_IF_ERROR(group.Send(0, buffer, deadline));
  }
  PT_RETURN_IF_ERROR(group.Broadcast(0, buffer, deadline));
  return vote[0] == std::byte{1};
}

}  // namespace

absl::StatusOr<ChosenCollective> ChooseCollective(std::unique_ptr<Collective> slow, FastLink* fast,
                                                  MonotonicTime deadline) {
  ChosenCollective chosen;
  absl::Status mine =
      fast == nullptr ? absl::FailedPreconditionError("there is no faster way") : fast->Check();
  // Length and bytes of the id.
  std::array<std::byte, FastLink::kMaxIdBytes + 2> id{};
  if (mine.ok() && slow->rank() == 0) {
    absl::StatusOr<std::string> made = fast->MakeId();
    if (made.ok() && made->size() > FastLink::kMaxIdBytes) {
      made = absl::InternalError(absl::StrCat("an id of ", made->size(), " bytes"));
    }
    mine = made.status();
    if (made.ok()) {
      id[0] = std::byte(made->size() & 0xff);
      id[1] = std::byte(made->size() >> 8);
      std::memcpy(id.data() + 2, made->data(), made->size());
    }
  }
  const auto why = [](const absl::Status& status) {
    return status.ok() ? std::string("another member of the group cannot")
                       : std::string(status.message());
  };
  PT_ASSIGN_OR_RETURN(bool all, AllOf(*slow, mine.ok(), deadline));
  if (!all) {
    return ChosenCollective{std::move(slow), why(mine)};
  }
  PT_RETURN_IF_ERROR(slow->Broadcast(0, CollectiveBuffer::Of(id), deadline));
  const size_t id_bytes = std::to_integer<size_t>(id[0]) | std::to_integer<size_t>(id[1]) << 8;
  if (id_bytes > FastLink::kMaxIdBytes) {
    return absl::InternalError(absl::StrCat("rank 0 tells an id of ", id_bytes, " bytes"));
  }
  const MonotonicTime now = Clock::Real()->MonotonicNow();
  const MonotonicTime join_by = deadline == MonotonicTime::InfiniteFuture()
                                    ? deadline
                                    : now + kShareOfJoin * (deadline - now);
  absl::StatusOr<std::unique_ptr<Collective>> joined = fast->Join(
      slow->rank(), slow->size(),
      absl::string_view(reinterpret_cast<const char*>(id.data()) + 2, id_bytes), join_by);
  PT_ASSIGN_OR_RETURN(all, AllOf(*slow, joined.ok(), deadline));
  if (all) return ChosenCollective{*std::move(joined), ""};
  if (joined.ok()) (*joined)->Abort();
  return ChosenCollective{std::move(slow), why(joined.status())};
}

}  // namespace pagetide
