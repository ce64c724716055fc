#include "worker/nccl_library.h"

#include <dlfcn.h>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"

namespace pagetide {
namespace {

absl::Status Refused(absl::string_view path, absl::string_view what, absl::string_view reason) {
  return WithReason(absl::FailedPreconditionError(absl::StrCat("use ", path, ": ", what)), reason);
}

absl::StatusOr<void*> Open(const std::string& path, absl::string_view reason) {
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library != nullptr) return library;
  const char* const why = dlerror();
  return Refused(path, why == nullptr ? "it cannot be loaded" : why, reason);
}

template <typename Function>
absl::Status Find(void* library, const std::string& path, const char* name,
                  absl::string_view reason, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  if (*function != nullptr) return absl::OkStatus();
  return Refused(path, absl::StrCat("it has no ", name), reason);
}

}  // namespace

absl::StatusOr<std::shared_ptr<const NcclLibrary>> NcclLibrary::Load(const Paths& paths) {
  constexpr absl::string_view kNoNccl = "NO_NCCL";
  constexpr absl::string_view kNoGpu = "NO_GPU";
  PT_ASSIGN_OR_RETURN(void* const nccl, Open(paths.nccl, kNoNccl));
  PT_ASSIGN_OR_RETURN(void* const cuda, Open(paths.cuda, kNoGpu));
  auto found = std::make_shared<NcclLibrary>();
#define PT_FIND_NCCL(name) PT_RETURN_IF_ERROR(Find(nccl, paths.nccl, #name, kNoNccl, &found->name))
#define PT_FIND_CUDA(name) PT_RETURN_IF_ERROR(Find(cuda, paths.cuda, #name, kNoGpu, &found->name))
  PT_FIND_NCCL(ncclGetUniqueId);
  PT_FIND_NCCL(ncclCommInitRankConfig);
  PT_FIND_NCCL(ncclCommGetAsyncError);
  PT_FIND_NCCL(ncclCommFinalize);
  PT_FIND_NCCL(ncclCommDestroy);
  PT_FIND_NCCL(ncclCommAbort);
  PT_FIND_NCCL(ncclGetErrorString);
  PT_FIND_NCCL(ncclBroadcast);
  PT_FIND_NCCL(ncclSend);
  PT_FIND_NCCL(ncclRecv);
  PT_FIND_CUDA(cuInit);
  PT_FIND_CUDA(cuDeviceGetCount);
  PT_FIND_CUDA(cuDeviceGet);
  PT_FIND_CUDA(cuDevicePrimaryCtxRetain);
  PT_FIND_CUDA(cuDevicePrimaryCtxRelease_v2);
  PT_FIND_CUDA(cuCtxSetCurrent);
  PT_FIND_CUDA(cuStreamCreate);
  PT_FIND_CUDA(cuStreamDestroy_v2);
  PT_FIND_CUDA(cuStreamQuery);
#undef PT_FIND_NCCL
#undef PT_FIND_CUDA
  return std::shared_ptr<const NcclLibrary>(std::move(found));
}

}  // namespace pagetide
