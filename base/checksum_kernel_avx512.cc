// XXH3-128 for machines with AVX512.
#define PAGETIDE_CHECKSUM_KERNEL Avx512Kernel
#include "base/checksum_kernel.inc"
