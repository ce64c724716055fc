#include "worker/cpu_device.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/copy_bytes.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "kernels/paged_attention.h"
#include "worker/k_shift.h"

namespace pagetide {
namespace {

absl::Status ErrnoError(absl::string_view action, uint64_t size_bytes, int error) {
  std::string text = absl::StrCat(action, " a pool of ", size_bytes, " bytes: ", strerror(error));
  if (error == ENOMEM || error == ENOSPC || error == EFBIG || error == EMFILE || error == ENFILE) {
    return absl::ResourceExhaustedError(text);
  }
  return absl::InternalError(text);
}

absl::Status CannotAttend(absl::string_view why) {
  return WithReason(absl::FailedPreconditionError(absl::StrCat("attend on cpu: ", why)),
                    "CANNOT_ATTEND");
}

// The two enumerations list the same types in the same order; the geometry's begins at 1.
static_assert(static_cast<int>(DataType::kF32) == static_cast<int>(kernels::KvType::kF32) + 1 &&
              static_cast<int>(DataType::kIQ4NL) == static_cast<int>(kernels::KvType::kIQ4NL) + 1 &&
              kernels::kNumKvTypes == static_cast<int>(DataType::kIQ4NL));
kernels::KvType KvTypeOf(DataType type) {
  return static_cast<kernels::KvType>(static_cast<int>(type) - 1);
}

kernels::AttentionMask MaskOf(const LayerGroupSpec& spec) {
  switch (spec.window_type) {
    case LayerGroupSpec::WindowType::kNone:
      return kernels::AttentionMask::kCausal;
    case LayerGroupSpec::WindowType::kStandard:
      return kernels::AttentionMask::kWindowStandard;
    case LayerGroupSpec::WindowType::kChunked:
      return kernels::AttentionMask::kWindowChunked;
    case LayerGroupSpec::WindowType::kSymmetric:
      return kernels::AttentionMask::kWindowSymmetric;
    case LayerGroupSpec::WindowType::kRing:
      return kernels::AttentionMask::kWindowRing;
  }
  return kernels::AttentionMask::kCausal;
}

// The kernel's shape of a call, every size of the call checked against it.
absl::StatusOr<kernels::AttentionShape> ShapeOf(const AttentionCall& call) {
  if (call.group == nullptr) return absl::InvalidArgumentError("attend: group is null");
  const GroupGeometry& group = *call.group;
  const LayerGroupSpec& spec = group.spec();
  if (!group.can_attend()) return CannotAttend("the group has no plain rows");
  const kernels::KvType k_type = KvTypeOf(spec.k_type);
  const kernels::KvType v_type = spec.v_dim == 0 ? k_type : KvTypeOf(spec.v_type);
  if (spec.scale != LayerGroupSpec::ScaleKind::kNone) return CannotAttend("rows have scales");
  if (spec.basis != LayerGroupSpec::Basis::kPlain) {
    return CannotAttend("rows are in the Hadamard basis");
  }
  if (call.layer >= group.num_layers()) {
    return absl::InvalidArgumentError(absl::StrCat("attend: layer = ", call.layer,
                                                   " is not below the group's ", group.num_layers(),
                                                   " layers"));
  }
  if (call.query_heads == 0 || call.query_heads % spec.kv_heads != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("attend: query_heads = ", call.query_heads,
                     " is not a positive multiple of kv_heads = ", spec.kv_heads));
  }
  if (!std::isfinite(call.scale)) {
    return absl::InvalidArgumentError(absl::StrCat("attend: scale = ", call.scale));
  }
  const uint64_t rows = uint64_t{call.num_queries} * call.query_heads;
  uint64_t v_dim = spec.v_dim;
  if (v_dim == 0) {
    v_dim = rows == 0 ? spec.k_dim : call.outputs.size() / rows;
    if (v_dim < 1 || v_dim > spec.k_dim || (spec.kv_heads > 1 && v_dim != spec.k_dim)) {
      return absl::InvalidArgumentError(
          absl::StrCat("attend: ", call.outputs.size(), " outputs for ", rows,
                       " query rows of a latent group with kv_heads = ", spec.kv_heads,
                       " and k_dim = ", spec.k_dim));
    }
  }
  if (call.queries.size() != rows * spec.k_dim || call.outputs.size() != rows * v_dim ||
      (!call.log_sum_exp.empty() && call.log_sum_exp.size() != rows)) {
    return absl::InvalidArgumentError(
        absl::StrCat("attend: ", call.num_queries, " queries × ", call.query_heads, " heads need ",
                     rows * spec.k_dim, " query, ", rows * v_dim, " output and ", rows,
                     " log_sum_exp elements, got ", call.queries.size(), ", ", call.outputs.size(),
                     " and ", call.log_sum_exp.size()));
  }
  kernels::AttentionShape shape;
  shape.num_q_heads = static_cast<int32_t>(call.query_heads);
  shape.num_kv_heads = static_cast<int32_t>(spec.kv_heads);
  shape.k_dim = static_cast<int32_t>(spec.k_dim);
  shape.v_dim = static_cast<int32_t>(v_dim);
  shape.k_type = k_type;
  shape.v_type = v_type;
  shape.k_row_bytes = group.k_row_bytes();
  shape.v_row_bytes = spec.v_dim == 0 ? group.k_row_bytes() : group.v_row_bytes();
  shape.scale = call.scale != 0 ? call.scale : 1.0f / std::sqrt(static_cast<float>(spec.k_dim));
  shape.mask = MaskOf(spec);
  shape.window = int64_t{spec.window_tokens} - spec.keep_tokens;
  shape.keep = spec.keep_tokens;
  return shape;
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
  int export_fd() const override { return fd_; }

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
    PT_ASSIGN_OR_RETURN(const kernels::AttentionShape shape, ShapeOf(call));
    const GroupGeometry& group = *call.group;
    // Shifted K goes through a copy: frames are shared, and stay as they were written.
    uint64_t shifted_rows = 0;
    for (const DeviceExtent& extent : call.extents) {
      if (extent.shift != 0) shifted_rows += extent.count;
    }
    if (shifted_rows > call.extents.size() * uint64_t{group.page_tokens()}) {
      return absl::InvalidArgumentError(absl::StrCat("attend: ", shifted_rows, " shifted rows in ",
                                                     call.extents.size(), " extents"));
    }
    std::vector<std::byte> shifted(shifted_rows * group.k_row_bytes());
    std::vector<KShiftRun> shifts;
    uint64_t shifted_at = 0;
    std::vector<kernels::KvRun> runs;
    runs.reserve(call.extents.size());
    for (const DeviceExtent& extent : call.extents) {
      PT_RETURN_IF_ERROR(CheckRange("attend to page in", extent.page_offset, group.page_bytes()));
      if (uint64_t{extent.first_slot} + extent.count > group.page_tokens()) {
        return absl::InvalidArgumentError(
            absl::StrCat("attend: extent of ", extent.count, " rows from slot ", extent.first_slot,
                         " leaves its page of ", group.page_tokens()));
      }
      PT_RETURN_IF_ERROR(CheckPositions("extent", extent.first_position, extent.count));
      const std::byte* page = base_ + extent.page_offset;
      kernels::KvRun run;
      run.k_rows = page + group.RowOffset(call.layer, RowKind::kK, 0);
      run.v_rows =
          group.spec().v_dim == 0 ? run.k_rows : page + group.RowOffset(call.layer, RowKind::kV, 0);
      run.first_position = static_cast<int64_t>(extent.first_position);
      run.first_slot = static_cast<int32_t>(extent.first_slot);
      run.count = static_cast<int32_t>(extent.count);
      if (extent.shift != 0) {
        std::byte* const copy = shifted.data() + shifted_at;
        shifted_at += uint64_t{extent.count} * group.k_row_bytes();
        shifts.push_back({page + group.RowOffset(call.layer, RowKind::kK, extent.first_slot), copy,
                          extent.count, extent.shift});
        run.k_rows = copy;
        run.v_rows = group.spec().v_dim == 0
                         ? copy
                         : page + group.RowOffset(call.layer, RowKind::kV, extent.first_slot);
        run.first_slot = 0;
      }
      runs.push_back(run);
    }
    if (!shifts.empty()) PT_RETURN_IF_ERROR(ShiftOnHost(group, shifts));
    PT_RETURN_IF_ERROR(CheckPositions("queries", call.first_position, call.num_queries));
    std::vector<int64_t> positions(call.num_queries);
    for (uint32_t i = 0; i < call.num_queries; ++i) {
      positions[i] = static_cast<int64_t>(call.first_position + i);
    }
    kernels::AttentionArgs args;
    args.shape = shape;
    args.runs = runs.data();
    args.num_runs = static_cast<int64_t>(runs.size());
    args.q = call.queries.data();
    args.q_positions = positions.data();
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
  // Positions are kept well inside int64, so that kernels may subtract and add windows freely.
  static constexpr uint64_t kMaxPosition = uint64_t{1} << 62;

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
    if (num_bytes <= size_bytes_ && offset <= size_bytes_ - num_bytes) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat(action, " pool: ", num_bytes,
                                                   " bytes at offset ", offset, " leave its ",
                                                   size_bytes_, " bytes"));
  }

  static absl::Status CheckPositions(absl::string_view what, uint64_t first, uint64_t count) {
    if (first <= kMaxPosition && count <= kMaxPosition - first) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("attend: ", what, ": ", count, " positions from ", first, " pass 2^62"));
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
