#include "layer/router.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <numeric>
#include <vector>

#include "layer/plain.h"
#include "layer/values.h"
#include "layer/workspace.h"

namespace coterie {
namespace {

// One token's: softmax over `score`, which it changes.
void choose(const Router& router, float* score, std::vector<int64_t>& order, float* weights, int64_t* ids) {
  const float largest = *std::max_element(score, score + router.experts);
  float sum = 0.0f;
  for (int64_t e = 0; e < router.experts; e++) sum += score[e] = std::exp(score[e] - largest);
  order.resize(router.experts);
  std::iota(order.begin(), order.end(), 0);
  const auto before = [&](int64_t a, int64_t b) { return score[a] > score[b] || (score[a] == score[b] && a < b); };
  std::partial_sort(order.begin(), order.begin() + router.top_k, order.end(), before);
  float chosen = 0.0f;
  for (int64_t k = 0; k < router.top_k; k++) chosen += score[order[k]];
  const float scale = 1.0f / (router.normalised ? chosen : sum);
  for (int64_t k = 0; k < router.top_k; k++) {
    ids[k] = order[k];
    weights[k] = score[order[k]] * scale;
  }
}

}  // namespace

void route(const Kernels& kernels, const Router& router, const uint8_t* x, DType dtype, int64_t tokens, void* logits, float* weights, int64_t* ids) {
  Workspace& w = workspace();
  std::lock_guard<std::mutex> lock(w.turn);
  const int64_t experts = router.experts;
  auto* scores = reinterpret_cast<float*>(w.result.at_least(tokens * experts * 4));
  plain_products(kernels, router.weight, dtype, experts, router.cols, x, tokens, scores);
  if (router.bias)
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t e = 0; e < experts; e++) scores[t * experts + e] += router.bias[e];
  kernels.store(scores, tokens * experts, logits, dtype);
  std::vector<int64_t> order;
  for (int64_t t = 0; t < tokens; t++) {
    float* score = scores + t * experts;
    if (dtype == DType::bf16)  // the choice is made from logits as they are given back
      for (int64_t e = 0; e < experts; e++) score[e] = value_at(logits, dtype, t * experts + e);
    choose(router, score, order, weights + t * router.top_k, ids + t * router.top_k);
  }
}

}  // namespace coterie
