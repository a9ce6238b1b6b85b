// Attention in latent space over an instruction set `V` (see kernels_body.h, which includes this file): heads are lanes,
// context rows are decoded kAttendRows at a time and shared by all heads, and the softmax is taken online:
//     top' = max(top, s);  sums' = sums * 2^(top - top') + 2^(s - top') * v
// No sums across lanes anywhere. What it gives up: with heads not a multiple of the width the last lanes idle.
#pragma once

#include <cfloat>

namespace {

using kvern::Attend;
using kvern::kAttendHeads;
using kvern::kAttendRows;

// Row r of the decoded rows, column d: tile[d / kStep][r][d % kStep], so that rows lie at constant distances.
constexpr int64_t kSlab = kAttendRows * kStep;

template <class T>
inline const T* row_at(const Attend& task, int64_t row) {
  const int64_t place = task.table[row / task.block_size] * task.block_size + row % task.block_size;
  return static_cast<const T*>(task.rows) + place * task.row_stride;
}

template <class V, class T>
void decode_rows(const Attend& task, int64_t first, int64_t count, float* tile) {
  for (int64_t r = 0; r < count; ++r) {
    const T* stored = row_at<T>(task, first + r);
    const T* later = row_at<T>(task, smaller(first + r + kAttendRows, task.end - 1));
    float* to = tile + r * kStep;
    for (int64_t d = 0; d < task.dim; d += kSmall<V>) {
      typename V::reg numbers[kVecs];
      if (d + kSmall<V> <= task.dim) {
        fetch_ahead<V>(stored + d, later - stored);
        V::decode(stored + d, numbers);
      } else {
        decode_rest<V>(stored + d, task.dim - d, numbers);
      }
      for (int v = 0; v < kVecs; ++v) V::store(to + d / kStep * kSlab + d % kStep + v * V::width, numbers[v]);
    }
  }
}

// out[c][g] = q[g] . row c, for C rows and G registers of heads
template <class V, int G, int C>
inline void score(const Attend& task, const float* q, const float* tile, float* out) {
  typename V::reg sums[G][C];
  clear<V>(sums);
  for (int64_t first = 0; first < task.dim; first += kStep) {
    const float* rows = tile + first * kAttendRows;
    const int64_t count = smaller(kStep, task.dim - first);
    for (int64_t d = 0; d < count; ++d) {
      typename V::reg heads[G];
      for (int g = 0; g < G; ++g) heads[g] = V::load(q + (g * task.dim + first + d) * V::width);
      for (int c = 0; c < C; ++c) {
        const auto number = V::set1(rows[c * kStep + d]);
        for (int g = 0; g < G; ++g) sums[g][c] = V::fma(heads[g], number, sums[g][c]);
      }
    }
  }
  const auto scale = V::set1(task.scale);
  for (int c = 0; c < C; ++c) {
    for (int g = 0; g < G; ++g) V::store(out + (c * G + g) * V::width, V::mul(sums[g][c], scale));
  }
}

// Scores to weights in place; updates the running maximum and the sum of weights, returns what earlier sums shrink by.
template <class V, int G>
inline typename V::reg weigh(float* scores, int64_t count, float* top, float* total) {
  const auto old = V::load(top);
  auto now = old;
  for (int64_t c = 0; c < count; ++c) now = V::max(V::load(scores + c * G * V::width), now);
  auto sum = V::zero();
  for (int64_t c = 0; c < count; ++c) {
    float* at = scores + c * G * V::width;
    const auto weight = V::exp2(V::sub(V::load(at), now));
    V::store(at, weight);
    sum = V::add(sum, weight);
  }
  const auto shrink = V::exp2(V::sub(old, now));
  V::store(top, now);
  V::store(total, V::fma(V::load(total), shrink, sum));
  return shrink;
}

// sums[g][r .. r + B] = sums * shrink + sum_c weights[c][g] * row c
template <class V, int G, int B>
inline void add_values(const float* tile, int64_t count, const float* weights, int64_t r,
                       const typename V::reg (&shrink)[G], float* const (&sums)[G]) {
  const float* column = tile + r / kStep * kSlab + r % kStep;
  typename V::reg acc[G][B];
  for (int g = 0; g < G; ++g) {
    for (int b = 0; b < B; ++b) acc[g][b] = V::mul(V::load(sums[g] + (r + b) * V::width), shrink[g]);
  }
  for (int64_t c = 0; c < count; ++c) {
    typename V::reg weight[G];
    for (int g = 0; g < G; ++g) weight[g] = V::load(weights + (c * G + g) * V::width);
    for (int b = 0; b < B; ++b) {
      const auto number = V::set1(column[c * kStep + b]);
      for (int g = 0; g < G; ++g) acc[g][b] = V::fma(weight[g], number, acc[g][b]);
    }
  }
  for (int g = 0; g < G; ++g) {
    for (int b = 0; b < B; ++b) V::store(sums[g] + (r + b) * V::width, acc[g][b]);
  }
}

template <class V, int G>
inline void attend_tile(const Attend& task, int64_t vec, const float* tile, int64_t count, float* weights) {
  constexpr int C = V::sums / G;
  static_assert(kAttendRows % C == 0 && kStep % C == 0);
  for (int64_t c = 0; c < count; c += C) {
    score<V, G, C>(task, task.q + vec * task.dim * V::width, tile + c * kStep, weights + c * G * V::width);
  }
  float* sums[G];
  typename V::reg shrink[G];
  for (int g = 0; g < G; ++g) {
    sums[g] = task.partial + (vec + g) * (task.rank + 2) * V::width;
    float* top = sums[g] + task.rank * V::width;
    shrink[g] = weigh<V, G>(weights + g * V::width, count, top, top + V::width);
  }
  int64_t r = 0;
  for (; r + C <= task.rank; r += C) add_values<V, G, C>(tile, count, weights, r, shrink, sums);
  for (; r < task.rank; ++r) add_values<V, G, 1>(tile, count, weights, r, shrink, sums);
}

template <class V>
void attend(const Attend& task) {
  float* tile = task.scratch;
  float* weights = tile + (task.dim + kStep - 1) / kStep * kSlab;
  for (int64_t vec = 0; vec < task.vecs; ++vec) {
    float* sums = task.partial + vec * (task.rank + 2) * V::width;
    std::memset(sums, 0, static_cast<size_t>((task.rank + 2) * V::width) * sizeof(float));
    V::store(sums + task.rank * V::width, V::set1(-FLT_MAX));  // not -inf: a score of -inf must weigh nothing
  }
  for (int64_t first = task.begin; first < task.end; first += kAttendRows) {
    const int64_t count = smaller(kAttendRows, task.end - first);
    if (task.rows_dtype == KVERN_BF16) {
      decode_rows<V, uint16_t>(task, first, count, tile);
    } else {
      decode_rows<V, float>(task, first, count, tile);
    }
    int64_t vec = 0;
    for (; vec + V::head_vecs <= task.vecs; vec += V::head_vecs) {
      attend_tile<V, V::head_vecs>(task, vec, tile, count, weights);
    }
    for (; vec < task.vecs; ++vec) attend_tile<V, 1>(task, vec, tile, count, weights);
  }
}

}  // namespace
