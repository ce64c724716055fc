#include "worker/request_memos.h"

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace pagetide {
namespace {

// Ids are the caller's; longer ones only waste memory.
constexpr size_t kMaxRequestIdBytes = 256;

}  // namespace

absl::StatusOr<std::string> RequestMemos::Run(
    Scope scope, absl::string_view name, absl::string_view request_id, const Digest& body,
    MonotonicTime deadline, absl::FunctionRef<absl::StatusOr<std::string>()> call) {
  if (request_id.size() > kMaxRequestIdBytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        "request_id has ", request_id.size(), " bytes, must have at most ", kMaxRequestIdBytes));
  }
  const std::pair<std::string, std::string> running{
      absl::StrCat(absl::string_view(reinterpret_cast<const char*>(&scope), 1), name),
      std::string(request_id)};
  std::shared_ptr<RequestMemo> memo;
  {
    MutexLock lock(&mu_);
    while (running_.contains(running)) {
      const absl::Duration left = deadline - clock_->MonotonicNow();
      if (left <= absl::ZeroDuration()) {
        return absl::DeadlineExceededError("the first call with this request_id still runs");
      }
      finished_.WaitWithTimeout(&mu_, left);
    }
    memo = MemoOf(scope, running.first);
    PT_ASSIGN_OR_RETURN(std::optional<std::string> answer, memo->Find(request_id, body));
    if (answer.has_value()) return *std::move(answer);
    running_.insert(running);
  }
  const absl::Cleanup finish = [&] {
    {
      MutexLock lock(&mu_);
      running_.erase(running);
    }
    finished_.SignalAll();
  };
  absl::StatusOr<std::string> answer = call();
  if (answer.ok()) memo->Remember(request_id, body, *answer);
  return answer;
}

std::shared_ptr<RequestMemo> RequestMemos::MemoOf(Scope scope, const std::string& key) {
  const auto it = memos_.find(key);
  if (it != memos_.end()) {
    by_use_.splice(by_use_.end(), by_use_, it->second.by_use);
    return it->second.memo;
  }
  if (memos_.size() >= options_.max_scopes) {
    memos_.erase(by_use_.front());
    by_use_.pop_front();
  }
  auto memo = std::make_shared<RequestMemo>(
      scope == Scope::kTenant ? options_.per_tenant : options_.per_sequence, clock_);
  memos_.emplace(key, ScopedMemo{memo, by_use_.insert(by_use_.end(), key)});
  return memo;
}

void RequestMemos::ForgetSequence(absl::string_view sequence_id) {
  MutexLock lock(&mu_);
  const auto it = memos_.find(absl::StrCat("s", sequence_id));
  if (it == memos_.end()) return;
  by_use_.erase(it->second.by_use);
  memos_.erase(it);
}

}  // namespace pagetide
