#include "rpc/stream_deadlines.h"

#include <grpc/grpc.h>
#include <pthread.h>

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace pagetide {
namespace {

// How often it looks at the clock at least, which may be moved by hand.
constexpr absl::Duration kLookAgain = absl::Milliseconds(100);

}  // namespace

StreamDeadlines::StreamDeadlines(const Clock* clock, Metrics* metrics)
    : clock_(clock),
      num_ended_(metrics->GetCounter("pagetide_rpc_overdue_streams_total",
                                     "Streams that were ended because their time was up")),
      thread_([this] { Run(); }) {}

StreamDeadlines::~StreamDeadlines() {
  {
    MutexLock lock(&mu_);
    is_stopping_ = true;
  }
  changed_.SignalAll();
  thread_.join();
}

StreamDeadlines::Watch::Watch(StreamDeadlines* deadlines, grpc::ServerContext* context,
                              MonotonicTime deadline, absl::string_view what)
    : deadlines_(deadlines), key_(deadline, deadlines->NextNumber()) {
  bool is_first = false;
  {
    MutexLock lock(&deadlines_->mu_);
    is_first = deadlines_->calls_.empty();
    deadlines_->calls_.emplace(key_, Call{context, std::string(what)});
  }
  // Else it looks soon enough by itself: calls are many and short.
  if (is_first) deadlines_->changed_.SignalAll();
}

StreamDeadlines::Watch::~Watch() {
  MutexLock lock(&deadlines_->mu_);
  deadlines_->calls_.erase(key_);
  // The context is the handler's: it may go when this returns.
  while (deadlines_->ending_ == key_.second) deadlines_->changed_.Wait(&deadlines_->mu_);
}

uint64_t StreamDeadlines::NextNumber() {
  MutexLock lock(&mu_);
  return ++last_number_;
}

void StreamDeadlines::Run() {
  pthread_setname_np(pthread_self(), "stream-deadline");
  MutexLock lock(&mu_);
  while (!is_stopping_) {
    if (calls_.empty()) {
      changed_.Wait(&mu_);
      continue;
    }
    const auto first = calls_.begin();
    const absl::Duration left = first->first.first - clock_->MonotonicNow();
    if (left > absl::ZeroDuration()) {
      changed_.WaitWithTimeout(&mu_, std::min(left, kLookAgain));
      continue;
    }
    ending_ = first->first.second;
    const Call call = std::move(first->second);
    calls_.erase(first);
    mu_.Unlock();
    num_ended_->Increment();
    // As ServerContext::TryCancel, which can say CANCELLED only.
    grpc_call_cancel_with_status(call.context->c_call(), GRPC_STATUS_DEADLINE_EXCEEDED,
                                 absl::StrCat(call.what, ": the time of the call is up").c_str(),
                                 nullptr);
    mu_.Lock();
    ending_ = 0;
    changed_.SignalAll();
  }
}

}  // namespace pagetide
