#include "routing.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "pool.h"

namespace kvern {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();
constexpr int64_t kTogether = 8;  // tokens that one thread routes at a time

struct Pick {
  int64_t expert;
  float weight;
};

// Room for one token's choice; a thread keeps its own, so that only its first token allocates.
struct Scratch {
  std::vector<float> share, choice, best, values;
  std::vector<int64_t> kept, chosen;

  explicit Scratch(const kvern_layer& layer) { fit(layer); }

  void fit(const kvern_layer& layer) {
    const auto routed = static_cast<size_t>(layer.routed), groups = static_cast<size_t>(layer.groups);
    share.resize(routed);
    choice.resize(routed);
    best.resize(groups);
    kept.resize(groups);
    chosen.resize(routed);
    values.resize(std::max(routed, groups));
  }
};

// Indices of the `most` largest of `size` values, the lower index first among equals; a NaN counts as the lowest. `best`
// is room for as many values.
void largest(const float* values, int64_t size, int64_t most, float* best, int64_t* indices) {
  int64_t count = 0;
  for (int64_t i = 0; i < size; ++i) {
    const float value = std::isnan(values[i]) ? kLowest : values[i];
    if (count == most && !(value > best[most - 1])) continue;
    int64_t at = count < most ? count++ : most - 1;
    for (; at > 0 && value > best[at - 1]; --at) {
      best[at] = best[at - 1];
      indices[at] = indices[at - 1];
    }
    best[at] = value;
    indices[at] = i;
  }
}

// The sum of the two largest of a group.
float two_largest(const float* choice, int64_t size) {
  float first = kLowest, second = kLowest;
  for (int64_t i = 0; i < size; ++i) {
    if (choice[i] > first) {
      second = first;
      first = choice[i];
    } else if (choice[i] > second) {
      second = choice[i];
    }
  }
  return first + (size > 1 ? second : 0.0f);
}

// All groups but the `kept_groups` whose two best sum to most drop out of the choice.
void drop_groups(const kvern_layer& layer, Scratch& room) {
  const int64_t size = layer.routed / layer.groups;
  for (int64_t g = 0; g < layer.groups; ++g) room.best[static_cast<size_t>(g)] = two_largest(room.choice.data() + g * size, size);
  largest(room.best.data(), layer.groups, layer.kept_groups, room.values.data(), room.kept.data());
  const auto end = room.kept.begin() + layer.kept_groups;
  for (int64_t g = 0; g < layer.groups; ++g) {
    if (std::find(room.kept.begin(), end, g) == end) std::fill_n(room.choice.begin() + g * size, size, kLowest);
  }
}

void route_token(const kvern_layer& layer, const float* scores, Scratch& room, Pick* picks) {
  for (int64_t i = 0; i < layer.routed; ++i) {
    const float share = 1.0f / (1.0f + std::exp(-scores[i]));
    room.share[static_cast<size_t>(i)] = share;
    room.choice[static_cast<size_t>(i)] = share + layer.gate_bias[i];
  }
  if (layer.kept_groups < layer.groups) drop_groups(layer, room);
  largest(room.choice.data(), layer.routed, layer.top_k, room.values.data(), room.chosen.data());
  float total = 1e-20f;
  for (int64_t i = 0; i < layer.top_k; ++i) total += room.share[static_cast<size_t>(room.chosen[static_cast<size_t>(i)])];
  for (int64_t i = 0; i < layer.top_k; ++i) {
    const int64_t expert = room.chosen[static_cast<size_t>(i)];
    const float weight = room.share[static_cast<size_t>(expert)];
    picks[i] = {expert, (layer.normalise ? weight / total : weight) * layer.factor};
  }
}

// [tokens, top_k]
void route_all(const kvern_layer& layer, int64_t tokens, const float* scores, Pick* picks) {
  struct Work {
    const kvern_layer& layer;
    int64_t tokens;
    const float* scores;
    Pick* picks;
  } work{layer, tokens, scores, picks};
  parallel_for(
      (tokens + kTogether - 1) / kTogether,
      [](const void* context, int64_t chunk) {
        const auto& mine = *static_cast<const Work*>(context);
        thread_local Scratch room(mine.layer);
        room.fit(mine.layer);
        for (int64_t t = chunk * kTogether; t < std::min(mine.tokens, (chunk + 1) * kTogether); ++t) {
          route_token(mine.layer, mine.scores + t * mine.layer.routed, room, mine.picks + t * mine.layer.top_k);
        }
      },
      &work);
}

}  // namespace

Routes::Routes(const kvern_layer& layer, int64_t tokens, const float* scores, Arena& arena)
    : experts_(arena.take<Routed>(layer.common + (scores ? std::min(layer.routed, tokens * layer.top_k) : 0))) {
  add_common(layer, tokens, arena);
  if (scores) add_routed(layer, tokens, scores, arena);
}

void Routes::add_common(const kvern_layer& layer, int64_t tokens, Arena& arena) {
  auto* all = arena.take<int32_t>(tokens);
  auto* ones = arena.take<float>(tokens);
  std::iota(all, all + tokens, 0);
  std::fill_n(ones, tokens, 1.0f);
  for (int64_t e = 0; e < layer.common; ++e) experts_[size_++] = {e, tokens, all, ones};
}

// Sorts the picks by expert: counts those of each, then hands each its stretch of the tokens.
void Routes::add_routed(const kvern_layer& layer, int64_t tokens, const float* scores, Arena& arena) {
  const int64_t count = tokens * layer.top_k;
  auto* picks = arena.take<Pick>(count);
  route_all(layer, tokens, scores, picks);
  auto* next = arena.take<int64_t>(layer.routed);  // how many picks each expert has, then where its next one goes
  std::fill_n(next, layer.routed, 0);
  for (int64_t i = 0; i < count; ++i) ++next[picks[i].expert];
  auto* of_token = arena.take<int32_t>(count);
  auto* weights = arena.take<float>(count);
  int64_t begin = 0;
  for (int64_t e = 0; e < layer.routed; ++e) {
    const int64_t mine = next[e];
    if (mine) experts_[size_++] = {layer.common + e, mine, of_token + begin, weights + begin};
    next[e] = begin;
    begin += mine;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = next[picks[i].expert]++;
    of_token[at] = static_cast<int32_t>(i / layer.top_k);
    weights[at] = picks[i].weight;
  }
}

}  // namespace kvern
