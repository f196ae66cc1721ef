// AMX: 32 rows by 2 panels at a time in eight tile registers; batches too small to fill tiles go through AVX512.
#pragma once
#include "isa/simd_avx512_bf16.h"

namespace coterie {
namespace {

template <class Tiles>
struct Amx : Avx512Bf16 {
  static constexpr bool kTiles = true;
  // Rows from which tiles are used: bytes, which are decoded for them, are multiplied as fast without.
  static constexpr int tiles_from(bool integer) { return integer ? 32 : 8; }
  static constexpr int kTileCols = 64;       // columns of int8 in a tile
  static constexpr int kTileChunk = 32;      // rows of one call to `multiply_tiles`
  static constexpr int kFetchedBits = 16;    // these are Intel's
  static constexpr int64_t kFloatMacs = 32;  // `dots` measures the AVX512 rate

  static bool supports(const Layout& layout, bool integer) {
    if (!integer || layout.narrow) return true;  // they are decoded
    return layout.run_columns == 4 && layout.step % kTileCols == 0;
  }

  // Accumulators 0-3 (row half, panel), activations 4-5 (row half), weights 6-7 (panel).
  static void configure(int first, int second) {
    TileConfig config;
    for (int t = 0; t < 8; t++) {
      config.bytes_per_row[t] = 64;
      config.rows[t] = static_cast<uint8_t>(t >= 6 ? 16 : (t < 4 ? t / 2 : t - 4) == 0 ? first : second > 0 ? second : 1);
    }
    Tiles::configure(config);
  }

  // out += tiles over `steps` times 16 lines of panels w0 and w1, the lines `line_stride` bytes apart; `x` rows are `stride` bytes apart.
  template <bool Two, bool Integer>
  static void accumulate(const uint8_t* x, int64_t stride, const uint8_t* w0, const uint8_t* w1, int64_t line_stride, int64_t steps) {
    Tiles::template zero<0>();
    Tiles::template zero<1>();
    if (Two) Tiles::template zero<2>(), Tiles::template zero<3>();
    for (int64_t s = 0; s < steps; s++) {
      Tiles::template load<4>(x + s * 64, stride);
      Tiles::template load<6>(w0 + s * 16 * line_stride, line_stride);
      Tiles::template load<7>(w1 + s * 16 * line_stride, line_stride);
      tile_dot<0, 4, 6, Integer>();
      tile_dot<1, 4, 7, Integer>();
      if (Two) {
        Tiles::template load<5>(x + 16 * stride + s * 64, stride);
        tile_dot<2, 5, 6, Integer>();
        tile_dot<3, 5, 7, Integer>();
      }
    }
  }

  template <int c, int a, int b, bool Integer>
  static void tile_dot() {
    if constexpr (Integer)
      Tiles::template dot_int8<c, a, b>();
    else
      Tiles::template dot_bf16<c, a, b>();
  }

  template <bool Two>
  static void store_tiles(void* to, int64_t stride) {
    uint8_t* out = static_cast<uint8_t*>(to);
    Tiles::template store<0>(out, stride);
    Tiles::template store<1>(out + kLine, stride);
    if (Two) {
      Tiles::template store<2>(out + 16 * stride, stride);
      Tiles::template store<3>(out + 16 * stride + kLine, stride);
    }
  }

  // Two panels of a block from `panel` on; of an odd last one the second is the first again, and overwritten or unused.
  template <class E, bool Two>
  static void two_panels(const Layout& layout, const Block& block, int panel, const Staged& x, const uint8_t* data, const int32_t* index, int count,
                         float* out) {
    constexpr bool kInteger = !std::is_same_v<E, Pairs>, kDecoded = std::is_same_v<E, Bytes>;
    const int64_t stride = block.panels * kLine;
    const int second = panel + 1 < block.panels ? 1 : 0;
    const uint8_t* at = block.data + panel * kLine;
    if constexpr (!kInteger) {
      accumulate<Two, false>(data, x.row_bytes, at, at + second * kLine, stride, x.cols / 32);
      return store_tiles<Two>(out, kBlockRows * 4);
    }
    for (int m = 0; m < count; m++)
      for (int q = 0; q < 2; q++) Avx512::store(out + m * kBlockRows + q * kPanelRows, Avx512::zero());
    const int64_t unit = kDecoded || !E::kStepScale ? kActivationGroup : layout.step, units = (x.cols + unit - 1) / unit;
    const int32_t* offset = kDecoded ? x.group_offset : x.offset;
    for (int64_t u = 0; u < units; u++) {
      alignas(64) int32_t sums[kTileChunk][2 * kPanelRows];
      const int64_t left = x.cols - u * unit, there = left < unit ? left : unit;
      accumulate<Two, true>(data + u * unit, x.row_bytes, at, at + second * kLine, stride, there / kTileCols);
      store_tiles<Two>(sums, sizeof sums[0]);
      at += there / 4 * stride;
      for (int q = 0; q < 2; q++) {
        F ws = Avx512::set1(1.0f);
        if constexpr (E::kStepScale) ws = E::template scale<Avx512>(at - panel * kLine, panel + q * second, 0);
        for (int m = 0; m < count; m++) {
          const int64_t i = index[m];
          const I sum = Avx512::add(_mm512_load_si512(sums[m] + q * kPanelRows), Avx512::integer_set1(offset[i * units + u]));
          float* total = out + m * kBlockRows + q * kPanelRows;
          const F s = Avx512::mul(ws, Avx512::set1(x.scale[i * x.groups() + u * unit / kActivationGroup]));
          Avx512::store(total, Avx512::fma(Avx512::to_float(sum), s, Avx512::load(total)));
        }
      }
      if constexpr (E::kStepScale) at += block.panels * kPanelRows * E::Scale::kRowBytes;
    }
    if constexpr (E::kRowScale)
      for (int q = 0; q < 2; q++) {
        const F ws = Avx512::load(reinterpret_cast<const float*>(E::row_scale(at - panel * kLine, panel + q * second)));
        for (int m = 0; m < count; m++) {
          float* total = out + m * kBlockRows + q * kPanelRows;
          Avx512::store(total, Avx512::mul(Avx512::load(total), ws));
        }
      }
  }

  // Rows first..first+count (count <= 32) of `x`, contiguous at `data`, times a block: out[m][64].
  template <class E>
  static void multiply_tiles(const Layout& layout, const Block& block, const Staged& x, const uint8_t* data, const int32_t* index, int count, float* out) {
    if constexpr (E::Codes::kBits >= 8 && (E::Codes::kInteger || std::is_same_v<E, Pairs>)) {
      configure(count < 16 ? count : 16, count - 16);
      for (int panel = 0; panel < block.panels; panel += 2)
        count > 16 ? two_panels<E, true>(layout, block, panel, x, data, index, count, out + panel * kPanelRows)
                   : two_panels<E, false>(layout, block, panel, x, data, index, count, out + panel * kPanelRows);
      Tiles::release();
    }
  }
};

}  // namespace
}  // namespace coterie
