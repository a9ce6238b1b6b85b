// The AVX-512 instruction set of kernels_body.h: BW, DQ, VL and VBMI (Ice Lake, Zen 4 and later; older AVX-512 CPUs take
// the AVX2 file). Included by each file that is compiled for AVX-512.
#pragma once

#include <immintrin.h>

#include "e4m3_table.h"
#include "kernels_body.h"

namespace {

// Byte unpacking works inside 128-bit lanes and the two halves of a 32-bit word leave for two registers. Where the codes
// have to be so that afterwards register v holds the numbers 16 v .. 16 v + 15 in their order.
struct CodeOrder {
  alignas(64) uint8_t from[64];

  constexpr CodeOrder() : from() {
    for (int lane = 0; lane < 4; ++lane) {
      for (int word = 0; word < 4; ++word) {
        for (int v = 0; v < 4; ++v) {
          from[16 * lane + 8 * (v / 2) + 2 * word + v % 2] = static_cast<uint8_t>(16 * v + 4 * lane + word);
        }
      }
    }
  }
};

constexpr CodeOrder kCodeOrder;

// even[0], odd[0], even[1], .. of 32 and 32 numbers of 16 bits: the first 32 of them, and the others.
inline void interleave(__m512i even, __m512i odd, void* first, void* second) {
  alignas(64) static constexpr uint16_t low[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                   8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i from = _mm512_load_si512(low);
  _mm512_storeu_si512(first, _mm512_permutex2var_epi16(even, from, odd));
  _mm512_storeu_si512(second, _mm512_permutex2var_epi16(even, _mm512_add_epi16(from, _mm512_set1_epi16(16)), odd));
}

struct Avx512 {
  static constexpr int width = 16;
  static constexpr int direct_rows = 4;
  static constexpr bool decodes_tiles = true;
  static constexpr int tile_rows = 4;
  static constexpr int tile_columns = 4;
  static constexpr int sums = 16;
  static constexpr int head_vecs = 2;

  using reg = __m512;

  static reg zero() { return _mm512_setzero_ps(); }
  static reg set1(float value) { return _mm512_set1_ps(value); }
  static reg load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, reg a) { _mm512_storeu_ps(p, a); }
  static reg add(reg a, reg b) { return _mm512_add_ps(a, b); }
  static reg sub(reg a, reg b) { return _mm512_sub_ps(a, b); }
  static reg max(reg a, reg b) { return _mm512_max_ps(a, b); }
  static reg mul(reg a, reg b) { return _mm512_mul_ps(a, b); }
  static reg fma(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }
  static reg divide(reg a, reg b) { return _mm512_div_ps(a, b); }
  static float sum(reg a) { return _mm512_reduce_add_ps(a); }
  static reg keep(reg limit, float at, reg a, reg b) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(limit, set1(at), _CMP_GT_OQ), b, a);
  }

  static reg exp2(reg a) {
    const reg low = max(set1(-200.0f), a);  // 2^-200 is 0; the order keeps a NaN
    const reg whole = _mm512_roundscale_ps(low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_scalef_ps(exp2_of_fraction<Avx512>(sub(low, whole)), whole);
  }

  // Not vcvtneps2bf16: it flushes subnormals.
  static void store_bf16(uint16_t* p, reg a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    const __m256i words = _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words);
  }

  static void decode(const float* p, reg* out) {
    for (int v = 0; v < kVecs; ++v) out[v] = load(p + v * width);
  }

  static void decode(const uint16_t* p, reg* out) {
    for (int v = 0; v < kVecs; ++v) {
      const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + v * width));
      out[v] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
    }
  }

  // 64 codes: two table look-ups (a byte of the BF16 each), the sign, two unpacks into BF16 pairs, a shift and a mask.
  static void decode(const uint8_t* p, reg* out) {
    const __m512i codes = _mm512_permutexvar_epi8(_mm512_load_si512(kCodeOrder.from), _mm512_loadu_si512(p));
    const __m512i high = look_up(kE4m3Bytes.high, codes);
    const __m512i low = look_up(kE4m3Bytes.low, codes);
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    const __m512i with_sign = _mm512_ternarylogic_epi32(high, codes, sign, 0xf8);  // high | (codes & sign)
    const __m512i first = _mm512_unpacklo_epi8(low, with_sign);
    const __m512i second = _mm512_unpackhi_epi8(low, with_sign);
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    out[0] = _mm512_castsi512_ps(_mm512_slli_epi32(first, 16));
    out[1] = _mm512_castsi512_ps(_mm512_and_si512(first, upper));
    out[2] = _mm512_castsi512_ps(_mm512_slli_epi32(second, 16));
    out[3] = _mm512_castsi512_ps(_mm512_and_si512(second, upper));
  }

  static __m512i look_up(const uint8_t* table, __m512i codes) {  // bit 7 of the index is ignored
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), codes, _mm512_load_si512(table + 64));
  }

  struct Watch {
    static constexpr float factor = 1.0f;
  };
  static void decode_watched(const uint8_t* p, reg* out, Watch&) { decode(p, out); }
  static bool saw_nan(const Watch&) { return false; }
};

}  // namespace
