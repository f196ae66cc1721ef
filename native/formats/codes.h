// What the codes of weights are: how many bits, which values they stand for, how a value is rounded to one, and how a line of them is read.
#pragma once
#include <bit>
#include <type_traits>

#include "formats/lanes.h"

namespace coterie {
namespace {

// kPadding: a code that stands for zero, or any where none does, which groups do not ask for.
// A line of codes as 32-bit words holds, for each of 16 rows, one word; its bytes are columns k0 k2 k1 k3 (formats/layout.h).
// kHighBits: upper bits of a code that stand in a line of their own, the first of a run. kSplit: codes are read four columns at a time.

// Stored as they are.
struct Bf16Codes {
  static constexpr int kBits = 16, kHighBits = 0, kPairs = 1;
  static constexpr bool kSplit = false;
  static constexpr bool kInteger = false;
  static constexpr int kOffset = 0;
  static constexpr uint16_t kPadding = 0;
  static constexpr float kUnit = 1.0f;
  static float value(uint16_t code, int) { return bf16_to_float(code); }
};

// Bytes q + 128, q from -127 to 127.
struct ByteCodes {
  static constexpr int kBits = 8, kHighBits = 0, kPairs = 2;
  static constexpr bool kSplit = false;
  static constexpr bool kInteger = true;
  static constexpr int kOffset = 128;
  static constexpr uint16_t kPadding = 128;
  static constexpr float kUnit = 1.0f;
  static float value(uint16_t code, int) { return static_cast<float>(code - kOffset); }
  static bool valid(uint16_t code) { return code != 0; }
  static Words round(Vector x, Vector zero) { return without_round(nearest(x + zero, 1.0f, 255.0f)); }
  static Vector rounded(Vector x, Vector zero) { return nearest(x + zero, 1.0f, 255.0f) - (zero + kRound); }

  template <class Isa, int shift>
  static typename Isa::F column(typename Isa::I words, typename Isa::F) {
    return Isa::add(Isa::to_float(Isa::template field<shift, 255>(words)), Isa::set1(-128.0f));
  }
  template <class Isa, int>
  static typename Isa::I bytes(const uint8_t* line, int64_t) {
    return Isa::load_integers(line);
  }
};

// Nibbles q from 0 to 15 that stand for q - 8, or for q - zero where zero points are stored.
struct NibbleCodes {
  static constexpr int kBits = 4, kHighBits = 0, kPairs = 4;
  static constexpr bool kSplit = false;
  static constexpr bool kInteger = true;
  static constexpr int kOffset = 8;
  static constexpr uint16_t kPadding = 8;
  static constexpr float kUnit = 1.0f;
  static constexpr int8_t kTable[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
  static float value(uint16_t code, int zero) { return static_cast<float>(code - zero); }
  static bool valid(uint16_t code) { return code < 16; }
  static Words round(Vector x, Vector zero) { return without_round(nearest(x + zero, 0.0f, 15.0f)); }
  static Vector rounded(Vector x, Vector zero) { return nearest(x + zero, 0.0f, 15.0f) - (zero + kRound); }

  template <class Isa, int shift>
  static typename Isa::F column(typename Isa::I words, typename Isa::F minus_zero) {
    return Isa::add(Isa::to_float(Isa::template field<shift, 15>(words)), minus_zero);
  }
  // Four columns of a run, whose lines lie `stride` bytes apart, as unsigned bytes: the value's units, plus kOffset.
  template <class Isa, int half>
  static typename Isa::I bytes(const uint8_t* line, int64_t) {
    return half ? Isa::high_nibbles(line) : Isa::low_nibbles(line);
  }
};

// Nibbles that stand for themselves: a minimum is taken off.
struct PlainNibbleCodes : NibbleCodes {
  static constexpr int kOffset = 0;
  static constexpr uint16_t kPadding = 0;
  static constexpr float kMost = 15;
  static constexpr int8_t kTable[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
};

// Whole numbers less an offset, as bf16.
template <int count, int offset>
struct WordsOf {
  alignas(64) uint16_t value[count] = {};
  constexpr WordsOf() {
    for (int i = 0; i < count; i++) value[i] = static_cast<uint16_t>(std::bit_cast<uint32_t>(static_cast<float>(i - offset)) >> 16);
  }
};

// Whole numbers of 2, 3, 5 or 6 bits, less an offset: lines of the lower two bits, or four where there are more than 4, and before them a line of what is above.
template <int Bits, int Offset>
struct SplitCodes {
  static constexpr int kLowBits = Bits < 4 ? 2 : 4, kBits = Bits, kHighBits = Bits - kLowBits, kPairs = 16 / (kHighBits ? kHighBits : kBits);
  static constexpr bool kInteger = true, kSplit = true;
  static constexpr int kOffset = Offset;
  static constexpr uint16_t kPadding = Offset;
  static constexpr float kUnit = 1.0f;
  static constexpr float kMost = (1 << Bits) - 1;
  static constexpr WordsOf<(Bits < 5 ? 32 : 1 << Bits), Offset> kWords{};
  static float value(uint16_t code, int) { return static_cast<float>(code - Offset); }
  static bool valid(uint16_t code) { return code < 1 << Bits; }
  static Words round(Vector x, Vector zero) { return without_round(nearest(x + zero, 0.0f, kMost)); }
  static Vector rounded(Vector x, Vector zero) { return nearest(x + zero, 0.0f, kMost) - (zero + kRound); }

  template <class Isa, int quad>
  static typename Isa::I bytes(const uint8_t* run, int64_t stride) {
    constexpr int kQuads = 8 / kLowBits;  // of a line
    constexpr uint32_t kLower = ((1u << kLowBits) - 1) * 0x01010101u, kUpper = ((1u << kHighBits) - 1) * (0x01010101u << kLowBits);
    const auto line = Isa::load_integers(run + ((kHighBits > 0) + quad / kQuads) * stride);
    if constexpr (kHighBits == 0) {
      return Isa::template field<quad % kQuads * kLowBits, kLower>(line);
    } else if constexpr (kBits == 3) {
      // Two quads at once, as a line of 4-bit codes has them.
      const auto lower = Isa::template field<quad / 2 % 2 * 2, 0x33333333u>(line);
      const auto both = Isa::either(lower, Isa::template field<quad / 2 - 2, 0x44444444u>(Isa::load_integers(run)));
      return Isa::template field<quad % 2 * 4, 0x0f0f0f0fu>(both);
    } else {
      return Isa::either(Isa::template field<quad % kQuads * kLowBits, kLower>(line),
                         Isa::template field<quad * kHighBits - kLowBits, kUpper>(Isa::load_integers(run)));
    }
  }
};

// From which bit of its byte on column `column` of a run has its lower bits, and its upper ones: one quad behind the other, but of codes of 3 bits every
// second one behind the quads between them, in the upper halves of bytes.
template <class Codes>
constexpr int lower_bit(int column) {
  constexpr int kLow = Codes::kBits - Codes::kHighBits;
  const int quad = column / 4 % (8 / kLow);
  return Codes::kBits == 3 ? quad % 2 * 4 + quad / 2 * kLow : quad * kLow;
}
template <class Codes>
constexpr int upper_bit(int column) {
  const int quad = column / 4;
  return Codes::kBits == 3 ? quad % 2 * 4 + quad / 2 : quad * Codes::kHighBits;
}

// Codes::kTable plus kOffset, as unsigned bytes.
template <class Codes>
struct TableBytes {
  alignas(16) uint8_t value[16] = {};
  constexpr TableBytes() {
    for (int i = 0; i < 16; i++) value[i] = static_cast<uint8_t>(Codes::kTable[i] + Codes::kOffset);
  }
};

// Nibbles that stand for entries of Codes::kTable, whole numbers of units, none below -kOffset.
template <class Codes>
struct TableCodes {
  static constexpr int kBits = 4, kHighBits = 0, kPairs = 4;
  static constexpr bool kSplit = false;
  static constexpr bool kInteger = true;
  static constexpr uint16_t kPadding = 0;
  static float value(uint16_t code, int) { return Codes::kUnit * Codes::kTable[code & 15]; }
  static bool valid(uint16_t code) { return code < 16; }

  template <class Isa, int shift>
  static typename Isa::F column(typename Isa::I words, typename Isa::F) {
    return Isa::lookup(Isa::template field<shift, 15>(words), Codes::kTable);
  }
  template <class Isa, int half>
  static typename Isa::I bytes(const uint8_t* line, int64_t) {
    static constexpr TableBytes<Codes> kBytes{};
    return Isa::lookup_bytes(half ? Isa::high_nibbles(line) : Isa::low_nibbles(line), kBytes.value);
  }
};

// 4-bit floats e2m1: sign, two bits of exponent, one of mantissa. Kept as whole numbers of halves.
struct E2m1Codes : TableCodes<E2m1Codes> {
  static constexpr int kOffset = 12;
  static constexpr float kUnit = 0.5f;
  static constexpr float kMost = 6.0f;
  static constexpr int kMostExponent = 2;  // of a power of two
  static constexpr int8_t kTable[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  // To the nearest, ties to the even code, saturating.
  static Words round(Vector x, Vector) {
    const Vector a = from_bits(bits_of(x) & 0x7fffffffu);
    const Ints minus_code = (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) + (a > 5.0f);
    return reinterpret_cast<Words>(-minus_code) | bits_of(x) >> 31 << 3;
  }
  static Vector rounded(Vector x, Vector zero) {
    const Words code = round(x, zero), magnitude = code & 7;
    const Vector small = to_float(magnitude) * 0.5f, normal = from_bits((magnitude << 22) + (126u << 23));
    return from_bits(bits_of(magnitude < 2 ? small : normal) | code >> 3 << 31);
  }
};

// Entries of ggml's table for 4-bit codes that are not linear, close together around zero; none is zero.
struct Iq4Codes : TableCodes<Iq4Codes> {
  static constexpr int kOffset = 127;
  static constexpr float kUnit = 1.0f;
  static constexpr int8_t kTable[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  // To the nearest, ties to the lower one.
  static Words round(Vector x, Vector) {
    Ints minus_code{};
    for (int i = 0; i < 15; i++) minus_code += x > 0.5f * static_cast<float>(kTable[i] + kTable[i + 1]);
    return reinterpret_cast<Words>(-minus_code);
  }
  static Vector rounded(Vector x, Vector) {
    Vector value = splat(kTable[0]);
    for (int i = 0; i < 15; i++) {
      const float middle = 0.5f * static_cast<float>(kTable[i] + kTable[i + 1]), more = static_cast<float>(kTable[i + 1] - kTable[i]);
      value += x > middle ? splat(more) : Vector{};
    }
    return value;
  }
};

// 8-bit floats e4m3 without infinities: sign, four bits of exponent, three of mantissa.
struct E4m3Codes {
  static constexpr int kBits = 8, kHighBits = 0, kPairs = 2;
  static constexpr bool kSplit = false;
  static constexpr bool kInteger = false;
  static constexpr int kOffset = 0;
  static constexpr uint16_t kPadding = 0;
  static constexpr float kUnit = 1.0f;
  static constexpr float kMost = 448.0f;
  static constexpr int kMostExponent = 8;
  static float value(uint16_t code, int) {
    const uint32_t magnitude = code & 0x7f;
    const float small = static_cast<float>(magnitude) / 512.0f;
    const float v = magnitude < 8 ? small : bits_to_float((magnitude << 20) + (120u << 23));
    return code & 0x80 ? -v : v;
  }
  static bool valid(uint16_t code) { return (code & 0x7f) != 0x7f; }
  // To the nearest, ties to even, saturating.
  static Words round(Vector x, Vector) {
    const Vector size = from_bits(bits_of(x) & 0x7fffffffu), a = size < kMost ? size : splat(kMost);
    const Words u = bits_of(a), normal = ((u + 0x7ffff + (u >> 20 & 1)) >> 20) - (120u << 3);
    const Words small = without_round(a * 512.0f + kRound);
    return (a < 0.015625f ? small : normal) | bits_of(x) >> 31 << 7;
  }
  static Vector rounded(Vector x, Vector zero) {
    const Words code = round(x, zero), magnitude = code & 0x7f;
    const Vector small = to_float(magnitude) / 512.0f, normal = from_bits((magnitude << 20) + (120u << 23));
    return from_bits(bits_of(magnitude < 8 ? small : normal) | code >> 7 << 31);
  }

  template <class Isa, int shift>
  static typename Isa::F column(typename Isa::I words, typename Isa::F) {
    return Isa::e4m3(Isa::template field<shift, 255>(words));
  }
};

// Whether an instruction set has a quick way from a line of codes to lines of bf16 pairs. Sixteen entries are one register, whatever they stand for.
template <class Isa, class Codes>
constexpr bool kAsLines = (Codes::kBits == 4 && Isa::kLooksUpLines) || (std::is_same_v<Codes, E4m3Codes> && Isa::kE4m3Lines);

// A line as bf16 pairs of its columns, without scales; nibbles less 8.
template <class Isa, class Codes>
inline void lines_of(const uint8_t* line, typename Isa::I (&to)[Codes::kPairs]) {
  if constexpr (Codes::kBits == 4)
    Isa::lookup_lines(line, Codes::kTable, to);
  else
    Isa::e4m3_lines(line, to);
}

// f(begin), f(begin + 1), ... f(end - 1), as constants.
template <int end, int begin = 0, class F>
[[gnu::always_inline]] inline void each_index(const F& f) {
  f(std::integral_constant<int, begin>{});
  if constexpr (begin + 1 < end) each_index<end, begin + 1>(f);
}

// f of those of a run's quads that belong to part `part` of `parts`, as constants.
template <int quads, int parts, class F>
[[gnu::always_inline]] inline void each_quad([[maybe_unused]] int part, const F& f) {
  static_assert(parts <= 2);
  if constexpr (parts == 1)
    each_index<quads>(f);
  else if (part == 0)
    each_index<quads / 2>(f);
  else
    each_index<quads, quads / 2>(f);
}

// The columns of a line in natural order, two by two: take(index of the pair, first, second). Zero: zero points are stored.
template <class Isa, class Codes, bool Zero, class Take>
inline void each_pair_of_line(const uint8_t* line, typename Isa::F minus_zero, const Take& take) {
  if constexpr (kAsLines<Isa, Codes>) {
    typename Isa::I pairs[Codes::kPairs];
    lines_of<Isa, Codes>(line, pairs);
    const auto moved = Isa::add(minus_zero, Isa::set1(8.0f));
    for (int i = 0; i < Codes::kPairs; i++) {
      const auto pair = Isa::split(pairs[i]);
      take(i, Zero ? Isa::add(pair.even, moved) : pair.even, Zero ? Isa::add(pair.odd, moved) : pair.odd);
    }
    return;
  }
  const auto words = Isa::load_integers(line);
  if constexpr (Codes::kBits == 8) {
    take(0, Codes::template column<Isa, 0>(words, minus_zero), Codes::template column<Isa, 16>(words, minus_zero));
    take(1, Codes::template column<Isa, 8>(words, minus_zero), Codes::template column<Isa, 24>(words, minus_zero));
  } else {
    take(0, Codes::template column<Isa, 0>(words, minus_zero), Codes::template column<Isa, 16>(words, minus_zero));
    take(1, Codes::template column<Isa, 8>(words, minus_zero), Codes::template column<Isa, 24>(words, minus_zero));
    take(2, Codes::template column<Isa, 4>(words, minus_zero), Codes::template column<Isa, 20>(words, minus_zero));
    take(3, Codes::template column<Isa, 12>(words, minus_zero), Codes::template column<Isa, 28>(words, minus_zero));
  }
}

// The same of part `part` of a run's `parts`, whose lines lie `stride` bytes apart.
template <class Isa, class Codes, bool Zero, int parts, class Take>
inline void each_pair(const uint8_t* run, int part, int64_t stride, typename Isa::F minus_zero, const Take& take) {
  if constexpr (!Codes::kSplit)
    each_pair_of_line<Isa, Codes, Zero>(run, minus_zero, take);
  else
    each_quad<Codes::kPairs / 2, parts>(part, [&](auto index) {
      constexpr int quad = decltype(index)::value;
      const auto words = Codes::template bytes<Isa, quad>(run, stride);
      const auto column = [&](auto bytes) { return Isa::add(Isa::to_float(bytes), minus_zero); };
      take(2 * quad, column(Isa::template field<0, 255>(words)), column(Isa::template field<16, 255>(words)));
      take(2 * quad + 1, column(Isa::template field<8, 255>(words)), column(Isa::template field<24, 255>(words)));
    });
}

// Pairs of a line for the instructions that multiply them.
template <class Isa, class Codes>
inline void pairs_of_line(const uint8_t* line, typename Isa::Pair (&to)[Codes::kPairs]) {
  if constexpr (Codes::kBits == 16) {
    to[0] = Isa::pair(Isa::load_integers(line));
  } else if constexpr (kAsLines<Isa, Codes>) {
    typename Isa::I pairs[Codes::kPairs];
    lines_of<Isa, Codes>(line, pairs);
    for (int i = 0; i < Codes::kPairs; i++) to[i] = Isa::pair(pairs[i]);
  } else {
    each_pair_of_line<Isa, Codes, false>(line, Isa::set1(-Codes::kOffset), [&](int i, auto first, auto second) { to[i] = Isa::pair_of(first, second); });
  }
}

// The first and second columns of a quad of a run whose codes are split, likewise, and its third and fourth.
template <class Isa, class Codes, int quad>
inline void pairs_of_quad(const uint8_t* run, int64_t stride, typename Isa::Pair (&to)[2]) {
  const auto words = Codes::template bytes<Isa, quad>(run, stride);
  if constexpr (Isa::kLooksUpLines) {
    typename Isa::I pairs[2];
    Isa::lookup_words(words, Codes::kWords.value, pairs);
    for (int i = 0; i < 2; i++) to[i] = Isa::pair(pairs[i]);
  } else {
    const auto column = [&](auto bytes) { return Isa::add(Isa::to_float(bytes), Isa::set1(-Codes::kOffset)); };
    to[0] = Isa::pair_of(column(Isa::template field<0, 255>(words)), column(Isa::template field<16, 255>(words)));
    to[1] = Isa::pair_of(column(Isa::template field<8, 255>(words)), column(Isa::template field<24, 255>(words)));
  }
}

// The same written out, `stride` bytes apart.
template <class Isa, class Codes>
inline void store_line(const uint8_t* line, uint8_t* to, int64_t stride) {
  if constexpr (kAsLines<Isa, Codes>) {
    typename Isa::I pairs[Codes::kPairs];
    lines_of<Isa, Codes>(line, pairs);
    for (int i = 0; i < Codes::kPairs; i++) Isa::store_integers(to + i * stride, pairs[i]);
  } else {
    each_pair_of_line<Isa, Codes, false>(line, Isa::set1(-Codes::kOffset), [&](int i, auto first, auto second) { Isa::store_pairs(to + i * stride, first, second); });
  }
}

}  // namespace
}  // namespace coterie
