// Lists of products, shared out over the threads.
#pragma once
#include <vector>

#include "layer/workspace.h"

namespace coterie {

// Gate and up of an expert, or up alone; and down. Input, tokens and epilogue are left open.
Product gate_up_of(const Experts& layer, int64_t expert);
Product down_of(const Experts& layer, int64_t expert);

// Products whose results do not meet: each has rows, or columns, of its own.
void multiply_each(const Kernels& kernels, const std::vector<Product>& products, uint8_t* scratch, int64_t scratch_bytes);

// Rows [tokens, hidden] that the sums of all products go to.
struct Target {
  int64_t tokens, hidden;
  void* out;
  DType dtype;
};

// Products that add to the same rows, in this order: the same bits for any number of threads.
struct Sum {
  const Product* products;
  int64_t count;
  Target target;
};

void multiply_sums(const Kernels& kernels, const std::vector<Sum>& sums, Buffer& memory, uint8_t* scratch, int64_t scratch_bytes);

}  // namespace coterie
