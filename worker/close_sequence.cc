#include "worker/close_sequence.h"

#include "base/status_macros.h"

namespace pagetide {

absl::Status CloseSequenceHere(Worker* worker, Parking* parking, RequestMemos* memos,
                               const Tenant& tenant, ModelHost* host, SequenceId id, uint64_t epoch,
                               MonotonicTime deadline) {
  const bool is_durable = parking->Owns(id);
  PT_RETURN_IF_ERROR(host->Close(tenant, id, epoch));
  memos->ForgetSequence(tenant.name, id.ToString());
  worker->NoteClosed(*host, tenant, id);
  if (!is_durable) return absl::OkStatus();
  return parking->Drop(tenant, id, epoch, deadline).status();
}

}  // namespace pagetide
