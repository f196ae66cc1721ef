// The backward pass of a layer of experts. Every weight is used where it lies: blocks of its transpose are made in cache-sized pieces.
#pragma once
#include "isa/generic.h"

namespace coterie {
namespace {

template <class Isa>
struct Trainer {
  using E = Engine<Isa>;
  using F = typename Isa::F;

  static void store_staged(const float* values, int64_t count, const Staged& to, int64_t row, int64_t column) {
    E::store_hidden(false, values, count, to.data + row * to.row_bytes, column);
  }

  static std::vector<uint8_t>& scratch_panels(int64_t bytes) {
    static thread_local std::vector<uint8_t> memory;
    memory.resize(bytes);
    return memory;
  }

  static void low_rank(const LoraFactor& f, int64_t expert, int64_t in, int64_t out, bool transposed, const Staged& x, const Tokens& tokens,
                       const Staged& low, int64_t column) {
    const int64_t cols = transposed ? out : in, lines = x.cols / 2;
    const DType dtype = transposed ? f.b_type : f.a_type;
    const int64_t element = dtype == DType::f32 ? 4 : 2;
    const uint8_t* source = static_cast<const uint8_t*>(transposed ? f.b : f.a) + expert * f.rank * cols * element;
    uint8_t* panel = scratch_panels(lines * kLine).data();
    alignas(64) float product[kBlockRows * Isa::kTileRows];
    for (int64_t r = 0; r < f.rank; r += kPanelRows) {
      if (transposed)
        pack_pairs<Isa>(source + r * element, dtype, 1, f.rank, f.rank - r, cols, lines, panel, kLine);
      else
        pack_pairs<Isa>(source + r * cols * element, dtype, cols, 1, f.rank - r, cols, lines, panel, kLine);
      for (int64_t first = 0; first < tokens.count; first += Isa::kTileRows) {
        const int64_t rows = tokens.count - first < Isa::kTileRows ? tokens.count - first : Isa::kTileRows;
        E::add_pairs({panel, 1}, x.cols, x, tokens.input + first, rows, product, false);
        for (int64_t m = 0; m < rows; m++) {
          float* v = product + m * kBlockRows;
          for (int i = 0; i < kPanelRows; i++) v[i] *= f.scaling;
          store_staged(v, kPanelRows, low, tokens.output[first + m], column + r);
        }
      }
    }
  }

  // Columns [column, column + 64) of W as a block of W^T, from its line `line` on; zero from W's rows to its line `end`.
  static void transpose_block(const Layout& layout, const uint8_t* matrix, int64_t column, int64_t line, int64_t end, uint8_t* to) {
    constexpr int64_t kToStride = kBlockPanels * kLine;
    alignas(64) uint8_t decoded[kColumnAlign / 2 * kBlockPanels * kLine];
    with_encoding(layout, [&](auto encoding) {
      using Encoding = decltype(encoding);
      for (int64_t number = 0; number < layout.blocks(); number++) {
        const Block block = block_at(layout, matrix, number);
        const int64_t stride = block.panels * kLine;
        const uint8_t* from = decoded;
        if constexpr (std::is_same_v<Encoding, Pairs>)
          from = block.data + column / 2 * stride;
        else
          decode_pairs<Isa, Encoding>(layout, block, column, column + kColumnAlign, decoded);
        for (int p = 0; p < block.panels; p++, line += kSquareLines)
          for (int q = 0; q < kBlockPanels; q++)
            Isa::transpose(from + q * kSquareLines * stride + p * kLine, stride, to + line * kToStride + q * kLine, kToStride);
      }
    });
    memset(to + line * kToStride, 0, (end - line) * kToStride);
  }

  // Columns [column, column + 64) of A as a block of A^T over the rank, from its line `line` on.
  static void transpose_lora(const LoraFactor& f, int64_t expert, int64_t in, int64_t column, int64_t line, uint8_t* to) {
    const int64_t element = f.a_type == DType::f32 ? 4 : 2;
    for (int q = 0; q < kBlockPanels; q++) {
      const int64_t row = column + q * kPanelRows, there = in - row;
      const uint8_t* source = static_cast<const uint8_t*>(f.a) + (expert * f.rank * in + row) * element;
      pack_pairs<Isa>(source, f.a_type, 1, in, there > 0 ? there : 0, f.rank, f.padded_rank() / 2, to + (line * kBlockPanels + q) * kLine,
                      kBlockPanels * kLine);
    }
  }

  static void backward_hidden(const Experts& layer, int64_t e, int64_t begin, int64_t end, const Tokens& tokens, const Backward& b, uint8_t* scratch) {
    const LoraFactor& lora = b.lora->down;
    const Block weight{scratch, kBlockPanels}, low{scratch_panels(kBlockPanels * lora.padded_rank() / 2 * kLine).data(), kBlockPanels};
    alignas(64) float out[kBlockRows * Isa::kTileRows];
    for (int64_t block = begin; block < end; block++) {
      const int64_t column = block * kBlockRows, left = layer.intermediate - column;
      const int64_t columns = left < 0 ? 0 : left < kBlockRows ? left : kBlockRows;
      transpose_block(layer.out, layer.down[e], column, 0, b.grad_out.cols / 2, scratch);
      if (lora.rank) transpose_lora(lora, e, layer.intermediate, column, 0, const_cast<uint8_t*>(low.data));
      const int64_t tiles = (tokens.count + Isa::kTileRows - 1) / Isa::kTileRows;
      for (int64_t t = 0; t < tiles; t++) {
        const int64_t first = tokens.count * t / tiles, rows = tokens.count * (t + 1) / tiles - first;
        E::add_pairs(weight, b.grad_out.cols, b.grad_out, tokens.input + first, rows, out, false);
        if (lora.rank) E::add_pairs(low, lora.padded_rank(), b.d_low_down, tokens.output + first, rows, out, true);
        for (int64_t m = 0; m < rows; m++) hidden_row(layer, b, tokens, first + m, block, column, columns, out + m * kBlockRows);
      }
    }
  }

  // From `d`, the gradient of one token's hidden activations before its routing weight, to those of gate and up.
  static void hidden_row(const Experts& layer, const Backward& b, const Tokens& tokens, int64_t i, int64_t block, int64_t column, int64_t columns,
                         float* d) {
    const int64_t slot = tokens.output[i], at = b.row[slot] * layer.intermediate + column;
    alignas(64) float gate[kBlockRows] = {}, up[kBlockRows] = {}, hidden[kBlockRows], d_gate[kBlockRows], d_up[kBlockRows];
    for (int64_t c = 0; c < columns; c++) up[c] = bf16_to_float(b.up[at + c]);
    if (layer.has_gate)
      for (int64_t c = 0; c < columns; c++) gate[c] = bf16_to_float(b.gate[at + c]);
    alignas(64) float weighted[kBlockRows];
    for (int c = 0; c < kBlockRows; c++) weighted[c] = d[c] * tokens.weight[i];
    activate_backward(layer.activation, layer.has_gate, gate, up, weighted, kBlockRows, hidden, d_gate, d_up);
    F share = Isa::zero();
    for (int64_t c = columns; c < kBlockRows; c++) hidden[c] = d[c] = d_gate[c] = d_up[c] = 0.0f;
    for (int c = 0; c < kBlockRows; c += kPanelRows) share = Isa::fma(Isa::load(d + c), Isa::load(hidden + c), share);
    b.weight_parts[block * b.slots + slot] = Isa::reduce_add(share);
    if (layer.has_gate) store_staged(d_gate, kBlockRows, b.grads, slot, column);
    store_staged(d_up, kBlockRows, b.grads, slot, b.up_column + column);
    if (b.lora->down.rank) store_staged(hidden, kBlockRows, b.hidden, slot, column);
  }

  static void backward_input(const Experts& layer, int64_t e, int64_t begin, int64_t end, const Tokens& tokens, const Backward& b, float* result,
                             int64_t stride, uint8_t* scratch) {
    const Block weight{scratch, kBlockPanels};
    alignas(64) float out[kBlockRows * Isa::kTileRows];
    for (int64_t block = begin; block < end; block++) {
      const int64_t column = block * kBlockRows;
      if (layer.has_gate) transpose_block(layer.in, layer.gate[e], column, 0, b.up_column / 2, scratch);
      transpose_block(layer.in, layer.up[e], column, b.up_column / 2, b.low_gate_column / 2, scratch);
      if (b.lora->gate.rank) transpose_lora(b.lora->gate, e, layer.hidden, column, b.low_gate_column / 2, scratch);
      if (b.lora->up.rank) transpose_lora(b.lora->up, e, layer.hidden, column, b.low_up_column / 2, scratch);
      const int64_t tiles = (tokens.count + Isa::kTileRows - 1) / Isa::kTileRows;
      for (int64_t t = 0; t < tiles; t++) {
        const int64_t first = tokens.count * t / tiles, rows = tokens.count * (t + 1) / tiles - first;
        E::add_pairs(weight, b.grads.cols, b.grads, tokens.output + first, rows, out, false);
        for (int64_t m = 0; m < rows; m++) add(result + tokens.input[first + m] * stride + (block - begin) * kBlockRows, out + m * kBlockRows, kBlockRows);
      }
    }
  }

  static float staged_value(const Staged& s, int64_t row, int64_t column) {
    const uint8_t* at = s.data + row * s.row_bytes + column * Isa::kFloatBytes;
    if (Isa::kFloatBytes == 2) {
      uint16_t half;
      memcpy(&half, at, 2);
      return bf16_to_float(half);
    }
    float value;
    memcpy(&value, at, 4);
    return value;
  }

  // Sixteen columns of one row of staged activations.
  static F load_staged(const Staged& s, int64_t row, int64_t column) {
    const uint8_t* at = s.data + row * s.row_bytes + column * Isa::kFloatBytes;
    return Isa::kFloatBytes == 2 ? Isa::load_bf16(at) : Isa::load(reinterpret_cast<const float*>(at));
  }

  static constexpr int kOuterRows = 8;  // rows of the gradient that share a pass over the tokens

  // One term of a gradient: sum over tokens of low[slot][r] * wide[row][c].
  struct Outer {
    const Staged* low;
    int64_t low_column;
    const Staged* wide;
    int64_t wide_column;
    const int32_t* row;
    bool weighted;
  };

  // grad[r][c] of the terms' sum, or its transpose, in the parameter's dtype.
  static void outer(const LoraFactor& f, const Outer* terms, int count, const Tokens& tokens, int64_t cols, bool transposed, void* grad, DType dtype) {
    static thread_local std::vector<float> low, block;
    low.resize(tokens.count * kOuterRows * count);
    block.resize(kOuterRows * round_up(cols, kPanelRows));
    const int64_t stride = round_up(cols, kPanelRows);
    for (int64_t r = 0; r < f.rank; r += kOuterRows) {
      const int64_t there = f.rank - r < kOuterRows ? f.rank - r : kOuterRows;
      for (int t = 0; t < count; t++)
        for (int64_t m = 0; m < tokens.count; m++)
          for (int64_t i = 0; i < kOuterRows; i++)
            low[(t * tokens.count + m) * kOuterRows + i] =
                (i < there ? staged_value(*terms[t].low, tokens.output[m], terms[t].low_column + r + i) : 0.0f) *
                (terms[t].weighted ? tokens.weight[m] : 1.0f);
      for (int64_t c = 0; c < stride; c += kPanelRows) {
        F acc[kOuterRows];
        for (int i = 0; i < kOuterRows; i++) acc[i] = Isa::zero();
        for (int t = 0; t < count; t++)
          for (int64_t m = 0; m < tokens.count; m++) {
            const F wide = load_staged(*terms[t].wide, terms[t].row[m], terms[t].wide_column + c);
            const float* p = &low[(t * tokens.count + m) * kOuterRows];
#pragma GCC unroll 8
            for (int i = 0; i < kOuterRows; i++) acc[i] = Isa::fma(wide, Isa::set1(p[i]), acc[i]);
          }
        for (int i = 0; i < kOuterRows; i++) Isa::store(&block[i * stride + c], acc[i]);
      }
      for (int64_t i = 0; i < there; i++)
        for (int64_t c = 0; c < cols; c++) {
          const int64_t at = transposed ? c * f.rank + r + i : (r + i) * cols + c;
          if (dtype == DType::f32)
            static_cast<float*>(grad)[at] = block[i * stride + c];
          else
            static_cast<uint16_t*>(grad)[at] = float_to_bf16(block[i * stride + c]);
        }
    }
  }

  static void lora_gradient(const Experts& layer, int64_t e, LoraGradient which, const Tokens& tokens, const Backward& b) {
    const Lora& lora = *b.lora;
    auto at = [&](void* grad, DType dtype, int64_t rows) { return static_cast<uint8_t*>(grad) + e * rows * (dtype == DType::f32 ? 4 : 2); };
    const int64_t H = layer.hidden, I = layer.intermediate;
    const Outer gate_a{&b.grads, b.low_gate_column, &b.x, 0, tokens.input, false}, up_a{&b.grads, b.low_up_column, &b.x, 0, tokens.input, false};
    switch (which) {
      case LoraGradient::gate_a: {
        const Outer both[2] = {gate_a, up_a};
        return outer(lora.gate, both, lora.shared_a ? 2 : 1, tokens, H, false, at(lora.gate.grad_a, lora.gate.a_type, lora.gate.rank * H), lora.gate.a_type);
      }
      case LoraGradient::up_a:
        return outer(lora.up, &up_a, 1, tokens, H, false, at(lora.up.grad_a, lora.up.a_type, lora.up.rank * H), lora.up.a_type);
      case LoraGradient::gate_b: {
        const Outer term{&b.low_gate, 0, &b.grads, 0, tokens.output, false};
        return outer(lora.gate, &term, 1, tokens, I, true, at(lora.gate.grad_b, lora.gate.b_type, lora.gate.rank * I), lora.gate.b_type);
      }
      case LoraGradient::up_b: {
        const Outer term{&b.low_up, 0, &b.grads, b.up_column, tokens.output, false};
        return outer(lora.up, &term, 1, tokens, I, true, at(lora.up.grad_b, lora.up.b_type, lora.up.rank * I), lora.up.b_type);
      }
      case LoraGradient::down_a: {
        const Outer term{&b.d_low_down, 0, &b.hidden, 0, tokens.output, true};
        return outer(lora.down, &term, 1, tokens, I, false, at(lora.down.grad_a, lora.down.a_type, lora.down.rank * I), lora.down.a_type);
      }
      case LoraGradient::down_b: {
        const Outer term{&b.low_down, 0, &b.grad_out, 0, tokens.input, true};
        return outer(lora.down, &term, 1, tokens, H, true, at(lora.down.grad_b, lora.down.b_type, lora.down.rank * H), lora.down.b_type);
      }
    }
  }
};

}  // namespace
}  // namespace coterie
