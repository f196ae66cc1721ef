// Packing one panel: 16 rows side by side as lanes, as many at a time as an instruction takes.
// Scales: docs/format.md says how they are chosen.
#pragma once
#include <cstdint>
#include <utility>

#include "formats/encodings.h"
#include "isa/kernels.h"

// The bytes are the same on every CPU: no product and sum may be fused into one rounding where the instruction set happens to offer it.
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")

namespace coterie {
namespace {

inline void load_row(const void* source, DType dtype, int64_t offset, int64_t count, float* to) {
  if (dtype == DType::f32) memcpy(to, static_cast<const float*>(source) + offset, count * 4);
  const uint16_t* half = static_cast<const uint16_t*>(source) + offset;
  if (dtype == DType::bf16)
    for (int64_t i = 0; i < count; i++) to[i] = bf16_to_float(half[i]);
  if (dtype == DType::f16)
    for (int64_t i = 0; i < count; i++) to[i] = f16_to_float(half[i]);
}

// A step in transposing a square of words: row a's words at odd multiples of `distance` for those of row b before them.
template <int distance, int... i>
inline void exchange(Words& a, Words& b, std::integer_sequence<int, i...>) {
  const Words before = a;
#ifdef __clang__
  a = __builtin_shufflevector(before, b, (i & distance ? kWidth + i - distance : i)...);
  b = __builtin_shufflevector(before, b, (i & distance ? kWidth + i : i + distance)...);
#else
  a = __builtin_shuffle(before, b, Words{(i & distance ? kWidth + i - distance : i)...});
  b = __builtin_shuffle(before, b, Words{(i & distance ? kWidth + i : i + distance)...});
#endif
}

template <int distance = 1>
inline void transpose(Words (&rows)[kWidth]) {
  if constexpr (distance < kWidth) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; i++)
      if (!(i & distance)) exchange<distance>(rows[i], rows[i + distance], std::make_integer_sequence<int, kWidth>());
    transpose<2 * distance>(rows);
  }
}

// The words of kLanes rows as columns: to[word][lane], or two columns a word (bf16), to[2 * word + half][lane].
template <bool pairs, int words>
inline void store_columns(const uint32_t (&rows)[kLanes][words], float* to) {
  constexpr int columns = pairs ? 2 : 1;
  for (int lane = 0; lane < kLanes; lane += kWidth)
    for (int word = 0; word < words / columns; word += kWidth) {
      Words square[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; i++) square[i] = load<Words>(&rows[lane + i][word]);
      transpose(square);
      float* column = to + word * columns * kLanes + lane;
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; i++, column += columns * kLanes) {
        store(column, pairs ? square[i] << 16 : square[i]);
        if (pairs) store(column + kLanes, square[i] & 0xffff0000u);
      }
    }
}

// to[column][lane], columns [begin, begin + count) of a panel, zero beyond the matrix; `count` is a multiple of 64.
inline void load_lanes(const Layout& layout, int64_t panel, const void* source, DType dtype, int64_t stride, int64_t begin, int64_t count,
                       float* to) {
  constexpr int kChunk = 64;
  alignas(64) uint32_t rows[kLanes][kChunk];
  for (const int64_t end = begin + count; begin < end; begin += kChunk, to += kChunk * kLanes) {
    const int64_t there = layout.cols - begin < kChunk ? layout.cols - begin : kChunk;
    for (int lane = 0; lane < kLanes; lane++) {
      const int64_t row = panel * kLanes + lane, offset = row * stride + begin, wanted = row < layout.rows && there > 0 ? there : 0;
      if (wanted < kChunk) memset(rows[lane], 0, sizeof rows[lane]);
      if (wanted == 0) continue;
      if (dtype != DType::bf16) {
        load_row(source, dtype, offset, wanted, reinterpret_cast<float*>(rows[lane]));
        continue;
      }
      const uint16_t* from = static_cast<const uint16_t*>(source) + offset;
      if (wanted == kChunk)
        for (int i = 0; i < kChunk; i += 2 * kWidth) store(&rows[lane][i / 2], load<Words>(from + i));
      else
        memcpy(rows[lane], from, wanted * 2);
    }
    if (dtype == DType::bf16)
      store_columns<true>(rows, to);
    else
      store_columns<false>(rows, to);
  }
}

// tiles[tile of 128 rows][step] = the largest magnitude there, for the tile of rows `tile`.
inline void largest_of_tiles(const Layout& layout, int64_t tile, const void* source, DType dtype, int64_t stride, float* tiles) {
  constexpr int kChunk = 128;
  float chunk[kChunk + kWidth];  // zeros behind what is there
  const int64_t first = tile * kScaleTileRows, end = first + kScaleTileRows < layout.rows ? first + kScaleTileRows : layout.rows;
  for (int64_t step = 0; step < layout.steps(); step++) {
    const int64_t stop = (step + 1) * layout.step < layout.cols ? (step + 1) * layout.step : layout.cols;
    Ints most{};
    for (int64_t row = first; row < end; row++)
      for (int64_t begin = step * layout.step; begin < stop; begin += kChunk) {
        const int64_t count = stop - begin < kChunk ? stop - begin : kChunk;
        load_row(source, dtype, row * stride + begin, count, chunk);
        for (int i = 0; i < kWidth; i++) chunk[count + i] = 0.0f;
        for (int64_t i = 0; i < count; i += kWidth) {
          const Ints magnitude = load<Ints>(chunk + i) & 0x7fffffff;
          most = magnitude > most ? magnitude : most;
        }
      }
    float& largest = tiles[tile * layout.steps() + step] = 0.0f;
    for (int i = 0; i < kWidth; i++) largest = bits_to_float(most[i]) > largest ? bits_to_float(most[i]) : largest;
  }
}

// Where a panel's codes and scales go.
struct PanelPlace {
  int panels, panel;  // of the block, and which of them
  int64_t step_bytes, codes_at, shared_at;
  uint8_t *steps, *end;

  PanelPlace(const Layout& layout, int64_t number, uint8_t* matrix)
      : panels(layout.panels_of(number / kBlockPanels)), panel(static_cast<int>(number % kBlockPanels)), step_bytes(layout.step_bytes(panels)),
        codes_at(layout.codes_at(panels)), shared_at(layout.shared_at(panels)), steps(matrix + layout.block_start(number / kBlockPanels)),
        end(steps + layout.steps() * step_bytes) {}

  uint8_t* line(int64_t step) const { return steps + step * step_bytes + codes_at + panel * kLine; }
  int64_t line_stride() const { return panels * kLine; }
  uint8_t* tail(int64_t step) const { return steps + step * step_bytes + shared_at; }
  int row(int lane) const { return panel * kLanes + lane; }
  int rows() const { return panels * kLanes; }
};

// What is summed over a panel, by rows.
struct PanelSums {
  Ints magnitude{};
  Vector squares{}, difference{};
};

// Some columns of kWidth rows: runs, each of which has these grids, whose inverses are given. The squares of what rounding changes are added to `difference`.
template <class E>
inline void pack_columns(const float* values, int64_t count, const Grid* grids, const Vector* inverses, uint8_t* line, int64_t stride, Vector& difference) {
  constexpr int kHigh = E::Codes::kHighBits, kLow = E::Codes::kBits - kHigh, kLineColumns = 32 / kLow;
  for (int64_t k = 0; k < count; k += E::kRunColumns) {
    [[maybe_unused]] Words upper{};  // of the run
    uint8_t* const first = line;
    if (kHigh > 0) line += stride;
    for (int n = 0; n < E::kRunColumns; n += kLineColumns, line += stride) {
      const Grid& grid = grids[n * E::kRunScales / E::kRunColumns];
      const Vector inverse = inverses[n * E::kRunScales / E::kRunColumns];
      Words words{};  // layout.h has the order of their bytes
#pragma GCC unroll 8
      for (int i = 0; i < kLineColumns; i++) {
        Vector w = load<Vector>(values + (k + n + i / 4 * 4 + kQuadOrder[i % 4]) * kLanes);
        if (E::kMinimum) w += grid.minimum;
        const Vector x = w * inverse;
        const Words code = E::Codes::round(x, grid.zero);
        words |= (kHigh > 0 ? code & ((1u << kLow) - 1) : code) << (i % 4 * 8 + lower_bit<typename E::Codes>(i));
        if (kHigh > 0) upper |= code >> kLow << (i % 4 * 8 + upper_bit<typename E::Codes>(n + i));
        const Vector off = w - grid.scale * E::Codes::rounded(x, grid.zero);
        difference += off * off;
      }
      store(line, words);
    }
    if (kHigh > 0) store(first, upper);
  }
}

// kWidth rows, from `lane` on, of a step whose scales are a record. `values`: of its columns and those rows.
template <class E>
inline void pack_step(const float* values, int64_t step, int lane, const Choice& choice, const PanelPlace& to, PanelSums& sums) {
  constexpr int64_t kWide = E::kStep / E::kScales;
  Reach reaches[E::kScales];
  for (int g = 0; g < E::kScales; g++) {
    reaches[g] = reach_of(values + g * kWide * kLanes, kWide, sums.squares);
    sums.magnitude = reaches[g].magnitude > sums.magnitude ? reaches[g].magnitude : sums.magnitude;
  }
  Grid grids[E::kScales];
  E::Family::template choose<E>(values, choice.search, reaches, grids, to.tail(step) + to.panel * kPanelRows * E::Scale::kRowBytes, lane);
  Vector inverses[E::kScales];
  for (int g = 0; g < E::kScales; g++) inverses[g] = grids[g].inverse();
  for (int g = 0; g < E::kScales; g += E::kRunScales)
    pack_columns<E>(values + g * kWide * kLanes, kWide * E::kRunScales, grids + g, inverses + g,
                    to.line(step) + g * kWide / E::kRunColumns * E::kRunLines * to.line_stride() + lane * 4, to.line_stride(), sums.difference);
}

// kWidth rows, from `lane` on, of the columns [begin, begin + count), which share a scale. `values`: of those columns and rows.
template <class E>
inline void pack_group(const Layout& layout, const float* values, int64_t begin, int64_t count, int lane, const Choice& choice,
                       const PanelPlace& to, PanelSums& sums) {
  const int64_t columns = E::kStep ? E::kStep : layout.step;
  int64_t step = begin / columns;
  const Reach reach = reach_of(values, count, sums.squares);
  sums.magnitude = reach.magnitude > sums.magnitude ? reach.magnitude : sums.magnitude;
  Grid grid = E::Family::template choose<E>(values, count, step, choice, reach);
  if constexpr (E::kStepScale) {
    uint8_t* const tail = to.tail(step);
    grid.scale = E::Scale::stored(grid.scale);
    if constexpr (E::Scale::kRowBytes > 0) E::Scale::store(grid.scale, tail + to.row(lane) * E::Scale::kRowBytes);
    if constexpr (E::Scale::kBlockBytes > 0)
      if (to.row(lane) == 0) E::Scale::store(grid.scale[0], tail);
    if constexpr (E::kRowScale) grid.scale *= E::Family::matrix_scale(choice);
  } else {
    store(to.end + to.row(lane) * 4, grid.scale);
  }
  if constexpr (E::kZero) {
    uint8_t* const zeros = E::kStepZero ? to.tail(step) + to.rows() * E::Scale::kRowBytes : to.end + to.rows() * 4;
    store_narrow<uint8_t>(zeros + to.row(lane), without_round(grid.zero + kRound));
  }
  const Vector inverse = grid.inverse();
  for (const float* const stop = values + count * kLanes; values < stop; values += columns * kLanes, step++)
    pack_columns<E>(values, columns, &grid, &inverse, to.line(step) + lane * 4, to.line_stride(), sums.difference);
}

template <class E>
inline bool pack_panel_as(const Layout& layout, int64_t panel, const void* source, DType dtype, int64_t stride, const Choice& choice, uint8_t* matrix,
                          float* scratch, PackError& error) {
  const PanelPlace to(layout, panel, matrix);
  const int64_t cols = layout.padded_cols(), group = E::kStepScale ? layout.step : cols;  // columns that share a scale
  const int64_t chunk = round_up(group, kColumnAlign);  // that are worked on while the cache has them
  PanelSums sums[kLanes / kWidth];
  for (int64_t begin = 0; begin < cols; begin += chunk) {
    load_lanes(layout, panel, source, dtype, stride, begin, chunk, scratch);
    for (int64_t k = 0; k < chunk; k += group)
      for (int lane = 0; lane < kLanes; lane += kWidth) {
        if constexpr (E::kRecord)
          pack_step<E>(scratch + k * kLanes + lane, (begin + k) / E::kStep, lane, choice, to, sums[lane / kWidth]);
        else
          pack_group<E>(layout, scratch + k * kLanes + lane, begin + k, group, lane, choice, to, sums[lane / kWidth]);
      }
  }
  if constexpr (E::kRowScale && E::kStepScale)
    for (int lane = 0; lane < kLanes; lane += kWidth) store(to.end + to.row(lane) * 4, splat(E::Family::matrix_scale(choice)));
  bool finite = true;
  for (const PanelSums& s : sums)
    for (int i = 0; i < kWidth; i++) {
      finite &= s.magnitude[i] < 0x7f800000;
      error.total += s.squares[i];
      error.difference += s.difference[i];
    }
  return finite;
}

inline void add_squares(const float* values, int64_t count, double& sum) {
  float squares[kLanes] = {};
  for (int64_t k = 0; k < count; k++)
    for (int lane = 0; lane < kLanes; lane++) squares[lane] += values[k * kLanes + lane] * values[k * kLanes + lane];
  for (float square : squares) sum += square;
}

inline void pack_bf16(const Layout& layout, int64_t panel, const void* source, DType dtype, int64_t stride, uint8_t* matrix, float* scratch,
                      PackError& error) {
  const PanelPlace to(layout, panel, matrix);
  const int64_t cols = layout.padded_cols();
  load_lanes(layout, panel, source, dtype, stride, 0, cols, scratch);
  const float* values = scratch;
  for (int64_t step = 0; step < layout.steps(); step++) {
    uint8_t* line = to.line(step);
    for (int64_t k = 0; k < layout.step; k += 2, values += 2 * kLanes, line += to.line_stride()) {
      uint32_t words[kLanes];
      for (int lane = 0; lane < kLanes; lane++)
        words[lane] = float_to_bf16(values[lane]) | static_cast<uint32_t>(float_to_bf16(values[kLanes + lane])) << 16;
      memcpy(line, words, sizeof words);
    }
  }
  if (dtype == DType::bf16) return;
  add_squares(scratch, cols, error.total);
  for (int64_t i = 0; i < cols * kLanes; i++) scratch[i] -= bf16_to_float(float_to_bf16(scratch[i]));
  add_squares(scratch, cols, error.difference);
}

// Returns false if codes with scales are asked to hold a NaN or Inf: what was written then means nothing. `scratch`: 16 floats per padded column.
// `error` is added to.
inline bool pack_panel(const Layout& layout, int64_t panel, const void* source, DType dtype, int64_t stride, const PackOptions& options,
                       uint8_t* matrix, float* scratch, PackError& error) {
  const float* tiles = options.tiles ? options.tiles + panel * kPanelRows / kScaleTileRows * layout.steps() : nullptr;
  const Choice choice{options.search, tiles, options.largest, dtype != DType::f32};
  return with_encoding(layout, [&](auto encoding) {
    using E = decltype(encoding);
    if constexpr (E::Codes::kBits == 16)
      return pack_bf16(layout, panel, source, dtype, stride, matrix, scratch, error), true;
    else
      return pack_panel_as<E>(layout, panel, source, dtype, stride, choice, matrix, scratch, error);
  });
}

}  // namespace
}  // namespace coterie

#pragma GCC pop_options
