#include "base/periodic_task.h"

#include <pthread.h>

#include <utility>

namespace pagetide {

PeriodicTask::PeriodicTask(const std::string& name, absl::Duration pause, std::function<void()> act)
    : pause_(pause), act_(std::move(act)), thread_([this] { Run(); }) {
  pthread_setname_np(thread_.native_handle(), name.substr(0, 15).c_str());
}

PeriodicTask::~PeriodicTask() {
  {
    MutexLock lock(&mu_);
    is_stopping_ = true;
  }
  changed_.SignalAll();
  thread_.join();
}

void PeriodicTask::Run() {
  for (;;) {
    act_();
    MutexLock lock(&mu_);
    if (!is_stopping_) changed_.WaitWithTimeout(&mu_, pause_);
    if (is_stopping_) return;
  }
}

}  // namespace pagetide
