// Attention of a token, by itself and with the products before and behind it, for torch's tensors as they are. Each gives None for tensors that it does
// not take.
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
#include "runtime/dispatch.h"

namespace nb = nanobind;

namespace coterie {
namespace {

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
              nullptr, 0, scale, nullptr, {}, 0};
  Mask read;
  if (!read.of(mask, n[0], 1, n[2])) return nb::none();
  a.mask = read.data;
  a.mask_stride = read.sequence;
  std::optional<std::vector<float>> sink;
  if (!sinks.is_none()) {
    sink = borrow_floats(sinks, q->shape[1]);
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

// queries [B,Q,T,D], keys [B,G,S,D], values [B,G,S,V], bf16, Q one of G, T > 1, D and V multiples of 16; mask [B or 1,1,T,S]; or None, which is causal, of
// as many positions as tokens. Sinks [Q] or None. To [B,T,Q,V].
nb::object attend_to_prompt(nb::handle queries, nb::handle keys, nb::handle values, nb::handle mask, float scale, nb::handle sinks) {
  const auto q = borrow_heads(queries), k = borrow_heads(keys), v = borrow_heads(values);
  if (!q || !k || !v) return nb::none();
  const auto *n = k->shape;
  const int64_t tokens = q->shape[2], positions = n[2];
  const bool fit = q->element == Element::bf16 && k->element == Element::bf16 && v->element == Element::bf16 && q->shape[0] == n[0] && v->shape[0] == n[0] &&
                   v->shape[1] == n[1] && v->shape[2] == positions && tokens > 1 && q->shape[3] == n[3] && n[3] % 16 == 0 && v->shape[3] % 16 == 0 &&
                   q->shape[1] % n[1] == 0;
  if (!fit) return nb::none();
  PromptAttention a{n[0], n[1], q->shape[1] / n[1], tokens, positions, n[3], v->shape[3], heads_of(*q), heads_of(*k), heads_of(*v), mask.is_none(),
                    nullptr, 0, 0, scale, nullptr};
  Mask read;
  if (!read.of(mask, n[0], tokens, positions) || (mask.is_none() && tokens != positions)) return nb::none();
  a.mask = read.data;
  a.mask_sequence = read.sequence;
  a.mask_token = read.token;
  std::optional<std::vector<float>> sink;
  if (!sinks.is_none()) {
    if (!(sink = borrow_floats(sinks, q->shape[1]))) return nb::none();
    a.sinks = sink->data();
  }
  auto made = new_tensor(Element::bf16, {n[0], tokens, q->shape[1], a.value_dim});
  if (!made) return nb::none();
  {
    nb::gil_scoped_release released;
    attend_prompt(kernels(), a, made->second);
  }
  return made->first;
}

// A layer's attention while a model decodes (see StepWeights). Norms by their options.
class AttentionStep {
 public:
  AttentionStep(nb::object queries, nb::object keys, nb::object values, nb::object output, NormTuple norm, NormTuple query_norm, NormTuple key_norm, bool whole, int64_t key_dim,
                int64_t value_dim, float scale, bool halved, bool gated)
      : owners_{std::move(queries), std::move(keys), std::move(values), std::move(output)},
        norm_(norm),
        query_norm_(query_norm),
        key_norm_(key_norm),
        whole_(whole),
        key_dim_(key_dim),
        value_dim_(value_dim),
        scale_(scale),
        halved_(halved),
        gated_(gated) {}

  // x [B,1,H], the norms' weights or None, cos and sin [B or 1,1,turned], or half of that, a cache [B,G,room,D] and [B,G,room,V] whose first `cached` positions are in use,
  // mask [B or 1,1,1,cached + 1] or None, sinks [Q] or None. To [B,1,outputs]; the cache's next position is written.
  nb::object operator()(nb::handle x, nb::handle weight, nb::handle query_weight, nb::handle key_weight, nb::handle cos, nb::handle sin, nb::handle keys, nb::handle values,
                        int64_t cached, nb::handle mask, nb::handle sinks, bool integer, bool output_integer) {
    StepWeights w{{}, &layer(0), &layer(1), &layer(2), &layer(3), {}, {}, whole_, gated_, integer, output_integer};
    const auto rows = borrow_rows(x), c = borrow_rows(cos), s = borrow_rows(sin);
    const auto k = borrow_heads(keys), v = borrow_heads(values);
    if (!rows || !c || !s || !k || !v || !is_float(rows->element) || key_dim_ % kPanelRows || value_dim_ % kPanelRows || !k->shape[1]) return nb::none();
    const Element element = rows->element;
    const auto *n = k->shape;
    const int64_t sequences = rows->rows, kv_heads = n[1], room = n[2];
    const int64_t turned = c->cols * (halved_ ? 2 : 1);
    const auto angles = [&](const BorrowedRows& r) { return r.element == element && (r.rows == sequences || r.rows == 1) && r.cols == c->cols; };
    const bool fit = rows->cols == w.queries->layout.cols && angles(*c) && angles(*s) && c->rows == s->rows && turned <= key_dim_ && turned % 2 == 0 &&
                     k->element == element && v->element == element && n[0] == sequences && v->shape[0] == sequences && v->shape[1] == kv_heads &&
                     v->shape[2] == room && cached >= 0 && cached < room && n[3] == key_dim_ && v->shape[3] == value_dim_ &&
                     w.keys->layout.rows == kv_heads * key_dim_ && w.values->layout.rows == kv_heads * value_dim_;
    if (!fit) return nb::none();
    const int64_t columns = key_dim_ * (gated_ ? 2 : 1), heads = w.queries->layout.rows / columns;
    if (w.queries->layout.rows != heads * columns || heads % kv_heads || w.output->layout.cols != heads * value_dim_) return nb::none();
    if (gated_ && (key_dim_ != value_dim_ || whole_)) return nb::none();
    const bool normed = norm_of(norm_, weight, rows->cols, w.norm) && norm_of(query_norm_, query_weight, (whole_ ? heads : 1) * key_dim_, w.query_norm) &&
                        norm_of(key_norm_, key_weight, (whole_ ? kv_heads : 1) * key_dim_, w.key_norm);
    if (!normed || (norm_ && w.output->layout.rows != rows->cols)) return nb::none();
    Mask read;
    if (!read.of(mask, sequences, 1, cached + 1)) return nb::none();
    std::optional<std::vector<float>> sink;
    if (!sinks.is_none() && !(sink = borrow_floats(sinks, heads))) return nb::none();
    auto made = new_tensor(element, {sequences, 1, w.output->layout.rows});
    if (!made) return nb::none();
    const int64_t size = element == Element::f32 ? 4 : 2;
    const auto dtype = static_cast<DType>(element);
    const Step step{sequences, kv_heads, heads / kv_heads, key_dim_, value_dim_, dtype, {rows->data, dtype, rows->cols}, c->data, s->data, turned,
                    halved_ ? 0 : turned / 2, c->rows == 1 ? 0 : c->cols * size, cache_of(*k), cache_of(*v), cached, read.data, read.sequence, scale_, sink ? sink->data() : nullptr};
    {
      nb::gil_scoped_release released;
      attending_ += attention_step(kernels(), w, step, made->second);
    }
    return made->first;
  }

  // Seconds that attention itself has taken in all calls.
  double attending() const { return attending_; }

 private:
  const Linear& layer(int i) const { return nb::cast<const PackedLinear&>(owners_[i]).layer(); }

  nb::object owners_[4];
  NormTuple norm_, query_norm_, key_norm_;
  bool whole_;
  int64_t key_dim_, value_dim_;
  float scale_;
  bool halved_, gated_;
  double attending_ = 0;
};

}  // namespace

void bind_attention(nb::module_& m) {
  m.def("attend", &attend_to, nb::arg("queries"), nb::arg("keys"), nb::arg("values"), nb::arg("mask").none(), nb::arg("scale"),
        nb::arg("sinks") = nb::none());
  m.def("attend_prompt", &attend_to_prompt, nb::arg("queries"), nb::arg("keys"), nb::arg("values"), nb::arg("mask").none(), nb::arg("scale"),
        nb::arg("sinks") = nb::none());
  nb::class_<AttentionStep>(m, "AttentionStep")
      .def(nb::init<nb::object, nb::object, nb::object, nb::object, NormTuple, NormTuple, NormTuple, bool, int64_t, int64_t, float, bool, bool>())
      .def_prop_ro("attending", &AttentionStep::attending)
      .def("__call__", &AttentionStep::operator(), nb::arg("x"), nb::arg("weight").none(), nb::arg("query_weight").none(), nb::arg("key_weight").none(), nb::arg("cos"), nb::arg("sin"),
           nb::arg("keys"), nb::arg("values"), nb::arg("cached"), nb::arg("mask").none(), nb::arg("sinks").none(), nb::arg("integer"),
           nb::arg("output_integer"));
}

}  // namespace coterie
