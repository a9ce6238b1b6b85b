// The gate of DeepSeekMoE (ops.route, report eq. 12-16): which experts see which tokens, and with what weight.
#pragma once

#include <cstdint>
#include <vector>

#include "kvern_layer.h"

namespace kvern {

// `tokens` in ascending order with the weight of each.
struct Routed {
  int64_t index;
  std::vector<int32_t> tokens;
  std::vector<float> weights;
};

class Routes {
 public:
  // Every token to the common experts.
  Routes(const kvern_layer& layer, int64_t tokens);
  // And each to `top_k` of the routed ones; scores [tokens, routed], before the sigmoid.
  Routes(const kvern_layer& layer, int64_t tokens, const float* scores);

  // Those that see a token, in ascending order.
  const std::vector<Routed>& experts() const { return experts_; }

 private:
  std::vector<Routed> experts_;
};

}  // namespace kvern
