// share_hidden on the CPU. A tile is every row of one position in kColumns columns: it is read once into a small buffer,
// shared there, and written once, so that `out` may be `gate`. All loops run across the columns, which lie next to each
// other, so the compiler vectorises them without reordering a sum.
#include "share_hidden.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

// One library for every x86: the loader picks the widest version that the machine runs.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define DEPASS_CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define DEPASS_CLONES
#endif
#define DEPASS_INLINE inline __attribute__((always_inline))

namespace depass {
namespace {

DEPASS_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

DEPASS_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

DEPASS_INLINE uint16_t round_to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  return static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

template <typename C>
DEPASS_INLINE void load(const Matrix& m, int64_t row, int64_t column, int64_t n, C* to) {
  const int64_t at = row * m.stride + column;
  switch (m.type) {
    case Type::f32: {
      const float* from = static_cast<const float*>(m.data) + at;
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<C>(from[i]);
      break;
    }
    case Type::f64: {
      const double* from = static_cast<const double*>(m.data) + at;
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<C>(from[i]);
      break;
    }
    case Type::bf16: {
      const uint16_t* from = static_cast<const uint16_t*>(m.data) + at;
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<C>(bits_to_float(static_cast<uint32_t>(from[i]) << 16));
      break;
    }
    case Type::f16: {
#ifdef __FLT16_MAX__
      const _Float16* from = static_cast<const _Float16*>(m.data) + at;
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<C>(from[i]);
#endif
      break;
    }
  }
}

template <typename C>
DEPASS_INLINE void store(const Matrix& m, int64_t row, int64_t column, int64_t n, const C* from) {
  const int64_t at = row * m.stride + column;
  switch (m.type) {
    case Type::f32: {
      float* to = static_cast<float*>(m.data) + at;
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i]);
      break;
    }
    case Type::f64: {
      double* to = static_cast<double*>(m.data) + at;
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<double>(from[i]);
      break;
    }
    case Type::bf16: {
      uint16_t* to = static_cast<uint16_t*>(m.data) + at;
      for (int64_t i = 0; i < n; ++i) to[i] = round_to_bf16(static_cast<float>(from[i]));
      break;
    }
    case Type::f16: {
#ifdef __FLT16_MAX__
      _Float16* to = static_cast<_Float16*>(m.data) + at;
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<_Float16>(from[i]);
#endif
      break;
    }
  }
}

// exp(x) for x <= 0, to 1 ulp or so: x = k ln2 + r, and a polynomial in r (its Taylor series, |r| <= ln2 / 2).
DEPASS_INLINE float exp_of_negative(float x) {
  constexpr float lowest = -87.0f;             // below it the result is taken as 0: exp(-87) is 1.6e-38
  constexpr float round_magic = 12582912.0f;   // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
  const float held = x < lowest ? lowest : x;  // written so that NaN passes through
  const float shifted = held * 1.44269504f + round_magic;
  const float k = shifted - round_magic;
  const float r = (held - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const float power = bits_to_float((float_to_bits(shifted) + 127u) << 23);  // 2^k
  return x < lowest ? 0.0f : p * power;
}

DEPASS_INLINE double exp_of_negative(double x) { return std::exp(x); }

template <typename C>
DEPASS_INLINE void share_tile(const ShareHidden& call, int64_t tile, std::vector<C>& buffer) {
  const int64_t t = tile % call.positions, column = tile / call.positions * kColumns;
  const int64_t n = call.columns - column < kColumns ? call.columns - column : kColumns;
  const int64_t begin = call.row_start[t], rows = call.row_start[t + 1] - begin;
  if (rows == 0) return;
  const C scale = call.gate_scale ? static_cast<C>(call.gate_scale[t]) : C(1);
  const C infinity = std::numeric_limits<C>::infinity();
  C* g = buffer.data();
  alignas(64) C h[kColumns], low[kColumns], high[kColumns], sum[kColumns], broken[kColumns];

  load(call.hidden, t, column, n, h);
  for (int64_t m = 0; m < rows; ++m) {
    C* x = g + m * kColumns;
    load(call.gate, begin + m, column, n, x);
    for (int64_t i = 0; i < n; ++i) x[i] *= scale;
  }

  if (call.rule == Rule::taylor) {
    load(call.gate_total, t, column, n, sum);
    for (int64_t m = 0; m < rows; ++m) {
      C* x = g + m * kColumns;
      for (int64_t i = 0; i < n; ++i) x[i] = sum[i] == 0 ? C(0) : x[i] / sum[i] * h[i];
      store(call.out, begin + m, column, n, x);
    }
    return;
  }

  const int64_t skipped = call.skipped[t];
  const int64_t parts = rows - (skipped >= 0 ? 1 : 0);
  for (int64_t i = 0; i < n; ++i) {
    high[i] = -infinity;
    low[i] = infinity;
    sum[i] = broken[i] = 0;
  }
  for (int64_t m = 0; m < rows; ++m) {
    if (m == skipped) continue;
    const C* x = g + m * kColumns;
    for (int64_t i = 0; i < n; ++i) {
      high[i] = x[i] > high[i] ? x[i] : high[i];
      low[i] = x[i] < low[i] ? x[i] : low[i];
      broken[i] = x[i] == x[i] ? broken[i] : x[i];  // a NaN makes its column NaN, as it does in the reference
    }
  }

  // Each source's weight, and their sum.
  const C temperature = static_cast<C>(call.temperature);
  for (int64_t m = 0; m < rows; ++m) {
    if (m == skipped) continue;
    C* x = g + m * kColumns;
    switch (call.rule) {
      case Rule::softmax:
        for (int64_t i = 0; i < n; ++i) {
          x[i] = exp_of_negative((x[i] - high[i]) / temperature);
          sum[i] += x[i];
        }
        break;
      case Rule::max:
        for (int64_t i = 0; i < n; ++i) {
          x[i] = x[i] == high[i] && sum[i] == 0 ? C(1) : C(0);  // ties to the first
          sum[i] += x[i];
        }
        break;
      case Rule::relu:  // dividing by the largest first keeps the sum finite and nonzero
        for (int64_t i = 0; i < n; ++i) {
          x[i] = high[i] > 0 ? (x[i] > 0 ? x[i] : C(0)) / high[i] : C(1);
          sum[i] += x[i];
        }
        break;
      default:  // linear
        for (int64_t i = 0; i < n; ++i) {
          const C span = high[i] - low[i];
          x[i] = span != 0 ? (x[i] - low[i]) / span : C(1);
          sum[i] += x[i];
        }
    }
  }

  for (int64_t i = 0; i < n; ++i) h[i] = (h[i] + broken[i]) / (parts ? sum[i] : C(1));
  for (int64_t m = 0; m < rows; ++m) {
    C* x = g + m * kColumns;
    for (int64_t i = 0; i < n; ++i) x[i] = m == skipped ? C(0) : x[i] * h[i];
    store(call.out, begin + m, column, n, x);
  }
}

template <typename C>
DEPASS_INLINE void share_tiles(const ShareHidden& call, int64_t first, int64_t last) {
  std::vector<C> buffer(static_cast<size_t>(call.most * kColumns));
  for (int64_t tile = first; tile < last; ++tile) share_tile<C>(call, tile, buffer);
}

DEPASS_CLONES void share_in_float(const ShareHidden& call, int64_t first, int64_t last) {
  share_tiles<float>(call, first, last);
}

DEPASS_CLONES void share_in_double(const ShareHidden& call, int64_t first, int64_t last) {
  share_tiles<double>(call, first, last);
}

}  // namespace

bool has_half() {
#ifdef __FLT16_MAX__
  return true;
#else
  return false;
#endif
}

void share_hidden_cpu(const ShareHidden& call, int64_t first, int64_t last) {
  if (call.gate.type == Type::f64 || call.hidden.type == Type::f64)
    share_in_double(call, first, last);
  else
    share_in_float(call, first, last);
}

}  // namespace depass
