#include "layer/latent.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "layer/values.h"
#include "runtime/threads.h"

namespace coterie {
namespace {

// What the matrix makes of each head's rows of all sequences, [heads][sequences][*] to [heads][sequences][*].
class Expansion {
 public:
  Expansion(const Kernels& kernels, const LatentAttention& a) : kernels_(kernels), a_(a) {}

  // Of queries, to be multiplied with latents.
  void to_latents(const uint8_t* x, uint8_t* out) const {
    by_heads([&](int64_t head, float* wide, float* found) {
      for (int64_t i = 0; i < a_.sequences * a_.key_dim; i++) wide[i] = value_at(x, a_.dtype, head * a_.sequences * a_.key_dim + i);
      kernels_.plain_sums({a_.key_dim, a_.rank, a_.sequences, a_.dtype, a_.key_weight + head * a_.key_stride, wide, found, a_.rank});
      return a_.rank;
    }, out);
  }

  // Of weighted sums of latents.
  void to_values(const uint8_t* x, uint8_t* out) const {
    if (!a_.value_weight) {
      std::vector<int64_t> first(a_.heads);
      for (int64_t head = 0; head < a_.heads; head++) first[head] = head * (a_.key_dim + a_.value_dim) + a_.key_dim;
      return linear_parts(*a_.packed, kernels_, first, a_.value_dim, a_.sequences, x, out, a_.dtype, a_.integer);
    }
    by_heads([&](int64_t head, float* wide, float* found) {
      const uint8_t* rows = x + head * a_.sequences * a_.rank * element_bytes(a_.dtype);
      kernels_.plain_rows({a_.value_dim, a_.rank, a_.sequences, a_.dtype, a_.value_weight + head * a_.value_stride, rows, found, a_.value_dim}, wide);
      return a_.value_dim;
    }, out);
  }

 private:
  // make(head, scratch, found) gives the columns of what it found.
  template <class Make>
  void by_heads(const Make& make, uint8_t* out) const {
    const int64_t floats = a_.sequences * std::max({a_.key_dim, a_.value_dim, a_.rank});
    std::vector<float> scratch(2 * floats * thread_count());
    parallel(a_.heads, [&](int64_t head, int thread) {
      float* wide = scratch.data() + 2 * floats * thread;
      const int64_t count = a_.sequences * make(head, wide, wide + floats);
      kernels_.store(wide + floats, count, out + head * count * element_bytes(a_.dtype), a_.dtype);
    });
  }

  const Kernels& kernels_;
  const LatentAttention& a_;
};

}  // namespace

void attend_latents(const Kernels& kernels, const LatentAttention& a, void* out) {
  const int64_t size = element_bytes(a.dtype), key_bytes = a.key_dim * size, sum_bytes = a.rank * size, turned_bytes = a.turned_dim * size,
                value_bytes = a.value_dim * size, query_bytes = sum_bytes + turned_bytes, rows = a.sequences * a.heads;
  std::vector<uint8_t> by_head(rows * std::max({key_bytes, sum_bytes, value_bytes})), made(by_head.size()), queries(rows * query_bytes), sums(rows * sum_bytes);
  const Expansion expansion(kernels, a);
  // f(row by head, row by sequence, its query)
  const auto each = [&](const auto& f) {
    for (int64_t h = 0; h < a.heads; h++)
      for (int64_t b = 0; b < a.sequences; b++) f(h * a.sequences + b, b * a.heads + h, a.queries.data + b * a.queries.sequence + h * a.queries.head);
  };
  each([&](int64_t of_head, int64_t, const uint8_t* query) { memcpy(by_head.data() + of_head * key_bytes, query, key_bytes); });
  expansion.to_latents(by_head.data(), made.data());
  each([&](int64_t of_head, int64_t of_sequence, const uint8_t* query) {
    uint8_t* to = queries.data() + of_sequence * query_bytes;
    memcpy(to, made.data() + of_head * sum_bytes, sum_bytes);
    memcpy(to + sum_bytes, query + key_bytes, turned_bytes);
  });
  attend(kernels, {a.sequences, 1, a.heads, a.positions, a.rank, a.rank, a.dtype, {queries.data(), a.heads * query_bytes, query_bytes, 0}, a.latents, a.latents,
                   a.mask, a.mask_stride, a.scale, a.sinks, a.turned, a.turned_dim}, sums.data());
  each([&](int64_t of_head, int64_t of_sequence, const uint8_t*) { memcpy(by_head.data() + of_head * sum_bytes, sums.data() + of_sequence * sum_bytes, sum_bytes); });
  expansion.to_values(by_head.data(), made.data());
  each([&](int64_t of_head, int64_t of_sequence, const uint8_t*) {
    memcpy(static_cast<uint8_t*>(out) + of_sequence * value_bytes, made.data() + of_head * value_bytes, value_bytes);
  });
}

}  // namespace coterie
