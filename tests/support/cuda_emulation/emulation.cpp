// Runs the blocks of a launch one after another and the threads of a block as fibers; the kernels' C names for ctypes.
#include <setjmp.h>
#include <ucontext.h>

#include <map>
#include <memory>
#include <vector>

#include "cuda_runtime.h"
#include "mix_values.h"
#include "normed.h"
#include "share_hidden.h"

constexpr size_t kMostShared = 101376;  // of a block on sm_86 and sm_89, the least of the cards that we build for
constexpr size_t kFence = 4096;         // behind what a launch asked for: nobody may write there
constexpr unsigned char kPoison = 0xff;  // four, or two, of these bytes are a NaN in every type

alignas(128) unsigned char shared_memory[kMostShared + kFence];
dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

struct Copy {
  void* to;
  const void* from;
  size_t bytes, zeros;
};

struct Fiber {
  static constexpr size_t stack_bytes = 256 * 1024;  // not touched, not taken
  std::unique_ptr<unsigned char[]> stack{new unsigned char[stack_bytes]};
  jmp_buf here;
  bool begun = false, done = false;
  std::vector<std::vector<Copy>> copies;  // committed groups; the last is the open one
};

std::vector<Fiber> fibers;  // begun once, then kept from block to block
Fiber* current;
jmp_buf scheduler;
const std::function<void()>* body;
std::map<const void*, size_t> allowed;
cudaError_t failure;

void enter() {
  for (;;) {
    (*body)();
    current->done = true;
    barrier();
  }
}

// Lets a fiber run up to its next barrier. Contexts only give it its stack: a jump costs no system call.
void resume(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler)) return;
  if (fiber.begun) _longjmp(fiber.here, 1);
  fiber.begun = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = Fiber::stack_bytes;
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
  setcontext(&context);
}

// Every thread once, up to its next barrier or its end. Returns how many have ended.
size_t turn(size_t threads, bool backwards) {
  size_t done = 0;
  for (size_t i = 0; i < threads; ++i) {
    const size_t thread = backwards ? threads - 1 - i : i;
    threadIdx = dim3(thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / blockDim.x / blockDim.y);
    if (!fibers[thread].done) resume(fibers[thread]);
    done += fibers[thread].done;
  }
  return done;
}

void run_block(size_t threads, size_t shared, size_t block) {
  std::memset(shared_memory, kPoison, shared + kFence);
  for (size_t thread = 0; thread < threads; ++thread) {
    fibers[thread].done = false;
    fibers[thread].copies.resize(1);
    fibers[thread].copies[0].clear();
  }
  for (size_t round = block, done = 0; done < threads; ++round) {
    done = turn(threads, round % 2);
    if (done > 0 && done < threads) {  // some ended, others wait at a barrier
      fibers.clear();
      return fail(cudaErrorLaunchFailure);
    }
  }
  for (size_t i = 0; i < kFence; ++i)
    if (shared_memory[shared + i] != kPoison) return fail(cudaErrorIllegalAddress);
}

}  // namespace

cudaError_t allow_shared(const void* kernel, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > kMostShared) return cudaErrorInvalidValue;
  allowed[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  const size_t threads = size_t{block.x} * block.y * block.z;
  const size_t most = allowed.count(kernel) ? allowed[kernel] : 48 * 1024;
  if (config.dynamicSmemBytes > most) return cudaErrorInvalidValue;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.x > 2147483647u || grid.y == 0 || grid.y > 65535u)
    return cudaErrorInvalidConfiguration;
  while (fibers.size() < threads) fibers.emplace_back();
  body = &thread;
  gridDim = grid;
  blockDim = block;
  failure = cudaSuccess;
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x && failure == cudaSuccess; ++x) {
      blockIdx = dim3(x, y);
      run_block(threads, config.dynamicSmemBytes, x);
    }
  return failure;
}

void barrier() {
  if (!_setjmp(current->here)) _longjmp(scheduler, 1);
}

void fail(cudaError_t error) { failure = error; }

void copy_later(void* to, const void* from, size_t bytes, size_t zeros) {
  const bool fits = bytes == 4 || bytes == 8 || bytes == 16;
  if (!fits || reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
    return fail(cudaErrorMisalignedAddress);
  current->copies.back().push_back({to, from, bytes, zeros});
}

void commit() { current->copies.emplace_back(); }

void wait_for_all_but(size_t last) {
  auto& copies = current->copies;
  while (copies.size() > last + 1) {
    for (const Copy& copy : copies.front()) {
      std::memcpy(copy.to, copy.from, copy.bytes - copy.zeros);
      std::memset(static_cast<unsigned char*>(copy.to) + copy.bytes - copy.zeros, 0, copy.zeros);
    }
    copies.erase(copies.begin());
  }
}

}  // namespace emulation

extern "C" int share_hidden(const depass::ShareHidden* call) { return depass::share_hidden_cuda(*call, nullptr); }
extern "C" int normed(const depass::Normed* call) { return depass::normed_cuda(*call, nullptr); }
extern "C" int mix_values(const depass::MixValues* call) { return depass::mix_values_cuda(*call, nullptr); }
