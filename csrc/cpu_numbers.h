// Vectors of numbers on the CPU: loading, storing and converting a few lanes at a time, and exp.
//
// The compiler's vector extension instead of intrinsics: one text becomes AVX-512, AVX2 or SSE code with DEPASS_CLONES
// on the function that it is inlined into, and NEON elsewhere. fp16 is converted by arithmetic that every machine has:
// its instructions are missing from the oldest x86, and GCC 12 reaches them from such a text one number at a time only.
#pragma once
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>

#include "types.h"

// One library for every x86: the loader picks the widest version that the machine runs. By levels of instruction sets,
// for a name such as arch=haswell is taken on that very processor and on no other, newer ones and AMD's included.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define DEPASS_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DEPASS_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define DEPASS_CLONES
#endif
#define DEPASS_INLINE inline __attribute__((always_inline))
#define DEPASS_INLINE_LAMBDA __attribute__((always_inline))

// Passing vectors wider than the build's own registers is said to change the ABI; here everything is inlined.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"

namespace depass {

#if defined(__x86_64__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <int N>
struct Lanes {
  typedef float F __attribute__((vector_size(4 * N)));
  typedef double D __attribute__((vector_size(8 * N)));
  typedef uint32_t U __attribute__((vector_size(4 * N)));
  typedef uint16_t H __attribute__((vector_size(2 * N)));
};

template <typename C>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(C));

// What the kernels compute with: C is float or double.
template <typename C>
using Vector = std::conditional_t<std::is_same_v<C, float>, typename Lanes<kLanes<C>>::F, typename Lanes<kLanes<C>>::D>;

// Room for n numbers, aligned for vectors; a std::vector of vectors would not be.
template <typename C>
class Scratch {
 public:
  explicit Scratch(int64_t n) : data_(::operator new(static_cast<size_t>(n) * sizeof(C), kAlignment)) {}
  ~Scratch() { ::operator delete(data_, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  C* data() const { return static_cast<C*>(data_); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  void* data_;
};

template <Type type>
using Stored = std::conditional_t<type == Type::f32, float, std::conditional_t<type == Type::f64, double, uint16_t>>;

// Calls `work` with the type as a constant.
template <typename Work>
DEPASS_INLINE void by_type(Type type, const Work& work) {
  switch (type) {
    case Type::f32: return work(std::integral_constant<Type, Type::f32>{});
    case Type::f64: return work(std::integral_constant<Type, Type::f64>{});
    case Type::bf16: return work(std::integral_constant<Type, Type::bf16>{});
    default: return work(std::integral_constant<Type, Type::f16>{});
  }
}

template <typename To, typename From>
DEPASS_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <typename V>
DEPASS_INLINE V load_vector(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <typename C>
DEPASS_INLINE Vector<C> splat(C value) {
  return Vector<C>{} + value;
}

template <int N>
DEPASS_INLINE typename Lanes<N>::F float_of_half(const typename Lanes<N>::U& half) {
  using F = typename Lanes<N>::F;
  using U = typename Lanes<N>::U;
  const U twice = half << 17;  // without its sign
  const F normal = bits_as<F>((twice >> 4) + (0xe0u << 23)) * 0x1p-112f;  // infinity and NaN come out as such
  const F subnormal = bits_as<F>((twice >> 17) | (126u << 23)) - 0.5f;
  const F magnitude = normal < 0x1p-14f ? subnormal : normal;
  return bits_as<F>(bits_as<U>(magnitude) | ((half << 16) & 0x80000000u));
}

template <int N>
DEPASS_INLINE typename Lanes<N>::U half_of_float(const typename Lanes<N>::F& value) {
  using F = typename Lanes<N>::F;
  using U = typename Lanes<N>::U;
  const U bits = bits_as<U>(value);
  const F magnitude = bits_as<F>(bits & 0x7fffffffu);
  const F power = bits_as<F>(bits & 0x7f800000u);
  const F held = power < 0x1p-14f ? F{} + 0x1p-14f : power;  // below it half's last bit stays where it is
  // What is too large becomes infinity on the way. Adding 2^13 times the power to 4 times the number rounds to nearest,
  // ties to even, at half's last bit.
  const F rounded = bits_as<F>(bits_as<U>(held) + (15u << 23)) + (magnitude * 0x1p+112f) * 0x1p-110f;
  const U result = bits_as<U>(rounded);
  const U number = ((result >> 13) & 0x7c00u) + (result & 0xfffu);
  return ((bits >> 16) & 0x8000u) | (value != value ? U{} + 0x7e00u : number);
}

template <int N>
DEPASS_INLINE typename Lanes<N>::U bf16_of_float(const typename Lanes<N>::F& value) {
  using U = typename Lanes<N>::U;
  const U bits = bits_as<U>(value);
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  return value != value ? U{} + 0x7fc0u : rounded;
}

template <typename C, Type type>
DEPASS_INLINE Vector<C> load(const Stored<type>* from) {
  constexpr int N = kLanes<C>;
  using L = Lanes<N>;
  if constexpr (type == Type::f32) {
    return __builtin_convertvector(load_vector<typename L::F>(from), Vector<C>);
  } else if constexpr (type == Type::f64) {
    return __builtin_convertvector(load_vector<typename L::D>(from), Vector<C>);
  } else {
    const typename L::U bits = __builtin_convertvector(load_vector<typename L::H>(from), typename L::U);
    if constexpr (type == Type::bf16)
      return __builtin_convertvector(bits_as<typename L::F>(bits << 16), Vector<C>);
    else
      return __builtin_convertvector(float_of_half<N>(bits), Vector<C>);
  }
}

template <typename C, Type type>
DEPASS_INLINE void store(Stored<type>* to, const Vector<C>& value) {
  constexpr int N = kLanes<C>;
  using L = Lanes<N>;
  if constexpr (type == Type::f64) {
    const typename L::D wide = __builtin_convertvector(value, typename L::D);
    std::memcpy(to, &wide, sizeof wide);
  } else {
    const typename L::F single = __builtin_convertvector(value, typename L::F);
    if constexpr (type == Type::f32) {
      std::memcpy(to, &single, sizeof single);
    } else {
      const typename L::U bits = type == Type::bf16 ? bf16_of_float<N>(single) : half_of_float<N>(single);
      const typename L::H narrow = __builtin_convertvector(bits, typename L::H);
      std::memcpy(to, &narrow, sizeof narrow);
    }
  }
}

// Asks for `lines` cache lines from a number on, to be there some microseconds later; harmless outside of the matrix.
template <bool write, int lines>
DEPASS_INLINE void prefetch(const Matrix& m, int64_t row, int64_t column) {
  const int64_t size = m.type == Type::f64 ? 8 : m.type == Type::f32 ? 4 : 2;
  const char* at = static_cast<const char*>(m.data) + (row * m.stride + column) * size;
#pragma GCC unroll 4
  for (int line = 0; line < lines; ++line) __builtin_prefetch(at + 64 * line, write, 2);
}

// The first n numbers of a row of V vectors. What is behind them is not touched: loads give zeros for it.
template <typename C, Type type, int V>
DEPASS_INLINE void load_row(const Matrix& m, int64_t row, int64_t column, int64_t n, Vector<C>* to) {
  const Stored<type>* from = static_cast<const Stored<type>*>(m.data) + row * m.stride + column;
  Stored<type> padded[V * kLanes<C>];
  if (n < V * kLanes<C>) {
    std::memset(padded, 0, sizeof padded);
    std::memcpy(padded, from, static_cast<size_t>(n) * sizeof *from);
    from = padded;
  }
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) to[v] = load<C, type>(from + v * kLanes<C>);
}

template <typename C, Type type, int V>
DEPASS_INLINE void store_row(const Matrix& m, int64_t row, int64_t column, int64_t n, const Vector<C>* from) {
  Stored<type>* to = static_cast<Stored<type>*>(m.data) + row * m.stride + column;
  Stored<type> padded[V * kLanes<C>];
  Stored<type>* direct = n < V * kLanes<C> ? padded : to;
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) store<C, type>(direct + v * kLanes<C>, from[v]);
  if (direct == padded) std::memcpy(to, padded, static_cast<size_t>(n) * sizeof *to);
}

// 2^-x for x >= 0, to 1 ulp; from x = 126.5 on it is 0, and NaN stays NaN. -x = k + r with k whole and |r| <= 1/2,
// and a polynomial in r with the least largest relative error, exactly 1 at 0.
DEPASS_INLINE Lanes<kLanes<float>>::F exp2_of_minus(const Lanes<kLanes<float>>::F& x) {
  using F = Lanes<kLanes<float>>::F;
  using U = Lanes<kLanes<float>>::U;
  constexpr float magic = 12582912.0f + 127.0f;  // 1.5 * 2^23: adding it leaves k + 127 in the low bits
  const F held = x > 127.0f ? F{} + 127.0f : x;  // 2^-127 comes out as 0; written so that NaN passes through
  const F shifted = magic - held;
  const F r = (magic - shifted) - held;
  F p = F{} + 1.53533754e-4f;
  p = p * r + 1.33988750e-3f;
  p = p * r + 9.61843692e-3f;
  p = p * r + 5.55033237e-2f;
  p = p * r + 2.40226477e-1f;
  p = p * r + 6.93147182e-1f;
  p = p * r + 1.0f;
  return p * bits_as<F>(bits_as<U>(shifted) << 23);
}

}  // namespace depass

#pragma GCC diagnostic pop
