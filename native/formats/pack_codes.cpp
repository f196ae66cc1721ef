#include "formats/pack_codes.h"

#include <algorithm>

#include "formats/encodings.h"

namespace coterie {
namespace {

constexpr int64_t kColumns = 256;  // of all rows of a block at once: their codes and their lines stay in the first cache. Whole steps, of any width

// A byte at a time compilers compare with vectors.
template <class C>
bool all_valid(const uint8_t* codes, int64_t count) {
  uint8_t invalid = 0;
  for (int64_t k = 0; k < count; k++) invalid |= !C::valid(codes[k]);
  return !invalid;
}

template <class E>
using Lines = uint32_t[E::kRunLines][kColumns / E::kRunColumns];

// Codes of two quads, a byte each, as a line has them: those of the first from bit `first` on, those of the second from bit `second`.
template <int first, int second>
[[gnu::always_inline]] inline uint32_t part_of_word(uint64_t eight) {
  return static_cast<uint32_t>(eight | eight >> (32 - (second - first))) << first;
}

// A row's words of the lines of `runs` runs, out of its codes, which are valid. Each loop is one that compilers take several runs at once in.
template <class E>
inline void words_of_runs(const uint8_t* __restrict codes, int64_t runs, Lines<E>& __restrict words) {
  using C = typename E::Codes;
  if constexpr (C::kBits == 16) {
    memcpy(words, codes, runs * 4);
  } else if constexpr (C::kBits < 8) {
    constexpr int kLow = C::kBits - C::kHighBits, kFirst = C::kHighBits > 0, kOfLine = 4 / kLow;  // pairs of quads
    constexpr uint64_t kLower = ((1u << kLow) - 1) * 0x0101010101010101u;
    each_index<E::kRunLines>([&](auto index) {
      constexpr int line = decltype(index)::value;
      for (int64_t run = 0; run < runs; run++) {
        const uint8_t* const from = codes + run * E::kRunColumns;
        uint32_t word = 0;
        if constexpr (kFirst && line == 0)
          each_index<E::kRunColumns / 8>([&](auto pair) {
            const uint64_t eight = load<uint64_t>(from + 8 * pair);
            word |= part_of_word<upper_bit<C>(8 * pair), upper_bit<C>(8 * pair + 4)>((eight & ~kLower) >> kLow);
          });
        else
          each_index<(line - kFirst + 1) * kOfLine, (line - kFirst) * kOfLine>([&](auto pair) {
            const uint64_t eight = load<uint64_t>(from + 8 * pair);
            word |= part_of_word<lower_bit<C>(8 * pair), lower_bit<C>(8 * pair + 4)>(kFirst ? eight & kLower : eight);
          });
        words[line][run] = word;
      }
    });
  }
  if constexpr (C::kBits < 16)
    for (auto& line : words)
      for (int64_t run = 0; run < runs; run++) {
        const uint32_t word = C::kBits == 8 ? load<uint32_t>(codes + 4 * run) : line[run];
        line[run] = (word & 0xff0000ffu) | (word & 0xff00u) << 8 | (word >> 8 & 0xff00u);  // kQuadOrder
      }
}

// A block that is being packed.
template <class E>
struct Target {
  using C = typename E::Codes;
  using Scale = typename E::Scale;
  static constexpr int kCodeBytes = C::kBits == 16 ? 2 : 1;

  const Layout& layout;
  const Codes& source;
  const int64_t block, width, groups;
  const int panels;
  const int64_t step_bytes, shared_at, codes_at;
  uint8_t* const start;
  uint8_t* const end;  // of the steps

  Target(const Layout& layout, const Codes& source, int64_t block, uint8_t* matrix)
      : layout(layout), source(source), block(block), width(E::kStep ? E::kStep : layout.step), groups((layout.cols + width - 1) / width),
        panels(layout.panels_of(block)), step_bytes(layout.step_bytes(panels)), shared_at(layout.shared_at(panels)), codes_at(layout.codes_at(panels)),
        start(matrix + layout.block_start(block)), end(start + layout.steps() * step_bytes) {}

  bool pack() const {
    const int64_t first = block * kBlockRows, rows = std::min<int64_t>(layout.rows - first, kBlockRows), padded = layout.padded_cols();
    bool valid = true;
    for (int place = 0; place < rows; place++) {
      if constexpr (E::kRowScale) memcpy(end + place * 4, source.row_scale + first + place, 4);
      if constexpr (E::kRowZero) end[panels * kPanelRows * 4 + place] = source.zero[first + place];
    }
    for (int64_t column = 0; column < padded; column += kColumns)
      for (int place = 0; place < rows; place++) {
        const int64_t columns = std::min(kColumns, padded - column), count = std::clamp<int64_t>(layout.cols - column, 0, columns);
        valid &= pack_codes(first + place, place, column, columns, count);
        for (int64_t step = column / width; step < (column + count + width - 1) / width; step++) valid &= pack_scales(first + place, place, step);
      }
    return valid;
  }

 private:
  // Of row `row` of the matrix, which is number `place` of the block's: `columns` of whole steps, of which the matrix has `count`.
  bool pack_codes(int64_t row, int place, int64_t column, int64_t columns, int64_t count) const {
    const uint8_t* codes = source.codes + (row * layout.cols + column) * kCodeBytes;
    uint8_t padded[kColumns * kCodeBytes];
    if (count < columns) {
      uint16_t padding = E::kStepZero ? 0 : C::kPadding;  // stands for zero, where no minimum is taken off
      if constexpr (E::kRowZero) padding = source.zero[row];
      memcpy(padded, codes, count * kCodeBytes);
      for (int64_t k = count; k < columns; k++) memcpy(padded + k * kCodeBytes, &padding, kCodeBytes);
      codes = padded;
    }
    Lines<E> words;
    words_of_runs<E>(codes, columns / E::kRunColumns, words);
    const int64_t runs = width / E::kRunColumns, stride = panels * kLine;
    uint8_t* step = start + column / width * step_bytes + codes_at + place / kPanelRows * kLine + place % kPanelRows * 4;
    for (int64_t run = 0; run < columns / E::kRunColumns; step += step_bytes) {
      uint8_t* to = step;
      for (const int64_t last = run + runs; run < last; run++)
        for (int line = 0; line < E::kRunLines; line++, to += stride) memcpy(to, &words[line][run], 4);
    }
    if constexpr (C::kBits < 16) return all_valid<C>(codes, count);
    return true;
  }

  bool pack_scales(int64_t row, int place, int64_t step) const {
    [[maybe_unused]] uint8_t* const shared = start + step * step_bytes + shared_at;
    bool valid = true;
    if constexpr (Scale::kBlockBytes > 0) {
      const uint8_t* const scale = source.scale + (row / kScaleTileRows * groups + step) * 4;
      valid = Scale::valid(scale);
      if (place == 0) Scale::store(Scale::value(scale), shared);
    }
    if constexpr (Scale::kRowBytes > 0) {
      const uint8_t* const record = source.scale + (row * groups + step) * Scale::kRowBytes;
      valid = Scale::valid(record);
      uint8_t* const to = shared + place / kPanelRows * kPanelRows * Scale::kRowBytes;
      for (int i = 0; i < Scale::kRowBytes; i++) to[record_byte(Scale::kHalves, place % kPanelRows, i)] = record[i];
    }
    if constexpr (E::kStepZero) shared[panels * kPanelRows * Scale::kRowBytes + place] = source.zero[row * groups + step];
    return valid;
  }
};

}  // namespace

bool pack_codes_of_block(const Layout& layout, const Codes& source, int64_t block, uint8_t* matrix) {
  return with_encoding(layout, [&](auto encoding) { return Target<decltype(encoding)>(layout, source, block, matrix).pack(); });
}

}  // namespace coterie
