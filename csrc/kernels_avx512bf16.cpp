// Attention with BF16 dot products (vdpbf16ps: two products a lane and instruction, summed in FP32), for BF16 queries
// over BF16 rows. As attention_body.h, with three differences: kDotRows rows a tile, keys stay BF16 and are read in pairs
// of columns, and values lie in pairs of rows:
//     score[c] += (q[2i], q[2i + 1]) . (k_c[2i], k_c[2i + 1])       sum[r] += (w_c, w_c+1) . (v_c[r], v_c+1[r])
// Weights are rounded to BF16, and the sum of weights is that of the rounded ones, so that they still sum to 1. What it
// gives up: the instruction takes subnormals (under 1.2e-38) as zeros, inputs and results.
#include "kernels_avx512.h"

namespace {

using kvern::kDotRows;

constexpr int64_t kLanes = 16;
constexpr int64_t kPairs = kDotRows / 2;

inline __m512bh pairs(__m512i bits) { return reinterpret_cast<__m512bh>(bits); }
inline __m512i load_bits(const void* p) { return _mm512_loadu_si512(p); }
inline __m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, pairs(a), pairs(b)); }

// `count` BF16 numbers, at most 32, and zeros.
inline __m512i load_some(const uint16_t* p, int64_t count) {
  if (count >= 32) return load_bits(p);
  return _mm512_maskz_loadu_epi16(count > 0 ? (1u << count) - 1 : 0, p);
}

// Decoded records are rounded with the instruction that the dot products come with: it flushes what those flush.
struct Avx512Dots : Avx512 {
  static void store_bf16(uint16_t* p, reg a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a)));
  }
};

// Keys of a tile: pairs of columns, [pair / 16][row][pair % 16]. Values: [r / 16][pair of rows][r % 16], even row first.
struct Tile {
  uint32_t* keys;
  uint32_t* values;
  float* scores;      // [row][G][lane]
  uint32_t* weights;  // [pair of rows][G][lane]
  uint16_t* room;     // for two keys
};

inline uint32_t* key_at(const Tile& tile, int64_t pair, int64_t row) {
  return tile.keys + (pair / 16 * kDotRows + row) * 16 + pair % 16;
}

inline uint32_t* value_at(const Tile& tile, int64_t r, int64_t pair) {
  return tile.values + (r / 16 * kPairs + pair) * 16 + r % 16;
}

inline void store_values(const Tile& tile, int64_t r, int64_t pair, __m512i even, __m512i odd) {
  interleave(even, odd, value_at(tile, r, pair), value_at(tile, r + 16, pair));
}

// The pair of rows from `row` on, whose keys these are; the odd one is NULL, and then zeros, behind the last row.
void gather_pair(const Attend& task, const Tile& tile, int64_t row, int64_t c, const uint16_t* even_key,
                 const uint16_t* odd_key) {
  const bool shared = are_shared(task.context);
  const int64_t rank = task.rank;
  for (int64_t d = 0; d < task.dim; d += 32) {
    const __m512i a = load_some(even_key + d, task.dim - d);
    const __m512i b = odd_key ? load_some(odd_key + d, task.dim - d) : _mm512_setzero_si512();
    _mm512_storeu_si512(key_at(tile, d / 2, c), a);
    _mm512_storeu_si512(key_at(tile, d / 2, c + 1), b);
    if (shared && d < rank) store_values(tile, d, c / 2, a, b);
  }
  if (shared) return;
  const uint16_t* even = row_at<uint16_t>(task.context, row);
  const uint16_t* odd = odd_key ? row_at<uint16_t>(task.context, row + 1) : nullptr;
  for (int64_t r = 0; r < rank; r += 32) {
    const __m512i a = load_some(even + task.context.value_at + r, rank - r);
    const __m512i b = odd ? load_some(odd + task.context.value_at + r, rank - r) : _mm512_setzero_si512();
    store_values(tile, r, c / 2, a, b);
  }
}

void gather(const Attend& task, const Tile& tile, int64_t first, int64_t count) {
  const kvern::Context& context = task.context;
  for (int64_t c = 0; c < count; c += 2) {
    const bool has_odd = c + 1 < count;
    const int64_t row = first + c;
    fetch_row(context, smaller(row + kDotRows, task.end - 1), task.dim, task.rank);
    fetch_row(context, smaller(row + 1 + kDotRows, task.end - 1), task.dim, task.rank);
    const uint16_t* even = key_of<Avx512Dots>(context, row, tile.room);
    const uint16_t* odd = has_odd ? key_of<Avx512Dots>(context, row + 1, tile.room + key_room(task.dim)) : nullptr;
    gather_pair(task, tile, row, c, even, odd);
  }
}

// Scores of C rows from c on; in units of log2.
template <int G, int C>
inline void score_dots(const Attend& task, const uint32_t* q, const Tile& tile, int64_t c) {
  __m512 sums[G][C];
  clear<Avx512>(sums);
  const int64_t columns = (task.dim + 1) / 2;
  for (int64_t at = 0; at < columns; at += 16) {
    const uint32_t* rows = key_at(tile, at, c);
    const int64_t count = smaller(16, columns - at);
    for (int64_t i = 0; i < count; ++i) {
      __m512i lanes[G];
      for (int g = 0; g < G; ++g) lanes[g] = load_bits(q + (g * columns + at + i) * kLanes);
      for (int j = 0; j < C; ++j) {
        const __m512i numbers = _mm512_set1_epi32(static_cast<int>(rows[j * 16 + i]));
        for (int g = 0; g < G; ++g) sums[g][j] = dot(sums[g][j], lanes[g], numbers);
      }
    }
  }
  const __m512 scale = _mm512_set1_ps(task.scale);
  for (int j = 0; j < C; ++j) {
    for (int g = 0; g < G; ++g) _mm512_storeu_ps(tile.scores + ((c + j) * G + g) * kLanes, sums[g][j] * scale);
  }
}

// FP32 to BF16, nearest even, in place (the low half of a lane becomes zeros); NaN stays. Weights are 0 or normal.
inline __m512i rounded(__m512 weight) {
  const __m512i bits = reinterpret_cast<__m512i>(weight);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(weight, weight, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_and_si512(kept, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
}

// As weigh in attention_body.h; `count` rounded up to pairs, the scores behind the last row never count.
template <int G, bool kRagged>
inline __m512 weigh_dots(const Tile& tile, int g, int64_t count, const float* limits, float* top, float* total) {
  const __m512 old = _mm512_loadu_ps(top);
  const __m512 limit = _mm512_loadu_ps(limits);
  const float* scores = tile.scores + g * kLanes;
  __m512 now = old;
  for (int64_t c = 0; c < count; ++c) {
    const __m512 larger = Avx512::max(_mm512_loadu_ps(scores + c * G * kLanes), now);
    now = kRagged ? Avx512::keep(limit, static_cast<float>(c), larger, now) : larger;
  }
  const auto weight_of = [&](int64_t c) {
    if (c >= count) return _mm512_setzero_si512();
    const __m512 weight = Avx512::exp2(_mm512_loadu_ps(scores + c * G * kLanes) - now);
    return rounded(kRagged ? Avx512::keep(limit, static_cast<float>(c), weight, _mm512_setzero_ps()) : weight);
  };
  __m512 sum = _mm512_setzero_ps();
  for (int64_t c = 0; c < count; c += 2) {
    const __m512i even = weight_of(c), odd = weight_of(c + 1);
    sum = sum + reinterpret_cast<__m512>(even);
    sum = sum + reinterpret_cast<__m512>(odd);
    _mm512_storeu_si512(tile.weights + (c / 2 * G + g) * kLanes, _mm512_or_si512(_mm512_srli_epi32(even, 16), odd));
  }
  const __m512 shrink = Avx512::exp2(old - now);
  _mm512_storeu_ps(top, now);
  _mm512_storeu_ps(total, _mm512_fmadd_ps(_mm512_loadu_ps(total), shrink, sum));
  return shrink;
}

// sums[g][r .. r + B] += the pairs of rows; where a lane sees the even row of a pair only, the odd one is taken as zeros,
// as behind the last row.
template <int G, int B, bool kRagged>
inline void add_dots(const Tile& tile, int64_t count, const float* limits, int64_t r, const __m512 (&shrink)[G],
                     float* const (&sums)[G]) {
  const uint32_t* column = value_at(tile, r, 0);
  __m512 acc[G][B];
  for (int g = 0; g < G; ++g) {
    for (int b = 0; b < B; ++b) acc[g][b] = _mm512_loadu_ps(sums[g] + (r + b) * kLanes) * shrink[g];
  }
  for (int64_t pair = 0; 2 * pair < count; ++pair) {
    __m512i weight[G];
    for (int g = 0; g < G; ++g) weight[g] = load_bits(tile.weights + (pair * G + g) * kLanes);
    for (int b = 0; b < B; ++b) {
      const uint32_t number = column[pair * 16 + b];
      const __m512i both = _mm512_set1_epi32(static_cast<int>(number));
      for (int g = 0; g < G; ++g) {
        if constexpr (kRagged) {
          const __m512 limit = _mm512_loadu_ps(limits + g * kLanes);
          const __mmask16 sees_even = _mm512_cmp_ps_mask(limit, _mm512_set1_ps(2.0f * pair), _CMP_GT_OQ);
          const __mmask16 sees_odd = _mm512_cmp_ps_mask(limit, _mm512_set1_ps(2.0f * pair + 1.0f), _CMP_GT_OQ);
          const __m512i mine = _mm512_mask_blend_epi32(sees_odd, _mm512_set1_epi32(number & 0xffff), both);
          // not _mm512_mask_dpbf16_ps: GCC 12 keeps 8 of the 16 bits of its mask where registers are short
          acc[g][b] = _mm512_mask_mov_ps(acc[g][b], sees_even, dot(acc[g][b], weight[g], mine));
        } else {
          acc[g][b] = dot(acc[g][b], weight[g], both);
        }
      }
    }
  }
  for (int g = 0; g < G; ++g) {
    for (int b = 0; b < B; ++b) _mm512_storeu_ps(sums[g] + (r + b) * kLanes, acc[g][b]);
  }
}

template <int G, bool kRagged>
void attend_dot_tile(const Attend& task, int64_t vec, const Tile& tile, int64_t count, const float* limits) {
  constexpr int C = 16 / G;
  const int64_t columns = (task.dim + 1) / 2;
  const uint32_t* q = static_cast<const uint32_t*>(task.q) + vec * columns * kLanes;
  for (int64_t c = 0; c < count; c += C) score_dots<G, C>(task, q, tile, c);
  float* sums[G];
  __m512 shrink[G];
  for (int g = 0; g < G; ++g) {
    sums[g] = task.partial + (vec + g) * (task.rank + 2) * kLanes;
    float* top = sums[g] + task.rank * kLanes;
    shrink[g] = weigh_dots<G, kRagged>(tile, g, count, limits + g * kLanes, top, top + kLanes);
  }
  int64_t r = 0;
  for (; r + C <= task.rank; r += C) add_dots<G, C, kRagged>(tile, count, limits, r, shrink, sums);
  for (; r < task.rank; ++r) add_dots<G, 1, kRagged>(tile, count, limits, r, shrink, sums);
}

template <int G>
void attend_dot_lanes(const Attend& task, int64_t vec, const Tile& tile, int64_t first, int64_t count) {
  const int64_t* seen = task.seen + vec * kLanes;
  const Sight sight = sight_of(seen, G * kLanes, first, count);
  if (sight.count == 0) return;
  float limits[G * kLanes] = {};
  // The zeros of an odd row stand behind the tile's last row only.
  if (sight.is_ragged || (sight.count % 2 == 1 && sight.count < count)) {
    limits_of(seen, G * kLanes, first, sight.count, limits);
    attend_dot_tile<G, true>(task, vec, tile, sight.count, limits);
  } else {
    attend_dot_tile<G, false>(task, vec, tile, sight.count, limits);
  }
}

Tile tile_in(const Attend& task) {
  Tile tile;
  tile.keys = reinterpret_cast<uint32_t*>(task.scratch);
  tile.values = tile.keys + padded(task.dim) * kPairs;
  tile.scores = reinterpret_cast<float*>(tile.values + padded(task.rank) * kPairs);
  tile.weights = reinterpret_cast<uint32_t*>(tile.scores + kDotRows * 2 * kLanes);
  tile.room = reinterpret_cast<uint16_t*>(tile.weights + kPairs * 2 * kLanes);
  return tile;
}

}  // namespace

namespace kvern {

void attend_dots_avx512bf16(const Attend& task) {
  const Tile tile = tile_in(task);
  for (int64_t vec = 0; vec < task.vecs; ++vec) {
    float* sums = task.partial + vec * (task.rank + 2) * kLanes;
    std::memset(sums, 0, static_cast<size_t>((task.rank + 2) * kLanes) * sizeof(float));
    _mm512_storeu_ps(sums + task.rank * kLanes, _mm512_set1_ps(-FLT_MAX));
  }
  for (int64_t first = task.begin; first < task.end; first += kDotRows) {
    const int64_t count = smaller(kDotRows, task.end - first);
    gather(task, tile, first, count);
    int64_t vec = 0;
    for (; vec + 2 <= task.vecs; vec += 2) attend_dot_lanes<2>(task, vec, tile, first, count);
    if (vec < task.vecs) attend_dot_lanes<1>(task, vec, tile, first, count);
  }
}

}  // namespace kvern
