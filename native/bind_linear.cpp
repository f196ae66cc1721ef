#include "bind_linear.h"

#include <nanobind/stl/tuple.h>

#include <tuple>
#include <vector>

#include "layer/forward.h"

namespace nb = nanobind;

namespace coterie {

std::optional<Experts> gated_of(const PackedLinear& gate, const PackedLinear& up, const PackedLinear& down, const std::tuple<int, float, float, float>& activation) {
  const Linear &g = gate.layer(), &u = up.layer(), &d = down.layer();
  const bool alike = same_format(g.layout, u.layout) && g.layout.rows == u.layout.rows && g.layout.cols == u.layout.cols && !g.bias == !u.bias;
  if (!alike || d.layout.cols != g.layout.rows || d.layout.rows != g.layout.cols) return std::nullopt;
  Experts layer{};
  layer.count = 1, layer.hidden = g.layout.cols, layer.intermediate = g.layout.rows, layer.has_gate = true;
  layer.activation = {static_cast<ActivationKind>(std::get<0>(activation)), std::get<1>(activation), std::get<2>(activation), std::get<3>(activation)};
  layer.in = g.layout, layer.out = d.layout;
  layer.gate = {g.matrix}, layer.up = {u.matrix}, layer.down = {d.matrix};
  layer.gate_bias = g.bias, layer.up_bias = u.bias, layer.down_bias = d.bias;
  return layer;
}

namespace {

// That of a plain tensor x [..., inputs], bf16 or f32; None for any other, and where there is no such expert.
nb::object gated(const PackedLinear& gate, const PackedLinear& up, const PackedLinear& down, nb::handle x, std::tuple<int, float, float, float> activation,
                 bool integer) {
  const auto layer = gated_of(gate, up, down, activation);
  const auto rows = borrow_rows(x);
  if (!layer || !rows || !is_float(rows->element) || rows->cols != layer->hidden) return nb::none();
  auto made = new_tensor(rows->element, rows->shape);
  if (!made) return nb::none();
  const std::vector<int64_t> ids(rows->rows, 0);
  const std::vector<float> weights(rows->rows, 1.0f);
  const auto dtype = static_cast<DType>(rows->element);
  {
    nb::gil_scoped_release released;
    forward(*layer, kernels(), {rows->rows, 1, rows->data, dtype, rows->cols, ids.data(), weights.data(), made->second, dtype, integer});
  }
  return made->first;
}

}  // namespace

void bind_linear(nb::module_& m) {
  nb::class_<PackedLinear>(m, "Linear")
      .def(nb::init<int64_t, const LayoutTuple&, uintptr_t, uintptr_t, nb::object>())
      .def("handle", &PackedLinear::handle)
      .def("compute", &PackedLinear::compute)
      .def("forward", &PackedLinear::forward)
      .def("backward", &PackedLinear::backward);
  m.def("gated", &gated, nb::arg("gate"), nb::arg("up"), nb::arg("down"), nb::arg("x"), nb::arg("activation"), nb::arg("integer"));
}

}  // namespace coterie
