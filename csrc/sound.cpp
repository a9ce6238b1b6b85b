#include "sound.h"

#include <algorithm>

#include "kvern.h"
#include "latent8.h"
#include "packed.h"

namespace kvern {
namespace {

bool has_shape(const kvern_packed& w, int64_t n, int64_t k) { return w.n == n && w.k == k && fits(w); }

// Of one kind as well: the heads share what is arranged for their products.
bool each_has_shape(const kvern_packed* w, int64_t count, int64_t n, int64_t k) {
  if (count > 0 && !w) return false;
  for (int64_t i = 0; i < count; ++i) {
    if (!has_shape(w[i], n, k) || w[i].kind != w[0].kind) return false;
  }
  return true;
}

bool attention_fits(const kvern_layer& layer) {
  const int64_t heads = layer.heads;
  if (heads < 1 || layer.rope % 2 || layer.value < 1 || layer.rank < 1) return false;
  if (!is_addressable({heads, layer.nope}) || !is_addressable({heads, layer.rope}) || !is_addressable({heads, layer.rank}) ||
      !is_addressable({heads, layer.value})) {
    return false;
  }
  const int64_t size = layer.nope + layer.rope, latent = layer.rank + layer.rope;
  if (size < 1 || layer.q_rank < 0 || !layer.input_norm || !layer.kv_norm || !layer.post_norm) return false;
  const int64_t q_width = layer.q_rank ? layer.q_rank : heads * size;
  if (!has_shape(layer.q_a, q_width, layer.hidden) || !has_shape(layer.kv_a, latent, layer.hidden)) return false;
  if (layer.q_rank && (!layer.q_norm || !has_shape(layer.q_b, heads * size, layer.q_rank))) return false;
  const int64_t keyed = layer.nope ? heads : 0;
  return each_has_shape(layer.absorb, keyed, layer.rank, layer.nope) &&
         each_has_shape(layer.keys, keyed, layer.nope, layer.rank) &&
         each_has_shape(layer.values, heads, layer.value, layer.rank) &&
         has_shape(layer.o_proj, layer.hidden, heads * layer.value);
}

bool experts_fit(const kvern_layer& layer) {
  if (!is_addressable({layer.common}) || !is_addressable({layer.routed}) || !layer.experts) return false;
  for (int64_t e = 0; e < layer.common + layer.routed; ++e) {
    const kvern_expert& expert = layer.experts[e];
    if (!has_shape(expert.gate, expert.down.k, layer.hidden) || !has_shape(expert.up, expert.down.k, layer.hidden) ||
        !has_shape(expert.down, layer.hidden, expert.down.k)) {
      return false;
    }
  }
  if (!layer.routed) return layer.common > 0;
  return layer.gate_bias && has_shape(layer.gate, layer.routed, layer.hidden) && layer.groups >= 1 &&
         layer.routed % layer.groups == 0 && layer.kept_groups >= 1 && layer.kept_groups <= layer.groups &&
         layer.top_k >= 1 && layer.top_k <= layer.kept_groups * (layer.routed / layer.groups);
}

bool books_balance(const kvern_step& step) {
  if (!is_addressable({step.block_size}) || !is_addressable({step.sequences, step.table_stride}) || !step.starts || !step.contexts || !step.tables || step.starts[0] != 0 ||
      step.starts[step.sequences] != step.tokens) {
    return false;
  }
  for (int64_t s = 0; s < step.sequences; ++s) {
    const int64_t count = int64_t{step.starts[s + 1]} - step.starts[s];
    const int64_t blocks = (step.contexts[s] + step.block_size - 1) / step.block_size;
    if (count < 0 || step.contexts[s] < count || blocks > step.table_stride) return false;
    for (int64_t b = 0; count && b < blocks; ++b) {
      const int64_t block = step.tables[s * step.table_stride + b];
      if (block < 0 || block >= step.row_count / step.block_size) return false;
    }
  }
  return true;
}

bool is_float(int dtype) { return dtype == KVERN_F32 || dtype == KVERN_BF16; }

constexpr int64_t kMostNumbers = int64_t{1} << 47;  // bytes that a process can address

}  // namespace

bool is_addressable(std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes) {
    if (size < 0 || size > kMostNumbers) return false;
    if (size > 0 && product > kMostNumbers / size) return false;
    product *= std::max<int64_t>(size, 1);
  }
  return true;
}

bool fits(const kvern_packed& w) {
  if (w.n < 1 || w.k < 1 || !is_addressable({w.n, w.k})) return false;
  if (w.kind == KVERN_PICKS) {
    if (!w.picks || !w.factors) return false;
    for (int64_t i = 0; i < w.n; ++i) {
      if (w.picks[i] < 0 || w.picks[i] >= w.k) return false;
    }
    return true;
  }
  if (w.kind < KVERN_F32 || w.kind > KVERN_INT4_TURNED || !w.tiles) return false;
  if (w.kind >= KVERN_INT4) return w.scales && kvern_scale_bytes(w.kind, w.n, w.k, w.group) > 0;
  return w.kind != KVERN_F8_E4M3 || w.scales;
}

bool can_multiply(const kvern_packed& w, int64_t m, int activations) {
  return fits(w) && is_float(activations) && is_addressable({m, w.k}) && is_addressable({m, w.n});
}

bool fits(const kvern_layer& layer) { return layer.hidden >= 1 && attention_fits(layer) && experts_fit(layer); }

bool has_sound_books(const kvern_step& step) {
  return step.tokens >= 1 && step.sequences >= 1 && step.block_size >= 1 && step.row_count >= 1 && step.table_stride >= 1 &&
         books_balance(step);
}

bool is_sound(const kvern_layer& layer, const kvern_step& step) {
  if (!step.x || !step.slots || (layer.rope && !step.rotation) || !is_rows_dtype(step.rows_dtype)) return false;
  if (!is_addressable({step.row_count, step.row_stride}) || !is_addressable({step.tokens, layer.hidden})) return false;
  if (step.row_stride < row_elements(step.rows_dtype, layer.rank, layer.rope) || !is_float(step.activations) || !has_sound_books(step)) return false;
  for (int64_t t = 0; t < step.tokens; ++t) {
    if (step.slots[t] < 0 || step.slots[t] >= step.row_count) return false;
  }
  return true;
}

bool are_alike(const kvern_layer& a, const kvern_layer& b) {
  return a.hidden == b.hidden && a.rank == b.rank && a.rope == b.rope;
}

}  // namespace kvern
