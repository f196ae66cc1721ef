// Tokens grouped by expert.
#pragma once
#include <cstdint>
#include <vector>

#include "isa/kernels.h"

namespace coterie {

// Expert ids [tokens, top_k]; -1 is no expert.
struct Routing {
  std::vector<int32_t> experts;  // those with tokens, the busiest first
  std::vector<int64_t> begin;    // [experts + 1] their ranges in the arrays below
  std::vector<int32_t> token;    // token of each slot
  std::vector<int32_t> slot;     // 0, 1, 2 ...: its row of the hidden activations
  std::vector<float> weight;     // its routing weight
  std::vector<int64_t> position; // its place in ids, token * top_k + k

  void group(const int64_t* ids, const float* weights, int64_t tokens, int64_t top_k, int64_t expert_count);
  int64_t slots() const { return static_cast<int64_t>(token.size()); }

  // Rows read and rows written by expert `i` of the list above.
  Tokens into_hidden(int64_t i) const { return {&token[begin[i]], &slot[begin[i]], nullptr, begin[i + 1] - begin[i]}; }
  Tokens by_token(int64_t i) const { return {&token[begin[i]], &slot[begin[i]], &weight[begin[i]], begin[i + 1] - begin[i]}; }
  Tokens within_hidden(int64_t i) const { return {&slot[begin[i]], &slot[begin[i]], nullptr, begin[i + 1] - begin[i]}; }
  Tokens within_result(int64_t i) const { return {&slot[begin[i]], &token[begin[i]], nullptr, begin[i + 1] - begin[i]}; }
  Tokens into_result(int64_t i) const { return {&slot[begin[i]], &token[begin[i]], &weight[begin[i]], begin[i + 1] - begin[i]}; }
};

}  // namespace coterie
