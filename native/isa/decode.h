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

struct F32Scale : OneScale {
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
  const int64_t width = step * E::kRunScales / E::kScales;  // of columns that share a scale, or scales
  const uint8_t* const end_of_steps = block.data + layout.steps() * step_bytes;
  for (int64_t first = begin, n = begin / width * E::kRunScales; first < end; n++) {
    const int64_t stop = (n / E::kRunScales + 1) * width, last = stop < end ? stop : end, s = n / E::kScales;
    const int group = static_cast<int>(n % E::kScales), part = group % E::kRunScales;
    const uint8_t* const codes = block.data + s * step_bytes + layout.codes_at(panels) + (first - s * step) / E::kRunColumns * E::kRunLines * stride;
    const uint8_t* const tail = block.data + s * step_bytes + layout.shared_at(panels);
    for (int p = 0; p < panels; p++) {
      auto scale = Isa::set1(E::Codes::kUnit), minimum = Isa::zero();
      if constexpr (E::kStepScale) scale = Isa::mul(scale, E::template scale<Isa>(tail, p, group));
      if constexpr (E::kMinimum) minimum = Isa::mul(E::template minimum<Isa>(tail, p, group), Isa::set1(-1.0f));
      if constexpr (E::kRowScale) scale = Isa::mul(scale, Isa::load(reinterpret_cast<const float*>(E::row_scale(end_of_steps, p))));
      auto minus_zero = Isa::set1(-static_cast<float>(E::Codes::kOffset));
      if constexpr (E::kStepZero) minus_zero = Isa::mul(Isa::load_bytes(E::step_zero(tail, panels, p)), Isa::set1(-1.0f));
      if constexpr (E::kRowZero) minus_zero = Isa::mul(Isa::load_bytes(E::row_zero(end_of_steps, panels, p)), Isa::set1(-1.0f));
      const auto value = [&](auto v) { return E::kMinimum ? Isa::fma(v, scale, minimum) : Isa::mul(v, scale); };
      const uint8_t* from = codes + p * kLine;
      uint8_t* out = to + (first - begin) / 2 * stride + p * kLine;
      for (int64_t k = first; k < last; k += E::kRunColumns, from += E::kRunLines * stride, out += E::Codes::kPairs * stride)
        each_pair<Isa, typename E::Codes, E::kZero, E::kRunScales>(
            from, part, stride, minus_zero, [&](int i, auto a, auto b) { Isa::store_pairs(out + i * stride, value(a), value(b)); });
    }
    if (part == E::kRunScales - 1) first = last;
  }
}

// A whole block with codes as bf16 pairs and the scales as they are.
template <class Isa, class E>
void decode_unscaled(const Layout& layout, const Block& block, uint8_t* to) {
  const int64_t stride = block.panels * kLine, lines = layout.step / E::kRunColumns;
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

// Narrow codes with scales in steps -> bytes with a scale per activation group: code = round(value / group's scale) + 128, the group's scale being the
// smallest that keeps the codes within 8 bits. The ratio of the scales, and a minimum, are whole numbers of 1/128. Adds about a tenth of the rounding
// error of a format of 4 bits.
template <class Isa, class E>
void decode_bytes(const Layout& layout, const Block& block, uint8_t* to) {
  using Codes = typename E::Codes;
  const int panels = block.panels;
  const int64_t cols = layout.padded_cols(), step = E::kStep ? E::kStep : layout.step, step_bytes = layout.step_bytes(panels), stride = panels * kLine;
  const int64_t runs = step / E::kRunColumns, width = step / E::kScales;
  const auto most = Isa::set1((E::kZero ? 15.0f : E::kMinimum ? 1.0f : static_cast<float>(Codes::kOffset)) / 127.0f);
  auto tail_of = [&](int64_t s) { return block.data + s * step_bytes + layout.shared_at(panels); };
  for (int64_t begin = 0; begin < cols; begin += kActivationGroup) {
    const int64_t end = begin + kActivationGroup < cols ? begin + kActivationGroup : cols;
    uint8_t* const scales = to + (end - begin) / 4 * stride;
    for (int p = 0; p < panels; p++) {
      auto scale_of = [&](int64_t n) { return E::template scale<Isa>(tail_of(n / E::kScales), p, static_cast<int>(n % E::kScales)); };
      auto minimum_of = [&](int64_t n) { return E::template minimum<Isa>(tail_of(n / E::kScales), p, static_cast<int>(n % E::kScales)); };
      auto largest = Isa::zero();
      for (int64_t n = begin / width; n < end / width; n++) {
        if constexpr (E::kMinimum) {
          const auto minimum = minimum_of(n), above = Isa::mul(scale_of(n), Isa::set1((1 << Codes::kBits) - 1));
          largest = Isa::max_abs(Isa::max_abs(largest, minimum), Isa::fma(minimum, Isa::set1(-1.0f), above));
        } else {
          largest = Isa::max_abs(largest, scale_of(n));
        }
      }
      const auto group_scale = Isa::mul(largest, most), inverse = Isa::ratio(128.0f, group_scale);
      auto stored = Isa::mul(group_scale, Isa::set1(Codes::kUnit));
      if constexpr (E::kRowScale) stored = Isa::mul(stored, Isa::load(reinterpret_cast<const float*>(E::row_scale(block.data + layout.steps() * step_bytes, p))));
      Isa::store(reinterpret_cast<float*>(scales) + p * kPanelRows, stored);
      uint8_t* out = to + p * kLine;
      for (int64_t n = begin / width; n < end / width; n++) {
        const int64_t s = n / E::kScales, group = n % E::kScales;
        const auto ratio = Isa::nearest(Isa::mul(scale_of(n), inverse));
        auto below = Isa::mul(ratio, Isa::set1(Codes::kOffset));
        if constexpr (E::kStepZero) below = Isa::mul(ratio, Isa::load_bytes(E::step_zero(tail_of(s), panels, p)));
        if constexpr (E::kMinimum) below = Isa::nearest(Isa::mul(minimum_of(n), inverse));
        const typename Isa::Rescale rescale(ratio, Isa::fma(below, Isa::set1(-1.0f), Isa::set1(128.0f * 128.0f + 64.0f)));  // rounds
        const uint8_t* from = block.data + s * step_bytes + layout.codes_at(panels) + group * runs / E::kScales * E::kRunLines * stride + p * kLine;
        for (int64_t k = 0; k < width; k += E::kRunColumns, from += E::kRunLines * stride)
          each_quad<E::kRunColumns / 4, E::kRunScales>(group % E::kRunScales, [&](auto quad) {
            rescale(Codes::template bytes<Isa, decltype(quad)::value>(from, stride), out);
            out += stride;
          });
      }
    }
    to = scales + panels * kPanelRows * 4;
  }
}

}  // namespace
}  // namespace coterie
