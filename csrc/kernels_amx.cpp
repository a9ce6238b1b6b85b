// Attention on AMX tiles, for BF16 queries over BF16 rows. As kernels_avx512bf16.cpp, for a block of rows at a time:
//     scores[row][lane] = keys[row] . queries[lane]        keys as they lie in the cache, 16 rows a tile
//     sums[lane][r] += weights[lane][row] values[row][r]   values interleaved in pairs of rows, read by all lanes
// Lanes are rows of the second product, so its sums lie by lane: [lanes, rank], then the two numbers of each lane. Needs
// whole tiles: dim and rank are multiples of 32. What it gives up: a block of values is written out once, in L2, and the
// rows of a tile that nobody sees are multiplied, with weight 0.
#include <vector>

#include "amx.h"
#include "kernels_avx512.h"

namespace {

using kvern::Context;
using kvern::kMostSums;
using kvern::Merge;

constexpr int64_t kLanes = 16;
constexpr int64_t kKeyRows = 16;
constexpr int64_t kBlockRows = 256;     // rows whose scores are known before the first is weighed
constexpr int64_t kSpan = 32;           // rows, or columns, that a tile product sums over
constexpr int64_t kTileNumbers = 512;          // BF16 numbers of a tile
constexpr int64_t kRowBytes = 64;       // of a tile
constexpr int64_t kMostVecs = kvern::kAttendLanes / kLanes;

// Scratch of a thread, by block.
struct Block {
  int64_t first, count;   // rows
  Context context;        // where they are read: row `first` is row `at` there, and behind row end - 1 nothing is
  int64_t at, end;
  uint16_t* decoded;      // [kBlockRows][key_room(dim)], for records
  uint16_t* values;       // [span of rows][rank / 32][2][pair of rows][16 columns][2]
  uint16_t* keys;         // [kMostSums][16][dim], for rows that are no tiles where they lie
  float* scores;          // [vecs][kBlockRows][lane]
  uint16_t* weights;      // [vecs][span of rows][lane][32 rows]
  float* fresh;           // [2 * kMostSums][lane][16]: sums of the block
  float shrink[kMostVecs][kLanes];

  int64_t spans() const { return (count + kSpan - 1) / kSpan; }
};

class Scratch {
 public:
  Block block(const Attend& task) {
    const int64_t vecs = kMostVecs;
    const int64_t numbers = kBlockRows * task.rank / 2 + kMostSums * kKeyRows * task.dim / 2 +
                            vecs * kBlockRows * kLanes * 3 / 2 +
                            (task.context.dtype == KVERN_LATENT8 ? kBlockRows * key_room(task.dim) / 2 : 0) + 2 * kMostSums * kLanes * kLanes + kLanes;
    if (memory_.size() < static_cast<size_t>(numbers)) memory_.resize(static_cast<size_t>(numbers));
    Block block{};
    block.values = reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(memory_.data()) + 63) / 64 * 64);
    block.keys = block.values + kBlockRows * task.rank;
    block.scores = reinterpret_cast<float*>(block.keys + kMostSums * kKeyRows * task.dim);
    block.weights = reinterpret_cast<uint16_t*>(block.scores + vecs * kBlockRows * kLanes);
    block.fresh = reinterpret_cast<float*>(block.weights + vecs * kBlockRows * kLanes);
    block.decoded = reinterpret_cast<uint16_t*>(block.fresh + 2 * kMostSums * kLanes * kLanes);
    return block;
  }

 private:
  std::vector<float> memory_;
};

inline __m512i load_bits(const void* p) { return _mm512_loadu_si512(p); }

// Value tile of 16 of the columns [32 * column, 32 * column + 32): those that unpacking leaves in one register.
inline uint16_t* value_tile(const Block& block, int64_t rank, int64_t span, int64_t column, int64_t which) {
  return block.values + ((span * (rank / kSpan) + column) * 2 + which) * kTileNumbers;
}

void gather_values(const Attend& task, const Block& block) {
  const Context& context = block.context;
  for (int64_t c = 0; c < block.spans() * kSpan; c += 2) {
    const int64_t last = block.end - 1, row = block.at + c;
    const uint16_t* even = c < block.count ? row_at<uint16_t>(context, row) + context.value_at : nullptr;
    const uint16_t* odd = c + 1 < block.count ? row_at<uint16_t>(context, row + 1) + context.value_at : nullptr;
    const uint16_t* ahead = row_at<uint16_t>(context, smaller(row + kSpan, last));
    const uint16_t* after = row_at<uint16_t>(context, smaller(row + kSpan + 1, last));
    for (int64_t r = 0; r < task.rank; r += kSpan) {
      const __m512i a = even ? load_bits(even + r) : _mm512_setzero_si512();
      const __m512i b = odd ? load_bits(odd + r) : _mm512_setzero_si512();
      uint16_t* to = value_tile(block, task.rank, c / kSpan, r / kSpan, 0) + c % kSpan / 2 * kSpan;
      _mm512_store_si512(to, _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512(to + kTileNumbers, _mm512_unpackhi_epi16(a, b));
      _mm_prefetch(reinterpret_cast<const char*>(ahead + r), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(after + r), _MM_HINT_T0);
    }
  }
}

// Keys of 16 rows: column d of row i lies at at(d) + i * stride_at(d).
struct KeyRows {
  const uint16_t *first, *second;
  int64_t stride, second_stride, nope;
  const uint16_t* at(int64_t d) const { return d < nope ? first + d : second + d - nope; }
  int64_t stride_at(int64_t d) const { return 2 * (d < nope ? stride : second_stride); }  // in bytes
};

// Where 16 rows from `row` on lie one after the other they are read there, else they are copied to `room`.
KeyRows keys_of(const Attend& task, const Block& block, int64_t row, uint16_t* room) {
  const Context& context = block.context;
  const bool has_tiles = context.rope_size == 0 || context.nope % kSpan == 0;
  const bool in_block = context.table && context.block_size % kKeyRows == 0 && row % kKeyRows == 0;
  if (has_tiles && (in_block || (!context.table && row + kKeyRows <= block.end))) {
    const auto* rope = static_cast<const uint16_t*>(context.rope);
    return {row_at<uint16_t>(context, row), context.rope_size ? rope + row * context.rope_stride : nullptr, context.stride,
            context.rope_stride, context.rope_size ? context.nope : task.dim};
  }
  const int64_t count = smaller(kKeyRows, block.at + block.count - row);
  for (int64_t i = 0; i < kKeyRows; ++i) {
    uint16_t* to = room + i * task.dim;
    if (i >= count) {
      std::memset(to, 0, static_cast<size_t>(task.dim) * sizeof *to);
    } else if (const uint16_t* key = key_of<Avx512>(context, row + i, to); key != to) {
      std::memcpy(to, key, static_cast<size_t>(task.dim) * sizeof *to);
    }
  }
  return {room, nullptr, task.dim, 0, task.dim};
}

inline const uint16_t* queries(const Attend& task, int64_t vec, int64_t d) {
  return static_cast<const uint16_t*>(task.q) + (vec * task.dim + d) * kLanes;
}

// P tiles of rows for one register of lanes.
template <int P>
void score_rows(const Attend& task, const Block& block, int64_t vec, int64_t row) {
  KeyRows keys[kMostSums];
  for (int p = 0; p < P; ++p) {
    keys[p] = keys_of(task, block, block.at + row + p * kKeyRows, block.keys + p * kKeyRows * task.dim);
  }
  kvern::finish_stores();
  kvern::clear_sums<P>();
  for (int64_t d = 0; d < task.dim; d += kSpan) {
    const void* tiles[kMostSums];
    int64_t strides[kMostSums];
    for (int p = 0; p < P; ++p) {
      tiles[p] = keys[p].at(d);
      strides[p] = keys[p].stride_at(d);
    }
    kvern::add_products_with<P>(queries(task, vec, d), tiles, strides);
  }
  float* to = block.scores + (vec * kBlockRows + row) * kLanes;
  kvern::store_sums<P>(to, kKeyRows * kRowBytes, kRowBytes);
}

// One tile of rows for P registers of lanes.
template <int P>
void score_lanes(const Attend& task, const Block& block, int64_t row) {
  const KeyRows keys = keys_of(task, block, block.at + row, block.keys);
  kvern::finish_stores();
  kvern::clear_sums<P>();
  for (int64_t d = 0; d < task.dim; d += kSpan) {
    const void* tiles[kMostSums];
    for (int p = 0; p < P; ++p) tiles[p] = queries(task, p, d);
    kvern::add_products<P>(keys.at(d), keys.stride_at(d), tiles, kRowBytes);
  }
  kvern::store_sums<P>(block.scores + row * kLanes, kBlockRows * kRowBytes, kRowBytes);
}

template <int P>
void score(const Attend& task, const Block& block) {
  if constexpr (P > 1) {
    for (int64_t row = 0; row < block.count; row += kKeyRows) score_lanes<P>(task, block, row);
  } else {
    int64_t row = 0;
    for (; row + kMostSums * kKeyRows <= block.count; row += kMostSums * kKeyRows) score_rows<4>(task, block, 0, row);
    for (; row < block.count; row += kKeyRows) score_rows<1>(task, block, 0, row);
  }
}

// 16 rows of 16 numbers of 32 bits: columns become rows.
inline void transpose(__m512i (&rows)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i low = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88), high = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    const __m512i third = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    const __m512i fourth = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    t[i] = _mm512_shuffle_i32x4(low, third, 0x88);
    t[i + 8] = _mm512_shuffle_i32x4(low, third, 0xdd);
    t[i + 4] = _mm512_shuffle_i32x4(high, fourth, 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(high, fourth, 0xdd);
  }
  for (int i = 0; i < 16; ++i) rows[i] = t[i];
}

// Scores to weights (BF16, by lane), the running maximum and sum of weights, and what earlier sums shrink by. `least`: rows
// that every lane sees.
void weigh(const Attend& task, Block& block, int64_t vec) {
  const float* scores = block.scores + vec * kBlockRows * kLanes;
  const int64_t* seen = task.seen + vec * kLanes;
  float limits[kLanes];
  limits_of(seen, kLanes, block.first, block.count, limits);
  const Sight sight = sight_of(seen, kLanes, block.first, block.count);
  const __m512 limit = _mm512_loadu_ps(limits), scale = _mm512_set1_ps(task.scale);
  const int64_t least = static_cast<int64_t>(_mm512_reduce_min_ps(limit));
  float* top = task.partial + (vec * (task.rank + 2) + task.rank) * kLanes;
  const __m512 old = _mm512_loadu_ps(top);
  __m512 now = old;
  const auto score_of = [&](int64_t c) { return _mm512_mul_ps(_mm512_loadu_ps(scores + c * kLanes), scale); };
  for (int64_t c = 0; c < sight.count; ++c) {
    const __m512 larger = Avx512::max(score_of(c), now);
    now = c < least ? larger : Avx512::keep(limit, static_cast<float>(c), larger, now);
  }
  __m512 sum = _mm512_setzero_ps();
  const auto weight_of = [&](int64_t c) {
    if (c >= sight.count) return _mm512_setzero_ps();
    const __m512 weight = Avx512::exp2(score_of(c) - now);
    return c < least ? weight : Avx512::keep(limit, static_cast<float>(c), weight, _mm512_setzero_ps());
  };
  for (int64_t span = 0; span < block.spans(); ++span) {
    __m512i pairs[16];
    for (int64_t pair = 0; pair < 16; ++pair) {
      const int64_t c = span * kSpan + 2 * pair;
      const __m512 even = weight_of(c), odd = weight_of(c + 1);
      const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));  // 16 even, then 16 odd
      const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
      const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16);
      sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(low, 16)));
      sum = _mm512_add_ps(sum, _mm512_castsi512_ps(high));
      pairs[pair] = _mm512_or_si512(low, high);
    }
    transpose(pairs);
    uint16_t* to = block.weights + (vec * kBlockRows / kSpan + span) * kTileNumbers;
    for (int lane = 0; lane < kLanes; ++lane) _mm512_store_si512(to + lane * kSpan, pairs[lane]);
  }
  const __m512 shrink = Avx512::exp2(old - now);
  _mm512_storeu_ps(block.shrink[vec], shrink);
  _mm512_storeu_ps(top, now);
  _mm512_storeu_ps(top + kLanes, _mm512_fmadd_ps(_mm512_loadu_ps(top + kLanes), shrink, sum));
}

inline uint16_t* weight_tile(const Block& block, int64_t vec, int64_t span) {
  return block.weights + (vec * kBlockRows / kSpan + span) * kTileNumbers;
}

// The sums of 32 columns from r on, of 16 lanes: two fresh tiles as unpacking left their columns, on top of what there was.
void settle(const Attend& task, const Block& block, int64_t vec, int64_t r, const float* low, const float* high) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    float* to = task.partial + vec * (task.rank + 2) * kLanes + lane * task.rank + r;
    const __m512 a = _mm512_load_ps(low + lane * kLanes), b = _mm512_load_ps(high + lane * kLanes);
    const __m512 shrink = _mm512_set1_ps(block.shrink[vec][lane]);
    _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_loadu_ps(to), shrink, _mm512_permutex2var_ps(a, first, b)));
    _mm512_storeu_ps(to + kLanes, _mm512_fmadd_ps(_mm512_loadu_ps(to + kLanes), shrink, _mm512_permutex2var_ps(a, second, b)));
  }
}

// P / 2 times 32 columns for one register of lanes.
template <int P>
void add_columns(const Attend& task, const Block& block, int64_t r) {
  kvern::finish_stores();
  kvern::clear_sums<P>();
  for (int64_t span = 0; span < block.spans(); ++span) {
    const uint16_t* tile = value_tile(block, task.rank, span, r / kSpan, 0);
    const void* tiles[kMostSums] = {tile, tile + kTileNumbers, tile + 2 * kTileNumbers, tile + 3 * kTileNumbers};
    kvern::add_products<P>(weight_tile(block, 0, span), kRowBytes, tiles, kRowBytes);
  }
  kvern::store_sums<P>(block.fresh, kKeyRows * kRowBytes, kRowBytes);
  for (int p = 0; p < P; p += 2) {
    const float* fresh = block.fresh + p * kLanes * kLanes;
    settle(task, block, 0, r + p / 2 * kSpan, fresh, fresh + kLanes * kLanes);
  }
}

// 32 columns for P registers of lanes.
template <int P>
void add_lanes(const Attend& task, const Block& block, int64_t r) {
  constexpr int64_t kNumbers = kMostSums * kLanes * kLanes;
  kvern::finish_stores();
  for (int64_t which = 0; which < 2; ++which) {
    kvern::clear_sums<P>();
    for (int64_t span = 0; span < block.spans(); ++span) {
      const void* tiles[kMostSums];
      int64_t strides[kMostSums];
      for (int p = 0; p < P; ++p) {
        tiles[p] = weight_tile(block, p, span);
        strides[p] = kRowBytes;
      }
      kvern::add_products_with<P>(value_tile(block, task.rank, span, r / kSpan, which), tiles, strides);
    }
    kvern::store_sums<P>(block.fresh + which * kNumbers, kKeyRows * kRowBytes, kRowBytes);
  }
  for (int p = 0; p < P; ++p) {
    const float* fresh = block.fresh + p * kLanes * kLanes;
    settle(task, block, p, r, fresh, fresh + kNumbers);
  }
}

template <int P>
void attend_block(const Attend& task, Block& block) {
  gather_values(task, block);
  score<P>(task, block);
  for (int vec = 0; vec < P; ++vec) weigh(task, block, vec);
  int64_t r = 0;
  if constexpr (P == 1) {
    for (; r + 2 * kSpan <= task.rank; r += 2 * kSpan) add_columns<4>(task, block, r);
    for (; r < task.rank; r += kSpan) add_columns<2>(task, block, r);
  } else {
    for (; r < task.rank; r += kSpan) add_lanes<P>(task, block, r);
  }
}

// Records are decoded first.
void place(const Attend& task, Block& block, int64_t first) {
  block.first = first;
  block.count = smaller(kBlockRows, task.end - first);
  block.context = task.context;
  block.at = first;
  block.end = task.end;
  if (task.context.dtype != KVERN_LATENT8) return;
  for (int64_t row = 0; row < block.count; ++row) {
    if (first + row + kSpan < task.end) fetch_row(task.context, first + row + kSpan, task.dim, task.rank);
    key_of<Avx512>(task.context, first + row, block.decoded + row * key_room(task.dim));
  }
  block.context = {block.decoded, KVERN_BF16, key_room(task.dim), nullptr, 1, nullptr, 0, task.dim, 0, 0, task.rank};
  block.at = 0;
  block.end = block.count;
}

template <int P>
void attend(const Attend& task, Block block) {
  for (int64_t first = task.begin; first < task.end; first += kBlockRows) {
    place(task, block, first);
    attend_block<P>(task, block);
  }
}

void attend_all(const Attend& task) {
  static thread_local Scratch scratch;
  const kvern::TileRows rows(kKeyRows);
  for (int64_t vec = 0; vec < task.vecs; ++vec) {
    float* sums = task.partial + vec * (task.rank + 2) * kLanes;
    std::memset(sums, 0, static_cast<size_t>((task.rank + 2) * kLanes) * sizeof(float));
    _mm512_storeu_ps(sums + task.rank * kLanes, _mm512_set1_ps(-FLT_MAX));
  }
  const Block block = scratch.block(task);
  switch (task.vecs) {
    case 1: return attend<1>(task, block);
    case 2: return attend<2>(task, block);
    case 3: return attend<3>(task, block);
    default: return attend<4>(task, block);
  }
}

bool is_finite(const uint16_t* numbers, int64_t count) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  for (int64_t i = 0; i < count; i += 32) {
    if (_mm512_cmpeq_epi16_mask(_mm512_and_si512(load_bits(numbers + i), exponent), exponent)) return false;
  }
  return true;
}

// Whether some lane would multiply a NaN or an infinity that it does not see by its weight of 0.
bool spills(const Attend& task) {
  const Sight all = sight_of(task.seen, task.vecs * kLanes, task.begin, task.end - task.begin);
  if (!all.is_ragged) return false;
  int64_t least = task.seen[0];
  for (int64_t lane = 1; lane < task.vecs * kLanes; ++lane) least = smaller(least, task.seen[lane]);
  std::vector<uint16_t> room(task.context.dtype == KVERN_LATENT8 ? static_cast<size_t>(key_room(task.dim)) : 0);
  for (int64_t row = least < task.begin ? task.begin : least; row < task.begin + all.count; ++row) {
    const bool is_record = task.context.dtype == KVERN_LATENT8;
    const uint16_t* stored = is_record ? key_of<Avx512>(task.context, row, room.data()) : row_at<uint16_t>(task.context, row);
    if (!is_finite(stored + task.context.value_at, task.rank)) return true;
  }
  return false;
}

// Lanes that see as far as `seen` are computed as if the context ended there, and take their numbers from that.
void attend_apart(const Attend& task, int64_t seen) {
  std::vector<float> partial(static_cast<size_t>(task.vecs * (task.rank + 2) * kLanes));
  Attend part = task;
  part.end = smaller(task.end, seen);
  part.partial = partial.data();
  attend_all(part);
  for (int64_t lane = 0; lane < task.vecs * kLanes; ++lane) {
    if (task.seen[lane] != seen) continue;
    const int64_t vec = lane / kLanes * (task.rank + 2) * kLanes, own = lane % kLanes;
    std::memcpy(task.partial + vec + own * task.rank, part.partial + vec + own * task.rank, static_cast<size_t>(task.rank) * sizeof(float));
    for (int64_t at : {task.rank * kLanes + own, (task.rank + 1) * kLanes + own}) task.partial[vec + at] = part.partial[vec + at];
  }
}

}  // namespace

namespace kvern {

void attend_tiles_amx(const Attend& task) {
  if (!spills(task)) return attend_all(task);
  for (int64_t lane = 0; lane < task.vecs * kLanes; ++lane) {
    if (lane == 0 || task.seen[lane] != task.seen[lane - 1]) attend_apart(task, task.seen[lane]);
  }
}

// As merge in attention_body.h, with the sums and the result by lane: out[lane][r - begin].
void merge_tiles_amx(const Merge& task) {
  __m512 shares[kMergeParts];
  const float* tops = task.parts + task.rank * kLanes;
  __m512 top = _mm512_set1_ps(-FLT_MAX), total = _mm512_setzero_ps();
  for (int64_t part = 0; part < task.count; ++part) top = Avx512::max(_mm512_loadu_ps(tops + part * task.stride), top);
  for (int64_t part = 0; part < task.count; ++part) {
    shares[part] = Avx512::exp2(_mm512_loadu_ps(tops + part * task.stride) - top);
    total = _mm512_fmadd_ps(shares[part], _mm512_loadu_ps(tops + part * task.stride + kLanes), total);
  }
  alignas(64) float weights[kMergeParts][kLanes];
  for (int64_t part = 0; part < task.count; ++part) _mm512_store_ps(weights[part], _mm512_div_ps(shares[part], total));
  const int64_t size = task.end - task.begin;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    for (int64_t r = 0; r < size; r += kLanes) {
      const auto mask = static_cast<__mmask16>(size - r >= kLanes ? 0xffff : (1u << (size - r)) - 1);
      __m512 sum = _mm512_setzero_ps();
      for (int64_t part = 0; part < task.count; ++part) {
        const float* from = task.parts + part * task.stride + lane * task.rank + task.begin + r;
        sum = _mm512_fmadd_ps(_mm512_set1_ps(weights[part][lane]), _mm512_maskz_loadu_ps(mask, from), sum);
      }
      _mm512_mask_storeu_ps(task.out + lane * size + r, mask, sum);
    }
  }
}

}  // namespace kvern
