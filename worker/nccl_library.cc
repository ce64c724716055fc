#include "worker/nccl_library.h"

#include "base/status_macros.h"
#include "worker/run_time_library.h"

namespace pagetide {

absl::StatusOr<std::shared_ptr<const NcclLibrary>> NcclLibrary::Load(const Paths& paths) {
  PT_ASSIGN_OR_RETURN(const RunTimeLibrary nccl, RunTimeLibrary::Open(paths.nccl, "NO_NCCL"));
  PT_ASSIGN_OR_RETURN(const RunTimeLibrary cuda, RunTimeLibrary::Open(paths.cuda, "NO_GPU"));
  auto found = std::make_shared<NcclLibrary>();
#define PT_FIND_NCCL(name) PT_RETURN_IF_ERROR(nccl.Find(#name, &found->name))
#define PT_FIND_CUDA(name) PT_RETURN_IF_ERROR(cuda.Find(#name, &found->name))
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
