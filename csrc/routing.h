// The gate of DeepSeekMoE (ops.route, report eq. 12-16): which experts see which tokens, and with what weight.
#pragma once

#include <cstdint>

#include "kvern_layer.h"
#include "products.h"

namespace kvern {

// `count` tokens in ascending order with the weight of each.
struct Routed {
  int64_t index, count;
  const int32_t* tokens;
  const float* weights;
};

// The experts that see a token, in ascending order; they lie in the arena.
class Routes {
 public:
  // Every token goes to the common experts and to `top_k` of the routed ones; scores [tokens, routed], before the sigmoid,
  // NULL where none is routed.
  Routes(const kvern_layer& layer, int64_t tokens, const float* scores, Arena& arena);

  const Routed* begin() const { return experts_; }
  const Routed* end() const { return experts_ + size_; }

 private:
  void add_common(const kvern_layer& layer, int64_t tokens, Arena& arena);
  void add_routed(const kvern_layer& layer, int64_t tokens, const float* scores, Arena& arena);

  Routed* experts_;
  int64_t size_ = 0;
};

}  // namespace kvern
