// CloseSequenceHere: all that goes with the end of a sequence that is open on this worker.
#ifndef PAGETIDE_WORKER_CLOSE_SEQUENCE_H_
#define PAGETIDE_WORKER_CLOSE_SEQUENCE_H_

#include <cstdint>

#include "absl/status/status.h"
#include "base/clock.h"
#include "core/sequence_id.h"
#include "worker/parking.h"
#include "worker/request_memos.h"
#include "worker/worker.h"

namespace pagetide {

// Closes it, forgets its answers, tells routers, and drops what is parked of it. Errors of
// ModelHost::Close and Parking::Drop. Thread-safe.
absl::Status CloseSequenceHere(Worker* worker, Parking* parking, RequestMemos* memos,
                               const Tenant& tenant, ModelHost* host, SequenceId id, uint64_t epoch,
                               MonotonicTime deadline);

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_CLOSE_SEQUENCE_H_
