// Blocks of transposed weights, made in the cache from weights where they lie: what the backward pass multiplies with.
#pragma once
#include "isa/decode.h"
#include "isa/pairs.h"

namespace coterie {
namespace {

// Columns [column, column + 64) of W as a block of W^T, from its line `line` on; zero from W's rows to its line `end`.
template <class Isa>
void transpose_block(const Layout& layout, const uint8_t* matrix, int64_t column, int64_t line, int64_t end, uint8_t* to) {
  constexpr int64_t kToStride = kBlockPanels * kLine;
  alignas(64) uint8_t decoded[kColumnAlign / 2 * kBlockPanels * kLine];
  with_encoding(layout, [&](auto encoding) {
    using Encoding = decltype(encoding);
    for (int64_t number = 0; number < layout.blocks(); number++) {
      const Block block = block_at(layout, matrix, number);
      const int64_t stride = block.panels * kLine;
      // The same columns of the next block: too short a run for the hardware to see what comes.
      const bool last = number + 1 == layout.blocks();
      const Block next = block_at(layout, matrix, last ? number : number + 1);
      const int64_t step = Encoding::kStep ? Encoding::kStep : layout.step, step_bytes = layout.step_bytes(next.panels);
      const uint8_t* const ahead = next.data + column / step * step_bytes + column % step / Encoding::kRunColumns * Encoding::kRunLines * next.panels * kLine;
      const int64_t lines = last ? 0 : kColumnAlign * step_bytes / step / kLine, squares = block.panels * kBlockPanels;
      const uint8_t* from = decoded;
      if constexpr (std::is_same_v<Encoding, Pairs>)
        from = block.data + column / 2 * stride;
      else
        decode_pairs<Isa, Encoding>(layout, block, column, column + kColumnAlign, decoded);
      for (int p = 0; p < block.panels; p++, line += kSquareLines)
        for (int q = 0; q < kBlockPanels; q++) {
          const int64_t square = p * kBlockPanels + q;
          for (int64_t l = lines * square / squares; l < lines * (square + 1) / squares; l++) Isa::prefetch(ahead + l * kLine);
          Isa::transpose(from + q * kSquareLines * stride + p * kLine, stride, to + line * kToStride + q * kLine, kToStride);
        }
    }
  });
  memset(to + line * kToStride, 0, (end - line) * kToStride);
}

}  // namespace
}  // namespace coterie
