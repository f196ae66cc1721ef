// NUMA nodes as Linux shows them. Weights are interleaved over the nodes; worker t runs on node t mod nodes.
#pragma once
#include <pthread.h>

#include <cstdint>
#include <string>
#include <vector>

namespace coterie {

struct Node {
  int number;  // as the kernel counts; there may be gaps
  std::vector<int> cpus;
};

// The online nodes that `folder`, laid out as /sys/devices/system/node, lists with one of the CPUs `allowed`, and those CPUs.
std::vector<Node> read_nodes(const std::string& folder, const std::vector<int>& allowed);
// One bit for each node's number, as mbind takes them.
std::vector<unsigned long> node_mask(const std::vector<Node>& nodes);

int numa_nodes();
void pin_to_node(pthread_t thread, int worker);
void interleave(void* memory, int64_t bytes);

}  // namespace coterie
