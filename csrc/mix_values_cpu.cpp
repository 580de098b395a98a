// mix_values on the CPU. A tile is one source at every position where it is active, for one key/value head. Its values
// are packed once, and then each query head that reads them multiplies its triangle of the pattern with them, a
// block of queries and columns at a time whose sums stay in registers.
#include "mix_values.h"

#include <algorithm>

#include "cpu_numbers.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // as in cpu_numbers.h

namespace depass {
namespace {

constexpr int kQueries = 6;  // with kVectors: 12 sums, 2 vectors of values and 1 of the pattern in AVX2's 16 registers
constexpr int kVectors = 2;
constexpr int64_t kAhead = 8;  // rows of values that are on their way

#define DEPASS_VECTORS _Pragma("GCC unroll 16") for (int v = 0; v < kVectors; ++v)

// One source's part of a call. Keys and queries count from the position where it starts.
template <typename C>
struct Source {
  static constexpr int64_t kColumns = kVectors * kLanes<C>;  // of one block
  const MixValues& call;
  int64_t start, first_key, source;  // its staircase's first position; the key it starts at; which of the rows is its
  int64_t keys;                      // how many positions it is active at
  int64_t blocks;                    // of columns
  C* packed;                         // [blocks, keys, kColumns], zeros behind the head dim's last
  C* weights;                        // [kQueries, keys rounded up]

  DEPASS_INLINE int64_t row(int64_t key) const { return call.row_start[start + first_key + key] + source; }
  DEPASS_INLINE int64_t columns(int64_t block) const { return std::min(kColumns, call.head_dim - block * kColumns); }
  DEPASS_INLINE int64_t stride() const { return (keys + kColumns - 1) / kColumns * kColumns; }
};

template <typename C, Type type>
DEPASS_INLINE void pack_values(const Source<C>& s, int64_t kv_head) {
  for (int64_t key = 0; key < s.keys; ++key) {
    const int64_t ahead = s.row(std::min(key + kAhead, s.keys - 1));
    for (int64_t block = 0; block < s.blocks; ++block) {
      Vector<C>* to = reinterpret_cast<Vector<C>*>(s.packed + (block * s.keys + key) * s.kColumns);
      const int64_t column = kv_head * s.call.head_dim + block * s.kColumns;
      prefetch<false, 1>(s.call.values, ahead, column);
      load_row<C, type, kVectors>(s.call.values, s.row(key), column, s.columns(block), to);
    }
  }
}

// The pattern's rows of `queries` queries, for keys up to the last of them, scaled.
template <typename C, Type type>
DEPASS_INLINE void pack_weights(const Source<C>& s, int64_t prompt, int64_t head, int64_t query, int64_t queries) {
  const int64_t at = prompt * s.call.prompt_stride + head * s.call.head_stride;
  void* first = static_cast<Stored<type>*>(const_cast<void*>(s.call.pattern)) + at;
  const Matrix pattern = {first, type, s.call.query_stride};
  for (int64_t q = 0; q < queries; ++q) {
    const int64_t position = s.first_key + query + q;
    const C scale = s.call.query_scale ? static_cast<C>(s.call.query_scale[s.start + position]) : C(1);
    for (int64_t key = 0; key < query + queries; key += s.kColumns) {
      Vector<C>* to = reinterpret_cast<Vector<C>*>(s.weights + q * s.stride() + key);
      // a whole vector even behind the last of these queries, where nothing is read from it
      const int64_t n = std::min(s.kColumns, s.keys - key);
      load_row<C, type, kVectors>(pattern, position, s.first_key + key, n, to);
      DEPASS_VECTORS to[v] *= scale;
    }
  }
}

template <typename C, int queries>
DEPASS_INLINE void multiply(const Source<C>& s, int64_t block, int64_t keys, Vector<C> (*sums)[kVectors]) {
  const C* weights = s.weights;
  const C* values = s.packed + block * s.keys * s.kColumns;
  const int64_t stride = s.stride();
  Vector<C> sum[queries][kVectors] = {};
  for (int64_t key = 0; key < keys; ++key) {
    Vector<C> x[kVectors];
    DEPASS_VECTORS x[v] = load_vector<Vector<C>>(values + key * s.kColumns + v * kLanes<C>);
#pragma GCC unroll 8
    for (int q = 0; q < queries; ++q) {
      const C weight = weights[q * stride + key];
      DEPASS_VECTORS sum[q][v] += weight * x[v];
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < queries; ++q) {
    DEPASS_VECTORS sums[q][v] = sum[q][v];
  }
}

template <typename C, int queries>
DEPASS_INLINE void mix_block(const Source<C>& s, int64_t prompt, int64_t head, int64_t query) {
  by_type(s.call.pattern_type, [&](auto type) DEPASS_INLINE_LAMBDA {
    pack_weights<C, type>(s, prompt, head, query, queries);
  });
  for (int64_t block = 0; block < s.blocks; ++block) {
    const int64_t column = head * s.call.head_dim + block * s.kColumns;
    for (int q = 0; q < queries; ++q) prefetch<true, 1>(s.call.out, s.row(query + q), column);
    Vector<C> sums[queries][kVectors];
    multiply<C, queries>(s, block, query + queries, sums);
    by_type(s.call.out.type, [&](auto type) DEPASS_INLINE_LAMBDA {
      for (int q = 0; q < queries; ++q)
        store_row<C, type, kVectors>(s.call.out, s.row(query + q), column, s.columns(block), sums[q]);
    });
  }
}

template <typename C>
DEPASS_INLINE void mix_source(const MixValues& call, const MixTile& tile, int64_t kv_head) {
  Source<C> s{call, call.position_start[tile.staircase], tile.first_key, tile.source, 0, 0, nullptr, nullptr};
  s.keys = call.position_start[tile.staircase + 1] - s.start - s.first_key;
  s.blocks = (call.head_dim + s.kColumns - 1) / s.kColumns;
  const Scratch<C> packed(s.blocks * s.keys * s.kColumns), weights(kQueries * s.stride());
  s.packed = packed.data();
  s.weights = weights.data();
  by_type(call.values.type, [&](auto type) DEPASS_INLINE_LAMBDA { pack_values<C, type>(s, kv_head); });

  const int64_t group = call.heads / call.kv_heads, prompt = call.prompt[tile.staircase];
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    // what does not fill a block comes first, where there are the fewest keys
    int64_t query = 0;
    for (; query < s.keys % kQueries; ++query) mix_block<C, 1>(s, prompt, head, query);
    for (; query < s.keys; query += kQueries) mix_block<C, kQueries>(s, prompt, head, query);
  }
}

DEPASS_CLONES void mix_in_float(const MixValues& call, const MixTile& tile, int64_t kv_head) {
  mix_source<float>(call, tile, kv_head);
}

DEPASS_CLONES void mix_in_double(const MixValues& call, const MixTile& tile, int64_t kv_head) {
  mix_source<double>(call, tile, kv_head);
}

}  // namespace

void mix_values_cpu(const MixValues& call, int64_t tile, int64_t kv_head) {
  if (call.pattern_type == Type::f64 || call.values.type == Type::f64)
    mix_in_double(call, call.tiles[tile], kv_head);
  else
    mix_in_float(call, call.tiles[tile], kv_head);
}

}  // namespace depass
