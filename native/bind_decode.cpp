// What a step of decoding does beside products of packed weights, for torch's tensors as they are. Each gives None for tensors that it does not take.
#include <nanobind/nanobind.h>

#include "bind.h"
#include "layer/attention.h"
#include "layer/norm.h"
#include "layer/router.h"
#include "runtime/dispatch.h"
#include "tensors.h"

namespace nb = nanobind;

namespace coterie {
namespace {

Heads heads_of(const BorrowedHeads& t) {
  const int64_t size = t.element == Element::f32 ? 4 : 2;
  return {t.data, t.stride[0] * size, t.stride[1] * size, t.stride[2] * size};
}

// queries [B,Q,1,D], keys [B,G,S,D], values [B,G,S,V], of one dtype, bf16 or f32; mask bool [B or 1,1,1,S] or None. To [B,1,Q,V]. D and V are
// multiples of 16, Q one of G.
nb::object attend_to(nb::handle queries, nb::handle keys, nb::handle values, nb::handle mask, float scale) {
  const auto q = borrow_heads(queries), k = borrow_heads(keys), v = borrow_heads(values);
  if (!q || !k || !v) return nb::none();
  const auto *n = k->shape;
  const bool fit = q->element == k->element && k->element == v->element && (k->element == Element::bf16 || k->element == Element::f32) &&
                   q->shape[0] == n[0] && v->shape[0] == n[0] && v->shape[1] == n[1] && v->shape[2] == n[2] && q->shape[2] == 1 && q->shape[3] == n[3] &&
                   n[3] % 16 == 0 && v->shape[3] % 16 == 0 && q->shape[1] % n[1] == 0;
  if (!fit) return nb::none();
  Attention a{n[0], n[1], q->shape[1] / n[1], n[2], n[3], v->shape[3], static_cast<DType>(k->element), heads_of(*q), heads_of(*k), heads_of(*v),
              nullptr, 0, scale};
  if (!mask.is_none()) {
    const auto m = borrow_heads(mask);
    if (!m || m->element != Element::boolean || (m->shape[0] != n[0] && m->shape[0] != 1) || m->shape[1] != 1 || m->shape[2] != 1 || m->shape[3] != n[2])
      return nb::none();
    a.mask = m->data;
    a.mask_stride = m->shape[0] == 1 ? 0 : m->stride[0];
  }
  auto made = new_tensor(k->element, {n[0], 1, q->shape[1], a.value_dim});
  if (!made) return nb::none();
  {
    nb::gil_scoped_release released;
    attend(kernels(), a, made->second);
  }
  return made->first;
}

bool is_float(Element e) { return e == Element::bf16 || e == Element::f32; }

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

// x [T,H] and weight [E,H] of one dtype, bf16 or f32, H a multiple of 16: logits [T,E] of that dtype, weights f32 [T,K] and experts i64 [T,K], the
// largest first.
nb::object route_of(nb::handle x, nb::handle weight, int64_t top_k, bool normalised) {
  const auto rows = borrow_rows(x), w = borrow_rows(weight);
  const bool fit = rows && w && rows->element == w->element && is_float(w->element) && rows->shape.size() == 2 && w->shape.size() == 2 &&
                   rows->cols == w->cols && w->cols % 16 == 0 && top_k >= 1 && top_k <= w->rows;
  if (!fit) return nb::none();
  auto logits = new_tensor(rows->element, {rows->rows, w->rows}), weights = new_tensor(Element::f32, {rows->rows, top_k}),
       ids = new_tensor(Element::i64, {rows->rows, top_k});
  if (!logits || !weights || !ids) return nb::none();
  {
    nb::gil_scoped_release released;
    route(kernels(), {w->data, w->rows, w->cols, top_k, normalised}, rows->data, static_cast<DType>(rows->element), rows->rows, logits->second,
          static_cast<float*>(weights->second), static_cast<int64_t*>(ids->second));
  }
  return nb::make_tuple(logits->first, weights->first, ids->first);
}

}  // namespace

void bind_decode(nb::module_& m) {
  m.def("attend", &attend_to, nb::arg("queries"), nb::arg("keys"), nb::arg("values"), nb::arg("mask").none(), nb::arg("scale"));
  m.def("rms_norm", &rms_norm_of, nb::arg("x"), nb::arg("weight"), nb::arg("epsilon"), nb::arg("rounded"), nb::arg("from_one"));
  m.def("route", &route_of, nb::arg("x"), nb::arg("weight"), nb::arg("top_k"), nb::arg("normalised"));
}

}  // namespace coterie
