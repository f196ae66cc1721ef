// Products shared out into items of work: by NUMA node first, whose memory holds the blocks that it computes, then by ranges of blocks.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>
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

// The shares of several lists as one, each node's together.
class JoinedShares {
 public:
  explicit JoinedShares(std::vector<Shares> lists) : lists_(std::move(lists)), first_(lists_[0].first_items().size(), 0) {
    for (size_t node = 0; node + 1 < first_.size(); node++) {
      first_[node + 1] = first_[node];
      for (const Shares& list : lists_) first_[node + 1] += items(list, node);
    }
  }

  const std::vector<int64_t>& first_items() const { return first_; }
  int64_t widest() const {
    int64_t most = 0;
    for (const Shares& list : lists_) most = std::max(most, list.widest());
    return most;
  }

  // Of which list, and the share.
  std::pair<size_t, Share> operator[](int64_t item) const {
    size_t node = 0, list = 0;
    while (item >= first_[node + 1]) node++;
    item -= first_[node];
    for (; item >= items(lists_[list], node); list++) item -= items(lists_[list], node);
    return {list, lists_[list][lists_[list].first_items()[node] + item]};
  }

 private:
  static int64_t items(const Shares& list, size_t node) { return list.first_items()[node + 1] - list.first_items()[node]; }

  std::vector<Shares> lists_;
  std::vector<int64_t> first_;
};

}  // namespace coterie
