// NcclCollective: a Collective between GPUs over NCCL, from and to pools that a GPU addresses. Its
// communicator never blocks: every call polls, so that a member that died costs the others their
// deadline and not their life; ncclCommAbort ends what is under way then.
//
// NcclLink makes it, as the faster way that ChooseCollective looks for. Both are there in every
// build; where NCCL, a driver or a GPU is not, Check says so.
#ifndef PAGETIDE_WORKER_NCCL_COLLECTIVE_H_
#define PAGETIDE_WORKER_NCCL_COLLECTIVE_H_

#include <atomic>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "worker/collective.h"
#include "worker/nccl_library.h"

namespace pagetide {

// For one thread at a time. The clock outlives it and what it makes.
class NcclLink final : public FastLink {
 public:
  struct Options {
    int gpu = 0;  // ordinal
    NcclLibrary::Paths paths;
  };
  NcclLink(Options options, const Clock* clock) : options_(std::move(options)), clock_(clock) {}

  absl::string_view name() const override { return "nccl"; }
  // FAILED_PRECONDITION (NO_NCCL, NO_GPU) with what the loader or the driver said.
  absl::Status Check() override;
  absl::StatusOr<std::string> MakeId() override;
  // DEADLINE_EXCEEDED: not all members joined; FAILED_PRECONDITION (NCCL_FAILED): what NCCL said,
  // such as of two ranks on one GPU.
  absl::StatusOr<std::unique_ptr<Collective>> Join(uint32_t rank, uint32_t size,
                                                   absl::string_view id,
                                                   MonotonicTime deadline) override;

 private:
  const Options options_;
  const Clock* const clock_;
  std::shared_ptr<const NcclLibrary> library_;  // shared with the collectives
};

class NcclCollective final : public Collective {
 public:
  ~NcclCollective() override;
  NcclCollective(const NcclCollective&) = delete;
  NcclCollective& operator=(const NcclCollective&) = delete;

  absl::string_view name() const override { return "nccl"; }
  uint32_t rank() const override { return rank_; }
  uint32_t size() const override { return size_; }
  absl::Status Broadcast(uint32_t root, const CollectiveBuffer& buffer,
                         MonotonicTime deadline) override;
  absl::Status Send(uint32_t to, const CollectiveBuffer& buffer, MonotonicTime deadline) override;
  absl::Status Receive(uint32_t from, const CollectiveBuffer& buffer,
                       MonotonicTime deadline) override;
  void Abort() override { is_aborted_ = true; }

 private:
  friend class NcclLink;
  NcclCollective(std::shared_ptr<const NcclLibrary> library, const Clock* clock, uint32_t rank,
                 uint32_t size)
      : library_(std::move(library)), clock_(clock), rank_(rank), size_(size) {}
  absl::Status Open(int gpu, const NcclUniqueId& id, MonotonicTime deadline);
  // Checks, enqueues what `start` starts, and waits for it.
  absl::Status Run(absl::string_view action, uint32_t peer, bool may_be_self,
                   const CollectiveBuffer& buffer, MonotonicTime deadline,
                   const std::function<int(void* address)>& start);
  // Until NCCL has taken what was started.
  absl::Status WaitTaken(absl::string_view action, int result, MonotonicTime deadline);
  absl::Status WaitStream(absl::string_view action, MonotonicTime deadline);
  absl::Status CheckTime(absl::string_view action, MonotonicTime deadline) const;
  absl::Status Failed(absl::string_view action, int result) const;
  // Ends the communicator at once; nothing of it runs any more.
  void Drop();

  const std::shared_ptr<const NcclLibrary> library_;
  const Clock* const clock_;
  const uint32_t rank_;
  const uint32_t size_;
  int device_ = -1;  // retained
  void* context_ = nullptr;
  void* stream_ = nullptr;
  void* comm_ = nullptr;  // null: broken
  std::atomic<bool> is_aborted_{false};
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_NCCL_COLLECTIVE_H_
