// Packed products on AVX-512 without BF16 dot products: every number is decoded to FP32.
#include "packed_avx512.h"
#include "rows_body.h"

namespace {

struct Bf16Singles : Bf16Kind {
  static constexpr int steps = 2, registers = 1;
  using Decoded = DecodedSingle;
  static void decode(const uint8_t* tile, int step, __m512* w) {
    w[0] = bf16_lanes(reinterpret_cast<const uint16_t*>(tile + 32 * step));
  }
};

// Sixteen codes, widened, become the exponent and fraction of FP16, which is exact but for the exponent's bias.
struct E4m3Singles : E4m3Kind {
  static constexpr int steps = 4, registers = 1;
  static constexpr float factor = 256.0f;
  using Decoded = DecodedSingle;
  static void decode(const uint8_t* tile, int step, __m512* w) {
    const __m256i codes = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(tile + 16 * step)));
    const __m256i half = _mm256_and_si256(_mm256_slli_epi16(codes, 7), _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
    w[0] = _mm512_cvtph_ps(half);
  }
};

struct Int4Singles : Int4Kind {
  static constexpr int steps = 8, registers = 1;
  using Decoded = DecodedSingle;
  static void decode(const uint8_t* tile, int step, __m512* w) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(tile + 16 * (step % 4)));
    const __m512i wide = _mm512_cvtepu8_epi32(bytes);
    const __m512i nibbles = _mm512_and_si512(step < 4 ? wide : _mm512_srli_epi32(wide, 4), _mm512_set1_epi32(15));
    w[0] = _mm512_cvtepi32_ps(_mm512_sub_epi32(nibbles, _mm512_set1_epi32(8)));
  }
};

}  // namespace

namespace kvern {
const PackedKernels kAvx512Packed{
    kRowKernels,
    {Order::kSingles, Order::kSingles, Order::kSingles, Order::kSingles, Order::kSingles},
    {Avx512Singles::columns, Avx512Singles::columns, Avx512Singles::columns, Avx512Singles::columns, Avx512Singles::columns},
    {multiply<Avx512Singles, F32Single>, multiply<Avx512Singles, Bf16Singles>, multiply<Avx512Singles, E4m3Singles>,
     multiply<Avx512Singles, Int4Singles>, multiply_turned<Avx512Singles, Int4Turned>}};
}
