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
  {
    MutexLock lock(&mu_);
    while (running_.contains(running)) {
      const absl::Duration left = deadline - clock_->MonotonicNow();
      if (left <= absl::ZeroDuration()) {
        return absl::DeadlineExceededError("the first call with this request_id still runs");
      }
      finished_.WaitWithTimeout(&mu_, left);
    }
    if (const std::shared_ptr<RequestMemo> memo = FindMemo(running.first)) {
      PT_ASSIGN_OR_RETURN(std::optional<std::string> answer, memo->Find(request_id, body));
      if (answer.has_value()) return *std::move(answer);
    }
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
  if (answer.ok()) {
    MutexLock lock(&mu_);
    Remember(scope, running.first, request_id, body, *answer);
  }
  return answer;
}

std::shared_ptr<RequestMemo> RequestMemos::FindMemo(const std::string& key) {
  const auto it = memos_.find(key);
  if (it == memos_.end()) return nullptr;
  by_use_.splice(by_use_.end(), by_use_, it->second.by_use);
  return it->second.memo;
}

void RequestMemos::Remember(Scope scope, const std::string& key, absl::string_view request_id,
                            const Digest& body, const std::string& answer) {
  if (FindMemo(key) == nullptr) {
    memos_.emplace(
        key, ScopedMemo{
                 std::make_shared<RequestMemo>(
                     scope == Scope::kTenant ? options_.per_tenant : options_.per_sequence, clock_),
                 by_use_.insert(by_use_.end(), key)});
  }
  ScopedMemo& scoped = memos_.find(key)->second;
  scoped.memo->Remember(request_id, body, answer);
  num_bytes_ -= scoped.num_bytes;
  scoped.num_bytes = key.size() + scoped.memo->num_bytes();
  num_bytes_ += scoped.num_bytes;
  // This one is the last in line: it stays.
  while (memos_.size() > 1 &&
         (memos_.size() > options_.max_scopes || num_bytes_ > options_.max_bytes)) {
    Drop(memos_.find(by_use_.front()));
  }
}

void RequestMemos::Drop(absl::flat_hash_map<std::string, ScopedMemo>::iterator at) {
  num_bytes_ -= at->second.num_bytes;
  by_use_.erase(at->second.by_use);
  memos_.erase(at);
}

void RequestMemos::ForgetSequence(absl::string_view tenant, absl::string_view sequence_id) {
  MutexLock lock(&mu_);
  const auto it = memos_.find(absl::StrCat("s", SequenceScope(tenant, sequence_id)));
  if (it != memos_.end()) Drop(it);
}

size_t RequestMemos::num_scopes() const {
  MutexLock lock(&mu_);
  return memos_.size();
}

size_t RequestMemos::num_bytes() const {
  MutexLock lock(&mu_);
  return num_bytes_;
}

}  // namespace pagetide
