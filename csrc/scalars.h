// Conversions of single numbers, for edges, outputs and the scalar kernels. In an unnamed namespace on purpose: each
// kernel file is compiled for another instruction set, and the linker must not merge their copies.
#pragma once

#include <cstdint>
#include <cstring>

#include "kvern.h"

namespace {

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of_bf16(uint16_t value) { return float_of_bits(uint32_t{value} << 16); }

// Round to nearest even; a NaN stays a NaN (its payload might otherwise round up to infinity). Integers only, so that
// subnormal results are kept whatever the floating point mode is.
inline uint16_t bf16_of_float(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// sign | 4 exponent bits (bias 7) | 3 mantissa bits; exponent 0 is subnormal (m * 2^-9), 0x7f is NaN.
inline float float_of_e4m3(uint8_t code) {
  const uint32_t sign = uint32_t{code & 0x80u} << 24;
  const uint32_t magnitude = code & 0x7fu;
  if (magnitude == 0x7f) return float_of_bits(sign | 0x7fc00000);
  if (magnitude >= 8) return float_of_bits(sign | ((magnitude << 20) + (120u << 23)));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-9f;
  return sign ? -subnormal : subnormal;
}

inline float read_scalar(const void* data, int dtype, int64_t index) {
  if (dtype == KVERN_BF16) return float_of_bf16(static_cast<const uint16_t*>(data)[index]);
  return static_cast<const float*>(data)[index];
}

inline void write_scalar(void* data, int dtype, int64_t index, float value) {
  if (dtype == KVERN_BF16) {
    static_cast<uint16_t*>(data)[index] = bf16_of_float(value);
  } else {
    static_cast<float*>(data)[index] = value;
  }
}

}  // namespace
