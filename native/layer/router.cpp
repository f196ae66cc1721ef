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

constexpr float kLeast = 1e-20f;  // added to a sum of sigmoids, as the models do

// `order`: all experts, the `top_k` largest of `by` first, of equals the first first.
void sort_by(const std::vector<float>& by, int64_t top_k, std::vector<int64_t>& order) {
  order.resize(by.size());
  std::iota(order.begin(), order.end(), 0);
  const auto before = [&](int64_t a, int64_t b) { return by[a] > by[b] || (by[a] == by[b] && a < b); };
  std::partial_sort(order.begin(), order.begin() + top_k, order.end(), before);
}

// Leaves out all groups of experts but those whose best two have the largest sums.
void keep_groups(const Router& router, std::vector<float>& choice) {
  const int64_t size = router.experts / router.groups;
  std::vector<float> sums(router.groups);
  for (int64_t g = 0; g < router.groups; g++) {
    float best = -INFINITY, second = -INFINITY;
    for (int64_t e = g * size; e < (g + 1) * size; e++) {
      second = std::max(second, std::min(best, choice[e]));
      best = std::max(best, choice[e]);
    }
    sums[g] = best + second;
  }
  std::vector<int64_t> order;
  sort_by(sums, router.kept, order);
  for (int64_t i = router.kept; i < router.groups; i++) std::fill_n(choice.begin() + order[i] * size, size, -INFINITY);
}

// One token's, by its logits.
void choose(const Router& router, const float* logits, float* weights, int64_t* ids) {
  std::vector<float> score(logits, logits + router.experts), choice;
  float sum = 0.0f;
  if (router.correction) {
    for (float& s : score) s = 1.0f / (1.0f + std::exp(-s));
    choice = score;
    for (int64_t e = 0; e < router.experts; e++) choice[e] += router.correction[e];
    if (router.groups > 1) keep_groups(router, choice);
    sum = 1.0f;
  } else {
    const float largest = *std::max_element(score.begin(), score.end());
    for (float& s : score) sum += s = std::exp(s - largest);
    choice = score;
  }
  std::vector<int64_t> order;
  sort_by(choice, router.top_k, order);
  float chosen = router.correction ? kLeast : 0.0f;
  for (int64_t k = 0; k < router.top_k; k++) chosen += score[order[k]];
  const float scale = (router.correction ? router.scale : 1.0f) / (router.normalised ? chosen : sum);
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
  kernels.store(scores, tokens * experts, logits, router.wide ? DType::f32 : dtype);
  for (int64_t t = 0; t < tokens; t++) {
    float* score = scores + t * experts;
    for (int64_t e = 0; !router.wide && e < experts; e++) score[e] = rounded(score[e], dtype);  // the choice is made from logits as they are given back
    choose(router, score, weights + t * router.top_k, ids + t * router.top_k);
  }
}

}  // namespace coterie
