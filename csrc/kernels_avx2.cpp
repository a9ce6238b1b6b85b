// AVX2 with FMA and F16C.
#include <immintrin.h>

#include "kernels_body.h"

namespace {

struct Avx2 {
  static constexpr int width = 8;
  static constexpr int direct_rows = 2;
  static constexpr bool decodes_tiles = true;
  static constexpr int tile_rows = 4;
  static constexpr int tile_columns = 2;
  static constexpr int sums = 8;
  static constexpr int head_vecs = 2;

  using reg = __m256;

  static reg zero() { return _mm256_setzero_ps(); }
  static reg set1(float value) { return _mm256_set1_ps(value); }
  static reg load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, reg a) { _mm256_storeu_ps(p, a); }
  static reg add(reg a, reg b) { return _mm256_add_ps(a, b); }
  static reg sub(reg a, reg b) { return _mm256_sub_ps(a, b); }
  static reg max(reg a, reg b) { return _mm256_max_ps(a, b); }
  static reg mul(reg a, reg b) { return _mm256_mul_ps(a, b); }
  static reg fma(reg a, reg b, reg c) { return _mm256_fmadd_ps(a, b, c); }

  static reg divide(reg a, reg b) { return _mm256_div_ps(a, b); }
  static reg keep(reg limit, float at, reg a, reg b) {
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(limit, set1(at), _CMP_GT_OQ));
  }

  static float sum(reg a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }

  static reg exp2(reg a) {
    const reg floor = set1(-126.0f);  // below it the result is 0; the order keeps a NaN
    const reg low = max(floor, a);
    const reg whole = _mm256_round_ps(low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    const reg power = _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
    const reg is_kept = _mm256_cmp_ps(a, floor, _CMP_NLT_UQ);
    return _mm256_and_ps(is_kept, mul(exp2_of_fraction<Avx2>(sub(low, whole)), power));
  }

  static void store_bf16(uint16_t* p, reg a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }

  static void decode(const float* p, reg* out) {
    for (int v = 0; v < kVecs; ++v) out[v] = load(p + v * width);
  }

  static void decode(const uint16_t* p, reg* out) {
    for (int v = 0; v < kVecs; ++v) {
      const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + v * width));
      out[v] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
    }
  }

  // E4M3 shifted into an FP16 is the same number times 2^-8, subnormals included; the conversion to FP32 is exact, and
  // the factor 2^8 exact again. Only the NaN code needs a mask: FP16 has finite numbers there.
  static void decode(const uint8_t* p, reg* out) {
    const __m256i magnitude = _mm256_set1_epi16(0x3f80);
    const __m256 back = _mm256_set1_ps(256.0f);
    for (int v = 0; v < kVecs; v += 2) {
      const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + v * width));
      const __m256i shifted = _mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7);  // the sign is in bits 14 and 15
      const __m256i nan = _mm256_cmpeq_epi16(_mm256_and_si256(shifted, magnitude), magnitude);
      const __m256i half = _mm256_and_si256(shifted, _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
      const __m256i whole = _mm256_or_si256(half, _mm256_and_si256(nan, _mm256_set1_epi16(0x7e00)));
      out[v] = mul(_mm256_cvtph_ps(_mm256_castsi256_si128(whole)), back);
      out[v + 1] = mul(_mm256_cvtph_ps(_mm256_extracti128_si256(whole, 1)), back);
    }
  }

  // Without the factor and the NaNs: a third fewer instructions. The watch keeps the largest magnitude of each lane.
  struct Watch {
    static constexpr float factor = 256.0f;
    __m256i largest = _mm256_setzero_si256();
  };

  static void decode_watched(const uint8_t* p, reg* out, Watch& watch) {
    for (int v = 0; v < kVecs; v += 2) {
      const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + v * width));
      const __m256i shifted = _mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7);
      const __m256i half = _mm256_and_si256(shifted, _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
      out[v] = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
      out[v + 1] = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
    }
    const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    watch.largest = _mm256_max_epu8(watch.largest, _mm256_and_si256(all, _mm256_set1_epi8(0x7f)));
  }

  static bool saw_nan(const Watch& watch) {
    return _mm256_movemask_epi8(_mm256_cmpeq_epi8(watch.largest, _mm256_set1_epi8(0x7f))) != 0;
  }
};

}  // namespace

namespace kvern {
const Kernels kAvx2Kernels = kernels<Avx2>("avx2");
}
