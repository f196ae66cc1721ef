// Blocks of any weights written out in another encoding, for many rows to be multiplied with: bf16, or bytes with a scale per activation group.
#pragma once
#include "formats/encodings.h"
#include "isa/kernels.h"

namespace coterie {
namespace {

using Pairs = Encoding<Bf16Codes, NoScale, 0, false, false, Bf16>;

// The same codes without their scales, which stay where they are.
template <class E>
struct WrittenOut : Bf16Codes {
  static constexpr float kUnit = E::Codes::kUnit;
};
template <class E>
using Unscaled = Encoding<WrittenOut<E>, typename E::Scale, E::kStep, false, E::kRowScale, Bf16>;

struct F32Scale {
  static constexpr int kRowBytes = 4, kBlockBytes = 0;
  template <class Isa>
  static typename Isa::F load(const uint8_t* panel) {
    return Isa::load(reinterpret_cast<const float*>(panel));
  }
};
using Bytes = Encoding<ByteCodes, F32Scale, kActivationGroup, false, false, Int8>;

// Columns [begin, end), a multiple of 64 apart, as lines [columns / 2][panels] of bf16 pairs.
template <class Isa, class E>
void decode_pairs(const Layout& layout, const Block& block, int64_t begin, int64_t end, uint8_t* to) {
  const int panels = block.panels;
  const int64_t step = E::kStep ? E::kStep : layout.step, step_bytes = layout.step_bytes(panels), stride = panels * kLine;
  const uint8_t* const end_of_steps = block.data + layout.steps() * step_bytes;
  for (int64_t first = begin, s = begin / step; first < end; s++) {
    const int64_t last = (s + 1) * step < end ? (s + 1) * step : end;
    const uint8_t* const codes = block.data + s * step_bytes + (first - s * step) / E::kLineColumns * stride;
    const uint8_t* const tail = block.data + s * step_bytes + step / E::kLineColumns * stride;
    for (int p = 0; p < panels; p++) {
      auto scale = Isa::set1(E::Codes::kUnit);
      if constexpr (E::kStepScale) scale = Isa::mul(scale, E::Scale::template load<Isa>(E::step_scale(tail, p)));
      if constexpr (E::kRowScale) scale = Isa::mul(scale, Isa::load(reinterpret_cast<const float*>(E::row_scale(end_of_steps, p))));
      auto minus_zero = Isa::set1(-8.0f);
      if constexpr (E::kStepZero) minus_zero = Isa::mul(Isa::load_bytes(E::step_zero(tail, panels, p)), Isa::set1(-1.0f));
      if constexpr (E::kRowZero) minus_zero = Isa::mul(Isa::load_bytes(E::row_zero(end_of_steps, panels, p)), Isa::set1(-1.0f));
      const uint8_t* from = codes + p * kLine;
      uint8_t* out = to + (first - begin) / 2 * stride + p * kLine;
      for (int64_t k = first; k < last; k += E::kLineColumns, from += stride, out += E::Codes::kPairs * stride)
        each_pair<Isa, typename E::Codes, E::kZero>(from, minus_zero, [&](int i, auto a, auto b) {
          Isa::store_pairs(out + i * stride, Isa::mul(a, scale), Isa::mul(b, scale));
        });
    }
    first = last;
  }
}

// A whole block with codes as bf16 pairs and the scales as they are.
template <class Isa, class E>
void decode_unscaled(const Layout& layout, const Block& block, uint8_t* to) {
  const int64_t stride = block.panels * kLine, lines = layout.step / E::kLineColumns;
  const int64_t step_tail = layout.step_bytes(block.panels) - lines * stride, block_tail = block.panels * kPanelRows * layout.block_row_bytes;
  const uint8_t* from = block.data;
  for (int64_t s = 0; s < layout.steps(); s++) {
    for (int64_t n = 0; n < lines; n++, from += stride, to += E::Codes::kPairs * stride)
      for (int p = 0; p < block.panels; p++) store_line<Isa, typename E::Codes>(from + p * kLine, to + p * kLine, stride);
    memcpy(to, from, step_tail);
    from += step_tail;
    to += step_tail;
  }
  memcpy(to, from, block_tail);
}

// 4-bit codes with a scale per step -> bytes with a scale per activation group: code = round(value * step's scale / group's scale) + 128, the group's
// scale being the smallest that keeps the codes within 8 bits. Adds about a tenth of the format's own rounding error.
template <class Isa, class E>
void decode_bytes(const Layout& layout, const Block& block, uint8_t* to) {
  using Codes = typename E::Codes;
  const int panels = block.panels;
  const int64_t cols = layout.padded_cols(), step = E::kStep ? E::kStep : layout.step, step_bytes = layout.step_bytes(panels), stride = panels * kLine;
  const int64_t lines = step / E::kLineColumns;
  const auto most = Isa::set1((E::kZero ? 15.0f : static_cast<float>(Codes::kOffset)) / 127.0f);
  auto tail_of = [&](int64_t s) { return block.data + s * step_bytes + lines * stride; };
  for (int64_t begin = 0; begin < cols; begin += kActivationGroup) {
    const int64_t end = begin + kActivationGroup < cols ? begin + kActivationGroup : cols;
    uint8_t* const scales = to + (end - begin) / 4 * stride;
    for (int p = 0; p < panels; p++) {
      auto scale_of = [&](int64_t s) { return E::Scale::template load<Isa>(E::step_scale(tail_of(s), p)); };
      auto largest = Isa::zero();
      for (int64_t s = begin / step; s < end / step; s++) largest = Isa::max_abs(largest, scale_of(s));
      const auto group_scale = Isa::mul(largest, most), inverse = Isa::ratio(128.0f, group_scale);
      auto stored = Isa::mul(group_scale, Isa::set1(Codes::kUnit));
      if constexpr (E::kRowScale) stored = Isa::mul(stored, Isa::load(reinterpret_cast<const float*>(E::row_scale(tail_of(layout.steps()) - lines * stride, p))));
      Isa::store(reinterpret_cast<float*>(scales) + p * kPanelRows, stored);
      uint8_t* out = to + p * kLine;
      for (int64_t s = begin / step; s < end / step; s++) {
        const uint8_t* zero = nullptr;
        if constexpr (E::kStepZero) zero = E::step_zero(tail_of(s), panels, p);
        const typename Isa::Rescale rescale(Isa::mul(scale_of(s), inverse), zero, Codes::kOffset);
        const uint8_t* from = block.data + s * step_bytes + p * kLine;
        for (int64_t n = 0; n < lines; n++, from += stride, out += 2 * stride) {
          rescale(Codes::template bytes<Isa, 0>(from), out);
          rescale(Codes::template bytes<Isa, 1>(from), out + stride);
        }
      }
    }
    to = scales + panels * kPanelRows * 4;
  }
}

}  // namespace
}  // namespace coterie
