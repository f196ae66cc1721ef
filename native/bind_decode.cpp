// What a step of decoding does beside products of packed weights, for torch's tensors as they are. Each gives None for tensors that it does not take.
#include <nanobind/nanobind.h>

#include <optional>
#include <vector>

#include "bind.h"
#include "formats/bfloat16.h"
#include "layer/attention.h"
#include "layer/norm.h"
#include "layer/router.h"
#include "runtime/dispatch.h"
#include "tensors.h"

namespace nb = nanobind;

namespace coterie {
namespace {

bool is_float(Element e) { return e == Element::bf16 || e == Element::f32; }

Heads heads_of(const BorrowedHeads& t) {
  const int64_t size = t.element == Element::f32 ? 4 : 2;
  return {t.data, t.stride[0] * size, t.stride[1] * size, t.stride[2] * size};
}

// A row of bf16 or f32 as floats; nothing for any other.
std::optional<std::vector<float>> floats_of(nb::handle row, int64_t count) {
  const auto found = borrow_rows(row);
  if (!found || !is_float(found->element) || found->rows != 1 || found->cols != count) return {};
  std::vector<float> values(count);
  const auto* half = reinterpret_cast<const uint16_t*>(found->data);
  const auto* whole = reinterpret_cast<const float*>(found->data);
  for (int64_t i = 0; i < count; i++) values[i] = found->element == Element::bf16 ? bf16_to_float(half[i]) : whole[i];
  return values;
}

// Which positions a mask [*,1,1,S] lets through, a byte each: bool, or what is added to scores, if that is 0 or as good as minus infinity.
struct Mask {
  std::vector<uint8_t> made;
  const uint8_t* data = nullptr;
  int64_t stride = 0;

  // False for any other mask.
  bool read(const BorrowedHeads& m) {
    stride = m.shape[0] == 1 ? 0 : m.stride[0];
    data = m.data;
    if (m.element == Element::boolean) return true;
    if (!is_float(m.element)) return false;
    const int64_t rows = m.shape[0], positions = m.shape[3];
    made.resize(rows * positions);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t s = 0; s < positions; s++) {
        const int64_t at = r * m.stride[0] + s;
        const float v = m.element == Element::bf16 ? bf16_to_float(reinterpret_cast<const uint16_t*>(m.data)[at]) : reinterpret_cast<const float*>(m.data)[at];
        if (v != 0.0f && v > -1e30f) return false;
        made[r * positions + s] = v == 0.0f;
      }
    data = made.data();
    stride = rows == 1 ? 0 : positions;
    return true;
  }
};

// queries [B,Q,1,D], keys [B,G,S,D], values [B,G,S,V], of one dtype, bf16 or f32; mask [B or 1,1,1,S] or None; sinks [Q] or None. To [B,1,Q,V].
// D and V are multiples of 16, Q one of G.
nb::object attend_to(nb::handle queries, nb::handle keys, nb::handle values, nb::handle mask, float scale, nb::handle sinks) {
  const auto q = borrow_heads(queries), k = borrow_heads(keys), v = borrow_heads(values);
  if (!q || !k || !v) return nb::none();
  const auto *n = k->shape;
  const bool fit = q->element == k->element && k->element == v->element && is_float(k->element) &&
                   q->shape[0] == n[0] && v->shape[0] == n[0] && v->shape[1] == n[1] && v->shape[2] == n[2] && q->shape[2] == 1 && q->shape[3] == n[3] &&
                   n[3] % 16 == 0 && v->shape[3] % 16 == 0 && q->shape[1] % n[1] == 0;
  if (!fit) return nb::none();
  Attention a{n[0], n[1], q->shape[1] / n[1], n[2], n[3], v->shape[3], static_cast<DType>(k->element), heads_of(*q), heads_of(*k), heads_of(*v),
              nullptr, 0, scale, nullptr};
  Mask read;
  if (!mask.is_none()) {
    const auto m = borrow_heads(mask);
    if (!m || (m->shape[0] != n[0] && m->shape[0] != 1) || m->shape[1] != 1 || m->shape[2] != 1 || m->shape[3] != n[2] || !read.read(*m)) return nb::none();
    a.mask = read.data;
    a.mask_stride = read.stride;
  }
  std::optional<std::vector<float>> sink;
  if (!sinks.is_none()) {
    sink = floats_of(sinks, q->shape[1]);
    if (!sink) return nb::none();
    a.sinks = sink->data();
  }
  auto made = new_tensor(k->element, {n[0], 1, q->shape[1], a.value_dim});
  if (!made) return nb::none();
  {
    nb::gil_scoped_release released;
    attend(kernels(), a, made->second);
  }
  return made->first;
}

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
  if (!bias.is_none() && !(added = floats_of(bias, w->rows))) return nb::none();
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

}  // namespace

void bind_decode(nb::module_& m) {
  m.def("attend", &attend_to, nb::arg("queries"), nb::arg("keys"), nb::arg("values"), nb::arg("mask").none(), nb::arg("scale"),
        nb::arg("sinks") = nb::none());
  m.def("rms_norm", &rms_norm_of, nb::arg("x"), nb::arg("weight"), nb::arg("epsilon"), nb::arg("rounded"), nb::arg("from_one"));
  m.def("route", &route_of, nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(), nb::arg("top_k"), nb::arg("normalised"));
}

}  // namespace coterie
