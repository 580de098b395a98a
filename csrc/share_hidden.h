// share_hidden: each neuron's output shared out among the sources of a position. Raw pointers in, nothing of torch.
#pragma once
#include "types.h"

namespace depass {

enum class Rule : int { softmax, max, relu, linear, taylor };

struct ShareHidden {
  Matrix gate;                // [R, F]
  Matrix hidden;              // [P, F]
  Matrix gate_total;          // [P, F], taylor only, else data == nullptr
  Matrix out;                 // [R, F], may be gate itself
  const int64_t* row_start;   // [P + 1]
  const int64_t* skipped;     // [P], the source that takes no part, or -1
  Rule rule;
  double temperature;
  int64_t positions;  // P
  int64_t columns;    // F
  int64_t most;       // the largest number of sources at one position
};

constexpr int64_t kColumns = 32;  // columns of one tile; a tile is all rows of a position

inline int64_t tiles(const ShareHidden& call) {
  return call.positions * ((call.columns + kColumns - 1) / kColumns);
}

// Tiles first .. last - 1, on the calling thread.
void share_hidden_cpu(const ShareHidden& call, int64_t first, int64_t last);

// On a CUDA stream of the current device. Returns a cudaError_t.
int share_hidden_cuda(const ShareHidden& call, void* stream);

}  // namespace depass
