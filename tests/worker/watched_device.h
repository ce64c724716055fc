// A device for tests that do something while rows are copied.
#ifndef PAGETIDE_TESTS_WORKER_WATCHED_DEVICE_H_
#define PAGETIDE_TESTS_WORKER_WATCHED_DEVICE_H_

#include <atomic>
#include <functional>
#include <memory>
#include <span>
#include <utility>

#include "worker/cpu_device.h"

namespace pagetide {

// A CPU device that tells of the first copy within its pool, or read of it, before it is made. Its
// pools have no host view, as those of a GPU, unless they are asked for with one.
class WatchedDevice final : public Device {
 public:
  explicit WatchedDevice(bool has_host_view = false) : has_host_view_(has_host_view) {}
  void OnNextCopy(std::function<void()> fn) {
    on_copy_ = std::move(fn);
    is_armed_ = true;
  }
  void OnNextRead(std::function<void()> fn) {
    on_read_ = std::move(fn);
    is_read_armed_ = true;
  }
  absl::string_view name() const override { return "watched"; }
  absl::StatusOr<std::unique_ptr<DevicePool>> CreatePool(uint64_t size_bytes) override {
    auto pool = cpu_.CreatePool(size_bytes);
    if (!pool.ok()) return pool.status();
    return std::make_unique<Pool>(this, *std::move(pool));
  }

 private:
  class Pool final : public DevicePool {
   public:
    Pool(WatchedDevice* device, std::unique_ptr<DevicePool> pool)
        : device_(device), pool_(std::move(pool)) {}
    uint64_t size_bytes() const override { return pool_->size_bytes(); }
    std::byte* host_view() override {
      return device_->has_host_view_ ? pool_->host_view() : nullptr;
    }
    absl::Status Write(uint64_t offset, std::span<const std::byte> from) override {
      return pool_->Write(offset, from);
    }
    absl::Status Read(uint64_t offset, std::span<std::byte> to) override {
      if (device_->is_read_armed_.exchange(false)) device_->on_read_();
      return pool_->Read(offset, to);
    }
    absl::Status Copy(uint64_t to, uint64_t from, uint64_t num_bytes) override {
      if (device_->is_armed_.exchange(false)) device_->on_copy_();
      return pool_->Copy(to, from, num_bytes);
    }
    absl::Status Zero(uint64_t offset, uint64_t num_bytes) override {
      return pool_->Zero(offset, num_bytes);
    }
    absl::Status Attend(const AttentionCall& call) override { return pool_->Attend(call); }
    bool CanShift(const GroupGeometry& group) const override { return pool_->CanShift(group); }
    absl::Status ReadShifted(const GroupGeometry& group, uint64_t offset, uint32_t num_rows,
                             int32_t delta, std::span<std::byte> to) override {
      return pool_->ReadShifted(group, offset, num_rows, delta, to);
    }
    absl::Status MoveRows(const RowMove& move) override { return pool_->MoveRows(move); }
    PoolExport exported() const override { return {}; }

   private:
    WatchedDevice* const device_;
    const std::unique_ptr<DevicePool> pool_;
  };

  const bool has_host_view_;
  CpuDevice cpu_;
  std::function<void()> on_copy_;
  std::atomic<bool> is_armed_{false};
  std::function<void()> on_read_;
  std::atomic<bool> is_read_armed_{false};
};

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_WORKER_WATCHED_DEVICE_H_
