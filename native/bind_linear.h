// The class coterie._native.Linear: one packed matrix, which it keeps alive, and what is computed with it.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <optional>
#include <tuple>
#include <utility>

#include "bind.h"
#include "layer/linear.h"
#include "runtime/dispatch.h"
#include "tensors.h"

namespace coterie {

namespace nb = nanobind;

class PackedLinear {
 public:
  // `matrix` and `bias` (float32, padded to panels; 0 for none) are addresses where `owners` keep what is read.
  PackedLinear(int64_t number, const LayoutTuple& layout, uintptr_t matrix, uintptr_t bias, nb::object owners)
      : number_(number), layer_{layout_from(layout), at<uint8_t>(matrix), at<float>(bias)}, owners_(std::move(owners)) {}

  // The output for a plain matrix that the kernels take as it is, bf16 or f32; None for any other.
  nb::object compute(nb::handle x, bool integer) const {
    const auto rows = borrow(x);
    if (!rows || (rows->element != Element::bf16 && rows->element != Element::f32) || rows->cols != layer_.layout.cols) return nb::none();
    auto made = new_tensor(rows->element, {rows->rows, layer_.layout.rows});
    if (!made) return nb::none();
    const auto dtype = static_cast<DType>(rows->element);
    run(rows->rows, {rows->data, dtype, rows->row_stride}, made->second, dtype, integer);
    return made->first;
  }

  void forward(int64_t rows, uintptr_t x, int x_dtype, int64_t x_stride, uintptr_t out, int out_dtype, bool integer) const {
    run(rows, {at<void>(x), static_cast<DType>(x_dtype), x_stride}, at<void>(out), static_cast<DType>(out_dtype), integer);
  }

  void backward(int64_t rows, uintptr_t grad_out, int grad_out_dtype, int64_t stride, uintptr_t grad_x, int grad_x_dtype) const {
    nb::gil_scoped_release released;
    linear_backward(layer_, kernels(), rows, {at<void>(grad_out), static_cast<DType>(grad_out_dtype), stride}, at<void>(grad_x),
                    static_cast<DType>(grad_x_dtype));
  }

  // A tensor [1] over the number: whatever shares its storage keeps the matrix alive.
  static nb::ndarray<nb::pytorch, int64_t, nb::ndim<1>> handle(nb::handle_t<PackedLinear> self) {
    return nb::ndarray<nb::pytorch, int64_t, nb::ndim<1>>(&nb::cast<PackedLinear&>(self).number_, {1}, self);
  }

  const Linear& layer() const { return layer_; }

 private:
  void run(int64_t rows, const Strided& x, void* out, DType out_dtype, bool integer) const {
    nb::gil_scoped_release released;
    linear(layer_, kernels(), rows, x, out, out_dtype, integer);
  }

  int64_t number_;
  Linear layer_;
  nb::object owners_;
};

// One expert of three matrices, down(act(gate x) * (up x)); nothing for matrices that are not such an expert's.
std::optional<Experts> gated_of(const PackedLinear& gate, const PackedLinear& up, const PackedLinear& down, const std::tuple<int, float, float, float>& activation);

}  // namespace coterie
