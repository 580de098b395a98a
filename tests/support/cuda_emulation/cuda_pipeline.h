#pragma once
#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0) {
  emulation::copy_later(to, from, bytes, zeros);
}
inline void __pipeline_commit() { emulation::commit(); }
inline void __pipeline_wait_prior(size_t last) { emulation::wait_for_all_but(last); }
