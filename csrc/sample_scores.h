// The scores of one row: their largest, how they are drawn from, and what they say of a token.
#pragma once

#include <cmath>
#include <cstdint>

#include "kvern.h"
#include "sample_cut.h"

namespace kvern {

const ScoreKernels<float>& kernels_for(const float*);  // of the instruction set in use
const ScoreKernels<double>& kernels_for(const double*);

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
  bool is_light(int64_t span, double by) const;

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

}  // namespace kvern
