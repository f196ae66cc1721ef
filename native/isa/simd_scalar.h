// Any CPU: 16 lanes as an array, loops the compiler may vectorise.
#pragma once
#include <cmath>

#include "isa/decode.h"
#include "isa/pairs.h"

namespace coterie {
namespace {

struct Scalar {
  struct F {
    float v[kLanes];
  };
  struct I {
    int32_t v[kLanes];
  };
  static constexpr int kFloatBytes = 4, kIntegerBytes = 2;
  static constexpr bool kTiles = false;
  static constexpr int kTileRows = 4;
  static constexpr int tile_panels(int) { return 1; }
  static constexpr int64_t kFloatMacs = 16, kIntegerMacs = 16;

  template <class V, class Op>
  static V each(const Op& op) {
    V r;
    for (int i = 0; i < kLanes; i++) r.v[i] = op(i);
    return r;
  }
  static F zero() { return set1(0.0f); }
  static F set1(float x) { return each<F>([&](int) { return x; }); }
  static F load(const float* p) {  // packed scales need no alignment
    F r;
    memcpy(r.v, p, sizeof r.v);
    return r;
  }
  static void store(float* p, const F& v) { memcpy(p, v.v, sizeof v); }
  static F mul(const F& a, const F& b) { return each<F>([&](int i) { return a.v[i] * b.v[i]; }); }
  static F add(const F& a, const F& b) { return each<F>([&](int i) { return a.v[i] + b.v[i]; }); }
  static F fma(const F& a, const F& b, const F& c) { return each<F>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
  static F max_abs(const F& a, const F& b) { return each<F>([&](int i) { return std::fabs(b.v[i]) > a.v[i] ? std::fabs(b.v[i]) : a.v[i]; }); }
  static float reduce_max(const F& v) {
    float r = v.v[0];
    for (float x : v.v) r = x > r ? x : r;
    return r;
  }
  static float reduce_add(const F& v) {
    float r = 0.0f;
    for (float x : v.v) r += x;
    return r;
  }
  static F load_bf16(const uint8_t* p) {
    uint16_t h[kLanes];
    memcpy(h, p, sizeof h);
    return each<F>([&](int i) { return bf16_to_float(h[i]); });
  }
  static F load_bytes(const uint8_t* p) { return each<F>([&](int i) { return static_cast<float>(p[i]); }); }

  static I integer_zero() { return integer_set1(0); }
  static I integer_set1(int32_t x) { return each<I>([&](int) { return x; }); }
  static I add(const I& a, const I& b) { return each<I>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i])); }); }
  static int32_t reduce_add(const I& v) {
    uint32_t r = 0;
    for (int32_t x : v.v) r += static_cast<uint32_t>(x);
    return static_cast<int32_t>(r);
  }
  static F to_float(const I& v) { return each<F>([&](int i) { return static_cast<float>(v.v[i]); }); }
  static I load_integers(const uint8_t* p) {
    I r;
    memcpy(r.v, p, sizeof r);
    return r;
  }
  template <int shift, uint32_t mask>
  static I field(const I& v) {
    return each<I>([&](int i) { return static_cast<int32_t>((static_cast<uint32_t>(v.v[i]) >> shift) & mask); });
  }
  static void store_pairs(uint8_t* to, const F& first, const F& second) {
    uint32_t line[kLanes];
    for (int i = 0; i < kLanes; i++) line[i] = float_to_bf16(first.v[i]) | static_cast<uint32_t>(float_to_bf16(second.v[i])) << 16;
    memcpy(to, line, sizeof line);
  }
  static void prefetch(const uint8_t* p) { __builtin_prefetch(p); }

  struct Pair {
    F even, odd;
  };
  static Pair load_pair(const uint8_t* p) {
    uint16_t h[2 * kLanes];
    memcpy(h, p, sizeof h);
    return {each<F>([&](int i) { return bf16_to_float(h[2 * i]); }), each<F>([&](int i) { return bf16_to_float(h[2 * i + 1]); })};
  }
  struct PairOf1 {
    float even, odd;
  };
  static PairOf1 broadcast_pair(const uint8_t* x) {
    PairOf1 r;
    memcpy(&r, x, sizeof r);
    return r;
  }
  static F dot(const F& acc, const Pair& w, const PairOf1& x) {
    return each<F>([&](int i) { return acc.v[i] + w.even.v[i] * x.even + w.odd.v[i] * x.odd; });
  }

  struct Quad {
    uint8_t v[kLine];
  };
  static Quad load_quad(const uint8_t* p) {
    Quad q;
    memcpy(q.v, p, sizeof q);
    return q;
  }
  static Quad load_low_nibbles(const uint8_t* p) {
    Quad q;
    for (int i = 0; i < kLine; i++) q.v[i] = p[i] & 15;
    return q;
  }
  static Quad load_high_nibbles(const uint8_t* p) {
    Quad q;
    for (int i = 0; i < kLine; i++) q.v[i] = p[i] >> 4;
    return q;
  }
  struct QuadOf1 {
    int16_t v[4];
  };
  static QuadOf1 broadcast_quad(const uint8_t* x) {
    QuadOf1 q;
    memcpy(q.v, x, sizeof q);
    return q;
  }
  static I dot(const I& acc, const Quad& w, const QuadOf1& x) {
    return each<I>([&](int i) {
      const uint8_t* b = w.v + 4 * i;
      return acc.v[i] + b[0] * x.v[0] + b[2] * x.v[1] + b[1] * x.v[2] + b[3] * x.v[3];
    });
  }
  static I store_codes(uint8_t* to, const F& v) {
    const I q = each<I>([&](int i) { return static_cast<int32_t>((v.v[i] + kRound) - kRound); });
    int16_t codes[kLanes];
    for (int i = 0; i < kLanes; i++) codes[i] = static_cast<int16_t>(q.v[i]);
    memcpy(to, codes, sizeof codes);
    return q;
  }
  static void decode_panel(const Layout& layout, const uint8_t* weight, const uint8_t* scale, const uint8_t* zero, uint8_t* codes, float* scales) {
    decode_panel_portable(layout, weight, scale, zero, codes, scales);
  }

  static void transpose(const uint8_t* from, uint8_t* to) { transpose_portable(from, to); }
  static void pair_rows(const Square& square, uint8_t* to) { pair_rows_portable(square, to); }
  static void pair_columns(const Square& square, uint8_t* to) { pair_columns_portable(square, to); }

  static void dots(int64_t count, bool integer) {
    F f = set1(0.0f);
    I i = integer_zero();
    for (int64_t n = 0; n < count; n++) {
      if (integer)
        i = add(i, i);
      else
        f = fma(f, f, f);
      asm volatile("" : "+m"(f), "+m"(i));
    }
  }
};

}  // namespace
}  // namespace coterie
