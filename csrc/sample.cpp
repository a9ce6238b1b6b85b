// kvern_sample and kvern_logprobs: passes over the vocabulary by the loops of sample.h, decisions here.
//
// The largest score of each span of 256 comes first: it finds the largest of all, bounds the k-th largest from below, and
// tells which spans hold a score above some bound. Without a cut, sums of weights in FP32 say where the cumulative sum
// passes its target; where their error leaves that open, and only there, they are computed in FP64. top_p first looks among
// the scores within kNear temperatures of the largest. Where a cut needs an order, scores fall into bins, those of the bin
// in which the sum is reached into bins again, and only the last hundred are sorted.
#include "sample.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"
#include "kvern.h"
#include "pool.h"

namespace kvern {
namespace {

constexpr double kRough = 3e-5;     // of a total: error of a difference of two rough sums, each of which is off by 1e-5
constexpr double kNothing = 60.0;   // temperatures below the largest: e^-60 for each id is less than FP64 tells apart
constexpr double kNear = 10.0;      // temperatures within which top_p looks first,
constexpr int64_t kFew = 8;         // if at most one id in so many is there
constexpr double kReach = 40.0;     // temperatures that the bins cover at most
constexpr int32_t kBins = 512;
constexpr int64_t kCopies = 4;      // of the sums of bins, so that equal scores do not wait for each other
constexpr int64_t kSorted = 128;    // scores that are sorted at once
constexpr int64_t kSlice = 4096;    // scores whose bins are known at once
constexpr int64_t kGroup = 32;      // of these, counted at once
constexpr double kTiny = 1e-30;     // scores that differ by less are not put into bins
constexpr double kDistances[] = {2, 4, 6, 8, 10, 13, 20};  // from the largest, within which many largest are looked for

const SampleKernels& kernels() {
#if defined(KVERN_X86)
  const char* name = kernels_in_use().name;
  if (std::strncmp(name, "avx512", 6) == 0 || std::strcmp(name, "amx") == 0) return kAvx512Sample;
  if (std::strcmp(name, "avx2") == 0) return kAvx2Sample;
#endif
  return kScalarSample;
}

const ScoreKernels<float>& kernels_for(const float*) { return kernels().single; }
const ScoreKernels<double>& kernels_for(const double*) { return kernels().edited; }

// Roughly, where that is possible: edited scores are few rows', and factors may be beyond FP32.
bool has_rough_sums(const float*, double by) { return by > 1e-30 && by < 1e30; }
bool has_rough_sums(const double*, double) { return false; }
double rough_sum(const float* x, int64_t size, double largest, double by) { return kernels().rough_sum(x, size, largest, by); }
double rough_sum(const double* x, int64_t size, double largest, double by) { return kernels().edited.sum(x, size, largest, by); }

int64_t round_up(int64_t size) { return (size + kGroup - 1) / kGroup * kGroup; }

int64_t spans_of(int64_t size) { return (size + kSpan - 1) / kSpan; }

template <class V>
auto* room_in(V& buffer, int64_t size) {
  if (buffer.size() < static_cast<size_t>(size)) buffer.resize(static_cast<size_t>(size));
  return buffer.data();
}

template <class T>
T above(T x) { return std::nextafter(x, std::numeric_limits<T>::infinity()); }

template <class T>
T below(double x) { return std::nextafter(static_cast<T>(x), -std::numeric_limits<T>::infinity()); }

// Buffers that a thread keeps.
template <class T>
struct Room {
  std::vector<T> edited, maxima, order, values, inside;
  std::vector<double> weights, sums, inside_weights;
  std::vector<int32_t> ids;
};

template <class T>
Room<T>& my_room() {
  thread_local Room<T> room;
  return room;
}

// The scores that stay: those above `least`, and of those equal to it the ones up to position `last`.
template <class T>
struct Cut {
  T least;
  int64_t last;
  double reached;  // what they weigh
};

template <class T>
class Scores {
 public:
  Scores(const T* x, int64_t size) : of(kernels_for(x)), room(my_room<T>()), x(x), size(size) {
    maxima = room_in(room.maxima, spans_of(size));
    is_number = of.maxima(x, size, maxima);
    largest = *std::max_element(maxima, maxima + spans_of(size));
  }

  bool is_finite() const { return is_number && std::isfinite(largest); }

  int64_t argmax() const {
    const int64_t span = std::find(maxima, maxima + spans_of(size), largest) - maxima;
    return std::find(x + span * kSpan, x + size, largest) - x;
  }

  int64_t draw(const kvern_draw& row);
  double log_sum() const;
  int64_t best(int64_t count, int64_t* ids) const;

 private:
  int64_t span_size(int64_t span) const { return std::min(kSpan, size - span * kSpan); }
  bool is_light(int64_t span, double by) const { return (static_cast<double>(maxima[span]) - largest) * by < -kNothing; }

  double sum_spans(double by, bool is_rough, double* sums) const;
  int64_t count(T least) const;
  T least_of(int64_t count) const;
  int64_t gather(T least) const;
  int64_t keep_min_p(int64_t n, double min_p, double by) const;
  int64_t keep_largest(int64_t n, int64_t count) const;
  int64_t draw_from_all(double by, double uniform) const;
  int64_t draw_near(const kvern_draw& row, double by) const;
  int64_t draw_kept(const kvern_draw& row, double by, const T* values, int64_t n) const;

  const ScoreKernels<T>& of;
  Room<T>& room;
  const T* x;
  int64_t size;
  T* maxima;
  bool is_number;
  T largest;
};

// The first position at which the cumulative sum passes `target`, or the last that weighs.
int64_t position_in(const double* weights, int64_t n, double before, double target) {
  int64_t last = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (weights[i] <= 0) continue;
    last = i;
    before += weights[i];
    if (before > target) return i;
  }
  return last;
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

// Sums of the weights by bin; `sums` [kBins + 1].
template <class T>
void sum_bins(const ScoreKernels<T>& of, const T* x, const double* weights, int64_t n, T largest, T width, double* sums) {
  double copies[kCopies][kBins + 1] = {};
  int32_t bins[kSlice];
  for (int64_t at = 0; at < n; at += kSlice) {
    const int64_t count = std::min(kSlice, n - at);
    of.bins(x + at, count, largest, width, kBins, bins);
    int64_t i = 0;
    for (; i + kCopies <= count; i += kCopies) {
      for (int64_t c = 0; c < kCopies; ++c) copies[c][bins[i + c]] += weights[at + i + c];
    }
    for (; i < count; ++i) copies[0][bins[i]] += weights[at + i];
  }
  for (int32_t b = 0; b <= kBins; ++b) sums[b] = (copies[0][b] + copies[1][b]) + (copies[2][b] + copies[3][b]);
}

// What fell into `bin` goes to `values` and `inside`; returns how many did, adds to `larger` how many fell into lower bins.
// Few do, so groups without one are passed over.
template <class T>
int64_t take_bin(const ScoreKernels<T>& of, const T* x, const double* weights, int64_t n, T largest, T width, int32_t bin,
                 T* values, double* inside, int64_t& larger) {
  int32_t bins[kSlice];
  int64_t found = 0;
  for (int64_t at = 0; at < n; at += kSlice) {
    const int64_t count = std::min(kSlice, n - at);
    of.bins(x + at, count, largest, width, kBins, bins);
    for (int64_t i = count; i < round_up(count); ++i) bins[i] = kBins + 1;
    for (int64_t group = 0; group < count; group += kGroup) {
      int32_t lower = 0, equal = 0;
      for (int64_t i = group; i < group + kGroup; ++i) {
        lower += bins[i] < bin;
        equal += bins[i] == bin;
      }
      larger += lower;
      for (int64_t i = group; equal > 0; ++i) {  // found never passes at + i: values and inside may be x and weights
        if (bins[i] != bin) continue;
        values[found] = x[at + i];
        inside[found++] = weights[at + i];
        --equal;
      }
    }
  }
  return found;
}

// Position of the `nth` score, counted from 1, that equals `value`.
template <class T>
int64_t position_of(const ScoreKernels<T>& of, const T* x, int64_t n, T value, int64_t nth) {
  for (int64_t at = 0; at < n; at += kSpan) {
    const int64_t size = std::min(kSpan, n - at);
    const int64_t equal = of.count(x + at, size, value) - of.count(x + at, size, above(value));
    if (equal < nth) {
      nth -= equal;
      continue;
    }
    for (int64_t i = at; i < at + size; ++i) {
      if (x[i] == value && --nth == 0) return i;
    }
  }
  return n - 1;
}

// The fewest largest scores whose weights reach `needed`. What remains open lies, level by level, in one bin.
template <class T>
Cut<T> fewest(const ScoreKernels<T>& of, Room<T>& room, const T* all, const double* all_weights, int64_t size, T largest,
              double needed, double reach) {
  const T* x = all;
  const double* weights = all_weights;
  int64_t n = size, larger = 0;
  double before = 0;
  T low = of.smallest(x, n);
  while (n > kSorted && static_cast<double>(largest) - low > kTiny) {
    const double range = std::min({static_cast<double>(largest) - low, reach, double{std::numeric_limits<T>::max()}});
    const T width = static_cast<T>(range);
    if (!(width > kTiny)) break;
    double sums[kBins + 1];
    sum_bins(of, x, weights, n, largest, width, sums);
    int32_t bin = 0, lowest = kBins;
    of.bins(&low, 1, largest, width, kBins, &lowest);
    while (bin < lowest && before + sums[bin] < needed) before += sums[bin++];
    if (bin == kBins && range >= reach) return {std::numeric_limits<T>::lowest(), size, before + sums[kBins]};  // all but nothing
    T* values = room_in(room.inside, n);
    double* inside = room_in(room.inside_weights, n);
    n = take_bin(of, x, weights, n, largest, width, bin, values, inside, larger);
    x = values;
    weights = inside;
    low = of.smallest(x, n);
    largest = *std::max_element(x, x + n);
  }
  int64_t kept = 0;
  T least = low;
  if (largest == low) {
    const double wanted = weights[0] > 0 ? std::ceil((needed - before) / weights[0]) : static_cast<double>(n);
    kept = static_cast<int64_t>(std::clamp(wanted, 1.0, static_cast<double>(n)));
    before += static_cast<double>(kept) * weights[0];
  } else {
    std::vector<std::pair<T, double>> order(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) order[static_cast<size_t>(i)] = {x[i], weights[i]};
    std::sort(order.begin(), order.end(), std::greater<std::pair<T, double>>());
    do {
      least = order[static_cast<size_t>(kept)].first;
      before += order[static_cast<size_t>(kept++)].second;
    } while (kept < n && before < needed);
  }
  const int64_t above_least = of.count(all, size, above(least));
  return {least, position_of(of, all, size, least, larger + kept - above_least), before};
}

// Weights outside the cut become 0; sums of spans of the others.
template <class T>
double apply(const ScoreKernels<T>& of, const Cut<T>& cut, const T* x, int64_t n, double* weights, double* sums) {
  double total = 0;
  for (int64_t at = 0; at < n; at += kSpan) {
    const int64_t count = std::min(kSpan, n - at), first = std::clamp<int64_t>(cut.last + 1 - at, 0, count);
    double sum = of.cut(x + at, first, cut.least, weights + at);
    sum += of.cut(x + at + first, count - first, above(cut.least), weights + at + first);
    total += sums[at / kSpan] = sum;
  }
  return total;
}

// The position in n weights whose spans weigh `sums`, where the cumulative sum passes `target`.
int64_t locate(const double* weights, const double* sums, int64_t n, double target) {
  const int64_t spans = spans_of(n);
  int64_t span = 0;
  double before = 0;
  while (span < spans && before + sums[span] <= target) before += sums[span++];
  if (span == spans) {  // rounding may put the target behind the last
    do {
      --span;
    } while (span > 0 && sums[span] <= 0);
    before -= sums[span];
  }
  return span * kSpan + position_in(weights + span * kSpan, std::min(kSpan, n - span * kSpan), before, target);
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

bool is_sound(const kvern_draw& row) {
  if (!row.logits || row.size < 1 || row.size >= int64_t{1} << 31 || row.edits < 0 || row.top_k < 0) return false;
  if (row.edits > 0 && (!row.edited || !row.scores)) return false;
  for (int64_t i = 0; i < row.edits; ++i) {
    if (row.edited[i] < 0 || row.edited[i] >= row.size) return false;
  }
  const auto is_share = [](double value) { return value >= 0 && value <= 1; };
  if (!is_share(row.top_p) || !is_share(row.min_p) || !(row.uniform >= 0 && row.uniform < 1)) return false;
  return row.temperature == 0 ||
         (row.temperature > 0 && std::isfinite(row.temperature) && std::isfinite(1 / row.temperature));
}

bool is_sound(const kvern_scored& row) {
  return row.logits && row.logprobs && row.size >= 1 && row.size < int64_t{1} << 31 && row.best >= 0 && row.best <= row.size &&
         (row.best == 0 || row.ids);
}

int64_t drawn(const kvern_draw& row) {
  Scores<float> scores(row.logits, row.size);
  if (!scores.is_finite()) return KVERN_NOT_FINITE;
  if (row.edits == 0) return scores.draw(row);
  double* x = room_in(my_room<double>().edited, row.size);
  std::copy(row.logits, row.logits + row.size, x);
  for (int64_t i = 0; i < row.edits; ++i) x[row.edited[i]] = row.scores[i];
  Scores<double> edited(x, row.size);
  if (!edited.is_finite()) return KVERN_NOTHING_LEFT;
  return edited.draw(row);
}

void score(const kvern_scored& row) {
  const Scores<float> scores(row.logits, row.size);
  row.logprobs[0] = std::numeric_limits<double>::quiet_NaN();
  if (!scores.is_finite()) return;
  const double whole = scores.log_sum();
  const bool is_inside = row.token >= 0 && row.token < row.size;
  row.logprobs[0] = is_inside ? row.logits[row.token] - whole : -std::numeric_limits<double>::infinity();
  const int64_t n = scores.best(row.best, row.ids);
  for (int64_t i = 0; i < n; ++i) row.logprobs[1 + i] = row.logits[row.ids[i]] - whole;
}

template <class R>
bool are_sound(const R* rows, int64_t n) {
  return n >= 0 && (n == 0 || (rows && std::all_of(rows, rows + n, [](const R& row) { return is_sound(row); })));
}

}  // namespace
}  // namespace kvern

using namespace kvern;

int kvern_sample(const kvern_draw* rows, int64_t n, int64_t* ids) {
  if (!are_sound(rows, n) || (n > 0 && !ids)) return KVERN_BAD_ARGUMENT;
  struct Work {
    const kvern_draw* rows;
    int64_t* ids;
  } work{rows, ids};
  parallel_for(
      n,
      [](const void* context, int64_t i) {
        const auto& mine = *static_cast<const Work*>(context);
        mine.ids[i] = drawn(mine.rows[i]);
      },
      &work);
  return KVERN_OK;
}

int kvern_logprobs(const kvern_scored* rows, int64_t n) {
  if (!are_sound(rows, n)) return KVERN_BAD_ARGUMENT;
  parallel_for(n, [](const void* context, int64_t i) { score(static_cast<const kvern_scored*>(context)[i]); }, rows);
  return KVERN_OK;
}
