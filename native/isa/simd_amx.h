// AMX: 32 rows by 2 panels at a time in eight tile registers; batches too small to fill tiles go through AVX512.
#pragma once
#include "isa/simd_avx512_bf16.h"

namespace coterie {
namespace {

template <class Tiles>
struct Amx : Avx512Bf16 {
  static constexpr bool kTiles = true;
  static constexpr int kTilesFrom = 8;       // rows from which tiles are used
  static constexpr int kTileCols = 64;       // columns of int8 in a tile
  static constexpr int kTileChunk = 32;      // rows of one call to `multiply_tiles`
  static constexpr int64_t kFloatMacs = 32;  // `dots` measures the AVX512 rate

  static bool supports(const Layout& layout, bool integer) {
    if (!integer) return layout.format == Format::bf16;
    if (layout.format == Format::int8) return layout.group % kTileCols == 0;
    return layout.group != 0;
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

  // out += tiles over `steps` lines of 16 column groups; `x` rows are `stride` bytes apart.
  template <bool Two, bool Integer>
  static void accumulate(const uint8_t* x, int64_t stride, const uint8_t* w0, const uint8_t* w1, int64_t steps) {
    Tiles::template zero<0>();
    Tiles::template zero<1>();
    if (Two) Tiles::template zero<2>(), Tiles::template zero<3>();
    for (int64_t s = 0; s < steps; s++) {
      Tiles::template load<4>(x + s * 64, stride);
      Tiles::template load<6>(w0 + s * 16 * kLine, kLine);
      Tiles::template load<7>(w1 + s * 16 * kLine, kLine);
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

  // Rows first..first+count (count <= 32) of `x`, contiguous at `data`, times four panels: out[m][64].
  // `scale`, per panel: of decoded bytes f32 per activation group, else bf16 per group of weights or f32 for the whole row.
  template <bool Two>
  static void run(const Layout& layout, const uint8_t* const* weight, const uint8_t* const* scale, bool decoded, const Staged& x, const uint8_t* data,
                  const int32_t* index, int count, float* out) {
    configure(count < 16 ? count : 16, count - 16);
    const bool grouped = !decoded && layout.group;
    const int64_t unit = grouped ? layout.group : kActivationGroup, units = (x.cols + unit - 1) / unit;
    const int32_t* offset = grouped ? x.offset : x.group_offset;
    const int64_t steps = layout.format == Format::bf16 ? x.cols / 32 : x.cols / kTileCols, row = kBlockPanels * kPanelRows;
    for (int p = 0; p < kBlockPanels; p += 2) {
      float* to = out + p * kPanelRows;
      if (layout.format == Format::bf16) {
        accumulate<Two, false>(data, x.row_bytes, weight[p], weight[p + 1], steps);
        store_tiles<Two>(to, row * 4);
        continue;
      }
      for (int m = 0; m < count; m++)
        for (int q = 0; q < 2; q++) Avx512::store(to + m * row + q * kPanelRows, Avx512::zero());
      for (int64_t u = 0; u < units; u++) {
        alignas(64) int32_t sums[kTileChunk][2 * kPanelRows];
        const int64_t begin = u * (unit / kTileCols), left = steps - begin, there = left < unit / kTileCols ? left : unit / kTileCols;
        accumulate<Two, true>(data + begin * 64, x.row_bytes, weight[p] + begin * 16 * kLine, weight[p + 1] + begin * 16 * kLine, there);
        store_tiles<Two>(sums, sizeof sums[0]);
        for (int q = 0; q < 2; q++) {
          F ws = Avx512::set1(1.0f);
          if (decoded) ws = Avx512::load(reinterpret_cast<const float*>(scale[p + q]) + u * kPanelRows);
          if (grouped) ws = Avx512::load_bf16(scale[p + q] + u * kPanelRows * 2);
          for (int m = 0; m < count; m++) {
            const int64_t i = index[m];
            const I sum = Avx512::add(_mm512_load_si512(sums[m] + q * kPanelRows), Avx512::integer_set1(offset[i * units + u]));
            float* total = to + m * row + q * kPanelRows;
            const F s = Avx512::mul(ws, Avx512::set1(x.scale[i * x.groups() + u * unit / kActivationGroup]));
            Avx512::store(total, Avx512::fma(Avx512::to_float(sum), s, Avx512::load(total)));
          }
        }
      }
      if (!decoded && !layout.group)
        for (int q = 0; q < 2; q++) {
          const F ws = Avx512::load(reinterpret_cast<const float*>(scale[p + q]));
          for (int m = 0; m < count; m++) {
            float* total = to + m * row + q * kPanelRows;
            Avx512::store(total, Avx512::mul(Avx512::load(total), ws));
          }
        }
    }
    Tiles::release();
  }

  static void multiply_tiles(const Layout& layout, const uint8_t* const* weight, const uint8_t* const* scale, bool decoded, const Staged& x,
                             const uint8_t* data, const int32_t* index, int count, float* out) {
    if (count > 16)
      run<true>(layout, weight, scale, decoded, x, data, index, count, out);
    else
      run<false>(layout, weight, scale, decoded, x, data, index, count, out);
  }
};

}  // namespace
}  // namespace coterie
