// Torch tensors seen from C++ without torch's headers, through the exchange table of DLPack 1.1 and later that torch.Tensor offers.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdint>
#include <optional>

namespace coterie {

enum class Element : int { other = -1, bf16 = 0, f32 = 1, f16 = 2, i64 = 3 };

// A matrix in CPU memory, as it is, borrowed for as long as the object lives.
struct BorrowedMatrix {
  void* data;
  Element element;
  int64_t rows, cols, row_stride;  // columns adjacent

  bool contiguous() const { return row_stride == cols || rows <= 1; }
};

// Nothing for whatever is not a plain torch.Tensor of two dimensions, with adjacent columns, on the CPU.
std::optional<BorrowedMatrix> borrow(nanobind::handle tensor);

// A new torch.Tensor [rows, cols] of bf16 or f32, and where its values are; nothing where torch has no such table.
std::optional<std::pair<nanobind::object, void*>> new_matrix(Element element, int64_t rows, int64_t cols);

}  // namespace coterie
