// Packing one panel: 16 rows side by side as lanes, so that every loop over `lane` is one vector operation.
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

inline float f16_to_float(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  const float normal = bits_to_float((magnitude << 13) + 0x38000000u);
  const float subnormal = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
  const float special = bits_to_float(0x7f800000u | (magnitude << 13));
  const float value = magnitude < 0x400u ? subnormal : magnitude >= 0x7c00u ? special : normal;
  return bits_to_float(float_to_bits(value) | sign);
}

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

// values[column][lane], zero beyond the matrix.
inline void load_lanes(const Layout& layout, int64_t panel, const void* source, DType dtype, int64_t stride, float* values) {
  constexpr int kChunk = 64;
  alignas(64) uint32_t rows[kLanes][kChunk];
  for (int64_t begin = 0; begin < layout.padded_cols(); begin += kChunk, values += kChunk * kLanes) {
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
      store_columns<true>(rows, values);
    else
      store_columns<false>(rows, values);
  }
}

inline bool all_finite(const float* values, int64_t count) {
  Lanes poison = {};
  for (int64_t k = 0; k < count; k++)
    for (int lane = 0; lane < kLanes; lane++) poison[lane] += values[k * kLanes + lane] * 0.0f;
  float sum = 0.0f;
  for (int lane = 0; lane < kLanes; lane++) sum += poison[lane];
  return sum == 0.0f;
}

inline void add_squares(const float* values, int64_t count, double& sum) {
  Lanes squares = {};
  for (int64_t k = 0; k < count; k++)
    for (int lane = 0; lane < kLanes; lane++) squares[lane] += values[k * kLanes + lane] * values[k * kLanes + lane];
  for (float square : squares) sum += square;
}

// tiles[tile of 128 rows][step] = the largest magnitude there, for the tile of rows `tile`.
inline void largest_of_tiles(const Layout& layout, int64_t tile, const void* source, DType dtype, int64_t stride, float* tiles) {
  constexpr int kChunk = 64;
  float chunk[kChunk];
  const int64_t first = tile * kScaleTileRows, end = first + kScaleTileRows < layout.rows ? first + kScaleTileRows : layout.rows;
  for (int64_t step = 0; step < layout.steps(); step++) {
    float most = 0.0f;
    for (int64_t row = first; row < end; row++)
      for (int64_t begin = step * layout.step; begin < (step + 1) * layout.step && begin < layout.cols; begin += kChunk) {
        const int64_t stop = (step + 1) * layout.step < layout.cols ? (step + 1) * layout.step : layout.cols;
        const int64_t count = stop - begin < kChunk ? stop - begin : kChunk;
        load_row(source, dtype, row * stride + begin, count, chunk);
        for (int64_t i = 0; i < count; i++) most = magnitude(chunk[i]) > most ? magnitude(chunk[i]) : most;
      }
    tiles[tile * layout.steps() + step] = most;
  }
}

// Four columns as one little-endian word per lane, in the order of kQuadOrder.
template <class Codes>
inline void quad_words(const float* values, const Lanes& inverse, const Lanes& zero, uint32_t* words) {
  for (int lane = 0; lane < kLanes; lane++) {
    uint32_t word = 0;
    for (int i = 0; i < 4; i++) word |= Codes::round(values[kQuadOrder[i] * kLanes + lane] * inverse[lane], zero[lane]) << (8 * i);
    words[lane] = word;
  }
}

// One step of one panel, whose lines lie `stride` bytes apart.
template <class E>
inline void pack_codes(const float* values, int64_t columns, const Lanes& inverse, const Lanes& zero, uint8_t* to, int64_t stride) {
  for (int64_t k = 0; k < columns; k += E::kLineColumns, to += stride) {
    uint32_t words[kLanes];
    const float* from = values + k * kLanes;
    if constexpr (E::Codes::kBits == 16) {
      for (int lane = 0; lane < kLanes; lane++)
        words[lane] = float_to_bf16(from[lane]) | static_cast<uint32_t>(float_to_bf16(from[kLanes + lane])) << 16;
    } else {
      quad_words<typename E::Codes>(from, inverse, zero, words);
    }
    if constexpr (E::Codes::kBits == 4) {
      uint32_t high[kLanes];
      quad_words<typename E::Codes>(from + 4 * kLanes, inverse, zero, high);
      for (int lane = 0; lane < kLanes; lane++) words[lane] |= high[lane] << 4;
    }
    memcpy(to, words, sizeof words);
  }
}

template <class E>
inline bool pack_panel_as(const Layout& layout, int64_t panel, const void* source, DType dtype, int64_t stride, const Choice& choice, uint8_t* matrix,
                          float* scratch, PackError& error) {
  const int64_t cols = layout.padded_cols(), block = panel / kBlockPanels, step = layout.step;
  const int panels = layout.panels_of(block), p = static_cast<int>(panel % kBlockPanels);
  uint8_t* const start = matrix + layout.block_start(block);
  uint8_t* const end = start + layout.steps() * layout.step_bytes(panels);
  load_lanes(layout, panel, source, dtype, stride, scratch);
  Lanes scale, zero, inverse, row;
  if constexpr (E::Codes::kBits == 16) {
    for (int64_t s = 0; s < layout.steps(); s++)
      pack_codes<E>(scratch + s * step * kLanes, step, inverse, zero, start + s * layout.step_bytes(panels) + p * kLine, panels * kLine);
    if (dtype == DType::bf16) return true;
    add_squares(scratch, cols, error.total);
    for (int64_t i = 0; i < cols * kLanes; i++) scratch[i] -= bf16_to_float(float_to_bf16(scratch[i]));
    add_squares(scratch, cols, error.difference);
    return true;
  } else {
    if (!all_finite(scratch, cols)) return false;
    add_squares(scratch, cols, error.total);
    for (float& r : row) r = 1.0f;
    if constexpr (E::kRowScale && E::kStepScale)
      for (float& r : row) r = E::Family::matrix_scale(choice);
    const int64_t span = E::kStepScale ? step : cols;  // columns that share a scale
    for (int64_t begin = 0, s = 0; begin < cols; begin += step, s++) {
      const float* values = scratch + begin * kLanes;
      uint8_t* const tail = start + s * layout.step_bytes(panels) + layout.step_code_bytes(panels);
      if (begin % span == 0) {
        E::Family::template choose<E>(values, span, s, choice, scale, zero);
        for (int lane = 0; lane < kLanes; lane++) {
          scale[lane] = stored_scale<E>(scale[lane]);
          if constexpr (!E::kStepScale) row[lane] = scale[lane];
          if constexpr (E::Scale::kRowBytes > 0) E::Scale::store(scale[lane], tail + (p * kLanes + lane) * E::Scale::kRowBytes);
          if constexpr (E::kStepZero) tail[panels * kLanes * E::Scale::kRowBytes + p * kLanes + lane] = static_cast<uint8_t>(zero[lane]);
          if constexpr (E::kRowZero) end[panels * kLanes * 4 + p * kLanes + lane] = static_cast<uint8_t>(zero[lane]);
          if constexpr (E::kRowScale && E::kStepScale) scale[lane] *= row[lane];
        }
        if constexpr (E::Scale::kBlockBytes > 0)
          if (p == 0) E::Scale::store(scale[0], tail);
        inverses(scale, inverse);
        Lanes off;
        squared_error<typename E::Codes>(values, span, scale, zero, off);
        for (float square : off) error.difference += square;
      }
      pack_codes<E>(values, step, inverse, zero, start + s * layout.step_bytes(panels) + p * kLine, panels * kLine);
    }
    if constexpr (E::kRowScale) memcpy(end + p * kLanes * 4, row, sizeof row);
    return true;
  }
}

// Returns false, having written nothing, if codes with scales are asked to hold a NaN or Inf. `scratch`: 16 floats per padded column.
// `error` is added to.
inline bool pack_panel(const Layout& layout, int64_t panel, const void* source, DType dtype, int64_t stride, const PackOptions& options,
                       uint8_t* matrix, float* scratch, PackError& error) {
  const float* tiles = options.tiles ? options.tiles + panel * kPanelRows / kScaleTileRows * layout.steps() : nullptr;
  const Choice choice{options.search, tiles, options.largest, dtype != DType::f32};
  return with_encoding(layout, [&](auto encoding) {
    return pack_panel_as<decltype(encoding)>(layout, panel, source, dtype, stride, choice, matrix, scratch, error);
  });
}

}  // namespace
}  // namespace coterie

#pragma GCC pop_options
