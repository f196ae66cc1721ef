// Memory for weights: anonymous, zeroed, 2 MiB aligned, huge pages asked for, interleaved over NUMA nodes unless taken elsewhere (numa.h).
#pragma once
#include <cstdint>

namespace coterie {

constexpr int64_t kHugePage = 2 << 20;

uint8_t* allocate_pages(int64_t bytes);  // null when there is no memory
void free_pages(uint8_t* memory, int64_t bytes);

// Of `size` bytes there, the first `bytes` are in use: AddressSanitizer, which knows nothing of pages, reports what touches the others.
void bound(uint8_t* memory, int64_t bytes, int64_t size);

}  // namespace coterie
