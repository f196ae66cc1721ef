// The thread pool: the caller is one of the workers; a waiting worker spins briefly, then sleeps.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

namespace coterie {

// Usable CPUs: the affinity mask, cut by a cgroup CPU quota.
int available_cpus();

int thread_count();
void set_thread_count(int count);  // applies from the next parallel call on

// Calls work(item, thread) for every item in [0, items), threads taking items in order as they become free. Calls from several threads take turns;
// a call from inside `work` is not allowed. After fork the child starts a fresh pool. What `work` throws, on any thread, is thrown here once every thread
// has left it; items that nobody had taken are left out.
void parallel(int64_t items, const std::function<void(int64_t item, int thread)>& work);

// The same for items of which [first[n], first[n + 1]) belong to NUMA node n: its workers take them first, then what is left of the next nodes' items, so
// that nobody is idle while there is work. `first` has one number more than there are nodes.
void parallel(const std::vector<int64_t>& first, const std::function<void(int64_t item, int thread)>& work);

}  // namespace coterie
