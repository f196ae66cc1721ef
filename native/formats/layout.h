// The packed layout of one weight matrix [rows, cols]: panels of 16 rows, columns padded to 64. docs/format.md has it byte by byte.
#pragma once
#include <cstdint>

namespace coterie {

enum class Format : int { bf16 = 0, int8 = 1, int4 = 2 };

constexpr int kPanelRows = 16;    // rows of a panel: one 512-bit vector of 32-bit lanes
constexpr int kColumnAlign = 64;  // columns are padded to a multiple of this
constexpr int kLine = 64;         // bytes that feed one dot-product instruction

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Layout {
  Format format;
  int64_t rows, cols;
  int64_t group;  // columns sharing a scale; 0 = one scale per row
  bool zero_point;

  int64_t padded_cols() const { return round_up(cols, kColumnAlign); }
  int64_t panels() const { return round_up(rows, kPanelRows) / kPanelRows; }
  int64_t groups() const { return group ? padded_cols() / group : 1; }
  bool has_scale() const { return format != Format::bf16; }

  int64_t columns_per_line() const { return format == Format::bf16 ? 2 : format == Format::int8 ? 4 : 8; }
  int64_t weight_panel_bytes() const { return padded_cols() / columns_per_line() * kLine; }
  // Grouped scales are bf16, scales per row are f32.
  int64_t scale_panel_bytes() const { return has_scale() ? groups() * kPanelRows * (group ? 2 : 4) : 0; }
  int64_t zero_panel_bytes() const { return zero_point ? groups() * kPanelRows : 0; }
};

// One packed matrix: its parts, each a run of panels.
struct Matrix {
  const uint8_t* weight = nullptr;
  const uint8_t* scale = nullptr;
  const uint8_t* zero = nullptr;
};

// Where column k of a quad goes in an 8-bit line, and in either nibble half of a 4-bit line: k0 k2 k1 k3, so that
// even and odd bytes are natural bf16 pairs.
constexpr int kQuadOrder[4] = {0, 2, 1, 3};

}  // namespace coterie
