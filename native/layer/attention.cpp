#include "layer/attention.h"

#include <algorithm>
#include <cmath>
#include <mutex>

#include "layer/values.h"
#include "layer/workspace.h"
#include "runtime/threads.h"

namespace coterie {
namespace {

// Positions of one item of work: with their queries' scores they stay in L2.
constexpr int64_t kPositions = 256;
// Heads of one item where positions alone are too few items: those that read keys together.
constexpr int64_t kHeads = 8;

// The parts of a head's sum, each over its own largest score, as one. `sink`: its score, or null.
void join(const float* largest, const float* total, const float* sums, const float* sink, int64_t parts, int64_t stride, int64_t sum_stride, int64_t width,
          float* to) {
  float most = sink ? *sink : -kNoScore;
  for (int64_t p = 0; p < parts; p++) most = std::max(most, largest[p * stride]);
  float all = sink ? std::exp(*sink - most) : 0.0f;
  std::fill(to, to + width, 0.0f);
  for (int64_t p = 0; p < parts; p++) {
    const float share = std::exp(largest[p * stride] - most);
    all += share * total[p * stride];
    for (int64_t i = 0; i < width; i++) to[i] += share * sums[p * sum_stride + i];
  }
  const float scale = all > 0.0f ? 1.0f / all : 0.0f;
  for (int64_t i = 0; i < width; i++) to[i] *= scale;
}

}  // namespace

void attend(const Kernels& kernels, const Attention& a, void* out) {
  Workspace& w = workspace();
  std::lock_guard<std::mutex> lock(w.turn);
  const int64_t parts = (a.positions + kPositions - 1) / kPositions, pairs = a.sequences * a.kv_heads, heads = pairs * a.group;
  // By part: the sums of all heads, their largest scores, their totals.
  const int64_t part_floats = heads * (a.value_dim + 2);
  auto* partial = reinterpret_cast<float*>(w.result.at_least(parts * part_floats * 4));
  const int64_t scratch_floats = 8 * (a.key_dim + a.more_dim + 2 * kPositions);
  auto* scratch = reinterpret_cast<float*>(w.scratch.at_least(thread_count() * std::max(scratch_floats, a.value_dim) * 4));
  const int64_t taken = pairs * parts < 2 * thread_count() ? std::min(kHeads, a.group) : a.group, groups = (a.group + taken - 1) / taken;
  parallel(pairs * parts * groups, [&](int64_t item, int thread) {
    const int64_t pair = item / groups / parts, part = item / groups % parts, sequence = pair / a.kv_heads, head = pair % a.kv_heads, first = part * kPositions;
    const int64_t query = head * a.group + item % groups * taken;
    float* sums = partial + part * part_floats;
    KeysPart keys{};
    keys.count = std::min(kPositions, a.positions - first);
    keys.heads = std::min(taken, a.group - item % groups * taken);
    keys.key_dim = a.key_dim;
    keys.value_dim = a.value_dim;
    keys.dtype = a.dtype;
    keys.scale = a.scale;
    keys.queries = a.queries.data + sequence * a.queries.sequence + query * a.queries.head;
    keys.query_stride = a.queries.head;
    keys.keys = a.keys.data + sequence * a.keys.sequence + head * a.keys.head + first * a.keys.position;
    keys.key_stride = a.keys.position;
    keys.values = a.values.data + sequence * a.values.sequence + head * a.values.head + first * a.values.position;
    keys.value_stride = a.values.position;
    keys.more_keys = a.more_keys.data + sequence * a.more_keys.sequence + head * a.more_keys.head + first * a.more_keys.position;
    keys.more_stride = a.more_keys.position;
    keys.more_dim = a.more_dim;
    keys.mask = a.mask ? a.mask + sequence * a.mask_stride + first : nullptr;
    const int64_t row = sequence * a.kv_heads * a.group + query;
    keys.sums = sums + row * a.value_dim;
    keys.largest = sums + heads * a.value_dim + row;
    keys.total = keys.largest + heads;
    kernels.attend(keys, scratch + thread * scratch_floats);
  });
  const int64_t row_bytes = a.value_dim * element_bytes(a.dtype);
  for (int64_t h = 0; h < heads; h++) {
    const float* largest = partial + heads * a.value_dim + h;
    join(largest, largest + heads, partial + h * a.value_dim, a.sinks ? a.sinks + h % (a.kv_heads * a.group) : nullptr, parts, part_floats, part_floats, a.value_dim, scratch);
    kernels.store(scratch, a.value_dim, static_cast<uint8_t*>(out) + h * row_bytes, a.dtype);
  }
}

void attend_prompt(const Kernels& kernels, const PromptAttention& a, void* out) {
  Workspace& w = workspace();
  std::lock_guard<std::mutex> lock(w.turn);
  const int64_t pairs = a.sequences * a.kv_heads, tiles = (a.tokens + kQueryRows - 1) / kQueryRows, heads = a.kv_heads * a.group;
  const auto rows_of = [&](const Heads& heads_of, int64_t pair, int64_t dim) {
    return HeadRows{heads_of.data + pair / a.kv_heads * heads_of.sequence + pair % a.kv_heads * heads_of.head, heads_of.position, a.positions, dim};
  };
  const int64_t key_bytes = rows_of(a.keys, 0, a.key_dim).packed_bytes(), value_bytes = rows_of(a.values, 0, a.value_dim).packed_bytes();
  uint8_t* packed = w.result.at_least(pairs * (key_bytes + value_bytes));
  const int64_t key_blocks = (a.positions + kBlockRows - 1) / kBlockRows, value_blocks = (a.value_dim + kBlockRows - 1) / kBlockRows;
  parallel(pairs * (key_blocks + value_blocks), [&](int64_t item, int) {
    const int64_t pair = item / (key_blocks + value_blocks), block = item % (key_blocks + value_blocks);
    uint8_t* to = packed + pair * (key_bytes + value_bytes);
    if (block < key_blocks)
      kernels.pack_head(rows_of(a.keys, pair, a.key_dim), false, block, to + block * kBlockRows * a.key_dim * 2);
    else
      kernels.pack_head(rows_of(a.values, pair, a.value_dim), true, block - key_blocks,
                        to + key_bytes + (block - key_blocks) * kBlockRows * round_up(a.positions, kBlockRows) * 2);
  });
  // The last tiles first: they look at most.
  parallel(a.sequences * heads * tiles, [&](int64_t item, int) {
    const int64_t head = item / tiles % heads, sequence = item / tiles / heads, first = (tiles - 1 - item % tiles) * kQueryRows;
    const uint8_t* keys = packed + (sequence * a.kv_heads + head / a.group) * (key_bytes + value_bytes);
    PromptPart part{};
    part.queries = a.queries.data + sequence * a.queries.sequence + head * a.queries.head + first * a.queries.position;
    part.query_stride = a.queries.position;
    part.first = a.positions - a.tokens + first;
    part.count = std::min(kQueryRows, a.tokens - first);
    part.keys = keys;
    part.values = keys + key_bytes;
    part.positions = a.positions;
    part.key_dim = a.key_dim;
    part.value_dim = a.value_dim;
    part.scale = a.scale;
    part.causal = a.causal;
    part.mask = a.mask ? a.mask + sequence * a.mask_sequence + first * a.mask_token : nullptr;
    part.mask_stride = a.mask_token;
    part.sink = a.sinks ? a.sinks + head : nullptr;
    part.out_stride = heads * a.value_dim * 2;
    part.out = static_cast<uint8_t*>(out) + ((sequence * a.tokens + first) * heads + head) * a.value_dim * 2;
    kernels.attend_rows(part);
  });
}

}  // namespace coterie
