// Norms, routers and plain linear layers of a step of decoding, for torch's tensors as they are. Each gives None for tensors that it does not take.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include <optional>
#include <tuple>
#include <vector>

#include "bind.h"
#include "bind_router.h"
#include "layer/norm.h"
#include "layer/plain.h"
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

// x [..., cols] and weight [rows, cols] of one dtype, bf16 or f32, columns a multiple of 16, bias [rows] or None: [..., rows].
nb::object plain_linear_of(nb::handle x, nb::handle weight, nb::handle bias) {
  const auto rows = borrow_rows(x), w = borrow_rows(weight);
  const bool fit = rows && w && rows->element == w->element && is_float(w->element) && w->shape.size() == 2 && rows->cols == w->cols && w->cols % kPanelRows == 0;
  if (!fit) return nb::none();
  std::optional<std::vector<float>> added;
  if (!bias.is_none() && !(added = borrow_floats(bias, w->rows))) return nb::none();
  std::vector<int64_t> shape = rows->shape;
  shape.back() = w->rows;
  auto made = new_tensor(rows->element, shape);
  if (!made) return nb::none();
  {
    nb::gil_scoped_release released;
    plain_linear(kernels(), w->data, static_cast<DType>(w->element), w->rows, w->cols, rows->data, rows->rows, added ? added->data() : nullptr, made->second);
  }
  return made->first;
}

// x [T,H] and weight [E,H] of one dtype, bf16 or f32, H a multiple of 16, bias [E] or None: logits [T,E] of that dtype, weights f32 [T,K] and experts i64 [T,K], the
// largest first.
nb::object route_of(nb::handle x, nb::handle weight, nb::handle bias, int64_t top_k, bool normalised, const std::optional<ScoresTuple>& scores) {
  const auto rows = borrow_rows(x), w = borrow_rows(weight);
  const bool fit = rows && w && rows->element == w->element && is_float(w->element) && rows->shape.size() == 2 && w->shape.size() == 2 &&
                   rows->cols == w->cols && w->cols % 16 == 0 && top_k >= 1 && top_k <= w->rows;
  if (!fit) return nb::none();
  std::optional<std::vector<float>> added;
  if (!bias.is_none() && !(added = borrow_floats(bias, w->rows))) return nb::none();
  Router router{w->data, added ? added->data() : nullptr, w->rows, w->cols, top_k, normalised};
  std::vector<float> correction;
  if (scores && !scored(*scores, correction, router)) return nb::none();
  auto logits = new_tensor(router.wide ? Element::f32 : rows->element, {rows->rows, w->rows}), weights = new_tensor(Element::f32, {rows->rows, top_k}),
       ids = new_tensor(Element::i64, {rows->rows, top_k});
  if (!logits || !weights || !ids) return nb::none();
  {
    nb::gil_scoped_release released;
    route(kernels(), router, rows->data, static_cast<DType>(rows->element), rows->rows, logits->second, static_cast<float*>(weights->second),
          static_cast<int64_t*>(ids->second));
  }
  return nb::make_tuple(logits->first, weights->first, ids->first);
}

}  // namespace

void bind_decode(nb::module_& m) {
  m.def("rms_norm", &rms_norm_of, nb::arg("x"), nb::arg("weight"), nb::arg("epsilon"), nb::arg("rounded"), nb::arg("from_one"));
  m.def("plain_linear", &plain_linear_of, nb::arg("x"), nb::arg("weight"), nb::arg("bias").none());
  m.def("route", &route_of, nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(), nb::arg("top_k"), nb::arg("normalised"),
        nb::arg("scores") = nb::none());
}

}  // namespace coterie
