#include "worker/fd_closer.h"

#include <pthread.h>
#include <unistd.h>

#include <thread>

namespace pagetide {

void FdCloser::Close(int fd) {
  {
    MutexLock lock(&state_->mu);
    state_->fds.push_back(fd);
    if (state_->num_threads >= kMaxThreads) return;
    ++state_->num_threads;
  }
  std::thread([state = state_] { Run(*state); }).detach();
}

void FdCloser::Run(State& state) {
  pthread_setname_np(pthread_self(), "fd-closer");
  for (;;) {
    int fd = -1;
    {
      MutexLock lock(&state.mu);
      if (state.fds.empty()) {
        --state.num_threads;
        return;
      }
      fd = state.fds.front();
      state.fds.pop_front();
    }
    close(fd);
  }
}

bool FdCloser::is_full() const {
  MutexLock lock(&state_->mu);
  return state_->fds.size() >= kMaxWaiting;
}

}  // namespace pagetide
