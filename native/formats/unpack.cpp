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
  const int64_t steps = (layout.cols + layout.step - 1) / layout.step;
  for (int64_t r = begin; r < end; r++) {
    const Row<E> row(layout, r);
    if constexpr (E::kRowScale) memcpy(matrix + row.row_scale(), source.row_scale + r, 4);
    for (int64_t k = 0; k < layout.padded_cols(); k++) {
      // Columns beyond the matrix stand for zero.
      uint16_t code = E::Codes::kPadding;
      if constexpr (E::kZero) code = k < layout.cols || !E::kStepZero ? source.zero[r * (E::kStepZero ? steps : 1) + (E::kStepZero ? k / layout.step : 0)] : 0;
      if (k < layout.cols) {
        if constexpr (E::Codes::kBits == 16)
          memcpy(&code, source.codes + (r * layout.cols + k) * 2, 2);
        else
          code = source.codes[r * layout.cols + k];
        if constexpr (E::Codes::kBits != 16)
          if (!E::Codes::valid(code)) return false;
        if (k % layout.step == 0) {
          const int64_t s = k / layout.step;
          if constexpr (E::kStepScale) {
            constexpr int kBytes = E::Scale::kBlockBytes ? 4 : E::Scale::kRowBytes;
            const uint8_t* scale = source.scale + ((E::Scale::kBlockBytes ? r / kScaleTileRows : r) * steps + s) * kBytes;
            if (!E::Scale::valid(scale)) return false;
            if constexpr (E::Scale::kBlockBytes > 0)
              E::Scale::store(E::Scale::value(scale), matrix + row.step_scale(k));
            else
              memcpy(matrix + row.step_scale(k), scale, kBytes);
          }
          if constexpr (E::kStepZero) matrix[row.zero(k)] = source.zero[r * steps + s];
          if constexpr (E::kRowZero) matrix[row.zero(k)] = source.zero[r];
        }
      }
      uint8_t* at = matrix + row.code(k);
      if constexpr (E::Codes::kBits == 16)
        memcpy(at, &code, 2);
      else if constexpr (E::Codes::kBits == 8)
        *at = static_cast<uint8_t>(code);
      else
        *at = static_cast<uint8_t>(k % 8 < 4 ? (*at & 0xf0) | code : (*at & 0x0f) | code << 4);
    }
  }
  return true;
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
