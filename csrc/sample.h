// The loops over a vocabulary that kvern_sample and kvern_logprobs are made of, one table per instruction set.
#pragma once

#include <cstdint>

namespace kvern {

constexpr int64_t kSpan = 256;  // scores whose largest, and whose weights' sum, are kept: see `maxima`, `sums`

// Scores are FP32, or FP64 where some were edited. The weight of a score x is e^((x - largest) * by), by = 1 / temperature.
template <class T>
struct ScoreKernels {
  bool (*maxima)(const T* x, int64_t size, T* out);  // the largest score of each span; false where one is a NaN
  T (*smallest)(const T* x, int64_t size);
  int64_t (*count)(const T* x, int64_t size, T least);  // scores that are `least` or more
  // The sum of weights, in FP64 to 1e-15 each; 0 below e^-708. `out` [size]: the weights.
  double (*weigh)(const T* x, int64_t size, double largest, double by, double* out);
  double (*sum)(const T* x, int64_t size, double largest, double by);
  double (*cut)(const T* x, int64_t size, T least, double* weights);  // makes weights below `least` 0, sums up the others
  void (*bins)(const T* x, int64_t size, T largest, T width, int32_t count, int32_t* out);  // 0: largest; count: `width` below
};

struct SampleKernels {
  ScoreKernels<float> single;
  ScoreKernels<double> edited;
  double (*rough_sum)(const float* x, int64_t size, double largest, double by);  // in FP32: off by 1e-5 of what counts
};

extern const SampleKernels kScalarSample;
extern const SampleKernels kAvx2Sample;
extern const SampleKernels kAvx512Sample;

}  // namespace kvern
