#include "formats/unpack.h"

#include <algorithm>

#include "formats/encodings.h"

namespace coterie {
namespace {

// Where the parts of one row of a block are.
template <class E>
struct Row {
  const Layout& layout;
  int64_t start, end;  // of the block's steps, in the matrix
  int panels, panel, lane;

  Row(const Layout& layout, int64_t row)
      : layout(layout), panels(layout.panels_of(row / kBlockRows)), panel(static_cast<int>(row % kBlockRows / kPanelRows)),
        lane(static_cast<int>(row % kPanelRows)) {
    start = layout.block_start(row / kBlockRows);
    end = start + layout.steps() * layout.step_bytes(panels);
  }

  int64_t step(int64_t column) const { return start + column / layout.step * layout.step_bytes(panels); }
  int64_t tail(int64_t column) const { return step(column) + layout.step_code_bytes(panels); }
  int64_t code(int64_t column) const {
    const int64_t in_step = column % layout.step, in_line = in_step % E::kLineColumns;
    const int64_t word = step(column) + (in_step / E::kLineColumns * panels + panel) * kLine + lane * 4;
    return E::Codes::kBits == 16 ? word + in_line * 2 : word + kQuadOrder[in_line % 4];
  }
  int64_t step_scale(int64_t column) const { return tail(column) + (E::Scale::kRowBytes ? (panel * kPanelRows + lane) * E::Scale::kRowBytes : 0); }
  int64_t zero(int64_t column) const {
    const int64_t at = panel * kPanelRows + lane;
    return E::kStepZero ? tail(column) + panels * kPanelRows * E::Scale::kRowBytes + at : end + panels * kPanelRows * 4 + at;
  }
  int64_t row_scale() const { return end + (panel * kPanelRows + lane) * 4; }
};

template <class E>
uint16_t code_at(const uint8_t* at, int64_t column) {
  if constexpr (E::Codes::kBits == 16) {
    uint16_t half;
    memcpy(&half, at, 2);
    return half;
  }
  if constexpr (E::Codes::kBits == 4) return *at >> (column % 8 < 4 ? 0 : 4) & 15;
  return *at;
}

template <class E>
void unpack(const Layout& layout, const uint8_t* matrix, int64_t begin, int64_t end, float* to) {
  for (int64_t r = begin; r < end; r++) {
    const Row<E> row(layout, r);
    float row_scale = 1.0f;
    if constexpr (E::kRowScale) memcpy(&row_scale, matrix + row.row_scale(), 4);
    for (int64_t k = 0; k < layout.cols; k++) {
      int zero = E::Codes::kOffset;
      if constexpr (E::kZero) zero = matrix[row.zero(k)];
      float value = E::Codes::value(code_at<E>(matrix + row.code(k), k), zero);
      float scale = row_scale;
      if constexpr (E::kStepScale) scale *= E::Scale::value(matrix + row.step_scale(k));
      to[r * layout.cols + k] = E::kStepScale || E::kRowScale ? scale * value : value;
    }
  }
}

template <class E>
bool pack(const Layout& layout, const Codes& source, int64_t begin, int64_t end, uint8_t* matrix) {
  constexpr int kCodeBytes = E::Codes::kBits == 16 ? 2 : 1;
  const int64_t steps = (layout.cols + layout.step - 1) / layout.step;
  bool valid = true;
  for (int64_t r = begin; r < end && valid; r++) {
    const Row<E> row(layout, r);
    uint16_t padding = E::kStepZero ? 0 : E::Codes::kPadding;  // columns beyond the matrix stand for zero
    if constexpr (E::kRowScale) memcpy(matrix + row.row_scale(), source.row_scale + r, 4);
    if constexpr (E::kRowZero) matrix[row.zero(0)] = static_cast<uint8_t>(padding = source.zero[r]);
    const uint8_t* const codes = source.codes + r * layout.cols * kCodeBytes;
    for (int64_t s = 0; s < layout.steps(); s++) {
      const int64_t first = s * layout.step;
      if (first < layout.cols) {
        if constexpr (E::kStepScale) {
          constexpr int kBytes = E::Scale::kBlockBytes ? 4 : E::Scale::kRowBytes;
          const uint8_t* scale = source.scale + ((E::Scale::kBlockBytes ? r / kScaleTileRows : r) * steps + s) * kBytes;
          valid &= E::Scale::valid(scale);
          if constexpr (E::Scale::kBlockBytes > 0)
            E::Scale::store(E::Scale::value(scale), matrix + row.step_scale(first));
          else
            memcpy(matrix + row.step_scale(first), scale, kBytes);
        }
        if constexpr (E::kStepZero) matrix[row.zero(first)] = source.zero[r * steps + s];
      }
      uint8_t* to = matrix + row.code(first);
      for (int64_t k = first; k < first + layout.step; k += E::kLineColumns, to += row.panels * kLine) {
        uint16_t line[E::kLineColumns];
        for (int i = 0; i < E::kLineColumns; i++) {
          line[i] = padding;
          if (k + i >= layout.cols) continue;
          if constexpr (E::Codes::kBits == 16)
            memcpy(&line[i], codes + (k + i) * 2, 2);
          else
            valid &= E::Codes::valid(line[i] = codes[k + i]);
        }
        if constexpr (E::Codes::kBits == 16)
          memcpy(to, line, sizeof line);
        else
          for (int i = 0; i < 4; i++) to[kQuadOrder[i]] = static_cast<uint8_t>(E::Codes::kBits == 8 ? line[i] : line[i] | line[(i + 4) % E::kLineColumns] << 4);
      }
    }
  }
  return valid;
}

}  // namespace

void unpack_blocks(const Layout& layout, const uint8_t* matrix, int64_t begin, int64_t end, float* to) {
  with_encoding(layout, [&](auto encoding) {
    unpack<decltype(encoding)>(layout, matrix, begin * kBlockRows, std::min(layout.rows, end * kBlockRows), to);
  });
}

bool pack_codes_of_blocks(const Layout& layout, const Codes& source, int64_t begin, int64_t end, uint8_t* matrix) {
  return with_encoding(layout, [&](auto encoding) {
    return pack<decltype(encoding)>(layout, source, begin * kBlockRows, std::min(layout.rows, end * kBlockRows), matrix);
  });
}

}  // namespace coterie
