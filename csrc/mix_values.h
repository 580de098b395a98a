// mix_values: every source's values mixed with the frozen attention pattern.
#pragma once
#include "types.h"

namespace depass {

struct MixTile {  // int32 [T, 4] as a tensor; all counted from the staircase's own first position and source
  int32_t staircase;
  int32_t source;     // its first source
  int32_t query;      // its first query position
  int32_t first_key;  // the position where its first source starts: no key before it holds a row of the tile
};

struct MixValues {
  const void* pattern;  // [B, H, N, W], keys next to each other
  Type pattern_type;
  int64_t prompt_stride, head_stride, query_stride;
  Matrix values;                  // [R, K·d]
  Matrix out;                     // [R, H·d]
  const int64_t* row_start;       // [P + 1]
  const int64_t* position_start;  // [S + 1]
  const int64_t* prompt;          // [S]
  const float* query_scale;       // [P] or nullptr
  const MixTile* tiles;           // the longest first
  int64_t tile_count;
  int64_t heads, kv_heads, head_dim;
};

// How many queries and sources a tile has. On the CPU: every query of one source.
constexpr int64_t kMixQueriesCuda = 64;
constexpr int64_t kMixSourcesCuda = 1;

// Tile `tile` for key/value head `kv_head` and all query heads that read it, on the calling thread.
void mix_values_cpu(const MixValues& call, int64_t tile, int64_t kv_head);

// On a CUDA stream of the current device. Returns a cudaError_t.
int mix_values_cuda(const MixValues& call, void* stream);

}  // namespace depass
