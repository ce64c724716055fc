// ImportStream: one ImportSequence call. Its messages arrive one by one for the thread that works
// on them, which also ends the call: while it waits for a message it may give up, and the caller is
// told why (a handler that blocks in Read cannot).
//
// Read and Finish are of one thread; gRPC calls the rest. Deletes itself when the call is over,
// which is after Finish: nobody touches it then.
#ifndef PAGETIDE_WORKER_IMPORT_STREAM_H_
#define PAGETIDE_WORKER_IMPORT_STREAM_H_

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include "absl/time/time.h"
#include "base/clock.h"
#include "base/mutex.h"
#include "pagetide/v1/session.pb.h"

namespace pagetide {

class ImportStream final : public grpc::ServerReadReactor<v1::ImportSequenceRequest> {
 public:
  // `context` and `clock` outlive it.
  ImportStream(const grpc::CallbackServerContext* context, const Clock* clock)
      : context_(context), clock_(clock) {
    StartRead(&arriving_);
  }

  enum class Outcome { kMessage, kEnd, kBroken, kLate };
  // Waits for the next message. kLate: none came before `give_up`; the stream goes on, but nobody
  // waits.
  Outcome Read(v1::ImportSequenceRequest* message, MonotonicTime give_up);
  bool is_broken() const { return context_->IsCancelled(); }

  void OnReadDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override { delete this; }

 private:
  ~ImportStream() override = default;

  const grpc::CallbackServerContext* const context_;
  const Clock* const clock_;
  // gRPC's from StartRead to OnReadDone, then the reader's.
  v1::ImportSequenceRequest arriving_;
  Mutex mu_;
  CondVar changed_;
  bool has_arrived_ ABSL_GUARDED_BY(mu_) = false;
  bool has_ended_ ABSL_GUARDED_BY(mu_) = false;
  bool is_cancelled_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_IMPORT_STREAM_H_
