#include "worker/cuda_device.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "kernels/page_move.h"
#include "kernels/paged_attention.h"
#include "kernels/rope_shift.h"
#include "worker/attention_call.h"
#include "worker/cuda_context.h"
#include "worker/cuda_shared_memory.h"
#include "worker/cuda_status.h"
#include "worker/device_addressed.h"
#include "worker/k_shift.h"
#include "worker/row_move.h"

namespace pagetide {
namespace {

// RopeShiftCuda's limit on the elements of a head that turn.
constexpr uint32_t kMaxTurned = 12288;
constexpr int kMinComputeMajor = 8;  // the oldest that the kernels are compiled for

bool IsAligned(const void* rows, uint64_t row_bytes, kernels::KvType type) {
  const uint64_t unit =
      kernels::IsBlockType(type) ? 2 : static_cast<uint64_t>(kernels::GroupBytes(type));
  return (reinterpret_cast<uintptr_t>(rows) | row_bytes) % unit == 0;
}

// Can the device's kernel turn these K rows?
bool CanShiftHere(const GroupGeometry& group, const void* rows) {
  if (!CanShiftOnHost(group)) return false;
  const std::optional<kernels::RopeShiftArgs> args = KShiftArgsOf(group);
  return args.has_value() && static_cast<uint32_t>(args->params.n_rot) <= kMaxTurned &&
         IsAligned(rows, group.k_row_bytes(), args->type);
}

template <typename T>
void CopyTo(std::byte* to, std::span<T> from) {
  if (!from.empty()) std::memcpy(to, from.data(), from.size_bytes());
}

// K-shifts of one call: what its kernel needs of memory, filled on the host, and its launch. Rows
// go to a copy, whole, what does not turn too.
class ShiftPlan {
 public:
  // Room for at most `max_runs`; the group outlives it.
  ShiftPlan(const GroupGeometry& group, size_t max_runs, Arena* arena)
      : group_(group), args_(max_runs > 0 ? KShiftArgsOf(group) : std::nullopt) {
    if (!args_) return;
    runs_at_ = arena->Take(max_runs * sizeof(kernels::RopeShiftRun));
    table_bytes_ = static_cast<uint64_t>(args_->params.n_rot) * sizeof(float);
    tables_at_ = arena->Take(max_runs * table_bytes_);
  }

  // `pinned`: the arena on the host.
  void Fill(std::span<const KShiftRun> runs, std::byte* pinned) const {
    if (!args_) return;
    auto* const to = reinterpret_cast<kernels::RopeShiftRun*>(pinned + runs_at_);
    for (size_t i = 0; i < runs.size(); ++i) {
      to[i] = {runs[i].out, runs[i].out, runs[i].num_rows, runs[i].delta};
      kernels::RopeAngles(args_->params, runs[i].delta,
                          reinterpret_cast<float*>(pinned + tables_at_ + i * table_bytes_));
    }
  }

  // Enqueues all of it; the arena lies in the work's memory.
  absl::Status Launch(std::span<const KShiftRun> runs, CudaWork* work) const {
    int64_t max_rows = 0;
    for (const KShiftRun& run : runs) {
      max_rows = std::max<int64_t>(max_rows, run.num_rows);
      if (run.num_rows == 0) continue;
      PT_RETURN_IF_ERROR(work->Copy(run.out, run.in, run.num_rows * uint64_t{group_.k_row_bytes()},
                                    cudaMemcpyDeviceToDevice));
    }
    if (!args_ || runs.empty()) return absl::OkStatus();
    kernels::RopeShiftArgs args = *args_;
    args.runs = reinterpret_cast<const kernels::RopeShiftRun*>(work->device() + runs_at_);
    args.num_runs = static_cast<int64_t>(runs.size());
    args.max_rows = max_rows;
    args.cos_sin = reinterpret_cast<const float*>(work->device() + tables_at_);
    return CudaStatus("shift K", kernels::RopeShiftCuda(args, work->stream()));
  }

 private:
  const GroupGeometry& group_;
  const std::optional<kernels::RopeShiftArgs> args_;  // none where rows need no turning
  uint64_t runs_at_ = 0;
  uint64_t tables_at_ = 0;
  uint64_t table_bytes_ = 0;
};

// The memory of a pool: one that peers can map, or a plain allocation that says why they cannot.
class CudaPoolMemory {
 public:
  // `driver`: through which peers get it; an error says why they do not. The GPU is the thread's.
  static absl::StatusOr<std::unique_ptr<CudaPoolMemory>> Create(
      const CudaContext& context,
      const absl::StatusOr<std::shared_ptr<const CudaVmmLibrary>>& driver, uint64_t size_bytes) {
    std::unique_ptr<CudaPoolMemory> memory(new CudaPoolMemory());
    absl::Status allocated = driver.status();
    if (driver.ok()) {
      auto shared = ExportableMemory::Create(*driver, context.ordinal(), size_bytes);
      allocated = shared.status();
      if (shared.ok()) {
        memory->shared_ = *std::move(shared);
        return memory;
      }
      if (absl::IsFailedPrecondition(allocated)) {
        LogWarning("worker", "peers cannot map a pool of ", size_bytes, " bytes on ",
                   context.name(), ": ", allocated.message());
      }
    }
    if (absl::IsFailedPrecondition(allocated)) {
      memory->why_not_ = std::string(allocated.message());
      allocated = CudaStatus("cudaMalloc", cudaMalloc(&memory->plain_, size_bytes));
      memory->plain_bytes_ = size_bytes;
    }
    if (allocated.ok()) return memory;
    const std::string what = absl::StrCat("create a pool of ", size_bytes, " bytes on ",
                                          context.name(), ": ", allocated.message());
    size_t free_bytes = 0;
    size_t total_bytes = 0;
    if (cudaMemGetInfo(&free_bytes, &total_bytes) != cudaSuccess) {
      return absl::Status(allocated.code(), what);
    }
    return absl::Status(allocated.code(), absl::StrCat(what, ": ", free_bytes, " of ", total_bytes,
                                                       " bytes are free"));
  }
  ~CudaPoolMemory() {
    if (plain_ != nullptr) (void)cudaFree(plain_);
  }
  CudaPoolMemory(const CudaPoolMemory&) = delete;
  CudaPoolMemory& operator=(const CudaPoolMemory&) = delete;

  std::byte* data() const {
    return shared_ != nullptr ? shared_->data() : static_cast<std::byte*>(plain_);
  }
  // At least the pool's.
  uint64_t size_bytes() const { return shared_ != nullptr ? shared_->size_bytes() : plain_bytes_; }

  PoolExport exported() const {
    if (shared_ == nullptr) return {.why_not = why_not_};
    PoolExport exported{.mapped_bytes = shared_->size_bytes(),
                        .device_uuid = shared_->device_uuid()};
    if (shared_->kind() == ExportableMemory::Kind::kVmm) {
      exported.kind = PoolExport::Kind::kCudaVmm;
      exported.fd = shared_->fd();
    } else {
      exported.kind = PoolExport::Kind::kCudaIpc;
      exported.ipc_handle = shared_->ipc_handle();
    }
    return exported;
  }

 private:
  CudaPoolMemory() = default;

  std::unique_ptr<ExportableMemory> shared_;
  void* plain_ = nullptr;
  uint64_t plain_bytes_ = 0;
  std::string why_not_;
};

class CudaPool final : public DevicePool, public DeviceAddressed {
 public:
  static absl::StatusOr<std::unique_ptr<DevicePool>> Create(
      std::shared_ptr<CudaContext> context,
      const absl::StatusOr<std::shared_ptr<const CudaVmmLibrary>>& driver, uint64_t size_bytes) {
    PT_RETURN_IF_ERROR(context->Use());
    auto pool = std::unique_ptr<CudaPool>(new CudaPool(std::move(context), size_bytes));
    PT_ASSIGN_OR_RETURN(pool->memory_, CudaPoolMemory::Create(*pool->context_, driver, size_bytes));
    pool->base_ = pool->memory_->data();
    // What lies behind the pool's end too: peers map it.
    PT_RETURN_IF_ERROR(pool->ZeroMemory(0, pool->memory_->size_bytes()));
    return std::unique_ptr<DevicePool>(std::move(pool));
  }

  ~CudaPool() override {
    // For what gives the memory back.
    (void)context_->Use();
  }
  CudaPool(const CudaPool&) = delete;
  CudaPool& operator=(const CudaPool&) = delete;

  uint64_t size_bytes() const override { return size_bytes_; }
  std::byte* host_view() override { return nullptr; }
  void* device_address() override { return base_; }
  PoolExport exported() const override { return memory_->exported(); }

  absl::Status MoveRows(const RowMove& move) override {
    PT_RETURN_IF_ERROR(CheckRowMove(move, size_bytes_));
    uint64_t num_rows = 0;
    uint64_t host_rows = 0;
    for (const RowMove::Rows& run : move.runs) {
      num_rows += run.slots.size();
      if (run.host != nullptr) host_rows += run.slots.size();
    }
    if (num_rows == 0) return absl::OkStatus();
    PT_RETURN_IF_ERROR(context_->Use());
    CudaContext::Borrowed work(context_.get());
    // The kernel's arrays, then rows of the host: what the device is given, or what it gives.
    Arena arena;
    const uint64_t plane_at = arena.Take(sizeof(kernels::EnginePlane));
    const uint64_t pages_at = arena.Take(move.runs.size() * sizeof(kernels::PageTokens));
    const uint64_t slots_at = arena.Take(num_rows * sizeof(int64_t));
    const uint64_t host_at = arena.Take(host_rows * move.row_bytes());
    const bool is_to_engine = move.direction == kernels::PageMoveDirection::kScatter;
    PT_RETURN_IF_ERROR(work->Reserve(arena.bytes(), arena.bytes()));
    std::byte* const pinned = work->pinned();
    std::byte* const device = work->device();
    std::memcpy(pinned + plane_at, &move.plane, sizeof(move.plane));
    auto* page = reinterpret_cast<kernels::PageTokens*>(pinned + pages_at);
    uint64_t slot_at = slots_at;
    uint64_t row_at = host_at;
    for (const RowMove::Rows& run : move.runs) {
      const uint64_t num_bytes = run.slots.size() * move.row_bytes();
      std::byte* rows = base_ + run.pool_offset;
      if (run.host != nullptr) {
        rows = device + row_at;
        if (is_to_engine) CopyTo(pinned + row_at, std::span(run.host, num_bytes));
        row_at += num_bytes;
      }
      CopyTo(pinned + slot_at, run.slots);
      *page++ = {rows, reinterpret_cast<const int64_t*>(device + slot_at), 0,
                 static_cast<int32_t>(run.slots.size())};
      slot_at += run.slots.size_bytes();
    }
    PT_RETURN_IF_ERROR(
        work->Copy(device, pinned, is_to_engine ? arena.bytes() : host_at, cudaMemcpyHostToDevice));
    kernels::PageMoveArgs args = PageMoveArgsOf(move);
    args.planes = reinterpret_cast<const kernels::EnginePlane*>(device + plane_at);
    args.pages = reinterpret_cast<const kernels::PageTokens*>(device + pages_at);
    PT_RETURN_IF_ERROR(CudaStatus("move rows", kernels::PageMoveCuda(args, work->stream())));
    if (is_to_engine || host_rows == 0) return work->Wait();
    PT_RETURN_IF_ERROR(work->Copy(pinned + host_at, device + host_at, host_rows * move.row_bytes(),
                                  cudaMemcpyDeviceToHost));
    PT_RETURN_IF_ERROR(work->Wait());
    row_at = host_at;
    for (const RowMove::Rows& run : move.runs) {
      if (run.host == nullptr) continue;
      const uint64_t num_bytes = run.slots.size() * move.row_bytes();
      if (num_bytes > 0) std::memcpy(run.host, pinned + row_at, num_bytes);
      row_at += num_bytes;
    }
    return absl::OkStatus();
  }

  absl::Status Write(uint64_t offset, std::span<const std::byte> from) override {
    PT_RETURN_IF_ERROR(CheckPoolRange("write to", offset, from.size(), size_bytes_));
    return context_->to_device().ToDevice(base_ + offset, from);
  }

  absl::Status Read(uint64_t offset, std::span<std::byte> to) override {
    PT_RETURN_IF_ERROR(CheckPoolRange("read from", offset, to.size(), size_bytes_));
    return context_->from_device().FromDevice(base_ + offset, to);
  }

  absl::Status Copy(uint64_t to, uint64_t from, uint64_t num_bytes) override {
    PT_RETURN_IF_ERROR(CheckPoolRange("copy from", from, num_bytes, size_bytes_));
    PT_RETURN_IF_ERROR(CheckPoolRange("copy to", to, num_bytes, size_bytes_));
    if (num_bytes == 0 || to == from) return absl::OkStatus();
    PT_RETURN_IF_ERROR(context_->Use());
    CudaContext::Borrowed work(context_.get());
    const std::byte* source = base_ + from;
    // Copies on the device must not overlap: such a range goes by a copy of it.
    if ((to > from ? to - from : from - to) < num_bytes) {
      PT_RETURN_IF_ERROR(work->Reserve(num_bytes, 0));
      PT_RETURN_IF_ERROR(work->Copy(work->device(), source, num_bytes, cudaMemcpyDeviceToDevice));
      source = work->device();
    }
    PT_RETURN_IF_ERROR(work->Copy(base_ + to, source, num_bytes, cudaMemcpyDeviceToDevice));
    return work->Wait();
  }

  absl::Status Zero(uint64_t offset, uint64_t num_bytes) override {
    PT_RETURN_IF_ERROR(CheckPoolRange("zero", offset, num_bytes, size_bytes_));
    return ZeroMemory(offset, num_bytes);
  }

  bool CanShift(const GroupGeometry& group) const override { return CanShiftOnHost(group); }

  absl::Status ReadShifted(const GroupGeometry& group, uint64_t offset, uint32_t num_rows,
                           int32_t delta, std::span<std::byte> to) override {
    const uint64_t num_bytes = uint64_t{num_rows} * group.k_row_bytes();
    PT_RETURN_IF_ERROR(CheckPoolRange("read shifted rows from", offset, num_bytes, size_bytes_));
    if (to.size() != num_bytes) {
      return absl::InvalidArgumentError(
          absl::StrCat("read shifted rows: ", num_bytes, " bytes into ", to.size()));
    }
    if (num_bytes == 0 || delta == 0 || !CanShiftHere(group, base_ + offset)) {
      PT_RETURN_IF_ERROR(Read(offset, to));
      const KShiftRun run{to.data(), to.data(), num_rows, delta};
      return ShiftOnHost(group, {&run, 1});
    }
    PT_RETURN_IF_ERROR(context_->Use());
    CudaContext::Borrowed work(context_.get());
    Arena arena;
    const ShiftPlan shift(group, 1, &arena);
    const uint64_t input_bytes = arena.bytes();
    const uint64_t rows_at = arena.Take(num_bytes);
    PT_RETURN_IF_ERROR(work->Reserve(arena.bytes(), input_bytes));
    std::byte* const rows = work->device() + rows_at;
    const KShiftRun run{base_ + offset, rows, num_rows, delta};
    shift.Fill({&run, 1}, work->pinned());
    PT_RETURN_IF_ERROR(
        work->Copy(work->device(), work->pinned(), input_bytes, cudaMemcpyHostToDevice));
    PT_RETURN_IF_ERROR(shift.Launch({&run, 1}, &*work));
    PT_RETURN_IF_ERROR(work->Wait());
    return context_->from_device().FromDevice(rows, to);
  }

  absl::Status Attend(const AttentionCall& call) override {
    const std::string& name = context_->name();
    kernels::AttentionBatch batch{};
    PT_ASSIGN_OR_RETURN(batch.all.shape, AttentionShapeOf(call, name));
    PT_ASSIGN_OR_RETURN(const uint64_t shifted_bytes, ShiftedBytesOf(call));
    const GroupGeometry& group = *call.group;
    if (shifted_bytes > 0 && !CanShiftOnHost(group)) {
      return absl::InvalidArgumentError("attend: rows of the group cannot be turned");
    }
    batch.all.num_runs = static_cast<int64_t>(call.extents.size());
    batch.all.num_queries = batch.max_queries = call.num_queries;
    batch.num_sequences = 1;
    batch.values_are_keys = group.spec().v_dim == 0;
    for (const DeviceExtent& extent : call.extents) batch.max_rows += extent.count;
    PT_RETURN_IF_ERROR(context_->Use());
    if (const char* why = kernels::WhyNotAttendCuda(batch)) return CannotAttend(name, why);

    // First what goes to the device, then what comes back, then what stays there.
    CudaContext::Borrowed work(context_.get());
    Arena arena;
    const uint64_t q_at = arena.Take(call.queries.size_bytes());
    const uint64_t positions_at = arena.Take(uint64_t{call.num_queries} * sizeof(int64_t));
    const uint64_t runs_at = arena.Take(call.extents.size() * sizeof(kernels::KvRun));
    const ShiftPlan shift(group, shifted_bytes > 0 ? call.extents.size() : 0, &arena);
    const uint64_t input_bytes = arena.bytes();
    const uint64_t out_at = arena.Take(call.outputs.size_bytes());
    const uint64_t lse_at = arena.Take(call.log_sum_exp.size_bytes());
    const uint64_t exchanged_bytes = arena.bytes();
    const uint64_t workspace_at =
        arena.Take(static_cast<uint64_t>(kernels::AttentionWorkspaceBytes(batch)));
    const uint64_t shifted_at = arena.Take(shifted_bytes);
    PT_RETURN_IF_ERROR(work->Reserve(arena.bytes(), exchanged_bytes));
    std::byte* const device = work->device();
    std::byte* const pinned = work->pinned();

    PT_ASSIGN_OR_RETURN(const AttentionRuns rows,
                        AttentionRunsOf(call, base_, size_bytes_, device + shifted_at));
    PT_RETURN_IF_ERROR(CheckRuns(batch, rows));
    if (call.num_queries == 0) return absl::OkStatus();
    CopyTo(pinned + q_at, call.queries);
    CopyTo(pinned + positions_at, std::span(rows.q_positions));
    CopyTo(pinned + runs_at, std::span(rows.runs));
    shift.Fill(rows.shifts, pinned);
    PT_RETURN_IF_ERROR(work->Copy(device, pinned, input_bytes, cudaMemcpyHostToDevice));
    PT_RETURN_IF_ERROR(shift.Launch(rows.shifts, &*work));
    batch.all.runs = reinterpret_cast<const kernels::KvRun*>(device + runs_at);
    batch.all.q = reinterpret_cast<const float*>(device + q_at);
    batch.all.q_positions = reinterpret_cast<const int64_t*>(device + positions_at);
    batch.all.out = reinterpret_cast<float*>(device + out_at);
    if (!call.log_sum_exp.empty()) batch.all.lse = reinterpret_cast<float*>(device + lse_at);
    PT_RETURN_IF_ERROR(
        CudaStatus("attend", kernels::AttendCuda(batch, device + workspace_at, work->stream())));
    PT_RETURN_IF_ERROR(work->Copy(pinned + out_at, device + out_at, exchanged_bytes - out_at,
                                  cudaMemcpyDeviceToHost));
    PT_RETURN_IF_ERROR(work->Wait());
    std::memcpy(call.outputs.data(), pinned + out_at, call.outputs.size_bytes());
    if (!call.log_sum_exp.empty()) {
      std::memcpy(call.log_sum_exp.data(), pinned + lse_at, call.log_sum_exp.size_bytes());
    }
    return absl::OkStatus();
  }

 private:
  CudaPool(std::shared_ptr<CudaContext> context, uint64_t size_bytes)
      : context_(std::move(context)), size_bytes_(size_bytes) {}

  absl::Status ZeroMemory(uint64_t offset, uint64_t num_bytes) {
    if (num_bytes == 0) return absl::OkStatus();
    PT_RETURN_IF_ERROR(context_->Use());
    CudaContext::Borrowed work(context_.get());
    PT_RETURN_IF_ERROR(CudaStatus(absl::StrCat("zero ", num_bytes, " bytes"),
                                  cudaMemsetAsync(base_ + offset, 0, num_bytes, work->stream())));
    return work->Wait();
  }

  // Of the host's view of the runs: positions, and what device kernels ask of addresses.
  absl::Status CheckRuns(const kernels::AttentionBatch& batch, const AttentionRuns& rows) const {
    kernels::AttentionArgs args = batch.all;
    args.runs = rows.runs.data();
    if (const char* wrong = kernels::CheckAttentionArgs(args)) {
      return absl::InvalidArgumentError(absl::StrCat("attend: ", wrong));
    }
    const auto k_bytes = static_cast<uint64_t>(args.shape.k_row_bytes);
    const auto v_bytes = static_cast<uint64_t>(args.shape.v_row_bytes);
    bool is_aligned = true;
    for (const kernels::KvRun& run : rows.runs) {
      is_aligned = is_aligned && IsAligned(run.k_rows, k_bytes, args.shape.k_type) &&
                   IsAligned(run.v_rows, v_bytes, args.shape.v_type);
    }
    if (!is_aligned)
      return CannotAttend(context_->name(), "rows are not aligned to their elements");
    return absl::OkStatus();
  }

  // Shared by all pools of a GPU and outlived by none: a pool may outlive its device.
  const std::shared_ptr<CudaContext> context_;
  const uint64_t size_bytes_;
  // Set by Create only.
  std::unique_ptr<CudaPoolMemory> memory_;
  std::byte* base_ = nullptr;  // device; the memory's
};

class CudaDevice final : public Device {
 public:
  CudaDevice(std::shared_ptr<CudaContext> context,
             absl::StatusOr<std::shared_ptr<const CudaVmmLibrary>> driver)
      : context_(std::move(context)), driver_(std::move(driver)) {}

  absl::string_view name() const override { return context_->name(); }

  absl::StatusOr<std::unique_ptr<DevicePool>> CreatePool(uint64_t size_bytes) override {
    if (size_bytes == 0) {
      return absl::InvalidArgumentError(absl::StrCat("create a pool of 0 bytes on ", name()));
    }
    return CudaPool::Create(context_, driver_, size_bytes);
  }

  // Of engines that are trusted with the frames: memory that its owner takes away while a kernel
  // runs over it ends the GPU's use for this process.
  bool CanImport(PoolExport::Kind kind) const override {
    return driver_.ok() &&
           (kind == PoolExport::Kind::kCudaVmm || kind == PoolExport::Kind::kCudaIpc);
  }

  absl::StatusOr<ImportedPeerMemory> Import(const PeerMemory& memory) override {
    PT_RETURN_IF_ERROR(driver_.status());
    auto imported =
        memory.kind == PoolExport::Kind::kCudaVmm
            ? ImportedMemory::FromFd(*driver_, context_->ordinal(), memory.fd, memory.size_bytes,
                                     ImportedMemory::Access::kReadWrite)
            : ImportedMemory::FromIpcHandle(*driver_, context_->ordinal(), memory.ipc_handle,
                                            memory.size_bytes);
    PT_RETURN_IF_ERROR(imported.status());
    std::byte* const data = (*imported)->data();
    return ImportedPeerMemory{data, std::shared_ptr<const ImportedMemory>(*std::move(imported))};
  }

 private:
  // Both are shared with the pools, which may outlive this.
  const std::shared_ptr<CudaContext> context_;
  // FAILED_PRECONDITION: why pools are not exported.
  const absl::StatusOr<std::shared_ptr<const CudaVmmLibrary>> driver_;
};

absl::Status CannotUse(int ordinal, absl::string_view why) {
  return absl::FailedPreconditionError(absl::StrCat("use cuda:", ordinal, ": ", why));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Device>> MakeCudaDevice(int ordinal,
                                                       const CudaDeviceOptions& options) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return CannotUse(ordinal, cudaGetErrorString(error));
  if (ordinal < 0 || ordinal >= count) {
    return CannotUse(ordinal, absl::StrCat("this process sees ", count, " GPUs"));
  }
  int major = 0;
  PT_RETURN_IF_ERROR(
      CudaStatus("ask for the compute capability",
                 cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal)));
  if (major < kMinComputeMajor) {
    return CannotUse(ordinal, absl::StrCat("its compute capability is ", major,
                                           ".x, the kernels need ", kMinComputeMajor, ".0"));
  }
  PT_ASSIGN_OR_RETURN(std::shared_ptr<CudaContext> context, CudaContext::Create(ordinal));
  absl::StatusOr<std::shared_ptr<const CudaVmmLibrary>> driver =
      absl::FailedPreconditionError("the worker was not told to export_device_frames");
  if (options.export_frames) {
    driver = CudaVmmLibrary::Load(options.driver);
    if (!driver.ok()) {
      LogWarning("worker", "peers cannot map pools on ", context->name(), ": ",
                 driver.status().message());
    }
  }
  return std::unique_ptr<Device>(
      std::make_unique<CudaDevice>(std::move(context), std::move(driver)));
}

}  // namespace pagetide
