// Packed products on AVX2 with FMA and F16C: every number is decoded to FP32, a register is two halves.
#include <immintrin.h>

#include "packed_body.h"
#include "rows_body.h"

namespace {

struct Halves {
  __m256 low, high;
};

struct Avx2Singles {
  using reg = Halves;
  static constexpr int64_t columns = 6;
  static constexpr int tiled_panels = 1;
  static constexpr int panels(int m) { return m <= 3 ? 2 : 1; }

  static reg zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static reg load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, reg a) {
    _mm256_storeu_ps(p, a.low);
    _mm256_storeu_ps(p + 8, a.high);
  }
  static void keep(uint8_t* p, reg a) { store(reinterpret_cast<float*>(p), a); }
  static reg add(reg a, reg b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
  static reg mul_add(reg a, reg b, reg c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }
  static reg broadcast(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
  static reg scales(const uint16_t* p) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {bf16(_mm256_castsi256_si128(words)), bf16(_mm256_extracti128_si256(words, 1))};
  }
  static __m256 bf16(__m128i words) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
  }
  static reg dot(reg acc, reg w, const uint32_t* x) {
    const __m256 number = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(*x)));
    return {_mm256_fmadd_ps(w.low, number, acc.low), _mm256_fmadd_ps(w.high, number, acc.high)};
  }
};

struct F32Single : F32Kind {
  static constexpr int steps = 1, registers = 1;
  using Decoded = F32Single;
  static void decode(const uint8_t* tile, int, Halves* w) { w[0] = Avx2Singles::load(reinterpret_cast<const float*>(tile)); }
};

struct DecodedSingle : F32Single {
  static constexpr bool is_decoded = true;
};

struct Bf16Singles : Bf16Kind {
  static constexpr int steps = 2, registers = 1;
  using Decoded = DecodedSingle;
  static void decode(const uint8_t* tile, int step, Halves* w) {
    w[0] = Avx2Singles::scales(reinterpret_cast<const uint16_t*>(tile + 32 * step));
  }
};

// The codes, widened, become the exponent and fraction of FP16, which is exact but for the exponent's bias.
struct E4m3Singles : E4m3Kind {
  static constexpr int steps = 4, registers = 1;
  static constexpr float factor = 256.0f;
  using Decoded = DecodedSingle;
  static void decode(const uint8_t* tile, int step, Halves* w) {
    const __m256i codes = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(tile + 16 * step)));
    const __m256i half = _mm256_and_si256(_mm256_slli_epi16(codes, 7), _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
    alignas(32) __m128i parts[2];
    _mm256_store_si256(reinterpret_cast<__m256i*>(parts), half);
    __asm__("" : "+m"(parts));  // from memory they are converted without the port that shuffles, which was the limit
    w[0] = {_mm256_cvtph_ps(parts[0]), _mm256_cvtph_ps(parts[1])};
  }
};

struct Int4Singles : Int4Kind {
  static constexpr int steps = 8, registers = 1;
  using Decoded = DecodedSingle;
  static void decode(const uint8_t* tile, int step, Halves* w) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(tile + 16 * (step % 4)));
    const __m128i shifted = step < 4 ? bytes : _mm_srli_epi16(bytes, 4);
    const __m128i values = _mm_sub_epi8(_mm_and_si128(shifted, _mm_set1_epi8(15)), _mm_set1_epi8(8));
    w[0] = {numbers(values), numbers(_mm_srli_si128(values, 8))};
  }
  static __m256 numbers(__m128i values) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(values)); }
};

struct Int4Turned : Int4TurnedKind {
  static constexpr int steps = 8, registers = 1;
  using Decoded = DecodedSingle;
  static void decode(const uint8_t* tile, int step, Halves* w) { w[0] = {numbers(tile, step), numbers(tile + 32, step)}; }
  static __m256 numbers(const uint8_t* words, int step) {
    const __m256i shifted = _mm256_srl_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words)), _mm_cvtsi32_si128(4 * step));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_and_si256(shifted, _mm256_set1_epi32(15)), _mm256_set1_epi32(8)));
  }
};

}  // namespace

namespace kvern {
const PackedKernels kAvx2Packed{
    kRowKernels,
    {Order::kSingles, Order::kSingles, Order::kSingles, Order::kSingles, Order::kSingles},
    {Avx2Singles::columns, Avx2Singles::columns, Avx2Singles::columns, Avx2Singles::columns, Avx2Singles::columns},
    {multiply<Avx2Singles, F32Single>, multiply<Avx2Singles, Bf16Singles>, multiply<Avx2Singles, E4m3Singles>,
     multiply<Avx2Singles, Int4Singles>, multiply_turned<Avx2Singles, Int4Turned>}};
}
