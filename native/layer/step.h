// What a decoded token of each of a few sequences does in a layer of a model: attention (its norm, queries, keys and values, their norms, their turn to the
// token's position, the cache, attention to it, the product that follows), the same to latents, or linear attention; and experts (their norm, the router,
// the experts, a shared expert), each added to what came in.
#pragma once
#include "layer/attention.h"
#include "layer/delta.h"
#include "layer/forward.h"
#include "layer/latent.h"
#include "layer/linear.h"
#include "layer/norm.h"
#include "layer/router.h"

namespace coterie {

struct StepWeights {
  RmsNorm norm;                                    // without a weight: none, and the input is not added
  const Linear *queries, *keys, *values, *output;
  RmsNorm query_norm, key_norm;                    // without a weight: none; `rounded` is not looked at
  bool whole;                                      // these are norms of all heads together
  bool gated;                                      // behind each head of queries a gate of as many columns, whose sigmoid what it attends to is multiplied by
  bool integer, output_integer;                    // activations are rounded to int8
};

// A cache that the step writes to: rows of adjacent elements, strides in bytes.
struct CacheMemory {
  uint8_t* data;
  int64_t sequence, head, position;
};

struct Step {
  int64_t sequences, kv_heads, group, key_dim, value_dim;
  DType dtype;                  // of all of it, bf16 or f32
  Strided x;                    // [sequences][inputs], rows one behind the other if there is a norm
  const uint8_t *cos, *sin;     // of each sequence's position, angle_bytes apart
  int64_t turned, twin, angle_bytes;  // see Head
  CacheMemory keys, values;
  int64_t cached;               // positions before this token's
  const uint8_t* mask;          // see Attention, with the token's own position
  int64_t mask_stride;
  float scale;
  const float* sinks;
};

// `out` [sequences][outputs]; with a norm, the input's size. To how many seconds attention itself took.
double attention_step(const Kernels& kernels, const StepWeights& weights, const Step& step, void* out);

// In which columns of what is turned the two halves are that are turned against each other (see Head).
enum class Halves : int { apart = 0, pairs = 1, kept_pairs = 2 };  // one behind the other; column by column, and apart then; column by column, then too

struct LatentWeights {
  RmsNorm norm;                                    // without a weight: none, and the input is not added
  const Linear* query_latents;                     // what queries are made of, and its norm; null: of the input
  RmsNorm query_norm;
  const Linear *queries, *latents, *output;        // `latents` makes what is turned too, behind them
  RmsNorm latent_norm;
  Halves halves;
  bool integer, queries_integer, output_integer;   // activations are rounded to int8: of the input, of query latents, behind attention
};

// What is not filled in of `attention`: queries, latents and turned, positions.
struct LatentStep {
  LatentAttention attention;
  Strided x;                          // [sequences][inputs], rows one behind the other if there is a norm
  const uint8_t *cos, *sin;           // of each sequence's position, angle_bytes apart
  int64_t twin, angle_bytes;          // see Head
  CacheMemory latents, turned;
  int64_t cached;                     // positions before this token's
};

// `out` [sequences][outputs]; with a norm, the input's size. To how many seconds attention itself took.
double latent_step(const Kernels& kernels, const LatentWeights& weights, const LatentStep& step, void* out);

struct DeltaStep {
  RmsNorm norm;
  std::vector<const Linear*> projections;  // to mixed, gates, betas and steps of DeltaTokens, or to mixed and betas
  const Linear* output;
  bool integer, output_integer;
};

// x and `out` [sequences][hidden], of the tokens' type; what the projections make is filled in. To how many seconds it took between the products.
double delta_step(const Kernels& kernels, const DeltaStep& step, DeltaTokens tokens, const void* x, void* out);

// An expert that every token goes to.
struct SharedExpert {
  Experts layer;       // one
  bool integer;
  const void* score;   // [hidden], of the type of x: its result is multiplied by the sigmoid of their product; null: it is not
};

struct ExpertsStep {
  RmsNorm norm;
  Router router;
  bool rounded_weights;  // routing weights are rounded to the type of x
  bool integer;
  const SharedExpert* shared;  // or null
};

// x [tokens, hidden], contiguous, and `out` of its type, bf16 or f32.
void experts_step(const Kernels& kernels, const Experts& layer, const ExpertsStep& step, const void* x, DType dtype, int64_t tokens, void* out);

}  // namespace coterie
