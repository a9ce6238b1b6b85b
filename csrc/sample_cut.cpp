// top_p without sorting a vocabulary: scores fall into bins, those of the bin in which the sum is reached into bins
// again, and only the last hundred are sorted.
#include "sample_cut.h"

#include <functional>
#include <utility>

namespace kvern {
namespace {

constexpr int32_t kBins = 512;
constexpr int64_t kCopies = 4;      // of the sums of bins, so that equal scores do not wait for each other
constexpr int64_t kSorted = 128;    // scores that are sorted at once
constexpr int64_t kSlice = 4096;    // scores whose bins are known at once
constexpr int64_t kGroup = 32;      // of these, counted at once
constexpr double kTiny = 1e-30;     // scores that differ by less are not put into bins

int64_t round_up(int64_t size) { return (size + kGroup - 1) / kGroup * kGroup; }

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

}  // namespace

// What remains open lies, level by level, in one bin.
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

template Cut<float> fewest(const ScoreKernels<float>&, Room<float>&, const float*, const double*, int64_t, float, double,
                              double);
template double apply(const ScoreKernels<float>&, const Cut<float>&, const float*, int64_t, double*, double*);
template Cut<double> fewest(const ScoreKernels<double>&, Room<double>&, const double*, const double*, int64_t, double, double,
                              double);
template double apply(const ScoreKernels<double>&, const Cut<double>&, const double*, int64_t, double*, double*);

}  // namespace kvern
