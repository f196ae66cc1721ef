#include "layer/latent.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "layer/values.h"
#include "runtime/threads.h"

namespace coterie {

void attend_latents(const Kernels& kernels, const LatentAttention& a, void* out) {
  const int64_t size = element_bytes(a.dtype), turned_bytes = a.turned_dim * size, query_bytes = a.rank * size + turned_bytes, sum_bytes = a.rank * size,
                value_bytes = a.value_dim * size, rows = a.sequences * a.heads;
  std::vector<uint8_t> queries(rows * query_bytes), sums(rows * sum_bytes);
  // A head's rows of all sequences: wide, and what they become.
  const int64_t widest = std::max({a.key_dim, a.value_dim, a.rank}), scratch_floats = 3 * a.sequences * widest;
  std::vector<float> scratch(thread_count() * scratch_floats);
  const auto matrix = [&](int64_t head) { return a.weight + head * (a.key_dim + a.value_dim) * sum_bytes; };
  parallel(a.heads, [&](int64_t head, int thread) {
    float *wide = scratch.data() + thread * scratch_floats, *found = wide + a.sequences * widest;
    const auto query_of = [&](int64_t b) { return a.queries.data + b * a.queries.sequence + head * a.queries.head; };
    for (int64_t b = 0; b < a.sequences; b++)
      for (int64_t i = 0; i < a.key_dim; i++) wide[b * a.key_dim + i] = value_at(query_of(b), a.dtype, i);
    kernels.plain_sums({a.key_dim, a.rank, a.sequences, a.dtype, matrix(head), wide, found, a.rank});
    for (int64_t b = 0; b < a.sequences; b++) {
      uint8_t* to = queries.data() + (b * a.heads + head) * query_bytes;
      kernels.store(found + b * a.rank, a.rank, to, a.dtype);
      memcpy(to + sum_bytes, query_of(b) + a.key_dim * size, turned_bytes);
    }
  });
  attend(kernels, {a.sequences, 1, a.heads, a.positions, a.rank, a.rank, a.dtype, {queries.data(), a.heads * query_bytes, query_bytes, 0}, a.latents, a.latents,
                   a.mask, a.mask_stride, a.scale, a.sinks, a.turned, a.turned_dim}, sums.data());
  parallel(a.heads, [&](int64_t head, int thread) {
    float *found = scratch.data() + thread * scratch_floats, *wide = found + a.sequences * widest;
    auto* tokens = reinterpret_cast<uint8_t*>(wide + a.sequences * widest);
    for (int64_t b = 0; b < a.sequences; b++) memcpy(tokens + b * sum_bytes, sums.data() + (b * a.heads + head) * sum_bytes, sum_bytes);
    kernels.plain_rows({a.value_dim, a.rank, a.sequences, a.dtype, matrix(head) + a.key_dim * sum_bytes, tokens, found, a.value_dim}, wide);
    for (int64_t b = 0; b < a.sequences; b++)
      kernels.store(found + b * a.value_dim, a.value_dim, static_cast<uint8_t*>(out) + (b * a.heads + head) * value_bytes, a.dtype);
  });
}

}  // namespace coterie
