// Attention of many queries to as many keys and more: keys and values as blocks of pairs, a tile of queries times some of them at a time, and a softmax
// that is corrected as larger scores come.
#pragma once
#include <vector>

#include "isa/generic.h"
#include "isa/kernels.h"
#include "isa/pairs.h"

namespace coterie {
namespace {

template <class Isa>
struct AttendRows {
  static constexpr int64_t kKeys = 256;  // of a chunk: its scores stay in L2
  static constexpr int64_t kElement = Isa::kFloatBytes;

  // Keys: block `number` of 64 positions, pairs of columns. Values: of 64 columns, pairs of positions.
  static void pack(const HeadRows& head, bool values, int64_t number, uint8_t* to) {
    const int64_t lanes = values ? head.dim : head.positions, columns = values ? head.positions : head.dim, stride = head.stride / 2;
    const int64_t row_stride = values ? 1 : stride, column_stride = values ? stride : 1;
    const int panels = panels_of(values ? head.dim : round_up(head.positions, kBlockRows), number);
    for (int p = 0; p < panels; p++) {
      const int64_t first = number * kBlockRows + p * kPanelRows, left = lanes - first;
      const int64_t rows = left < 0 ? 0 : left < kPanelRows ? left : kPanelRows;
      const auto* source = reinterpret_cast<const uint16_t*>(head.data) + (rows ? first * row_stride : 0);
      pack_pairs<Isa>(source, DType::bf16, row_stride, column_stride, rows, columns, lines_of(head, values), to + p * kLine, panels * kLine);
    }
  }

  // Panels of block `number` of a matrix with so many rows, a multiple of 16.
  static int panels_of(int64_t rows, int64_t number) {
    const int64_t left = rows - number * kBlockRows;
    return static_cast<int>((left < kBlockRows ? left : kBlockRows) / kPanelRows);
  }

  static int64_t lines_of(const HeadRows& head, bool values) { return (values ? round_up(head.positions, kBlockRows) : head.dim) / 2; }

  struct State {
    float largest[kQueryRows], total[kQueryRows];
    std::vector<float> scores, sums;   // [blocks of 64 keys][rows][64], [blocks of 64 columns][rows][64]
    std::vector<uint8_t> weights, queries;  // [rows][kKeys], [rows][key_dim], as the dot products read them
  };

  static Staged staged(const uint8_t* rows, int64_t row_bytes, int64_t cols) {
    Staged s{};
    s.data = const_cast<uint8_t*>(rows);
    s.row_bytes = row_bytes;
    s.cols = cols;
    s.unit = kActivationGroup;
    return s;
  }

  static void attend(const PromptPart& part) {
    static thread_local State state;
    State& s = state;
    int32_t index[kQueryRows];
    for (int i = 0; i < kQueryRows; i++) index[i] = i;
    const int64_t value_blocks = (part.value_dim + kBlockRows - 1) / kBlockRows;
    s.scores.resize(kKeys * kQueryRows);
    s.sums.assign(value_blocks * kQueryRows * kBlockRows, 0.0f);
    s.weights.resize(kQueryRows * kKeys * kElement);
    for (int64_t m = 0; m < part.count; m++) s.largest[m] = part.sink ? *part.sink : -kNoScore, s.total[m] = part.sink ? 1.0f : 0.0f;
    const Staged queries = staged_queries(part, s);
    const int64_t end = part.causal ? part.first + part.count : part.positions;
    for (int64_t key = 0; key < end; key += kKeys) {
      const int64_t keys = round_up(end - key < kKeys ? end - key : kKeys, kBlockRows);
      if (hidden(part, key, keys)) continue;
      for (int64_t block = 0; block < keys / kBlockRows; block++) {
        const uint8_t* at = part.keys + (key / kBlockRows + block) * part.key_dim * kBlockRows * 2;
        Engine<Isa>::add_pairs({at, kBlockPanels}, queries, index, part.count, s.scores.data() + block * kQueryRows * kBlockRows, false);
      }
      for (int64_t m = 0; m < part.count; m++) weigh(part, s, m, key, keys);
      const Staged weights = staged(s.weights.data(), kKeys * kElement, keys);
      const uint8_t* at = part.values;
      for (int64_t block = 0; block < value_blocks; block++) {
        const int panels = panels_of(part.value_dim, block);
        Engine<Isa>::add_pairs({at + key / 2 * panels * kLine, panels}, weights, index, part.count, s.sums.data() + block * kQueryRows * kBlockRows, true);
        at += round_up(part.positions, kBlockRows) / 2 * panels * kLine;
      }
    }
    for (int64_t m = 0; m < part.count; m++) {
      const float scale = s.total[m] > 0.0f ? 1.0f / s.total[m] : 0.0f;
      for (int64_t block = 0; block < value_blocks; block++) {
        float* sum = s.sums.data() + (block * kQueryRows + m) * kBlockRows;
        for (int64_t i = 0; i < kBlockRows; i++) sum[i] *= scale;
        Engine<Isa>::store(sum, panels_of(part.value_dim, block) * kPanelRows, part.out + m * part.out_stride + block * kBlockRows * 2, DType::bf16);
      }
    }
  }

  // Whether no query looks at any of these keys.
  static bool hidden(const PromptPart& part, int64_t key, int64_t keys) {
    if (!part.mask) return false;
    const int64_t there = part.positions - key < keys ? part.positions - key : keys;
    for (int64_t m = 0; m < part.count; m++) {
      uint8_t any = 0;
      for (int64_t i = 0; i < there; i++) any |= part.mask[m * part.mask_stride + key + i];
      if (any) return false;
    }
    return true;
  }

  static Staged staged_queries(const PromptPart& part, State& s) {
    if constexpr (kElement == 2) return staged(part.queries, part.query_stride, part.key_dim);
    s.queries.resize(kQueryRows * part.key_dim * kElement);
    for (int64_t m = 0; m < part.count; m++)
      for (int64_t i = 0; i < part.key_dim; i += kLanes)
        Isa::store(reinterpret_cast<float*>(s.queries.data()) + m * part.key_dim + i, Isa::load_bf16(part.queries + m * part.query_stride + 2 * i));
    return staged(s.queries.data(), part.key_dim * kElement, part.key_dim);
  }

  // The scores of row m for `keys` keys from `key` on become weights; what was summed before is put on their scale.
  static void weigh(const PromptPart& part, State& s, int64_t m, int64_t key, int64_t keys) {
    const int64_t limit = (part.causal ? part.first + m + 1 : part.positions) - key, there = limit < 0 ? 0 : limit < keys ? limit : keys;
    const uint8_t* mask = part.mask ? part.mask + m * part.mask_stride + key : nullptr;
    const auto block_of = [&](int64_t block) { return s.scores.data() + (block * kQueryRows + m) * kBlockRows; };
    float lanes[kLanes];
    for (float& lane : lanes) lane = s.largest[m];
    for (int64_t block = 0; block < keys / kBlockRows; block++) {
      float* score = block_of(block);
      const int64_t first = block * kBlockRows;
      for (int64_t i = 0; i < kBlockRows; i++) score[i] *= part.scale;
      if (mask)
        for (int64_t i = 0; i < kBlockRows && first + i < there; i++) score[i] = mask[first + i] ? score[i] : -2.0f * kNoScore;
      for (int64_t i = there > first ? there - first : 0; i < kBlockRows; i++) score[i] = -2.0f * kNoScore;
      for (int64_t i = 0; i < kBlockRows; i += kLanes)
        for (int64_t lane = 0; lane < kLanes; lane++) lanes[lane] = score[i + lane] > lanes[lane] ? score[i + lane] : lanes[lane];
    }
    const float before = s.largest[m];
    float largest = before;
    for (const float lane : lanes) largest = lane > largest ? lane : largest;
    for (float& lane : lanes) lane = 0.0f;
    for (int64_t block = 0; block < keys / kBlockRows; block++) {
      float* score = block_of(block);
      for (int64_t i = 0; i < kBlockRows; i++) score[i] = exp_f32(score[i] - largest);
      for (int64_t i = 0; i < kBlockRows; i += kLanes)
        for (int64_t lane = 0; lane < kLanes; lane++) lanes[lane] += score[i + lane];
      uint8_t* to = s.weights.data() + (m * kKeys + block * kBlockRows) * kElement;
      Engine<Isa>::store(score, kBlockRows, to, kElement == 2 ? DType::bf16 : DType::f32);
    }
    float sum = 0.0f;
    for (const float lane : lanes) sum += lane;
    if (largest == before) {
      s.total[m] += sum;
      return;
    }
    const float correction = exp_f32(before - largest);
    s.largest[m] = largest;
    s.total[m] = s.total[m] * correction + sum;
    for (size_t at = m * kBlockRows; at < s.sums.size(); at += kQueryRows * kBlockRows)
      for (int64_t i = 0; i < kBlockRows; i++) s.sums[at + i] *= correction;
  }
};

}  // namespace
}  // namespace coterie
