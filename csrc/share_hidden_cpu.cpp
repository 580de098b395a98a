// share_hidden on the CPU. A tile is every row of one position in kColumns columns: it is read once into a buffer that
// stays in the first cache, shared there, and written once, so that `out` may be `gate`.
#include "share_hidden.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu_numbers.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // as in cpu_numbers.h

namespace depass {
namespace {

template <typename C>
struct Tile {
  static constexpr int V = static_cast<int>(kColumns) / kLanes<C>;
  const ShareHidden& call;
  int64_t t, column, n;          // its position, its first column, how many columns
  int64_t begin, rows, skipped;  // its first row, how many rows, the one that takes no part
  Vector<C>* g;                  // [rows, V], pre-activations, then weights
  Vector<C> high[V], low[V], broken[V], sum[V];
};

#define DEPASS_VECTORS _Pragma("GCC unroll 16") for (int v = 0; v < V; ++v)

// Reads the tile, and finds each column's largest number; for the rules that need them also the smallest,
// and NaN where there is one. NaN compares as neither: softmax carries it through exp instead.
template <typename C, Type type, bool softmax>
DEPASS_INLINE void gather(Tile<C>& tile) {
  constexpr int V = Tile<C>::V;
  const C infinity = std::numeric_limits<C>::infinity();
  const Matrix gate = tile.call.gate;
  Vector<C> high[V], low[V], broken[V];
  DEPASS_VECTORS {
    high[v] = splat<C>(-infinity);
    low[v] = splat<C>(infinity);
    broken[v] = splat<C>(0);
  }
  for (int64_t m = 0; m < tile.rows; ++m) {
    if (m == tile.skipped) continue;
    Vector<C> x[V];
    load_row<C, type, V>(gate, tile.begin + m, tile.column, tile.n, x);
    DEPASS_VECTORS {
      tile.g[m * V + v] = x[v];
      high[v] = x[v] > high[v] ? x[v] : high[v];
      if constexpr (!softmax) {
        low[v] = x[v] < low[v] ? x[v] : low[v];
        broken[v] = x[v] == x[v] ? broken[v] : x[v];
      }
    }
  }
  DEPASS_VECTORS {
    tile.high[v] = high[v];
    tile.low[v] = low[v];
    tile.broken[v] = broken[v];
  }
}

// exp((x - high) / temperature); the difference is taken first, so that a large x costs no accuracy.
DEPASS_INLINE Vector<float> weight_of(const Vector<float>& x, const Vector<float>& high, float log2e_over_temperature) {
  return exp2_of_minus((high - x) * log2e_over_temperature);
}

DEPASS_INLINE Vector<double> weight_of(const Vector<double>& x, const Vector<double>& high,
                                       double log2e_over_temperature) {
  Vector<double> weight;
  for (int i = 0; i < kLanes<double>; ++i) weight[i] = std::exp2((x[i] - high[i]) * log2e_over_temperature);
  return weight;
}

// Each source's weight, and their sum.
template <typename C, Rule rule>
DEPASS_INLINE void weigh(Tile<C>& tile) {
  constexpr int V = Tile<C>::V;
  const Vector<C> zero = splat<C>(0), one = splat<C>(1);
  const C factor = static_cast<C>(std::min(1.4426950408889634 / tile.call.temperature, 3e38));
  const Matrix gate = tile.call.gate, out = tile.call.out;
  Vector<C> sum[V], high[V];
  DEPASS_VECTORS {
    sum[v] = zero;
    high[v] = tile.high[v];
  }
  for (int64_t m = 0; m < tile.rows; ++m) {
    prefetch<true, 2>(out, tile.begin + m, tile.column);
    prefetch<false, 2>(gate, tile.begin + m, tile.column + kColumns);  // the next tile's
    if (m == tile.skipped) continue;
    Vector<C>* x = tile.g + m * V;
    DEPASS_VECTORS {
      if constexpr (rule == Rule::softmax) {
        x[v] = weight_of(x[v], high[v], factor);
      } else if constexpr (rule == Rule::max) {  // ties to the first
        const Vector<C> found = x[v] == high[v] ? one : zero;
        x[v] = sum[v] == zero ? found : zero;
      } else if constexpr (rule == Rule::relu) {  // dividing by the largest first keeps the sum finite and nonzero
        x[v] = high[v] > zero ? (x[v] > zero ? x[v] : zero) / high[v] : one;
      } else if constexpr (rule == Rule::linear) {
        const Vector<C> span = high[v] - tile.low[v];
        x[v] = span != zero ? (x[v] - tile.low[v]) / span : one;
      }
      sum[v] += x[v];
    }
  }
  DEPASS_VECTORS tile.sum[v] = sum[v];
}

template <typename C, Type type>
DEPASS_INLINE void scatter(Tile<C>& tile, const Vector<C>* hidden) {
  constexpr int V = Tile<C>::V;
  const Matrix out = tile.call.out;
  Vector<C> h[V], x[V];
  DEPASS_VECTORS h[v] = (hidden[v] + tile.broken[v]) / tile.sum[v];
  for (int64_t m = 0; m < tile.rows; ++m) {
    DEPASS_VECTORS x[v] = m == tile.skipped ? hidden[v] * C(0) : tile.g[m * V + v] * h[v];
    store_row<C, type, V>(out, tile.begin + m, tile.column, tile.n, x);
  }
}

// No sum over the sources, so a row at a time.
template <typename C>
DEPASS_INLINE void taylor(Tile<C>& tile, const Vector<C>* hidden) {
  constexpr int V = Tile<C>::V;
  Vector<C> total[V], x[V];
  by_type(tile.call.gate_total.type, [&](auto type) DEPASS_INLINE_LAMBDA {
    load_row<C, type, V>(tile.call.gate_total, tile.t, tile.column, tile.n, total);
  });
  for (int64_t m = 0; m < tile.rows; ++m) {
    by_type(tile.call.gate.type, [&](auto type) DEPASS_INLINE_LAMBDA {
      load_row<C, type, V>(tile.call.gate, tile.begin + m, tile.column, tile.n, x);
    });
    DEPASS_VECTORS {
      const Vector<C> share = x[v] / total[v];
      x[v] = (total[v] == 0 ? splat<C>(0) : share) * hidden[v];
    }
    by_type(tile.call.out.type, [&](auto type) DEPASS_INLINE_LAMBDA {
      store_row<C, type, V>(tile.call.out, tile.begin + m, tile.column, tile.n, x);
    });
  }
}

template <typename C>
DEPASS_INLINE void share_tile(const ShareHidden& call, int64_t index, Vector<C>* buffer) {
  constexpr int V = Tile<C>::V;
  const int64_t t = index % call.positions, column = index / call.positions * kColumns, begin = call.row_start[t];
  Tile<C> tile{call, t, column, std::min(call.columns - column, kColumns), begin, call.row_start[t + 1] - begin,
               call.skipped[t], buffer, {}, {}, {}, {}};
  Vector<C> hidden[V];
  by_type(call.hidden.type, [&](auto type) DEPASS_INLINE_LAMBDA {
    load_row<C, type, V>(call.hidden, t, column, tile.n, hidden);
  });
  if (call.rule == Rule::taylor) return taylor(tile, hidden);
  by_type(call.gate.type, [&](auto type) DEPASS_INLINE_LAMBDA {
    if (call.rule == Rule::softmax)
      gather<C, type, true>(tile);
    else
      gather<C, type, false>(tile);
  });
  switch (call.rule) {
    case Rule::softmax: weigh<C, Rule::softmax>(tile); break;
    case Rule::max: weigh<C, Rule::max>(tile); break;
    case Rule::relu: weigh<C, Rule::relu>(tile); break;
    default: weigh<C, Rule::linear>(tile);
  }
  by_type(call.out.type, [&](auto type) DEPASS_INLINE_LAMBDA { scatter<C, type>(tile, hidden); });
}

// Neighbouring columns of one position follow each other, as they do in memory.
template <typename C>
DEPASS_INLINE void share_tiles(const ShareHidden& call, int64_t first, int64_t last) {
  const Scratch<C> buffer(call.most * kColumns);
  const int64_t behind = std::min(first + call.positions, last);
  for (int64_t start = first; start < behind; ++start)
    for (int64_t tile = start; tile < last; tile += call.positions)
      share_tile<C>(call, tile, reinterpret_cast<Vector<C>*>(buffer.data()));
}

DEPASS_CLONES void share_in_float(const ShareHidden& call, int64_t first, int64_t last) {
  share_tiles<float>(call, first, last);
}

DEPASS_CLONES void share_in_double(const ShareHidden& call, int64_t first, int64_t last) {
  share_tiles<double>(call, first, last);
}

}  // namespace

void share_hidden_cpu(const ShareHidden& call, int64_t first, int64_t last) {
  if (call.gate.type == Type::f64 || call.hidden.type == Type::f64)
    share_in_double(call, first, last);
  else
    share_in_float(call, first, last);
}

}  // namespace depass
