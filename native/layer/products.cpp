#include "layer/products.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "layer/shares.h"
#include "layer/values.h"
#include "runtime/threads.h"

namespace coterie {

Product gate_up_of(const Experts& layer, int64_t expert) {
  Product product{};
  product.layout = &layer.in;
  product.expert = expert;
  product.matrix[0] = layer.has_gate ? layer.gate[expert] : layer.up[expert];
  product.matrix[1] = layer.has_gate ? layer.up[expert] : nullptr;
  return product;
}

Product down_of(const Experts& layer, int64_t expert) {
  Product product{};
  product.layout = &layer.out;
  product.expert = expert;
  product.matrix[0] = layer.down[expert];
  return product;
}

void multiply_each(const Kernels& kernels, const std::vector<Product>& products, uint8_t* scratch, int64_t scratch_bytes) {
  const int64_t count = static_cast<int64_t>(products.size());
  if (!count) return;
  const Shares shares(count, products[0].blocks());
  parallel(shares.first_items(), [&](int64_t item, int thread) {
    const Share share = shares[item], next = shares.after(item);
    const Product& product = products[share.product];
    const uint8_t* then = products[next.product].matrix[0] + product.layout->block_start(next.begin);
    kernels.multiply(product, share.begin, share.end, then, scratch + thread * scratch_bytes);
  });
}

void multiply_sums(const Kernels& kernels, const std::vector<Sum>& sums, Buffer& memory, uint8_t* scratch, int64_t scratch_bytes) {
  std::vector<Shares> lists;
  int64_t tokens = 0;
  for (const Sum& sum : sums) {
    lists.emplace_back(1, round_up(sum.target.hidden, kBlockRows) / kBlockRows);
    tokens = std::max(tokens, sum.target.tokens);
  }
  const JoinedShares shares(std::move(lists));
  const int64_t sum_bytes = round_up(tokens * shares.widest() * kBlockRows * 4, 4096);
  uint8_t* parts = memory.at_least(sum_bytes * thread_count());
  parallel(shares.first_items(), [&](int64_t item, int thread) {
    const auto [list, share] = shares[item];
    const auto& [products, count, target] = sums[list];
    const int64_t begin = share.begin, end = share.end, width = (end - begin) * kBlockRows;
    const int64_t first = begin * kBlockRows, there = std::min(width, target.hidden - first);
    auto* part = reinterpret_cast<float*>(parts + thread * sum_bytes);
    memset(part, 0, target.tokens * width * 4);
    for (int64_t i = 0; i < count; i++) {
      Product product = products[i];
      product.summed = {part, width, begin};
      const uint8_t* next = products[std::min(i + 1, count - 1)].matrix[0] + product.layout->block_start(begin);
      kernels.multiply(product, begin, end, next, scratch + thread * scratch_bytes);
    }
    const int64_t size = element_bytes(target.dtype);
    for (int64_t t = 0; t < target.tokens; t++)
      kernels.store(part + t * width, there, static_cast<uint8_t*>(target.out) + (t * target.hidden + first) * size, target.dtype);
  });
}

}  // namespace coterie
