#include "core/request_memo.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"

namespace pagetide {

RequestMemo::RequestMemo(Options options, Clock* clock) : options_(options), clock_(clock) {}

absl::StatusOr<std::optional<std::string>> RequestMemo::Find(absl::string_view request_id,
                                                             const Digest& body) const {
  if (request_id.empty()) return std::nullopt;
  const MonotonicTime now = clock_->MonotonicNow();
  Digest first_body;
  {
    MutexLock lock(&mu_);
    const auto it = by_id_.find(request_id);
    if (it == by_id_.end() || it->second->forget_at <= now) return std::nullopt;
    if (it->second->body == body) return it->second->answer;
    first_body = it->second->body;
  }
  return WithReason(absl::InvalidArgumentError(
                        absl::StrCat("request_id of ", request_id.size(), " bytes came with body ",
                                     body.ToShortHex(), "…, but was first used with ",
                                     first_body.ToShortHex(), "…: a new request needs a new id")),
                    "REQUEST_ID_REUSED");
}

void RequestMemo::Remember(absl::string_view request_id, const Digest& body, std::string answer) {
  if (request_id.empty() || options_.max_entries == 0) return;
  const MonotonicTime now = clock_->MonotonicNow();
  MutexLock lock(&mu_);
  // All entries live equally long, so the aged ones are in front.
  while (!by_age_.empty() && by_age_.front().forget_at <= now) ForgetOldest();
  if (by_id_.contains(request_id)) return;
  if (by_age_.size() >= options_.max_entries) ForgetOldest();
  const auto it = by_age_.insert(
      by_age_.end(), {std::string(request_id), body, std::move(answer), now + options_.ttl});
  by_id_.emplace(it->request_id, it);
  num_bytes_ += BytesOf(*it);
  while (num_bytes_ > options_.max_bytes && by_age_.size() > 1) ForgetOldest();
}

size_t RequestMemo::size() const {
  MutexLock lock(&mu_);
  return by_age_.size();
}

size_t RequestMemo::num_bytes() const {
  MutexLock lock(&mu_);
  return num_bytes_;
}

void RequestMemo::ForgetOldest() {
  num_bytes_ -= BytesOf(by_age_.front());
  by_id_.erase(by_age_.front().request_id);
  by_age_.pop_front();
}

}  // namespace pagetide
