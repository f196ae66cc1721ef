// The hot loops: a few rows of activations times up to four panels of weights, over an instruction set `Isa`.
#pragma once
#include "isa/kernels.h"

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

// Runs of memory that will be wanted next; one line of each is fetched every 2^shift lines of weights.
struct Ahead {
  const uint8_t* from[kBlockPanels];
  int shift;

  Ahead after(int runs) const {
    Ahead rest{{}, shift};
    for (int a = runs; a < kBlockPanels; a++) rest.from[a - runs] = from[a];
    return rest;
  }
};

// A tile that reads memory in order fetches what comes a little later. Measured: 1 KB ahead is a quarter slower than 6, 16 no better.
constexpr int kInOrder = -1;
constexpr int kDistance = 6144;

template <class Isa, int A>
inline void prefetch_lines(const Ahead& ahead, const uint8_t* const* weight, int64_t line) {
  if (A == kInOrder) Isa::prefetch(weight[0] + line * kLine + kDistance);
#pragma GCC unroll 4
  for (int a = 0; a < A; a++) Isa::prefetch(ahead.from[a] + (line >> ahead.shift) * kLine);
}

// A tile one panel wide reads memory in order; as many lines at once as keep the dot products from waiting for one another.
constexpr int lines_at_once(int panels, int rows) { return panels == 1 && rows <= 2 ? 4 : 1; }

// out[m][16 p + lane] = (with `add`: +=) sum over columns of weight * activation, in f32, for M rows and NP panels of bf16 weights.
template <class Isa, int M, int NP, int A>
__attribute__((noinline)) void bf16_tile(const uint8_t* const* weight, const Rows<M>& rows, int64_t lines, float* out, const Ahead& ahead,
                                         bool add = false) {
  constexpr int U = M * NP * 4 <= Isa::kAccumulators ? 4 : 1;
  typename Isa::F acc[U][M][NP];
  for (int u = 0; u < U; u++)
    for (int m = 0; m < M; m++)
      for (int p = 0; p < NP; p++) acc[u][m][p] = Isa::zero();
  for (int64_t first = 0; first < lines; first += U) {
#pragma GCC unroll 4
    for (int u = 0; u < U; u++) {
      const int64_t line = first + u;
      prefetch_lines<Isa, A>(ahead, weight, line);
      typename Isa::Pair w[NP];
#pragma GCC unroll 4
      for (int p = 0; p < NP; p++) w[p] = Isa::load_pair(weight[p] + line * kLine);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        auto x = Isa::broadcast_pair(rows.data[m] + line * 2 * Isa::kFloatBytes);
#pragma GCC unroll 4
        for (int p = 0; p < NP; p++) acc[u][m][p] = Isa::dot(acc[u][m][p], w[p], x);
      }
    }
  }
  for (int m = 0; m < M; m++)
    for (int p = 0; p < NP; p++) {
      for (int u = 1; u < U; u++) acc[0][m][p] = Isa::add(acc[0][m][p], acc[u][m][p]);
      float* to = out + (m * kBlockPanels + p) * kPanelRows;
      Isa::store(to, add ? Isa::add(acc[0][m][p], Isa::load(to)) : acc[0][m][p]);
    }
}

// How the integer tile reads weights and their scales.
enum class Codes { bytes, nibbles };       // one column quad a line, or two
enum class Scales { row, group, decoded };  // f32 per row at the end; bf16 per unit; f32 per unit (made by decode_panel)

template <class Isa, int M, int NP, Codes codes, Scales scales, bool Zero, int A, int Unit = 0>
__attribute__((noinline)) void integer_tile(const Block& b, int panel, const Rows<M>& rows, int64_t cols, int64_t any_unit, float* out,
                                            const Ahead& ahead) {
  constexpr int kLineCols = codes == Codes::bytes ? 4 : 8;
  constexpr int kStep = 4 * Isa::kIntegerBytes;
  constexpr int U = lines_at_once(NP, M);
  // A wide tile keeps its totals in `out`: registers are for the integer accumulators of the inner loop.
  constexpr bool kInRegisters = M * NP <= 2;
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
    typename Isa::I acc[U][M][NP];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      auto start = Zero ? Isa::integer_zero() : Isa::integer_set1(x.offset[m][u]);
#pragma GCC unroll 4
      for (int p = 0; p < NP; p++) {
        acc[0][m][p] = start;
        for (int i = 1; i < U; i++) acc[i][m][p] = Isa::integer_zero();
      }
    }
    const int64_t end = Unit ? line + Unit / kLineCols : line + unit / kLineCols < lines ? line + unit / kLineCols : lines;
#pragma GCC unroll 1
    do {
#pragma GCC unroll 4
      for (int i = 0; i < U; i++) {
        prefetch_lines<Isa, A>(ahead, weight, line + i);
#pragma GCC unroll 2
        for (int half = 0; half < (codes == Codes::bytes ? 1 : 2); half++) {
          typename Isa::Quad w[NP];
#pragma GCC unroll 4
          for (int p = 0; p < NP; p++) {
            const uint8_t* from = weight[p] + (line + i) * kLine;
            w[p] = codes == Codes::bytes ? Isa::load_quad(from) : half == 0 ? Isa::load_low_nibbles(from) : Isa::load_high_nibbles(from);
          }
#pragma GCC unroll 8
          for (int m = 0; m < M; m++) {
            auto v = Isa::broadcast_quad(x.data[m] + (line + i) * (kLineCols * Isa::kIntegerBytes) + half * kStep);
#pragma GCC unroll 4
            for (int p = 0; p < NP; p++) acc[i][m][p] = Isa::dot(acc[i][m][p], w[p], v);
          }
        }
      }
      line += U;
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
        for (int i = 1; i < U; i++) acc[0][m][p] = Isa::add(acc[0][m][p], acc[i][m][p]);
        auto v = Isa::to_float(acc[0][m][p]);
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
