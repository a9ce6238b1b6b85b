// kvern_sample and kvern_logprobs: rows are checked, and shared out among the threads. What is done with the scores of
// a row is in sample_scores.cpp, top_p's cut in sample_cut.cpp, the loops over the vocabulary in sample_body.h.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kvern.h"
#include "pool.h"
#include "sample_scores.h"

namespace kvern {
namespace {

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
