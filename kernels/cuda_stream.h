// CudaStream: cudaStream_t by its real name, so that launchers can be declared, and called by code
// that holds a stream, without the CUDA headers.
//
// Launchers (…Cuda) are defined in the library pt_kernels_cuda, which is built where the toolkit
// is. They only enqueue work on the stream they are given; every pointer of their arguments is
// device memory that must live until the stream has passed, and arguments are not checked again.
// They return the cudaError_t of the launch, 0 for success.
#ifndef PAGETIDE_KERNELS_CUDA_STREAM_H_
#define PAGETIDE_KERNELS_CUDA_STREAM_H_

struct CUstream_st;

namespace pagetide::kernels {

using CudaStream = CUstream_st*;

}  // namespace pagetide::kernels

#endif  // PAGETIDE_KERNELS_CUDA_STREAM_H_
