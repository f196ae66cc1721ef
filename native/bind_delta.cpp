// Linear attention, by itself and as a step of decoding, for torch's tensors as they are. Each gives None for tensors that it does not take.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include <optional>
#include <tuple>
#include <vector>

#include "bind.h"
#include "bind_linear.h"
#include "layer/step.h"
#include "runtime/dispatch.h"
#include "tensors.h"

namespace nb = nanobind;

namespace coterie {
namespace {

// What a module of linear attention has beside its projections, and what it remembers: window [B,channels,positions], convolution [channels,1,taps], bias or
// None, state f32 [B,H,K,V], log_rates and step_bias [H], norm [V], epsilon, key heads.
using DeltaTuple = std::tuple<nb::handle, nb::handle, nb::handle, nb::handle, nb::handle, nb::handle, nb::handle, float, int64_t>;

struct BorrowedDelta {
  DeltaTokens tokens{};
  std::vector<float> rates, biases, norm, added;

  // For so many tokens of so many sequences; false where it does not fit.
  bool of(const DeltaTuple& given, Element element, int64_t sequences, int64_t count, bool by_head) {
    const auto [window, convolution, bias, state, log_rates, step_bias, norm_weight, epsilon, key_heads] = given;
    const auto w = borrow_rows(window), c = borrow_rows(convolution), s = borrow_rows(state);
    if (!w || !c || !s || !is_float(element) || !is_float(c->element) || w->element != element || s->element != Element::f32) return false;
    if (s->shape.size() != 4 || w->shape.size() != 3 || key_heads < 1 || sequences < 1 || count < 1) return false;
    DeltaTokens& d = tokens;
    d.sequences = sequences, d.tokens = count, d.key_heads = key_heads, d.value_heads = s->shape[1], d.key_dim = s->shape[2], d.value_dim = s->shape[3];
    d.positions = w->shape[2], d.taps = c->cols, d.by_head = by_head;
    const bool fit = d.value_heads % key_heads == 0 && d.value_dim % kPanelRows == 0 && d.key_dim > 0 && s->shape[0] == sequences && w->shape[0] == sequences &&
                     w->shape[1] == d.channels() && c->rows == d.channels() && d.taps >= 1 && d.taps <= d.positions;
    if (!fit || !floats(log_rates, d.value_heads, rates) || !floats(step_bias, d.value_heads, biases) || !floats(norm_weight, d.value_dim, norm)) return false;
    if (!bias.is_none() && !floats(bias, d.channels(), added)) return false;
    d.dtype = static_cast<DType>(element), d.convolution_dtype = static_cast<DType>(c->element);
    d.window = w->data, d.convolution = c->data, d.convolution_bias = added.empty() ? nullptr : added.data(), d.state = reinterpret_cast<float*>(s->data);
    d.log_rates = rates.data(), d.step_bias = biases.data(), d.norm = norm.data(), d.epsilon = epsilon;
    return true;
  }

 private:
  static bool floats(nb::handle row, int64_t count, std::vector<float>& to) {
    auto found = borrow_floats(row, count);
    if (found) to = std::move(*found);
    return found.has_value();
  }
};

// `mixed` [B,T,channels], or with gates, by head; gates [B,T,values], betas and steps [B,T,H], or betas alone, by head; see DeltaTokens.
nb::object delta_rule_of(nb::handle mixed, nb::handle gates, nb::handle betas, nb::handle steps, const DeltaTuple& module) {
  const bool by_head = gates.is_none();
  const auto m = borrow_rows(mixed), b = borrow_rows(betas);
  const auto g = by_head ? m : borrow_rows(gates), t = by_head ? b : borrow_rows(steps);
  if (!m || !b || !g || !t || m->shape.size() != 3) return nb::none();
  const Element element = m->element;
  BorrowedDelta delta;
  if (!delta.of(module, element, m->shape[0], m->shape[1], by_head)) return nb::none();
  DeltaTokens& d = delta.tokens;
  const bool fit = b->element == element && g->element == element && t->element == element && b->rows == m->rows && g->rows == m->rows && t->rows == m->rows &&
                   m->cols == d.width() && b->cols == d.value_heads * (by_head ? 2 : 1) && (by_head || (g->cols == d.values() && t->cols == d.value_heads));
  if (!fit) return nb::none();
  auto made = new_tensor(element, {d.sequences, d.tokens, d.values()});
  if (!made) return nb::none();
  d.mixed = m->data, d.gates = g->data, d.betas = b->data, d.steps = t->data;
  {
    nb::gil_scoped_release released;
    delta_rule(kernels(), d, made->second);
  }
  return made->first;
}

// x [B,1,H] after norm, linear attention and the product that follows, and x itself (see DeltaStep): projections to mixed, gates, betas and steps, or to mixed
// and betas; `norm`: as `rms_norm` takes it. And how many seconds it took between the products.
nb::object delta_step_of(nb::handle x, nb::handle norm_weight, std::tuple<float, bool, bool> norm, nb::list projections, const PackedLinear& output,
                         const DeltaTuple& module, bool integer, bool output_integer) {
  const auto rows = borrow_rows(x), w = borrow_rows(norm_weight);
  const bool by_head = nb::len(projections) == 2;
  if (!rows || !w || !is_float(w->element) || w->rows != 1 || w->cols != rows->cols || (!by_head && nb::len(projections) != 4)) return nb::none();
  BorrowedDelta delta;
  if (!delta.of(module, rows->element, rows->rows, 1, by_head)) return nb::none();
  const DeltaTokens& d = delta.tokens;
  const auto [epsilon, rounded, from_one] = norm;
  DeltaStep step{{w->data, static_cast<DType>(w->element), epsilon, rounded, from_one}, {}, &output.layer(), integer, output_integer};
  const std::vector<int64_t> widths = by_head ? std::vector<int64_t>{d.width(), 2 * d.value_heads}
                                              : std::vector<int64_t>{d.width(), d.values(), d.value_heads, d.value_heads};
  for (size_t i = 0; i < widths.size(); i++) {
    const Linear& layer = nb::cast<const PackedLinear&>(projections[i]).layer();
    if (layer.layout.rows != widths[i] || layer.layout.cols != rows->cols) return nb::none();
    step.projections.push_back(&layer);
  }
  if (step.output->layout.cols != d.values() || step.output->layout.rows != rows->cols) return nb::none();
  auto made = new_tensor(rows->element, rows->shape);
  if (!made) return nb::none();
  double seconds;
  {
    nb::gil_scoped_release released;
    seconds = delta_step(kernels(), step, d, rows->data, made->second);
  }
  return nb::make_tuple(made->first, seconds);
}

}  // namespace

void bind_delta(nb::module_& m) {
  m.def("delta_rule", &delta_rule_of, nb::arg("mixed"), nb::arg("gates").none(), nb::arg("betas"), nb::arg("steps").none(), nb::arg("module"));
  m.def("delta_step", &delta_step_of, nb::arg("x"), nb::arg("norm_weight"), nb::arg("norm"), nb::arg("projections"), nb::arg("output"), nb::arg("module"),
        nb::arg("integer"), nb::arg("output_integer"));
}

}  // namespace coterie
