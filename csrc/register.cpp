// Makes the kernels known to torch, through its stable ABI: one binary serves every torch from 2.10 on.
// Arguments arrive checked (depass_kernels/ops.py); here they only change from tensors to pointers.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>

#include "share_hidden.h"

namespace {

using torch::stable::Tensor;

depass::Matrix matrix(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  depass::Type type;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: type = depass::Type::f32; break;
    case ScalarType::Double: type = depass::Type::f64; break;
    case ScalarType::BFloat16: type = depass::Type::bf16; break;
    case ScalarType::Half: type = depass::Type::f16; break;
    default: throw std::runtime_error("share_hidden: dtype without a CPU kernel");
  }
  return {tensor.data_ptr(), type, tensor.stride(0)};
}

void share_hidden(const Tensor& gate, const Tensor& hidden, const Tensor& row_start, const Tensor& skipped,
                  const std::optional<Tensor>& gate_scale, int64_t rule, double temperature,
                  const std::optional<Tensor>& gate_total, const Tensor& out) {
  depass::ShareHidden call{};
  call.gate = matrix(gate);
  call.hidden = matrix(hidden);
  if (gate_total) call.gate_total = matrix(*gate_total);
  call.out = matrix(out);
  call.row_start = static_cast<const int64_t*>(row_start.data_ptr());
  call.skipped = static_cast<const int64_t*>(skipped.data_ptr());
  call.gate_scale = gate_scale ? static_cast<const float*>(gate_scale->data_ptr()) : nullptr;
  call.rule = static_cast<depass::Rule>(rule);
  call.temperature = temperature;
  call.positions = skipped.size(0);
  call.columns = gate.size(1);
  for (int64_t t = 0; t < call.positions; ++t) {
    const int64_t rows = call.row_start[t + 1] - call.row_start[t];
    if (rows > call.most) call.most = rows;
  }
  torch::stable::parallel_for(0, depass::tiles(call), 1, [&](int64_t first, int64_t last) {
    depass::share_hidden_cpu(call, first, last);
  });
}

bool has_half() { return depass::has_half(); }

}  // namespace

STABLE_TORCH_LIBRARY(depass_kernels, m) {
  m.def(
      "share_hidden(Tensor gate, Tensor hidden, Tensor row_start, Tensor skipped, Tensor? gate_scale, int rule, "
      "float temperature, Tensor? gate_total, Tensor(a!) out) -> ()");
  m.def("has_half() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(depass_kernels, CPU, m) { m.impl("share_hidden", TORCH_BOX(&share_hidden)); }

STABLE_TORCH_LIBRARY_IMPL(depass_kernels, CompositeExplicitAutograd, m) { m.impl("has_half", TORCH_BOX(&has_half)); }
