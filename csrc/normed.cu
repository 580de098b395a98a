// normed on CUDA: a block takes one row. Its threads read runs of numbers, sum them where the row is centred, and write the
// scaled runs; a row that is read a second time comes from the cache.
#include "normed.h"

#include "device.cuh"

namespace depass {
namespace {

constexpr int kThreads = 128;

__device__ inline float mean_of(const Normed& call, int64_t row) {
  float* sums = reinterpret_cast<float*>(shared_memory);  // [kThreads]
  float sum = 0.0f;
  for (int64_t column = threadIdx.x; column < call.columns; column += kThreads)
    sum += load(call.state.data, call.state.type, row * call.state.stride + column);
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  return sums[0] / static_cast<float>(call.columns);
}

template <int V>
__device__ inline void load_run_of(const void* data, Type type, int64_t at, float (&x)[V]) {
  switch (type) {
    case Type::bf16: load_run(static_cast<const __nv_bfloat16*>(data) + at, x); break;
    case Type::f16: load_run(static_cast<const __half*>(data) + at, x); break;
    default: load_run(static_cast<const float*>(data) + at, x);
  }
}

template <int V>
__global__ void __launch_bounds__(kThreads) norm_rows(Normed call) {
  const int64_t i = blockIdx.x;
  const int64_t row = call.rows ? call.rows[i] : i;
  const float scale = call.scale ? call.scale[call.position[i]] : 1.0f;
  const float mean = call.centred ? mean_of(call, row) : 0.0f;
  for (int64_t column = threadIdx.x * V; column < call.columns; column += kThreads * V) {
    float x[V];
    load_run_of<V>(call.state.data, call.state.type, row * call.state.stride + column, x);
#pragma unroll
    for (int j = 0; j < V; ++j) x[j] = (x[j] - mean) * scale;
    if (call.weight) {
      float gamma[V];
      load_run_of<V>(call.weight, call.weight_type, column, gamma);
#pragma unroll
      for (int j = 0; j < V; ++j) x[j] *= gamma[j];
    }
    store_run(call.out.data, call.out.type, i * call.out.stride + column, x);
  }
}

}  // namespace

int normed_cuda(const Normed& call, void* stream) {
  if (call.count == 0) return 0;
  if (call.count > kMostBlocks) return cudaErrorInvalidConfiguration;
  const bool runs = call.columns % 8 == 0 && aligned(call.state, 8) && aligned(call.out, 8) &&
                    (!call.weight || aligned(call.weight, call.weight_type, 0, 8));
  const dim3 grid(static_cast<unsigned>(call.count)), block(kThreads);
  const int64_t shared = kThreads * static_cast<int64_t>(sizeof(float));
  return runs ? launch(norm_rows<8>, grid, block, shared, stream, call)
              : launch(norm_rows<1>, grid, block, shared, stream, call);
}

}  // namespace depass
