#include "formats/unpack.h"

#include <algorithm>

#include "formats/bfloat16.h"

namespace coterie {
namespace {

int quad_byte(int64_t k) { return kQuadOrder[k % 4]; }  // the order is its own inverse

float scale_at(const Layout& layout, const uint8_t* scale, int64_t group, int lane) {
  if (layout.group) {
    uint16_t half;
    memcpy(&half, scale + (group * kPanelRows + lane) * 2, 2);
    return bf16_to_float(half);
  }
  float value;
  memcpy(&value, scale + lane * 4, 4);
  return value;
}

}  // namespace

void unpack_panels(const Layout& layout, const Matrix& matrix, int64_t begin, int64_t end, float* to) {
  for (int64_t row = begin * kPanelRows; row < std::min(layout.rows, end * kPanelRows); row++) {
    const int64_t panel = row / kPanelRows;
    const int lane = static_cast<int>(row % kPanelRows);
    const uint8_t* weight = matrix.weight + panel * layout.weight_panel_bytes() + lane * 4;
    for (int64_t k = 0; k < layout.cols; k++) {
      const uint8_t* word = weight + k / layout.columns_per_line() * kLine;
      float& value = to[row * layout.cols + k];
      if (layout.format == Format::bf16) {
        uint16_t half;
        memcpy(&half, word + k % 2 * 2, 2);
        value = bf16_to_float(half);
        continue;
      }
      const int64_t group = layout.group ? k / layout.group : 0;
      const float scale = scale_at(layout, matrix.scale + panel * layout.scale_panel_bytes(), group, lane);
      if (layout.format == Format::int8) {
        value = scale * static_cast<float>(word[quad_byte(k)] - 128);
      } else {
        const int code = word[quad_byte(k)] >> (k % 8 < 4 ? 0 : 4) & 15;
        const int zero = layout.zero_point ? matrix.zero[panel * layout.zero_panel_bytes() + group * kPanelRows + lane] : 8;
        value = scale * static_cast<float>(code - zero);
      }
    }
  }
}

}  // namespace coterie
