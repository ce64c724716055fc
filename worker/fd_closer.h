// FdCloser: closes descriptors that a stranger sent. The close of a file tells its file system, and
// that may be the stranger's own process (FUSE), which never answers: so it is done by threads that
// nobody waits for. Thread-safe.
#ifndef PAGETIDE_WORKER_FD_CLOSER_H_
#define PAGETIDE_WORKER_FD_CLOSER_H_

#include <cstddef>
#include <deque>
#include <memory>

#include "base/mutex.h"

namespace pagetide {

class FdCloser {
 public:
  static constexpr size_t kMaxThreads = 4;
  static constexpr size_t kMaxWaiting = 1024;

  // Takes a descriptor over.
  void Close(int fd);
  // So many wait for file systems that do not answer that no more should be taken in.
  bool is_full() const;

 private:
  struct State {
    Mutex mu;
    std::deque<int> fds ABSL_GUARDED_BY(mu);
    size_t num_threads ABSL_GUARDED_BY(mu) = 0;
  };
  static void Run(State& state);

  // Shared with the threads: one that is stuck outlives this object.
  const std::shared_ptr<State> state_ = std::make_shared<State>();
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_FD_CLOSER_H_
