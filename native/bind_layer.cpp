// The class coterie._native.Layer: the packed experts of one layer, which it keeps alive, and what is computed with them.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include <array>
#include <cstring>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind.h"
#include "bind_linear.h"
#include "bind_router.h"
#include "bind_stream_call.h"
#include "bind_tickets.h"
#include "formats/bfloat16.h"
#include "layer/backward.h"
#include "layer/step.h"
#include "layer/workspace.h"
#include "runtime/dispatch.h"
#include "tensors.h"

namespace nb = nanobind;

namespace coterie {
namespace {

// a, b, types of a and b, rank, scaling, gradients of a and b
using FactorTuple = std::tuple<uintptr_t, uintptr_t, int, int, int64_t, float, uintptr_t, uintptr_t>;

LoraFactor factor_of(const FactorTuple& t) {
  return {at<void>(std::get<0>(t)), at<void>(std::get<1>(t)), static_cast<DType>(std::get<2>(t)), static_cast<DType>(std::get<3>(t)),
          std::get<4>(t),           std::get<5>(t),           at<void>(std::get<6>(t)),           at<void>(std::get<7>(t))};
}

using LoraTuple = std::tuple<FactorTuple, FactorTuple, FactorTuple, bool>;  // gate, up, down, shared A

Lora lora_of(const LoraTuple& t) { return {factor_of(std::get<0>(t)), factor_of(std::get<1>(t)), factor_of(std::get<2>(t)), std::get<3>(t)}; }

// tokens, top_k, x, its type and stride, ids, weights, out, its type, whether with int8 activations
using BatchTuple = std::tuple<int64_t, int64_t, uintptr_t, int, int64_t, uintptr_t, uintptr_t, uintptr_t, int, bool>;

Batch batch_of(const BatchTuple& t) {
  const auto [tokens, top_k, x, x_dtype, x_stride, ids, weights, out, out_dtype, integer] = t;
  return {tokens,          top_k,          at<void>(x), static_cast<DType>(x_dtype),    x_stride,
          at<int64_t>(ids), at<float>(weights), at<void>(out), static_cast<DType>(out_dtype), integer};
}

// A shared expert's matrices, activation, whether with int8 activations, and its score's weight [H] or None
using SharedTuple = std::tuple<nb::handle, nb::handle, nb::handle, std::tuple<int, float, float, float>, bool, nb::handle>;

// Nothing where it is no such expert, of so many columns.
std::optional<SharedExpert> shared_of(const SharedTuple& t, int64_t hidden, Element element) {
  const auto [gate, up, down, activation, integer, score] = t;
  const auto matrix = [](nb::handle h) -> const PackedLinear& { return nb::cast<const PackedLinear&>(h); };
  auto layer = gated_of(matrix(gate), matrix(up), matrix(down), activation);
  if (!layer || layer->hidden != hidden) return std::nullopt;
  if (score.is_none()) return SharedExpert{std::move(*layer), integer, nullptr};
  const auto weight = borrow_rows(score);
  if (!weight || weight->element != element || weight->rows != 1 || weight->cols != hidden) return std::nullopt;
  return SharedExpert{std::move(*layer), integer, weight->data};
}

// Projections are numbered gate, up, down.
class Layer {
 public:
  Layer(int64_t number, const LayoutTuple& in, const LayoutTuple& out, std::tuple<int, float, float, float> activation, int64_t count, bool has_gate)
      : number_(number), missing_(count), weights_(count) {
    layer_.in = layout_from(in);
    layer_.out = layout_from(out);
    layer_.count = count;
    layer_.hidden = layer_.in.cols;
    layer_.intermediate = layer_.in.rows;
    layer_.has_gate = has_gate;
    layer_.activation = {static_cast<ActivationKind>(std::get<0>(activation)), std::get<1>(activation), std::get<2>(activation),
                         std::get<3>(activation)};
    for (auto* matrices : {&layer_.gate, &layer_.up, &layer_.down}) matrices->assign(count, nullptr);
  }

  // The packed matrices of one expert, back to back at an address, where `owner` keeps them.
  void set_expert(int64_t expert, uintptr_t address, nb::object owner) {
    if (expert < 0 || expert >= layer_.count) throw nb::index_error("no such expert");
    missing_ -= layer_.up[expert] ? 0 : 1;
    const uint8_t* matrix = at<uint8_t>(address);
    if (layer_.has_gate) layer_.gate[expert] = std::exchange(matrix, matrix + layer_.in.bytes());
    layer_.up[expert] = std::exchange(matrix, matrix + layer_.in.bytes());
    layer_.down[expert] = matrix;
    weights_[expert] = std::move(owner);
  }

  // Float32 [experts][rows, padded to panels] at an address, which `owner` keeps there; 0 and None for no bias. Waits for what is being computed.
  void set_bias(int projection, uintptr_t address, nb::object owner) {
    if (projection < 0 || projection > 2) throw nb::index_error("no such projection");
    {
      nb::gil_scoped_release released;
      std::lock_guard<std::mutex> lock(workspace().turn);
      (projection == 0 ? layer_.gate_bias : projection == 1 ? layer_.up_bias : layer_.down_bias) = at<float>(address);
    }
    biases_[projection] = std::move(owner);
  }

  // The output for plain tensors that the kernels take as they are: x bf16 or f32, ids i64, weights f32 or bf16, of fitting shapes; None for any other.
  nb::object compute(nb::handle x, nb::handle ids, nb::handle weights, bool integer) const {
    const auto rows = borrow(x), chosen = borrow(ids), weighting = borrow(weights);
    if (!rows || !chosen || !weighting) return nb::none();
    if (rows->element != Element::bf16 && rows->element != Element::f32) return nb::none();
    if (chosen->element != Element::i64 || !chosen->contiguous() || !weighting->contiguous()) return nb::none();
    if (weighting->element != Element::f32 && weighting->element != Element::bf16) return nb::none();
    const int64_t tokens = rows->rows, top_k = chosen->cols;
    if (rows->cols != layer_.hidden || chosen->rows != tokens || weighting->rows != tokens || weighting->cols != top_k || top_k > layer_.count)
      return nb::none();
    auto made = new_tensor(rows->element, {tokens, layer_.hidden});
    if (!made) return nb::none();
    const auto dtype = static_cast<DType>(rows->element);
    auto* routing = static_cast<float*>(weighting->data);
    std::vector<float> widened;
    if (weighting->element == Element::bf16) {
      const auto* from = static_cast<const uint16_t*>(weighting->data);
      widened.resize(tokens * top_k);
      std::transform(from, from + tokens * top_k, widened.begin(), bf16_to_float);
      routing = widened.data();
    }
    run({tokens, top_k, rows->data, dtype, rows->row_stride, static_cast<int64_t*>(chosen->data), routing, made->second, dtype, integer}, nullptr);
    return made->first;
  }

  // x [..., H] after norm, router and experts, and x itself (see ExpertsStep), for tensors that the kernels take as they are; None for any other. `norm`: as
  // `rms_norm` takes it, router [E,H] of the type of x; scores: None, or see ScoresTuple; shared: None, or a shared expert: its matrices, activation, integer, and score [H] or None.
  nb::object step(nb::handle x, nb::handle norm_weight, std::tuple<float, bool, bool> norm, nb::handle router, nb::handle router_bias, int64_t top_k,
                  bool normalised, bool rounded_weights, bool integer, const std::optional<SharedTuple>& shared,
                  const std::optional<ScoresTuple>& scores) const {
    const auto rows = borrow_rows(x), w = borrow_rows(norm_weight), r = borrow_rows(router);
    const bool fit = rows && w && r && is_float(rows->element) && is_float(w->element) && r->element == rows->element && rows->cols == layer_.hidden &&
                     w->rows == 1 && w->cols == layer_.hidden && r->shape.size() == 2 && r->rows == layer_.count && r->cols == layer_.hidden &&
                     layer_.hidden % 16 == 0 && top_k >= 1 && top_k <= layer_.count;
    if (!fit) return nb::none();
    std::optional<std::vector<float>> bias;
    if (!router_bias.is_none() && !(bias = borrow_floats(router_bias, layer_.count))) return nb::none();
    Router chooser{r->data, bias ? bias->data() : nullptr, layer_.count, layer_.hidden, top_k, normalised};
    std::vector<float> correction;
    if (scores && !scored(*scores, correction, chooser)) return nb::none();
    std::optional<SharedExpert> beside;
    if (shared && !(beside = shared_of(*shared, layer_.hidden, rows->element))) return nb::none();
    check_complete();
    auto made = new_tensor(rows->element, rows->shape);
    if (!made) return nb::none();
    const auto [epsilon, rounded, from_one] = norm;
    const ExpertsStep step{{w->data, static_cast<DType>(w->element), epsilon, rounded, from_one},
                           chooser, rounded_weights, integer, beside ? &*beside : nullptr};
    {
      nb::gil_scoped_release released;
      experts_step(kernels(), layer_, step, rows->data, static_cast<DType>(rows->element), rows->rows, made->second);
    }
    return made->first;
  }

  // Returns when it is done, or, where `owners` of all that it reads and writes are given, at once with a ticket.
  OwningTicket* forward(const BatchTuple& given, const std::optional<LoraTuple>& lora, uintptr_t gate, uintptr_t up, nb::object owners) const {
    const Batch batch = batch_of(given);
    std::optional<Training> training;
    if (lora) training = Training{lora_of(*lora), at<uint16_t>(gate), at<uint16_t>(up)};
    if (owners.is_none()) {
      run(batch, training ? &*training : nullptr);
      return nullptr;
    }
    check_complete();
    check_ids(batch);
    auto work = [this, &kernels = kernels(), batch, training] { coterie::forward(layer_, kernels, batch, training ? &*training : nullptr); };
    return new OwningTicket(std::move(work), nb::make_tuple(nb::find(this), owners));
  }

  // The same by a device's stream, which writes the inputs before; where it fails, the output is NaN.
  StreamCall* on_stream(const BatchTuple& given, const std::optional<LoraTuple>& lora, nb::object owners) const {
    check_complete();
    const Batch batch = batch_of(given);
    std::optional<Training> training;
    if (lora) training = Training{lora_of(*lora), nullptr, nullptr};
    auto work = [this, &kernels = kernels(), batch, training] {
      try {
        check_ids(batch);
        coterie::forward(layer_, kernels, batch, training ? &*training : nullptr);
      } catch (...) {
        std::memset(batch.out, 0xff, batch.tokens * layer_.hidden * (batch.out_dtype == DType::f32 ? sizeof(float) : sizeof(uint16_t)));
        throw;
      }
    };
    return new StreamCall(std::move(work), nb::make_tuple(nb::find(this), owners));
  }

  void backward(int64_t tokens, int64_t top_k, uintptr_t x, int x_dtype, uintptr_t grad_out, int grad_out_dtype, uintptr_t ids, uintptr_t weights,
                uintptr_t gate, uintptr_t up, uintptr_t grad_x, int grad_x_dtype, uintptr_t grad_weights, const LoraTuple& lora) const {
    const BackwardBatch batch{tokens,          top_k,           at<void>(x),      at<void>(grad_out),
                              static_cast<DType>(x_dtype),      static_cast<DType>(grad_out_dtype),
                              at<int64_t>(ids), at<float>(weights), at<void>(grad_x), static_cast<DType>(grad_x_dtype), at<float>(grad_weights)};
    check_complete();
    check_ids(batch);
    const Training training{lora_of(lora), at<uint16_t>(gate), at<uint16_t>(up)};
    nb::gil_scoped_release released;
    coterie::backward(layer_, kernels(), batch, training);
  }

  // A tensor [1] over the layer's number: whatever shares its storage keeps the layer alive.
  static nb::ndarray<nb::pytorch, int64_t, nb::ndim<1>> handle(nb::handle_t<Layer> self) {
    return nb::ndarray<nb::pytorch, int64_t, nb::ndim<1>>(&nb::cast<Layer&>(self).number_, {1}, self);
  }

 private:
  void run(const Batch& batch, const Training* training) const {
    check_complete();
    check_ids(batch);
    nb::gil_scoped_release released;
    coterie::forward(layer_, kernels(), batch, training);
  }

  void check_complete() const {
    if (missing_) throw nb::value_error("these experts do not have all their weights yet");
  }

  // Of a Batch or a BackwardBatch. Needs no GIL.
  void check_ids(const auto& batch) const {
    for (int64_t i = 0; i < batch.tokens * batch.top_k; i++)
      if (batch.ids[i] < -1 || batch.ids[i] >= layer_.count)
        throw std::invalid_argument("expert id " + std::to_string(batch.ids[i]) + " of token " + std::to_string(i / batch.top_k) +
                                    " is out of range: expected -1 or 0.." + std::to_string(layer_.count - 1));
  }

  int64_t number_;
  int64_t missing_;  // experts that are not set
  Experts layer_{};
  std::vector<nb::object> weights_;
  std::array<nb::object, 3> biases_;
};

}  // namespace

void bind_layer(nb::module_& m) {
  nb::class_<Layer>(m, "Layer")
      .def(nb::init<int64_t, const LayoutTuple&, const LayoutTuple&, std::tuple<int, float, float, float>, int64_t, bool>())
      .def("set_expert", &Layer::set_expert)
      .def("set_bias", &Layer::set_bias, nb::arg(), nb::arg(), nb::arg().none())
      .def("handle", &Layer::handle)
      .def("compute", &Layer::compute)
      .def("step", &Layer::step, nb::arg("x"), nb::arg("norm_weight"), nb::arg("norm"), nb::arg("router"), nb::arg("router_bias").none(), nb::arg("top_k"),
           nb::arg("normalised"), nb::arg("rounded_weights"), nb::arg("integer"), nb::arg("shared") = nb::none(),
           nb::arg("scores") = nb::none())
      .def("forward", &Layer::forward, nb::arg("batch"), nb::arg("lora").none(), nb::arg("gate"), nb::arg("up"), nb::arg("owners").none())
      .def("on_stream", &Layer::on_stream, nb::arg("batch"), nb::arg("lora").none(), nb::arg("owners"))
      .def("backward", &Layer::backward);
}

}  // namespace coterie
