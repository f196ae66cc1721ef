// A layer of each format, packed and computed by the plain C++ kernels, against loops in double precision.
#include <cmath>
#include <cstdio>
#include <vector>

#include "formats/unpack.h"
#include "layer/forward.h"
#include "runtime/dispatch.h"
#include "runtime/threads.h"

using namespace coterie;

namespace {

constexpr int64_t kHidden = 128, kIntermediate = 96;

float next_random() {  // -1 to 1
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return (state >> 8) / 8388608.0f - 1.0f;
}

struct Packed {
  std::vector<uint8_t> weight, scale, zero;
  std::vector<float> dense;  // the values that the packed bytes stand for

  explicit Packed(const Layout& l)
      : weight(l.panels() * l.weight_panel_bytes()), scale(l.panels() * l.scale_panel_bytes()), zero(l.panels() * l.zero_panel_bytes()), dense(l.rows * l.cols) {
    for (float& value : dense) value = 0.3f * next_random();
    std::vector<float> scratch(l.padded_cols() * kPanelRows);
    PackError lost;
    for (int64_t panel = 0; panel < l.panels(); panel++)
      kernels().pack_panel(l, panel, dense.data(), DType::f32, l.cols, true, weight.data(), scale.data(), zero.data(), scratch.data(), lost);
    unpack_panels(l, matrix(), 0, l.panels(), dense.data());
  }

  Matrix matrix() const { return {weight.data(), scale.data(), zero.data()}; }
};

double dot(const float* row, const double* x, int64_t cols) {
  double sum = 0;
  for (int64_t k = 0; k < cols; k++) sum += row[k] * x[k];
  return sum;
}

double relative_error(Format format, int64_t tokens) {
  const int64_t group = format == Format::int4 ? 32 : 0;
  const Layout in{format, kIntermediate, kHidden, group, false}, out{format, kHidden, kIntermediate, group, false};
  const Packed gate(in), up(in), down(out);
  Experts layer{};
  layer.count = 1, layer.hidden = kHidden, layer.intermediate = kIntermediate, layer.has_gate = true;
  layer.in = in, layer.out = out;
  layer.gate = {gate.matrix()}, layer.up = {up.matrix()}, layer.down = {down.matrix()};
  std::vector<float> x(tokens * kHidden), y(tokens * kHidden), weights(tokens, 1.0f);
  const std::vector<int64_t> ids(tokens, 0);
  for (float& value : x) value = next_random();
  forward(layer, kernels(), Batch{tokens, 1, x.data(), DType::f32, kHidden, ids.data(), weights.data(), y.data(), DType::f32, format != Format::bf16});

  double error = 0, norm = 0;
  for (int64_t t = 0; t < tokens; t++) {
    const std::vector<double> token(x.begin() + t * kHidden, x.begin() + (t + 1) * kHidden);
    std::vector<double> hidden(kIntermediate);
    for (int64_t i = 0; i < kIntermediate; i++) {
      const double g = dot(&gate.dense[i * kHidden], token.data(), kHidden);
      hidden[i] = g / (1 + std::exp(-g)) * dot(&up.dense[i * kHidden], token.data(), kHidden);
    }
    for (int64_t h = 0; h < kHidden; h++) {
      const double truth = dot(&down.dense[h * kIntermediate], hidden.data(), kIntermediate);
      error += (truth - y[t * kHidden + h]) * (truth - y[t * kHidden + h]), norm += truth * truth;
    }
  }
  return std::sqrt(error / norm);
}

}  // namespace

int main() {
  set_thread_count(3);
  bool right = true;
  for (Format format : {Format::bf16, Format::int8, Format::int4})
    for (int64_t tokens : {1, 5, 40}) {
      const double error = relative_error(format, tokens);
      std::printf("%s, format %d, %d tokens: error %.1e\n", kernels().name, static_cast<int>(format), static_cast<int>(tokens), error);
      right = right && error < (format == Format::bf16 ? 1e-6 : 0.03);  // int8 and int4: activations are rounded to int8
    }
  return right ? 0 : 1;
}
