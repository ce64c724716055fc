// PAGETIDE_HD marks what runs on host and device alike: plain functions of values, compiled by the
// C++ compiler and by nvcc from the same text, so that twins agree on every bit.
//
// That agreement needs a*b+c to stay two roundings on both sides: -ffp-contract=off for the C++
// compiler, -fmad=false for nvcc, and neither fast math nor flushing of subnormals.
#ifndef PAGETIDE_KERNELS_HOST_DEVICE_H_
#define PAGETIDE_KERNELS_HOST_DEVICE_H_

#ifdef __CUDACC__
#define PAGETIDE_HD __host__ __device__
#else
#define PAGETIDE_HD
#endif

#endif  // PAGETIDE_KERNELS_HOST_DEVICE_H_
