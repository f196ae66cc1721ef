// Linear attention by the gated delta rule: convolution, rule, norm and gate of tokens of a few sequences.
#pragma once
#include "isa/kernels.h"

namespace coterie {

struct DeltaTokens {
  int64_t sequences, tokens, key_heads, value_heads, key_dim, value_dim;  // value_dim: a multiple of 16
  DType dtype;                // bf16 or f32, of all but what is f32 by its type
  bool by_head;               // `mixed`: queries, keys, values and gates of one key head after the other; `betas`: betas and steps likewise
  const uint8_t *mixed;       // [sequences][tokens][queries | keys | values], or with gates
  const uint8_t *gates, *betas, *steps;  // [sequences][tokens][values], [..][value_heads] twice; gates and steps are null where they stand with the others
  uint8_t* window;            // [sequences][queries | keys | values][positions]: what came in last, the newest behind; gets these tokens'
  int64_t positions, taps;    // of the window, and of those the last that the convolution looks at
  const uint8_t* convolution; // [queries | keys | values][taps]
  DType convolution_dtype;
  const float* convolution_bias;  // or null
  float* state;               // [sequences][value_heads][key_dim][value_dim], updated
  const float *log_rates, *step_bias;  // [value_heads]: a head forgets by e^(-e^log_rate * softplus(step + step_bias))
  const float* norm;          // [value_dim]
  float epsilon;

  int64_t keys() const { return key_heads * key_dim; }
  int64_t values() const { return value_heads * value_dim; }
  int64_t channels() const { return 2 * keys() + values(); }
  int64_t width() const { return by_head ? channels() + values() : channels(); }  // of `mixed`
};

// `out` [sequences][tokens][values], of the tokens' type: the rule's output, normed and gated.
void delta_rule(const Kernels& kernels, const DeltaTokens& tokens, void* out);

}  // namespace coterie
