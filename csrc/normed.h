// normed: rows of the state times their position's scale and the norm's weight, in the type of the next product.
#pragma once
#include "types.h"

namespace depass {

struct Normed {
  Matrix state;             // [R', D]
  Matrix out;               // [R, D]
  const int64_t* position;  // [R], of each row; read where there is a scale
  const int64_t* rows;      // [R], which row of the state each is, or nullptr: all in order
  const float* scale;       // [P] or nullptr
  const void* weight;       // [D] or nullptr
  Type weight_type;
  bool centred;             // less the row's mean
  int64_t count, columns;   // R and D
};

// Rows first .. last - 1, on the calling thread.
void normed_cpu(const Normed& call, int64_t first, int64_t last);

// On a CUDA stream of the current device. Returns a cudaError_t.
int normed_cuda(const Normed& call, void* stream);

}  // namespace depass
