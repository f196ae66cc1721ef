// Products shared out into items of work: by NUMA node first, whose memory holds the blocks that it computes, then by ranges of blocks.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "layer/placement.h"
#include "layer/workspace.h"
#include "runtime/numa.h"
#include "runtime/threads.h"

namespace coterie {

struct Share {
  int64_t product, begin, end;  // blocks [begin, end) of one product
};

class Shares {
 public:
  // About kItemsPerThread items for each thread, of one product's blocks each.
  Shares(int64_t products, int64_t blocks) : nodes_(numa_nodes()), threads_(thread_count()), blocks_(blocks), first_(nodes_ + 1, 0) {
    const int64_t wanted = (threads_ * kItemsPerThread + products * nodes_ - 1) / (products * nodes_);
    for (int64_t node = 0; node < nodes_; node++) {
      const int64_t own = first_block(blocks, node + 1, nodes_) - first_block(blocks, node, nodes_), parts = std::min(wanted, own);
      first_[node + 1] = first_[node] + products * parts;
      if (parts) widest_ = std::max(widest_, (own + parts - 1) / parts);
    }
    products_ = products;
  }

  // Of each node, and the number of all of them: what `parallel` takes.
  const std::vector<int64_t>& first_items() const { return first_; }
  int64_t widest() const { return widest_; }  // blocks of an item, at most

  Share operator[](int64_t item) const {
    const int64_t node = node_of(item), parts = (first_[node + 1] - first_[node]) / products_, at = item - first_[node];
    const int64_t first = first_block(blocks_, node, nodes_), own = first_block(blocks_, node + 1, nodes_) - first, part = at % parts;
    return {at / parts, first + own * part / parts, first + own * (part + 1) / parts};
  }

  // About the item that the thread which has this one takes next.
  Share after(int64_t item) const { return (*this)[std::min(item + (threads_ + nodes_ - 1) / nodes_, first_[node_of(item) + 1] - 1)]; }

 private:
  int64_t node_of(int64_t item) const {
    int64_t node = 0;
    while (item >= first_[node + 1]) node++;
    return node;
  }

  int64_t nodes_, threads_, blocks_, products_ = 1, widest_ = 0;
  std::vector<int64_t> first_;
};

}  // namespace coterie
