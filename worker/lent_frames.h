// LentFrames: frame memory lent to gRPC as slices, without a copy. Each slice holds the pin of its
// rows until the transport has written it; Wait returns when all slices are back. Thread-safe.
#ifndef PAGETIDE_WORKER_LENT_FRAMES_H_
#define PAGETIDE_WORKER_LENT_FRAMES_H_

#include <grpcpp/support/slice.h>

#include <cstddef>
#include <memory>
#include <span>
#include <utility>

#include "absl/time/time.h"
#include "base/clock.h"
#include "base/mutex.h"
#include "rpc/byte_buffer.h"
#include "worker/model_host.h"

namespace pagetide {

class LentFrames {
 public:
  // `bytes` lie in frames that `rows` pins.
  grpc::Slice Lend(std::shared_ptr<const ModelHost::PinnedRows> rows,
                   std::span<const std::byte> bytes) {
    {
      MutexLock lock(&mu_);
      ++num_lent_;
    }
    return LendSlice(bytes, std::make_unique<Loan>(this, std::move(rows)));
  }

  // False if slices are still out when `timeout` has passed.
  bool Wait(absl::Duration timeout) {
    const MonotonicTime deadline = Clock::Real()->MonotonicNow() + timeout;
    MutexLock lock(&mu_);
    while (num_lent_ > 0) {
      const absl::Duration left = deadline - Clock::Real()->MonotonicNow();
      if (left <= absl::ZeroDuration()) return false;
      changed_.WaitWithTimeout(&mu_, left);
    }
    return true;
  }

 private:
  class Loan {
   public:
    // The rows are shared by all slices of one read.
    Loan(LentFrames* lender, std::shared_ptr<const ModelHost::PinnedRows> rows)
        : lender_(lender), rows_(std::move(rows)) {}
    ~Loan() {
      rows_.reset();
      // Signalled under the lock: the lender may be gone as soon as Wait sees zero.
      MutexLock lock(&lender_->mu_);
      --lender_->num_lent_;
      lender_->changed_.SignalAll();
    }

   private:
    LentFrames* const lender_;
    std::shared_ptr<const ModelHost::PinnedRows> rows_;
  };

  Mutex mu_;
  CondVar changed_;
  size_t num_lent_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_LENT_FRAMES_H_
