// XXH3-128 compiled once for each vector extension; base/checksum.cc chooses at run time. The
// distribution's library is built for SSE2 only, at half the speed. Plain C types: what these files
// are compiled with must not leak into inline functions that other files share.
#ifndef PAGETIDE_BASE_CHECKSUM_KERNEL_H_
#define PAGETIDE_BASE_CHECKSUM_KERNEL_H_

#include <cstddef>
#include <cstdint>

namespace pagetide::checksum_internal {

struct Kernel {
  // `state` is kStateBytes bytes at a multiple of kStateAlignment.
  void (*reset)(void* state);
  void (*update)(void* state, const void* bytes, size_t num_bytes);
  void (*digest)(const void* state, uint64_t* low, uint64_t* high);
  void (*hash)(const void* bytes, size_t num_bytes, uint64_t* low, uint64_t* high);
};

inline constexpr size_t kStateBytes = 576;
inline constexpr size_t kStateAlignment = 64;

const Kernel& PortableKernel();
#if defined(__x86_64__)
const Kernel& Avx2Kernel();
const Kernel& Avx512Kernel();
#endif

}  // namespace pagetide::checksum_internal

#endif  // PAGETIDE_BASE_CHECKSUM_KERNEL_H_
