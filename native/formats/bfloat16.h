// bf16 <-> f32 and f16 -> f32 in plain C, vectorised by the compiler of each instruction set.
#pragma once
#include <cstdint>
#include <cstring>

namespace coterie {
namespace {

inline float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

inline uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

inline float bf16_to_float(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }

// Round to nearest even; NaN stays NaN.
inline uint16_t float_to_bf16(float f) {
  const uint32_t u = float_to_bits(f), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | 0x40 : rounded);
}

inline float f16_to_float(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  const float normal = bits_to_float((magnitude << 13) + 0x38000000u);
  const float subnormal = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
  const float special = bits_to_float(0x7f800000u | (magnitude << 13));
  const float value = magnitude < 0x400u ? subnormal : magnitude >= 0x7c00u ? special : normal;
  return bits_to_float(float_to_bits(value) | sign);
}

}  // namespace
}  // namespace coterie
