// PeriodicTask: calls a function again and again on a named thread of its own, first at once, with
// a pause behind each call. The destructor waits for a call that runs and ends the thread.
//
// Thread-safe. What the function uses outlives the task.
#ifndef PAGETIDE_BASE_PERIODIC_TASK_H_
#define PAGETIDE_BASE_PERIODIC_TASK_H_

#include <functional>
#include <string>
#include <thread>

#include "absl/time/time.h"
#include "base/mutex.h"

namespace pagetide {

class PeriodicTask {
 public:
  // `name` is the thread's: its first 15 bytes. `pause` passes on the machine's clock.
  PeriodicTask(const std::string& name, absl::Duration pause, std::function<void()> act);
  ~PeriodicTask();
  PeriodicTask(const PeriodicTask&) = delete;
  PeriodicTask& operator=(const PeriodicTask&) = delete;

 private:
  void Run();

  const absl::Duration pause_;
  const std::function<void()> act_;
  Mutex mu_;
  CondVar changed_;
  bool is_stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::thread thread_;  // last: starts with everything above in place
};

}  // namespace pagetide

#endif  // PAGETIDE_BASE_PERIODIC_TASK_H_
