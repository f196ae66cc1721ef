// NUMA nodes as Linux shows them. Weights are interleaved over the nodes; worker t runs on node t mod nodes.
#pragma once
#include <pthread.h>

#include <cstdint>

namespace coterie {

int numa_nodes();
void pin_to_node(pthread_t thread, int worker);
void interleave(void* memory, int64_t bytes);

}  // namespace coterie
