// Which NUMA node computes which blocks of a matrix, and its memory on that node.
#pragma once
#include <cstdint>
#include <vector>

#include "formats/layout.h"

namespace coterie {

// Node n computes blocks [first_block(blocks, n, nodes), first_block(blocks, n + 1, nodes)) of every matrix.
inline int64_t first_block(int64_t blocks, int64_t node, int64_t nodes) { return blocks * node / nodes; }

// Experts back to back, each of `bytes`: its matrices, and what is left of its last page.
struct ExpertsMemory {
  Layout in, out;
  bool has_gate;
  int64_t count, bytes;
};

// The node of each huge page: the one that computes most of it, or of those the one that has the fewest pages so far. A node that is a part of a matrix
// and four pages ahead of another is passed over, so that no matrix size fills one node's memory. Where a node's part of a matrix is many pages, nearly all
// bytes lie where they are computed; where it is less than a page, hardly more than if pages were dealt out in turn.
std::vector<int> page_owners(const ExpertsMemory& experts, int nodes);

// Has fresh pages for experts taken on their nodes; nothing where there is one node.
void place_experts(const ExpertsMemory& experts, uint8_t* memory);

// Bytes of one expert that the node of number `computed_by` computes and the node `held_by` holds; held_by below zero: they are in no memory.
struct Located {
  int computed_by, held_by;
  int64_t bytes;
};
std::vector<Located> locate_expert(const ExpertsMemory& experts, const uint8_t* expert);

}  // namespace coterie
