// What every instruction set provides: the same functions, compiled with its own flags (see generic.h).
#pragma once
#include <cstdint>

#include "layer/experts.h"

namespace coterie {

enum class DType : int { bf16 = 0, f32 = 1, f16 = 2 };

constexpr int kActivationGroup = 256;  // columns of an activation row that share one int8 scale

// Activations in the form the dot products of an instruction set read.
struct Staged {
  uint8_t* data;      // [rows][row_bytes]
  int64_t row_bytes;
  float* scale;       // integer paths: [rows][groups]
  // Integer paths: the sum of each unit of quantised columns, times minus the offset of the weights' codes.
  int32_t* offset;        // [rows][units]
  int32_t* group_offset;  // [rows][groups], for weights decoded to bytes
  bool integer;       // int8 codes and scales, or floats
  int64_t cols;       // padded
  int64_t unit;       // columns per partial sum: the weights' group, or that of the activations

  int64_t groups() const { return (cols + kActivationGroup - 1) / kActivationGroup; }
  int64_t units() const { return (cols + unit - 1) / unit; }
};

// Tokens of one expert: which staged rows it reads, which output rows it adds to, and with what weight.
struct Tokens {
  const int32_t* input;   // [count] row of the staged input
  const int32_t* output;  // [count] row of the result
  const float* weight;    // [count] routing weight; null: 1
  int64_t count;
};

// LoRA of one projection: y += scaling * B (A x), A [experts][rank][in], B [experts][out][rank]. Rank 0: none.
struct LoraFactor {
  const void *a, *b;
  DType a_type, b_type;
  int64_t rank;
  float scaling;
  void *grad_a, *grad_b;  // of the types of a and b; null where not wanted

  int64_t padded_rank() const { return round_up(rank, kPanelRows); }
};

struct Lora {
  LoraFactor gate, up, down;
  bool shared_a;  // gate and up have one A; its gradient goes to the gate's
};

// What LoRA adds to a product: B low[row], low = scaling * A x, staged by the rows that `tokens` name; to a transposed one, low A. Null: nothing.
struct LoraTerm {
  const LoraFactor* factor;
  Staged low;
  bool by_input;  // rows of the input, or of the output
};

// Hidden activations: act(gate, up) in row `output`, staged, or bf16 to be quantised; and what training keeps, bf16 [*][intermediate], that of row r in
// row kept_row[r]; null where nothing is kept.
struct Activated {
  const Activation* activation;
  uint8_t* rows;
  int64_t row_bytes;
  uint16_t *gate, *up;
  const int64_t* kept_row;
};

// Sums: result[output] += weight * product, f32 [*][stride], its first column being the first row of block `first`.
struct Summed {
  float* result;
  int64_t stride, first;
};

struct Backward;

// From the gradients of hidden activations, before their routing weights, to those of gate and up, in the buffers of a backward pass.
struct Slopes {
  const Activation* activation;
  bool has_gate;
  const Backward* buffers;
};

// The rows of `tokens` times one matrix, or times two of one layout; an epilogue takes the results. Two matrices meet in the activation; transposed ones
// lie one after the other in the columns of x, and add up.
struct Product {
  const Layout* layout;
  bool transposed;                     // x times W, and LoRA's A, in place of x times the transposes of W and B
  int64_t expert;                      // whose LoRA it is
  const uint8_t* matrix[2];            // gate and up; or one and null
  const float* bias[2];                // rows padded to panels; or null
  LoraTerm lora[2];
  Staged x;
  Tokens tokens;
  Activated activated;                 // where `activation` is set
  Slopes slopes;                       // where `buffers` is set
  Summed summed;                       // elsewhere

  int64_t blocks() const { return transposed ? layout->padded_cols() / kBlockRows : layout->blocks(); }
};

// Buffers of a backward pass, all by slot but for what the forward kept.
struct Backward {
  const Lora* lora;
  const uint16_t *gate, *up;  // pre-activations, that of a slot in row `row[slot]`
  const int64_t* row;
  Staged grad_out, x;         // by token
  Staged d_low_down;          // scaling * B^T grad_out
  Staged low_gate, low_up, low_down;
  Staged hidden;
  Staged grads;               // rows: d gate | d up | d low gate | d low up
  int64_t up_column, low_gate_column, low_up_column;
  float* weight_parts;        // [blocks of 64 hidden columns][slots]: shares of the routing weights' gradients
  int64_t slots;
};

enum class LoraGradient { gate_a, gate_b, up_a, up_b, down_a, down_b };

constexpr float kNoScore = 1e30f;  // beyond any score of attention

// A part of a sequence's keys and values and the query heads that share them; strides in bytes.
struct KeysPart {
  int64_t count, heads;        // positions, query heads
  int64_t key_dim, value_dim;  // multiples of 16
  DType dtype;                 // bf16 or f32
  float scale;
  const uint8_t *queries, *keys, *values;
  int64_t query_stride, key_stride, value_stride;
  const uint8_t* more_keys;    // what stands behind key_dim columns of keys, as in queries
  int64_t more_stride, more_dim;  // columns: a multiple of 16, or 0
  const uint8_t* mask;         // [count], 0: not looked at; null: all are
  float* sums;                 // [heads][value_dim]: of values, times e^(score - largest)
  float *largest, *total;      // [heads]: the largest score, or -kNoScore; the sum of e^(score - largest)
};

// Rows of a plain matrix, and tokens: to[token * stride + row] is the product of the two. All contiguous.
struct PlainRows {
  int64_t rows, cols, tokens;  // cols: a multiple of 16
  DType dtype;                 // of weight [rows][cols] and x [tokens][cols]: bf16 or f32
  const uint8_t *weight, *x;
  float* to;
  int64_t stride;
};

// to[token * stride + column] is the sum of a plain matrix's column, each row times the token's weight for it.
struct PlainSums {
  int64_t rows, cols, tokens;  // cols: a multiple of 16
  DType dtype;                 // of weight [rows][cols]: bf16 or f32
  const uint8_t* weight;
  const float* x;              // [tokens][rows]
  float* to;
  int64_t stride;
};

// Keys or values of one head, bf16; stride in bytes.
struct HeadRows {
  const uint8_t* data;
  int64_t stride, positions, dim;  // dim: a multiple of 16

  // Bytes as `pack_head` writes them: blocks of 64 positions, or of 64 columns of values, the last of which may be narrower.
  int64_t packed_bytes() const { return round_up(positions, kBlockRows) * dim * 2; }
};

constexpr int64_t kQueryRows = 64;  // of a part, at most

// Some queries of one head, and the packed keys and values that they look at; bf16, strides in bytes.
struct PromptPart {
  const uint8_t* queries;
  int64_t query_stride, first, count;       // first: the position of the first of them
  const uint8_t *keys, *values;
  int64_t positions, key_dim, value_dim;
  float scale;
  bool causal;                              // a query looks at no position behind its own
  const uint8_t* mask;                      // [count][positions], 0: not looked at; null: all are
  int64_t mask_stride;
  const float* sink;                        // see Attention; null: none
  uint8_t* out;                             // [count][value_dim]
  int64_t out_stride;
};

// A head of queries or keys on its way to attention: scale * weight * from, of whose first `turned` columns each in the first half is turned against
// its twin in the second, as rotary embeddings do: (a, b) -> (a cos - b sin, b cos + a sin), each with the cos and sin of its own column.
struct Head {
  const uint8_t* from;
  uint8_t* to;
  DType dtype;                // of all rows but `weight`: bf16 or f32
  int64_t dim, turned;        // dim: a multiple of 16
  float scale;
  const float* weight;        // [dim]; null: 1
  const uint8_t *cos, *sin;   // of the first half's columns
  int64_t twin;               // from the angle of a column in the first half to its twin's: half of `turned`, or 0
};

constexpr float kSmallestSquare = 1e-6f;  // added to the square of a query's or key's length in linear attention

// Channels of one head of some tokens on their way into linear attention: a convolution of each with its last `taps` values, and SiLU. The stride is in elements.
struct HeadChannels {
  int64_t tokens, dim, taps;
  const uint8_t* from;               // [tokens][dim], and as many tokens before it as were `seen`, at most taps - 1
  int64_t stride, seen;
  DType dtype;                       // bf16 or f32
  float* rows;                       // [taps - 1 + tokens][dim], written; but those before what was seen are given
  const float *weights, *bias;       // [taps][dim], [dim] or null
  float length;                      // of each token's result; 0: as it is
  float* to;                         // [tokens][dim]
};

// The gated delta rule for one head of some tokens, then norm and gate. Strides in elements.
struct DeltaHead {
  int64_t tokens, key_dim, value_dim;    // value_dim: a multiple of 16
  const float *queries, *keys, *values;  // [tokens][key_dim] twice, [tokens][value_dim]
  const float *decays, *betas;           // [tokens]
  float* state;                          // [key_dim][value_dim], updated
  float* out;                            // [tokens][value_dim], written
  DType dtype;                           // bf16 or f32, of what follows
  const uint8_t* gates;                  // [tokens][value_dim]
  int64_t gate_stride;
  const float* norm;                     // [value_dim]
  float epsilon;
  uint8_t* to;                           // [tokens][value_dim]
  int64_t to_stride;

  int64_t scratch_floats() const { return 2 * kPanelRows * key_dim + value_dim; }
};

struct PackOptions {
  bool search;
  const float* tiles;  // layouts that need it: the largest magnitude of each tile of 128 rows and a step's columns
  float largest;       // of the matrix
};

// Squared distance between weights and what they were packed into, and the weights' sum of squares (0 where nothing is lost).
struct PackError {
  double difference = 0, total = 0;
};

struct Kernels {
  const char* name;
  // Bytes of one staged element on the bf16 path and on the integer path.
  int float_bytes, integer_bytes;

  // Rows [begin, end) of `source` [*, cols] (any float dtype) into staged form.
  void (*stage)(const Layout& weights, const void* source, DType dtype, int64_t stride, int64_t cols, int64_t begin, int64_t end, const Staged& to);
  // Blocks [begin, end) of a product; meanwhile what lies at `next` is fetched.
  void (*multiply)(const Product&, int64_t begin, int64_t end, const uint8_t* next, uint8_t* scratch);
  void (*store)(const float* result, int64_t count, void* to, DType dtype);

  // Panel `panel` of a matrix from rows of `source` (row stride in elements); false if a NaN or Inf cannot be packed.
  bool (*pack_panel)(const Layout&, int64_t panel, const void* source, DType dtype, int64_t stride, const PackOptions&, uint8_t* matrix, float* scratch,
                     PackError& error);
  void (*largest_of_tiles)(const Layout&, int64_t tile, const void* source, DType dtype, int64_t stride, float* tiles);

  // low[token.output] = scaling * A x, or with `transposed` scaling * B^T x, into columns from `column` on of staged rows.
  void (*low_rank)(const LoraFactor&, int64_t expert, int64_t in, int64_t out, bool transposed, const Staged& x, const Tokens&, const Staged& low,
                   int64_t column);
  void (*lora_gradient)(const Experts&, int64_t expert, LoraGradient which, const Tokens&, const Backward&);

  // Fills in the results of a part; scratch: 8 (key_dim + more_dim + 2 (count rounded up to 16)) floats.
  void (*attend)(const KeysPart&, float* scratch);
  void (*plain_rows)(const PlainRows&, float* scratch);  // scratch: tokens * cols floats
  void (*plain_sums)(const PlainSums&);

  void (*turn)(const Head&, float* scratch);  // scratch: 2 dim floats
  // Block `number` of keys, or of values, as `attend_rows` reads them.
  void (*pack_head)(const HeadRows&, bool values, int64_t number, uint8_t* to);
  void (*attend_rows)(const PromptPart&);
  void (*convolve)(const HeadChannels&);
  void (*delta_rule)(const DeltaHead&, float* scratch);

  // For measuring: issue `count` full-width dot products of a kind; read `bytes` bytes.
  void (*dots)(int64_t count, bool integer);
  uint64_t (*read)(const uint8_t* from, int64_t bytes);
  int64_t macs_per_float_dot, macs_per_integer_dot;
};

// Scratch bytes one thread needs for a block of a product over so many columns: bf16 pairs and a scale a row, or for each 128 columns; bytes and
// their scales are less.
inline int64_t block_scratch_bytes(int64_t padded_cols) { return kBlockRows * (padded_cols * 2 + 4 + padded_cols / 128 * 4); }

extern const Kernels kScalar, kAvx2, kAvx2Vnni, kAvx512, kAvx512Vnni, kAvx512Bf16, kAmx, kAmxEmulated;

}  // namespace coterie
