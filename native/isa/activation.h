// act(gate, up) of an expert, in plain C for the compiler to vectorise. Formulas: Activation in src/coterie/activations.py.
#pragma once
#include <cstdint>

#include "formats/lanes.h"
#include "layer/experts.h"

namespace coterie {
namespace {

// e^x to 2e-7; 0 below -87, infinity above 88.7, NaN through.
inline float exp_f32(float x) {
  float y = x < -87.0f ? -87.0f : x;
  y = y > 88.5f ? 88.5f : y;
  const float shifted = y * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float scaled = p * bits_to_float((float_to_bits(shifted) + 127) << 23);
  const float high = x > 88.7f ? bits_to_float(0x7f800000) : scaled;
  return x < -87.0f ? 0.0f : high;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp_f32(-x)); }

// erf by Abramowitz and Stegun 7.1.26, absolute error 1.5e-7.
inline float erf_f32(float x) {
  const float a = x < 0.0f ? -x : x;
  const float t = 1.0f / (1.0f + 0.3275911f * a);
  const float p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
  const float y = 1.0f - p * exp_f32(-a * a);
  return x < 0.0f ? -y : y;
}

inline float gelu_tanh(float x) {
  const float u = 0.7978845608f * (x + 0.044715f * x * x * x);
  return x * sigmoid(2.0f * u);  // (1 + tanh u) / 2 = sigmoid(2 u)
}

inline void add(float* to, const float* from, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] += from[i];
}

// gate[i] = act(gate[i]) * (up[i] + up_offset); without a gate, act(up[i]).
inline void activate(const Activation& a, bool has_gate, float* gate, const float* up, int64_t n) {
  if (a.limit > 0.0f && has_gate) {
    float* clamped = const_cast<float*>(up);
    for (int64_t i = 0; i < n; i++) {
      gate[i] = gate[i] > a.limit ? a.limit : gate[i];
      clamped[i] = clamped[i] > a.limit ? a.limit : clamped[i] < -a.limit ? -a.limit : clamped[i];
    }
  }
  switch (a.kind) {
    case ActivationKind::silu:
      for (int64_t i = 0; i < n; i++) gate[i] = gate[i] * sigmoid(a.alpha * gate[i]);
      break;
    case ActivationKind::gelu:
      for (int64_t i = 0; i < n; i++) gate[i] = 0.5f * gate[i] * (1.0f + erf_f32(gate[i] * 0.7071067812f));
      break;
    case ActivationKind::gelu_tanh:
      for (int64_t i = 0; i < n; i++) gate[i] = gelu_tanh(gate[i]);
      break;
    case ActivationKind::relu:
      for (int64_t i = 0; i < n; i++) gate[i] = gate[i] < 0.0f ? 0.0f : gate[i];
      break;
    case ActivationKind::relu2:
      for (int64_t i = 0; i < n; i++) gate[i] = gate[i] < 0.0f ? 0.0f : gate[i] * gate[i];
      break;
  }
  if (has_gate)
    for (int64_t i = 0; i < n; i++) gate[i] *= up[i] + a.up_offset;
}

// f(x) and f'(x) of an activation without its clamps.
inline void slope(const Activation& a, const float* x, int64_t n, float* value, float* derivative) {
  switch (a.kind) {
    case ActivationKind::silu:
      for (int64_t i = 0; i < n; i++) {
        const float s = sigmoid(a.alpha * x[i]);
        value[i] = x[i] * s;
        derivative[i] = s * (1.0f + a.alpha * x[i] * (1.0f - s));
      }
      break;
    case ActivationKind::gelu:
      for (int64_t i = 0; i < n; i++) {
        const float phi = 0.5f * (1.0f + erf_f32(x[i] * 0.7071067812f));
        value[i] = x[i] * phi;
        derivative[i] = phi + x[i] * 0.3989422804f * exp_f32(-0.5f * x[i] * x[i]);
      }
      break;
    case ActivationKind::gelu_tanh:
      for (int64_t i = 0; i < n; i++) {
        const float s = sigmoid(1.5957691216f * (x[i] + 0.044715f * x[i] * x[i] * x[i]));
        value[i] = x[i] * s;
        derivative[i] = s + x[i] * s * (1.0f - s) * 1.5957691216f * (1.0f + 0.134145f * x[i] * x[i]);
      }
      break;
    case ActivationKind::relu:
    case ActivationKind::relu2:
      for (int64_t i = 0; i < n; i++) {
        const float r = x[i] < 0.0f ? 0.0f : x[i];
        value[i] = a.kind == ActivationKind::relu ? r : r * r;
        derivative[i] = a.kind == ActivationKind::relu2 ? 2.0f * r : x[i] > 0.0f ? 1.0f : x[i] * 0.0f;
      }
      break;
  }
}

// hidden = act(gate, up), and the gradients of gate and up for the gradient `d` of hidden. `n` at most 64.
inline void activate_backward(const Activation& a, bool has_gate, const float* gate, const float* up, const float* d, int64_t n, float* hidden,
                              float* d_gate, float* d_up) {
  float value[64], derivative[64], clamped[64];
  const float* x = has_gate ? gate : up;
  if (a.limit > 0.0f && has_gate) {
    for (int64_t i = 0; i < n; i++) clamped[i] = gate[i] > a.limit ? a.limit : gate[i];
    x = clamped;
  }
  slope(a, x, n, value, derivative);
  if (!has_gate) {
    for (int64_t i = 0; i < n; i++) {
      hidden[i] = value[i];
      d_up[i] = d[i] * derivative[i];
    }
    return;
  }
  const float most = a.limit > 0.0f ? a.limit : bits_to_float(0x7f800000);
  for (int64_t i = 0; i < n; i++) {
    const float u = up[i] > most ? most : up[i] < -most ? -most : up[i];
    hidden[i] = value[i] * (u + a.up_offset);
    d_gate[i] = gate[i] > most ? 0.0f : d[i] * derivative[i] * (u + a.up_offset);
    d_up[i] = up[i] > most || up[i] < -most ? 0.0f : d[i] * value[i];
  }
}

}  // namespace
}  // namespace coterie
