// AnswerMemory: what was answered to a request id, for a while, so that a repeat gets the same
// answer. Ids of different tenants are apart. Bounded: the oldest goes first.
//
// Not thread-safe: the owner calls it under its lock.
#ifndef PAGETIDE_CORE_ANSWER_MEMORY_H_
#define PAGETIDE_CORE_ANSWER_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "base/clock.h"

namespace pagetide {

// Names a request: the id, and the hash of everything else in it.
struct RequestName {
  std::string tenant;
  std::string request_id;
  uint64_t request_hash = 0;
};

template <typename Answer>
class AnswerMemory {
 public:
  AnswerMemory(absl::Duration retention, size_t max_answers)
      : retention_(retention), max_answers_(max_answers) {}

  // Null if there is none; valid until the next call. INVALID_ARGUMENT when the id was used with
  // another request.
  absl::StatusOr<const Answer*> Find(const RequestName& name, MonotonicTime now) const {
    const auto it = answers_.find(Key(name.tenant, name.request_id));
    if (it == answers_.end() || it->second.expires <= now) return nullptr;
    if (it->second.request_hash != name.request_hash) {
      return absl::InvalidArgumentError(absl::StrCat("request_id ", name.request_id,
                                                     " was used with another request less than ",
                                                     absl::FormatDuration(retention_), " ago"));
    }
    return &it->second.answer;
  }

  // In place of an earlier one.
  void Remember(const RequestName& name, Answer answer, MonotonicTime now) {
    const Key key(name.tenant, name.request_id);
    if (!answers_.contains(key)) {
      while (!order_.empty() && answers_.size() >= max_answers_) {
        answers_.erase(order_.front());
        order_.pop_front();
      }
      order_.push_back(key);
    }
    answers_[key] = {.request_hash = name.request_hash,
                     .expires = now + retention_,
                     .answer = std::move(answer)};
  }

  void DropExpired(MonotonicTime now) {
    while (!order_.empty()) {
      const auto it = answers_.find(order_.front());
      if (it->second.expires > now) break;
      answers_.erase(it);
      order_.pop_front();
    }
  }

 private:
  using Key = std::pair<std::string, std::string>;  // tenant, request id
  struct Remembered {
    uint64_t request_hash = 0;
    MonotonicTime expires;
    Answer answer;
  };

  const absl::Duration retention_;
  const size_t max_answers_;
  absl::flat_hash_map<Key, Remembered> answers_;
  std::deque<Key> order_;  // oldest first
};

}  // namespace pagetide

#endif  // PAGETIDE_CORE_ANSWER_MEMORY_H_
