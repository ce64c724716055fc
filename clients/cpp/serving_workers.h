// Which of the processes that a router lists take sequences.
#ifndef PAGETIDE_CLIENTS_CPP_SERVING_WORKERS_H_
#define PAGETIDE_CLIENTS_CPP_SERVING_WORKERS_H_

#include <vector>

#include "pagetide/v1/router.pb.h"

namespace pagetide {

// Of Client::ListWorkers: neither stores nor workers that drain or are gone.
inline std::vector<v1::WorkerInfo> ServingWorkers(const std::vector<v1::WorkerInfo>& all) {
  std::vector<v1::WorkerInfo> serving;
  for (const v1::WorkerInfo& worker : all) {
    if (worker.role() != "store" && worker.state() == "serving") serving.push_back(worker);
  }
  return serving;
}

}  // namespace pagetide

#endif  // PAGETIDE_CLIENTS_CPP_SERVING_WORKERS_H_
