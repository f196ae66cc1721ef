// NUMA nodes as Linux shows them: where threads run and where memory lies. Nodes are counted 0, 1, 2 ... here; their numbers may have gaps.
#pragma once
#include <pthread.h>

#include <cstdint>
#include <string>
#include <vector>

namespace coterie {

struct Node {
  int number;  // as the kernel counts
  std::vector<int> cpus;
};

// The online nodes that `folder`, laid out as /sys/devices/system/node, lists with one of the CPUs `allowed`, and those CPUs.
std::vector<Node> read_nodes(const std::string& folder, const std::vector<int>& allowed);
// One bit for each node's number, as mbind takes them.
std::vector<unsigned long> node_mask(const std::vector<Node>& nodes);
// The node of every worker: in turns over the nodes while they have CPUs left, then from the start.
std::vector<int> worker_nodes(const std::vector<Node>& nodes);

int numa_nodes();
int node_number(int node);

// Where worker `worker` runs: where it is pinned to; the caller, who is worker 0, wherever it is now.
int node_of_worker(int worker);
void pin_to_node(pthread_t thread, int worker);

// Nodes with these numbers instead of the machine's, each with all CPUs of this process; none: the machine's own again. For tests, while nothing is
// computed. The count of such changes tells a thread pool that it is out of date.
void pretend_nodes(const std::vector<int>& numbers);
int node_changes();

void interleave(void* memory, int64_t bytes);
// Takes fresh pages of `page_bytes` into memory, page p on node owner[p], by a thread on that node. Where the kernel refuses, it decides.
void take_pages(uint8_t* memory, int64_t page_bytes, const std::vector<int>& owner);
// The number of the node that holds each of `count` pages from `memory` on; below zero where a page is in no memory.
std::vector<int> holding_nodes(const uint8_t* memory, int64_t page_bytes, int64_t count);

}  // namespace coterie
