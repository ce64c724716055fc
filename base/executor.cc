#include "base/executor.h"

#include <pthread.h>

#include <utility>

#include "absl/strings/str_cat.h"

namespace pagetide {

ThreadPoolExecutor::ThreadPoolExecutor(Options options) : options_(std::move(options)) {
  threads_.reserve(options_.num_threads);
  for (int i = 0; i < options_.num_threads; ++i) {
    threads_.emplace_back([this, i] { Run(i); });
  }
}

ThreadPoolExecutor::~ThreadPoolExecutor() {
  Stop();
}

absl::Status ThreadPoolExecutor::Schedule(std::function<void()> task) {
  {
    MutexLock lock(&mu_);
    if (stopping_)
      return absl::UnavailableError(absl::StrCat("executor ", options_.name, " stops"));
    if (queue_.size() >= options_.max_queue) {
      return absl::ResourceExhaustedError(
          absl::StrCat("queue of ", options_.name, " is full: ", queue_.size(), " tasks"));
    }
    queue_.push_back(std::move(task));
  }
  wake_.Signal();
  return absl::OkStatus();
}

size_t ThreadPoolExecutor::QueueLength() const {
  MutexLock lock(&mu_);
  return queue_.size();
}

void ThreadPoolExecutor::Stop() {
  {
    MutexLock lock(&mu_);
    stopping_ = true;
  }
  wake_.SignalAll();
  for (std::thread& t : threads_) {
    if (t.joinable()) t.join();
  }
}

void ThreadPoolExecutor::Run(int index) {
  // The kernel keeps 15 characters of a thread's name.
  pthread_setname_np(pthread_self(), absl::StrCat(options_.name, "/", index).substr(0, 15).c_str());
  for (;;) {
    std::function<void()> task;
    {
      MutexLock lock(&mu_);
      while (queue_.empty() && !stopping_) wake_.Wait(&mu_);
      if (queue_.empty()) return;
      task = std::move(queue_.front());
      queue_.pop_front();
    }
    task();
  }
}

absl::Status ManualExecutor::Schedule(std::function<void()> task) {
  MutexLock lock(&mu_);
  queue_.push_back(std::move(task));
  return absl::OkStatus();
}

size_t ManualExecutor::QueueLength() const {
  MutexLock lock(&mu_);
  return queue_.size();
}

bool ManualExecutor::RunOne() {
  std::function<void()> task;
  {
    MutexLock lock(&mu_);
    if (queue_.empty()) return false;
    task = std::move(queue_.front());
    queue_.pop_front();
  }
  task();
  return true;
}

void ManualExecutor::RunAll() {
  while (RunOne()) {
  }
}

}  // namespace pagetide
