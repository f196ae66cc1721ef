// The hot loops: a few rows of activations times up to four panels of weights, over an instruction set `Isa`.
#pragma once
#include "isa/ahead.h"

namespace coterie {
namespace {

// Four panels of weights, all of one layout. Panels past the matrix repeat the first; their results are not used.
struct Block {
  const uint8_t* weight[kBlockPanels];
  const uint8_t* scale[kBlockPanels];
  const uint8_t* zero[kBlockPanels];
};

// Rows of staged activations that go through a tile together.
template <int M>
struct Rows {
  const uint8_t* data[M];
  const float* scale[M];
  const int32_t* offset[M];

  Rows(const Staged& x, const int32_t* index, bool decoded) {
    for (int m = 0; m < M; m++) {
      int64_t i = index[m];
      data[m] = x.data + i * x.row_bytes;
      scale[m] = x.scale + i * x.groups();
      offset[m] = decoded ? x.group_offset + i * x.groups() : x.offset + i * x.units();
    }
  }
};

// out[m][16 p + lane] = (with `add`: +=) sum over columns of weight * activation, in f32, for M rows and NP panels of bf16 weights.
template <class Isa, int M, int NP, class Ahead>
__attribute__((noinline)) void bf16_tile(const uint8_t* const* weight, const Rows<M>& rows, int64_t lines, float* out, const Ahead& ahead,
                                         bool add = false) {
  typename Isa::F acc[M][NP];
  for (int m = 0; m < M; m++)
    for (int p = 0; p < NP; p++) acc[m][p] = Isa::zero();
  for (int64_t line = 0; line < lines; line++) {
    ahead.template line<Isa>(line);
    typename Isa::Pair w[NP];
#pragma GCC unroll 4
    for (int p = 0; p < NP; p++) w[p] = Isa::load_pair(weight[p] + line * kLine);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      auto x = Isa::broadcast_pair(rows.data[m] + line * 2 * Isa::kFloatBytes);
#pragma GCC unroll 4
      for (int p = 0; p < NP; p++) acc[m][p] = Isa::dot(acc[m][p], w[p], x);
    }
  }
  for (int m = 0; m < M; m++)
    for (int p = 0; p < NP; p++) {
      float* to = out + (m * kBlockPanels + p) * kPanelRows;
      Isa::store(to, add ? Isa::add(acc[m][p], Isa::load(to)) : acc[m][p]);
    }
}

// How the integer tile reads weights and their scales.
enum class Codes { bytes, nibbles };       // one column quad a line, or two
enum class Scales { row, group, decoded };  // f32 per row at the end; bf16 per unit; f32 per unit (made by decode_panel)

template <class Isa, int M, int NP, Codes codes, Scales scales, bool Zero, int Unit = 0, class Ahead>
__attribute__((noinline)) void integer_tile(const Block& b, int panel, const Rows<M>& rows, int64_t cols, int64_t any_unit, float* out,
                                            const Ahead& ahead) {
  constexpr int kLineCols = codes == Codes::bytes ? 4 : 8;
  constexpr int kStep = 4 * Isa::kIntegerBytes;
  // A wide tile keeps its totals in `out`: registers are for the integer accumulators of the inner loop.
  constexpr bool kInRegisters = M * NP <= 4;
  typename Isa::F totals[kInRegisters ? M : 1][kInRegisters ? NP : 1];
  auto total = [out](int m, int p) { return out + (m * kBlockPanels + p) * kPanelRows; };
  auto get = [&](int m, int p) { return kInRegisters ? totals[m * kInRegisters][p * kInRegisters] : Isa::load(total(m, p)); };
  auto put = [&](int m, int p, const typename Isa::F& v) { kInRegisters ? void(totals[m * kInRegisters][p * kInRegisters] = v) : Isa::store(total(m, p), v); };
  for (int m = 0; m < M; m++)
    for (int p = 0; p < NP; p++) put(m, p, Isa::zero());

  const uint8_t *weight[NP], *scale[NP], *zero[NP];
  for (int p = 0; p < NP; p++) weight[p] = b.weight[panel + p], scale[p] = b.scale[panel + p], zero[p] = b.zero[panel + p];
  const Rows<M> x = rows;
  const int64_t unit = Unit ? Unit : any_unit, lines = cols / kLineCols;
  for (int64_t u = 0, line = 0; line < lines; u++) {
    typename Isa::I acc[M][NP];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      auto start = Zero ? Isa::integer_zero() : Isa::integer_set1(x.offset[m][u]);
#pragma GCC unroll 4
      for (int p = 0; p < NP; p++) acc[m][p] = start;
    }
    const int64_t end = Unit ? line + Unit / kLineCols : line + unit / kLineCols < lines ? line + unit / kLineCols : lines;
#pragma GCC unroll 1
    do {
      ahead.template line<Isa>(line);
#pragma GCC unroll 2
      for (int half = 0; half < (codes == Codes::bytes ? 1 : 2); half++) {
        typename Isa::Quad w[NP];
#pragma GCC unroll 4
        for (int p = 0; p < NP; p++) {
          const uint8_t* from = weight[p] + line * kLine;
          w[p] = codes == Codes::bytes ? Isa::load_quad(from) : half == 0 ? Isa::load_low_nibbles(from) : Isa::load_high_nibbles(from);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
          auto v = Isa::broadcast_quad(x.data[m] + line * (kLineCols * Isa::kIntegerBytes) + half * kStep);
#pragma GCC unroll 4
          for (int p = 0; p < NP; p++) acc[m][p] = Isa::dot(acc[m][p], w[p], v);
        }
      }
      line++;
    } while (line < end);
    typename Isa::F ws[NP], z[NP];
#pragma GCC unroll 4
    for (int p = 0; p < NP; p++) {
      if (scales == Scales::group) ws[p] = Isa::load_bf16(scale[p] + u * kPanelRows * 2);
      if (scales == Scales::decoded) ws[p] = Isa::load(reinterpret_cast<const float*>(scale[p]) + u * kPanelRows);
      if (Zero) z[p] = Isa::load_bytes(zero[p] + (scales == Scales::row ? 0 : u) * kPanelRows);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      auto xs = Isa::set1(x.scale[m][static_cast<uint64_t>(u * unit) / kActivationGroup]);
      typename Isa::F sum;
      if (Zero) sum = Isa::set1(static_cast<float>(x.offset[m][u]));
#pragma GCC unroll 4
      for (int p = 0; p < NP; p++) {
        auto v = Isa::to_float(acc[m][p]);
        if (Zero) v = Isa::fma(z[p], sum, v);
        put(m, p, Isa::fma(v, scales == Scales::row ? xs : Isa::mul(xs, ws[p]), get(m, p)));
      }
    }
  }
  for (int p = 0; p < NP; p++) {
    typename Isa::F ws = Isa::zero();
    if (scales == Scales::row) ws = Isa::load(reinterpret_cast<const float*>(scale[p]));
    for (int m = 0; m < M; m++)
      if (scales == Scales::row || kInRegisters) Isa::store(total(m, p), scales == Scales::row ? Isa::mul(get(m, p), ws) : get(m, p));
  }
}

}  // namespace
}  // namespace coterie
