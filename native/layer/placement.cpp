#include "layer/placement.h"

#include <unistd.h>

#include <algorithm>
#include <map>
#include <utility>

#include "runtime/memory.h"
#include "runtime/numa.h"

namespace coterie {
namespace {

// Calls part(begin, end, node) for the bytes of one expert that each node computes, in order.
template <class Part>
void for_parts(const ExpertsMemory& experts, int nodes, const Part& part) {
  int64_t start = 0;
  for (const Layout* layout : {experts.has_gate ? &experts.in : nullptr, &experts.in, &experts.out}) {
    if (!layout) continue;
    const int64_t blocks = layout->blocks();
    for (int node = 0; node < nodes; node++) {
      const int64_t first = first_block(blocks, node, nodes), end = first_block(blocks, node + 1, nodes);
      if (first < end) part(start + layout->block_start(first), start + (end < blocks ? layout->block_start(end) : layout->bytes()), node);
    }
    start += layout->bytes();
  }
}

// Calls piece(page, bytes) for each page that bytes [begin, end) lie on.
template <class Piece>
void for_pages(int64_t begin, int64_t end, int64_t page_bytes, const Piece& piece) {
  for (int64_t page = begin / page_bytes; page * page_bytes < end; page++)
    piece(page, std::min(end, (page + 1) * page_bytes) - std::max(begin, page * page_bytes));
}

}  // namespace

std::vector<int> page_owners(const ExpertsMemory& experts, int nodes) {
  const int64_t pages = round_up(experts.count * experts.bytes, kHugePage) / kHugePage;
  std::vector<int64_t> computed(pages * nodes, 0), owned(nodes, 0);
  int64_t longest = 0;
  for (int64_t e = 0; e < experts.count; e++)
    for_parts(experts, nodes, [&](int64_t begin, int64_t end, int node) {
      longest = std::max(longest, end - begin);
      for_pages(e * experts.bytes + begin, e * experts.bytes + end, kHugePage, [&](int64_t page, int64_t bytes) { computed[page * nodes + node] += bytes; });
    });
  const int64_t ahead = round_up(longest, kHugePage) / kHugePage + 4;
  std::vector<int> owner(pages);
  for (int64_t page = 0; page < pages; page++) {
    const int64_t fewest = *std::min_element(owned.begin(), owned.end());
    int best = -1;
    for (int node = 0; node < nodes; node++) {
      if (owned[node] >= fewest + ahead) continue;
      const auto rank = [&](int n) { return std::pair(computed[page * nodes + n], -owned[n]); };
      if (best < 0 || rank(node) > rank(best)) best = node;
    }
    owned[owner[page] = best]++;
  }
  return owner;
}

void place_experts(const ExpertsMemory& experts, uint8_t* memory) {
  if (const int nodes = numa_nodes(); nodes > 1) take_pages(memory, kHugePage, page_owners(experts, nodes));
}

std::vector<Located> locate_expert(const ExpertsMemory& experts, const uint8_t* expert) {
  const int64_t page_bytes = sysconf(_SC_PAGESIZE), before = static_cast<int64_t>(reinterpret_cast<uintptr_t>(expert) % page_bytes);
  const std::vector<int> holding = holding_nodes(expert - before, page_bytes, round_up(before + experts.bytes, page_bytes) / page_bytes);
  std::map<std::pair<int, int>, int64_t> found;
  for_parts(experts, numa_nodes(), [&](int64_t begin, int64_t end, int node) {
    for_pages(before + begin, before + end, page_bytes,
              [&](int64_t page, int64_t bytes) { found[{node_number(node), std::max(-1, holding[page])}] += bytes; });
  });
  std::vector<Located> all;
  for (const auto& [nodes, bytes] : found) all.push_back({nodes.first, nodes.second, bytes});
  return all;
}

}  // namespace coterie
