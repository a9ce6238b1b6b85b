// For each of the 128 E4M3 magnitudes the two bytes of the BF16 number with the same value: E4M3 fits BF16 exactly,
// subnormals and all. In an unnamed namespace: see scalars.h.
#pragma once

#include <cstdint>

namespace {

struct E4m3Bytes {
  alignas(64) uint8_t high[128];
  alignas(64) uint8_t low[128];

  constexpr E4m3Bytes() : high(), low() {
    for (int code = 0; code < 128; ++code) {
      const uint32_t word = bf16(static_cast<uint32_t>(code));
      high[code] = static_cast<uint8_t>(word >> 8);
      low[code] = static_cast<uint8_t>(word & 0xff);
    }
  }

  static constexpr uint32_t bf16(uint32_t magnitude) {
    if (magnitude == 0x7f) return 0x7fc0;
    if (magnitude >= 8) return (magnitude << 4) + (120u << 7);
    if (magnitude == 0) return 0;
    uint32_t exponent = 118;  // 2^-9 = exponent field 118
    uint32_t fraction = magnitude;
    for (; fraction >= 2; fraction >>= 1) ++exponent;
    const uint32_t top = 1u << (exponent - 118);
    return exponent << 7 | (magnitude - top) << (7 - (exponent - 118));
  }
};

constexpr E4m3Bytes kE4m3Bytes;

}  // namespace
