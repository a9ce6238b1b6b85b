// Causal attention of a document and its gradients with BF16 dot products (vdpbf16ps), in FlashAttention-2's order of work
// (arXiv 2307.08691): tiles of kSide queries by kSide keys, whose scores never leave the caches.
//     forward    s = scale q k;   p = 2^(s - top) of the largest so far;   o = sum(p v) / sum(p);   lse = top + log2(sum(p))
//     backward   p = 2^(s - lse);   ds = p (do v - sum(do o));   dv = sum(p do);   dq = scale sum(ds k);   dk = scale sum(ds q)
// Scores, sums, lse and all gradients until they are stored are FP32; p and ds are rounded to BF16 where they are multiplied.
//
// The instruction multiplies pairs: 16 lanes of B, two numbers each, by one pair of A. So each product here, `multiply`, takes
// A as rows of pairs along what is summed over, and B as rows of columns, a pair in each; a tile of a matrix comes in up to
// four forms:
//     rows     [kSide, size]        as in memory, padded with zeros: A of a sum over size
//     columns  [size / 2][kSide]    turned, by pairs of columns: B of a sum over size
//     pairs    [kSide / 2][size]    by pairs of rows: B of a sum over rows
//     turned   [size][kSide / 2]    the pairs turned: A of a sum over rows
//
// What it gives up: a head of a document is one thread's, and in room of its own, 2 kB a token at sizes of 96 and 64;
// subnormals (under 1.2e-38) count as zeros; queries and keys of a tile on the diagonal are multiplied before they are masked.
#include <cmath>
#include <limits>

#include "kernels_avx512.h"
#include "train_attention.h"

namespace {

using kvern::DocumentAttention;

constexpr int64_t kSide = 64;
constexpr int64_t kLanes = 16;
constexpr int64_t kSideVecs = kSide / kLanes;
constexpr float kLog2E = 1.44269504f;

inline __m512bh as_pairs(__m512i bits) { return reinterpret_cast<__m512bh>(bits); }
inline __m256i bf16(__m512 numbers) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(numbers)); }
inline int64_t round_up(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

// c [R, N registers] = or += a b
template <int R, int N>
inline void multiply_block(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t pairs, float* c,
                           int64_t c_stride, bool add) {
  __m512 sums[R][N];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) sums[r][n] = add ? _mm512_loadu_ps(c + r * c_stride + n * kLanes) : _mm512_setzero_ps();
  }
  for (int64_t p = 0; p < pairs; ++p) {
    __m512i columns[N];
    for (int n = 0; n < N; ++n) columns[n] = _mm512_loadu_si512(b + p * b_stride + n * kLanes);
    for (int r = 0; r < R; ++r) {
      const __m512i pair = _mm512_set1_epi32(static_cast<int>(a[r * a_stride + p]));
      for (int n = 0; n < N; ++n) sums[r][n] = _mm512_dpbf16_ps(sums[r][n], as_pairs(pair), as_pairs(columns[n]));
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) _mm512_storeu_ps(c + r * c_stride + n * kLanes, sums[r][n]);
  }
}

// A matrix of pairs, and how far apart its rows are.
struct Pairs {
  const uint32_t* at;
  int64_t stride;
};

template <int R, int N>
inline void multiply_strip(int64_t rows, Pairs a, Pairs b, int64_t pairs, float* c, int64_t c_stride, bool add) {
  for (int64_t r = 0; r < rows; r += R) {
    multiply_block<R, N>(a.at + r * a.stride, a.stride, b.at, b.stride, pairs, c + r * c_stride, c_stride, add);
  }
}

// c [rows, columns] = or += a [rows, pairs] b [pairs, columns], rows a multiple of 8, columns of 32.
void multiply(int64_t rows, int64_t columns, int64_t pairs, Pairs a, Pairs b, float* c, bool add) {
  int64_t at = 0;
  for (; columns - at >= 4 * kLanes; at += 4 * kLanes) {
    multiply_strip<4, 4>(rows, a, {b.at + at, b.stride}, pairs, c + at, columns, add);
  }
  if (columns - at >= 2 * kLanes) multiply_strip<8, 2>(rows, a, {b.at + at, b.stride}, pairs, c + at, columns, add);
}

// to [columns][rows] = from [rows][columns], words of 32 bits, 16 x 16 of them at a time.
void turn_block(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    const __m512i even = _mm512_loadu_si512(from + i * from_stride), odd = _mm512_loadu_si512(from + (i + 1) * from_stride);
    a[i] = _mm512_unpacklo_epi32(even, odd);
    a[i + 1] = _mm512_unpackhi_epi32(even, odd);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {  // 128 bits l of b[4 g + j] hold column 4 l + j of rows 4 g .. 4 g + 3
    const __m512i even_low = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88), odd_low = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88), odd_high = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
    _mm512_storeu_si512(to + j * to_stride, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
    _mm512_storeu_si512(to + (4 + j) * to_stride, _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
    _mm512_storeu_si512(to + (8 + j) * to_stride, _mm512_shuffle_i32x4(even_low, even_high, 0xdd));
    _mm512_storeu_si512(to + (12 + j) * to_stride, _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
  }
}

void turn(const void* from, int64_t rows, int64_t columns, void* to) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      turn_block(static_cast<const uint32_t*>(from) + r * columns + c, columns, static_cast<uint32_t*>(to) + c * rows + r, rows);
    }
  }
}

// Rows [kSide, size] to pairs.
void pair_rows(const uint16_t* rows, int64_t size, uint32_t* pairs) {
  for (int64_t r = 0; r < kSide; r += 2) {
    for (int64_t i = 0; i < size; i += 2 * kLanes) {
      uint32_t* to = pairs + r / 2 * size + i;
      interleave(_mm512_loadu_si512(rows + r * size + i), _mm512_loadu_si512(rows + (r + 1) * size + i), to, to + kLanes);
    }
  }
}

inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= kLanes ? 0xffff : count <= 0 ? 0 : (1u << count) - 1);
}

// to [count] in BF16 = from [count] by
void store(uint16_t* to, const float* from, int64_t count, float by) {
  const __m512 factor = _mm512_set1_ps(by);
  for (int64_t i = 0; i < count; i += kLanes) {
    _mm256_mask_storeu_epi16(to + i, first_lanes(count - i), bf16(_mm512_loadu_ps(from + i) * factor));
  }
}

// Which of the lanes from 16 vec on the query `row` of a tile on the diagonal sees.
inline __mmask16 seen(int64_t row, int64_t vec) { return first_lanes(row - vec * kLanes + 1); }

// One head of a document, and where its tiles lie.
struct Head {
  const DocumentAttention& task;
  int64_t head, first, length;
  int64_t size, value;   // of a key and of a value, rounded up
  uint8_t* free;         // room

  Head(const DocumentAttention& task, int64_t head, int64_t first, int64_t length, uint8_t* room)
      : task(task), head(head), first(first), length(length), size(round_up(task.nope + task.shared, 2 * kLanes)),
        value(round_up(task.value, 2 * kLanes)), free(room + (-reinterpret_cast<intptr_t>(room) & 63)) {}

  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(free);
    free += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return taken;
  }

  int64_t widest() const { return size > value ? size : value; }
  int64_t tiles() const { return (length + kSide - 1) / kSide; }
  int64_t rows(int64_t tile) const { return length - tile * kSide < kSide ? length - tile * kSide : kSide; }
  int64_t at(int64_t tile, int64_t row) const { return (first + tile * kSide + row) * task.heads + head; }  // of [tokens, heads]

  // Rows of a tile as in memory: `count` numbers of each from from[at (..)] on, and zeros.
  void gather(const uint16_t* from, int64_t stride, int64_t count, int64_t tile, int64_t width, uint16_t* to) const {
    for (int64_t r = 0; r < kSide; ++r, to += width) {
      const int64_t numbers = r < rows(tile) ? count : 0;
      if (numbers) std::memcpy(to, from + at(tile, r) * stride, static_cast<size_t>(numbers) * sizeof *to);
      std::memset(to + numbers, 0, static_cast<size_t>(width - numbers) * sizeof *to);
    }
  }
  void queries(int64_t tile, uint16_t* to) const { gather(task.q, task.nope + task.shared, task.nope + task.shared, tile, size, to); }
  void values(int64_t tile, uint16_t* to) const { gather(task.kv + task.nope, task.nope + task.value, task.value, tile, value, to); }
  void above(int64_t tile, uint16_t* to) const { gather(task.dout, task.value, task.value, tile, value, to); }
  void keys(int64_t tile, uint16_t* to) const {
    gather(task.kv, task.nope + task.value, task.nope, tile, size, to);
    for (int64_t r = 0; r < rows(tile) && task.shared; ++r) {
      const uint16_t* from = task.rope + (first + tile * kSide + r) * task.rope_stride;
      std::memcpy(to + r * size + task.nope, from, static_cast<size_t>(task.shared) * sizeof *to);
    }
  }
};

// What a query's sums are of so far.
struct Running {
  float top[kSide], total[kSide];
};

// Scores of a tile to weights, and the sums of values so far to the new largest score.
void weigh(const float* scores, bool is_diagonal, float scale, uint16_t* weights, Running& running, float* sums, int64_t value) {
  const __m512 by = _mm512_set1_ps(scale), lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int64_t r = 0; r < kSide; ++r) {
    __m512 s[kSideVecs];
    for (int64_t v = 0; v < kSideVecs; ++v) {
      s[v] = _mm512_loadu_ps(scores + r * kSide + v * kLanes) * by;
      if (is_diagonal) s[v] = _mm512_mask_mov_ps(lowest, seen(r, v), s[v]);
    }
    const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(s[0], s[1]), _mm512_max_ps(s[2], s[3])));
    const float old = running.top[r], now = largest > old ? largest : old;
    const __m512 top = _mm512_set1_ps(now), factor = Avx512::exp2(_mm512_set1_ps(old) - top);
    for (int64_t v = 0; v < kSideVecs; ++v) {
      s[v] = Avx512::exp2(s[v] - top);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + r * kSide + v * kLanes), bf16(s[v]));
    }
    running.top[r] = now;
    running.total[r] = running.total[r] * _mm512_cvtss_f32(factor) + _mm512_reduce_add_ps((s[0] + s[1]) + (s[2] + s[3]));
    if (now == old) continue;
    for (int64_t i = 0; i < value; i += kLanes) {
      float* sum = sums + r * value + i;
      _mm512_storeu_ps(sum, _mm512_loadu_ps(sum) * factor);
    }
  }
}

// p and ds of a tile, of its scores and of do v: p and ds by pairs of rows, ds as rows as well.
void weigh_back(const float* scores, const float* slopes, bool is_diagonal, float scale, const float* lse, const float* mean,
                uint32_t* p_pairs, uint32_t* ds_pairs, uint16_t* ds_rows) {
  const __m512 by = _mm512_set1_ps(scale);
  for (int64_t r = 0; r < kSide; r += 2) {
    for (int64_t v = 0; v < kSideVecs; ++v) {
      __m512i p[2], ds[2];
      for (int64_t i = 0; i < 2; ++i) {
        const int64_t at = (r + i) * kSide + v * kLanes;
        const __m512 exponent = _mm512_fmsub_ps(_mm512_loadu_ps(scores + at), by, _mm512_set1_ps(lse[r + i]));
        const __m512 weight = _mm512_maskz_mov_ps(is_diagonal ? seen(r + i, v) : 0xffff, Avx512::exp2(exponent));
        const __m256i slope = bf16(weight * (_mm512_loadu_ps(slopes + at) - _mm512_set1_ps(mean[r + i])));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds_rows + at), slope);
        p[i] = _mm512_cvtepu16_epi32(bf16(weight));
        ds[i] = _mm512_cvtepu16_epi32(slope);
      }
      _mm512_storeu_si512(p_pairs + r / 2 * kSide + v * kLanes, _mm512_or_si512(p[0], _mm512_slli_epi32(p[1], 16)));
      _mm512_storeu_si512(ds_pairs + r / 2 * kSide + v * kLanes, _mm512_or_si512(ds[0], _mm512_slli_epi32(ds[1], 16)));
    }
  }
}

inline const uint32_t* words(const uint16_t* rows) { return reinterpret_cast<const uint32_t*>(rows); }

int64_t room_of(const DocumentAttention& task, int64_t length) {
  const Head my(task, 0, 0, length, nullptr);
  const int64_t size = my.size, value = my.value;
  const int64_t per_row = (2 + 2 + 4) * size + 2 * 2 * value + 2 * 4;  // see attend_back
  const int64_t per_tile = kSide * (2 * 2 * size + 2 * 2 * value + 4 * (size + value) + (4 + 4 + 2 + 2 + 2) * kSide + 6 * my.widest() + 8);
  return my.tiles() * kSide * per_row + per_tile + 32 * 64;
}

void attend(const DocumentAttention& task, int64_t head, int64_t first, int64_t length, uint8_t* room) {
  Head my(task, head, first, length, room);
  const int64_t size = my.size, value = my.value, tiles = my.tiles();
  const float scale = task.scale * kLog2E;
  uint16_t* rows = my.take<uint16_t>(kSide * my.widest());
  uint32_t* keys = my.take<uint32_t>(tiles * kSide * size / 2);     // columns
  uint32_t* values = my.take<uint32_t>(tiles * kSide * value / 2);  // pairs
  float* scores = my.take<float>(kSide * kSide);
  uint16_t* weights = my.take<uint16_t>(kSide * kSide);
  float* sums = my.take<float>(kSide * value);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    my.keys(tile, rows);
    turn(rows, kSide, size / 2, keys + tile * kSide * size / 2);
    my.values(tile, rows);
    pair_rows(rows, value, values + tile * kSide * value / 2);
  }
  for (int64_t query = 0; query < tiles; ++query) {
    Running running;
    for (int64_t r = 0; r < kSide; ++r) running.top[r] = -std::numeric_limits<float>::infinity(), running.total[r] = 0;
    std::memset(sums, 0, static_cast<size_t>(kSide * value) * sizeof *sums);
    my.queries(query, rows);
    for (int64_t key = 0; key <= query; ++key) {
      multiply(kSide, kSide, size / 2, {words(rows), size / 2}, {keys + key * kSide * size / 2, kSide}, scores, false);
      weigh(scores, key == query, scale, weights, running, sums, value);
      multiply(kSide, value, kSide / 2, {words(weights), kSide / 2}, {values + key * kSide * value / 2, value}, sums, true);
    }
    for (int64_t r = 0; r < my.rows(query); ++r) {
      store(task.out + my.at(query, r) * task.value, sums + r * value, task.value, 1.0f / running.total[r]);
      task.lse[my.at(query, r)] = running.top[r] + std::log2(running.total[r]);
    }
  }
}

void attend_back(const DocumentAttention& task, int64_t head, int64_t first, int64_t length, uint8_t* room) {
  Head my(task, head, first, length, room);
  const int64_t size = my.size, value = my.value, tiles = my.tiles(), all = tiles * kSide;
  const float scale = task.scale * kLog2E;
  // Of all queries: do, q, dq, lse and sum(do o).
  uint16_t* q_rows = my.take<uint16_t>(all * size);
  uint32_t* q_turned = my.take<uint32_t>(all * size / 2);
  uint16_t* do_rows = my.take<uint16_t>(all * value);
  uint32_t* do_turned = my.take<uint32_t>(all * value / 2);
  float* dq = my.take<float>(all * size);
  float* lse = my.take<float>(all);
  float* mean = my.take<float>(all);
  // Of a tile: keys and values, scores and what becomes of them, and the gradients, turned until they are stored.
  uint32_t* k_columns = my.take<uint32_t>(kSide * size / 2);
  uint32_t* k_pairs = my.take<uint32_t>(kSide * size / 2);
  uint32_t* v_columns = my.take<uint32_t>(kSide * value / 2);
  float* scores = my.take<float>(kSide * kSide);
  float* slopes = my.take<float>(kSide * kSide);
  uint32_t* p_pairs = my.take<uint32_t>(kSide * kSide / 2);
  uint32_t* ds_pairs = my.take<uint32_t>(kSide * kSide / 2);
  uint16_t* ds_rows = my.take<uint16_t>(kSide * kSide);
  float* dk = my.take<float>(kSide * size);
  float* dv = my.take<float>(kSide * value);
  uint16_t* rows = my.take<uint16_t>(kSide * my.widest());
  float* stored = my.take<float>(kSide * my.widest());
  uint32_t* pairs = reinterpret_cast<uint32_t*>(stored);  // until something is stored

  std::memset(dq, 0, static_cast<size_t>(all * size) * sizeof *dq);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t from = tile * kSide;
    my.queries(tile, q_rows + from * size);
    pair_rows(q_rows + from * size, size, pairs);
    turn(pairs, kSide / 2, size, q_turned + from * size / 2);
    my.above(tile, do_rows + from * value);
    pair_rows(do_rows + from * value, value, pairs);
    turn(pairs, kSide / 2, value, do_turned + from * value / 2);
    for (int64_t r = 0; r < kSide; ++r) {
      const bool is_token = r < my.rows(tile);
      float sum = 0;
      const uint16_t* out = task.out + my.at(tile, r) * task.value;
      for (int64_t i = 0; is_token && i < task.value; ++i) sum += float_of_bf16(do_rows[(from + r) * value + i]) * float_of_bf16(out[i]);
      mean[from + r] = sum;
      lse[from + r] = is_token ? task.lse[my.at(tile, r)] : 0;
    }
  }
  for (int64_t key = 0; key < tiles; ++key) {
    my.keys(key, rows);
    turn(rows, kSide, size / 2, k_columns);
    pair_rows(rows, size, k_pairs);
    my.values(key, rows);
    turn(rows, kSide, value / 2, v_columns);
    for (int64_t query = key; query < tiles; ++query) {
      const int64_t from = query * kSide;
      multiply(kSide, kSide, size / 2, {words(q_rows + from * size), size / 2}, {k_columns, kSide}, scores, false);
      multiply(kSide, kSide, value / 2, {words(do_rows + from * value), value / 2}, {v_columns, kSide}, slopes, false);
      weigh_back(scores, slopes, key == query, scale, lse + from, mean + from, p_pairs, ds_pairs, ds_rows);
      multiply(value, kSide, kSide / 2, {do_turned + from * value / 2, kSide / 2}, {p_pairs, kSide}, dv, query > key);
      multiply(size, kSide, kSide / 2, {q_turned + from * size / 2, kSide / 2}, {ds_pairs, kSide}, dk, query > key);
      multiply(kSide, size, kSide / 2, {words(ds_rows), kSide / 2}, {k_pairs, size}, dq + from * size, true);
    }
    turn(dk, size, kSide, stored);
    for (int64_t r = 0; r < my.rows(key); ++r) {
      store(task.dkv + my.at(key, r) * (task.nope + task.value), stored + r * size, task.nope, task.scale);
      for (int64_t i = 0; i < task.shared; ++i) task.drope[my.at(key, r) * task.shared + i] = stored[r * size + task.nope + i] * task.scale;
    }
    turn(dv, value, kSide, stored);
    for (int64_t r = 0; r < my.rows(key); ++r) {
      store(task.dkv + my.at(key, r) * (task.nope + task.value) + task.nope, stored + r * value, task.value, 1.0f);
    }
  }
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int64_t r = 0; r < my.rows(tile); ++r) {
      store(task.dq + my.at(tile, r) * (task.nope + task.shared), dq + (tile * kSide + r) * size, task.nope + task.shared, task.scale);
    }
  }
}

}  // namespace

namespace kvern {
const DocumentKernels kAvx512Bf16Documents = {room_of, attend, attend_back};
}
