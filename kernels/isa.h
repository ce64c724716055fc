// Isa: which compilation of a host kernel runs. A choice of speed only: the bits are the same.
#ifndef PAGETIDE_KERNELS_ISA_H_
#define PAGETIDE_KERNELS_ISA_H_

#include <cstdint>

namespace pagetide::kernels {

// kBaseline is what every machine of the architecture runs.
enum class Isa : uint8_t { kBest, kBaseline };

}  // namespace pagetide::kernels

#endif  // PAGETIDE_KERNELS_ISA_H_
