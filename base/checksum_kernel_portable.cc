// XXH3-128 for every machine of the target.
#define PAGETIDE_CHECKSUM_KERNEL PortableKernel
#include "base/checksum_kernel.inc"
