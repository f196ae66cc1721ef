// Attention of one token of each sequence to latents (DeepSeek-V2, arXiv:2405.04434): one matrix makes the keys and values of all heads of them. It is
// multiplied with queries, and with weighted sums of latents, in their place, so that what is cached is read as it is.
#pragma once
#include "layer/attention.h"
#include "layer/linear.h"

namespace coterie {

struct LatentAttention {
  int64_t sequences, heads, positions;
  int64_t rank;                   // columns of latents, a multiple of 16
  int64_t key_dim, value_dim;     // of a head's keys and values as made of latents
  int64_t turned_dim;             // of what stands behind a key and is cached beside its latent, a multiple of 16
  DType dtype;                    // of all of it, bf16 or f32
  const uint8_t *key_weight, *value_weight;  // [key_dim][rank] and [value_dim][rank] of the first head, bytes to the next one's:
  int64_t key_stride, value_stride;
  const Linear* packed;           // where value_weight is null, [heads][key_dim + value_dim][rank], both being whole blocks
  bool integer;                   // it is multiplied with weighted sums that are rounded to int8
  Heads queries;                  // of key_dim + turned_dim columns
  Heads latents, turned;          // one head each
  const uint8_t* mask;            // see Attention
  int64_t mask_stride;
  float scale;
  const float* sinks;
};

// `out` [sequences][heads][value_dim]. The same bits for any number of threads.
void attend_latents(const Kernels& kernels, const LatentAttention& attention, void* out);

}  // namespace coterie
