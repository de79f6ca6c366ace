// CUDA's declaration specifiers for the system's C++ compiler.

#pragma once

// Of NVIDIA's headers these two are left out: the specifiers, as they stand below, and the host's API.
#define __HOST_DEFINES_H__
#define __CUDA_RUNTIME_API_H__
#define __CUDA_RUNTIME_H__

#define __host__
#define __device__
#define __global__ __attribute__((noinline))
#define __constant__
#define __managed__
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __maxnreg__(...)
// One block at a time runs on a thread of the operating system, so what is local to it is the
// block's. "used": else the compiler would take what nothing writes for zeros, and read it no more.
// `extern __shared__` names are defined by a generated translation unit.
#define __shared__ __attribute__((used)) thread_local

#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)

#define __device_builtin__
#define __cudart_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
