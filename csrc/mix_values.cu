// mix_values on CUDA. A block makes one tile for one query head: 64 queries of one source, its sum over the keys from
// the source's start up to the tile's last query. Halves go through the tensor cores, anything else through plain fp32.
#include "mix_values.h"

#include <cuda_pipeline.h>
#include <mma.h>

#include "device.cuh"

namespace depass {
namespace {

constexpr int kQueries = kMixQueriesCuda;
static_assert(kMixSourcesCuda == 1, "a tile's rows are queries alone");

// A block's tile, and where its rows lie.
struct Tile {
  int64_t head, position;  // query head; the staircase's first position
  int source, query, first_key;
  int limit;  // behind its last query, and so behind its last key

  __device__ explicit Tile(const MixValues& call) {
    const MixTile tile = call.tiles[blockIdx.x / call.heads];  // the longest first
    head = blockIdx.x % call.heads;
    position = call.position_start[tile.staircase];
    const int length = static_cast<int>(call.position_start[tile.staircase + 1] - position);
    source = tile.source;
    query = tile.query;
    first_key = tile.first_key;
    limit = query + kQueries < length ? query + kQueries : length;
    prompt = call.prompt[tile.staircase];
  }

  // The source's row at a position, or -1 where it has none. Once it has started it has one everywhere.
  __device__ int64_t row(const MixValues& call, int t) const {
    return t < first_key || t >= limit ? -1 : call.row_start[position + t] + source;
  }

  __device__ int64_t pattern_at(const MixValues& call, int q, int key) const {
    return prompt * call.prompt_stride + head * call.head_stride + q * call.query_stride + key;
  }

  __device__ int64_t value_column(const MixValues& call) const {
    return head * call.kv_heads / call.heads * call.head_dim;
  }

 private:
  int64_t prompt;
};

// ---- bf16 and fp16: four warps, each half of the queries and half of the columns, 32 keys a step, two steps in shared
// memory: while one is multiplied the next one's values are copied and its pattern waits in registers.

constexpr int kKeys = 32;
constexpr int kThreads = 128;
constexpr int kPad = 8;  // so that the rows of a 16 x 16 piece fall on different banks

template <int D>  // columns of the tile, head_dim or more
struct Shared {
  static constexpr int pattern_row = kKeys + kPad, values_row = D + kPad, out_row = D + kPad / 2;
  static constexpr int pattern = kQueries * pattern_row, values = kKeys * values_row;  // halves, of one step
  static constexpr int steps_bytes = 2 * 2 * (pattern + values), out_bytes = 4 * kQueries * out_row;
  static constexpr int bytes = steps_bytes > out_bytes ? steps_bytes : out_bytes;
};

template <typename T>
struct PatternRows {  // of one step, between global and shared memory: two runs of 8 keys a thread
  alignas(16) T x[2][8];

  __device__ static int key() { return threadIdx.x % 4 * 8; }
  __device__ static int row(int i) { return threadIdx.x / 4 + i * (kThreads / 4); }

  __device__ void read(const MixValues& call, const Tile& tile, int first, bool runs) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int q = tile.query + row(i), k = first + key();
      const int count = q < tile.limit ? tile.limit - k : 0;
      const T* from = static_cast<const T*>(call.pattern) + tile.pattern_at(call, q, k);
      if (runs && count >= 8) {
        *reinterpret_cast<uint4*>(x[i]) = *reinterpret_cast<const uint4*>(from);
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) x[i][j] = j < count ? from[j] : rounded<T>(0.0f);
      }
    }
  }

  __device__ void keep(T* pattern) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      *reinterpret_cast<uint4*>(pattern + row(i) * (kKeys + kPad) + key()) = *reinterpret_cast<const uint4*>(x[i]);
    }
  }
};

// One step's values, zeros where the source has no row and behind head_dim.
template <typename T, int D>
struct ValueRows {
  const MixValues& call;
  const Tile& tile;
  bool runs;
  int dim = static_cast<int>(call.head_dim), columns = (dim + 15) / 16 * 16;

  // Begins to copy runs of 8; numbers that lie oddly are copied at once.
  __device__ void copy(int first, T* values) const {
    const T* from = static_cast<const T*>(call.values.data) + tile.value_column(call);
    if (runs) {
      for (int i = threadIdx.x; i < kKeys * D / 8; i += kThreads) {
        const int key = i / (D / 8), column = i % (D / 8) * 8;
        if (column >= columns) continue;
        const int64_t row = column < dim ? tile.row(call, first + key) : -1;
        const T* source = row < 0 ? from : from + row * call.values.stride + column;
        __pipeline_memcpy_async(values + key * Shared<D>::values_row + column, source, 16, row < 0 ? 16 : 0);
      }
    } else {
      for (int i = threadIdx.x; i < kKeys * D; i += kThreads) {
        const int key = i / D, column = i % D;
        if (column >= columns) continue;
        const int64_t row = column < dim ? tile.row(call, first + key) : -1;
        const T x = row < 0 ? rounded<T>(0.0f) : from[row * call.values.stride + column];
        values[key * Shared<D>::values_row + column] = x;
      }
    }
    __pipeline_commit();
  }
};

template <typename T, int D>
__global__ void __launch_bounds__(kThreads, D <= 128 ? 3 : 2)
    mix_halves(MixValues call, bool pattern_runs, bool values_runs, bool out_runs) {
  using namespace nvcuda;
  using S = Shared<D>;
  constexpr int kPieces = D / 32;  // of 16 columns, a warp's
  T* pattern = reinterpret_cast<T*>(shared_memory);  // [2, queries, keys]
  T* values = pattern + 2 * S::pattern;              // [2, keys, D]
  const Tile tile(call);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int query = warp / 2 * 32, piece = warp % 2 * kPieces;  // the warp's first of the tile
  const int dim = static_cast<int>(call.head_dim);
  const int begin = tile.first_key / 8 * 8;  // so that runs of the pattern stay runs; before first_key are no rows
  const int steps = (tile.limit - begin + kKeys - 1) / kKeys;

  wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum[2][kPieces];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < kPieces; ++j) wmma::fill_fragment(sum[i][j], 0.0f);
  }

  PatternRows<T> next;
  const ValueRows<T, D> rows{call, tile, values_runs};
  rows.copy(begin, values);
  next.read(call, tile, begin, pattern_runs);
  next.keep(pattern);
  for (int step = 0; step < steps; ++step) {
    const int now = step % 2, first = begin + step * kKeys;
    __pipeline_wait_prior(0);
    __syncthreads();  // this step's are there, and nobody reads the last step's any more
    if (step + 1 < steps) {
      rows.copy(first + kKeys, values + (1 - now) * S::values);
      next.read(call, tile, first + kKeys, pattern_runs);
    }
#pragma unroll
    for (int key = 0; key < kKeys; key += 16) {
      wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> weight[2];
      bool needed[2];  // above the diagonal there are zeros, and queries before first_key have no row
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int last = tile.query + query + i * 16 + 15;
        needed[i] = last >= first + key && last >= tile.first_key;
        if (needed[i]) {
          wmma::load_matrix_sync(weight[i], pattern + now * S::pattern + (query + i * 16) * S::pattern_row + key,
                                 S::pattern_row);
        }
      }
      if (!needed[1]) continue;
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        if ((piece + j) * 16 >= dim) continue;
        wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::row_major> value;
        wmma::load_matrix_sync(value, values + now * S::values + key * S::values_row + (piece + j) * 16, S::values_row);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (needed[i]) wmma::mma_sync(sum[i][j], weight[i], value, sum[i][j]);
        }
      }
    }
    if (step + 1 < steps) next.keep(pattern + (1 - now) * S::pattern);
  }

  __syncthreads();  // the sums go where the steps were
  float* out = reinterpret_cast<float*>(shared_memory);  // [queries, D]
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      wmma::store_matrix_sync(out + (query + i * 16) * S::out_row + (piece + j) * 16, sum[i][j], S::out_row,
                              wmma::mem_row_major);
    }
  }
  __syncthreads();
  for (int q = warp; q < kQueries; q += kThreads / 32) {
    const int64_t row = tile.row(call, tile.query + q);
    if (row < 0) continue;
    const float scale = call.query_scale ? call.query_scale[tile.position + tile.query + q] : 1.0f;
    const int64_t to = row * call.out.stride + tile.head * dim;
    if (out_runs) {
      for (int column = lane * 4; column < dim; column += 32 * 4) {
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = out[q * S::out_row + column + i] * scale;
        store_run(call.out.data, call.out.type, to + column, x);
      }
    } else {
      for (int column = lane; column < dim; column += 32) {
        store(call.out.data, call.out.type, to + column, out[q * S::out_row + column] * scale);
      }
    }
  }
}

// ---- fp32, and types that do not match: 64 columns a block, 16 keys a step, 4 x 4 sums a thread.

constexpr int kColumns32 = 64, kKeys32 = 16, kRow32 = 64 + 4;

__global__ void __launch_bounds__(256) mix_singles(MixValues call) {
  float* pattern = reinterpret_cast<float*>(shared_memory);  // [keys, queries]
  float* values = pattern + kKeys32 * kRow32;                // [keys, columns]
  const Tile tile(call);
  const int thread = threadIdx.x, query = thread / 16 * 4, column = thread % 16 * 4;
  const int dim = static_cast<int>(call.head_dim), begin = blockIdx.y * kColumns32;
  float sum[4][4] = {};
  for (int first = tile.first_key; first < tile.limit; first += kKeys32) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = thread % 16, q = thread / 16 + i * 16;
      float x = 0;
      if (tile.query + q < tile.limit && first + key < tile.limit)
        x = load(call.pattern, call.pattern_type, tile.pattern_at(call, tile.query + q, first + key));
      pattern[key * kRow32 + q] = x;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = thread / 64 + i * 4, at = begin + thread % 64;
      const int64_t row = at < dim ? tile.row(call, first + key) : -1;
      values[key * kRow32 + thread % 64] =
          row < 0 ? 0.0f
                  : load(call.values.data, call.values.type, row * call.values.stride + tile.value_column(call) + at);
    }
    __syncthreads();
#pragma unroll
    for (int key = 0; key < kKeys32; ++key) {
      float weight[4], value[4];
      load_run(pattern + key * kRow32 + query, weight);
      load_run(values + key * kRow32 + column, value);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += weight[i] * value[j];
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int q = tile.query + query + i;
    const int64_t row = tile.row(call, q);
    if (row < 0) continue;
    const float scale = call.query_scale ? call.query_scale[tile.position + q] : 1.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (begin + column + j >= dim) continue;
      store(call.out.data, call.out.type, row * call.out.stride + tile.head * dim + begin + column + j,
            sum[i][j] * scale);
    }
  }
}

template <typename T, int D>
cudaError_t launch_halves(const MixValues& call, unsigned blocks, void* stream) {
  const bool pattern_runs = aligned(call.pattern, call.pattern_type, call.query_stride, 8) &&
                            call.head_stride % 8 == 0 && call.prompt_stride % 8 == 0;
  const bool values_runs = call.head_dim % 8 == 0 && aligned(call.values, 8);
  const bool out_runs = call.head_dim % 4 == 0 && aligned(call.out, 4);
  return launch(mix_halves<T, D>, dim3(blocks), dim3(kThreads), Shared<D>::bytes, stream, call, pattern_runs,
                values_runs, out_runs);
}

template <typename T>
cudaError_t launch_type(const MixValues& call, unsigned blocks, void* stream) {
  if (call.head_dim <= 64) return launch_halves<T, 64>(call, blocks, stream);
  if (call.head_dim <= 128) return launch_halves<T, 128>(call, blocks, stream);
  return launch_halves<T, 256>(call, blocks, stream);
}

}  // namespace

int mix_values_cuda(const MixValues& call, void* stream) {
  if (call.pattern_type == Type::f64 || call.values.type == Type::f64 || call.out.type == Type::f64)
    return cudaErrorNotSupported;
  const int64_t blocks = call.tile_count * call.heads;
  if (blocks == 0 || call.head_dim == 0) return cudaSuccess;
  if (blocks > kMostBlocks) return cudaErrorInvalidConfiguration;
  const unsigned x = static_cast<unsigned>(blocks);
  if (call.pattern_type == call.values.type && call.head_dim <= 256) {
    if (call.values.type == Type::bf16) return launch_type<__nv_bfloat16>(call, x, stream);
    if (call.values.type == Type::f16) return launch_type<__half>(call, x, stream);
  }
  const unsigned y = static_cast<unsigned>((call.head_dim + kColumns32 - 1) / kColumns32);
  return launch(mix_singles, dim3(x, y), dim3(256), 2 * kKeys32 * kRow32 * 4, stream, call);
}

}  // namespace depass
