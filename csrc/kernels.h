// One table of kernels per instruction set. Each table comes from its own file, compiled with that set's flags.
#pragma once

#include <cstdint>

#include "kvern.h"

namespace kvern {

constexpr int64_t kBlock = 128;   // side of an FP8 scale block
constexpr int64_t kStep = 64;     // rows of x are padded with zeros to a multiple of this; every kernel step divides it

struct Linear {
  void* y;
  int y_dtype;
  const float* x;  // [m, x_stride], converted to FP32, zeros from k to x_stride
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

struct Kernels {
  const char* name;
  void (*linear[3])(const Linear&, int64_t begin, int64_t end);  // by weight dtype; output columns [begin, end)
  void (*dequantize)(const Dequantize&, int64_t begin, int64_t end);  // rows [begin, end)
};

extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;

}  // namespace kvern
