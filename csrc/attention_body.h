// Attention over an instruction set `V` (see kernels_body.h, which includes this file): queries are lanes, several heads of
// one query, one head of several queries or both; context rows are decoded kAttendRows at a time and shared by all lanes,
// and the softmax is taken online:
//     top' = max(top, s);  sums' = sums * 2^(top - top') + 2^(s - top') * v
// No sums across lanes anywhere. A lane's result depends on its query and the rows it sees, bit for bit, not on the lanes
// beside it: where some lane sees fewer rows of a tile (kRagged), every step keeps what that lane had. What it gives up:
// lanes without a query compute too.
#pragma once

#include <cfloat>

#include "attention_rows.h"

namespace {

using kvern::Attend;
using kvern::kAttendLanes;
using kvern::kAttendRows;

// Row r of the decoded rows, column d: tile[d / kStep][r][d % kStep], so that rows lie at constant distances.
constexpr int64_t kSlab = kAttendRows * kStep;

template <class V, class T>
inline void decode_stretch(const T* stored, int64_t ahead, int64_t size, float* to) {
  for (int64_t d = 0; d < size; d += kSmall<V>) {
    typename V::reg numbers[kVecs];
    if (d + kSmall<V> <= size) {
      fetch_ahead<V>(stored + d, ahead);
      V::decode(stored + d, numbers);
    } else {
      decode_rest<V>(stored + d, size - d, numbers);
    }
    for (int v = 0; v < kVecs; ++v) V::store(to + d / kStep * kSlab + d % kStep + v * V::width, numbers[v]);
  }
}

// Keys, and behind them the values if they are not part of the keys.
template <class V, class T>
void decode_rows(const Attend& task, int64_t first, int64_t count, float* tile) {
  const kvern::Context& context = task.context;
  T* room = reinterpret_cast<T*>(tile + kAttendRows * (padded(task.dim) + padded(task.rank)));
  for (int64_t r = 0; r < count; ++r) {
    if (context.dtype == KVERN_LATENT8) {
      fetch_row(context, smaller(first + r + kAttendRows, task.end - 1), task.dim, task.rank);
      decode_stretch<V>(key_of<V>(context, first + r, room), 0, task.dim, tile + r * kStep);
      continue;
    }
    const T* stored = row_at<T>(context, first + r);
    const int64_t ahead = row_at<T>(context, smaller(first + r + kAttendRows, task.end - 1)) - stored;
    const T* key = key_of<V>(context, first + r, room);
    decode_stretch<V>(key, key == stored ? ahead : 0, task.dim, tile + r * kStep);
    if (are_shared(context)) continue;
    decode_stretch<V>(stored + context.value_at, ahead, task.rank, tile + padded(task.dim) * kAttendRows + r * kStep);
  }
}

// out[c][g] = q[g] . row c, for C rows and G registers of lanes
template <class V, int G, int C>
inline void score(const Attend& task, const float* q, const float* tile, float* out) {
  typename V::reg sums[G][C];
  clear<V>(sums);
  for (int64_t first = 0; first < task.dim; first += kStep) {
    const float* rows = tile + first * kAttendRows;
    const int64_t count = smaller(kStep, task.dim - first);
    for (int64_t d = 0; d < count; ++d) {
      typename V::reg lanes[G];
      for (int g = 0; g < G; ++g) lanes[g] = V::load(q + (g * task.dim + first + d) * V::width);
      for (int c = 0; c < C; ++c) {
        const auto number = V::set1(rows[c * kStep + d]);
        for (int g = 0; g < G; ++g) sums[g][c] = V::fma(lanes[g], number, sums[g][c]);
      }
    }
  }
  const auto scale = V::set1(task.scale);
  for (int c = 0; c < C; ++c) {
    for (int g = 0; g < G; ++g) V::store(out + (c * G + g) * V::width, V::mul(sums[g][c], scale));
  }
}

// Scores to weights in place, 0 for rows that a lane does not see; updates the running maximum and the sum of weights,
// returns what earlier sums shrink by.
template <class V, int G, bool kRagged>
inline typename V::reg weigh(float* scores, int64_t count, const float* limits, float* top, float* total) {
  const auto old = V::load(top);
  const auto limit = V::load(limits);
  auto now = old;
  for (int64_t c = 0; c < count; ++c) {
    const auto larger = V::max(V::load(scores + c * G * V::width), now);
    now = kRagged ? V::keep(limit, static_cast<float>(c), larger, now) : larger;
  }
  auto sum = V::zero();
  for (int64_t c = 0; c < count; ++c) {
    float* at = scores + c * G * V::width;
    auto weight = V::exp2(V::sub(V::load(at), now));
    if (kRagged) weight = V::keep(limit, static_cast<float>(c), weight, V::zero());
    V::store(at, weight);
    sum = V::add(sum, weight);
  }
  const auto shrink = V::exp2(V::sub(old, now));
  V::store(top, now);
  V::store(total, V::fma(V::load(total), shrink, sum));
  return shrink;
}

// sums[g][r .. r + B] = sums * shrink + sum_c weights[c][g] * row c
template <class V, int G, int B, bool kRagged>
inline void add_values(const float* tile, int64_t count, const float* limits, const float* weights, int64_t r,
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
      for (int g = 0; g < G; ++g) {
        const auto more = V::fma(weight[g], number, acc[g][b]);
        // 0 times an infinity is a NaN
        acc[g][b] = kRagged ? V::keep(V::load(limits + g * V::width), static_cast<float>(c), more, acc[g][b]) : more;
      }
    }
  }
  for (int g = 0; g < G; ++g) {
    for (int b = 0; b < B; ++b) V::store(sums[g] + (r + b) * V::width, acc[g][b]);
  }
}

template <class V, int G, bool kRagged>
void attend_tile(const Attend& task, int64_t vec, const float* tile, int64_t count, const float* limits,
                 float* weights) {
  constexpr int C = V::sums / G;
  static_assert(kAttendRows % C == 0 && kStep % C == 0);
  const float* q = static_cast<const float*>(task.q) + vec * task.dim * V::width;
  for (int64_t c = 0; c < count; c += C) score<V, G, C>(task, q, tile + c * kStep, weights + c * G * V::width);
  float* sums[G];
  typename V::reg shrink[G];
  for (int g = 0; g < G; ++g) {
    sums[g] = task.partial + (vec + g) * (task.rank + 2) * V::width;
    float* top = sums[g] + task.rank * V::width;
    shrink[g] = weigh<V, G, kRagged>(weights + g * V::width, count, limits + g * V::width, top, top + V::width);
  }
  const float* values = are_shared(task.context) ? tile : tile + padded(task.dim) * kAttendRows;
  int64_t r = 0;
  for (; r + C <= task.rank; r += C) {
    add_values<V, G, C, kRagged>(values, count, limits, weights, r, shrink, sums);
  }
  for (; r < task.rank; ++r) add_values<V, G, 1, kRagged>(values, count, limits, weights, r, shrink, sums);
}

template <class V, int G>
inline void attend_lanes(const Attend& task, int64_t vec, const float* tile, int64_t first, int64_t count,
                         float* weights) {
  const int64_t* seen = task.seen + vec * V::width;
  const Sight sight = sight_of(seen, G * V::width, first, count);
  if (sight.count == 0) return;
  float limits[G * V::width] = {};
  if (sight.is_ragged) {
    limits_of(seen, G * V::width, first, sight.count, limits);
    attend_tile<V, G, true>(task, vec, tile, sight.count, limits, weights);
  } else {
    attend_tile<V, G, false>(task, vec, tile, sight.count, limits, weights);
  }
}

template <class V>
void attend(const Attend& task) {
  float* tile = task.scratch;
  float* weights = tile + kAttendRows * 2 * (padded(task.dim) + padded(task.rank));
  for (int64_t vec = 0; vec < task.vecs; ++vec) {
    float* sums = task.partial + vec * (task.rank + 2) * V::width;
    std::memset(sums, 0, static_cast<size_t>((task.rank + 2) * V::width) * sizeof(float));
    V::store(sums + task.rank * V::width, V::set1(-FLT_MAX));  // not -inf: a score of -inf must weigh nothing
  }
  for (int64_t first = task.begin; first < task.end; first += kAttendRows) {
    const int64_t count = smaller(kAttendRows, task.end - first);
    if (task.context.dtype == KVERN_BF16) {
      decode_rows<V, uint16_t>(task, first, count, tile);
    } else {
      decode_rows<V, float>(task, first, count, tile);
    }
    int64_t vec = 0;
    for (; vec + V::head_vecs <= task.vecs; vec += V::head_vecs) {
      attend_lanes<V, V::head_vecs>(task, vec, tile, first, count, weights);
    }
    for (; vec < task.vecs; ++vec) attend_lanes<V, 1>(task, vec, tile, first, count, weights);
  }
}

template <class V>
void merge(const kvern::Merge& task) {
  typename V::reg weights[kvern::kMergeParts];
  const float* tops = task.parts + task.rank * V::width;
  auto top = V::set1(-FLT_MAX);
  for (int64_t part = 0; part < task.count; ++part) top = V::max(V::load(tops + part * task.stride), top);
  auto total = V::zero();
  for (int64_t part = 0; part < task.count; ++part) {
    weights[part] = V::exp2(V::sub(V::load(tops + part * task.stride), top));
    total = V::fma(weights[part], V::load(tops + part * task.stride + V::width), total);
  }
  for (int64_t part = 0; part < task.count; ++part) weights[part] = V::divide(weights[part], total);
  for (int64_t r = task.begin; r < task.end; ++r) {
    auto sum = V::zero();
    for (int64_t part = 0; part < task.count; ++part) {
      sum = V::fma(weights[part], V::load(task.parts + part * task.stride + r * V::width), sum);
    }
    V::store(task.out + (r - task.begin) * V::width, sum);
  }
}

}  // namespace
