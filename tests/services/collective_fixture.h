// What the tests of collectives share: memory, workers, and the emulated NCCL.
#ifndef PAGETIDE_TESTS_SERVICES_COLLECTIVE_FIXTURE_H_
#define PAGETIDE_TESTS_SERVICES_COLLECTIVE_FIXTURE_H_

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "services/worker_role.h"
#include "worker/collective.h"
#include "worker/device_addressed.h"
#include "worker/grpc_collective.h"
#include "worker/nccl_collective.h"

namespace pagetide {

inline constexpr uint64_t kPoolBytes = 8 << 20;

inline MonotonicTime In(absl::Duration d) {
  return Clock::Real()->MonotonicNow() + d;
}
inline MonotonicTime Soon() {
  return In(absl::Seconds(60));
}

// Memory that both hosts and the emulated GPUs address.
class TestPool final : public DevicePool, public DeviceAddressed {
 public:
  uint64_t size_bytes() const override { return bytes_.size(); }
  std::byte* host_view() override { return bytes_.data(); }
  void* device_address() override { return bytes_.data(); }
  absl::Status Write(uint64_t offset, std::span<const std::byte> from) override {
    std::memcpy(bytes_.data() + offset, from.data(), from.size());
    return absl::OkStatus();
  }
  absl::Status Read(uint64_t offset, std::span<std::byte> to) override {
    std::memcpy(to.data(), bytes_.data() + offset, to.size());
    return absl::OkStatus();
  }
  absl::Status Copy(uint64_t, uint64_t, uint64_t) override { return absl::UnimplementedError(""); }
  absl::Status Zero(uint64_t, uint64_t) override { return absl::UnimplementedError(""); }
  absl::Status Attend(const AttentionCall&) override { return absl::UnimplementedError(""); }
  bool CanShift(const GroupGeometry&) const override { return false; }
  absl::Status ReadShifted(const GroupGeometry&, uint64_t, uint32_t, int32_t,
                           std::span<std::byte>) override {
    return absl::UnimplementedError("");
  }
  absl::Status MoveRows(const RowMove&) override { return absl::UnimplementedError(""); }
  PoolExport exported() const override { return {}; }

  std::vector<std::byte>& bytes() { return bytes_; }

 private:
  std::vector<std::byte> bytes_ = std::vector<std::byte>(kPoolBytes);
};

// Runs `member` for each rank at the same time.
inline void ForAll(uint32_t size, const std::function<void(uint32_t)>& member) {
  std::vector<std::thread> threads;
  for (uint32_t rank = 0; rank < size; ++rank) threads.emplace_back(member, rank);
  for (std::thread& thread : threads) thread.join();
}

// Workers whose mailboxes take what members of groups send.
class Workers {
 public:
  Workers(uint32_t size, const std::string& secret) {
    for (uint32_t rank = 0; rank < size; ++rank) {
      WorkerRole::Options options;
      options.worker.id = absl::StrCat("w", rank);
      options.worker.pool_bytes = 1 << 20;
      options.worker.deployment_secret = secret;
      roles_.push_back(WorkerRole::Start(options, nullptr, Clock::Real()).value());
      addresses_.push_back(roles_.back()->address());
    }
  }
  std::unique_ptr<Collective> Make(uint32_t rank, const std::string& group) {
    return GrpcCollective::Create({.group_id = group,
                                   .rank = rank,
                                   .addresses = addresses_,
                                   .tenant = roles_[rank]->worker().TenantNamed("default")},
                                  &roles_[rank]->group_mailbox(), Clock::Real())
        .value();
  }
  std::vector<std::unique_ptr<Collective>> MakeAll(const std::string& group) {
    std::vector<std::unique_ptr<Collective>> all;
    for (uint32_t rank = 0; rank < roles_.size(); ++rank) all.push_back(Make(rank, group));
    return all;
  }
  WorkerRole& role(uint32_t rank) { return *roles_[rank]; }
  const std::vector<std::string>& addresses() const { return addresses_; }

 private:
  std::vector<std::unique_ptr<WorkerRole>> roles_;
  std::vector<std::string> addresses_;
};

inline NcclLink::Options Emulated(int gpu) {
  return {.gpu = gpu, .paths = {.nccl = EMULATED_NCCL, .cuda = EMULATED_NCCL}};
}

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_SERVICES_COLLECTIVE_FIXTURE_H_
