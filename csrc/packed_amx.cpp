// Packed products on AMX tiles: BF16 and FP8 weights, sixteen rows of W by sixteen columns of x a tile, summed in FP32.
//
// Sixteen decoded BF16 tiles in a row are a tile operand as they lie: pairs of columns by sixteen rows of W. tdpbf16ps sums
// the even and the odd products of 32 columns apart, each in order, and adds even + odd to the sum. A row of y comes from
// its own row of x by that order, whether one row is multiplied or hundreds; a single row is multiplied by it in registers.
// What it gives up: subnormal BF16 numbers (under 1e-38) count as zeros.
#include <immintrin.h>

#include "amx.h"
#include "packed_amx_few.h"
#include "packed_amx_registers.h"
#include "packed_avx512.h"
#include "rows_body.h"

namespace {

using kvern::kMostSums;

constexpr int64_t kRows = 16;                     // columns of x in a tile
constexpr int64_t kAheadColumns = 256;            // that memory is asked for before their turn

struct Bf16Tiles : Bf16Kind {
  using Loaded = __m512i;
  static __m512i load(const uint8_t* tile) { return _mm512_loadu_si512(tile); }
  static __m512 first(__m512i pairs, int) { return first_of(pairs); }
  static __m512 second(__m512i pairs, int) { return second_of(pairs); }
  static int64_t group(const kvern_packed& w) { return kvern::padded_k(w); }
  static __m512 scale(const kvern_packed&, int64_t, int64_t) { return _mm512_set1_ps(1.0f); }
};

// E4M3 to BF16 by two look-ups of 64 bytes instead of 128, which the port of the tile unit has to share. An index is a code
// without bit 6, and with bit 5 set where bit 6 is: all that the low byte depends on, since the numbers that are not
// normal have neither. The high byte lacks 4 for bit 6 and 2 for bit 5. NaNs are never packed as E4M3 and come out as 480.
struct Halves {
  alignas(64) uint8_t high[64];
  alignas(64) uint8_t low[64];

  constexpr Halves() : high(), low() {
    for (int at = 0; at < 64; ++at) {
      high[at] = static_cast<uint8_t>(kE4m3Bytes.high[at] - (at & 0x20 ? 2 : 0));
      low[at] = kE4m3Bytes.low[at];
    }
  }
};

constexpr Halves kHalves;

struct E4m3Tiles : E4m3Kind {
  static constexpr bool is_decoded = true;

  struct Loaded {
    __m512i of[2];
  };

  static Loaded load(const uint8_t* tile) {
    const __m512i codes = _mm512_loadu_si512(tile), shifted = _mm512_srli_epi16(codes, 1);
    const __m512i at = _mm512_ternarylogic_epi32(codes, shifted, _mm512_set1_epi8(0x20), 0xf8);  // codes | (shifted & 0x20)
    const __m512i low = _mm512_permutexvar_epi8(at, _mm512_load_si512(kHalves.low));
    // A matrix of bits: bit 7 stays, bits 6 and 5 become bits 2 and 1.
    const __m512i rest = _mm512_gf2p8affine_epi64_epi8(codes, _mm512_set1_epi64(0x0020400000000080), 0);
    const __m512i high = _mm512_add_epi8(_mm512_permutexvar_epi8(at, _mm512_load_si512(kHalves.high)), rest);
    return {{_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)}};
  }

  static __m512 first(const Loaded& pairs, int i) { return first_of(pairs.of[i]); }
  static __m512 second(const Loaded& pairs, int i) { return second_of(pairs.of[i]); }
  static int64_t group(const kvern_packed&) { return kDepth; }
  static __m512 scale(const kvern_packed& w, int64_t panel, int64_t group) {
    const int64_t groups = (kvern::padded_k(w) + kDepth - 1) / kDepth;
    return _mm512_set1_ps(static_cast<const float*>(w.scales)[panel * groups + group]);
  }

  static void decode_tile(const uint8_t* tile, uint8_t* to) {
    const Loaded pairs = load(tile);
    _mm512_store_si512(to, pairs.of[0]);
    _mm512_store_si512(to + kTileBytes, pairs.of[1]);
  }
};

template <class K>
struct Amx {
  const Product& task;
  float* totals;  // [columns, P, 16]
  alignas(64) uint8_t decoded[kMostSums][K::is_decoded ? kDepth / 2 * kTileBytes : kTileBytes];
  alignas(64) float sums[2][kRows * kMostSums * kLanes];

  Amx(const Product& the_task, float* memory) : task(the_task), totals(memory) {}  // leaves the arrays as they are

  // Of FP8 weights: sums that still wait for their scales. They are scaled one group later, when the tiles are done.
  struct Waiting {
    const float* sums;
    float* total;
    __m512 scales[kMostSums];
  };

  // Tile `tile` of a panel.
  static const uint8_t* stored(const kvern_packed& w, int64_t panel, int64_t tile, int64_t& stride) {
    const auto place = kvern::place_of(panel, kvern::panels(w), kvern::padded_k(w) / K::depth * kTileBytes);
    stride = place.stride;
    return static_cast<const uint8_t*>(w.tiles) + place.offset + tile * place.stride;
  }

  // In the order of memory, so that it comes as one stream for each pair of panels.
  template <int P>
  void decode(int64_t first, int64_t begin, int64_t count) {
    constexpr int kTogether = P > 1 ? 2 : 1;
    for (int p = 0; p < P; p += kTogether) {
      int64_t stride;
      const uint8_t* tile = stored(task.w, first + p, begin / K::depth, stride);
      for (int64_t t = 0; t < count / K::depth; ++t, tile += stride) {
        for (int beside = 0; beside < kTogether; ++beside) {
          K::decode_tile(tile + beside * kTileBytes, decoded[p + beside] + t * 2 * kTileBytes);
          __builtin_prefetch(tile + beside * kTileBytes + kAheadColumns / K::depth * stride, 0, 2);
        }
      }
    }
  }

  template <int P>
  void scale(const Waiting& waiting) const {
    if (!waiting.total) return;
    for (int64_t at = 0; at < task.x.group * P; ++at) {
      float* total = waiting.total + at * kLanes;
      const __m512 sum = _mm512_load_ps(waiting.sums + at * kLanes);
      _mm512_store_ps(total, _mm512_fmadd_ps(sum, waiting.scales[at % P], _mm512_load_ps(total)));
    }
  }

  // Columns [begin, begin + count) of W for one group of x; `w` are the tiles of its panels.
  template <int P>
  void multiply(int64_t begin, int64_t count, int64_t column, const uint8_t* const (&w)[kMostSums], int64_t stride) {
    const uint32_t* elements = task.x.data + column * task.x.elements + begin / 2 * task.x.group;
    for (int64_t done = 0; done < count; done += kSpan, elements += kSpan / 2 * task.x.group) {
      const int64_t at = done / 2 * stride;
      const void* tiles[kMostSums] = {w[0] + at, w[1] + at, w[2] + at, w[3] + at};
      kvern::add_products<P>(elements, kTileBytes, tiles, stride);
    }
  }

  template <int P>
  void panels(int64_t first) {
    constexpr int64_t kRowBytes = P * kLanes * sizeof(float);
    const kvern_packed& w = task.w;
    const int64_t padded = kvern::padded_k(w);
    std::memset(totals, 0, static_cast<size_t>(kvern::round_up(task.x.count, task.x.group) * kRowBytes));
    Waiting waiting{};
    int turn = 0;
    for (int64_t begin = 0; begin < padded; begin += kDepth) {
      const int64_t count = least(kDepth, padded - begin);
      const uint8_t* tiles[kMostSums];
      __m512 scales[kMostSums] = {};
      int64_t stride = kTileBytes;
      if constexpr (K::is_decoded) decode<P>(first, begin, count);
      for (int p = 0; p < P; ++p) {
        tiles[p] = K::is_decoded ? decoded[p] : stored(w, first + p, begin / K::depth, stride);
        scales[p] = K::scale(w, first + p, begin / kDepth);
      }
      for (int p = P; p < kMostSums; ++p) tiles[p] = tiles[0];  // named, never read
      kvern::finish_stores();
      for (int64_t column = 0; column < task.x.count; column += task.x.group) {
        float* total = totals + column * P * kLanes;
        if constexpr (!K::is_scaled) {
          kvern::load_sums<P>(total, kTileBytes, kRowBytes);
          multiply<P>(begin, count, column, tiles, stride);
          kvern::store_sums<P>(total, kTileBytes, kRowBytes);
          continue;
        }
        kvern::clear_sums<P>();
        multiply<P>(begin, count, column, tiles, stride);
        kvern::store_sums<P>(sums[turn], kTileBytes, kRowBytes);
        scale<P>(waiting);
        waiting = {sums[turn], total, {scales[0], scales[1], scales[2], scales[3]}};
        turn = 1 - turn;
      }
    }
    scale<P>(waiting);
    deliver<Avx512Sums>(task, first, P, totals, P, 0, task.x.count);
  }
};

inline __m512 load_some(const float* x, int64_t count) {
  return _mm512_maskz_loadu_ps(count >= kLanes ? 0xffff : count > 0 ? (1u << count) - 1 : 0, x);
}

inline __m512i rounded(__m512 low, __m512 high) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)); }

inline __m512 half(__m512i pairs, int which) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(which ? _mm512_extracti64x4_epi64(pairs, 1) : _mm512_castsi512_si256(pairs)), 16));
}

// Where there are two copies, the second is what rounding left of a number.
void arrange_tiles(const float* x, int64_t size, int64_t elements, int copies, int64_t columns, uint32_t* out) {
  for (int64_t at = 0; at < 2 * elements; at += kSpan, out += columns * kvern::kTileElements) {
    const __m512 low = load_some(x + at, size - at), high = load_some(x + at + kLanes, size - at - kLanes);
    const __m512i first = rounded(low, high);
    _mm512_storeu_si512(out, first);
    if (copies == 1) continue;
    const __m512i rest = rounded(_mm512_sub_ps(low, half(first, 0)), _mm512_sub_ps(high, half(first, 1)));
    _mm512_storeu_si512(out + kvern::kTileElements, rest);
  }
}

template <class K>
void multiply_tiles(const Product& task, int64_t first, int64_t last) {
  if (task.x.count == 1) return InRegisters<K, 1>(task).run(first, last);  // two or three: tiles are as fast or faster
  if (task.x.count <= task.x.group) {
    const kvern::TileRows rows(static_cast<int>(task.x.group));
    return FewColumns<K>(task).run(first, last);
  }
  float* totals = scratch(kvern::round_up(task.x.count, task.x.group) * kMostSums * kLanes);
  const kvern::TileRows rows(static_cast<int>(task.x.group));
  Amx<K> amx(task, totals);
  for (; first + 4 <= last; first += 4) amx.template panels<4>(first);
  for (; first + 2 <= last; first += 2) amx.template panels<2>(first);
  if (first < last) amx.template panels<1>(first);
}

}  // namespace

namespace kvern {
const TileKernels kAmxPacked{kRows, arrange_tiles, multiply_tiles<Bf16Tiles>, multiply_tiles<E4m3Tiles>};
}
