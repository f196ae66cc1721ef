// Norms and routers of a step of decoding, for torch's tensors as they are. Each gives None for tensors that it does not take.
#include <nanobind/nanobind.h>

#include <optional>
#include <vector>

#include "bind.h"
#include "layer/delta.h"
#include "layer/norm.h"
#include "layer/router.h"
#include "runtime/dispatch.h"
#include "tensors.h"

namespace nb = nanobind;

namespace coterie {
namespace {

// x [..., H] and weight [H], each bf16 or f32. See RmsNorm.
nb::object rms_norm_of(nb::handle x, nb::handle weight, float epsilon, bool rounded, bool from_one) {
  const auto rows = borrow_rows(x), w = borrow_rows(weight);
  if (!rows || !w || !is_float(rows->element) || !is_float(w->element) || w->rows != 1 || w->cols != rows->cols) return nb::none();
  auto made = new_tensor(rows->element, rows->shape);
  if (!made) return nb::none();
  const auto dtype = static_cast<DType>(rows->element);
  rms_norm({w->data, static_cast<DType>(w->element), epsilon, rounded, from_one}, rows->data, dtype, rows->rows, rows->cols, made->second);
  return made->first;
}

// x [T,H] and weight [E,H] of one dtype, bf16 or f32, H a multiple of 16, bias [E] or None: logits [T,E] of that dtype, weights f32 [T,K] and experts i64 [T,K], the
// largest first.
nb::object route_of(nb::handle x, nb::handle weight, nb::handle bias, int64_t top_k, bool normalised) {
  const auto rows = borrow_rows(x), w = borrow_rows(weight);
  const bool fit = rows && w && rows->element == w->element && is_float(w->element) && rows->shape.size() == 2 && w->shape.size() == 2 &&
                   rows->cols == w->cols && w->cols % 16 == 0 && top_k >= 1 && top_k <= w->rows;
  if (!fit) return nb::none();
  std::optional<std::vector<float>> added;
  if (!bias.is_none() && !(added = borrow_floats(bias, w->rows))) return nb::none();
  auto logits = new_tensor(rows->element, {rows->rows, w->rows}), weights = new_tensor(Element::f32, {rows->rows, top_k}),
       ids = new_tensor(Element::i64, {rows->rows, top_k});
  if (!logits || !weights || !ids) return nb::none();
  {
    nb::gil_scoped_release released;
    route(kernels(), {w->data, added ? added->data() : nullptr, w->rows, w->cols, top_k, normalised}, rows->data, static_cast<DType>(rows->element), rows->rows, logits->second,
          static_cast<float*>(weights->second), static_cast<int64_t*>(ids->second));
  }
  return nb::make_tuple(logits->first, weights->first, ids->first);
}

// Linear attention of tokens (see DeltaTokens): `mixed` [B,T,channels], or with gates, by head; gates [B,T,values], betas and steps [B,T,H], or betas
// alone, by head; window [B,channels,positions], convolution [channels,1,taps], bias or None, state f32 [B,H,K,V], log_rates and step_bias [H], norm [V].
nb::object delta_rule_of(nb::handle mixed, nb::handle gates, nb::handle betas, nb::handle steps, nb::handle window, nb::handle convolution, nb::handle bias,
                         nb::handle state, nb::handle log_rates, nb::handle step_bias, nb::handle norm, float epsilon, int64_t key_heads) {
  const bool by_head = gates.is_none();
  const auto m = borrow_rows(mixed), b = borrow_rows(betas), w = borrow_rows(window), c = borrow_rows(convolution), s = borrow_rows(state);
  const auto g = by_head ? m : borrow_rows(gates), t = by_head ? b : borrow_rows(steps);
  if (!m || !b || !w || !c || !s || !g || !t || !is_float(m->element) || !is_float(c->element)) return nb::none();
  if (m->shape.size() != 3 || m->rows < 1 || s->element != Element::f32 || s->shape.size() != 4 || w->shape.size() != 3 || key_heads < 1) return nb::none();
  const Element element = m->element;
  const int64_t heads = s->shape[1], key_dim = s->shape[2], value_dim = s->shape[3], values = heads * value_dim;
  DeltaTokens d{};
  d.sequences = m->shape[0], d.tokens = m->shape[1], d.key_heads = key_heads, d.value_heads = heads, d.key_dim = key_dim, d.value_dim = value_dim;
  d.positions = w->shape[2], d.taps = c->cols, d.by_head = by_head;
  const int64_t channels = d.channels();
  const bool same = b->element == element && w->element == element && g->element == element && t->element == element;
  const bool fit = same && heads % key_heads == 0 && value_dim % 16 == 0 && key_dim > 0 && s->shape[0] == d.sequences && w->shape[0] == d.sequences &&
                   w->shape[1] == channels && c->rows == channels && d.taps >= 1 && d.taps <= d.positions && b->rows == m->rows && g->rows == m->rows &&
                   t->rows == m->rows && m->cols == d.width() && b->cols == heads * (by_head ? 2 : 1) && (by_head || (g->cols == values && t->cols == heads));
  if (!fit) return nb::none();
  const auto rates = borrow_floats(log_rates, heads), biases = borrow_floats(step_bias, heads), weight = borrow_floats(norm, value_dim);
  std::optional<std::vector<float>> added;
  if (!rates || !biases || !weight || (!bias.is_none() && !(added = borrow_floats(bias, channels)))) return nb::none();
  auto made = new_tensor(element, {d.sequences, d.tokens, values});
  if (!made) return nb::none();
  d.dtype = static_cast<DType>(element), d.convolution_dtype = static_cast<DType>(c->element);
  d.mixed = m->data, d.gates = g->data, d.betas = b->data, d.steps = t->data, d.window = w->data, d.convolution = c->data;
  d.convolution_bias = added ? added->data() : nullptr, d.state = reinterpret_cast<float*>(s->data);
  d.log_rates = rates->data(), d.step_bias = biases->data(), d.norm = weight->data(), d.epsilon = epsilon;
  {
    nb::gil_scoped_release released;
    delta_rule(kernels(), d, made->second);
  }
  return made->first;
}

}  // namespace

void bind_decode(nb::module_& m) {
  m.def("rms_norm", &rms_norm_of, nb::arg("x"), nb::arg("weight"), nb::arg("epsilon"), nb::arg("rounded"), nb::arg("from_one"));
  m.def("delta_rule", &delta_rule_of, nb::arg("mixed"), nb::arg("gates").none(), nb::arg("betas"), nb::arg("steps").none(), nb::arg("window"),
        nb::arg("convolution"), nb::arg("bias").none(), nb::arg("state"), nb::arg("log_rates"), nb::arg("step_bias"), nb::arg("norm"), nb::arg("epsilon"),
        nb::arg("key_heads"));
  m.def("route", &route_of, nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(), nb::arg("top_k"), nb::arg("normalised"));
}

}  // namespace coterie
