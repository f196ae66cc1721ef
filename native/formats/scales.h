// Scales that stand in a step behind its codes: one a row in 16, 8 or 0 bits, or one float for all rows of the block.
// `stored`: a scale as it will be read again; `store` takes such scales. A row may have several in a step, or a minimum: they are a record of its bytes.
#pragma once
#include "formats/codes.h"

namespace coterie {
namespace {

// One scale for the columns of a step, or none.
struct OneScale {
  static constexpr int kCount = 1;
  static constexpr bool kRecord = false, kMinimum = false;
};

// Where byte i of what a lane has in a step is among that of its panel: numbers of 16 bits come first, each of 16 rows side by side, then bytes likewise.
constexpr int record_byte(int halves, int lane, int i) { return i < 2 * halves ? i / 2 * 2 * kLanes + lane * 2 + i % 2 : i * kLanes + lane; }

struct NoScale : OneScale {
  static constexpr int kRowBytes = 0, kBlockBytes = 0;
};

// One of 16 bits.
struct HalfScale : OneScale {
  static constexpr int kRowBytes = 2, kHalves = 1, kBlockBytes = 0;
  static uint16_t half(const uint8_t* from) {
    uint16_t bits;
    memcpy(&bits, from, 2);
    return bits;
  }
};

struct Bf16Scale : HalfScale {
  static bool valid(const uint8_t*) { return true; }
  // Of a number.
  static Vector stored(Vector scale) {
    const Words bits = bits_of(scale);
    return from_bits((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
  }
  static void store(Vector scale, uint8_t* to) { store_narrow<uint16_t>(to, bits_of(scale) >> 16); }
  static float value(const uint8_t* from) { return bf16_to_float(half(from)); }
  template <class Isa>
  static typename Isa::F load(const uint8_t* panel) {
    return Isa::load_bf16(panel);
  }
};

struct F16Scale : HalfScale {
  static constexpr float kMost = 65504.0f;
  static bool valid(const uint8_t* from) { return (from[1] & 0x7c) != 0x7c; }
  // Of a number: to the nearest, ties to even, saturating.
  static Words round(Vector x) {
    const Vector size = from_bits(bits_of(x) & 0x7fffffffu), a = size < kMost ? size : splat(kMost);
    const Words u = bits_of(a), normal = ((u + 0xfff + (u >> 13 & 1)) >> 13) - (112u << 10);
    const Words small = without_round(a * 16777216.0f + kRound);
    return (a < 6.103515625e-5f ? small : normal) | bits_of(x) >> 31 << 15;
  }
  static Vector stored(Vector scale) {
    const Words bits = round(scale), magnitude = bits & 0x7fff;
    const Vector small = to_float(magnitude) / 16777216.0f, normal = from_bits((magnitude << 13) + (112u << 23));
    return from_bits(bits_of(magnitude < 0x400 ? small : normal) | bits >> 15 << 31);
  }
  static void store(Vector scale, uint8_t* to) { store_narrow<uint16_t>(to, round(scale)); }
  static float value(const uint8_t* from) { return f16_to_float(half(from)); }
  template <class Isa>
  static typename Isa::F load(const uint8_t* panel) {
    return Isa::load_f16(panel);
  }
};

// Powers of two, 2^(byte - 127); 255 is NaN.
struct E8m0Scale : OneScale {
  static constexpr int kRowBytes = 1, kHalves = 0, kBlockBytes = 0;
  static bool valid(const uint8_t* from) { return *from != 255; }
  // Of a power of two.
  static Vector stored(Vector scale) { return scale; }
  static void store(Vector scale, uint8_t* to) { store_narrow<uint8_t>(to, bits_of(scale) >> 23); }
  static float value(const uint8_t* from) { return bits_to_float(*from ? static_cast<uint32_t>(*from) << 23 : 0x00400000u); }
  template <class Isa>
  static typename Isa::F load(const uint8_t* panel) {
    return Isa::load_e8m0(panel);
  }
};

struct E4m3Scale : OneScale {
  static constexpr int kRowBytes = 1, kHalves = 0, kBlockBytes = 0;
  static bool valid(const uint8_t* from) { return E4m3Codes::valid(*from); }
  static Vector stored(Vector scale) { return E4m3Codes::rounded(scale, Vector{}); }
  static void store(Vector scale, uint8_t* to) { store_narrow<uint8_t>(to, E4m3Codes::round(scale, Vector{})); }
  static float value(const uint8_t* from) { return E4m3Codes::value(*from, 0); }
  template <class Isa>
  static typename Isa::F load(const uint8_t* panel) {
    return Isa::e4m3(Isa::load_byte_integers(panel));
  }
};

// One f32 for the block, 16 times, so that it is loaded as those of a panel are.
struct BlockScale : OneScale {
  static constexpr int kRowBytes = 0, kBlockBytes = kLanes * 4;
  static bool valid(const uint8_t*) { return true; }
  static Vector stored(Vector scale) { return scale; }
  static void store(float scale, uint8_t* to) {
    for (int lane = 0; lane < kLanes; lane++) memcpy(to + lane * 4, &scale, 4);
  }
  static float value(const uint8_t* from) {
    float scale;
    memcpy(&scale, from, 4);
    return scale;
  }
  template <class Isa>
  static typename Isa::F load(const uint8_t* panel) {
    return Isa::load(reinterpret_cast<const float*>(panel));
  }
};

// Scales that share an f16, or an f16 for scales and one for minima, with the bytes behind that say how each is made of it.
template <int halves, int bytes, int count>
struct Record {
  static constexpr int kRowBytes = 2 * halves + bytes, kHalves = halves, kBlockBytes = 0, kCount = count;
  static constexpr bool kRecord = true, kMinimum = halves == 2;
  static bool valid(const uint8_t* record) { return F16Scale::valid(record) && (halves == 1 || F16Scale::valid(record + 2)); }

 protected:
  // Number i of the f16s of a panel, for lanes from `lane` on.
  static void store_half(int i, Vector value, uint8_t* panel, int lane) { store_narrow<uint16_t>(panel + (i * kLanes + lane) * 2, F16Scale::round(value)); }
};

// GGUF's for 256 columns with minima: two f16s, and for each 32 columns whole numbers of 6 bits by which they are multiplied for scale and minimum.
// Of the 12 bytes behind the f16s the first four have the lower bits of scales 0 to 3, the next those of minima 0 to 3, and the last the lower four bits
// of scales and, above them, of minima 4 to 7, whose upper two are those of the first eight bytes.
struct ScalesAndMinima : Record<2, 12, 8> {
  static constexpr int kFactor = 63;
  static float value(const uint8_t* record, int group) {
    const uint8_t* b = record + 4;
    return F16Scale::value(record) * static_cast<float>(group < 4 ? b[group] & 63 : (b[group + 4] & 15) | b[group - 4] >> 6 << 4);
  }
  static float minimum(const uint8_t* record, int group) {
    const uint8_t* b = record + 4;
    return F16Scale::value(record + 2) * static_cast<float>(group < 4 ? b[group + 4] & 63 : b[group + 4] >> 4 | b[group] >> 6 << 4);
  }
  // Of a panel, for lanes from `lane` on.
  static void store(Vector scale, Vector minimum, const Words (&of_scale)[kCount], const Words (&of_minimum)[kCount], uint8_t* panel, int lane) {
    store_half(0, scale, panel, lane);
    store_half(1, minimum, panel, lane);
    uint8_t* const to = panel + 4 * kLanes + lane;
    for (int g = 0; g < 4; g++) {
      store_narrow<uint8_t>(to + g * kLanes, of_scale[g] | of_scale[g + 4] >> 4 << 6);
      store_narrow<uint8_t>(to + (g + 4) * kLanes, of_minimum[g] | of_minimum[g + 4] >> 4 << 6);
      store_narrow<uint8_t>(to + (g + 8) * kLanes, (of_scale[g + 4] & 15) | (of_minimum[g + 4] & 15) << 4);
    }
  }
  template <class Isa>
  struct Panel {
    typename Isa::F unit, unit_of_minima;
    const uint8_t* first;

    explicit Panel(const uint8_t* panel) : unit(Isa::load_f16(panel)), unit_of_minima(Isa::load_f16(panel + 2 * kLanes)), first(panel + 4 * kLanes) {}
    [[gnu::always_inline]] typename Isa::I bytes(int i) const { return Isa::load_byte_integers(first + i * kLanes); }
    [[gnu::always_inline]] typename Isa::F scale(int group) const {
      return Isa::mul(unit, Isa::to_float(group < 4 ? Isa::template field<0, 63>(bytes(group))
                                                    : Isa::either(Isa::template field<0, 15>(bytes(group + 4)), Isa::template field<2, 48>(bytes(group - 4)))));
    }
    [[gnu::always_inline]] typename Isa::F minimum(int group) const {
      return Isa::mul(unit_of_minima, Isa::to_float(group < 4 ? Isa::template field<0, 63>(bytes(group + 4))
                                                              : Isa::either(Isa::template field<4, 15>(bytes(group + 4)), Isa::template field<2, 48>(bytes(group)))));
    }
  };
};

// GGUF's for 32 columns: an f16, and an f16 that is added.
struct ScaleAndStart : Record<2, 0, 1> {
  static float value(const uint8_t* record, int) { return F16Scale::value(record); }
  static float minimum(const uint8_t* record, int) { return -F16Scale::value(record + 2); }
  static void store(Vector scale, Vector minimum, uint8_t* panel, int lane) {
    store_half(0, scale, panel, lane);
    store_half(1, -minimum, panel, lane);
  }
  template <class Isa>
  struct Panel {
    const uint8_t* from;

    explicit Panel(const uint8_t* panel) : from(panel) {}
    [[gnu::always_inline]] typename Isa::F scale(int) const { return Isa::load_f16(from); }
    [[gnu::always_inline]] typename Isa::F minimum(int) const { return Isa::mul(Isa::load_f16(from + 2 * kLanes), Isa::set1(-1.0f)); }
  };
};

// Where kCount numbers of 6 bits are in kBytes bytes: the lower four and the upper two of number g are in a byte each, from a bit on.
struct EightPlaces {
  static constexpr int kCount = 8, kBytes = 6;
  static constexpr int lower(int g) { return 2 + g / 2; }
  static constexpr int lower_bit(int g) { return g % 2 * 4; }
  static constexpr int upper(int g) { return g / 4; }
  static constexpr int upper_bit(int g) { return g % 4 * 2; }
};

struct SixteenPlaces {
  static constexpr int kCount = 16, kBytes = 12;
  static constexpr int lower(int g) { return g % 8; }
  static constexpr int lower_bit(int g) { return g / 8 * 4; }
  static constexpr int upper(int g) { return 8 + g % 4; }
  static constexpr int upper_bit(int g) { return g / 4 * 2; }
};

// GGUF's for 256 columns: an f16, and bytes with whole numbers of 6 bits, less 32, by which it is multiplied for each part of the columns.
template <class Places>
struct SixBitScales : Record<1, Places::kBytes, Places::kCount> {
  static constexpr int kCount = Places::kCount, kBytes = Places::kBytes;
  static float value(const uint8_t* record, int group) {
    const uint8_t* b = record + 2;
    const int lower = b[Places::lower(group)] >> Places::lower_bit(group) & 15, upper = b[Places::upper(group)] >> Places::upper_bit(group) & 3;
    return F16Scale::value(record) * static_cast<float>((lower | upper << 4) - 32);
  }
  // Of a panel, for lanes from `lane` on; factors are 32 more than they stand for.
  static void store(Vector scale, const Words (&factor)[kCount], uint8_t* panel, int lane) {
    Words bytes[kBytes] = {};
    for (int g = 0; g < kCount; g++) {
      bytes[Places::lower(g)] |= (factor[g] & 15) << Places::lower_bit(g);
      bytes[Places::upper(g)] |= factor[g] >> 4 << Places::upper_bit(g);
    }
    SixBitScales::store_half(0, scale, panel, lane);
    for (int i = 0; i < kBytes; i++) store_narrow<uint8_t>(panel + (2 + i) * kLanes + lane, bytes[i]);
  }
  template <class Isa>
  struct Panel {
    typename Isa::F unit, start;  // whose products, and differences, are exact
    const uint8_t* first;

    explicit Panel(const uint8_t* panel) : unit(Isa::load_f16(panel)), start(Isa::mul(unit, Isa::set1(-32.0f))), first(panel + 2 * kLanes) {}
    [[gnu::always_inline]] typename Isa::F scale(int group) const {
      const auto lower = Isa::load_byte_integers(first + Places::lower(group) * kLanes), upper = Isa::load_byte_integers(first + Places::upper(group) * kLanes);
      const int bit = Places::upper_bit(group);
      const auto whole = Isa::either(Places::lower_bit(group) ? Isa::template field<4, 15>(lower) : Isa::template field<0, 15>(lower),
                                     bit == 0   ? Isa::template field<-4, 48>(upper)
                                     : bit == 2 ? Isa::template field<-2, 48>(upper)
                                     : bit == 4 ? Isa::template field<0, 48>(upper)
                                                : Isa::template field<2, 48>(upper));
      return Isa::fma(Isa::to_float(whole), unit, start);
    }
  };
};

// GGUF's for 256 columns with minima: two f16s, and for each 16 columns a byte with two whole numbers by which they are multiplied for scale and minimum.
struct NibblesAndMinima : Record<2, 16, 16> {
  static constexpr int kFactor = 15;
  static float value(const uint8_t* record, int group) { return F16Scale::value(record) * static_cast<float>(record[4 + group] & 15); }
  static float minimum(const uint8_t* record, int group) { return F16Scale::value(record + 2) * static_cast<float>(record[4 + group] >> 4); }
  // Of a panel, for lanes from `lane` on.
  static void store(Vector scale, Vector minimum, const Words (&of_scale)[kCount], const Words (&of_minimum)[kCount], uint8_t* panel, int lane) {
    store_half(0, scale, panel, lane);
    store_half(1, minimum, panel, lane);
    for (int g = 0; g < kCount; g++) store_narrow<uint8_t>(panel + (4 + g) * kLanes + lane, of_scale[g] | of_minimum[g] << 4);
  }
  template <class Isa>
  struct Panel {
    typename Isa::F unit, unit_of_minima;
    const uint8_t* first;

    explicit Panel(const uint8_t* panel) : unit(Isa::load_f16(panel)), unit_of_minima(Isa::load_f16(panel + 2 * kLanes)), first(panel + 4 * kLanes) {}
    [[gnu::always_inline]] typename Isa::I both(int group) const { return Isa::load_byte_integers(first + group * kLanes); }
    [[gnu::always_inline]] typename Isa::F scale(int group) const { return Isa::mul(unit, Isa::to_float(Isa::template field<0, 15>(both(group)))); }
    [[gnu::always_inline]] typename Isa::F minimum(int group) const { return Isa::mul(unit_of_minima, Isa::to_float(Isa::template field<4, 15>(both(group)))); }
  };
};

// GGUF's for 256 columns: an f16, and for each 16 columns a signed byte by which it is multiplied.
struct ByteScales : Record<1, 16, 16> {
  static float value(const uint8_t* record, int group) { return F16Scale::value(record) * static_cast<float>(static_cast<int8_t>(record[2 + group])); }
  // Of a panel, for lanes from `lane` on; factors are 128 more than they stand for.
  static void store(Vector scale, const Words (&factor)[kCount], uint8_t* panel, int lane) {
    store_half(0, scale, panel, lane);
    for (int g = 0; g < kCount; g++) store_narrow<uint8_t>(panel + (2 + g) * kLanes + lane, factor[g] ^ 128);
  }
  template <class Isa>
  struct Panel {
    typename Isa::F unit;
    const uint8_t* first;

    explicit Panel(const uint8_t* panel) : unit(Isa::load_f16(panel)), first(panel + 2 * kLanes) {}
    [[gnu::always_inline]] typename Isa::F scale(int group) const { return Isa::mul(unit, Isa::load_signed_bytes(first + group * kLanes)); }
  };
};

}  // namespace
}  // namespace coterie
