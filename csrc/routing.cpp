#include "routing.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "pool.h"

namespace kvern {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

// Indices of the `count` largest, the lower index first among equals; a NaN counts as the lowest.
void largest(const std::vector<float>& values, int64_t count, std::vector<int64_t>& order) {
  order.resize(values.size());
  std::iota(order.begin(), order.end(), 0);
  const auto value = [&](int64_t i) { return std::isnan(values[static_cast<size_t>(i)]) ? kLowest : values[static_cast<size_t>(i)]; };
  std::partial_sort(order.begin(), order.begin() + count, order.end(),
                    [&](int64_t a, int64_t b) { return value(a) > value(b) || (value(a) == value(b) && a < b); });
  order.resize(static_cast<size_t>(count));
}

// All groups but the `kept_groups` whose two best sum to most drop out of the choice.
void drop_groups(const kvern_layer& layer, std::vector<float>& choice) {
  const int64_t size = layer.routed / layer.groups;
  std::vector<float> best(static_cast<size_t>(layer.groups));
  for (int64_t g = 0; g < layer.groups; ++g) {
    float first = kLowest, second = kLowest;
    for (int64_t i = g * size; i < (g + 1) * size; ++i) {
      const float value = choice[static_cast<size_t>(i)];
      if (value > first) {
        second = first;
        first = value;
      } else if (value > second) {
        second = value;
      }
    }
    best[static_cast<size_t>(g)] = first + (size > 1 ? second : 0.0f);
  }
  std::vector<int64_t> kept;
  largest(best, layer.kept_groups, kept);
  for (int64_t g = 0; g < layer.groups; ++g) {
    if (std::find(kept.begin(), kept.end(), g) == kept.end()) {
      std::fill_n(choice.begin() + g * size, size, kLowest);
    }
  }
}

struct Pick {
  int64_t expert;
  float weight;
};

void route_token(const kvern_layer& layer, const float* scores, Pick* picks) {
  std::vector<float> share(static_cast<size_t>(layer.routed)), choice(share);
  for (size_t i = 0; i < share.size(); ++i) {
    share[i] = 1.0f / (1.0f + std::exp(-scores[i]));
    choice[i] = share[i] + layer.gate_bias[i];
  }
  if (layer.kept_groups < layer.groups) drop_groups(layer, choice);
  std::vector<int64_t> chosen;
  largest(choice, layer.top_k, chosen);
  float total = 1e-20f;
  for (const int64_t expert : chosen) total += share[static_cast<size_t>(expert)];
  for (int64_t i = 0; i < layer.top_k; ++i) {
    const int64_t expert = chosen[static_cast<size_t>(i)];
    const float weight = share[static_cast<size_t>(expert)];
    picks[i] = {expert, (layer.normalise ? weight / total : weight) * layer.factor};
  }
}

}  // namespace

Routes::Routes(const kvern_layer& layer, int64_t tokens) {
  for (int64_t e = 0; e < layer.common; ++e) {
    experts_.push_back({e, std::vector<int32_t>(static_cast<size_t>(tokens)), std::vector<float>(static_cast<size_t>(tokens), 1.0f)});
    std::iota(experts_.back().tokens.begin(), experts_.back().tokens.end(), 0);
  }
}

Routes::Routes(const kvern_layer& layer, int64_t tokens, const float* scores) : Routes(layer, tokens) {
  struct Work {
    const kvern_layer& layer;
    const float* scores;
    std::vector<Pick> picks;
  } work{layer, scores, std::vector<Pick>(static_cast<size_t>(tokens * layer.top_k))};
  parallel_for(
      tokens,
      [](const void* context, int64_t t) {
        auto& mine = *static_cast<Work*>(const_cast<void*>(context));
        route_token(mine.layer, mine.scores + t * mine.layer.routed, mine.picks.data() + t * mine.layer.top_k);
      },
      &work);
  std::vector<Routed> routed(static_cast<size_t>(layer.routed));
  for (int64_t i = 0; i < tokens * layer.top_k; ++i) {
    const Pick& pick = work.picks[static_cast<size_t>(i)];
    Routed& expert = routed[static_cast<size_t>(pick.expert)];
    expert.index = layer.common + pick.expert;
    expert.tokens.push_back(static_cast<int32_t>(i / layer.top_k));
    expert.weights.push_back(pick.weight);
  }
  for (Routed& expert : routed) {
    if (!expert.tokens.empty()) experts_.push_back(std::move(expert));
  }
}

}  // namespace kvern
