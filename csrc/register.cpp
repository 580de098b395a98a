// Makes the kernels known to torch, through its stable ABI: one binary serves every torch from 2.10 on.
// Arguments arrive checked (depass_kernels/ops.py); here they only change from tensors to pointers.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <optional>
#include <stdexcept>
#include <string>

#include "mix_values.h"
#include "normed.h"
#include "share_hidden.h"

#ifdef DEPASS_CUDA
// The one name that a torch without CUDA lacks. Weak, so that this library loads there too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace {

using torch::stable::Tensor;

depass::Type type_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return depass::Type::f32;
    case ScalarType::Double: return depass::Type::f64;
    case ScalarType::BFloat16: return depass::Type::bf16;
    case ScalarType::Half: return depass::Type::f16;
    default: throw std::runtime_error("depass_kernels: a dtype without a compiled kernel");
  }
}

depass::Matrix matrix(const Tensor& tensor) { return {tensor.data_ptr(), type_of(tensor), tensor.stride(0)}; }

template <typename T>
const T* pointer(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

const float* scale(const std::optional<Tensor>& tensor) { return tensor ? pointer<float>(*tensor) : nullptr; }

depass::ShareHidden share_call(const Tensor& gate, const Tensor& hidden, const Tensor& row_start,
                               const Tensor& skipped, int64_t most, int64_t rule, double temperature, const std::optional<Tensor>& gate_total,
                               const Tensor& out) {
  depass::ShareHidden call{};
  call.gate = matrix(gate);
  call.hidden = matrix(hidden);
  if (gate_total) call.gate_total = matrix(*gate_total);
  call.out = matrix(out);
  call.row_start = pointer<int64_t>(row_start);
  call.skipped = pointer<int64_t>(skipped);
  call.rule = static_cast<depass::Rule>(rule);
  call.temperature = temperature;
  call.positions = skipped.size(0);
  call.columns = gate.size(1);
  call.most = most;
  return call;
}

depass::Normed norm_call(const Tensor& state, const std::optional<Tensor>& position,
                         const std::optional<Tensor>& scales, const std::optional<Tensor>& weight, bool centred,
                         const std::optional<Tensor>& rows, const Tensor& out) {
  depass::Normed call{};
  call.state = matrix(state);
  call.out = matrix(out);
  if (position) call.position = pointer<int64_t>(*position);
  call.scale = scale(scales);
  if (weight) call.weight = weight->data_ptr();
  call.weight_type = weight ? type_of(*weight) : depass::Type::f32;
  call.centred = centred;
  if (rows) call.rows = pointer<int64_t>(*rows);
  call.count = out.size(0);
  call.columns = out.size(1);
  return call;
}

depass::MixValues mix_call(const Tensor& pattern, const Tensor& values, const Tensor& row_start,
                           const Tensor& position_start, const Tensor& prompt, const Tensor& tiles,
                           const std::optional<Tensor>& query_scale, int64_t kv_heads, const Tensor& out) {
  depass::MixValues call{};
  call.pattern = pattern.data_ptr();
  call.pattern_type = type_of(pattern);
  call.prompt_stride = pattern.stride(0);
  call.head_stride = pattern.stride(1);
  call.query_stride = pattern.stride(2);
  call.values = matrix(values);
  call.out = matrix(out);
  call.row_start = pointer<int64_t>(row_start);
  call.position_start = pointer<int64_t>(position_start);
  call.prompt = pointer<int64_t>(prompt);
  call.query_scale = scale(query_scale);
  call.tiles = pointer<depass::MixTile>(tiles);
  call.tile_count = tiles.size(0);
  call.heads = pattern.size(1);
  call.kv_heads = kv_heads;
  call.head_dim = values.size(1) / kv_heads;
  return call;
}

void share_hidden_cpu(const Tensor& gate, const Tensor& hidden, const Tensor& row_start, const Tensor& skipped,
                      int64_t most, int64_t rule, double temperature, const std::optional<Tensor>& gate_total,
                      const Tensor& out) {
  const depass::ShareHidden call =
      share_call(gate, hidden, row_start, skipped, most, rule, temperature, gate_total, out);
  torch::stable::parallel_for(0, depass::tiles(call), 1, [&](int64_t first, int64_t last) {
    depass::share_hidden_cpu(call, first, last);
  });
}

void normed_cpu(const Tensor& state, const std::optional<Tensor>& position, const std::optional<Tensor>& scales,
                const std::optional<Tensor>& weight, bool centred, const std::optional<Tensor>& rows,
                const Tensor& out) {
  const depass::Normed call = norm_call(state, position, scales, weight, centred, rows, out);
  torch::stable::parallel_for(0, call.count, 16, [&](int64_t first, int64_t last) {
    depass::normed_cpu(call, first, last);
  });
}

void mix_values_cpu(const Tensor& pattern, const Tensor& values, const Tensor& row_start,
                    const Tensor& position_start, const Tensor& prompt, const Tensor& tiles,
                    const std::optional<Tensor>& query_scale, int64_t kv_heads, const Tensor& out) {
  const depass::MixValues call =
      mix_call(pattern, values, row_start, position_start, prompt, tiles, query_scale, kv_heads, out);
  const int64_t pieces = call.tile_count * call.kv_heads;
  std::atomic<int64_t> next{0};  // pieces differ in size, the longest first: whoever is free takes the next
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t, int64_t) {
    for (int64_t piece; (piece = next++) < pieces;)
      depass::mix_values_cpu(call, piece / call.kv_heads, piece % call.kv_heads);
  });
}

#ifdef DEPASS_CUDA
// Launches on the current stream of the tensor's device.
template <typename Call>
void on_device(const Tensor& tensor, const char* op, const Call& call, int (*kernel)(const Call&, void*)) {
  if (!aoti_torch_get_current_cuda_stream)
    throw std::runtime_error("depass_kernels: tensors on a CUDA device, but this torch names no CUDA stream");
  const torch::stable::accelerator::DeviceGuard guard(tensor.get_device_index());
  void* stream = nullptr;
  // Checked by hand: the headers of torch 2.10 to 2.12 lack STABLE_TORCH_ERROR_CODE_CHECK.
  if (const int error = aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream))
    throw std::runtime_error("depass_kernels: aoti_torch_get_current_cuda_stream for device " +
                             std::to_string(tensor.get_device_index()) + " returned error code " +
                             std::to_string(error));
  if (const int error = kernel(call, stream))
    throw std::runtime_error(std::string("depass_kernels: ") + op + " on CUDA: " + depass::cuda_error(error));
}

void share_hidden_cuda(const Tensor& gate, const Tensor& hidden, const Tensor& row_start, const Tensor& skipped,
                       int64_t most, int64_t rule, double temperature, const std::optional<Tensor>& gate_total,
                       const Tensor& out) {
  on_device(gate, "share_hidden",
            share_call(gate, hidden, row_start, skipped, most, rule, temperature, gate_total, out),
            &depass::share_hidden_cuda);
}

void normed_cuda(const Tensor& state, const std::optional<Tensor>& position, const std::optional<Tensor>& scales,
                 const std::optional<Tensor>& weight, bool centred, const std::optional<Tensor>& rows,
                 const Tensor& out) {
  on_device(state, "normed", norm_call(state, position, scales, weight, centred, rows, out), &depass::normed_cuda);
}

void mix_values_cuda(const Tensor& pattern, const Tensor& values, const Tensor& row_start,
                     const Tensor& position_start, const Tensor& prompt, const Tensor& tiles,
                     const std::optional<Tensor>& query_scale, int64_t kv_heads, const Tensor& out) {
  on_device(values, "mix_values",
            mix_call(pattern, values, row_start, position_start, prompt, tiles, query_scale, kv_heads, out),
            &depass::mix_values_cuda);
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY(depass_kernels, m) {
  m.def(
      "normed(Tensor state, Tensor? position, Tensor? scale, Tensor? weight, bool centred, Tensor? rows, "
      "Tensor(a!) out) -> ()");
  m.def(
      "share_hidden(Tensor gate, Tensor hidden, Tensor row_start, Tensor skipped, int most, "
      "int rule, float temperature, Tensor? gate_total, Tensor(a!) out) -> ()");
  m.def(
      "mix_values(Tensor pattern, Tensor values, Tensor row_start, Tensor position_start, Tensor prompt, "
      "Tensor tiles, Tensor? query_scale, int kv_heads, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(depass_kernels, CPU, m) {
  m.impl("normed", TORCH_BOX(&normed_cpu));
  m.impl("share_hidden", TORCH_BOX(&share_hidden_cpu));
  m.impl("mix_values", TORCH_BOX(&mix_values_cpu));
}

#ifdef DEPASS_CUDA
STABLE_TORCH_LIBRARY_IMPL(depass_kernels, CUDA, m) {
  m.impl("normed", TORCH_BOX(&normed_cuda));
  m.impl("share_hidden", TORCH_BOX(&share_hidden_cuda));
  m.impl("mix_values", TORCH_BOX(&mix_values_cuda));
}
#endif
