#include "layer/products.h"

#include <algorithm>
#include <cstring>

#include "runtime/threads.h"

namespace coterie {

void multiply_each(const Kernels& kernels, const std::vector<Product>& products, uint8_t* scratch, int64_t scratch_bytes) {
  const int64_t count = static_cast<int64_t>(products.size());
  if (!count) return;
  const int64_t threads = thread_count(), blocks = products[0].blocks();
  const int64_t parts = std::clamp<int64_t>((threads * kItemsPerThread + count - 1) / count, 1, blocks);
  auto first_block = [&](int64_t item) { return blocks * (item % parts) / parts; };
  parallel(count * parts, [&](int64_t item, int thread) {
    const Product& product = products[item / parts];
    const int64_t part = item % parts, next = std::min(item + threads, count * parts - 1);
    const uint8_t* then = products[next / parts].matrix[0] + product.layout->block_start(first_block(next));
    kernels.multiply(product, first_block(item), blocks * (part + 1) / parts, then, scratch + thread * scratch_bytes);
  });
}

void multiply_sum(const Kernels& kernels, const std::vector<Product>& products, const Target& target, Buffer& sums, uint8_t* scratch, int64_t scratch_bytes) {
  const int64_t threads = thread_count(), blocks = round_up(target.hidden, kBlockRows) / kBlockRows, items = std::min<int64_t>(blocks, threads * kItemsPerThread);
  const int64_t widest = (blocks + items - 1) / items * kBlockRows, sum_bytes = round_up(target.tokens * widest * 4, 4096);
  uint8_t* memory = sums.at_least(sum_bytes * threads);
  parallel(items, [&](int64_t item, int thread) {
    const int64_t begin = blocks * item / items, end = blocks * (item + 1) / items, width = (end - begin) * kBlockRows;
    const int64_t first = begin * kBlockRows, there = std::min(width, target.hidden - first);
    auto* sum = reinterpret_cast<float*>(memory + thread * sum_bytes);
    memset(sum, 0, target.tokens * width * 4);
    for (size_t i = 0; i < products.size(); i++) {
      Product product = products[i];
      product.summed = {sum, width, begin};
      const uint8_t* next = products[std::min(i + 1, products.size() - 1)].matrix[0] + product.layout->block_start(begin);
      kernels.multiply(product, begin, end, next, scratch + thread * scratch_bytes);
    }
    const int64_t size = target.dtype == DType::f32 ? 4 : 2;
    for (int64_t t = 0; t < target.tokens; t++)
      kernels.store(sum + t * width, there, static_cast<uint8_t*>(target.out) + (t * target.hidden + first) * size, target.dtype);
  });
}

}  // namespace coterie
