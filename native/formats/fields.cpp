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

// Eight numbers that follow each other in `Bits` bytes, a byte each.
template <int Bits>
uint64_t in_order(const uint8_t* from) {
  static_assert(Bits == 1 || Bits == 4);
  if constexpr (Bits == 1) return ((*from * kBytes & 0x8040201008040201u) + 0x7f * kBytes) >> 7 & kBytes;  // each byte has a bit of its own left
  uint32_t nibbles;
  memcpy(&nibbles, from, 4);
  uint64_t x = nibbles;
  x = (x | x << 16) & 0x0000ffff0000ffffu;
  x = (x | x << 8) & 0x00ff00ff00ff00ffu;
  return (x | x << 4) & 0x0f * kBytes;
}

// put(place, numbers from there on): eight, or one.
template <int Bits, int Span, class Put>
void each(const uint8_t* from, int64_t count, const Put& put) {
  constexpr uint64_t kMask = (1u << Bits) - 1;
  if constexpr (Span == 1) {
    int64_t k = 0;
    for (; k + 8 <= count; k += 8) put(k, in_order<Bits>(from + k / 8 * Bits));
    for (; k < count; k++) put(k, static_cast<uint8_t>(from[k * Bits / 8] >> k * Bits % 8 & kMask));
  } else {
    for (int64_t k = 0; k < count; k += Span * 8 / Bits, from += Span)
      for (int part = 0; part < 8 / Bits; part++)
        for (int i = 0; i < Span; i += 8) put(k + part * Span + i, load(from + i) >> part * Bits & kMask * kBytes);
  }
}

using Spread = void (*)(const uint8_t* from, int64_t count, uint64_t flip, uint8_t* to);
using Above = void (*)(const uint8_t* from, int64_t count, int shift, uint8_t* to);

template <int Bits, int Span>
struct Known {
  static void spread(const uint8_t* from, int64_t count, uint64_t flip, uint8_t* to) {
    each<Bits, Span>(from, count, [=](int64_t k, auto numbers) {
      numbers ^= flip;
      memcpy(to + k, &numbers, sizeof numbers);
    });
  }
  static void above(const uint8_t* from, int64_t count, int shift, uint8_t* to) {
    each<Bits, Span>(from, count, [=](int64_t k, auto numbers) {
      auto all = numbers;
      memcpy(&all, to + k, sizeof all);
      all |= numbers << shift;
      memcpy(to + k, &all, sizeof all);
    });
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
