// The small loops between products, in plain C++ that the compiler turns into the instructions of the including file. In
// an unnamed namespace: see scalars.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "packed.h"
#include "scalars.h"

namespace {

constexpr int64_t kSums = 16;  // partial sums, so that the additions of a norm do not wait for each other

// x / sqrt(mean(x^2) + eps) * weight
void rms_norm(const float* x, const float* weight, float eps, int64_t size, float* out) {
  float sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= size; i += kSums) {
    for (int64_t j = 0; j < kSums; ++j) sums[j] += x[i + j] * x[i + j];
  }
  for (; i < size; ++i) sums[i % kSums] += x[i] * x[i];
  float total = 0.0f;
  for (int64_t j = 0; j < kSums; ++j) total += sums[j];
  const float by = 1.0f / std::sqrt(total / static_cast<float>(size) + eps);
  for (i = 0; i < size; ++i) out[i] = x[i] * by * weight[i];
}

// e^x to 2e-7 relative: 2^n by its exponent bits, and a polynomial for what is left of x log2(e). A NaN stays one.
inline float exponential(float x) {
  const float low = x < -87.0f ? -87.0f : x;
  const float in_range = low > 88.0f ? 88.0f : low;
  const float powers = in_range * 1.44269504f;
  const float shifted = powers + 12582912.0f;  // 1.5 * 2^23: the integer next to it lands in the low bits
  const float whole = shifted - 12582912.0f;
  const float f = (in_range - whole * 0.693145752f) - whole * 1.42860677e-6f;  // ln 2 in two parts
  float value = 1.0f / 720.0f;
  value = value * f + 1.0f / 120.0f;
  value = value * f + 1.0f / 24.0f;
  value = value * f + 1.0f / 6.0f;
  value = value * f + 0.5f;
  value = value * f + 1.0f;
  value = value * f + 1.0f;
  return value * float_of_bits((bits_of_float(shifted) - 0x4b400000u + 127u) << 23);
}

// gate = silu(gate) * up * weight
void gate_rows(float* gate, const float* up, int64_t size, float weight) {
  for (int64_t i = 0; i < size; ++i) gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i] * weight;
}

inline uint32_t bf16_bits(float value) {  // bf16_of_float without a branch
  const uint32_t bits = bits_of_float(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded;
}

inline float bf16_rounded(float value) { return float_of_bits(bf16_bits(value) << 16); }

void round_row(const float* x, int64_t size, uint16_t* out) {
  for (int64_t i = 0; i < size; ++i) out[i] = static_cast<uint16_t>(bf16_bits(x[i]));
}

// One row of x as a column (see Columns): element e goes to out[e * stride], its second copy beside it.
void arrange_pairs(const float* x, int64_t size, int64_t elements, int copies, int64_t stride, uint32_t* out) {
  const int64_t whole = size / 2;
  if (stride == 1) {
    for (int64_t e = 0; e < whole; ++e) out[e] = bf16_bits(x[2 * e]) | bf16_bits(x[2 * e + 1]) << 16;
  } else if (copies == 1) {
    for (int64_t e = 0; e < whole; ++e) out[e * stride] = bf16_bits(x[2 * e]) | bf16_bits(x[2 * e + 1]) << 16;
  } else {
    for (int64_t e = 0; e < whole; ++e) {
      const float a = x[2 * e], b = x[2 * e + 1];
      out[e * stride] = bf16_bits(a) | bf16_bits(b) << 16;
      out[e * stride + 1] = bf16_bits(a - bf16_rounded(a)) | bf16_bits(b - bf16_rounded(b)) << 16;
    }
  }
  for (int64_t e = whole; e < elements; ++e) {
    const float a = 2 * e < size ? x[2 * e] : 0.0f;
    out[e * stride] = bf16_bits(a);
    if (copies == 2) out[e * stride + 1] = bf16_bits(a - bf16_rounded(a));
  }
}

void arrange_singles(const float* x, int64_t size, int64_t elements, bool rounds, int64_t stride, uint32_t* out) {
  for (int64_t e = 0; e < size; ++e) out[e * stride] = bits_of_float(rounds ? bf16_rounded(x[e]) : x[e]);
  for (int64_t e = size; e < elements; ++e) out[e * stride] = 0;
}

constexpr kvern::RowKernels kRowKernels{rms_norm, gate_rows, round_row, arrange_pairs, arrange_singles};

}  // namespace
