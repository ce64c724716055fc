#include "worker/cuda_shared_memory.h"

#include <fcntl.h>
#include <unistd.h>

#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"

namespace pagetide {
namespace {

constexpr absl::string_view kNoGpu = "NO_GPU";
constexpr absl::string_view kCannotExport = "CANNOT_EXPORT";
constexpr absl::string_view kCannotImport = "CANNOT_IMPORT";

// A handle leads to the driver's whole unit around an allocation, and so to what else lies there.
constexpr uint64_t kIpcUnitBytes = uint64_t{2} << 20;

// The next multiple of `unit`; 0 when there is none.
uint64_t RoundUp(uint64_t num_bytes, uint64_t unit) {
  const uint64_t rest = num_bytes % unit;
  if (rest == 0) return num_bytes;
  return num_bytes > std::numeric_limits<uint64_t>::max() - (unit - rest) ? 0
                                                                          : num_bytes - rest + unit;
}

}  // namespace

class CudaHoldings {
 public:
  // `action`: what it is all for, "export memory". `reason`: of refusals of its calls.
  CudaHoldings(std::shared_ptr<const CudaVmmLibrary> library, int ordinal, absl::string_view action,
               absl::string_view reason)
      : library_(std::move(library)),
        ordinal_(ordinal),
        action_(absl::StrCat(action, " of cuda:", ordinal)),
        reason_(reason) {}

  ~CudaHoldings() {
    if (context_ == nullptr) return;
    // Without the context some of it may stay: there is nobody to tell.
    const bool is_current = library_->cuCtxPushCurrent_v2(context_) == CudaVmmLibrary::kSuccess;
    if (is_mapped_) library_->cuMemUnmap(address_, size_bytes_);
    if (is_reserved_) library_->cuMemAddressFree(address_, size_bytes_);
    if (has_handle_) library_->cuMemRelease(handle_);
    if (is_allocated_) library_->cuMemFree_v2(address_);
    if (is_opened_) library_->cuIpcCloseMemHandle(address_);
    if (is_current) Pop();
    library_->cuDevicePrimaryCtxRelease_v2(device_);
  }
  CudaHoldings(const CudaHoldings&) = delete;
  CudaHoldings& operator=(const CudaHoldings&) = delete;

  // Takes the GPU; makes it the thread's for `work`.
  template <typename Work>
  absl::Status With(const Work& work) {
    PT_RETURN_IF_ERROR(TakeGpu());
    PT_RETURN_IF_ERROR(Check("cuCtxPushCurrent", library_->cuCtxPushCurrent_v2(context_), kNoGpu));
    const absl::Status status = work();
    Pop();
    return status;
  }

  absl::StatusOr<bool> HasDescriptors() const {
    for (const int attribute :
         {CudaVmmLibrary::kVmmSupported, CudaVmmLibrary::kDescriptorsSupported}) {
      int value = 0;
      PT_RETURN_IF_ERROR(Check("cuDeviceGetAttribute",
                               library_->cuDeviceGetAttribute(&value, attribute, device_)));
      if (value == 0) return false;
    }
    return true;
  }

  // Of sizes that can be mapped.
  absl::StatusOr<uint64_t> UnitBytes() const {
    size_t unit = 0;
    const CudaVmmLibrary::Properties properties = OfGpu();
    PT_RETURN_IF_ERROR(Check("cuMemGetAllocationGranularity",
                             library_->cuMemGetAllocationGranularity(
                                 &unit, &properties, CudaVmmLibrary::kMinimumGranularity)));
    if (unit > 0) return unit;
    return Refused("the driver's unit of memory is 0 bytes");
  }

  absl::Status CreateVmm(uint64_t size_bytes) {
    PT_ASSIGN_OR_RETURN(const uint64_t unit, UnitBytes());
    PT_RETURN_IF_ERROR(SetSize(size_bytes, unit));
    const CudaVmmLibrary::Properties properties = OfGpu();
    PT_RETURN_IF_ERROR(
        Check("cuMemCreate", library_->cuMemCreate(&handle_, size_bytes_, &properties, 0)));
    has_handle_ = true;
    return Map(CudaVmmLibrary::kReadWrite);
  }

  absl::StatusOr<int> ExportFd() const {
    int fd = -1;
    PT_RETURN_IF_ERROR(Check(
        "cuMemExportToShareableHandle",
        library_->cuMemExportToShareableHandle(&fd, handle_, CudaVmmLibrary::kFileDescriptor, 0)));
    if (fd < 0) return Refused("the driver gave no descriptor");
    (void)fcntl(fd, F_SETFD, FD_CLOEXEC);  // programs that this process starts are no peers
    return fd;
  }

  absl::StatusOr<std::string> AllocateForIpc(uint64_t size_bytes) {
    PT_RETURN_IF_ERROR(SetSize(size_bytes, kIpcUnitBytes));
    PT_RETURN_IF_ERROR(Check("cuMemAlloc", library_->cuMemAlloc_v2(&address_, size_bytes_)));
    is_allocated_ = true;
    CudaVmmLibrary::IpcHandle handle;
    PT_RETURN_IF_ERROR(Check("cuIpcGetMemHandle", library_->cuIpcGetMemHandle(&handle, address_)));
    return std::string(handle.bytes, sizeof(handle.bytes));
  }

  absl::Status ImportVmm(int fd, uint64_t size_bytes, int access) {
    PT_ASSIGN_OR_RETURN(const uint64_t unit, UnitBytes());
    if (size_bytes == 0 || size_bytes % unit != 0) {
      return absl::InvalidArgumentError(
          absl::StrCat(action_, ": ", size_bytes, " bytes are no whole units of ", unit, " bytes"));
    }
    size_bytes_ = size_bytes;
    // The descriptor goes by its number in the place of a pointer.
    PT_RETURN_IF_ERROR(Check("cuMemImportFromShareableHandle",
                             library_->cuMemImportFromShareableHandle(
                                 &handle_, reinterpret_cast<void*>(static_cast<intptr_t>(fd)),
                                 CudaVmmLibrary::kFileDescriptor)));
    has_handle_ = true;
    CudaVmmLibrary::Properties properties;
    PT_RETURN_IF_ERROR(
        Check("cuMemGetAllocationPropertiesFromHandle",
              library_->cuMemGetAllocationPropertiesFromHandle(&properties, handle_)));
    if (properties.location.type != CudaVmmLibrary::kOnDevice ||
        properties.location.id != device_) {
      return Refused(absl::StrCat("it is memory of location ", properties.location.type, ":",
                                  properties.location.id, ", not of this GPU"));
    }
    return Map(access);
  }

  absl::Status OpenIpc(absl::string_view handle, uint64_t size_bytes) {
    CudaVmmLibrary::IpcHandle opened;
    std::memcpy(opened.bytes, handle.data(), sizeof(opened.bytes));
    PT_RETURN_IF_ERROR(
        Check("cuIpcOpenMemHandle",
              library_->cuIpcOpenMemHandle_v2(&address_, opened, CudaVmmLibrary::kLazyPeerAccess)));
    is_opened_ = true;
    CudaVmmLibrary::Address base = 0;
    size_t there = 0;
    PT_RETURN_IF_ERROR(
        Check("cuMemGetAddressRange", library_->cuMemGetAddressRange_v2(&base, &there, address_)));
    if (size_bytes > 0 && base == address_ && size_bytes <= there) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat(action_, ": ", size_bytes, " bytes of the ", there, " behind its handle"));
  }

  std::byte* data() const { return reinterpret_cast<std::byte*>(address_); }
  uint64_t size_bytes() const { return size_bytes_; }
  const std::string& uuid() const { return uuid_; }

 private:
  absl::Status Refused(absl::string_view what, absl::string_view reason) const {
    return WithReason(absl::FailedPreconditionError(absl::StrCat(action_, ": ", what)), reason);
  }
  absl::Status Refused(absl::string_view what) const { return Refused(what, reason_); }

  absl::Status Check(absl::string_view call, int result, absl::string_view reason) const {
    if (result == CudaVmmLibrary::kSuccess) return absl::OkStatus();
    const std::string what = absl::StrCat(call, " answers ", library_->NameOf(result));
    if (result == CudaVmmLibrary::kOutOfMemory) {
      return absl::ResourceExhaustedError(
          absl::StrCat(action_, ": ", size_bytes_, " bytes: ", what));
    }
    return Refused(what, reason);
  }
  absl::Status Check(absl::string_view call, int result) const {
    return Check(call, result, reason_);
  }

  absl::Status TakeGpu() {
    PT_RETURN_IF_ERROR(Check("cuInit", library_->cuInit(0), kNoGpu));
    int count = 0;
    PT_RETURN_IF_ERROR(Check("cuDeviceGetCount", library_->cuDeviceGetCount(&count), kNoGpu));
    if (ordinal_ < 0 || ordinal_ >= count) {
      return Refused(absl::StrCat("this process sees ", count, " GPUs"), kNoGpu);
    }
    PT_RETURN_IF_ERROR(Check("cuDeviceGet", library_->cuDeviceGet(&device_, ordinal_), kNoGpu));
    CudaVmmLibrary::Uuid uuid;
    PT_RETURN_IF_ERROR(
        Check("cuDeviceGetUuid", library_->cuDeviceGetUuid_v2(&uuid, device_), kNoGpu));
    uuid_.assign(uuid.bytes, sizeof(uuid.bytes));
    void* context = nullptr;
    PT_RETURN_IF_ERROR(Check("cuDevicePrimaryCtxRetain",
                             library_->cuDevicePrimaryCtxRetain(&context, device_), kNoGpu));
    context_ = context;
    return absl::OkStatus();
  }

  void Pop() const {
    void* popped = nullptr;
    library_->cuCtxPopCurrent_v2(&popped);
  }

  CudaVmmLibrary::Properties OfGpu() const {
    CudaVmmLibrary::Properties properties;
    properties.location.id = device_;
    return properties;
  }

  absl::Status SetSize(uint64_t size_bytes, uint64_t unit) {
    size_bytes_ = RoundUp(size_bytes, unit);
    if (size_bytes_ > 0) return absl::OkStatus();
    return absl::ResourceExhaustedError(absl::StrCat(action_, ": ", size_bytes, " bytes"));
  }

  // The whole of the handle's memory.
  absl::Status Map(int access) {
    PT_RETURN_IF_ERROR(Check("cuMemAddressReserve",
                             library_->cuMemAddressReserve(&address_, size_bytes_, 0, 0, 0)));
    is_reserved_ = true;
    PT_RETURN_IF_ERROR(Check("cuMemMap", library_->cuMemMap(address_, size_bytes_, 0, handle_, 0)));
    is_mapped_ = true;
    const CudaVmmLibrary::Access wanted{.location = OfGpu().location, .flags = access};
    return Check("cuMemSetAccess", library_->cuMemSetAccess(address_, size_bytes_, &wanted, 1));
  }

  const std::shared_ptr<const CudaVmmLibrary> library_;  // shared by all who use the driver
  const int ordinal_;
  const std::string action_;
  const std::string reason_;
  int device_ = 0;
  std::string uuid_;
  void* context_ = nullptr;
  uint64_t size_bytes_ = 0;
  CudaVmmLibrary::Address address_ = 0;
  CudaVmmLibrary::Handle handle_ = 0;
  bool has_handle_ = false;
  bool is_reserved_ = false;
  bool is_mapped_ = false;
  bool is_allocated_ = false;
  bool is_opened_ = false;
};

ExportableMemory::ExportableMemory(std::unique_ptr<CudaHoldings> holdings)
    : holdings_(std::move(holdings)) {}

absl::StatusOr<std::unique_ptr<ExportableMemory>> ExportableMemory::Create(
    std::shared_ptr<const CudaVmmLibrary> library, int ordinal, uint64_t size_bytes) {
  if (size_bytes == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("create memory of cuda:", ordinal, " to be exported: 0 bytes"));
  }
  std::unique_ptr<ExportableMemory> memory(new ExportableMemory(std::make_unique<CudaHoldings>(
      std::move(library), ordinal, "create memory to be exported", kCannotExport)));
  CudaHoldings& holdings = *memory->holdings_;
  PT_RETURN_IF_ERROR(holdings.With([&]() -> absl::Status {
    PT_ASSIGN_OR_RETURN(const bool has_descriptors, holdings.HasDescriptors());
    if (!has_descriptors) {
      memory->kind_ = Kind::kIpc;
      PT_ASSIGN_OR_RETURN(memory->ipc_handle_, holdings.AllocateForIpc(size_bytes));
      return absl::OkStatus();
    }
    PT_RETURN_IF_ERROR(holdings.CreateVmm(size_bytes));
    PT_ASSIGN_OR_RETURN(memory->fd_, holdings.ExportFd());
    return absl::OkStatus();
  }));
  return memory;
}

ExportableMemory::~ExportableMemory() {
  if (fd_ >= 0) close(fd_);
}

std::byte* ExportableMemory::data() const {
  return holdings_->data();
}
uint64_t ExportableMemory::size_bytes() const {
  return holdings_->size_bytes();
}
const std::string& ExportableMemory::device_uuid() const {
  return holdings_->uuid();
}

ImportedMemory::ImportedMemory(std::unique_ptr<CudaHoldings> holdings, uint64_t size_bytes)
    : holdings_(std::move(holdings)), size_bytes_(size_bytes) {}

absl::StatusOr<std::unique_ptr<ImportedMemory>> ImportedMemory::FromFd(
    std::shared_ptr<const CudaVmmLibrary> library, int ordinal, int fd, uint64_t size_bytes,
    Access access) {
  auto holdings = std::make_unique<CudaHoldings>(std::move(library), ordinal,
                                                 "import memory by its descriptor", kCannotImport);
  PT_RETURN_IF_ERROR(holdings->With([&] {
    return holdings->ImportVmm(
        fd, size_bytes,
        access == Access::kRead ? CudaVmmLibrary::kRead : CudaVmmLibrary::kReadWrite);
  }));
  return std::unique_ptr<ImportedMemory>(new ImportedMemory(std::move(holdings), size_bytes));
}

absl::StatusOr<std::unique_ptr<ImportedMemory>> ImportedMemory::FromIpcHandle(
    std::shared_ptr<const CudaVmmLibrary> library, int ordinal, absl::string_view handle,
    uint64_t size_bytes) {
  if (handle.size() != sizeof(CudaVmmLibrary::IpcHandle)) {
    return absl::InvalidArgumentError(
        absl::StrCat("import memory of cuda:", ordinal, ": its handle has ", handle.size(),
                     " bytes, must have ", sizeof(CudaVmmLibrary::IpcHandle)));
  }
  auto holdings = std::make_unique<CudaHoldings>(std::move(library), ordinal,
                                                 "import memory by its handle", kCannotImport);
  PT_RETURN_IF_ERROR(holdings->With([&] { return holdings->OpenIpc(handle, size_bytes); }));
  return std::unique_ptr<ImportedMemory>(new ImportedMemory(std::move(holdings), size_bytes));
}

ImportedMemory::~ImportedMemory() = default;

std::byte* ImportedMemory::data() const {
  return holdings_->data();
}
const std::string& ImportedMemory::device_uuid() const {
  return holdings_->uuid();
}

}  // namespace pagetide
