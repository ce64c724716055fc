// XXH3-128 for machines with AVX2.
#define PAGETIDE_CHECKSUM_KERNEL Avx2Kernel
#include "base/checksum_kernel.inc"
