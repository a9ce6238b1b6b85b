// One table of kernels per instruction set. Each table comes from its own file, compiled with that set's flags.
#pragma once

#include <cstdint>

#include "kvern.h"

namespace kvern {

constexpr int64_t kBlock = 128;   // side of an FP8 scale block
constexpr int64_t kStep = 64;     // rows of x are padded with zeros to a multiple of this; every kernel step divides it
constexpr int64_t kDirect = 4;    // up to this many rows of x, weights are decoded straight into registers

struct Linear {
  void* y;
  int y_dtype;
  // x in FP32, zeros from k to x_stride, in groups of x_group rows (the last may have fewer) that are multiplied
  // together: group g begins at g * x_group * x_stride, and in a group of G rows, column c of row i lies at
  // c / kStep * G * kStep + i * kStep + c % kStep. A kernel reads one stream, whatever the stride would alias with.
  const float* x;
  int64_t x_stride;
  const void* weight;
  int64_t weight_stride;
  const float* scale;
  int64_t scale_stride;
  const void* bias;
  int bias_dtype;
  int64_t m, n, k;
};

struct Dequantize {
  void* out;
  int out_dtype;
  const uint8_t* weight;
  int64_t weight_stride;
  const float* scale;
  int64_t scale_stride;
  int64_t n, k;
};

constexpr int64_t kAttendRows = 16;   // context rows decoded at a time
constexpr int64_t kDotRows = 32;      // the same for BF16 dot products
constexpr int64_t kAttendLanes = 64;  // at most so many lanes share them

// Keys and values of a context. Row r begins at row place(r) of `data`, place(r) = r without a table, else
// table[r / block_size] * block_size + r % block_size. The key is its first `nope` numbers and then `rope_size` numbers of
// row r of `rope`. The values are its numbers from value_at on; value_at is nope, or 0 where the key holds the values.
struct Context {
  const void* data;
  int dtype;  // F32 or BF16, of data and rope; or LATENT8, records that hold all of a key and its values
  int64_t stride;  // in elements, of records in bytes
  const int32_t* table;
  int64_t block_size;
  const void* rope;
  int64_t rope_stride;
  int64_t nope, rope_size, value_at;
  int64_t rank;  // codes in a record
};

// Queries against the rows [begin, end) of a context. A lane is one query of one head: `lanes` of them in a register,
// `vecs` registers (at most kAttendLanes lanes). log2 of a weight is its score times `scale`.
struct Attend {
  const void* q;  // [vecs, dim, lanes] in FP32; for attend_dots [vecs, ceil(dim / 2), lanes, 2] in BF16, padded with 0
  int64_t vecs, dim, rank;  // numbers of a key and of a value
  float scale;
  Context context;
  const int64_t* seen;  // [vecs, lanes]: the lane sees the rows before seen
  int64_t begin, end;
  float* partial;  // out, [vecs, rank + 2, lanes]: weighted sums of values; largest log2 weight; sum of the weights,
                   // all weights divided by the largest
  float* scratch;  // attend_scratch(dim, rank) numbers
};

// out[r - begin] = sum_i w_i sums_i[r] / sum_i w_i total_i for r in [begin, end), w_i = 2^(top_i - max top), by lane: the
// outcome of `parts` parts that lie `stride` numbers apart, each as in Attend::partial, of one register of lanes.
struct Merge {
  const float* parts;
  int64_t count, stride, rank, begin, end;
  float* out;  // [end - begin, lanes]
};

constexpr int64_t kMergeParts = 32;  // at most so many

struct Kernels {
  const char* name;
  int64_t lanes;
  int64_t x_group[3];  // by weight dtype, with more than kDirect rows of x; up to that, all rows are one group
  void (*linear[3])(const Linear&, int64_t begin, int64_t end);  // by weight dtype; output columns [begin, end)
  void (*dequantize)(const Dequantize&, int64_t begin, int64_t end);  // rows [begin, end)
  void (*attend)(const Attend&);
  void (*attend_dots)(const Attend&);  // the same for a context in BF16 or LATENT8, with BF16 dot products; nullptr: not here
  void (*merge)(const Merge&);
  // For dim and rank that are multiples of kTileColumns, as attend_dots, but sums and merged results lie by lane: partial
  // [vecs, lanes, rank] and then the two numbers of each lane, Merge::out [lanes, end - begin]; nullptr: not here.
  void (*attend_tiles)(const Attend&);
  void (*merge_tiles)(const Merge&);
};

constexpr int64_t kTileColumns = 32;

const Kernels& kernels_in_use();

extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;

void attend_dots_avx512bf16(const Attend&);  // Attend::lanes is 16, here and below
void attend_tiles_amx(const Attend&);
void merge_tiles_amx(const Merge&);

}  // namespace kvern
