#include "formats/unpack.h"

#include <algorithm>

#include "formats/encodings.h"

namespace coterie {
namespace {

struct Affine {
  float scale, minimum;
};

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
  int64_t tail(int64_t column) const { return step(column) + layout.shared_at(panels); }
  int64_t run(int64_t column) const {
    return step(column) + layout.codes_at(panels) + (column % layout.step / E::kRunColumns * E::kRunLines * panels + panel) * kLine + lane * 4;
  }
  int64_t tail_of_panel(int64_t column) const { return tail(column) + panel * kPanelRows * E::Scale::kRowBytes; }
  int64_t zero(int64_t column) const {
    const int64_t at = panel * kPanelRows + lane;
    return E::kStepZero ? tail(column) + panels * kPanelRows * E::Scale::kRowBytes + at : end + panels * kPanelRows * 4 + at;
  }
  int64_t row_scale() const { return end + (panel * kPanelRows + lane) * 4; }
};

// Where the bits of column i of a run are: lines of lower bits, behind one of upper bits where codes are split.
template <class E>
struct Place {
  static constexpr int kHigh = E::Codes::kHighBits, kLow = E::Codes::kBits - kHigh, kColumns = 32 / kLow;
  static constexpr int kLowMask = (1 << kLow) - 1, kHighMask = (1 << kHigh) - 1;
  int line, byte, low_shift, high_shift;

  explicit Place(int64_t i)
      : line(static_cast<int>(i / kColumns) + (kHigh > 0)), byte(kQuadOrder[i % 4]), low_shift(lower_bit<typename E::Codes>(static_cast<int>(i))),
        high_shift(upper_bit<typename E::Codes>(static_cast<int>(i))) {}
};

template <class E>
uint16_t code_at(const uint8_t* run, int64_t stride, int64_t column) {
  if constexpr (E::Codes::kBits == 16) {
    uint16_t half;
    memcpy(&half, run + column * 2, 2);
    return half;
  } else {
    using P = Place<E>;
    const P at(column);
    const int low = run[at.line * stride + at.byte] >> at.low_shift & P::kLowMask;
    return static_cast<uint16_t>(low | (run[at.byte] >> at.high_shift & P::kHighMask) << P::kLow);
  }
}

// What scales weights in a column's step, and what is taken off.
template <class E>
Affine affine_at(const uint8_t* matrix, const Row<E>& row, int64_t column) {
  using Scale = typename E::Scale;
  Affine found{1.0f, 0.0f};
  if constexpr (Scale::kBlockBytes > 0) found.scale = Scale::value(matrix + row.tail(column));
  if constexpr (Scale::kRowBytes > 0) {
    uint8_t record[Scale::kRowBytes];
    for (int i = 0; i < Scale::kRowBytes; i++) record[i] = matrix[row.tail_of_panel(column) + record_byte(Scale::kHalves, row.lane, i)];
    [[maybe_unused]] const int group = static_cast<int>(column % row.layout.step * E::kScales / row.layout.step);
    if constexpr (E::kRecord)
      found.scale = Scale::value(record, group);
    else
      found.scale = Scale::value(record);
    if constexpr (E::kMinimum) found.minimum = Scale::minimum(record, group);
  }
  return found;
}

template <class E>
void unpack(const Layout& layout, const uint8_t* matrix, int64_t begin, int64_t end, float* to) {
  for (int64_t r = begin; r < end; r++) {
    const Row<E> row(layout, r);
    float row_scale = 1.0f;
    if constexpr (E::kRowScale) memcpy(&row_scale, matrix + row.row_scale(), 4);
    const int64_t width = layout.step / E::kScales;
    Affine affine{};
    for (int64_t k = 0; k < layout.cols; k++) {
      if (k % width == 0) affine = affine_at<E>(matrix, row, k);
      int zero = E::Codes::kOffset;
      if constexpr (E::kZero) zero = matrix[row.zero(k)];
      const uint16_t code = code_at<E>(matrix + row.run(k), row.panels * kLine, k % layout.step % E::kRunColumns);
      const float value = E::Codes::value(code, zero);
      to[r * layout.cols + k] = E::kStepScale || E::kRowScale ? row_scale * affine.scale * value - affine.minimum : value;
    }
  }
}

}  // namespace

void unpack_blocks(const Layout& layout, const uint8_t* matrix, int64_t begin, int64_t end, float* to) {
  with_encoding(layout, [&](auto encoding) {
    unpack<decltype(encoding)>(layout, matrix, begin * kBlockRows, std::min(layout.rows, end * kBlockRows), to);
  });
}

}  // namespace coterie
