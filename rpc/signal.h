// Termination by SIGTERM or SIGINT without asynchronous handlers.
//   int main() {
//     TerminationSignal termination;   // first statement: threads inherit the mask
//     ...start everything...
//     termination.Wait();
//     ...drain, return 0;
//   }
#ifndef PAGETIDE_RPC_SIGNAL_H_
#define PAGETIDE_RPC_SIGNAL_H_

#include <signal.h>

#include <optional>

#include "absl/time/time.h"

namespace pagetide {

// Blocks both signals for the calling thread and all threads that it starts later. Wait from one
// thread.
class TerminationSignal {
 public:
  TerminationSignal();
  // The signals stay blocked: an object that ends while the process drains must not let it be
  // killed.
  ~TerminationSignal() = default;
  TerminationSignal(const TerminationSignal&) = delete;
  TerminationSignal& operator=(const TerminationSignal&) = delete;

  // The number of the signal that came.
  int Wait();
  // Nullopt when none came within `timeout`.
  std::optional<int> WaitFor(absl::Duration timeout);
  // A second signal now ends the process at once: call before a drain that may take long.
  void RestoreDefault();

 private:
  sigset_t signals_;
};

}  // namespace pagetide

#endif  // PAGETIDE_RPC_SIGNAL_H_
