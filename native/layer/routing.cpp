#include "layer/routing.h"

#include <algorithm>

namespace coterie {

void Routing::group(const int64_t* ids, const float* weights, int64_t tokens, int64_t top_k, int64_t expert_count) {
  std::vector<int64_t> next(expert_count, 0);
  int64_t slots = 0;
  for (int64_t i = 0; i < tokens * top_k; i++)
    if (ids[i] >= 0) next[ids[i]]++, slots++;

  experts.clear();
  for (int64_t e = 0; e < expert_count; e++)
    if (next[e]) experts.push_back(static_cast<int32_t>(e));
  std::stable_sort(experts.begin(), experts.end(), [&](int32_t a, int32_t b) { return next[a] > next[b]; });

  begin.assign(1, 0);
  for (int32_t e : experts) {
    const int64_t count = next[e];
    next[e] = begin.back();
    begin.push_back(begin.back() + count);
  }
  token.resize(slots);
  slot.resize(slots);
  weight.resize(slots);
  position.resize(slots);
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t k = 0; k < top_k; k++) {
      const int64_t e = ids[t * top_k + k];
      if (e < 0) continue;
      const int64_t at = next[e]++;
      token[at] = static_cast<int32_t>(t);
      slot[at] = static_cast<int32_t>(at);
      weight[at] = weights[t * top_k + k];
      position[at] = t * top_k + k;
    }
}

}  // namespace coterie
