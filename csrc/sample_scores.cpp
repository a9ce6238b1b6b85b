// The largest score of each span of 256 comes first: it finds the largest of all, bounds the k-th largest from below, and
// tells which spans hold a score above some bound. Without a cut, sums of weights in FP32 say where the cumulative sum
// passes its target; where their error leaves that open, and only there, they are computed in FP64. top_p first looks among
// the scores within kNear temperatures of the largest.
#include "sample_scores.h"

#include <cstring>
#include <functional>

#include "kernels.h"

namespace kvern {
namespace {

constexpr double kRough = 3e-5;     // of a total: error of a difference of two rough sums, each of which is off by 1e-5
constexpr double kNothing = 60.0;   // temperatures below the largest: e^-60 for each id is less than FP64 tells apart
constexpr double kNear = 10.0;      // temperatures within which top_p looks first,
constexpr int64_t kFew = 8;         // if at most one id in so many is there
constexpr double kReach = 40.0;     // temperatures that the bins cover at most
constexpr double kDistances[] = {2, 4, 6, 8, 10, 13, 20};  // from the largest, within which many largest are looked for

const SampleKernels& kernels() {
#if defined(KVERN_X86)
  const char* name = kernels_in_use().name;
  if (std::strncmp(name, "avx512", 6) == 0 || std::strcmp(name, "amx") == 0) return kAvx512Sample;
  if (std::strcmp(name, "avx2") == 0) return kAvx2Sample;
#endif
  return kScalarSample;
}

// Roughly, where that is possible: edited scores are few rows', and factors may be beyond FP32.
bool has_rough_sums(const float*, double by) { return by > 1e-30 && by < 1e30; }
bool has_rough_sums(const double*, double) { return false; }
double rough_sum(const float* x, int64_t size, double largest, double by) { return kernels().rough_sum(x, size, largest, by); }
double rough_sum(const double* x, int64_t size, double largest, double by) { return kernels().edited.sum(x, size, largest, by); }

}  // namespace

const ScoreKernels<float>& kernels_for(const float*) { return kernels().single; }
const ScoreKernels<double>& kernels_for(const double*) { return kernels().edited; }

template <class T>
bool Scores<T>::is_light(int64_t span, double by) const {
  return (static_cast<double>(maxima[span]) - largest) * by < -kNothing;
}

template <class T>
double Scores<T>::sum_spans(double by, bool is_rough, double* sums) const {
  double total = 0;
  for (int64_t span = 0; span < spans_of(size); ++span) {
    const T* first = x + span * kSpan;
    if (is_light(span, by)) {
      sums[span] = 0;
    } else {
      sums[span] = is_rough ? rough_sum(first, span_size(span), largest, by) : of.sum(first, span_size(span), largest, by);
    }
    total += sums[span];
  }
  return total;
}

template <class T>
int64_t Scores<T>::count(T least) const {
  int64_t found = 0;
  for (int64_t span = 0; span < spans_of(size); ++span) {
    if (maxima[span] >= least) found += of.count(x + span * kSpan, span_size(span), least);
  }
  return found;
}

// A score such that `count` or more, if there are so many finite ones, are not below it: few more if it can be had cheaply.
template <class T>
T Scores<T>::least_of(int64_t count) const {
  T least = std::numeric_limits<T>::lowest();
  const int64_t spans = spans_of(size);
  if (count <= spans) {
    T* order = room_in(room.order, spans);
    std::copy(maxima, maxima + spans, order);
    std::nth_element(order, order + count - 1, order + spans, std::greater<T>());
    return std::max(least, order[count - 1]);
  }
  for (const double distance : kDistances) {
    const T near = below<T>(largest - distance);
    if (this->count(near) >= count) return std::max(least, near);
  }
  return least;
}

// Positions and values of all scores from `least` on, into room.ids and room.values; their number.
template <class T>
int64_t Scores<T>::gather(T least) const {
  int32_t* ids = room_in(room.ids, size);
  int64_t n = 0;
  for (int64_t span = 0; span < spans_of(size); ++span) {
    if (!(maxima[span] >= least)) continue;
    const int64_t first = span * kSpan, end = first + span_size(span);
    for (int64_t i = first; i < end; ++i) {
      ids[n] = static_cast<int32_t>(i);
      n += x[i] >= least;
    }
  }
  T* values = room_in(room.values, n);
  for (int64_t i = 0; i < n; ++i) values[i] = x[ids[i]];
  return n;
}

template <class T>
int64_t Scores<T>::keep_min_p(int64_t n, double min_p, double by) const {
  const double least = std::log(min_p);
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    room.ids[static_cast<size_t>(kept)] = room.ids[static_cast<size_t>(i)];
    room.values[static_cast<size_t>(kept)] = room.values[static_cast<size_t>(i)];
    kept += (static_cast<double>(room.values[static_cast<size_t>(i)]) - largest) * by >= least;
  }
  return kept;
}

template <class T>
int64_t Scores<T>::keep_largest(int64_t n, int64_t count) const {
  if (n <= count) return n;
  int32_t* ids = room.ids.data();
  T *values = room.values.data(), *order = room_in(room.order, n);
  std::copy(values, values + n, order);
  std::nth_element(order, order + count - 1, order + n, std::greater<T>());
  const T least = order[count - 1];
  int64_t equal = count - std::count_if(values, values + n, [&](T value) { return value > least; }), kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    const bool is_equal = values[i] == least, stays = values[i] > least || (is_equal && equal > 0);
    equal -= is_equal;
    ids[kept] = ids[i];
    values[kept] = values[i];
    kept += stays;
  }
  return kept;
}

template <class T>
int64_t Scores<T>::draw_from_all(double by, double uniform) const {
  double* sums = room_in(room.sums, spans_of(size));
  double* weights = room_in(room.weights, kSpan);
  for (const bool is_rough : {true, false}) {
    if (is_rough && !has_rough_sums(x, by)) continue;
    const double total = sum_spans(by, is_rough, sums), target = uniform * total, slack = is_rough ? kRough * total : 0.0;
    int64_t span = 0;
    double before = 0;
    while (span < spans_of(size) - 1 && before + sums[span] <= target) before += sums[span++];
    while (span > 0 && sums[span] <= 0) before -= sums[--span];  // rounding may put the target behind the last
    of.weigh(x + span * kSpan, span_size(span), largest, by, weights);
    const int64_t at = position_in(weights, span_size(span), before, target);
    if (!is_rough) return span * kSpan + at;
    for (int64_t i = 0; i < at; ++i) before += weights[i];
    if (before + slack < target && target + slack < before + weights[at]) return span * kSpan + at;
  }
  return argmax();  // not reached: the second pass decides
}

// top_p where few scores are near the largest: only they are weighed in FP64, if the others' rough sum decides.
template <class T>
int64_t Scores<T>::draw_near(const kvern_draw& row, double by) const {
  double* sums = room_in(room.sums, spans_of(size));
  const T near = std::max(std::numeric_limits<T>::lowest(), below<T>(largest - kNear * row.temperature));
  if (count(near) <= size / kFew) {
    const int64_t n = gather(near);
    for (const bool is_rough : {true, false}) {
      if (is_rough && !has_rough_sums(x, by)) continue;
      const double total = sum_spans(by, is_rough, sums), slack = is_rough ? kRough * total : 0.0;
      const double needed = row.top_p * (total - slack), enough = row.top_p * (total + slack);
      double* weights = room_in(room.weights, n);
      if (of.weigh(room.values.data(), n, largest, by, weights) < enough) continue;
      const Cut<T> cut = fewest(of, room, room.values.data(), weights, n, largest, needed, kReach * row.temperature);
      if (cut.reached < enough) continue;
      const double kept = apply(of, cut, room.values.data(), n, weights, sums);
      return room.ids[static_cast<size_t>(locate(weights, sums, n, row.uniform * kept))];
    }
  }
  return draw_kept(row, by, x, size);
}

// top_p of the n scores `values`, then the position of the draw.
template <class T>
int64_t Scores<T>::draw_kept(const kvern_draw& row, double by, const T* values, int64_t n) const {
  double *weights = room_in(room.weights, n), *sums = room_in(room.sums, spans_of(n));
  const double total = of.weigh(values, n, largest, by, weights);
  Cut<T> cut{std::numeric_limits<T>::lowest(), n, total};
  if (row.top_p < 1) cut = fewest(of, room, values, weights, n, largest, row.top_p * total, kReach * row.temperature);
  return locate(weights, sums, n, row.uniform * apply(of, cut, values, n, weights, sums));
}

template <class T>
int64_t Scores<T>::draw(const kvern_draw& row) {
  if (row.temperature == 0) return argmax();
  const double by = 1 / row.temperature;
  const bool is_short = row.top_k > 0 && row.top_k < size;
  if (!is_short && row.min_p <= 0) return row.top_p < 1 ? draw_near(row, by) : draw_from_all(by, row.uniform);
  T least = std::numeric_limits<T>::lowest();
  if (row.min_p > 0) least = std::max(least, below<T>(largest + std::log(row.min_p) * row.temperature));
  if (is_short) least = std::max(least, least_of(row.top_k));
  int64_t n = gather(least);
  if (row.min_p > 0) n = keep_min_p(n, row.min_p, by);
  if (is_short) n = keep_largest(n, row.top_k);
  return room.ids[static_cast<size_t>(draw_kept(row, by, room.values.data(), n))];
}

template <class T>
double Scores<T>::log_sum() const {
  return largest + std::log(sum_spans(1.0, false, room_in(room.sums, spans_of(size))));
}

// The `count` largest, falling, the lower id first among equals.
template <class T>
int64_t Scores<T>::best(int64_t count, int64_t* ids) const {
  if (count == 0) return 0;
  const int64_t n = keep_largest(gather(least_of(count)), count);
  std::copy(room.ids.begin(), room.ids.begin() + n, ids);
  std::sort(ids, ids + n, [&](int64_t a, int64_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); });
  for (int64_t i = n, id = 0; i < count; ++id) {  // fewer are finite: those at -inf follow
    if (x[id] == -std::numeric_limits<T>::infinity()) ids[i++] = id;
  }
  return count;
}

template class Scores<float>;
template class Scores<double>;

}  // namespace kvern
