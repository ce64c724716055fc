#include "worker/cpu_device.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/copy_bytes.h"
#include "base/status_macros.h"
#include "kernels/paged_attention.h"
#include "worker/attention_call.h"
#include "worker/k_shift.h"
#include "worker/row_move.h"

namespace pagetide {
namespace {

absl::Status ErrnoError(absl::string_view action, uint64_t size_bytes, int error) {
  std::string text = absl::StrCat(action, " a pool of ", size_bytes, " bytes: ", strerror(error));
  if (error == ENOMEM || error == ENOSPC || error == EFBIG || error == EMFILE || error == ENFILE) {
    return absl::ResourceExhaustedError(text);
  }
  return absl::InternalError(text);
}

class CpuPool final : public DevicePool {
 public:
  static absl::StatusOr<std::unique_ptr<DevicePool>> Create(uint64_t size_bytes,
                                                            const CpuDevice::Options& options) {
    // Half made pools clean up after themselves.
    auto pool = std::unique_ptr<CpuPool>(new CpuPool(size_bytes));
    PT_RETURN_IF_ERROR(pool->Init(options));
    return std::unique_ptr<DevicePool>(std::move(pool));
  }

  ~CpuPool() override {
    if (base_ != nullptr) munmap(base_, size_bytes_);
    if (fd_ >= 0) close(fd_);
  }
  CpuPool(const CpuPool&) = delete;
  CpuPool& operator=(const CpuPool&) = delete;

  uint64_t size_bytes() const override { return size_bytes_; }
  std::byte* host_view() override { return base_; }
  absl::Status MoveRows(const RowMove& move) override {
    PT_RETURN_IF_ERROR(CheckRowMove(move, size_bytes_));
    MoveRowsOnHost(move, base_);
    return absl::OkStatus();
  }

  PoolExport exported() const override {
    return {.kind = PoolExport::Kind::kMemfd, .fd = fd_, .mapped_bytes = size_bytes_};
  }

  absl::Status Write(uint64_t offset, std::span<const std::byte> from) override {
    PT_RETURN_IF_ERROR(CheckRange("write to", offset, from.size()));
    CopyBytes(from, base_ + offset);
    return absl::OkStatus();
  }

  absl::Status Read(uint64_t offset, std::span<std::byte> to) override {
    PT_RETURN_IF_ERROR(CheckRange("read from", offset, to.size()));
    CopyBytes({base_ + offset, to.size()}, to.data());
    return absl::OkStatus();
  }

  absl::Status Copy(uint64_t to, uint64_t from, uint64_t num_bytes) override {
    PT_RETURN_IF_ERROR(CheckRange("copy from", from, num_bytes));
    PT_RETURN_IF_ERROR(CheckRange("copy to", to, num_bytes));
    std::memmove(base_ + to, base_ + from, num_bytes);
    return absl::OkStatus();
  }

  absl::Status Zero(uint64_t offset, uint64_t num_bytes) override {
    PT_RETURN_IF_ERROR(CheckRange("zero", offset, num_bytes));
    std::memset(base_ + offset, 0, num_bytes);
    return absl::OkStatus();
  }

  bool CanShift(const GroupGeometry& group) const override { return CanShiftOnHost(group); }

  absl::Status ReadShifted(const GroupGeometry& group, uint64_t offset, uint32_t num_rows,
                           int32_t delta, std::span<std::byte> to) override {
    const uint64_t num_bytes = uint64_t{num_rows} * group.k_row_bytes();
    PT_RETURN_IF_ERROR(CheckRange("read shifted rows from", offset, num_bytes));
    if (to.size() != num_bytes) {
      return absl::InvalidArgumentError(
          absl::StrCat("read shifted rows: ", num_bytes, " bytes into ", to.size()));
    }
    const KShiftRun run{base_ + offset, to.data(), num_rows, delta};
    return ShiftOnHost(group, {&run, 1});
  }

  absl::Status Attend(const AttentionCall& call) override {
    PT_ASSIGN_OR_RETURN(const kernels::AttentionShape shape, AttentionShapeOf(call, "cpu"));
    PT_ASSIGN_OR_RETURN(const uint64_t shifted_bytes, ShiftedBytesOf(call));
    std::vector<std::byte> shifted(shifted_bytes);
    PT_ASSIGN_OR_RETURN(const AttentionRuns rows,
                        AttentionRunsOf(call, base_, size_bytes_, shifted.data()));
    if (!rows.shifts.empty()) PT_RETURN_IF_ERROR(ShiftOnHost(*call.group, rows.shifts));
    kernels::AttentionArgs args;
    args.shape = shape;
    args.runs = rows.runs.data();
    args.num_runs = static_cast<int64_t>(rows.runs.size());
    args.q = call.queries.data();
    args.q_positions = rows.q_positions.data();
    args.num_queries = call.num_queries;
    args.out = call.outputs.data();
    args.lse = call.log_sum_exp.empty() ? nullptr : call.log_sum_exp.data();
    if (const char* wrong = kernels::CheckAttentionArgs(args)) {
      return absl::InvalidArgumentError(absl::StrCat("attend: ", wrong));
    }
    kernels::AttendHost(args);
    return absl::OkStatus();
  }

 private:
  explicit CpuPool(uint64_t size_bytes) : size_bytes_(size_bytes) {}

  absl::Status Init(const CpuDevice::Options& options) {
    fd_ = memfd_create("pagetide-pool", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd_ < 0) return ErrnoError("create", size_bytes_, errno);
    if (ftruncate(fd_, static_cast<off_t>(size_bytes_)) != 0) {
      return ErrnoError("size", size_bytes_, errno);
    }
    if (options.reserve_memory) {
      // Returns the error instead of setting errno; EINTR leaves what was reached to the retry.
      int error;
      do {
        error = posix_fallocate(fd_, 0, static_cast<off_t>(size_bytes_));
      } while (error == EINTR);
      if (error != 0) return ErrnoError("reserve", size_bytes_, error);
    }
    void* base = mmap(nullptr, size_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
    if (base == MAP_FAILED) return ErrnoError("map", size_bytes_, errno);
    base_ = static_cast<std::byte*>(base);
    // Only now: the seal spares mappings that exist. F_SEAL_SEAL keeps a peer from adding
    // F_SEAL_WRITE or the like to what it was lent.
    if (fcntl(fd_, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL) !=
        0) {
      return ErrnoError("seal", size_bytes_, errno);
    }
    // Maps what was reserved here and now; kernels before 5.14 do it page by page, on first use.
    if (options.reserve_memory) (void)madvise(base_, size_bytes_, MADV_POPULATE_WRITE);
    // Advice: kernels without it still give a correct pool.
    if (options.huge_pages) (void)madvise(base_, size_bytes_, MADV_HUGEPAGE);
    // Children of fork would share the frames for writing.
    if (madvise(base_, size_bytes_, MADV_DONTFORK) != 0) {
      return ErrnoError("keep from children", size_bytes_, errno);
    }
    return absl::OkStatus();
  }

  absl::Status CheckRange(absl::string_view action, uint64_t offset, uint64_t num_bytes) const {
    return CheckPoolRange(action, offset, num_bytes, size_bytes_);
  }

  const uint64_t size_bytes_;
  int fd_ = -1;
  std::byte* base_ = nullptr;
};

}  // namespace

absl::StatusOr<std::unique_ptr<DevicePool>> CpuDevice::CreatePool(uint64_t size_bytes) {
  if (size_bytes == 0) return absl::InvalidArgumentError("create a pool of 0 bytes on cpu");
  // A memfd is not charged until touched, so a size beyond all memory would only fail later, by
  // SIGBUS or the kernel's killer.
  const uint64_t memory =
      static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  if (size_bytes > memory) {
    return absl::ResourceExhaustedError(
        absl::StrCat("create a pool of ", size_bytes, " bytes on cpu: the machine has ", memory));
  }
  return CpuPool::Create(size_bytes, options_);
}

}  // namespace pagetide
