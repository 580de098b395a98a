// share_hidden on CUDA. A block has all rows of one position in a strip of columns: its warps take the rows in turn,
// its lanes the columns, four each where the numbers lie so that they can be moved at once. A thread keeps its first
// rows, so that up to 256 sources are read once and written once; beyond that the rows are read twice. No thread reads
// what another writes: `out` may be `gate`.
#include "share_hidden.h"

#include <cfloat>
#include <climits>
#include <cmath>

#include "device.cuh"

namespace depass {
namespace {

constexpr int kLanes = 32;
constexpr int kKept = 15;      // rows that a thread keeps
constexpr int kMostWarps = 16;

// V neighbouring numbers of every row that the thread keeps. All are asked for before any is used.
template <int V, typename T>
__device__ void read(const void* gate, int64_t at, int64_t step, int count, float (&kept)[kKept][V]) {
  const T* from = static_cast<const T*>(gate) + at;
#pragma unroll
  for (int i = 0; i < kKept; ++i, from += step) {
    if (i < count) load_run(from, kept[i]);
  }
}

// Each thread's part of a sum (a largest, a smallest) per column becomes the block's.
template <typename S, int V, typename T, typename Op>
__device__ void across_warps(S (&state)[V], T S::*field, Op op) {
  constexpr int columns = kLanes * V;
  const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
  if (warps == 1) return;
  T* part = reinterpret_cast<T*>(shared_memory);  // [warps, columns]
#pragma unroll
  for (int i = 0; i < V; ++i) part[warp * columns + i * kLanes + lane] = state[i].*field;
  __syncthreads();
  for (int column = warp * kLanes + lane; column < columns; column += warps * kLanes) {
    T whole = part[column];
    for (int other = 1; other < warps; ++other) whole = op(whole, part[other * columns + column]);
    part[column] = whole;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < V; ++i) state[i].*field = part[i * kLanes + lane];
  __syncthreads();
}

struct Sum {
  template <typename T>
  __device__ T operator()(T a, T b) const { return a + b; }
};
struct Largest {
  __device__ float operator()(float a, float b) const { return a > b || a != a ? a : b; }  // NaN is the largest
};
struct Smallest {
  template <typename T>
  __device__ T operator()(T a, T b) const { return a < b ? a : b; }
};

// The rules, one column each. A block of rows is looked at twice: for its extremes (`look`), upon which what was summed
// before is put in terms of the new ones (`turn`), and for its sum (`add`). `rows` counts those summed before.

struct Softmax {
  float high = -INFINITY, next = -INFINITY, sum = 0;

  // 2^(rate (x - top)), where all-minus-infinity has no use for its own top
  static __device__ float power(float x, float top, float rate) {
    return exp2f((x - (top == -INFINITY ? 0.0f : top)) * rate);
  }
  __device__ void look(float x, int) { next = fmaxf(next, x); }  // NaN is left to the sum
  __device__ void turn(int, float rate) {
    sum *= power(high, next, rate);
    high = next;
  }
  __device__ void add(float x, float rate) { sum += power(x, high, rate); }
  template <int V>
  static __device__ void across(Softmax (&state)[V], int rows, float rate) {
    across_warps(state, &Softmax::next, Largest{});
#pragma unroll
    for (int i = 0; i < V; ++i) state[i].turn(rows, rate);
    across_warps(state, &Softmax::sum, Sum{});
  }
  __device__ float part(float hidden, int) const { return hidden / sum; }
  __device__ float share(float x, int, float rate, float part) const { return power(x, high, rate) * part; }
};

struct Top {  // rule max
  float high = -INFINITY;
  int first = INT_MAX;

  __device__ void look(float x, int row) {  // once high is NaN it stays so; rows do not come in order
    if (x > high || x != x || (x == high && row < first)) {
      high = x;
      first = row;
    }
  }
  __device__ void turn(int, float) {}
  __device__ void add(float, float) {}
  template <int V>
  static __device__ void across(Top (&state)[V], int, float) {
    float own[V];
#pragma unroll
    for (int i = 0; i < V; ++i) own[i] = state[i].high;
    across_warps(state, &Top::high, Largest{});
#pragma unroll
    for (int i = 0; i < V; ++i) state[i].first = own[i] == state[i].high ? state[i].first : INT_MAX;
    across_warps(state, &Top::first, Smallest{});
  }
  __device__ float part(float hidden, int) const { return hidden; }
  __device__ float share(float, int row, float, float part) const {
    return high != high ? high : row == first ? part : 0.0f;
  }
};

// relu and linear: in proportion to the height over the lowest, which relu puts at 0. Heights are divided by the
// largest before they are summed, which keeps the sum finite; where that is 0, the sum is 0, or NaN if there was one.
template <bool kRelu>
struct Proportion {
  float low = kRelu ? 0.0f : INFINITY, high = kRelu ? 0.0f : -INFINITY, next_low = low, next_high = high, sum = 0;

  static __device__ float height(float x, float low) { return kRelu ? (x < 0 ? 0.0f : x) : x - low; }  // NaN stays
  static __device__ float divisor(float low, float high) { return high > low ? high - low : 1.0f; }
  __device__ void look(float x, int) {
    if (!kRelu) next_low = fminf(next_low, x);
    next_high = fmaxf(next_high, x);
  }
  __device__ void turn(int rows, float) {
    const float to = divisor(next_low, next_high);
    if (rows > 0) {
      sum *= divisor(low, high) / to;
      if (!kRelu) sum += rows * ((low - next_low) / to);
    }
    low = next_low;
    high = next_high;
  }
  __device__ void add(float x, float) { sum += height(x, low) / divisor(low, high); }
  template <int V>
  static __device__ void across(Proportion (&state)[V], int rows, float rate) {
    if (!kRelu) across_warps(state, &Proportion::next_low, Smallest{});
    across_warps(state, &Proportion::next_high, Largest{});
#pragma unroll
    for (int i = 0; i < V; ++i) state[i].turn(rows, rate);
    across_warps(state, &Proportion::sum, Sum{});
  }
  __device__ float part(float hidden, int parts) const {
    return high > low ? hidden / sum : hidden / parts + sum;
  }
  __device__ float share(float x, int, float, float part) const {
    return high > low ? height(x, low) / (high - low) * part : part;
  }
};

template <typename Rule, int V>
__global__ void __launch_bounds__(kLanes * kMostWarps) share(ShareHidden call, float rate) {
  const int64_t strips = (call.columns + kLanes * V - 1) / (kLanes * V);
  const int64_t t = call.positions - 1 - blockIdx.x / strips;  // the last positions have the most rows: they go first
  const int64_t column = (blockIdx.x % strips * kLanes + threadIdx.x) * V;
  const int64_t begin = call.row_start[t];
  const int rows = static_cast<int>(call.row_start[t + 1] - begin);
  if (rows == 0) return;
  const int skipped = static_cast<int>(call.skipped[t]);
  const bool inside = column < call.columns;
  const int warp = threadIdx.y, warps = blockDim.y;
  const int block = kKept * warps;  // rows that the warps keep together; the thread's own are warp, warp + warps, ...

  float kept[kKept][V];
  const auto read_block = [&](int first) {
    const int64_t at = (begin + first + warp) * call.gate.stride + column, step = warps * call.gate.stride;
    const int count = inside ? (rows - first - warp + warps - 1) / warps : 0;
    switch (call.gate.type) {
      case Type::bf16: read<V, __nv_bfloat16>(call.gate.data, at, step, count, kept); break;
      case Type::f16: read<V, __half>(call.gate.data, at, step, count, kept); break;
      default: read<V, float>(call.gate.data, at, step, count, kept);
    }
  };

  Rule state[V];
  int summed = 0;
  for (int first = (rows - 1) / block * block; first >= 0; first -= block) {  // so that the first block is kept
    read_block(first);
    int taken = 0;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int row = first + i * warps + warp;
      if (row >= rows || row == skipped || !inside) continue;
      ++taken;
#pragma unroll
      for (int v = 0; v < V; ++v) state[v].look(kept[i][v], row);
    }
#pragma unroll
    for (int v = 0; v < V; ++v) state[v].turn(summed, rate);
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int row = first + i * warps + warp;
      if (row >= rows || row == skipped || !inside) continue;
#pragma unroll
      for (int v = 0; v < V; ++v) state[v].add(kept[i][v], rate);
    }
    summed += taken;
  }

  float part[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    part[v] = inside ? load(call.hidden.data, call.hidden.type, t * call.hidden.stride + column + v) : 0.0f;
  }
  Rule::across(state, summed, rate);
  if (!inside) return;
#pragma unroll
  for (int v = 0; v < V; ++v) part[v] = state[v].part(part[v], rows - (skipped >= 0 ? 1 : 0));

  for (int first = 0; first < rows; first += block) {
    if (first > 0) read_block(first);
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int row = first + i * warps + warp;
      if (row >= rows) continue;
      float x[V];
#pragma unroll
      for (int v = 0; v < V; ++v) x[v] = row == skipped ? 0.0f : state[v].share(kept[i][v], row, rate, part[v]);
      store_run(call.out.data, call.out.type, (begin + row) * call.out.stride + column, x);
    }
  }
}

// No sharing, so nothing to keep: a thread has one column of a position.
__global__ void __launch_bounds__(kLanes * 8) taylor(ShareHidden call) {
  const int64_t strips = (call.columns + kLanes - 1) / kLanes;
  const int64_t t = call.positions - 1 - blockIdx.x / strips, column = blockIdx.x % strips * kLanes + threadIdx.x;
  if (column >= call.columns) return;
  const float total = load(call.gate_total.data, call.gate_total.type, t * call.gate_total.stride + column);
  const float hidden = load(call.hidden.data, call.hidden.type, t * call.hidden.stride + column);
  for (int64_t row = call.row_start[t] + threadIdx.y; row < call.row_start[t + 1]; row += blockDim.y) {
    const float x = load(call.gate.data, call.gate.type, row * call.gate.stride + column);
    store(call.out.data, call.out.type, row * call.out.stride + column, total == 0 ? 0.0f : x / total * hidden);
  }
}

template <typename Rule, int V>
cudaError_t launch_share(const ShareHidden& call, void* stream) {
  constexpr int64_t strip = kLanes * V;
  const int64_t blocks = call.positions * ((call.columns + strip - 1) / strip);
  if (blocks == 0) return cudaSuccess;
  if (blocks > kMostBlocks) return cudaErrorInvalidConfiguration;
  unsigned warps = 1;
  while (warps < kMostWarps && warps * kKept < call.most) warps *= 2;
  const int64_t shared = warps == 1 ? 0 : warps * strip * 4;
  // a small enough temperature would make the rate infinite, and 0 times it NaN
  const double rate = 1.4426950408889634 / call.temperature;
  return launch(share<Rule, V>, dim3(static_cast<unsigned>(blocks)), dim3(kLanes, warps), shared, stream, call,
                static_cast<float>(rate < FLT_MAX ? rate : FLT_MAX));
}

template <typename Rule>
cudaError_t launch_rule(const ShareHidden& call, void* stream) {
  const bool runs = call.columns % 4 == 0 && aligned(call.gate, 4) && aligned(call.out, 4);
  return runs ? launch_share<Rule, 4>(call, stream) : launch_share<Rule, 1>(call, stream);
}

cudaError_t launch_taylor(const ShareHidden& call, void* stream) {
  const int64_t blocks = call.positions * ((call.columns + kLanes - 1) / kLanes);
  if (blocks == 0) return cudaSuccess;
  if (blocks > kMostBlocks) return cudaErrorInvalidConfiguration;
  return launch(taylor, dim3(static_cast<unsigned>(blocks)), dim3(kLanes, 8), 0, stream, call);
}

}  // namespace

const char* cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int share_hidden_cuda(const ShareHidden& call, void* stream) {
  for (const Matrix* m : {&call.gate, &call.hidden, &call.gate_total, &call.out})
    if (m->data && m->type == Type::f64) return cudaErrorNotSupported;
  switch (call.rule) {
    case Rule::softmax: return launch_rule<Softmax>(call, stream);
    case Rule::max: return launch_rule<Top>(call, stream);
    case Rule::relu: return launch_rule<Proportion<true>>(call, stream);
    case Rule::linear: return launch_rule<Proportion<false>>(call, stream);
    default: return launch_taylor(call, stream);
  }
}

}  // namespace depass
