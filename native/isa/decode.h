// 4-bit codes with a scale per group -> bytes with a scale per activation group, in plain C: code = round((q - zero) * group scale / panel scale)
// + 128, the panel scale being the smallest that keeps the codes within 8 bits. Adds under a tenth of the format's own rounding error.
#pragma once
#include "isa/pack.h"

namespace coterie {
namespace {

inline void decode_panel_portable(const Layout& layout, const uint8_t* weight, const uint8_t* scale, const uint8_t* zero, uint8_t* codes,
                                  float* scales) {
  const int64_t cols = layout.padded_cols(), group = layout.group, lines_per_group = group / 8;
  const float most = (layout.zero_point ? 15.0f : 8.0f) / 127.0f;
  auto load_scales = [&](int64_t g, Lanes& to) {
    uint16_t half[kLanes];
    memcpy(half, scale + g * sizeof half, sizeof half);
    for (int lane = 0; lane < kLanes; lane++) to[lane] = bf16_to_float(half[lane]);
  };
  for (int64_t begin = 0; begin < cols; begin += kActivationGroup, scales += kLanes) {
    const int64_t end = begin + kActivationGroup < cols ? begin + kActivationGroup : cols;
    Lanes s, largest = {}, inverse;
    for (int64_t g = begin / group; g < end / group; g++) {
      load_scales(g, s);
      for (int lane = 0; lane < kLanes; lane++) {
        const float a = s[lane] < 0 ? -s[lane] : s[lane];
        largest[lane] = a > largest[lane] ? a : largest[lane];
      }
    }
    for (int lane = 0; lane < kLanes; lane++) {
      scales[lane] = largest[lane] * most;
      const float ratio = 128.0f / scales[lane];
      inverse[lane] = scales[lane] > 0.0f ? ratio : 0.0f;
    }
    for (int64_t g = begin / group; g < end / group; g++) {
      load_scales(g, s);
      int16_t ratio[kLine], centre[kLine];  // ratios in units of 1/128, one entry a byte of a line
      for (int lane = 0; lane < kLanes; lane++) {
        const auto units = static_cast<int16_t>((s[lane] * inverse[lane] + kRound) - kRound);
        for (int i = 4 * lane; i < 4 * lane + 4; i++) ratio[i] = units, centre[i] = layout.zero_point ? zero[g * kLanes + lane] : 8;
      }
      for (int64_t line = g * lines_per_group; line < (g + 1) * lines_per_group; line++) {
        const uint8_t* from = weight + line * kLine;
        uint8_t* to = codes + line * 2 * kLine;
        for (int i = 0; i < kLine; i++) {
          to[i] = static_cast<uint8_t>((((static_cast<int16_t>(from[i] & 15) - centre[i]) * ratio[i] + 64) >> 7) + 128);
          to[kLine + i] = static_cast<uint8_t>((((static_cast<int16_t>(from[i] >> 4) - centre[i]) * ratio[i] + 64) >> 7) + 128);
        }
      }
    }
  }
}

}  // namespace
}  // namespace coterie
