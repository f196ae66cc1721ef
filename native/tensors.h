// Torch tensors seen from C++ without torch's headers, through the exchange table of DLPack 1.1 and later that torch.Tensor offers.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace coterie {

enum class Element : int { other = -1, bf16 = 0, f32 = 1, f16 = 2, i64 = 3, boolean = 4 };

// A matrix in CPU memory, as it is, borrowed for as long as the object lives.
struct BorrowedMatrix {
  void* data;
  Element element;
  int64_t rows, cols, row_stride;  // columns adjacent

  bool contiguous() const { return row_stride == cols || rows <= 1; }
};

// The same with four dimensions; strides in elements.
struct BorrowedHeads {
  uint8_t* data;
  Element element;
  int64_t shape[4], stride[4];
};

// Nothing for whatever is not a plain torch.Tensor of four dimensions, with adjacent elements in the last, on the CPU.
std::optional<BorrowedHeads> borrow_heads(nanobind::handle tensor);

// Nothing for whatever is not a plain torch.Tensor of two dimensions, with adjacent columns, on the CPU.
std::optional<BorrowedMatrix> borrow(nanobind::handle tensor);

// Rows of adjacent elements that lie one behind the other: any number of dimensions.
struct BorrowedRows {
  uint8_t* data;
  Element element;
  int64_t rows, cols;
  std::vector<int64_t> shape;
};

// Nothing for whatever is not a plain, contiguous torch.Tensor, or torch's parameter, on the CPU.
std::optional<BorrowedRows> borrow_rows(nanobind::handle tensor);

inline bool is_float(Element e) { return e == Element::bf16 || e == Element::f32; }

// A row of bf16 or f32 as floats; nothing for any other.
std::optional<std::vector<float>> borrow_floats(nanobind::handle row, int64_t count);

// A new torch.Tensor of bf16, f32 or i64, and where its values are; nothing where torch has no such table.
std::optional<std::pair<nanobind::object, void*>> new_tensor(Element element, std::vector<int64_t> shape);

}  // namespace coterie
