// What the two AVX-512 files of packed products share: decoding, and the kernels that multiply in FP32 in both.
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

// 32 of the 128 values - 8 in 64 bytes: the nibbles `i` of each 16 bits, i from 0 to 3. The table has its 16 numbers twice, so
// that the fifth bit of an index does not count.
template <int i>
inline __m512i int4_pairs(__m512i words) {
  const __m512i numbers = _mm512_broadcast_i64x4(_mm256_setr_epi16(
      static_cast<int16_t>(0xc100), static_cast<int16_t>(0xc0e0), static_cast<int16_t>(0xc0c0),
      static_cast<int16_t>(0xc0a0), static_cast<int16_t>(0xc080), static_cast<int16_t>(0xc040),
      static_cast<int16_t>(0xc000), static_cast<int16_t>(0xbf80), 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0));
  return _mm512_permutexvar_epi16(i ? _mm512_srli_epi16(words, 4 * i) : words, numbers);
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

struct DecodedSingle : F32Single {
  static constexpr bool is_decoded = true;
};

// A look-up takes the lowest four bits of each word.
struct Int4Turned : Int4TurnedKind {
  static constexpr int steps = 8, registers = 1;
  using Decoded = DecodedSingle;
  static void decode(const uint8_t* tile, int step, __m512* w) {
    const __m512 numbers = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i words = _mm512_srl_epi32(_mm512_loadu_si512(tile), _mm_cvtsi32_si128(4 * step));
    w[0] = _mm512_permutexvar_ps(words, numbers);
  }
};

}  // namespace
