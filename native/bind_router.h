// How a router of the Python side chooses from sigmoids.
#pragma once
#include <optional>
#include <vector>

#include "bind.h"
#include "layer/router.h"
#include "tensors.h"

namespace coterie {

// Into `router`; false where it does not fit. `correction`: memory for it.
inline bool scored(const ScoresTuple& given, std::vector<float>& correction, Router& router) {
  const auto [added, groups, kept, scale, wide] = given;
  auto found = borrow_floats(added, router.experts);
  if (!found || groups < 1 || router.experts % groups || kept < 1 || kept > groups || router.experts / groups * kept < router.top_k) return false;
  correction = std::move(*found);
  router.correction = correction.data(), router.groups = groups, router.kept = kept, router.scale = scale, router.wide = wide;
  return true;
}

}  // namespace coterie
