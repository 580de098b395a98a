// Tensor cores: a warp's first thread holds the whole fragment and does the work of all.
#pragma once
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
enum layout_t { mem_row_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
  static_assert(M == 16 && N == 16 && K == 16);
  float at[16][16];
};

inline bool first_of_warp() { return (threadIdx.x + blockDim.x * threadIdx.y) % 32 == 0; }
inline float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float wide(__half x) { return __half2float(x); }

inline void check(const void* at, size_t row_bytes) {
  if (reinterpret_cast<uintptr_t>(at) % 32 || row_bytes % 16) emulation::fail(cudaErrorMisalignedAddress);
}

template <typename F>
void fill_fragment(F& fragment, float value) {
  if (!first_of_warp()) return;
  for (auto& row : fragment.at)
    for (float& x : row) x = value;
}

template <typename F, typename T>
void load_matrix_sync(F& fragment, const T* from, unsigned stride) {
  if (!first_of_warp()) return;
  check(from, stride * sizeof(T));
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) fragment.at[i][j] = wide(from[i * stride + j]);
}

template <typename C, typename A, typename B>
void mma_sync(C& sum, const A& a, const B& b, const C& before) {
  if (!first_of_warp()) return;
  C whole = before;
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 16; ++j) whole.at[i][j] += a.at[i][k] * b.at[k][j];
  sum = whole;
}

template <typename C>
void store_matrix_sync(float* to, const C& fragment, unsigned stride, layout_t) {
  if (!first_of_warp()) return;
  check(to, stride * sizeof(float));
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) to[i * stride + j] = fragment.at[i][j];
}

}  // namespace nvcuda::wmma
