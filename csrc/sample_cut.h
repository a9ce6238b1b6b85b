// What sample_scores.cpp and sample_cut.cpp share: a thread's buffers, and the cut that top_p makes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "sample.h"

namespace kvern {

inline int64_t spans_of(int64_t size) { return (size + kSpan - 1) / kSpan; }

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

// The fewest largest of `size` scores `x` whose weights reach `needed`; what is `reach` below the largest weighs nothing.
template <class T>
Cut<T> fewest(const ScoreKernels<T>& of, Room<T>& room, const T* x, const double* weights, int64_t size, T largest,
              double needed, double reach);

// Weights outside the cut become 0; `sums` of spans of the others. Returns what they weigh.
template <class T>
double apply(const ScoreKernels<T>& of, const Cut<T>& cut, const T* x, int64_t n, double* weights, double* sums);

// The first position at which the cumulative sum passes `target`, or the last that weighs.
int64_t position_in(const double* weights, int64_t n, double before, double target);

// The position in n weights whose spans weigh `sums`, where the cumulative sum passes `target`.
int64_t locate(const double* weights, const double* sums, int64_t n, double target);

}  // namespace kvern
