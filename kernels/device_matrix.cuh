// The instructions of tensor cores and of asynchronous copies, one function each; what the device
// source uses of PTX beyond CUDA C++ is here. The layouts of fragments are those of the PTX manual
// (ldmatrix, mma.m16n8k16). Without nvcc they run on the CPU (tests/kernels/emulated_cuda).
#ifndef PAGETIDE_KERNELS_DEVICE_MATRIX_CUH_
#define PAGETIDE_KERNELS_DEVICE_MATRIX_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/convert.h"
#include "kernels/kv_type.h"

namespace pagetide::kernels::device {

#ifdef __CUDACC__
__device__ inline unsigned SharedAddress(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}
#endif

// Begins to copy the first `num_bytes` (1 to 16) at `from` in global memory to shared memory, zeros
// behind them up to 16. Both addresses are multiples of 16.
__device__ inline void CopyAsync16(void* to, const void* from, int num_bytes) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SharedAddress(to)),
               "l"(__cvta_generic_to_global(from)), "r"(num_bytes)
               : "memory");
#else
  emulated_cuda::CopyAsync16(to, from, num_bytes);
#endif
}

// Closes a group of copies of this thread.
__device__ inline void CommitCopies() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulated_cuda::CommitCopies();
#endif
}

// Waits until this thread's groups but the last `kPending` are there; others see them after a
// barrier.
template <int kPending>
__device__ inline void WaitForCopies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  emulated_cuda::WaitForCopies(kPending);
#endif
}

// Four 8×8 matrices of 16-bit elements in shared memory: lane i brings the address of row i % 8 of
// matrix i / 8, a multiple of 16, and gets of each matrix two elements of row lane / 4, those of
// columns 2 * (lane % 4) and the next; kTransposed: of column lane / 4, rows likewise.
template <bool kTransposed>
__device__ inline void LoadMatrices(uint32_t out[4], const void* row) {
#ifdef __CUDACC__
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(SharedAddress(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(SharedAddress(row))
                 : "memory");
  }
#else
  emulated_cuda::LoadMatrices(kTransposed, out, row);
#endif
}

// sum (16×8, f32) += a (16×16, by rows) · b (16×8, by columns); f16 or bf16 elements.
template <bool kBF16>
__device__ inline void MultiplyAdd(float sum[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
  if constexpr (kBF16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#else
  emulated_cuda::MultiplyAdd(sum, a, b0, b1, kBF16 ? BF16ToF32 : F16ToF32);
#endif
}

// Two elements, rounded to nearest, `low` in the low half.
template <bool kBF16>
__device__ inline uint32_t PackTwo(float low, float high) {
#ifdef __CUDACC__
  uint32_t packed;
  if constexpr (kBF16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
#else
  const auto narrow = kBF16 ? F32ToBF16 : F32ToF16;
  return static_cast<uint32_t>(narrow(low)) | static_cast<uint32_t>(narrow(high)) << 16;
#endif
}

// Two fp8 elements of the low 16 bits as two f16, exactly.
template <KvType kType>
__device__ inline uint32_t F8ToF16Twice(uint32_t two) {
  static_assert(kType == KvType::kF8E4M3 || kType == KvType::kF8E5M2);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint32_t halves;
  if constexpr (kType == KvType::kF8E4M3) {
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(two)));
  } else {
    asm("cvt.rn.f16x2.e5m2x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(two)));
  }
  return halves;
#else
  const uint8_t low = static_cast<uint8_t>(two);
  const uint8_t high = static_cast<uint8_t>(two >> 8);
  if constexpr (kType == KvType::kF8E5M2) {
    return static_cast<uint32_t>(low) << 8 | static_cast<uint32_t>(high) << 24;
  }
  return PackTwo<false>(F8E4M3ToF32(low), F8E4M3ToF32(high));
#endif
}

}  // namespace pagetide::kernels::device

#endif  // PAGETIDE_KERNELS_DEVICE_MATRIX_CUH_
