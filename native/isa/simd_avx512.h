// AVX512 (F, BW, DQ, VL): 16 lanes are one register. bf16 products in f32, integer products in 16-bit pairs.
#pragma once
#include <immintrin.h>

#include "isa/decode.h"
#include "isa/pairs.h"

namespace coterie {
namespace {

// 0, 16, 1, 17, ...: what interleaves the two halves of a register of 16-bit elements.
struct Interleaved {
  alignas(64) int16_t index[32] = {};
  constexpr Interleaved() {
    for (int i = 0; i < 32; i++) index[i] = static_cast<int16_t>(i / 2 + i % 2 * 16);
  }
};
constexpr Interleaved kInterleaved;

struct Avx512 {
  using F = __m512;
  using I = __m512i;
  static constexpr int kFloatBytes = 4, kIntegerBytes = 2, kShortBytes = 1;
  static constexpr bool kTiles = false, kLooksUpLines = false, kE4m3Lines = true;
  static constexpr int kRegistersPerVector = 1;
  static constexpr int kFetchedBits = 16;  // codes of at most so many bits are fetched ahead even where they are read but once
  static constexpr int kTileRows = 6;
  static constexpr int tile_panels(int rows, bool) { return rows <= 2 ? 4 : 2; }
  static constexpr int64_t kFloatMacs = 16, kIntegerMacs = 32;

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max_abs(F a, F b) { return _mm512_max_ps(a, _mm512_abs_ps(b)); }
  static float reduce_max(F v) { return _mm512_reduce_max_ps(v); }
  static float reduce_add(F v) { return _mm512_reduce_add_ps(v); }
  // The sum of each.
  static void eight_sums(const F* v, float* to) {
    auto low = [](F a, F b) { return _mm512_castsi512_ps(_mm512_unpacklo_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b))); };
    auto high = [](F a, F b) { return _mm512_castsi512_ps(_mm512_unpackhi_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b))); };
    auto two = [&](F a, F b) { return add(low(a, b), high(a, b)); };
    auto low_pairs = [](F a, F b) { return _mm512_castsi512_ps(_mm512_unpacklo_epi64(_mm512_castps_si512(a), _mm512_castps_si512(b))); };
    auto high_pairs = [](F a, F b) { return _mm512_castsi512_ps(_mm512_unpackhi_epi64(_mm512_castps_si512(a), _mm512_castps_si512(b))); };
    auto four = [&](F a, F b) { return add(low_pairs(a, b), high_pairs(a, b)); };
    const F first = four(two(v[0], v[1]), two(v[2], v[3])), last = four(two(v[4], v[5]), two(v[6], v[7]));
    // Quarters of either: 0 + 2, 1 + 3.
    const __m512i a = _mm512_castps_si512(first), b = _mm512_castps_si512(last);
    const F halves = add(_mm512_castsi512_ps(_mm512_shuffle_i64x2(a, b, 0x44)), _mm512_castsi512_ps(_mm512_shuffle_i64x2(a, b, 0xee)));
    const __m512i h = _mm512_castps_si512(halves);
    const F sums = add(_mm512_castsi512_ps(_mm512_shuffle_i64x2(h, h, 0x08)), _mm512_castsi512_ps(_mm512_shuffle_i64x2(h, h, 0x0d)));
    _mm256_storeu_ps(to, _mm512_castps512_ps256(sums));
  }
  static F load_bf16(const uint8_t* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16)); }
  static F load_f16(const uint8_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  static F load_signed_bytes(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
  static F load_bytes(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))); }

  static I integer_zero() { return _mm512_setzero_si512(); }
  static I integer_set1(int32_t x) { return _mm512_set1_epi32(x); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static int32_t reduce_add(I v) { return _mm512_reduce_add_epi32(v); }
  static F nearest(F v) { return _mm512_cvtepi32_ps(_mm512_cvtps_epi32(v)); }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static I load_integers(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void store_integers(uint8_t* p, I v) { _mm512_storeu_si512(p, v); }
  template <int shift, uint32_t mask>
  static I field(I v) {
    return _mm512_and_si512(shift < 0 ? _mm512_slli_epi32(v, shift < 0 ? -shift : 0) : _mm512_srli_epi32(v, shift < 0 ? 0 : shift), _mm512_set1_epi32(mask));
  }
  static I either(I a, I b) { return _mm512_or_si512(a, b); }
  static I rounded_to_bf16(F v) {  // in the upper halves; the lower ones are not cleared
    const I u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7fff));
  }
  static void store_pairs(uint8_t* to, F first, F second) {
    _mm512_storeu_si512(to, _mm512_mask_mov_epi16(_mm512_srli_epi32(rounded_to_bf16(first), 16), 0xaaaaaaaa, rounded_to_bf16(second)));
  }
  static void prefetch(const uint8_t* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }

  struct Pair {
    F even, odd;
  };
  static Pair split(I w) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(0xffff0000)))};
  }
  static Pair pair(I w) { return split(w); }
  // e4m3 in the lower bytes of 16-bit elements (the upper ones may hold anything) as bf16: normal codes are moved and their exponent's bias is
  // changed; the eight subnormal ones are looked up.
  static I e4m3_words(I code) {
    const I subnormal = _mm512_broadcast_i32x4(_mm_setr_epi16(0x0000, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    const I magnitude = _mm512_and_si512(code, _mm512_set1_epi16(0x7f));
    const I normal = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
    const __mmask32 small = _mm512_cmplt_epi16_mask(magnitude, _mm512_set1_epi16(8));
    const I value = _mm512_mask_permutexvar_epi16(normal, small, magnitude, subnormal);
    return _mm512_or_si512(value, _mm512_slli_epi16(_mm512_and_si512(code, _mm512_set1_epi16(0x80)), 8));
  }
  static void e4m3_lines(const uint8_t* line, I (&to)[2]) {
    const I w = _mm512_loadu_si512(line);
    to[0] = e4m3_words(w);
    to[1] = e4m3_words(_mm512_srli_epi16(w, 8));
  }
  static Pair pair_of(F even, F odd) { return {even, odd}; }
  static Pair broadcast_pair(const uint8_t* x) {
    const float* v = reinterpret_cast<const float*>(x);
    return {_mm512_set1_ps(v[0]), _mm512_set1_ps(v[1])};
  }
  static F dot(F acc, const Pair& w, const Pair& x) { return fma(w.odd, x.odd, fma(w.even, x.even, acc)); }

  static I low_nibbles(const uint8_t* p) { return _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(15)); }
  static I high_nibbles(const uint8_t* p) { return _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(p), 4), _mm512_set1_epi8(15)); }
  static I lookup_bytes(I index, const uint8_t* table) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)table)), index);
  }
  static F lookup(I index, const int8_t* table) {
    return _mm512_permutexvar_ps(index, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)table))));
  }
  static F e4m3(I code) {
    const I magnitude = _mm512_and_si512(code, _mm512_set1_epi32(0x7f)), sign = _mm512_slli_epi32(_mm512_and_si512(code, _mm512_set1_epi32(0x80)), 24);
    const F normal = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(magnitude, 20), _mm512_set1_epi32(120 << 23)));
    const F small = mul(to_float(magnitude), set1(1.0f / 512.0f));
    const F value = _mm512_mask_blend_ps(_mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(8)), normal, small);
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(value), sign));
  }
  static I load_byte_integers(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
  static F load_e8m0(const uint8_t* p) {
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_slli_epi32(load_byte_integers(p), 23), _mm512_set1_epi32(0x00400000)));
  }
  // a / v, zero where v is zero.
  static F ratio(float a, F v) { return _mm512_maskz_div_ps(_mm512_cmp_ps_mask(v, zero(), _CMP_NEQ_OQ), set1(a), v); }

  // Bytes of a line times whole ratios, plus whole starts, in units of 1/128: results are bytes again.
  struct Rescale {
    I ratios, starts;
    Rescale(F ratio, F start) : ratios(twice(ratio)), starts(twice(start)) {}
    static I twice(F v) {
      const I i = _mm512_cvtps_epi32(v);
      return _mm512_or_si512(_mm512_and_si512(i, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(i, 16));
    }
    I scaled(I words) const { return _mm512_add_epi16(_mm512_mullo_epi16(words, ratios), starts); }
    void operator()(I bytes, uint8_t* to) const {
      const I low = _mm512_set1_epi16(0x00ff), even = scaled(_mm512_and_si512(bytes, low)), odd = scaled(_mm512_srli_epi16(bytes, 8));
      _mm512_storeu_si512(to, _mm512_ternarylogic_epi32(low, _mm512_srli_epi16(even, 7), _mm512_slli_epi16(odd, 1), 0xca));
    }
  };

  struct Quad {
    I even, odd;
  };
  static Quad quad_of(I w) { return {_mm512_and_si512(w, _mm512_set1_epi16(0xff)), _mm512_srli_epi16(w, 8)}; }
  static Quad broadcast_quad(const uint8_t* x) {
    const int32_t* v = reinterpret_cast<const int32_t*>(x);
    return {_mm512_set1_epi32(v[0]), _mm512_set1_epi32(v[1])};
  }
  static I dot(I acc, const Quad& w, const Quad& x) {
    return add(add(acc, _mm512_madd_epi16(w.even, x.even)), _mm512_madd_epi16(w.odd, x.odd));
  }
  // Small bytes of weights times bytes of activations, two columns' products added in 16 bits, and those then in 32.
  static I dot_shorts(I acc, I w, const uint8_t* x) {
    return _mm512_add_epi16(acc, _mm512_maddubs_epi16(w, _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(x))));
  }
  static I add_shorts(I acc, I shorts) { return add(acc, _mm512_madd_epi16(shorts, _mm512_set1_epi16(1))); }
  // 16 codes as bytes in the order of kQuadOrder.
  static void store_bytes(uint8_t* to, I q) {
    _mm_storeu_si128((__m128i*)to, _mm_shuffle_epi8(_mm512_cvtepi32_epi8(q), _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15)));
  }
  // 16 codes as 16-bit integers in natural order: the halves of a quad meet its even and odd bytes.
  static I store_codes(uint8_t* to, F v) {
    const I q = _mm512_cvtps_epi32(v);
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(q));
    return q;
  }

  // Words within each pair of rows, then an 8 x 8 transpose of 64-bit elements.
  static void transpose(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride) {
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
    __m512i r[8], a[8], b[8];
    for (int i = 0; i < 8; i++) r[i] = _mm512_shuffle_epi8(_mm512_loadu_si512(from + i * from_stride), order);
    for (int i = 0; i < 8; i += 2) {
      a[i] = _mm512_unpacklo_epi64(r[i], r[i + 1]);
      a[i + 1] = _mm512_unpackhi_epi64(r[i], r[i + 1]);
    }
    // b[h][j]: rows 4 h .. 4 h + 3 of columns j and j + 4
    for (int h = 0; h < 2; h++)
      for (int j = 0; j < 4; j++)
        b[h * 4 + j] = j < 2 ? _mm512_shuffle_i64x2(a[h * 4 + j], a[h * 4 + j + 2], 0x88) : _mm512_shuffle_i64x2(a[h * 4 + j - 2], a[h * 4 + j], 0xdd);
    for (int j = 0; j < 4; j++) {
      _mm512_storeu_si512(to + j * to_stride, _mm512_shuffle_i64x2(b[j], b[4 + j], 0x88));
      _mm512_storeu_si512(to + (j + 4) * to_stride, _mm512_shuffle_i64x2(b[j], b[4 + j], 0xdd));
    }
  }

  static __m512i interleave(__m512i halves) { return _mm512_permutexvar_epi16(_mm512_load_si512(kInterleaved.index), halves); }
  static void pair_rows(const Square& square, uint8_t* to, int64_t stride) {
    for (int k = 0; k < kLanes; k += 2) _mm512_storeu_si512(to + k / 2 * stride, interleave(_mm512_load_si512(square.value[k])));
  }

  // An 8 x 8 transpose of words in each half of eight registers, each of which holds two rows.
  static void pair_columns(const Square& square, uint8_t* to, int64_t stride) {
    __m512i r[8], a[8], b[8];
    auto half = [&](int row) { return _mm256_load_si256((const __m256i*)square.value[row]); };
    for (int i = 0; i < 8; i++) r[i] = _mm512_inserti64x4(_mm512_castsi256_si512(half(i % 4 + i / 4 * 8)), half(i % 4 + i / 4 * 8 + 4), 1);
    for (int i = 0; i < 8; i += 2) {
      a[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      a[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    // b[h + j]: four lanes of words j and j + 4 in either half
    for (int h = 0; h < 8; h += 4)
      for (int j = 0; j < 4; j++)
        b[h + j] = j % 2 ? _mm512_unpackhi_epi64(a[h + j / 2], a[h + j / 2 + 2]) : _mm512_unpacklo_epi64(a[h + j / 2], a[h + j / 2 + 2]);
    for (int j = 0; j < 4; j++) {
      _mm512_storeu_si512(to + j * stride, _mm512_shuffle_i64x2(b[j], b[4 + j], 0x88));
      _mm512_storeu_si512(to + (j + 4) * stride, _mm512_shuffle_i64x2(b[j], b[4 + j], 0xdd));
    }
  }

  // Has the compiler compute `v`, whatever comes of it.
  template <class V>
  static void keep(V& v) {
#if defined(__AVX512F__)
    asm volatile("" : "+v"(v));
#else
    asm volatile("" : "+m"(v));
#endif
  }

  static void dots(int64_t count, bool integer) {
    const F one = set1(1.0f);
    const I unit = _mm512_set1_epi16(1);
    integer ? chains(count, integer_zero(), [&](I v) { return add(v, _mm512_madd_epi16(unit, v)); })
            : chains(count, zero(), [&](F v) { return fma(one, one, v); });
  }
  template <class V, class Step>
  static void chains(int64_t count, V start, const Step& step) {
    constexpr int kChains = 16;
    V acc[kChains];
#pragma GCC unroll 16  // or they stay in memory
    for (int c = 0; c < kChains; c++) acc[c] = start;
    for (int64_t n = 0; n < count; n += kChains)
#pragma GCC unroll 16
      for (int c = 0; c < kChains; c++) {
        acc[c] = step(acc[c]);
        keep(acc[c]);
      }
  }
};

}  // namespace
}  // namespace coterie
