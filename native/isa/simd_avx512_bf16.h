// AVX512 with BF16 and VNNI: one instruction multiplies a line of weights with a broadcast pair or quad.
// Written as assembly where the instructions exist: with the intrinsics gcc 12 keeps a tile's accumulators in memory, at half the speed.
#pragma once
#include "isa/simd_avx512.h"

namespace coterie {
namespace {

struct Avx512Bf16 : Avx512 {
  static constexpr int kFloatBytes = 2, kIntegerBytes = 1;
  static constexpr bool kLooksUpPairs = true;
  static constexpr int kTileRows = 6;
  static constexpr int tile_panels(int) { return 4; }
  static constexpr int64_t kFloatMacs = 32, kIntegerMacs = 64;

  using Pair = __m512i;
  static Pair load_pair(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Pair pair_of(Avx512::F even, Avx512::F odd) { return interleave((__m512i)_mm512_cvtne2ps_pbh(odd, even)); }
  static Pair broadcast_pair(const uint8_t* x) { return _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(x)); }
  static F dot(F acc, Pair w, Pair x) {
#if defined(__AVX512BF16__)
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
#else
    acc = _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x);
#endif
    return acc;
  }

  static void store_pairs(uint8_t* to, Avx512::F first, Avx512::F second) {
    _mm512_storeu_si512(to, pair_of(first, second));
  }

  // A table of 16 whole numbers as bf16, twice: of a shifted word's index the fifth bit is that of a neighbour.
  static void lookup_pairs(const uint8_t* line, const int8_t* table, Pair (&to)[4]) {
    const Avx512::F values = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)table)));
    const __m512i entries = (__m512i)_mm512_cvtne2ps_pbh(values, values), w = _mm512_loadu_si512(line);
    to[0] = _mm512_permutexvar_epi16(w, entries);
    to[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 8), entries);
    to[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 4), entries);
    to[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 12), entries);
  }
  static void e4m3_pairs(const uint8_t* line, Pair (&to)[2]) {
    const __m512i w = _mm512_loadu_si512(line);
    to[0] = e4m3_words(w);
    to[1] = e4m3_words(_mm512_srli_epi16(w, 8));
  }

  using Quad = __m512i;
  static Quad quad_of(Avx512::I w) { return w; }
  static Quad broadcast_quad(const uint8_t* x) { return _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(x)); }
  static I dot(I acc, Quad w, Quad x) {
#if defined(__AVX512VNNI__)
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
#else
    acc = _mm512_dpbusd_epi32(acc, w, x);
#endif
    return acc;
  }
  // 16 codes as bytes in the order of kQuadOrder.
  static I store_codes(uint8_t* to, Avx512::F v) {
    const I q = _mm512_cvtps_epi32(v);
    const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    _mm_storeu_si128((__m128i*)to, _mm_shuffle_epi8(_mm512_cvtepi32_epi8(q), order));
    return q;
  }

  static void dots(int64_t count, bool integer) {
    constexpr int kChains = 16;
    __m512i acc[kChains], x = _mm512_setzero_si512();
    for (int c = 0; c < kChains; c++) acc[c] = _mm512_setzero_si512();
    for (int64_t n = 0; n < count; n += kChains)
#pragma GCC unroll 16
      for (int c = 0; c < kChains; c++) {
        acc[c] = integer ? _mm512_dpbusd_epi32(acc[c], x, x) : (__m512i)_mm512_dpbf16_ps((__m512)acc[c], (__m512bh)x, (__m512bh)x);
        keep(acc[c]);
      }
  }
};

}  // namespace
}  // namespace coterie
