// A packed weight matrix [rows, cols] as one stream of bytes. docs/format.md has it byte by byte.
#pragma once
#include <cstdint>

namespace coterie {

constexpr int kPanelRows = 16;    // rows of a panel: one 512-bit vector of 32-bit lanes
constexpr int kBlockPanels = 4;   // panels of a block; the last block of a matrix may have fewer
constexpr int kBlockRows = kBlockPanels * kPanelRows;
constexpr int kColumnAlign = 64;  // columns are padded to a multiple of this, and to whole steps
constexpr int kLine = 64;         // bytes that feed one dot-product instruction
constexpr int kScaleTileRows = 128;  // rows that share a scale where one is kept for a tile of rows and columns

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A matrix is blocks of 64 rows; a block is steps and, behind them, what its rows have once; a step is a few columns: lines of codes, those of the
// block's panels side by side, and behind them, or before, what its columns share. Lines whose codes belong together are a run: one, or several where the upper bits
// of codes stand in a line of their own. Made by layout_of in formats/encodings.h.
struct Layout {
  int encoding;      // its number in formats/encodings.h
  int64_t rows, cols;
  int64_t group;     // columns that share a scale; 0: none, or one per row
  bool zero_point;   // stored ones

  int64_t step;          // columns of a step
  int step_scales;       // scales of a row in a step
  bool records;          // a row's scales are a record, which stands before the codes
  int run_columns, run_lines;
  int step_row_bytes;    // behind the codes of a step, for each row
  int step_block_bytes;  // behind the codes of a step, for the block
  int block_row_bytes;   // at the end of a block, for each row
  bool narrow;           // codes of fewer than 8 bits with scales in steps
  bool needs_largest;    // to be packed from floats: the largest magnitudes of tiles of the matrix, first
  int code_offset;       // what is added to codes to make them the unsigned bytes that int8 activations are multiplied with

  int64_t padded_cols() const { return round_up(cols, step > kColumnAlign ? step : kColumnAlign); }
  int64_t panels() const { return round_up(rows, kPanelRows) / kPanelRows; }
  int64_t blocks() const { return (panels() + kBlockPanels - 1) / kBlockPanels; }
  int panels_of(int64_t block) const {
    const int64_t left = panels() - block * kBlockPanels;
    return static_cast<int>(left < kBlockPanels ? left : kBlockPanels);
  }

  int64_t step_code_bytes(int panels) const { return step / run_columns * run_lines * kLine * panels; }
  // Where in a step its codes are, and what its columns share.
  int64_t codes_at(int panels) const { return records ? panels * kPanelRows * step_row_bytes : 0; }
  int64_t shared_at(int panels) const { return records ? 0 : step_code_bytes(panels); }
  int64_t step_bytes(int panels) const { return step_code_bytes(panels) + panels * kPanelRows * step_row_bytes + step_block_bytes; }
  int64_t steps() const { return padded_cols() / step; }
  int64_t block_bytes(int panels) const { return steps() * step_bytes(panels) + panels * kPanelRows * block_row_bytes; }
  int64_t block_start(int64_t block) const { return block * block_bytes(kBlockPanels); }
  // Of the whole matrix, padded to whole lines.
  int64_t bytes() const {
    const int64_t last = blocks() - 1;
    return round_up(block_start(last) + block_bytes(panels_of(last)), kLine);
  }
};

// Some bytes of a matrix that has a layout: one block.
struct Block {
  const uint8_t* data;
  int panels;
};

inline Block block_at(const Layout& layout, const uint8_t* matrix, int64_t block) {
  return {matrix + layout.block_start(block), layout.panels_of(block)};
}

// Where column k of a quad goes in an 8-bit line, and in either nibble half of a 4-bit line: k0 k2 k1 k3, so that
// even and odd bytes are natural bf16 pairs. The order is its own inverse.
constexpr int kQuadOrder[4] = {0, 2, 1, 3};

}  // namespace coterie
