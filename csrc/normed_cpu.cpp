// normed on the CPU: a row at a time, read once (twice where it is centred), scaled and written.
#include "normed.h"

#include <algorithm>

#include "cpu_numbers.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // as in cpu_numbers.h

namespace depass {
namespace {

constexpr int kVectors = 2;
#define DEPASS_VECTORS _Pragma("GCC unroll 16") for (int v = 0; v < kVectors; ++v)

template <typename C, Type type>
DEPASS_INLINE C mean_of(const Normed& call, int64_t row) {
  constexpr int64_t step = kVectors * kLanes<C>;
  Vector<C> sum[kVectors] = {}, x[kVectors];
  for (int64_t column = 0; column < call.columns; column += step) {
    load_row<C, type, kVectors>(call.state, row, column, std::min(step, call.columns - column), x);
    DEPASS_VECTORS sum[v] += x[v];
  }
  C total = 0;
  for (int v = 0; v < kVectors; ++v)
    for (int i = 0; i < kLanes<C>; ++i) total += sum[v][i];
  return total / static_cast<C>(call.columns);
}

template <typename C, Type in, Type out, Type weight>
DEPASS_INLINE void norm_row(const Normed& call, int64_t i, const Matrix& weights) {
  constexpr int64_t step = kVectors * kLanes<C>;
  const int64_t row = call.rows ? call.rows[i] : i;
  const C scale = call.scale ? static_cast<C>(call.scale[call.position[i]]) : C(1);
  const C mean = call.centred ? mean_of<C, in>(call, row) : C(0);
  Vector<C> x[kVectors], gamma[kVectors];
  for (int64_t column = 0; column < call.columns; column += step) {
    const int64_t n = std::min(step, call.columns - column);
    load_row<C, in, kVectors>(call.state, row, column, n, x);
    DEPASS_VECTORS x[v] = (x[v] - mean) * scale;
    if (call.weight) {
      load_row<C, weight, kVectors>(weights, 0, column, n, gamma);
      DEPASS_VECTORS x[v] *= gamma[v];
    }
    store_row<C, out, kVectors>(call.out, i, column, n, x);
  }
}

template <typename C>
DEPASS_INLINE void norm_rows(const Normed& call, int64_t first, int64_t last) {
  const Matrix weights = {const_cast<void*>(call.weight), call.weight_type, 0};
  by_type(call.state.type, [&](auto in) DEPASS_INLINE_LAMBDA {
    by_type(call.out.type, [&](auto out) DEPASS_INLINE_LAMBDA {
      by_type(call.weight_type, [&](auto weight) DEPASS_INLINE_LAMBDA {
        for (int64_t i = first; i < last; ++i) norm_row<C, in, out, weight>(call, i, weights);
      });
    });
  });
}

DEPASS_CLONES void norm_in_float(const Normed& call, int64_t first, int64_t last) {
  norm_rows<float>(call, first, last);
}

DEPASS_CLONES void norm_in_double(const Normed& call, int64_t first, int64_t last) {
  norm_rows<double>(call, first, last);
}

}  // namespace

void normed_cpu(const Normed& call, int64_t first, int64_t last) {
  if (call.state.type == Type::f64)
    norm_in_double(call, first, last);
  else
    norm_in_float(call, first, last);
}

}  // namespace depass
