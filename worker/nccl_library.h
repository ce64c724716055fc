// NcclLibrary: the functions of libnccl.so.2 and of the CUDA driver that a NcclCollective calls,
// found at run time, so that no program needs either to start. The prototypes, types and numbers
// are those of nccl.h of NCCL 2.14 and of cuda.h of CUDA 12, which later versions keep.
//
// Immutable after Load; thread-safe. The libraries stay in the process: NCCL has threads of its
// own.
#ifndef PAGETIDE_WORKER_NCCL_LIBRARY_H_
#define PAGETIDE_WORKER_NCCL_LIBRARY_H_

#include <cstddef>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace pagetide {

// ncclUniqueId
struct NcclUniqueId {
  char internal[128];
};

// ncclConfig_t of 2.14; `size` and `version` tell a later library that the fields behind are its
// own defaults.
struct NcclConfig {
  size_t size = sizeof(NcclConfig);
  unsigned int magic = 0xcafebeef;
  unsigned int version = 21400;
  int blocking = 0;
};

// ncclResult_t
inline constexpr int kNcclSuccess = 0;
inline constexpr int kNcclInProgress = 7;
// ncclDataType_t: ncclUint8
inline constexpr int kNcclUint8 = 1;
// CUresult
inline constexpr int kCudaSuccess = 0;
inline constexpr int kCudaNotReady = 600;
// CU_STREAM_NON_BLOCKING
inline constexpr unsigned int kCudaStreamNonBlocking = 1;

struct NcclLibrary {
  struct Paths {
    std::string nccl = "libnccl.so.2";
    std::string cuda = "libcuda.so.1";
  };
  // FAILED_PRECONDITION: NO_NCCL (not there, or without a function), NO_GPU (no driver).
  static absl::StatusOr<std::shared_ptr<const NcclLibrary>> Load(const Paths& paths);

  // ncclComm_t, CUcontext and CUstream are pointers to what their libraries know.
  int (*ncclGetUniqueId)(NcclUniqueId*) = nullptr;
  int (*ncclCommInitRankConfig)(void** comm, int nranks, NcclUniqueId id, int rank,
                                NcclConfig* config) = nullptr;
  int (*ncclCommGetAsyncError)(void* comm, int* result) = nullptr;
  int (*ncclCommFinalize)(void* comm) = nullptr;
  int (*ncclCommDestroy)(void* comm) = nullptr;
  int (*ncclCommAbort)(void* comm) = nullptr;
  const char* (*ncclGetErrorString)(int result) = nullptr;
  int (*ncclBroadcast)(const void* from, void* to, size_t count, int type, int root, void* comm,
                       void* stream) = nullptr;
  int (*ncclSend)(const void* from, size_t count, int type, int peer, void* comm,
                  void* stream) = nullptr;
  int (*ncclRecv)(void* to, size_t count, int type, int peer, void* comm, void* stream) = nullptr;

  int (*cuInit)(unsigned int flags) = nullptr;
  int (*cuDeviceGetCount)(int* count) = nullptr;
  int (*cuDeviceGet)(int* device, int ordinal) = nullptr;
  int (*cuDevicePrimaryCtxRetain)(void** context, int device) = nullptr;
  int (*cuDevicePrimaryCtxRelease_v2)(int device) = nullptr;
  int (*cuCtxSetCurrent)(void* context) = nullptr;
  int (*cuStreamCreate)(void** stream, unsigned int flags) = nullptr;
  int (*cuStreamDestroy_v2)(void* stream) = nullptr;
  int (*cuStreamQuery)(void* stream) = nullptr;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_NCCL_LIBRARY_H_
