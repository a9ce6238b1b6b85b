// The small loops between products, in plain C++ that the compiler turns into the instructions of the including file. In
// an unnamed namespace: see scalars.h.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "e4m3_table.h"
#include "latent8.h"
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

constexpr float kE4m3Max = 448.0f;

// The E4M3 code of a number that rounds to at most 448, to nearest even. Under 2^-6, the smallest that is normal, the
// steps are 2^-9: those of the FP32 numbers from 2^14 on.
inline uint32_t e4m3_code(float value) {
  const uint32_t bits = bits_of_float(value), magnitude = bits & 0x7fffffff;
  const uint32_t normal = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
  const uint32_t subnormal = bits_of_float(float_of_bits(magnitude) + 0x1p14f) - bits_of_float(0x1p14f);
  return (bits >> 24 & 0x80) | (magnitude < 121u << 23 ? subnormal : normal);
}

// One block of a record; returns its scale. Magnitudes are compared as integers, so that a NaN is the largest of all.
inline float encode_block(const float* x, int64_t size, uint8_t* codes) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t magnitude = bits_of_float(x[i]) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  if (largest >= 0x7f800000) {
    std::memset(codes, 0x7f, static_cast<size_t>(size));
    return float_of_bits(0x7fc00000);
  }
  const float scale = std::fmax(float_of_bits(largest) / kE4m3Max, FLT_MIN);
  for (int64_t i = 0; i < size; ++i) codes[i] = static_cast<uint8_t>(e4m3_code(x[i] / scale));
  return scale;
}

// See kvern_encode_latents.
void encode_latent(const float* x, int64_t rank, int64_t rope, uint8_t* record) {
  for (int64_t block = 0; block < latent_blocks(rank); ++block) {
    const int64_t first = block * kLatentBlock, left = rank - first;
    const float scale = encode_block(x + first, left < kLatentBlock ? left : kLatentBlock, record + first);
    std::memcpy(record + rank + 4 * block, &scale, sizeof scale);
  }
  for (int64_t i = 0; i < rope; ++i) {
    const auto number = static_cast<uint16_t>(bf16_bits(x[rank + i]));
    std::memcpy(record + rope_at(rank) + 2 * i, &number, sizeof number);
  }
}

inline float number_of_code(uint8_t code) {
  const uint32_t high = (code & 0x80u) | kE4m3Bytes.high[code & 0x7f];
  return float_of_bits(high << 24 | uint32_t{kE4m3Bytes.low[code & 0x7f]} << 16);
}

void decode_latent(const uint8_t* record, int64_t rank, int64_t rope, float* out) {
  for (int64_t i = 0; i < rank; ++i) out[i] = number_of_code(record[i]) * latent_scale(record, rank, i / kLatentBlock);
  for (int64_t i = 0; i < rope; ++i) {
    uint16_t number;
    std::memcpy(&number, record + rope_at(rank) + 2 * i, sizeof number);
    out[rank + i] = float_of_bf16(number);
  }
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

constexpr kvern::RowKernels kRowKernels{rms_norm,      gate_rows, round_row,      encode_latent, decode_latent,
                                        arrange_pairs, nullptr,   arrange_singles};

}  // namespace
