// Scales that stand in a step behind its codes: one a row in 16, 8 or 0 bits, or one float for all rows of the block.
// `stored`: a scale as it will be read again; `store` takes such scales.
#pragma once
#include "formats/codes.h"

namespace coterie {
namespace {

struct NoScale {
  static constexpr int kRowBytes = 0, kBlockBytes = 0;
};

struct Bf16Scale {
  static constexpr int kRowBytes = 2, kBlockBytes = 0;
  static bool valid(const uint8_t*) { return true; }
  // Of a number.
  static Vector stored(Vector scale) {
    const Words bits = bits_of(scale);
    return from_bits((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
  }
  static void store(Vector scale, uint8_t* to) { store_narrow<uint16_t>(to, bits_of(scale) >> 16); }
  static float value(const uint8_t* from) {
    uint16_t half;
    memcpy(&half, from, 2);
    return bf16_to_float(half);
  }
  template <class Isa>
  static typename Isa::F load(const uint8_t* panel) {
    return Isa::load_bf16(panel);
  }
};

struct F16Scale {
  static constexpr int kRowBytes = 2, kBlockBytes = 0;
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
  static float value(const uint8_t* from) {
    uint16_t half;
    memcpy(&half, from, 2);
    return f16_to_float(half);
  }
  template <class Isa>
  static typename Isa::F load(const uint8_t* panel) {
    return Isa::load_f16(panel);
  }
};

// Powers of two, 2^(byte - 127); 255 is NaN.
struct E8m0Scale {
  static constexpr int kRowBytes = 1, kBlockBytes = 0;
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

struct E4m3Scale {
  static constexpr int kRowBytes = 1, kBlockBytes = 0;
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
struct BlockScale {
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

}  // namespace
}  // namespace coterie
