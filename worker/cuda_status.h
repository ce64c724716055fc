// From the CUDA runtime's error codes to absl::Status. Stateless.
#ifndef PAGETIDE_WORKER_CUDA_STATUS_H_
#define PAGETIDE_WORKER_CUDA_STATUS_H_

#include <cuda_runtime.h>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace pagetide {

// RESOURCE_EXHAUSTED where memory is lacking, else INTERNAL: after most errors of a kernel the
// process cannot use its GPU any more.
inline absl::Status CudaStatus(absl::string_view action, int error) {
  if (error == cudaSuccess) return absl::OkStatus();
  const auto code = static_cast<cudaError_t>(error);
  const std::string text =
      absl::StrCat(action, ": ", cudaGetErrorName(code), ": ", cudaGetErrorString(code));
  (void)cudaGetLastError();  // an error that does not stick is not the next call's
  if (code == cudaErrorMemoryAllocation) return absl::ResourceExhaustedError(text);
  return absl::InternalError(text);
}

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_CUDA_STATUS_H_
