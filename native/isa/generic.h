// The forward kernels, written once over an instruction set `Isa` (see the simd_*.h beside this file).
#pragma once
#include <vector>

#include "isa/activation.h"
#include "isa/decode.h"
#include "isa/pairs.h"
#include "isa/kernels.h"
#include "isa/pack.h"
#include "isa/tiles.h"
#include "isa/transposed.h"

namespace coterie {
namespace {

// Rows from which decoding narrow codes to bytes once costs less than unpacking them in every tile.
constexpr int64_t kDecodeFrom = 24;
// Whether decoded codes are multiplied first and scaled then: where scales are few, that costs less than scaling weights, and rounds nothing.
template <class E>
constexpr bool kKeepsScales = E::kFused && (!E::kStepScale || (E::kStep >= 128 && !E::kRecord));
// Where narrow codes are as quick to multiply as bytes for any number of rows: their products are added in 16 bits, and rarely scaled.
template <class Isa, class E>
constexpr bool kStaysNarrow = kShortQuads<Isa, typename E::Codes> >= 4 && (E::kStep == 0 || E::kStep / E::kScales >= 32);
// Rows whose gate products wait for those of up.
constexpr int64_t kPairRows = 128;

template <class Isa>
struct Engine {
  using F = typename Isa::F;

  // M rows times every panel of a block: all four at once where the tile is wide enough, or else in several sweeps. They share out between them the
  // `lines` at `next` to fetch. `add`: to what is there, for pairs.
  template <class E, int M, bool Integer>
  static void sweep(const Layout& layout, const Block& block, const Staged& x, const int32_t* index, float* out, const uint8_t* next, int64_t lines,
                    bool add) {
    constexpr int NP = Isa::tile_panels(M, Integer);
    const Rows<M> rows(x, index, std::is_same_v<E, Bytes>);
    const int64_t share = lines / ((block.panels + NP - 1) / NP);
    Ahead ahead{next};
    ahead.spread(share, x.cols / E::kRunColumns);
    int panel = 0;
    for (; panel + NP <= block.panels; panel += NP, ahead.from += share * kLine)
      tile<E, M, NP, Integer>(layout, block, panel, x, rows, out + panel * kPanelRows, ahead, add);
    if constexpr (NP > 1)
      for (; panel < block.panels; panel++) tile<E, M, 1, Integer>(layout, block, panel, x, rows, out + panel * kPanelRows, Ahead{}, add);
  }

  template <class E, int M, int NP, bool Integer>
  static void tile(const Layout& layout, const Block& block, int panel, const Staged& x, const Rows<M>& rows, float* out, const Ahead& ahead, bool add) {
    if constexpr (Integer) {
      if constexpr (E::Codes::kInteger)
        quads_tile<Isa, E, M, NP>(block, panel, rows, x.cols, std::is_same_v<E, Bytes> ? kActivationGroup : x.unit, out, ahead);
    } else if constexpr (E::kFused && !std::is_same_v<E, Bytes>) {
      pairs_tile<Isa, E, M, NP>(layout, block, panel, rows, x.cols, out, ahead, add);
    }
  }

  // Up to M rows times a block.
  template <class E, int M = Isa::kTileRows>
  static void rows_of(int64_t count, const Layout& layout, const Block& block, const Staged& x, const int32_t* index, float* out, const uint8_t* next,
                      int64_t lines, bool add = false) {
    if constexpr (M > 1) {
      if (count < M) return rows_of<E, M - 1>(count, layout, block, x, index, out, next, lines, add);
    }
    x.integer ? sweep<E, M, true>(layout, block, x, index, out, next, lines, add) : sweep<E, M, false>(layout, block, x, index, out, next, lines, add);
  }

  // Tile registers want rows next to each other: those of an expert, copied once for all its panels. Null where tiles are not used.
  static const uint8_t* gather(const Layout& layout, const Staged& x, const Tokens& tokens) {
    if constexpr (Isa::kTiles) {
      if (tokens.count < Isa::tiles_from(x.integer) || !Isa::supports(layout, x.integer)) return nullptr;
      static thread_local std::vector<uint8_t> rows;
      rows.resize(tokens.count * x.row_bytes);
      for (int64_t m = 0; m < tokens.count; m++) memcpy(rows.data() + m * x.row_bytes, x.data + tokens.input[m] * x.row_bytes, x.row_bytes);
      return rows.data();
    }
    return nullptr;
  }

  // Every row of `tokens` times one block; `finish(first, rows, out)` takes the [rows][64] products of some of them. What lies at `next`, as much as the
  // block has, is fetched meanwhile. Whether weights are decoded depends on `all`, the rows of the whole product.
  template <class Finish>
  static void multiply_block(const Layout& layout, const Block& block, const Staged& x, const Tokens& tokens, int64_t all, const uint8_t* gathered,
                             uint8_t* scratch, const uint8_t* next, const Finish& finish) {
    with_encoding(layout, [&](auto encoding) {
      using E = decltype(encoding);
      const int64_t lines = layout.block_bytes(block.panels) / kLine;
      if (x.integer) {
        if constexpr (E::kNarrow)
          if (gathered || (all >= kDecodeFrom && !kStaysNarrow<Isa, E>)) {
            decode_bytes<Isa, E>(layout, block, scratch);
            return tiles<Bytes>(layout, {scratch, block.panels}, x, tokens, gathered, next, lines, finish);
          }
      } else if constexpr (!std::is_same_v<E, Pairs>) {
        if constexpr (kKeepsScales<E>)
          if (!gathered && all > Isa::kTileRows) {
            decode_unscaled<Isa, E>(layout, block, scratch);
            return tiles<Unscaled<E>>(layout, {scratch, block.panels}, x, tokens, gathered, next, lines, finish);
          }
        if (!E::kFused || gathered || all > Isa::kTileRows) {
          decode_pairs<Isa, E>(layout, block, 0, layout.padded_cols(), scratch);
          return tiles<Pairs>(layout, {scratch, block.panels}, x, tokens, gathered, next, lines, finish);
        }
      }
      tiles<E>(layout, block, x, tokens, gathered, next, lines, finish);
    });
  }

  // The tiles fetch `lines` at `next` between them.
  template <class E, class Finish>
  static void tiles(const Layout& layout, const Block& block, const Staged& x, const Tokens& tokens, const uint8_t* gathered, const uint8_t* next,
                    int64_t lines, const Finish& finish) {
    if constexpr (Isa::kTiles) {
      if (gathered) {
        alignas(64) float out[Isa::kTileChunk * kBlockRows];
        for (int64_t first = 0; first < tokens.count; first += Isa::kTileChunk) {
          const int64_t rows = tokens.count - first < Isa::kTileChunk ? tokens.count - first : Isa::kTileChunk;
          Isa::template multiply_tiles<E>(layout, block, x, gathered + first * x.row_bytes, tokens.input + first, static_cast<int>(rows), out);
          finish(first, rows, out);
        }
        return;
      }
    }
    alignas(64) float out[Isa::kTileRows * kBlockRows];
    const int64_t count = (tokens.count + Isa::kTileRows - 1) / Isa::kTileRows;
    // What is read once from end to end, the hardware fetches by itself, on some CPUs in time.
    const bool once = E::Codes::kBits > Isa::kFetchedBits && count == 1 && Isa::tile_panels(static_cast<int>(tokens.count), x.integer) >= block.panels;
    const int64_t share = once ? 0 : lines / count;
    for (int64_t t = 0; t < count; t++) {
      const int64_t first = tokens.count * t / count, rows = tokens.count * (t + 1) / count - first;
      rows_of<E>(rows, layout, block, x, tokens.input + first, out, next + share * t * kLine, share);
      finish(first, rows, out);
    }
  }

  static void store_bf16(const float* values, int64_t count, uint16_t* to) {
    for (int64_t i = 0; i < count; i++) to[i] = float_to_bf16(values[i]);
  }

  // Hidden activations: staged, or bf16 rows to be quantised.
  static void store_hidden(bool integer, const float* values, int64_t count, uint8_t* row, int64_t column) {
    if (!integer && Isa::kFloatBytes == 4)
      memcpy(row + column * 4, values, count * 4);
    else
      store_bf16(values, count, reinterpret_cast<uint16_t*>(row) + column);
  }

  // Rows of B, or columns of A, that belong to a block, as a block of bf16 pairs over the rank.
  struct LoraBlock {
    Block block{};

    LoraBlock(const Product& product, int i, int64_t number, int panels, std::vector<uint8_t>& memory) {
      const LoraFactor* f = product.lora[i].factor;
      if (!f || !f->rank) return;
      const DType dtype = product.transposed ? f->a_type : f->b_type;
      const int64_t element = dtype == DType::f32 ? 4 : 2, stride = panels * kLine;
      const int64_t rows = product.transposed ? product.layout->cols : product.layout->rows;  // of results
      const auto* source = static_cast<const uint8_t*>(product.transposed ? f->a : f->b) + product.expert * rows * f->rank * element;
      const int64_t lines = f->padded_rank() / 2;
      memory.resize(lines * stride);
      for (int p = 0; p < panels; p++) {
        const int64_t row = number * kBlockRows + p * kPanelRows, there = rows - row > 0 ? rows - row : 0;
        const int64_t row_stride = product.transposed ? 1 : f->rank, col_stride = product.transposed ? rows : 1;
        pack_pairs<Isa>(source + row * row_stride * element, dtype, row_stride, col_stride, there, f->rank, lines, memory.data() + p * kLine, stride);
      }
      block = {memory.data(), panels};
    }
  };

  // out[m] += B low[index[m]]
  static void add_low_rank(const LoraBlock& lora, const LoraTerm& term, const Tokens& tokens, int64_t first, int64_t rows, float* out) {
    if (lora.block.data) add_pairs(lora.block, term.low, (term.by_input ? tokens.input : tokens.output) + first, rows, out, true);
  }

  // out[m][..] = or += a block of pairs times staged rows, for any number of rows.
  static void add_pairs(const Block& block, const Staged& x, const int32_t* index, int64_t rows, float* out, bool add) {
    const int64_t tiles = (rows + Isa::kTileRows - 1) / Isa::kTileRows;
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t first = rows * t / tiles;
      rows_of<Pairs>(rows * (t + 1) / tiles - first, Layout{}, block, x, index + first, out + first * kBlockRows, nullptr, 0, add);
    }
  }

  static void multiply(const Product& product, int64_t begin, int64_t end, const uint8_t* next, uint8_t* scratch) {
    const uint8_t* gathered = gather(*product.layout, product.x, product.tokens);
    for (int64_t block = begin; block < end; block++) {
      const uint8_t* then = block + 1 < end ? product.matrix[0] + product.layout->block_start(block + 1) : next;
      if (product.activated.activation)
        activated_block(product, block, gathered, then, scratch);
      else if (product.slopes.buffers)
        slopes_block(product, block, gathered, scratch);
      else
        summed_block(product, block, gathered, then, scratch);
    }
  }

  // Every row of a transposed product times block `number`.
  template <class Finish>
  static void multiply_transposed(const Product& product, int64_t number, const uint8_t* gathered, uint8_t* scratch, const Finish& finish) {
    const int64_t lines = product.x.cols / 2, each = product.matrix[1] ? lines / 2 : lines;
    for (int i = 0; i < 2 && product.matrix[i]; i++)
      transpose_block<Isa>(*product.layout, product.matrix[i], number * kBlockRows, i * each, (i + 1) * each, scratch);
    tiles<Pairs>(*product.layout, {scratch, kBlockPanels}, product.x, product.tokens, gathered, nullptr, 0, finish);
  }

  static void activated_block(const Product& product, int64_t number, const uint8_t* gathered, const uint8_t* next, uint8_t* scratch) {
    static thread_local std::vector<uint8_t> lora_memory[2];
    const Layout& layout = *product.layout;
    const bool has_gate = product.matrix[1] != nullptr;
    const int panels = layout.panels_of(number);
    const int64_t column = number * kBlockRows, columns = panels * kPanelRows, there = columns < layout.rows - column ? columns : layout.rows - column;
    const LoraBlock lora[2] = {{product, 0, number, panels, lora_memory[0]}, {product, 1, number, panels, lora_memory[1]}};
    const Activated& to = product.activated;
    alignas(64) float gates[kPairRows * kBlockRows];
    for (int64_t first = 0; first < product.tokens.count; first += kPairRows) {
      const int64_t left = product.tokens.count - first;
      const Tokens tokens{product.tokens.input + first, product.tokens.output + first, nullptr, left < kPairRows ? left : kPairRows};
      const uint8_t* rows_of_tokens = gathered ? gathered + first * product.x.row_bytes : nullptr;
      for (int i = 0; i <= has_gate; i++) {
        const bool last = i == has_gate;
        const uint8_t* then = last ? next : product.matrix[1] + layout.block_start(number);
        multiply_block(layout, block_at(layout, product.matrix[i], number), product.x, tokens, product.tokens.count, rows_of_tokens, scratch, then,
                       [&](int64_t start, int64_t rows, float* out) {
                         add_low_rank(lora[i], product.lora[i], tokens, start, rows, out);
                         for (int64_t m = 0; m < rows; m++) {
                           float *product_row = out + m * kBlockRows, *gate = gates + (start + m) * kBlockRows;
                           if (product.bias[i]) add(product_row, product.bias[i] + column, columns);
                           if (last)
                             activate_row(to, layout, has_gate, gate, product_row, column, columns, there, tokens.output[start + m], product.x.integer);
                           else
                             memcpy(gate, product_row, columns * sizeof(float));
                         }
                       });
      }
    }
  }

  // `gate` and `up` are the products of one row.
  static void activate_row(const Activated& to, const Layout& layout, bool has_gate, float* gate, float* up, int64_t column, int64_t columns,
                           int64_t there, int64_t row, bool integer) {
    if (to.up) {
      const int64_t at = to.kept_row[row] * layout.rows + column;
      if (has_gate) store_bf16(gate, there, to.gate + at);
      store_bf16(up, there, to.up + at);
    }
    float* result = has_gate ? gate : up;
    activate(*to.activation, has_gate, result, up, columns);
    store_hidden(integer, result, columns, to.rows + row * to.row_bytes, column);
  }

  static void summed_block(const Product& product, int64_t number, const uint8_t* gathered, const uint8_t* next, uint8_t* scratch) {
    static thread_local std::vector<uint8_t> lora_memory[2];
    const Layout& layout = *product.layout;
    const Tokens& tokens = product.tokens;
    const int panels = product.transposed ? kBlockPanels : layout.panels_of(number);
    const int64_t columns = panels * kPanelRows;
    const LoraBlock lora[2] = {{product, 0, number, panels, lora_memory[0]}, {product, 1, number, panels, lora_memory[1]}};
    float* const result = product.summed.result + (number - product.summed.first) * kBlockRows;
    const auto finish = [&](int64_t first, int64_t rows, float* out) {
      for (int i = 0; i < 2; i++) add_low_rank(lora[i], product.lora[i], tokens, first, rows, out);
      for (int64_t m = 0; m < rows; m++) {
        float* from = out + m * kBlockRows;
        if (product.bias[0]) add(from, product.bias[0] + number * kBlockRows, columns);
        float* to = result + tokens.output[first + m] * product.summed.stride;
        const float w = tokens.weight ? tokens.weight[first + m] : 1.0f;
        for (int64_t i = 0; i < columns; i++) to[i] += w * from[i];
      }
    };
    if (product.transposed)
      multiply_transposed(product, number, gathered, scratch, finish);
    else
      multiply_block(layout, block_at(layout, product.matrix[0], number), product.x, tokens, tokens.count, gathered, scratch, next, finish);
  }

  static void slopes_block(const Product& product, int64_t number, const uint8_t* gathered, uint8_t* scratch) {
    static thread_local std::vector<uint8_t> lora_memory;
    const int64_t left = product.layout->cols - number * kBlockRows, columns = left < 0 ? 0 : left < kBlockRows ? left : kBlockRows;
    const LoraBlock lora(product, 0, number, kBlockPanels, lora_memory);
    multiply_transposed(product, number, gathered, scratch, [&](int64_t first, int64_t rows, float* out) {
      add_low_rank(lora, product.lora[0], product.tokens, first, rows, out);
      for (int64_t m = 0; m < rows; m++) slope_row(product, first + m, number, columns, out + m * kBlockRows);
    });
  }

  // From `d`, the gradient of one token's hidden activations before its routing weight, to those of gate and up.
  static void slope_row(const Product& product, int64_t i, int64_t block, int64_t columns, float* d) {
    const Backward& b = *product.slopes.buffers;
    const Tokens& tokens = product.tokens;
    const bool has_gate = product.slopes.has_gate;
    const int64_t column = block * kBlockRows;
    const int64_t slot = tokens.output[i], at = b.row[slot] * product.layout->cols + column;
    alignas(64) float gate[kBlockRows] = {}, up[kBlockRows] = {}, hidden[kBlockRows], d_gate[kBlockRows], d_up[kBlockRows];
    for (int64_t c = 0; c < columns; c++) up[c] = bf16_to_float(b.up[at + c]);
    if (has_gate)
      for (int64_t c = 0; c < columns; c++) gate[c] = bf16_to_float(b.gate[at + c]);
    alignas(64) float weighted[kBlockRows];
    for (int c = 0; c < kBlockRows; c++) weighted[c] = d[c] * tokens.weight[i];
    activate_backward(*product.slopes.activation, has_gate, gate, up, weighted, kBlockRows, hidden, d_gate, d_up);
    F share = Isa::zero();
    for (int64_t c = columns; c < kBlockRows; c++) hidden[c] = d[c] = d_gate[c] = d_up[c] = 0.0f;
    for (int c = 0; c < kBlockRows; c += kPanelRows) share = Isa::fma(Isa::load(d + c), Isa::load(hidden + c), share);
    b.weight_parts[block * b.slots + slot] = Isa::reduce_add(share);
    if (has_gate) store_staged(d_gate, kBlockRows, b.grads, slot, column);
    store_staged(d_up, kBlockRows, b.grads, slot, b.up_column + column);
    if (b.lora->down.rank) store_staged(hidden, kBlockRows, b.hidden, slot, column);
  }

  static void store_staged(const float* values, int64_t count, const Staged& to, int64_t row, int64_t column) {
    store_hidden(false, values, count, to.data + row * to.row_bytes, column);
  }

  // The codes of a NaN or Inf are arbitrary; sums of them may overflow, and are not used.
  static int32_t wrapping_sum(int32_t a, int32_t b) { return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b)); }
  static int32_t wrapping_product(int32_t a, int32_t b) { return static_cast<int32_t>(static_cast<uint32_t>(a) * static_cast<uint32_t>(b)); }

  // Int8 codes of one row (those of all columns in kIntegerBytes each, and behind them again in kShortBytes), a scale per group of columns, and what
  // undoes the offset of the weights' codes. A NaN or Inf makes its group's scale NaN.
  static void quantise_row(const Layout& weights, const float* row, const Staged& to, int64_t index) {
    const int32_t code_offset = weights.code_offset;
    uint8_t* codes = to.data + index * to.row_bytes;
    for (int64_t g = 0; g < to.groups(); g++) {
      const int64_t begin = g * kActivationGroup, end = begin + kActivationGroup < to.cols ? begin + kActivationGroup : to.cols;
      auto largest = Isa::zero(), poison = Isa::zero();
      for (int64_t i = begin; i < end; i += kPanelRows) {
        auto v = Isa::load(row + i);
        largest = Isa::max_abs(largest, v);
        poison = Isa::fma(v, Isa::zero(), poison);
      }
      const float most = Isa::reduce_max(largest), bad = Isa::reduce_add(poison);
      to.scale[index * to.groups() + g] = most / 127.0f + bad;
      const auto inverse = Isa::set1(most > 1e-30f && bad == 0.0f ? 127.0f / most : 0.0f);  // below that it may be infinite
      int32_t group_sum = 0;
      for (int64_t u = begin; u < end; u += to.unit) {
        auto acc = Isa::integer_zero();
        const int64_t stop = u + to.unit < end ? u + to.unit : end;
        for (int64_t i = u; i < stop; i += kPanelRows) {
          const auto q = Isa::store_codes(codes + i * Isa::kIntegerBytes, Isa::mul(Isa::load(row + i), inverse));
          if constexpr (Isa::kShortBytes > 0) Isa::store_bytes(codes + to.cols * Isa::kIntegerBytes + i, q);
          acc = Isa::add(acc, q);
        }
        const int32_t sum = Isa::reduce_add(acc);
        to.offset[index * to.units() + u / to.unit] = wrapping_product(-code_offset, sum);
        group_sum = wrapping_sum(group_sum, sum);
      }
      to.group_offset[index * to.groups() + g] = wrapping_product(-128, group_sum);
    }
  }

  static void stage(const Layout& weights, const void* source, DType dtype, int64_t stride, int64_t cols, int64_t begin, int64_t end,
                    const Staged& to) {
    constexpr int kMaxStackCols = 16384;
    alignas(64) float stack[kMaxStackCols];
    float* row = to.cols <= kMaxStackCols ? stack : new float[to.cols];
    for (int64_t r = begin; r < end; r++) {
      const bool direct = !to.integer && Isa::kFloatBytes == 4;
      float* values = direct ? reinterpret_cast<float*>(to.data + r * to.row_bytes) : row;
      load_row(source, dtype, r * stride, cols, values);
      for (int64_t i = cols; i < to.cols; i++) values[i] = 0.0f;
      if (to.integer)
        quantise_row(weights, values, to, r);
      else if (!direct)
        for (int64_t i = 0; i < to.cols; i++) reinterpret_cast<uint16_t*>(to.data + r * to.row_bytes)[i] = float_to_bf16(values[i]);
    }
    if (row != stack) delete[] row;
  }

  static void store(const float* result, int64_t count, void* to, DType dtype) {
    if (dtype == DType::f32)
      memcpy(to, result, count * 4);
    else
      for (int64_t i = 0; i < count; i++) static_cast<uint16_t*>(to)[i] = float_to_bf16(result[i]);
  }

  // One sequential stream, as kernels read weights.
  static uint64_t read(const uint8_t* from, int64_t bytes) {
    constexpr int kLines = 4;
    typename Isa::I acc[kLines];
    for (auto& a : acc) a = Isa::integer_zero();
    for (int64_t i = 0; i < bytes / kLine / kLines; i++)
#pragma GCC unroll 4
      for (int l = 0; l < kLines; l++) acc[l] = Isa::add(acc[l], Isa::load_integers(from + (i * kLines + l) * kLine));
    return Isa::reduce_add(Isa::add(Isa::add(acc[0], acc[1]), Isa::add(acc[2], acc[3])));
  }
};

}  // namespace
}  // namespace coterie
