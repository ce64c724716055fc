// Executor: named threads behind a bounded queue. Schedule refuses with RESOURCE_EXHAUSTED when the
// queue is full, and never blocks. The destructor runs what was accepted, then joins.
#ifndef PAGETIDE_BASE_EXECUTOR_H_
#define PAGETIDE_BASE_EXECUTOR_H_

#include <cstddef>
#include <deque>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "base/mutex.h"

namespace pagetide {

// Port, so that tests run tasks by hand. Thread-safe.
class Executor {
 public:
  virtual ~Executor() = default;
  // RESOURCE_EXHAUSTED when the queue is full, UNAVAILABLE after Stop().
  virtual absl::Status Schedule(std::function<void()> task) = 0;
  // Tasks waiting, not counting those running.
  virtual size_t QueueLength() const = 0;
};

class ThreadPoolExecutor final : public Executor {
 public:
  struct Options {
    std::string name = "pool";  // thread names are name/0, name/1, …
    int num_threads = 2;
    size_t max_queue = 1024;
  };
  explicit ThreadPoolExecutor(Options options);
  ~ThreadPoolExecutor() override;

  absl::Status Schedule(std::function<void()> task) override;
  size_t QueueLength() const override;
  // Refuses new tasks, runs the accepted ones, joins. Idempotent; not from a task.
  void Stop();

 private:
  void Run(int index);

  const Options options_;
  mutable Mutex mu_;
  CondVar wake_;
  std::deque<std::function<void()>> queue_ ABSL_GUARDED_BY(mu_);
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::vector<std::thread> threads_;  // const after construction until Stop
};

// Runs nothing until RunAll() or RunOne(). For tests.
class ManualExecutor final : public Executor {
 public:
  absl::Status Schedule(std::function<void()> task) override;
  size_t QueueLength() const override;
  // Returns false when nothing waited.
  bool RunOne();
  void RunAll();

 private:
  mutable Mutex mu_;
  std::deque<std::function<void()>> queue_ ABSL_GUARDED_BY(mu_);
};

}  // namespace pagetide

#endif  // PAGETIDE_BASE_EXECUTOR_H_
