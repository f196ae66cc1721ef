// The forward kernels, written once over an instruction set `Isa` (see the simd_*.h beside this file).
#pragma once
#include <vector>

#include "isa/activation.h"
#include "isa/pairs.h"
#include "isa/kernels.h"
#include "isa/pack.h"
#include "isa/tiles.h"

namespace coterie {
namespace {

// A block of weights, made ready for its rows: as packed, or decoded to bytes or to bf16 pairs.
enum class Form { packed, bytes, pairs };

struct Ready {
  Block block;
  Form form;
};

// Rows from which decoding 4-bit codes to bytes once costs less than unpacking them in every tile.
constexpr int64_t kDecodeFrom = 16;

template <class Isa>
struct Engine {
  static Ready ready(const Layout& layout, const Block& block, int64_t count, bool integer, bool tiles, uint8_t* scratch) {
    if (layout.format == Format::bf16) return {block, Form::pairs};
    const bool bytes = layout.format == Format::int4 && layout.group && (tiles || (layout.group < kActivationGroup && count >= kDecodeFrom));
    if (integer && !bytes) return {block, Form::packed};
    Ready r{block, integer ? Form::bytes : Form::pairs};
    const int64_t cols = layout.padded_cols(), weight_bytes = cols * kPanelRows * (integer ? 1 : 2);
    const int64_t scale_bytes = integer ? round_up(cols, kActivationGroup) / kActivationGroup * kPanelRows * 4 : 0;
    for (int p = 0; p < kBlockPanels; p++) {
      uint8_t* weight = scratch + p * (weight_bytes + scale_bytes);
      uint8_t* scale = weight + weight_bytes;
      const bool repeated = p > 0 && block.weight[p] == block.weight[0];
      if (!repeated && integer) Isa::decode_panel(layout, block.weight[p], block.scale[p], block.zero[p], weight, reinterpret_cast<float*>(scale));
      if (!repeated && !integer) decode_pairs<Isa>(layout, block.weight[p], block.scale[p], block.zero[p], 0, cols, weight);
      r.block.weight[p] = repeated ? r.block.weight[0] : weight;
      r.block.scale[p] = repeated ? r.block.scale[0] : scale;
    }
    return r;
  }

  // M rows times NP panels of a block, from `panel` on.
  template <int M, int NP, class Ahead>
  static void tile(const Layout& layout, const Ready& r, int panel, const Staged& x, const Rows<M>& rows, float* out, const Ahead& ahead) {
    const int64_t cols = layout.padded_cols();
    const Block& b = r.block;
    if (r.form == Form::pairs)
      bf16_tile<Isa, M, NP>(b.weight + panel, rows, cols / 2, out, ahead);
    else if (r.form == Form::bytes)
      integer_tile<Isa, M, NP, Codes::bytes, Scales::decoded, false>(b, panel, rows, cols, kActivationGroup, out, ahead);
    else if (layout.format == Format::int8)
      layout.group ? integer_tile<Isa, M, NP, Codes::bytes, Scales::group, false>(b, panel, rows, cols, x.unit, out, ahead)
                   : integer_tile<Isa, M, NP, Codes::bytes, Scales::row, false>(b, panel, rows, cols, x.unit, out, ahead);
    else if (layout.zero_point)
      layout.group ? integer_tile<Isa, M, NP, Codes::nibbles, Scales::group, true>(b, panel, rows, cols, x.unit, out, ahead)
                   : integer_tile<Isa, M, NP, Codes::nibbles, Scales::row, true>(b, panel, rows, cols, x.unit, out, ahead);
    else
      layout.group == 32 ? integer_tile<Isa, M, NP, Codes::nibbles, Scales::group, false, 32>(b, panel, rows, cols, 32, out, ahead)
      : layout.group     ? integer_tile<Isa, M, NP, Codes::nibbles, Scales::group, false>(b, panel, rows, cols, x.unit, out, ahead)
                         : integer_tile<Isa, M, NP, Codes::nibbles, Scales::row, false>(b, panel, rows, cols, x.unit, out, ahead);
  }

  // Up to M rows times a whole block that is read once, as packed.
  template <int M>
  static void multiply_once(int64_t count, const Layout& layout, const Ready& r, const Staged& x, const int32_t* index, float* out,
                            const Block& next) {
    if constexpr (M > 1) {
      if (count < M) return multiply_once<M - 1>(count, layout, r, x, index, out, next);
    }
    constexpr int NP = Isa::tile_panels(M);
    const Rows<M> rows(x, index, false);
    for (int p = 0; p < kBlockPanels; p += NP) {
      const Block& then = p + NP < kBlockPanels ? r.block : next;
      FetchSoon<NP> ahead;
      for (int i = 0; i < NP; i++) {
        ahead.now[i] = r.block.weight[p + i];
        ahead.next[i] = then.weight[(p + NP) % kBlockPanels + i];
      }
      ahead.bytes = layout.weight_panel_bytes();
      tile<M, NP>(layout, r, p, x, rows, out + p * kPanelRows, ahead);
    }
  }

  // Up to M rows times a whole block; `from` holds `Runs` runs to fetch meanwhile.
  template <int M, int Runs>
  static void multiply_rows(int64_t count, const Layout& layout, const Ready& r, const Staged& x, const int32_t* index, float* out,
                            const uint8_t* const* from, int shift) {
    if constexpr (M > 1) {
      if (count < M) return multiply_rows<M - 1, Runs>(count, layout, r, x, index, out, from, shift);
    }
    constexpr int NP = Isa::tile_panels(M), kSweeps = kBlockPanels / NP, kRuns = (Runs + kSweeps - 1) / kSweeps;
    const Rows<M> rows(x, index, r.form == Form::bytes);
    for (int sweep = 0; sweep < kSweeps; sweep++) {
      FetchRuns<kRuns> ahead;
      for (int i = 0; i < kRuns; i++) ahead.from[i] = from[sweep * kRuns + i];
      ahead.shift = shift;
      tile<M, NP>(layout, r, sweep * NP, x, rows, out + sweep * NP * kPanelRows, ahead);
    }
  }

  // Tile registers want rows next to each other: those of an expert, copied once for all its panels. Null where tiles are not used.
  static const uint8_t* gather(const Layout& layout, const Staged& x, const Tokens& tokens) {
    if constexpr (Isa::kTiles) {
      if (tokens.count < Isa::kTilesFrom || !Isa::supports(layout, x.integer)) return nullptr;
      static thread_local std::vector<uint8_t> rows;
      rows.resize(tokens.count * x.row_bytes);
      for (int64_t m = 0; m < tokens.count; m++) memcpy(rows.data() + m * x.row_bytes, x.data + tokens.input[m] * x.row_bytes, x.row_bytes);
      return rows.data();
    }
    return nullptr;
  }

  // Where the next block lies, cut into 4 << shift pieces, from `piece` on.
  struct Pieces {
    const uint8_t* from[kBlockPanels];

    Pieces(const Layout& layout, const Block& next, int64_t piece, int shift) {
      const int64_t size = layout.weight_panel_bytes() >> shift;
      for (int a = 0; a < kBlockPanels; a++) {
        const int64_t i = (piece + a) % (kBlockPanels << shift);
        from[a] = next.weight[i >> shift] + (i & ((1 << shift) - 1)) * size;
      }
    }
  };

  // Every row of `tokens` times one block, a tile at a time; `finish(first, rows, out)` takes each tile's [rows][64] products.
  // The tiles fetch `next`, the block that comes after, meanwhile.
  template <class Finish>
  static void multiply(const Layout& layout, const Block& block, const Staged& x, const Tokens& tokens, const uint8_t* gathered, uint8_t* scratch,
                       const Block& next, const Finish& finish) {
    const Ready r = ready(layout, block, tokens.count, x.integer, gathered != nullptr, scratch);
    alignas(64) float out[Isa::kTileRows * kBlockPanels * kPanelRows];
    for (int p = 0; p < kBlockPanels; p++) {
      for (int64_t i = 0; i < layout.scale_panel_bytes(); i += kLine) Isa::prefetch(next.scale[p] + i);
      for (int64_t i = 0; i < layout.zero_panel_bytes(); i += kLine) Isa::prefetch(next.zero[p] + i);
    }
    if constexpr (Isa::kTiles) {
      if (gathered) {
        alignas(64) float out[Isa::kTileChunk * kBlockPanels * kPanelRows];
        for (int64_t first = 0; first < tokens.count; first += Isa::kTileChunk) {
          const int64_t rows = tokens.count - first < Isa::kTileChunk ? tokens.count - first : Isa::kTileChunk;
          Isa::multiply_tiles(layout, r.block.weight, r.block.scale, r.form == Form::bytes, x, gathered + first * x.row_bytes, tokens.input + first,
                              static_cast<int>(rows), out);
          finish(first, rows, out);
        }
        return;
      }
    }
    if (tokens.count <= Isa::kTileRows && r.block.weight[0] == block.weight[0]) {
      multiply_once<Isa::kTileRows>(tokens.count, layout, r, x, tokens.input, out, next);
      return finish(0, tokens.count, out);
    }
    // A decoded block has 2^denser times the lines of the packed one that is to be fetched meanwhile.
    const int denser = r.form == Form::packed || layout.format == Format::bf16 ? 0 : layout.format == Format::int4 && !x.integer ? 2 : 1;
    const int64_t tiles = (tokens.count + Isa::kTileRows - 1) / Isa::kTileRows;
    const int shift = tiles < 8 ? 0 : tiles < 16 ? 1 : 2;
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t first = tokens.count * t / tiles, rows = tokens.count * (t + 1) / tiles - first;
      const int32_t* index = tokens.input + first;
      if (tiles == 1)
        multiply_rows<Isa::kTileRows, 4>(rows, layout, r, x, index, out, Pieces(layout, next, 0, 0).from, denser);
      else if (tiles < 4)
        multiply_rows<Isa::kTileRows, 2>(rows, layout, r, x, index, out, Pieces(layout, next, 2 * (t % 2), 0).from, denser);
      else
        multiply_rows<Isa::kTileRows, 1>(rows, layout, r, x, index, out, Pieces(layout, next, t, shift).from, shift + denser);
      finish(first, rows, out);
    }
  }

  static Block block_of(const Layout& layout, const Matrix& a, int64_t panel_a, int64_t count_a, const Matrix& b, int64_t panel_b, int64_t count_b) {
    Block block;
    for (int p = 0; p < kBlockPanels; p++) {
      bool second = p >= count_a && p < count_a + count_b;
      const Matrix& from = second ? b : a;
      int64_t panel = second ? panel_b + p - count_a : panel_a + (p < count_a ? p : 0);
      block.weight[p] = from.weight + panel * layout.weight_panel_bytes();
      block.scale[p] = from.scale + panel * layout.scale_panel_bytes();
      block.zero[p] = from.zero + panel * layout.zero_panel_bytes();
    }
    return block;
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

  // Rows of B that belong to a block, as panels of bf16 pairs over the rank.
  struct LoraBlock {
    const uint8_t* panel[kBlockPanels] = {};

    void fill(const LoraFactor& f, int64_t expert, int64_t out, int64_t first_panel, int64_t count, int64_t at) {
      if (!f.rank || !count) return;
      static thread_local std::vector<uint8_t> memory[kBlockPanels];
      const int64_t element = f.b_type == DType::f32 ? 4 : 2, lines = f.padded_rank() / 2;
      for (int64_t p = 0; p < count; p++) {
        const int64_t row = (first_panel + p) * kPanelRows;
        memory[at + p].resize(lines * kLine);
        pack_pairs<Isa>(static_cast<const uint8_t*>(f.b) + (expert * out + row) * f.rank * element, f.b_type, f.rank, 1, out - row, f.rank, lines,
                   memory[at + p].data());
        panel[at + p] = memory[at + p].data();
      }
    }
  };

  // out[m][panels at ..] += B low[index[m]]
  static void add_low_rank(const LoraFactor& f, const LoraBlock& block, int64_t at, int64_t count, const Staged& low, const int32_t* index,
                           int64_t rows, float* out) {
    if (!f.rank) return;
    const int64_t lines = f.padded_rank() / 2;
    if (count == 4) return add_pairs<4>(block.panel, lines, low, index, rows, out, true);
    if (count == 2) return add_pairs<2>(block.panel + at, lines, low, index, rows, out + at * kPanelRows, true);
    for (int64_t p = at; p < at + count; p++) add_pairs<1>(block.panel + p, lines, low, index, rows, out + p * kPanelRows, true);
  }

  // out[m][..] = or += pairs times staged rows, NP panels wide, for any number of rows.
  template <int NP>
  static void add_pairs(const uint8_t* const* weight, int64_t lines, const Staged& x, const int32_t* index, int64_t rows, float* out, bool add) {
    constexpr int kRows = Isa::kTileRows;
    const int64_t tiles = (rows + kRows - 1) / kRows;
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t first = rows * t / tiles;
      pairs_of<kRows, NP>(rows * (t + 1) / tiles - first, weight, lines, x, index + first, out + first * kBlockRows, add);
    }
  }

  template <int M, int NP>
  static void pairs_of(int64_t rows, const uint8_t* const* weight, int64_t lines, const Staged& x, const int32_t* index, float* out, bool add) {
    if constexpr (M > 1) {
      if (rows < M) return pairs_of<M - 1, NP>(rows, weight, lines, x, index, out, add);
    }
    constexpr int kWidth = Isa::tile_panels(M) < NP ? Isa::tile_panels(M) : NP;
    const Rows<M> block(x, index, false);
    for (int p = 0; p < NP; p += kWidth) bf16_tile<Isa, M, kWidth>(weight + p, block, lines, out + p * kPanelRows, FetchNothing{}, add);
  }

  static void gate_up(const Experts& layer, const Work& work, const Staged& x, const Tokens& tokens, uint8_t* hidden, int64_t hidden_row_bytes,
                      uint8_t* scratch, const GateUpTraining* training) {
    const Layout& layout = layer.in;
    const int64_t step = layer.has_gate ? kBlockPanels / 2 : kBlockPanels;
    const uint8_t* gathered = gather(layout, x, tokens);
    auto block_at = [&](int64_t e, int64_t panel) {
      const int64_t left = layout.panels() - panel, n = left < step ? left : step;
      return layer.has_gate ? block_of(layout, layer.gate[e], panel, n, layer.up[e], panel, n) : block_of(layout, layer.up[e], panel, n, layer.up[e], 0, 0);
    };
    const float* gate_bias = layer.gate_bias ? layer.gate_bias + work.expert * layout.panels() * kPanelRows : nullptr;
    const float* up_bias = layer.up_bias ? layer.up_bias + work.expert * layout.panels() * kPanelRows : nullptr;
    for (int64_t panel = work.begin; panel < work.end; panel += step) {
      const int64_t n = work.end - panel < step ? work.end - panel : step, columns = n * kPanelRows, column = panel * kPanelRows;
      const Block next = panel + step < work.end ? block_at(work.expert, panel + step) : block_at(work.next_expert, work.next_begin);
      LoraBlock lora;
      if (training && training->lora) {
        lora.fill(training->lora->gate, work.expert, layout.rows, panel, layer.has_gate ? n : 0, 0);
        lora.fill(training->lora->up, work.expert, layout.rows, panel, n, layer.has_gate ? n : 0);
      }
      multiply(layout, block_at(work.expert, panel), x, tokens, gathered, scratch, next, [&](int64_t first, int64_t rows, float* out) {
        if (training && training->lora) {
          if (layer.has_gate) add_low_rank(training->lora->gate, lora, 0, n, training->low_gate, tokens.output + first, rows, out);
          add_low_rank(training->lora->up, lora, layer.has_gate ? n : 0, n, training->low_up, tokens.output + first, rows, out);
        }
        for (int64_t m = 0; m < rows; m++) {
          float* product = out + m * kBlockRows;
          float* up = layer.has_gate ? product + columns : product;
          if (gate_bias) add(product, gate_bias + column, columns);
          if (up_bias) add(up, up_bias + column, columns);
          if (training && training->up) {
            const int64_t at = training->row[tokens.output[first + m]] * layout.rows + column, there = columns < layout.rows - column ? columns : layout.rows - column;
            if (layer.has_gate) store_bf16(product, there, training->gate + at);
            store_bf16(up, there, training->up + at);
          }
          activate(layer.activation, layer.has_gate, product, up, columns);
          store_hidden(x.integer, product, columns, hidden + tokens.output[first + m] * hidden_row_bytes, column);
        }
      });
    }
  }

  static void down(const Experts& layer, const Work& work, const Staged& hidden, const Tokens& tokens, float* result, int64_t stride,
                   uint8_t* scratch, const DownTraining* training) {
    const Layout& layout = layer.out;
    const uint8_t* gathered = gather(layout, hidden, tokens);
    auto block_at = [&](int64_t e, int64_t panel) {
      const int64_t left = layout.panels() - panel;
      return block_of(layout, layer.down[e], panel, left < kBlockPanels ? left : kBlockPanels, layer.down[e], 0, 0);
    };
    const float* bias = layer.down_bias ? layer.down_bias + work.expert * layout.panels() * kPanelRows : nullptr;
    for (int64_t panel = work.begin; panel < work.end; panel += kBlockPanels) {
      const int64_t n = work.end - panel < kBlockPanels ? work.end - panel : kBlockPanels, columns = n * kPanelRows;
      const Block next = panel + kBlockPanels < work.end ? block_at(work.expert, panel + kBlockPanels) : block_at(work.next_expert, work.next_begin);
      LoraBlock lora;
      if (training && training->lora) lora.fill(training->lora->down, work.expert, layout.rows, panel, n, 0);
      multiply(layout, block_at(work.expert, panel), hidden, tokens, gathered, scratch, next, [&](int64_t first, int64_t rows, float* out) {
        if (training && training->lora) add_low_rank(training->lora->down, lora, 0, n, training->low, tokens.input + first, rows, out);
        for (int64_t m = 0; m < rows; m++) {
          float* product = out + m * kBlockRows;
          if (bias) add(product, bias + panel * kPanelRows, columns);
          float* to = result + tokens.output[first + m] * stride + (panel - work.begin) * kPanelRows;
          const float w = tokens.weight[first + m];
          for (int64_t i = 0; i < columns; i++) to[i] += w * product[i];
        }
      });
    }
  }

  // The codes of a NaN or Inf are arbitrary; sums of them may overflow, and are not used.
  static int32_t wrapping_sum(int32_t a, int32_t b) { return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b)); }
  static int32_t wrapping_product(int32_t a, int32_t b) { return static_cast<int32_t>(static_cast<uint32_t>(a) * static_cast<uint32_t>(b)); }

  // Int8 codes of one row, a scale per group of columns, and what undoes the offset of the weights' codes. A NaN or Inf makes its group's scale NaN.
  static void quantise_row(const Layout& weights, const float* row, const Staged& to, int64_t index) {
    // Codes are stored as q + 128, or q + 8; with a zero point the kernel multiplies by it.
    const int32_t code_offset = weights.format == Format::int8 ? 128 : weights.zero_point ? 1 : 8;
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
        for (int64_t i = u; i < stop; i += kPanelRows)
          acc = Isa::add(acc, Isa::store_codes(codes + i * Isa::kIntegerBytes, Isa::mul(Isa::load(row + i), inverse)));
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

  static uint64_t read(const uint8_t* from, int64_t bytes) {
    constexpr int kStreams = 4;
    constexpr int64_t kAhead = 1024;
    const int64_t part = bytes / kStreams / kLine * kLine;
    typename Isa::I acc[kStreams] = {Isa::integer_zero(), Isa::integer_zero(), Isa::integer_zero(), Isa::integer_zero()};
    for (int64_t i = 0; i < part; i += kLine)
      for (int s = 0; s < kStreams; s++) {
        const uint8_t* line = from + s * part + i;
        Isa::prefetch(line + kAhead);
        acc[s] = Isa::add(acc[s], Isa::load_integers(line));
      }
    return Isa::reduce_add(Isa::add(Isa::add(acc[0], acc[1]), Isa::add(acc[2], acc[3])));
  }
};

}  // namespace
}  // namespace coterie
