// What every kernel's launcher takes: raw pointers with their number type and strides. Nothing of torch.
#pragma once
#include <cstdint>

namespace depass {

enum class Type : int { f32, f64, bf16, f16 };

struct Matrix {
  void* data;
  Type type;
  int64_t stride;  // elements from one row to the next; columns lie next to each other
};

const char* cuda_error(int error);  // what a CUDA launcher's code means

}  // namespace depass
