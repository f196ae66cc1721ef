#include "formats/pack_codes.h"

#include <algorithm>

#include "formats/encodings.h"

namespace coterie {
namespace {

constexpr int64_t kColumnsAtOnce = 256;  // of all rows of a block: their codes and their lines stay in the first cache

// A byte at a time compilers compare with vectors.
template <class C>
bool all_valid(const uint8_t* codes, int64_t count) {
  uint8_t invalid = 0;
  for (int64_t k = 0; k < count; k++) invalid |= !C::valid(codes[k]);
  return !invalid;
}

// A row's words of the lines of a run, out of its codes, which are valid.
template <class E>
[[gnu::always_inline]] inline void words_of_run(const uint8_t* codes, uint32_t (&words)[E::kRunLines]) {
  using C = typename E::Codes;
  if constexpr (C::kBits == 16) {
    memcpy(words, codes, sizeof words);
  } else {
    constexpr int kLow = C::kBits - C::kHighBits, kFirst = C::kHighBits > 0;
    constexpr uint32_t kBytes = 0x01010101u, kLower = ((1u << kLow) - 1) * kBytes;
    for (uint32_t& word : words) word = 0;
    each_index<E::kRunColumns / 4>([&](auto index) {
      constexpr int quad = decltype(index)::value;
      const uint32_t four = load<uint32_t>(codes + 4 * quad);
      words[kFirst + quad / (8 / kLow)] |= (four & kLower) << lower_bit<C>(4 * quad);
      if constexpr (kFirst) words[0] |= (four & ~kLower) >> kLow << upper_bit<C>(4 * quad);
    });
    for (uint32_t& word : words) word = (word & 0xff0000ffu) | (word & 0xff00u) << 8 | (word >> 8 & 0xff00u);  // kQuadOrder
  }
}

// The rows of a block whose steps are being packed.
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
    const int64_t first = block * kBlockRows, rows = std::min<int64_t>(layout.rows - first, kBlockRows), steps = layout.steps();
    const int64_t at_once = std::max<int64_t>(kColumnsAtOnce / width, 1);
    bool valid = true;
    for (int row = 0; row < rows; row++) {
      if constexpr (E::kRowScale) memcpy(end + row * 4, source.row_scale + first + row, 4);
      if constexpr (E::kRowZero) end[panels * kPanelRows * 4 + row] = source.zero[first + row];
    }
    for (int64_t step = 0; step < steps; step += at_once)
      for (int row = 0; row < rows; row++) {
        const int64_t column = step * width, count = std::clamp<int64_t>(layout.cols - column, 0, at_once * width);
        if constexpr (C::kBits < 16) valid &= all_valid<C>(source.codes + (first + row) * layout.cols + column, count);
        for (int64_t s = step; s < std::min(step + at_once, steps); s++) valid &= pack_step(first + row, row, s);
      }
    return valid;
  }

  // Of row `row` of the matrix, which is number `place` of the block's.
  bool pack_step(int64_t row, int place, int64_t step) const {
    uint8_t* const to = start + step * step_bytes;
    const int64_t first = step * width, count = std::clamp<int64_t>(layout.cols - first, 0, width);
    uint16_t padding = E::kStepZero ? 0 : C::kPadding;  // columns beyond the matrix stand for zero, where no minimum is taken off
    if constexpr (E::kRowZero) padding = source.zero[row];
    pack_lines(source.codes + (row * layout.cols + first) * kCodeBytes, count, padding, place, to + codes_at);
    return count == 0 || pack_scales(row, place, step, to + shared_at);
  }

  bool pack_scales(int64_t row, int place, int64_t step, uint8_t* shared) const {
    const int panel = place / kPanelRows, lane = place % kPanelRows;
    bool valid = true;
    if constexpr (Scale::kBlockBytes > 0) {
      const uint8_t* const scale = source.scale + (row / kScaleTileRows * groups + step) * 4;
      valid = Scale::valid(scale);
      if (place == 0) Scale::store(Scale::value(scale), shared);
    }
    if constexpr (Scale::kRowBytes > 0) {
      const uint8_t* const record = source.scale + (row * groups + step) * Scale::kRowBytes;
      valid = Scale::valid(record);
      uint8_t* const to = shared + panel * kPanelRows * Scale::kRowBytes;
      for (int i = 0; i < Scale::kRowBytes; i++) to[record_byte(Scale::kHalves, lane, i)] = record[i];
    }
    if constexpr (E::kStepZero) shared[panels * kPanelRows * Scale::kRowBytes + place] = source.zero[row * groups + step];
    return valid;
  }

  // A step's `count` codes, and what pads them.
  void pack_lines(const uint8_t* codes, int64_t count, uint16_t padding, int place, uint8_t* lines) const {
    uint8_t* to = lines + place / kPanelRows * kLine + place % kPanelRows * 4;
    const int64_t stride = panels * kLine, whole = count / E::kRunColumns * E::kRunColumns;
    const auto take = [&](const uint8_t* run) {
      uint32_t words[E::kRunLines];
      words_of_run<E>(run, words);
      for (const uint32_t word : words) {
        memcpy(to, &word, 4);
        to += stride;
      }
    };
    for (int64_t k = 0; k < whole; k += E::kRunColumns) take(codes + k * kCodeBytes);
    for (int64_t k = whole; k < width; k += E::kRunColumns) {
      uint8_t run[E::kRunColumns * kCodeBytes];
      for (int i = 0; i < E::kRunColumns; i++) memcpy(run + i * kCodeBytes, k + i < count ? codes + (k + i) * kCodeBytes : reinterpret_cast<const uint8_t*>(&padding), kCodeBytes);
      take(run);
    }
  }
};

}  // namespace

bool pack_codes_of_block(const Layout& layout, const Codes& source, int64_t block, uint8_t* matrix) {
  return with_encoding(layout, [&](auto encoding) { return Target<decltype(encoding)>(layout, source, block, matrix).pack(); });
}

}  // namespace coterie
