// AVX512 with VNNI and VBMI: one instruction multiplies a line of weights with a broadcast quad, and tables are looked up in registers.
// Written as assembly where the instructions exist: with the intrinsics gcc 12 keeps a tile's accumulators in memory, at half the speed.
#pragma once
#include "isa/simd_avx512.h"

namespace coterie {
namespace {

// The bytes of the bf16 of each e4m3 code without its sign.
struct E4m3Bytes {
  alignas(64) uint8_t low[128] = {}, high[128] = {};
  constexpr E4m3Bytes() {
    constexpr uint16_t kSubnormal[8] = {0x0000, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};
    for (int code = 0; code < 128; code++) {
      const int bf16 = code < 8 ? kSubnormal[code] : (code << 4) + (120 << 7);
      low[code] = static_cast<uint8_t>(bf16 & 255);
      high[code] = static_cast<uint8_t>(bf16 >> 8);
    }
  }
};
constexpr E4m3Bytes kE4m3Bytes;

struct Avx512Vnni : Avx512 {
  static constexpr int kIntegerBytes = 1, kShortBytes = 0;
  static constexpr bool kLooksUpLines = true;
  static constexpr int tile_panels(int rows, bool integer) { return integer ? 4 : Avx512::tile_panels(rows, false); }
  static constexpr int64_t kIntegerMacs = 64;

  // A table of 16 whole numbers as bf16, twice: of a shifted word's index the fifth bit is that of a neighbour.
  static void lookup_lines(const uint8_t* line, const int8_t* table, I (&to)[4]) {
    const I values = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)table))));
    const I entries = _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(_mm512_srli_epi32(values, 16))), w = _mm512_loadu_si512(line);
    to[0] = _mm512_permutexvar_epi16(w, entries);
    to[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 8), entries);
    to[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 4), entries);
    to[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 12), entries);
  }
  // A table of 32 or 64 words: those of a line's even and of its odd bytes.
  template <int count>
  static void lookup_words(I bytes, const uint16_t (&table)[count], I (&to)[2]) {
    auto look_up = [&](I index) {
      const I first = _mm512_load_si512(table);
      return count == 32 ? _mm512_permutexvar_epi16(index, first) : _mm512_permutex2var_epi16(first, index, _mm512_load_si512(table + count - 32));
    };
    to[0] = look_up(bytes);
    to[1] = look_up(_mm512_srli_epi16(bytes, 8));
  }
  // Either byte of the bf16 of 64 codes by a table of 128 entries, which the codes' signs do not take part in.
  static void e4m3_lines(const uint8_t* line, I (&to)[2]) {
    auto look_up = [](I codes, const uint8_t* table) {
      return _mm512_permutex2var_epi8(_mm512_load_si512(table), codes, _mm512_load_si512(table + 64));
    };
    const I w = _mm512_loadu_si512(line), low = look_up(w, kE4m3Bytes.low), even = _mm512_set1_epi16(0x00ff);
    const I high = _mm512_ternarylogic_epi32(look_up(w, kE4m3Bytes.high), w, _mm512_set1_epi8(int8_t(0x80)), 0xf8);  // a | (b & c)
    to[0] = _mm512_ternarylogic_epi32(even, low, _mm512_slli_epi16(high, 8), 0xca);                                  // a ? b : c
    to[1] = _mm512_ternarylogic_epi32(even, _mm512_srli_epi16(low, 8), high, 0xca);
  }

  using Quad = __m512i;
  static Quad quad_of(Avx512::I w) { return w; }
  static Quad broadcast_quad(const uint8_t* x) { return _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(x)); }
  using Avx512::dot;
  static I dot(I acc, Quad w, Quad x) {
#if defined(__AVX512VNNI__)
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
#else
    acc = _mm512_dpbusd_epi32(acc, w, x);
#endif
    return acc;
  }
  static I store_codes(uint8_t* to, Avx512::F v) {
    const I q = _mm512_cvtps_epi32(v);
    store_bytes(to, q);
    return q;
  }

  static void dots(int64_t count, bool integer) {
    const I x = integer_zero();
    integer ? chains(count, x, [&](I v) { return dot(v, x, x); }) : Avx512::dots(count, false);
  }
};

}  // namespace
}  // namespace coterie
