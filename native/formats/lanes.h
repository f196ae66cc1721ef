// Packing works on 16 rows side by side as lanes, as many at a time as an instruction takes: whatever is known of those rows stays in registers.
#pragma once
#include <cstdint>
#include <cstring>

#include "formats/bfloat16.h"
#include "formats/layout.h"

namespace coterie {
namespace {

constexpr int kLanes = kPanelRows;
#ifdef __AVX512F__
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
typedef float Vector __attribute__((vector_size(kWidth * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(kWidth * sizeof(uint32_t))));
typedef int32_t Ints __attribute__((vector_size(kWidth * sizeof(int32_t))));

template <class To, class From>
inline To load(const From* from) {
  To v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <class To, class From>
inline void store(To* to, From v) {
  memcpy(to, &v, sizeof v);
}

// As integers of fewer bits.
template <class T>
inline void store_narrow(uint8_t* to, Words v) {
  typedef T Narrow __attribute__((vector_size(kWidth * sizeof(T))));
  store(to, __builtin_convertvector(v, Narrow));
}

inline Words bits_of(Vector v) { return reinterpret_cast<Words>(v); }
inline Vector from_bits(Words bits) { return reinterpret_cast<Vector>(bits); }
inline Vector splat(float x) { return Vector{} + x; }

// As integers, which CPUs compare faster: numbers above zero are in the order of their bits. 0 < low <= high.
inline Vector bounded(Vector x, Vector low, Vector high) {
  const Ints bits = reinterpret_cast<Ints>(x), least = reinterpret_cast<Ints>(low), most = reinterpret_cast<Ints>(high);
  const Ints raised = bits > least ? bits : least;
  return reinterpret_cast<Vector>(raised < most ? raised : most);
}

// Adding it rounds to an integer, ties to even, for |x| < 2^22; an integer's bits are then its own plus those of kRound.
constexpr float kRound = 12582912.0f;

// kRound + the integer from `low` to `high` that is nearest to x. low >= 0.
inline Vector nearest(Vector x, float low, float high) { return bounded(x + kRound, splat(kRound + low), splat(kRound + high)); }

// Integers on top of kRound, as integers, and back.
inline Words without_round(Vector x) { return bits_of(x) - float_to_bits(kRound); }
inline Vector to_float(Words x) { return from_bits(x + float_to_bits(kRound)) - kRound; }

// 0 where the quotient is not a number, or too large for one.
inline Vector quotient(float a, Vector b) {
  const Vector q = a / b;
  return reinterpret_cast<Ints>(bits_of(q) & 0x7fffffffu) < 0x7f800000 ? q : Vector{};
}

}  // namespace
}  // namespace coterie
