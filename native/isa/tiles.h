// The hot loops: a few rows of activations times panels of a block of weights, over an instruction set `Isa` and an encoding `E`.
// Every lambda here is inlined by force: what one captures is otherwise in memory, sums and pointers too, wherever else it is used.
#pragma once
#include <type_traits>

#include "formats/encodings.h"
#include "isa/ahead.h"

namespace coterie {
namespace {

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

// Whether one panel's weights at a time are in registers, where those are few, or those of all panels of a line.
template <class Isa>
constexpr bool kPanelMajor = Isa::kRegistersPerVector > 1;

// The largest byte that stands for a weight.
template <class Codes>
constexpr int largest_byte() {
  int largest = (1 << Codes::kBits) - 1;
  if constexpr (requires { Codes::kTable; }) {
    largest = 0;
    for (int value : Codes::kTable) largest = value + Codes::kOffset > largest ? value + Codes::kOffset : largest;
  }
  return largest;
}

// Where an instruction set adds two products of bytes in 16 bits: how many quads can be added there. 0: products are added in 32 bits.
template <class Isa, class Codes>
constexpr int kShortQuads = Isa::kShortBytes ? 32767 / (2 * 127 * largest_byte<Codes>()) : 0;

// Sums of a tile: in registers where those suffice, or else in the result itself, so that registers are for the accumulators of the inner loop.
template <class Isa, int M, int NP>
struct Totals {
  static constexpr bool kInRegisters = M * NP * Isa::kRegistersPerVector <= 4;
  typename Isa::F at[kInRegisters ? M : 1][kInRegisters ? NP : 1];
  float* out;

  explicit Totals(float* out) : out(out) {
    for (int m = 0; m < M; m++)
      for (int p = 0; p < NP; p++) put(m, p, Isa::zero());
  }
  float* result(int m, int p) const { return out + (m * kBlockPanels + p) * kPanelRows; }
  // Keeps the compiler from holding them in registers all the same, which it would take from the accumulators.
  static void settle() {
    if constexpr (!kInRegisters) asm volatile("" ::: "memory");
  }
  typename Isa::F get(int m, int p) const { return kInRegisters ? at[m * kInRegisters][p * kInRegisters] : Isa::load(result(m, p)); }
  void put(int m, int p, const typename Isa::F& v) { kInRegisters ? void(at[m * kInRegisters][p * kInRegisters] = v) : Isa::store(result(m, p), v); }
};

// Scales of a step and the minima that are taken off, of records: made once, and read for each group of columns.
template <class Isa, class E, int NP>
struct StepScales {
  static constexpr int kGroups = E::kRecord ? E::kScales : 0;
  alignas(64) float scale[kGroups + 1][NP][kPanelRows], minimum[E::kMinimum ? kGroups + 1 : 1][NP][kPanelRows];

  void read(const uint8_t* tail, int panel) {
    if constexpr (kGroups > 0)
      for (int p = 0; p < NP; p++) {
        const typename E::Scale::template Panel<Isa> from(E::step_scale(tail, panel + p));
#pragma GCC unroll 16
        for (int g = 0; g < kGroups; g++) {
          Isa::store(scale[g][p], from.scale(g));
          if constexpr (E::kMinimum) Isa::store(minimum[g][p], from.minimum(g));
        }
      }
  }
};

// out[m][16 p + lane] = (with `add`: +=) sum over columns of weight * activation, in f32, for M rows and NP panels from `panel` on.
template <class Isa, class E, int M, int NP>
__attribute__((noinline)) void pairs_tile(const Layout& layout, const Block& block, int panel, const Rows<M>& rows, int64_t cols, float* out,
                                          const Ahead& ahead, bool add) {
  constexpr int kPairs = E::Codes::kPairs, kLastPart = E::kRunScales - 1;
  static_assert(E::kRunScales == 1 || (E::Codes::kSplit && !E::kMinimum));
  const int64_t stride = block.panels * kLine, groups = E::kStepScale ? layout.steps() * E::kScales : 1;
  const int64_t runs = (E::kStep ? E::kStep * E::kRunScales / E::kScales : E::kStepScale ? layout.step : cols) / E::kRunColumns;
  const uint8_t* at = block.data + panel * kLine;
  const Rows<M> x = rows;
  typename Isa::F acc[M][NP];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int p = 0; p < NP; p++) acc[m][p] = Isa::zero();
  struct Nothing {
    explicit Nothing(float*) {}
  };
  std::conditional_t<E::kStepScale, Totals<Isa, M, NP>, Nothing> totals(out);
  StepScales<Isa, E, NP> several;
  typename Isa::F sums[M];  // of activations, where minima are taken off
  for (int m = 0; m < M; m++) sums[m] = Isa::zero();
  for (int64_t g = 0, run = 0; g < groups; g++) {
    const int group = static_cast<int>(g % E::kScales);
    if (E::kRecord && group == 0) {
      several.read(at - panel * kLine, panel);
      at += block.panels * kPanelRows * E::Scale::kRowBytes;
    }
    const int part = group % E::kRunScales;
#pragma GCC unroll 1
    for (int64_t n = 0; n < runs; n++) {
      if (part == kLastPart) ahead.template line<Isa>(run);
      const auto activations = [&](int m, int i) __attribute__((always_inline)) {
        return Isa::broadcast_pair(x.data[m] + (run * kPairs + i) * 2 * Isa::kFloatBytes);
      };
      if constexpr (E::kMinimum)
#pragma GCC unroll 16
        for (int i = 0; i < kPairs; i++)
#pragma GCC unroll 8
          for (int m = 0; m < M; m++) sums[m] = Isa::dot(sums[m], Isa::pair_of(Isa::set1(1.0f), Isa::set1(1.0f)), activations(m, i));
      if constexpr (kPairs == 1 && !kPanelMajor<Isa>) {
        typename Isa::Pair w[NP][1];
#pragma GCC unroll 4
        for (int p = 0; p < NP; p++) pairs_of_line<Isa, typename E::Codes>(at + p * kLine, w[p]);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
          auto v = activations(m, 0);
#pragma GCC unroll 4
          for (int p = 0; p < NP; p++) acc[m][p] = Isa::dot(acc[m][p], w[p][0], v);
        }
      } else if constexpr (E::Codes::kSplit) {
        each_quad<kPairs / 2, E::kRunScales>(part, [&](auto index) __attribute__((always_inline)) {
          constexpr int quad = decltype(index)::value;
#pragma GCC unroll 4
          for (int p = 0; p < NP; p++) {
            typename Isa::Pair w[2];
            pairs_of_quad<Isa, typename E::Codes, quad>(at + p * kLine, stride, w);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++)
#pragma GCC unroll 2
              for (int i = 0; i < 2; i++) acc[m][p] = Isa::dot(acc[m][p], w[i], activations(m, 2 * quad + i));
          }
        });
      } else if constexpr (kPairs == 1) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++)
#pragma GCC unroll 4
          for (int p = 0; p < NP; p++) {
            typename Isa::Pair w[1];
            pairs_of_line<Isa, typename E::Codes>(at + p * kLine, w);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) acc[m][p] = Isa::dot_half(acc[m][p], w[0], activations(m, 0), half);
          }
      } else {
#pragma GCC unroll 4
        for (int p = 0; p < NP; p++) {
          typename Isa::Pair w[kPairs];
          pairs_of_line<Isa, typename E::Codes>(at + p * kLine, w);
#pragma GCC unroll 8
          for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int i = 0; i < kPairs; i++)
              acc[m][p] = Isa::dot(acc[m][p], w[i], activations(m, i));
        }
      }
      if (part == kLastPart) run++, at += E::kRunLines * stride;
    }
    if constexpr (E::kStepScale) {
      const uint8_t* const tail = at - panel * kLine;
#pragma GCC unroll 4
      for (int p = 0; p < NP; p++) {
        typename Isa::F scale, minimum;
        if constexpr (E::kRecord) {
          scale = Isa::load(several.scale[group][p]);
          if constexpr (E::kMinimum) minimum = Isa::mul(Isa::load(several.minimum[group][p]), Isa::set1(-1.0f));
        } else {
          scale = E::template scale<Isa>(tail, panel + p, 0);
          if (E::Codes::kUnit != 1.0f) scale = Isa::mul(scale, Isa::set1(E::Codes::kUnit));
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
          const auto before = E::kMinimum ? Isa::fma(minimum, sums[m], totals.get(m, p)) : totals.get(m, p);
          totals.put(m, p, Isa::fma(acc[m][p], scale, before));
          acc[m][p] = Isa::zero();
        }
      }
      if (E::kMinimum)
        for (int m = 0; m < M; m++) sums[m] = Isa::zero();
      if (!E::kRecord) at += block.panels * kPanelRows * E::Scale::kRowBytes + E::Scale::kBlockBytes;
      totals.settle();
    }
  }
  for (int p = 0; p < NP; p++) {
    typename Isa::F scale = Isa::zero();
    if (E::kRowScale) scale = Isa::load(reinterpret_cast<const float*>(E::row_scale(at - panel * kLine, panel + p)));
    for (int m = 0; m < M; m++) {
      float* to = out + (m * kBlockPanels + p) * kPanelRows;
      typename Isa::F v;
      if constexpr (E::kStepScale)
        v = totals.get(m, p);
      else
        v = acc[m][p];
      if (E::kRowScale) v = Isa::mul(v, scale);
      Isa::store(to, add ? Isa::add(v, Isa::load(to)) : v);
    }
  }
}

// The same with int8 activations: partial sums of `unit` columns in integers.
template <class Isa, class E, int M, int NP>
__attribute__((noinline)) void quads_tile(const Block& block, int panel, const Rows<M>& rows, int64_t cols, int64_t any_unit, float* out,
                                          const Ahead& ahead) {
  constexpr int kRun = E::kRunColumns, kScales = E::kScales, kQuad = 4 * Isa::kIntegerBytes, kLastPart = E::kRunScales - 1;
  constexpr int kQuads = kRun / 4, kShort = kShortQuads<Isa, typename E::Codes>, kSpan = kShort > kQuads ? kShort / kQuads : 1;
  [[maybe_unused]] const int64_t bytes_at = cols * Isa::kIntegerBytes;
  const int panels = block.panels;
  const int64_t stride = panels * kLine, unit = E::kStep ? E::kStep / kScales : any_unit, runs = cols / kRun;
  const uint8_t* at = block.data + panel * kLine;
  const uint8_t* const end_of_steps = block.data + runs * E::kRunLines * stride;  // where no scales stand between
  const Rows<M> x = rows;
  Totals<Isa, M, NP> totals(out);
  typename Isa::F zeros[NP];
  StepScales<Isa, E, NP> several;
  if constexpr (E::kRowZero)
    for (int p = 0; p < NP; p++) zeros[p] = Isa::load_bytes(E::row_zero(end_of_steps, panels, panel + p));
  for (int64_t u = 0, run = 0; run < runs; u++) {
    const int group = static_cast<int>(u % kScales);
    if (E::kRecord && group == 0) {
      several.read(at - panel * kLine, panel);
      at += panels * kPanelRows * E::Scale::kRowBytes;
    }
    typename Isa::I acc[M][NP];
    [[maybe_unused]] typename Isa::I shorts[M][NP];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      auto start = E::kSums ? Isa::integer_zero() : Isa::integer_set1(x.offset[m][u]);
#pragma GCC unroll 4
      for (int p = 0; p < NP; p++) acc[m][p] = start, shorts[m][p] = Isa::integer_zero();
    }
    const auto widen = [&]() __attribute__((always_inline)) {
      if constexpr (kShort > 0)
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
          for (int p = 0; p < NP; p++) acc[m][p] = Isa::add_shorts(acc[m][p], shorts[m][p]), shorts[m][p] = Isa::integer_zero();
    };
    const int part = group % E::kRunScales;
    const int64_t end = run + unit / kRun < runs ? run + unit / kRun : runs;
#pragma GCC unroll 1
    do {
      const int64_t stop = kShort > 0 && run + kSpan < end ? run + kSpan : end;
#pragma GCC unroll 1
      do {
        if (part == kLastPart) ahead.template line<Isa>(run);
        each_quad<kQuads, E::kRunScales>(part, [&](auto index) __attribute__((always_inline)) {
          constexpr int i = decltype(index)::value;
          const auto bytes = [&](int p) __attribute__((always_inline)) { return E::Codes::template bytes<Isa, i>(at + p * kLine, stride); };
          const auto activations = [&](int m) __attribute__((always_inline)) {
            return Isa::broadcast_quad(x.data[m] + run * (kRun * Isa::kIntegerBytes) + i * kQuad);
          };
          if constexpr (kShort > 0) {
#pragma GCC unroll 4
            for (int p = 0; p < NP; p++) {
              const auto w = bytes(p);
#pragma GCC unroll 8
              for (int m = 0; m < M; m++) shorts[m][p] = Isa::dot_shorts(shorts[m][p], w, x.data[m] + bytes_at + run * kRun + i * 4);
            }
            if constexpr (i + 1 < kQuads && (i + 1) % kShort == 0) widen();
          } else if constexpr (kPanelMajor<Isa>) {
#pragma GCC unroll 4
            for (int p = 0; p < NP; p++) {
              const auto w = Isa::quad_of(bytes(p));
#pragma GCC unroll 2
              for (int half = 0; half < 2; half++)
#pragma GCC unroll 8
                for (int m = 0; m < M; m++) acc[m][p] = Isa::dot_half(acc[m][p], w, activations(m), half);
            }
          } else {
            typename Isa::Quad w[NP];
#pragma GCC unroll 4
            for (int p = 0; p < NP; p++) w[p] = Isa::quad_of(bytes(p));
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
              const auto v = activations(m);
#pragma GCC unroll 4
              for (int p = 0; p < NP; p++) acc[m][p] = Isa::dot(acc[m][p], w[p], v);
            }
          }
        });
        if (part == kLastPart) run++, at += E::kRunLines * stride;
      } while (run < stop);
      widen();
    } while (kShort > 0 && run < end);
    typename Isa::F ws[NP], minima[NP];
    const uint8_t* const tail = at - panel * kLine;
#pragma GCC unroll 4
    for (int p = 0; p < NP; p++) {
      if constexpr (E::kRecord) {
        ws[p] = Isa::load(several.scale[group][p]);
        if constexpr (E::kMinimum) minima[p] = Isa::load(several.minimum[group][p]);
      } else if constexpr (E::kStepScale) {
        ws[p] = E::template scale<Isa>(tail, panel + p, 0);
        if (E::Codes::kUnit != 1.0f) ws[p] = Isa::mul(ws[p], Isa::set1(E::Codes::kUnit));
      }
      if constexpr (E::kStepZero) zeros[p] = Isa::load_bytes(E::step_zero(tail, panels, panel + p));
    }
    if (E::kStepScale && !E::kRecord) at += panels * kPanelRows * (E::Scale::kRowBytes + E::kStepZero);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      auto xs = Isa::set1(x.scale[m][static_cast<uint64_t>(u * unit) / kActivationGroup]);
      typename Isa::F sum;
      if (E::kSums) sum = Isa::set1(static_cast<float>(x.offset[m][u]));
#pragma GCC unroll 4
      for (int p = 0; p < NP; p++) {
        auto v = Isa::to_float(acc[m][p]);
        if (E::kZero) v = Isa::fma(zeros[p], sum, v);
        if (E::kMinimum)
          totals.put(m, p, Isa::fma(Isa::fma(v, ws[p], Isa::mul(minima[p], sum)), xs, totals.get(m, p)));
        else
          totals.put(m, p, Isa::fma(v, E::kStepScale ? Isa::mul(xs, ws[p]) : xs, totals.get(m, p)));
      }
    }
    totals.settle();
  }
  for (int p = 0; p < NP; p++) {
    typename Isa::F ws = Isa::zero();
    if (E::kRowScale) ws = Isa::load(reinterpret_cast<const float*>(E::row_scale(at - panel * kLine, panel + p)));
    for (int m = 0; m < M; m++)
      if (E::kRowScale || totals.kInRegisters) Isa::store(totals.result(m, p), E::kRowScale ? Isa::mul(totals.get(m, p), ws) : totals.get(m, p));
  }
}

}  // namespace
}  // namespace coterie
