// What training adds to the products of forward and backward: LoRA's products with A and B, and its gradients.
#pragma once
#include "isa/generic.h"

namespace coterie {
namespace {

template <class Isa>
struct Trainer {
  using E = Engine<Isa>;
  using F = typename Isa::F;

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
        E::add_pairs({panel, 1}, x, tokens.input + first, rows, product, false);
        for (int64_t m = 0; m < rows; m++) {
          float* v = product + m * kBlockRows;
          for (int i = 0; i < kPanelRows; i++) v[i] *= f.scaling;
          E::store_staged(v, kPanelRows, low, tokens.output[first + m], column + r);
        }
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
