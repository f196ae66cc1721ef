// Codes of a few bits that share bytes, in the orders in which files have them.
#pragma once
#include <cstdint>

namespace coterie {

// Numbers of as many bits, all that a byte holds of them: the lowest of `span` bytes are the first `span` numbers, the next bits of those bytes the next.
struct Field {
  int64_t at;  // where it begins in a block of bytes
  int bits;    // 0: there is no such field
  int span;
};

// Blocks of bytes, each with `count` codes: numbers of `lower` exclusive-or `flip`, and above them those of `upper`.
struct Blocks {
  const uint8_t* data;
  int64_t bytes, count;
  Field lower, upper;
  uint8_t flip;
};

// Writes the codes of blocks [begin, end), a byte each. Throws std::invalid_argument for fields that no file has.
void spread_fields(const Blocks& blocks, int64_t begin, int64_t end, uint8_t* to);

}  // namespace coterie
