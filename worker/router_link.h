// RouterLink: a worker's stream to one router. It attaches, reports load every heartbeat, residency
// and sequences as they change, sends a snapshot when the router asks, and attaches again with
// back-off when the stream ends. A worker has one link a router, all reading the same journal.
//
// Threads: "router-link" owns the stream and writes; "router-link-rd" reads directives while a
// stream is up. Both are joined by the destructor. The journal and the callbacks outlive the link;
// callbacks run on its threads, without a lock.
#ifndef PAGETIDE_WORKER_ROUTER_LINK_H_
#define PAGETIDE_WORKER_ROUTER_LINK_H_

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "base/mutex.h"
#include "pagetide/v1/worker_registry.grpc.pb.h"
#include "worker/report_journal.h"

namespace pagetide {

class RouterLink {
 public:
  struct Options {
    std::string router_address;  // for log lines
    v1::AttachHello hello;
    // Until the router's welcome says otherwise.
    absl::Duration heartbeat = absl::Milliseconds(500);
    absl::Duration initial_backoff = absl::Milliseconds(100);
    absl::Duration max_backoff = absl::Seconds(2);
    // Changes are collected for so long before they are sent.
    absl::Duration batch_delay = absl::Milliseconds(10);
    size_t max_changes_per_report = 4096;
    size_t max_sequences_per_report = 4096;
  };
  // What the worker says of itself at each heartbeat; `number` is set by the link.
  using LoadCallback = std::function<v1::LoadReport()>;
  // The router asks the worker to drain. May be null.
  using DrainCallback = std::function<void()>;

  RouterLink(Options options, std::shared_ptr<grpc::Channel> channel, ReportJournal* journal,
             LoadCallback load, DrainCallback drain = nullptr);
  ~RouterLink();
  RouterLink(const RouterLink&) = delete;
  RouterLink& operator=(const RouterLink&) = delete;

  // Reports the load now, not with the next heartbeat: what it says is news. Does not wait for it.
  void ReportLoad();

  // The router has welcomed this worker on the present stream.
  bool is_attached() const;
  // Streams that were welcomed since start.
  uint64_t num_attachments() const;
  // Residency snapshots that were sent since start, one a stream and one for each directive.
  uint64_t num_snapshots() const;

 private:
  using Stream = grpc::ClientReaderWriter<v1::AttachRequest, v1::AttachResponse>;

  void Run();
  // From hello to the end of the stream.
  absl::Status RunStream();
  void ReadDirectives(Stream* stream);
  // Writes reports until the stream breaks or the link stops.
  void WriteReports(Stream* stream);
  bool WriteLoad(Stream* stream, uint64_t number);
  bool WriteSequences(Stream* stream, uint64_t* position);
  // One report, or all parts of a snapshot. Sets *is_idle when there was nothing to send.
  bool WriteResidency(Stream* stream, uint64_t* position, uint64_t* number, bool* is_idle);
  // True when the stream is to end.
  bool IsEnding() const;
  // Returns early, with false, when the stream is to end.
  bool Pause(absl::Duration duration);

  const Options options_;
  const std::unique_ptr<v1::WorkerRegistryService::Stub> stub_;
  ReportJournal* const journal_;
  const LoadCallback load_;
  const DrainCallback drain_;

  mutable Mutex mu_;
  CondVar ending_changed_;
  bool is_stopping_ ABSL_GUARDED_BY(mu_) = false;
  bool is_broken_ ABSL_GUARDED_BY(mu_) = false;  // the present stream
  bool is_attached_ ABSL_GUARDED_BY(mu_) = false;
  bool is_snapshot_asked_ ABSL_GUARDED_BY(mu_) = false;
  bool is_load_news_ ABSL_GUARDED_BY(mu_) = false;
  absl::Duration heartbeat_ ABSL_GUARDED_BY(mu_);
  uint64_t num_attachments_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t num_snapshots_ ABSL_GUARDED_BY(mu_) = 0;
  grpc::ClientContext* context_ ABSL_GUARDED_BY(mu_) = nullptr;  // of the present stream

  std::thread thread_;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_ROUTER_LINK_H_
