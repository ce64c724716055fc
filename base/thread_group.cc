#include "base/thread_group.h"

#include <pthread.h>

#include <iterator>
#include <utility>

namespace pagetide {

ThreadGroup::~ThreadGroup() {
  std::list<Member> all;
  {
    MutexLock lock(&mu_);
    // Nodes do not move: the threads still find theirs.
    all.splice(all.end(), members_);
  }
  for (Member& member : all) member.thread.join();
}

void ThreadGroup::Start(std::function<void()> run) {
  std::list<Member> over;
  {
    MutexLock lock(&mu_);
    for (auto it = members_.begin(); it != members_.end();) {
      const auto next = std::next(it);
      if (it->is_over) over.splice(over.end(), members_, it);
      it = next;
    }
    members_.emplace_back();
    Member* const member = &members_.back();
    // It waits for the lock before it says that it is over: by then it is here.
    member->thread = std::thread([this, member, run = std::move(run)] {
      pthread_setname_np(pthread_self(), name_.substr(0, 15).c_str());
      run();
      MutexLock thread_lock(&mu_);
      member->is_over = true;
    });
  }
  for (Member& member : over) member.thread.join();
}

size_t ThreadGroup::size() const {
  MutexLock lock(&mu_);
  return members_.size();
}

}  // namespace pagetide
