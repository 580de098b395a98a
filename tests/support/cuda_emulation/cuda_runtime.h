// What csrc/*.cu use of CUDA, on the CPU: a block's threads are fibers that take turns at __syncthreads, so that the
// very same sources can be compiled by g++ and held against the reference on a machine without a GPU.
//
// Stricter than a card where that finds mistakes: shared memory begins as NaN, threads run forwards and backwards in
// turn between barriers, asynchronous copies arrive only when they are waited for, every thread must come to every
// barrier, and a launch is refused that the smallest of the cards that we build for would refuse.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

using std::fmaxf, std::fminf, std::exp2f;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorMisalignedAddress = 716,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
};
inline const char* cudaGetErrorString(cudaError_t) { return "an emulated CUDA error"; }
using cudaStream_t = void*;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace emulation {
cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread);
cudaError_t allow_shared(const void* kernel, int bytes);
void barrier();
void fail(cudaError_t error);  // what the launch returns in the end
void copy_later(void* to, const void* from, size_t bytes, size_t zeros);
void commit();
void wait_for_all_but(size_t last);
}  // namespace emulation

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  return emulation::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
}

template <typename... Expected, typename... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... arguments) {
  return emulation::run(*config, reinterpret_cast<const void*>(kernel), [&] { kernel(arguments...); });
}

inline void __syncthreads() { emulation::barrier(); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
template <typename T>
void __stcg(T* to, T x) {
  *to = x;
}
