// What the CUDA kernels share: numbers of every type, moved one by one or up to 16 bytes at once, and launching. Only
// what tests/support/cuda_emulation stands in for is used, so that the same sources run on a machine without a GPU.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "types.h"

extern __shared__ __align__(128) unsigned char shared_memory[];

namespace depass {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ T rounded(float x);
template <>
__device__ inline float rounded<float>(float x) { return x; }
template <>
__device__ inline __nv_bfloat16 rounded<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ inline __half rounded<__half>(float x) { return __float2half_rn(x); }

// Number `at` of an array whose type is known only when it runs: for what is read seldom, and for odd strides.
__device__ inline float load(const void* data, Type type, int64_t at) {
  switch (type) {
    case Type::bf16: return to_float(static_cast<const __nv_bfloat16*>(data)[at]);
    case Type::f16: return to_float(static_cast<const __half*>(data)[at]);
    default: return static_cast<const float*>(data)[at];
  }
}

__device__ inline void store(void* data, Type type, int64_t at, float x) {
  switch (type) {
    case Type::bf16: static_cast<__nv_bfloat16*>(data)[at] = rounded<__nv_bfloat16>(x); break;
    case Type::f16: static_cast<__half*>(data)[at] = rounded<__half>(x); break;
    default: static_cast<float*>(data)[at] = x;
  }
}

// Neighbouring numbers as they lie in memory: 4 to 16 bytes moved by one instruction, 32 by two.
template <typename T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Run {
  T at[V];
};

template <typename T, int V>
__device__ void load_run(const T* from, float (&x)[V]) {
  const Run<T, V> run = *reinterpret_cast<const Run<T, V>*>(from);
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = to_float(run.at[i]);
}

__device__ inline uint32_t bits(float x) { return __float_as_uint(x); }
__device__ inline uint32_t bits(__nv_bfloat16 x) { return __bfloat16_as_ushort(x); }
__device__ inline uint32_t bits(__half x) { return __half_as_ushort(x); }

// Said outright (__stcg): left to itself the compiler makes a store of each number.
template <typename T, int V>
__device__ void store_run(T* to, const float (&x)[V]) {
  if constexpr (V == 1) {
    *to = rounded<T>(x[0]);
  } else {
    constexpr int per_word = 4 / sizeof(T), words = V / per_word;
    uint32_t word[words] = {};
#pragma unroll
    for (int i = 0; i < V; ++i) word[i / per_word] |= bits(rounded<T>(x[i])) << 16 * (i % per_word);
    if constexpr (words == 2) __stcg(reinterpret_cast<uint2*>(to), make_uint2(word[0], word[1]));
#pragma unroll
    for (int i = 0; i + 4 <= words; i += 4) {
      __stcg(reinterpret_cast<uint4*>(to) + i / 4, make_uint4(word[i], word[i + 1], word[i + 2], word[i + 3]));
    }
  }
}

template <int V>
__device__ void store_run(void* data, Type type, int64_t at, const float (&x)[V]) {
  switch (type) {
    case Type::bf16: store_run(static_cast<__nv_bfloat16*>(data) + at, x); break;
    case Type::f16: store_run(static_cast<__half*>(data) + at, x); break;
    default: store_run(static_cast<float*>(data) + at, x);
  }
}

inline int64_t size_of(Type type) { return type == Type::f32 ? 4 : type == Type::f64 ? 8 : 2; }

// Whether every run of `count` numbers that begins at a multiple of it can be moved 16 bytes at a time (8 if shorter).
inline bool aligned(const void* data, Type type, int64_t stride, int64_t count) {
  const int64_t bytes = count * size_of(type) < 16 ? count * size_of(type) : 16;
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && stride * size_of(type) % bytes == 0;
}

inline bool aligned(const Matrix& m, int64_t count) { return aligned(m.data, m.type, m.stride, count); }

constexpr int64_t kMostBlocks = 2147483647;  // along x, by every card

template <typename... Arguments>
cudaError_t launch(void (*kernel)(Arguments...), dim3 grid, dim3 block, int64_t shared, void* stream,
                   Arguments... arguments) {
  if (shared > 48 * 1024) {  // more than that must be asked for
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace depass
