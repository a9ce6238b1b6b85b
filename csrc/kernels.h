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
constexpr int64_t kAttendHeads = 64;  // at most so many heads share them

// Some heads of one query against the rows [begin, end) of its context. Heads are lanes: `lanes` of them in a register,
// `vecs` registers. log2 of a weight is its score times `scale`.
struct Attend {
  const float* q;  // [vecs, dim, lanes]
  int64_t vecs, dim, rank;
  float scale;
  const void* rows;  // dtype F32 or BF16, row_stride apart; row r at rows[table[r / block_size] * block_size + r % ...]
  int rows_dtype;
  int64_t row_stride;
  const int32_t* table;
  int64_t block_size;
  int64_t begin, end;
  float* partial;  // out, [vecs, rank + 2, lanes]: weighted sums of values; largest log2 weight; sum of the weights,
                   // all weights divided by the largest
  float* scratch;  // kAttendRows * (dim padded to kStep + kAttendHeads)
};

struct Kernels {
  const char* name;
  int64_t lanes;
  int64_t x_group[3];  // by weight dtype, with more than kDirect rows of x; up to that, all rows are one group
  void (*linear[3])(const Linear&, int64_t begin, int64_t end);  // by weight dtype; output columns [begin, end)
  void (*dequantize)(const Dequantize&, int64_t begin, int64_t end);  // rows [begin, end)
  void (*attend)(const Attend&);
};

const Kernels& kernels_in_use();

extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;

}  // namespace kvern
