// StreamDeadlines: ends the streams of a server when their time is up. gRPC does so at the deadline
// that a caller sets; a caller that sets none, or one further away than the server allows, could
// otherwise make a handler wait for ever in a Read or a Write, with all that it holds.
//
// One thread, "stream-deadline". Thread-safe; clock and metrics outlive it, and it outlives the
// calls it watches.
#ifndef PAGETIDE_RPC_STREAM_DEADLINES_H_
#define PAGETIDE_RPC_STREAM_DEADLINES_H_

#include <grpcpp/server_context.h>

#include <cstdint>
#include <map>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/string_view.h"
#include "base/clock.h"
#include "base/metrics.h"
#include "base/mutex.h"

namespace pagetide {

class StreamDeadlines {
 public:
  StreamDeadlines(const Clock* clock, Metrics* metrics);
  ~StreamDeadlines();
  StreamDeadlines(const StreamDeadlines&) = delete;
  StreamDeadlines& operator=(const StreamDeadlines&) = delete;

  // Watches a call for as long as it lives: hold it in the handler. At the deadline pending reads
  // and writes of the stream fail, context->IsCancelled() turns true, and the peer gets
  // DEADLINE_EXCEEDED with a text that begins with `what`.
  class Watch {
   public:
    Watch(StreamDeadlines* deadlines, grpc::ServerContext* context, MonotonicTime deadline,
          absl::string_view what);
    ~Watch();
    Watch(const Watch&) = delete;
    Watch& operator=(const Watch&) = delete;

   private:
    StreamDeadlines* const deadlines_;
    const std::pair<MonotonicTime, uint64_t> key_;
  };

 private:
  struct Call {
    grpc::ServerContext* context = nullptr;
    std::string what;
  };

  uint64_t NextNumber();
  void Run();

  const Clock* const clock_;
  Counter* const num_ended_;
  Mutex mu_;
  CondVar changed_;
  bool is_stopping_ ABSL_GUARDED_BY(mu_) = false;
  uint64_t last_number_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t ending_ ABSL_GUARDED_BY(mu_) = 0;  // number of the call being ended now, without mu_
  // By deadline and number.
  std::map<std::pair<MonotonicTime, uint64_t>, Call> calls_ ABSL_GUARDED_BY(mu_);
  std::thread thread_;
};

}  // namespace pagetide

#endif  // PAGETIDE_RPC_STREAM_DEADLINES_H_
