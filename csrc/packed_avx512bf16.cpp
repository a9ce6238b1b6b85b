// Packed products with BF16 dot products (AVX-512 BF16, VBMI): a register holds two columns of 16 rows, an element of x
// two numbers. vdpbf16ps takes subnormal inputs for zeros, and E4M3, 4-bit and their products have none in BF16; a BF16
// weight or activation under 1e-38 counts as zero.
#include <immintrin.h>

#include "packed_avx512.h"
#include "rows_body.h"

namespace {

struct Pairs : Avx512Sums {
  static reg dot(reg acc, reg w, const uint32_t* x) {
    const __m512i pair = _mm512_set1_epi32(static_cast<int>(*x));
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(pair));
  }
};

struct Bf16Pairs : Bf16Kind {
  static constexpr int steps = 1, registers = 1;
  using Decoded = Bf16Pairs;
  static void decode(const uint8_t* tile, int, __m512* w) { w[0] = _mm512_loadu_ps(tile); }
};

struct DecodedPairs : Bf16Pairs {
  static constexpr bool is_decoded = true;
};

struct E4m3Pairs : E4m3Kind {
  static constexpr int steps = 1, registers = 2;
  using Decoded = DecodedPairs;
  static void decode(const uint8_t* tile, int, __m512* w) {
    __m512i first, second;
    e4m3_to_bf16(_mm512_loadu_si512(tile), first, second);
    w[0] = _mm512_castsi512_ps(first);
    w[1] = _mm512_castsi512_ps(second);
  }
};

struct Int4Pairs : Int4Kind {
  static constexpr int steps = 1, registers = 4;
  using Decoded = DecodedPairs;
  static void decode(const uint8_t* tile, int, __m512* w) {
    const __m512i words = _mm512_loadu_si512(tile);
    w[0] = _mm512_castsi512_ps(int4_pairs<0>(words));
    w[1] = _mm512_castsi512_ps(int4_pairs<1>(words));
    w[2] = _mm512_castsi512_ps(int4_pairs<2>(words));
    w[3] = _mm512_castsi512_ps(int4_pairs<3>(words));
  }
};

}  // namespace

namespace kvern {
const PackedKernels kAvx512Bf16Packed{
    kRowKernels,
    {Order::kSingles, Order::kPairs, Order::kPairs, Order::kPairs, Order::kSingles},
    {Avx512Singles::columns, Pairs::columns, Pairs::columns, Pairs::columns, Avx512Singles::columns},
    {multiply<Avx512Singles, F32Single>, multiply<Pairs, Bf16Pairs>, multiply<Pairs, E4m3Pairs>, multiply<Pairs, Int4Pairs>,
     multiply_turned<Avx512Singles, Int4Turned>}};
}
