// What the two AVX-512 files of packed products share: decoding, and the kernels for FP32 weights.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "e4m3_table.h"
#include "packed_body.h"

namespace {

inline __m512 bf16_lanes(const uint16_t* p) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

inline __m512i look_up_128(const uint8_t* table, __m512i codes) {  // bit 7 of a code is ignored
  return _mm512_permutex2var_epi8(_mm512_load_si512(table), codes, _mm512_load_si512(table + 64));
}

// 64 E4M3 codes to 64 BF16 numbers: two look-ups, a byte each, the sign, and bytes unpacked in 128-bit lanes.
inline void e4m3_to_bf16(__m512i codes, __m512i& first, __m512i& second) {
  const __m512i high = look_up_128(kE4m3Bytes.high, codes);
  const __m512i low = look_up_128(kE4m3Bytes.low, codes);
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
  const __m512i with_sign = _mm512_ternarylogic_epi32(high, codes, sign, 0xf8);  // high | (codes & sign)
  first = _mm512_unpacklo_epi8(low, with_sign);
  second = _mm512_unpackhi_epi8(low, with_sign);
}

// 64 values - 8 from 64 bytes: of the low nibbles in step 0, of the high ones in step 1.
inline void int4_to_bf16(__m512i bytes, int step, __m512i& first, __m512i& second) {
  // BF16 of -8 .. 7: c100 c0e0 c0c0 c0a0 c080 c040 c000 bf80 | 0000 3f80 4000 4040 4080 40a0 40c0 40e0
  const __m512i high_bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(
      static_cast<char>(0xc1), static_cast<char>(0xc0), static_cast<char>(0xc0), static_cast<char>(0xc0),
      static_cast<char>(0xc0), static_cast<char>(0xc0), static_cast<char>(0xc0), static_cast<char>(0xbf), 0x00, 0x3f, 0x40,
      0x40, 0x40, 0x40, 0x40, 0x40));
  const __m512i low_bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(
      0x00, static_cast<char>(0xe0), static_cast<char>(0xc0), static_cast<char>(0xa0), static_cast<char>(0x80), 0x40, 0x00,
      static_cast<char>(0x80), 0x00, static_cast<char>(0x80), 0x00, 0x40, static_cast<char>(0x80),
      static_cast<char>(0xa0), static_cast<char>(0xc0), static_cast<char>(0xe0)));
  const __m512i shifted = step ? _mm512_srli_epi16(bytes, 4) : bytes;
  const __m512i nibbles = _mm512_and_si512(shifted, _mm512_set1_epi8(0x0f));
  const __m512i high = _mm512_shuffle_epi8(high_bytes, nibbles);
  const __m512i low = _mm512_shuffle_epi8(low_bytes, nibbles);
  first = _mm512_unpacklo_epi8(low, high);
  second = _mm512_unpackhi_epi8(low, high);
}

// What both forms of `V` share; they differ in what an element of x is.
struct Avx512Sums {
  using reg = __m512;
  static constexpr int64_t columns = 12;
  static constexpr int tiled_panels = 2;
  static constexpr int panels(int) { return 2; }

  static reg zero() { return _mm512_setzero_ps(); }
  static reg load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, reg a) { _mm512_storeu_ps(p, a); }
  static void keep(uint8_t* p, reg a) { _mm512_store_ps(p, a); }
  static reg add(reg a, reg b) { return _mm512_add_ps(a, b); }
  static reg mul_add(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }
  static reg broadcast(float a) { return _mm512_set1_ps(a); }
  static reg scales(const uint16_t* p) { return bf16_lanes(p); }
};

// 16 rows of one column in a register, an element of x is one FP32 number.
struct Avx512Singles : Avx512Sums {
  static reg dot(reg acc, reg w, const uint32_t* x) {
    return _mm512_fmadd_ps(w, _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*x))), acc);
  }
};

struct F32Single : F32Kind {
  static constexpr int steps = 1, registers = 1;
  using Decoded = F32Single;
  static void decode(const uint8_t* tile, int, __m512* w) { w[0] = _mm512_loadu_ps(tile); }
};

}  // namespace
