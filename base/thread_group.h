// ThreadGroup: named threads that come and go, each joined: by the next Start after its end, or by
// the destructor, which waits for all. A thread may give up what it works for before it returns:
// the group outlives it. Thread-safe; the destructor not from one of its threads.
#ifndef PAGETIDE_BASE_THREAD_GROUP_H_
#define PAGETIDE_BASE_THREAD_GROUP_H_

#include <functional>
#include <list>
#include <string>
#include <thread>
#include <utility>

#include "base/mutex.h"

namespace pagetide {

class ThreadGroup {
 public:
  // The kernel keeps 15 characters of `name`.
  explicit ThreadGroup(std::string name) : name_(std::move(name)) {}
  ~ThreadGroup();
  ThreadGroup(const ThreadGroup&) = delete;
  ThreadGroup& operator=(const ThreadGroup&) = delete;

  // How many run at once is the caller's to bound.
  void Start(std::function<void()> run);
  // Running, or ended and not yet joined.
  size_t size() const;

 private:
  struct Member {
    std::thread thread;
    bool is_over = false;
  };

  const std::string name_;
  mutable Mutex mu_;
  std::list<Member> members_ ABSL_GUARDED_BY(mu_);
};

}  // namespace pagetide

#endif  // PAGETIDE_BASE_THREAD_GROUP_H_
