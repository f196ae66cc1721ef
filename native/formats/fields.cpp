#include "formats/fields.h"

#include <cstring>
#include <stdexcept>

namespace coterie {
namespace {

constexpr uint64_t kBytes = 0x0101010101010101u;

uint64_t load(const uint8_t* from) {
  uint64_t eight;
  memcpy(&eight, from, 8);
  return eight;
}

// Bytes of `to` become change(numbers, bytes), as many at once as the integers have bytes.
template <int Bits, int Span, class Change>
[[gnu::always_inline]] inline void each(const uint8_t* from, int64_t count, uint8_t* to, const Change& change) {
  const auto put = [&](int64_t k, auto numbers) {
    auto bytes = numbers;
    memcpy(&bytes, to + k, sizeof bytes);
    bytes = change(numbers, bytes);
    memcpy(to + k, &bytes, sizeof bytes);
  };
  if constexpr (Span > 1) {
    constexpr uint64_t kMask = ((1u << Bits) - 1) * kBytes;
    for (int64_t k = 0; k < count; k += Span * 8 / Bits, from += Span)
      for (int part = 0; part < 8 / Bits; part++)
        for (int i = 0; i < Span; i += 8) put(k + part * Span + i, load(from + i) >> part * Bits & kMask);
  } else if constexpr (Bits == 4) {
    for (int64_t i = 0; i < count / 2; i++) put(2 * i, static_cast<uint16_t>((from[i] | from[i] << 4) & 0x0f0f));
  } else {
    static_assert(Bits == 1);
    for (int64_t i = 0; i < count / 8; i++) put(8 * i, ((from[i] * kBytes & 0x8040201008040201u) + 0x7f * kBytes) >> 7 & kBytes);  // a bit for each byte, then its carry
  }
}

using Spread = void (*)(const uint8_t* from, int64_t count, uint64_t flip, uint8_t* to);
using Above = void (*)(const uint8_t* from, int64_t count, int shift, uint8_t* to);

template <int Bits, int Span>
struct Known {
  static void spread(const uint8_t* from, int64_t count, uint64_t flip, uint8_t* to) {
    each<Bits, Span>(from, count, to, [=](auto numbers, auto) { return numbers ^ flip; });
  }
  static void above(const uint8_t* from, int64_t count, int shift, uint8_t* to) {
    each<Bits, Span>(from, count, to, [=](auto numbers, auto bytes) { return bytes | numbers << shift; });
  }
};

struct Functions {
  int bits, span;
  Spread spread;
  Above above;
};

template <int Bits, int Span>
constexpr Functions kOf{Bits, Span, Known<Bits, Span>::spread, Known<Bits, Span>::above};
constexpr Functions kKnown[] = {kOf<1, 1>, kOf<1, 32>, kOf<2, 32>, kOf<4, 1>, kOf<4, 8>, kOf<4, 16>, kOf<4, 32>, kOf<4, 64>, kOf<8, 32>};

const Functions& functions_of(const Field& field, int64_t count) {
  for (const Functions& known : kKnown)
    if (known.bits == field.bits && known.span == field.span && count % (field.span * 8 / field.bits) == 0) return known;
  throw std::invalid_argument("codes share bytes in a way that is not known");
}

}  // namespace

void spread_fields(const Blocks& blocks, int64_t begin, int64_t end, uint8_t* to) {
  const Functions& lower = functions_of(blocks.lower, blocks.count);
  const Functions* upper = blocks.upper.bits ? &functions_of(blocks.upper, blocks.count) : nullptr;
  for (int64_t b = begin; b < end; b++) {
    const uint8_t* const from = blocks.data + b * blocks.bytes;
    lower.spread(from + blocks.lower.at, blocks.count, blocks.flip * kBytes, to + b * blocks.count);
    if (upper) upper->above(from + blocks.upper.at, blocks.count, blocks.lower.bits, to + b * blocks.count);
  }
}

}  // namespace coterie
