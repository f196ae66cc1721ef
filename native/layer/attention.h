// Attention of one token of each sequence to what is cached: softmax(scale * q K^T) V, keys and values being shared by groups of query heads.
#pragma once
#include "isa/kernels.h"

namespace coterie {

// Rows of adjacent elements by sequence, head and, of keys and values, position; strides in bytes.
struct Heads {
  const uint8_t* data;
  int64_t sequence, head, position;
};

struct Attention {
  int64_t sequences, kv_heads, group, positions;  // `group` query heads to a head of keys and values
  int64_t key_dim, value_dim;                     // multiples of 16
  DType dtype;                                    // of all of them, bf16 or f32
  Heads queries, keys, values;
  const uint8_t* mask;                            // [sequences][positions], 0: not looked at; null: all are
  int64_t mask_stride;
  float scale;
  const float* sinks;                             // [query heads], scores of nothing, which take part in the softmax; null: none
  Heads more_keys;                                // what stands behind `key_dim` columns of keys, as in queries
  int64_t more_dim;                               // its columns: a multiple of 16, or 0
};

// `out` [sequences][query heads][value_dim], of the inputs' type. The same bits for any number of threads.
void attend(const Kernels& kernels, const Attention& attention, void* out);

// The same for many tokens of each sequence, bf16 alone: queries [sequences][query heads][tokens], the last of `positions` where it is causal.
struct PromptAttention {
  int64_t sequences, kv_heads, group, tokens, positions;
  int64_t key_dim, value_dim;                          // multiples of 16
  Heads queries, keys, values;
  bool causal;
  const uint8_t* mask;                                 // [sequences][tokens][positions]; null: all are looked at that causality leaves
  int64_t mask_sequence, mask_token;                   // strides
  float scale;
  const float* sinks;
};

// `out` [sequences][tokens][query heads][value_dim], bf16.
void attend_prompt(const Kernels& kernels, const PromptAttention& attention, void* out);

}  // namespace coterie
