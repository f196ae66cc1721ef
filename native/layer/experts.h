// The experts of one layer as the kernels see them.
#pragma once
#include <cstdint>
#include <vector>

#include "formats/layout.h"

namespace coterie {

enum class ActivationKind : int { silu = 0, gelu = 1, gelu_tanh = 2, relu = 3, relu2 = 4 };

struct Activation {
  ActivationKind kind = ActivationKind::silu;
  float alpha = 1.0f;      // silu(x) = x * sigmoid(alpha * x)
  float limit = 0.0f;      // > 0: gate <= limit, -limit <= up <= limit
  float up_offset = 0.0f;  // act(gate) * (up + up_offset)
};

struct Experts {
  int64_t count, hidden, intermediate;
  bool has_gate;
  Activation activation;
  Layout in;    // gate and up: [intermediate, hidden]
  Layout out;   // down: [hidden, intermediate]
  std::vector<const uint8_t*> gate, up, down;
  const float *gate_bias = nullptr, *up_bias = nullptr, *down_bias = nullptr;  // rows padded to panels; may be null
};

}  // namespace coterie
