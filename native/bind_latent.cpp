// Attention to latents of a token, by itself and with the products before and behind it, for torch's tensors as they are. Each gives None for tensors that it
// does not take.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "bind.h"
#include "bind_attention.h"
#include "bind_linear.h"
#include "layer/step.h"
#include "layer/values.h"
#include "runtime/dispatch.h"
#include "tensors.h"

namespace nb = nanobind;

namespace coterie {
namespace {

// The matrix [heads (K + V),R] that makes keys and values of latents: a tensor; or packed, K and V being multiples of 64, and the rows that make keys,
// [heads K,R], a tensor beside it.
using MatrixTuple = std::tuple<nb::handle, nb::handle>;

struct ExpansionMatrix {
  const uint8_t* weight = nullptr;
  const uint8_t* keys = nullptr;
  const Linear* packed = nullptr;
  int64_t rows = 0, cols = 0, key_rows = 0;

  // Of latents of that type; false for another.
  bool of(const MatrixTuple& given, Element element) {
    const auto [matrix, of_keys] = given;
    if (!nb::isinstance<PackedLinear>(matrix)) {
      const auto found = borrow_rows(matrix);
      if (!found || found->element != element || !of_keys.is_none()) return false;
      weight = found->data, rows = found->rows, cols = found->cols;
      return true;
    }
    const auto found = borrow_rows(of_keys);
    packed = &nb::cast<const PackedLinear&>(matrix).layer();
    rows = packed->layout.rows, cols = packed->layout.cols;
    if (!found || found->element != element || found->cols != cols || packed->bias) return false;
    keys = found->data, key_rows = found->rows;
    return true;
  }

  // Into `to`, of which the sizes and the type are known; false where these do not fit.
  bool into(LatentAttention& to) const {
    const int64_t head = to.key_dim + to.value_dim, row_bytes = to.rank * element_bytes(to.dtype);
    if (to.heads <= 0 || to.key_dim <= 0 || to.value_dim <= 0 || cols != to.rank || rows != to.heads * head) return false;
    if (packed && (to.key_dim % kBlockRows || to.value_dim % kBlockRows || key_rows != to.heads * to.key_dim)) return false;
    to.packed = packed;
    to.key_weight = packed ? keys : weight, to.key_stride = (packed ? to.key_dim : head) * row_bytes;
    to.value_weight = packed ? nullptr : weight + to.key_dim * row_bytes, to.value_stride = head * row_bytes;
    return true;
  }
};

// queries [B,Q,1,K + D], the matrix, latents [B,1,S,R], what is cached beside them [B,1,S,D], of one dtype, bf16 or f32, R and D multiples of 16;
// mask [B or 1,1,1,S] or None; sinks [Q] or None. To [B,1,Q,V].
nb::object attend_to_latents(nb::handle queries, const MatrixTuple& matrix, nb::handle latents, nb::handle turned, nb::handle mask, float scale, nb::handle sinks,
                             bool integer) {
  const auto q = borrow_heads(queries), l = borrow_heads(latents), t = borrow_heads(turned);
  if (!q || !l || !t || !is_float(q->element)) return nb::none();
  const Element element = q->element;
  ExpansionMatrix w;
  if (!w.of(matrix, element)) return nb::none();
  const int64_t sequences = q->shape[0], heads = q->shape[1], positions = l->shape[2], rank = l->shape[3], turned_dim = t->shape[3];
  const bool fit = l->element == element && t->element == element && sequences > 0 && heads > 0 && positions > 0 && q->shape[2] == 1 &&
                   l->shape[0] == sequences && t->shape[0] == sequences && l->shape[1] == 1 && t->shape[1] == 1 && t->shape[2] == positions &&
                   rank > 0 && rank % 16 == 0 && turned_dim % 16 == 0;
  if (!fit) return nb::none();
  const int64_t key_dim = q->shape[3] - turned_dim, value_dim = w.rows / heads - key_dim;
  LatentAttention a{};
  a.sequences = sequences, a.heads = heads, a.positions = positions, a.rank = rank, a.key_dim = key_dim, a.value_dim = value_dim, a.turned_dim = turned_dim;
  a.dtype = static_cast<DType>(element), a.integer = integer, a.scale = scale;
  a.queries = heads_of(*q), a.latents = heads_of(*l), a.turned = heads_of(*t);
  if (!w.into(a)) return nb::none();
  Mask read;
  if (!read.of(mask, sequences, 1, positions)) return nb::none();
  std::optional<std::vector<float>> sink;
  if (!sinks.is_none() && !(sink = borrow_floats(sinks, heads))) return nb::none();
  auto made = new_tensor(element, {sequences, 1, heads, value_dim});
  if (!made) return nb::none();
  a.mask = read.data, a.mask_stride = read.sequence, a.sinks = sink ? sink->data() : nullptr;
  {
    nb::gil_scoped_release released;
    attend_latents(kernels(), a, made->second);
  }
  return made->first;
}

// A layer's attention to latents while a model decodes (see LatentWeights). Norms by their options; query_latents: or None.
class LatentAttentionStep {
 public:
  LatentAttentionStep(nb::object query_latents, nb::object queries, nb::object latents, nb::object output, NormTuple norm, NormTuple query_norm, NormTuple latent_norm,
                      int64_t key_dim, int64_t value_dim, int64_t turned_dim, float scale, int halves)
      : owners_{std::move(query_latents), std::move(queries), std::move(latents), std::move(output)},
        norm_(norm),
        query_norm_(query_norm),
        latent_norm_(latent_norm),
        key_dim_(key_dim),
        value_dim_(value_dim),
        turned_dim_(turned_dim),
        scale_(scale),
        halves_(static_cast<Halves>(halves)) {}

  // x [B,1,H], the norms' weights or None, the matrix [heads (K + V),R] that makes keys and values, cos and sin [B or 1,1,turned_dim], or half of that, a cache
  // [B,1,room,R] and [B,1,room,turned_dim] whose first `cached` positions are in use, mask [B or 1,1,1,cached + 1] or None. To [B,1,outputs]; the cache's next
  // position is written.
  nb::object operator()(nb::handle x, nb::handle weight, nb::handle query_weight, nb::handle latent_weight, const MatrixTuple& matrix, nb::handle cos, nb::handle sin,
                        nb::handle latents, nb::handle turned, int64_t cached, nb::handle mask, bool integer, bool queries_integer, bool matrix_integer,
                        bool output_integer) {
    LatentWeights w{{}, layer(0), {}, layer(1), layer(2), layer(3), {}, halves_, integer, queries_integer, output_integer};
    const auto rows = borrow_rows(x), c = borrow_rows(cos), s = borrow_rows(sin);
    const auto l = borrow_heads(latents), t = borrow_heads(turned);
    if (!rows || !c || !s || !l || !t || !is_float(rows->element) || turned_dim_ <= 0 || turned_dim_ % kPanelRows || key_dim_ <= 0 || value_dim_ <= 0) return nb::none();
    const Element element = rows->element;
    ExpansionMatrix made;
    if (!made.of(matrix, element)) return nb::none();
    const int64_t sequences = rows->rows, room = l->shape[2], rank = l->shape[3], heads = made.rows / (key_dim_ + value_dim_);
    const bool halved = c->cols == turned_dim_ / 2;
    const auto angles = [&](const BorrowedRows& r) {
      return r.element == element && (r.rows == sequences || r.rows == 1) && r.cols == c->cols && (r.cols == turned_dim_ || halved);
    };
    const auto memory_fits = [&](const BorrowedHeads& m, int64_t width) {
      return m.element == element && m.shape[0] == sequences && m.shape[1] == 1 && m.shape[2] == room && m.shape[3] == width;
    };
    const Layout& first = (w.query_latents ? w.query_latents : w.queries)->layout;
    const bool fit = sequences > 0 && first.cols == rows->cols && w.latents->layout.cols == rows->cols && w.latents->layout.rows == rank + turned_dim_ &&
                     (!w.query_latents || w.queries->layout.cols == first.rows) && rank % kPanelRows == 0 && w.queries->layout.rows == heads * (key_dim_ + turned_dim_) &&
                     w.output->layout.cols == heads * value_dim_ && angles(*c) && angles(*s) && c->rows == s->rows && memory_fits(*l, rank) &&
                     memory_fits(*t, turned_dim_) && cached >= 0 && cached < room;
    if (!fit || (norm_ && w.output->layout.rows != rows->cols) || !latent_norm_ || query_norm_.has_value() != (w.query_latents != nullptr)) return nb::none();
    if (!norm_of(norm_, weight, rows->cols, w.norm) || !norm_of(latent_norm_, latent_weight, rank, w.latent_norm) || !norm_of(query_norm_, query_weight, first.rows, w.query_norm))
      return nb::none();
    Mask read;
    if (!read.of(mask, sequences, 1, cached + 1)) return nb::none();
    auto out = new_tensor(element, {sequences, 1, w.output->layout.rows});
    if (!out) return nb::none();
    const int64_t size = element == Element::f32 ? 4 : 2;
    const auto dtype = static_cast<DType>(element);
    LatentStep step{{}, {rows->data, dtype, rows->cols}, c->data, s->data, halved ? 0 : turned_dim_ / 2, c->rows == 1 ? 0 : c->cols * size, cache_of(*l), cache_of(*t), cached};
    LatentAttention& a = step.attention;
    a.sequences = sequences, a.heads = heads, a.rank = rank, a.key_dim = key_dim_, a.value_dim = value_dim_, a.turned_dim = turned_dim_;
    a.dtype = dtype, a.integer = matrix_integer, a.mask = read.data, a.mask_stride = read.sequence, a.scale = scale_;
    if (!made.into(a)) return nb::none();
    {
      nb::gil_scoped_release released;
      attending_ += latent_step(kernels(), w, step, out->second);
    }
    return out->first;
  }

  // Seconds that attention itself has taken in all calls.
  double attending() const { return attending_; }

 private:
  const Linear* layer(int i) const { return owners_[i].is_none() ? nullptr : &nb::cast<const PackedLinear&>(owners_[i]).layer(); }

  nb::object owners_[4];
  NormTuple norm_, query_norm_, latent_norm_;
  int64_t key_dim_, value_dim_, turned_dim_;
  float scale_;
  Halves halves_;
  double attending_ = 0;
};

}  // namespace

void bind_latent(nb::module_& m) {
  nb::class_<LatentAttentionStep>(m, "LatentAttentionStep")
      .def(nb::init<nb::object, nb::object, nb::object, nb::object, NormTuple, NormTuple, NormTuple, int64_t, int64_t, int64_t, float, int>(),
           nb::arg("query_latents").none(), nb::arg("queries"), nb::arg("latents"), nb::arg("output"), nb::arg("norm").none(), nb::arg("query_norm").none(),
           nb::arg("latent_norm"), nb::arg("key_dim"), nb::arg("value_dim"), nb::arg("turned_dim"), nb::arg("scale"), nb::arg("halves"))
      .def_prop_ro("attending", &LatentAttentionStep::attending)
      .def("__call__", &LatentAttentionStep::operator(), nb::arg("x"), nb::arg("weight").none(), nb::arg("query_weight").none(), nb::arg("latent_weight"),
           nb::arg("matrix"), nb::arg("cos"), nb::arg("sin"), nb::arg("latents"), nb::arg("turned"), nb::arg("cached"), nb::arg("mask").none(), nb::arg("integer"),
           nb::arg("queries_integer"), nb::arg("matrix_integer"), nb::arg("output_integer"));
  m.def("attend_latents", &attend_to_latents, nb::arg("queries"), nb::arg("matrix"), nb::arg("latents"), nb::arg("turned"), nb::arg("mask").none(), nb::arg("scale"),
        nb::arg("sinks") = nb::none(), nb::arg("integer") = false);
}

}  // namespace coterie
