// Draws and log-probabilities against sorting everything, rows in buffers of exactly their size, and hostile parameters.
#include <algorithm>
#include <limits>
#include <numeric>

#include "check.h"

namespace {

constexpr double kClose = 1e-9;  // distance from a boundary within which rounding may decide
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Case {
  int64_t size;
  double temperature, top_p;
  int64_t top_k;
  double min_p;
  int spread;  // 0: all equal, else scores are multiples of 2^-10 times it, of 1/2 if negative
  bool is_edited;
};

std::vector<float> logits_of(Random& random, const Case& one) {
  std::vector<float> logits(static_cast<size_t>(one.size));
  for (float& x : logits) {
    const float scale = one.spread < 0 ? 0.5f : 0x1p-10f;
    x = std::round(random.number() * static_cast<float>(std::abs(one.spread)) / scale) * scale;
    if (random.engine() % 7 == 0) x = -std::numeric_limits<float>::infinity();
  }
  logits[random.engine() % logits.size()] = 1.0f;
  return logits;
}

// The id at `uniform`, or -1 where rounding may decide.
int64_t expected(const std::vector<double>& x, const kvern_draw& row) {
  std::vector<int64_t> order(x.size()), kept;
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return x[static_cast<size_t>(a)] > x[static_cast<size_t>(b)]; });
  if (row.temperature == 0) return order[0];
  const double largest = x[static_cast<size_t>(order[0])];
  const auto weight = [&](int64_t id) { return std::exp((x[static_cast<size_t>(id)] - largest) / row.temperature); };
  for (const int64_t id : order) {
    if (row.min_p > 0 && row.min_p < 1 && std::abs(weight(id) - row.min_p) < kClose) return -1;
    if (weight(id) >= row.min_p && (row.top_k == 0 || static_cast<int64_t>(kept.size()) < row.top_k)) kept.push_back(id);
  }
  double total = 0, sum = 0;
  for (const int64_t id : kept) total += weight(id);
  size_t count = 0;
  while (count < kept.size() && (row.top_p == 1 || sum < row.top_p * total)) {
    if (row.top_p < 1 && std::abs(sum + weight(kept[count]) - row.top_p * total) < kClose * total) return -1;
    sum += weight(kept[count++]);
  }
  kept.resize(std::max<size_t>(count, 1));
  std::sort(kept.begin(), kept.end());
  total = 0;
  for (const int64_t id : kept) total += weight(id);
  sum = 0;
  for (const int64_t id : kept) {
    sum += weight(id);
    if (std::abs(sum - row.uniform * total) < kClose * total) return -1;
    if (sum > row.uniform * total) return id;
  }
  return -1;
}

void check_draws(Random& random, const Case& one) {
  constexpr int64_t kRows = 5;
  std::vector<std::vector<float>> logits;
  std::vector<kvern_draw> rows;
  const std::vector<int64_t> edited{one.size - 1, 0};
  const std::vector<double> scores{1.25, one.size > 1 ? -kInfinity : 2.0};
  for (int64_t i = 0; i < kRows; ++i) {
    logits.push_back(logits_of(random, one));
    const double uniform = static_cast<double>(random.engine() % 1000) / 1000;
    rows.push_back({logits.back().data(), edited.data(), scores.data(), one.size, one.is_edited ? 2 : 0, one.top_k,
                    one.temperature, one.top_p, one.min_p, uniform});
  }
  std::vector<int64_t> ids(kRows);
  require(kvern_sample(rows.data(), kRows, ids.data()) == KVERN_OK, "sample's code");
  for (size_t i = 0; i < kRows; ++i) {
    std::vector<double> x(logits[i].begin(), logits[i].end());
    for (int64_t e = 0; e < rows[i].edits; ++e) x[static_cast<size_t>(edited[static_cast<size_t>(e)])] = scores[static_cast<size_t>(e)];
    const int64_t id = expected(x, rows[i]);
    require(id < 0 || ids[i] == id, "sample");
  }
}

void check_logprobs(Random& random, int64_t size, int64_t best) {
  const std::vector<float> logits = logits_of(random, {size, 1, 1, 0, 0, 3, false});
  std::vector<int64_t> ids(static_cast<size_t>(best)), order(logits.size());
  std::vector<double> values(static_cast<size_t>(best + 1));
  const kvern_scored row{logits.data(), size, size / 2, best, ids.data(), values.data()};
  require(kvern_logprobs(&row, 1) == KVERN_OK, "the code of log-probabilities");
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return logits[static_cast<size_t>(a)] > logits[static_cast<size_t>(b)]; });
  double total = 0;
  for (const float x : logits) total += std::exp(double{x});
  for (size_t i = 0; i <= ids.size(); ++i) {
    const int64_t id = i == 0 ? size / 2 : order[i - 1];
    require(i == 0 || ids[i - 1] == id, "the best");
    const double value = logits[static_cast<size_t>(id)] - std::log(total);
    require(values[i] == value || std::abs(values[i] - value) < kClose, "a log-probability");
  }
}

void check_bad_rows() {
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  int64_t id = 0;
  double value = 0;
  for (const float bad : {nan, infinity, -infinity}) {
    for (const int64_t size : {1, 3, 70, 700}) {
      std::vector<float> logits(static_cast<size_t>(size), bad == -infinity ? bad : 0.0f);
      logits.back() = bad;
      const kvern_draw row{logits.data(), nullptr, nullptr, size, 0, 0, 1.0, 0.9, 0.0, 0.5};
      require(kvern_sample(&row, 1, &id) == KVERN_OK && id == KVERN_NOT_FINITE, "a row that is not finite");
      const kvern_scored scored{logits.data(), size, 0, 0, nullptr, &value};
      require(kvern_logprobs(&scored, 1) == KVERN_OK && std::isnan(value), "log-probabilities that are not finite");
    }
  }
  const std::vector<float> logits(2);
  const std::vector<int64_t> both{0, 1};
  for (const double bad : {double{nan}, kInfinity, -kInfinity}) {
    const std::vector<double> scores(2, bad);
    const kvern_draw row{logits.data(), both.data(), scores.data(), 2, 2, 0, 1.0, 0.9, 0.0, 0.5};
    require(kvern_sample(&row, 1, &id) == KVERN_OK && id == KVERN_NOTHING_LEFT, "no score left");
  }
}

void check_refusals() {
  const std::vector<float> logits(4);
  const std::vector<int64_t> edited{1, 3}, outside{1, 4}, negative{-1, 0};
  const std::vector<double> scores(2);
  int64_t id = -9;
  const kvern_draw sound{logits.data(), edited.data(), scores.data(), 4, 2, 0, 1.0, 0.5, 0.0, 0.5};
  const auto refuses = [&](auto change) {
    kvern_draw rows[] = {sound, sound};
    change(rows[1]);
    int64_t ids[] = {-9, -9};
    require(kvern_sample(rows, 2, ids) == KVERN_BAD_ARGUMENT && ids[0] == -9 && ids[1] == -9, "hostile parameters");
  };
  for (const double bad : {std::nan(""), -1.0, kInfinity, 1e-310}) refuses([=](kvern_draw& row) { row.temperature = bad; });
  for (const double bad : {std::nan(""), -0.1, 1.1, kInfinity}) {
    refuses([=](kvern_draw& row) { row.top_p = bad; });
    refuses([=](kvern_draw& row) { row.min_p = bad; });
    refuses([=](kvern_draw& row) { row.uniform = bad; });
  }
  refuses([](kvern_draw& row) { row.uniform = 1; });
  for (const int64_t bad : {int64_t{0}, int64_t{-1}, int64_t{1} << 31}) refuses([=](kvern_draw& row) { row.size = bad; });
  refuses([](kvern_draw& row) { row.top_k = -1; });
  refuses([](kvern_draw& row) { row.edits = -1; });
  refuses([](kvern_draw& row) { row.logits = nullptr; });
  refuses([](kvern_draw& row) { row.edited = nullptr; });
  refuses([](kvern_draw& row) { row.scores = nullptr; });
  refuses([&](kvern_draw& row) { row.edited = outside.data(); });
  refuses([&](kvern_draw& row) { row.edited = negative.data(); });
  require(kvern_sample(nullptr, 1, &id) == KVERN_BAD_ARGUMENT, "no rows");
  require(kvern_sample(&sound, -1, &id) == KVERN_BAD_ARGUMENT, "a negative number of rows");
  require(kvern_sample(&sound, 1, nullptr) == KVERN_BAD_ARGUMENT, "nowhere to put ids");
  require(kvern_sample(nullptr, 0, nullptr) == KVERN_OK, "no rows at all");
  double value = 0;
  for (const kvern_scored& bad : {kvern_scored{nullptr, 4, 0, 0, nullptr, &value}, kvern_scored{logits.data(), 0, 0, 0, nullptr, &value},
                                  kvern_scored{logits.data(), 4, 0, 5, &id, &value}, kvern_scored{logits.data(), 4, 0, -1, &id, &value},
                                  kvern_scored{logits.data(), 4, 0, 1, nullptr, &value}, kvern_scored{logits.data(), 4, 0, 0, nullptr, nullptr}}) {
    require(kvern_logprobs(&bad, 1) == KVERN_BAD_ARGUMENT, "hostile log-probabilities");
  }
}

}  // namespace

void check_sample() {
  Random random;
  for (const int64_t size : {1, 2, 17, 255, 257, 5000}) {
    for (const int spread : {0, 1, 4, -3}) {
      for (const double temperature : {0.0, 0.7, 5.0}) {
        for (const bool is_edited : {false, true}) {
          check_draws(random, {size, temperature, 1.0, 0, 0.0, spread, is_edited});
          check_draws(random, {size, temperature, 0.8, 0, 0.0, spread, is_edited});
          check_draws(random, {size, temperature, 1.0, 40, 0.0, spread, is_edited});
          check_draws(random, {size, temperature, 0.9, 300, 0.001, spread, is_edited});
        }
      }
    }
    check_logprobs(random, size, 0);
    check_logprobs(random, size, std::min<int64_t>(size, 9));
    check_logprobs(random, size, size);
  }
  check_bad_rows();
  check_refusals();
}
