// WorkerMetrics: turns what hosts count into metrics pagetide_worker_*. Owned by one thread.
#ifndef PAGETIDE_WORKER_WORKER_METRICS_H_
#define PAGETIDE_WORKER_WORKER_METRICS_H_

#include <cstdint>
#include <map>
#include <vector>

#include "base/digest.h"
#include "base/metrics.h"
#include "worker/byte_gauge.h"
#include "worker/model_host.h"

namespace pagetide {

class WorkerMetrics {
 public:
  // `metrics` outlives this.
  explicit WorkerMetrics(Metrics* metrics) : metrics_(metrics) {}

  // Call it every tick: counters move by what hosts counted since the last call.
  void Update(const ByteGauge& staged_rows, const std::vector<ModelHost*>& hosts,
              size_t open_leases);

 private:
  Metrics* const metrics_;
  HostCounters last_;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_WORKER_METRICS_H_
