// A decoder layer of the V3 architecture over packed weights (kvern_layer.h). The formulas are those of model/attention.py
// and model/moe.py; what flows between products is FP32, and only what enters a product is rounded.
//
//   project  n = norm(x); (qa | c, kr) = n W;  c = norm(c), kr = rope(kr) to the cache;  q = norm(qa) Wqb, rope
//   attend   absorbed: softmax(q Wuk . (c, kr)) c Wuv   or expanded: softmax(q . (c Wuk, kr)) (c Wuv), by sequence
//   output   x += o Wo
//   route    n = norm(x);  experts and weights g of each token
//   experts  x += sum_e down_e(g silu(gate_e n) up_e n), expert after expert, so that a row's sum has one order
//
// Every stage is one round of the pool. A row of the result depends on its own token and context alone, bit for bit.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <deque>

#include "attention.h"
#include "latent8.h"
#include "products.h"
#include "routing.h"
#include "pool.h"
#include "scalars.h"
#include "sound.h"

namespace kvern {
namespace {

constexpr int64_t kSerialRows = 8;                 // fewer rows than this are normed and rotated by one thread
constexpr int64_t kExpandedBytes = 64 << 20;       // keys and values that the expanded form holds at a time

// Adds the time since the last lap, and bytes read, to the step's counters.
class Meter {
 public:
  explicit Meter(const kvern_step& step) : counters_(step.counters) {}
  void lap(int stage) {
    if (!counters_) return;
    const auto now = std::chrono::steady_clock::now();
    counters_[stage] += std::chrono::duration_cast<std::chrono::nanoseconds>(now - last_).count();
    last_ = now;
  }
  void read(int counter, int64_t bytes) {
    if (counters_) counters_[counter] += bytes;
  }

 private:
  int64_t* counters_;
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

template <class Body>
void each(int64_t count, int64_t serial, const Body& body) {
  if (count <= serial) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  const int64_t step = std::max<int64_t>(1, serial);
  const auto chunk = [&](int64_t index) {
    for (int64_t i = index * step; i < std::min(count, (index + 1) * step); ++i) body(i);
  };
  parallel_for(
      (count + step - 1) / step,
      [](const void* context, int64_t index) { (*static_cast<const decltype(chunk)*>(context))(index); }, &chunk);
}

// Pairs (x[2i], x[2i + 1]) times (cos, sin) of the token.
void rotate(const float* x, const float* rotation, int64_t size, float* out) {
  for (int64_t i = 0; i + 1 < size; i += 2) {
    const float a = x[i], b = x[i + 1], c = rotation[i], s = rotation[i + 1];
    out[i] = a * c - b * s;
    out[i + 1] = a * s + b * c;
  }
}

void write_row(const float* from, int64_t count, int dtype, void* to) {
  if (dtype == KVERN_F32) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
  } else {
    packed_kernels().rows.round(from, count, static_cast<uint16_t*>(to));
  }
}

void* element(void* base, int dtype, int64_t index) {
  return static_cast<uint8_t*>(base) + index * (dtype == KVERN_F32 ? 4 : 2);
}

class Layer {
 public:
  Layer(const kvern_layer& layer, const kvern_step& step, void* rows, Arena& arena)
      : layer_(layer), step_(step), rows_(rows), arena_(arena), meter_(step) {}

  void run() {
    const int64_t row_bytes = row_elements(step_.rows_dtype, layer_.rank, layer_.rope) * row_element_bytes(step_.rows_dtype);
    for (int64_t s = 0; s < step_.sequences; ++s) meter_.read(KVERN_CACHE_BYTES, step_.contexts[s] * row_bytes);
    float* q = project();
    meter_.lap(KVERN_STAGE_PROJECT);
    float* heads = attend(q);
    meter_.lap(KVERN_STAGE_ATTEND);
    multiply(layer_.o_proj, {heads, layer_.heads * layer_.value, nullptr, step_.tokens, layer_.heads * layer_.value},
             {step_.x, layer_.hidden, nullptr, layer_.o_bias, true});
    meter_.lap(KVERN_STAGE_OUTPUT);
    float* normed = norm(step_.x, layer_.hidden, layer_.hidden, layer_.post_norm, layer_.norm_eps);
    const Routes routes = route(normed);
    meter_.lap(KVERN_STAGE_ROUTE);
    feed_forward(normed, routes);
    meter_.lap(KVERN_STAGE_EXPERTS);
  }

 private:
  int64_t head_size() const { return layer_.nope + layer_.rope; }
  int64_t latent() const { return layer_.rank + layer_.rope; }
  uint8_t* cache_row(int64_t slot) const {
    return static_cast<uint8_t*>(rows_) + slot * step_.row_stride * row_element_bytes(step_.rows_dtype);
  }

  void multiply(const kvern_packed& w, const Source& source, const Output& out) {
    const Arrangement x(source, w.kind, step_.activations, arena_);
    x.fill_all();
    Products products;
    products.add(w, x, out);
    products.run();
    meter_.read(KVERN_WEIGHT_BYTES, products.bytes());
  }

  // `source` as a product with `w` wants it: the last of `all` where that is it already, else a new one, still to be filled.
  const Arrangement& arranged(std::deque<Arrangement>& all, const Source& source, const kvern_packed& w) {
    const bool is_last = !all.empty() && all.back().kind == w.kind && all.back().source.x == source.x &&
                         all.back().source.place == source.place;
    return is_last ? all.back() : all.emplace_back(source, w.kind, step_.activations, arena_);
  }

  float* norm(const float* x, int64_t stride, int64_t size, const float* weight, float eps) {
    float* out = arena_.take<float>(step_.tokens * size);
    each(step_.tokens, kSerialRows, [&](int64_t t) { packed_kernels().rows.norm(x + t * stride, weight, eps, size, out + t * size); });
    return out;
  }

  // The queries [tokens, heads, nope + rope], rotated; the latents go to the cache.
  float* project() {
    const int64_t size = layer_.heads * head_size(), q_width = layer_.q_rank ? layer_.q_rank : size;
    float* normed = norm(step_.x, layer_.hidden, layer_.hidden, layer_.input_norm, layer_.norm_eps);
    float* q = arena_.take<float>(step_.tokens * q_width);
    float* mixed = arena_.take<float>(step_.tokens * latent());
    const Source source{normed, layer_.hidden, nullptr, step_.tokens, layer_.hidden};
    std::deque<Arrangement> x;
    Products products;
    products.add(layer_.q_a, arranged(x, source, layer_.q_a), {q, q_width, nullptr, layer_.q_a_bias, false});
    products.add(layer_.kv_a, arranged(x, source, layer_.kv_a), {mixed, latent(), nullptr, layer_.kv_a_bias, false});
    fill_all(x);
    products.run();
    meter_.read(KVERN_WEIGHT_BYTES, products.bytes());
    store_latents(mixed);
    if (layer_.q_rank) {
      const float* low = norm(q, q_width, q_width, layer_.q_norm, layer_.latent_eps);
      q = arena_.take<float>(step_.tokens * size);
      multiply(layer_.q_b, {low, q_width, nullptr, step_.tokens, q_width}, {q, size, nullptr, nullptr, false});
    }
    each(step_.tokens, kSerialRows, [&](int64_t t) {
      for (int64_t h = 0; h < layer_.heads; ++h) {
        float* pairs = q + t * size + h * head_size() + layer_.nope;
        rotate(pairs, step_.rotation + t * layer_.rope, layer_.rope, pairs);
      }
    });
    return q;
  }

  void store_latents(const float* mixed) {
    float* latents = arena_.take<float>(step_.tokens * latent());
    each(step_.tokens, kSerialRows, [&](int64_t t) {
      float* one = latents + t * latent();
      packed_kernels().rows.norm(mixed + t * latent(), layer_.kv_norm, layer_.latent_eps, layer_.rank, one);
      rotate(mixed + t * latent() + layer_.rank, step_.rotation + t * layer_.rope, layer_.rope, one + layer_.rank);
      if (step_.rows_dtype == KVERN_LATENT8) {
        packed_kernels().rows.encode(one, layer_.rank, layer_.rope, cache_row(step_.slots[t]));
      } else {
        write_row(one, latent(), step_.rows_dtype, cache_row(step_.slots[t]));
      }
    });
  }

  // What the heads put out [tokens, heads, value].
  float* attend(const float* q) {
    float* out = arena_.take<float>(step_.tokens * layer_.heads * layer_.value);
    std::vector<int64_t> absorbed;
    for (int64_t s = 0; s < step_.sequences; ++s) {
      if (step_.starts[s] == step_.starts[s + 1]) continue;
      if (step_.expanded && step_.expanded[s]) {
        attend_expanded(q, s, out);
      } else {
        absorbed.push_back(s);
      }
    }
    if (!absorbed.empty()) attend_absorbed(q, absorbed, out);
    return out;
  }

  // Queries in latent space, attention over the paged rows, and back to the values of each head.
  void attend_absorbed(const float* q, const std::vector<int64_t>& sequences, float* out) {
    const bool all = static_cast<int64_t>(sequences.size()) == step_.sequences;
    const Selection some = all ? Selection{} : select(sequences);
    const int32_t* places = all ? nullptr : arena_.copy(some.tokens);
    const int64_t count = all ? step_.tokens : static_cast<int64_t>(some.tokens.size()), width = layer_.heads * latent();
    float* query = arena_.take<float>(count * width);
    absorb(q, places, count, query);
    const int dtype = step_.activations;
    void* rounded = query;
    if (dtype == KVERN_BF16) {
      rounded = arena_.take<uint16_t>(count * width);
      each(count, kSerialRows, [&](int64_t t) {
        write_row(query + t * width, width, dtype, static_cast<uint16_t*>(rounded) + t * width);
      });
    }
    const int64_t size = layer_.heads * layer_.rank;
    float* mixed = arena_.take<float>(count * size);
    paged_latent_attention({mixed, KVERN_F32, rounded, dtype, count, rows_, step_.rows_dtype, step_.row_count,
                            step_.row_stride, all ? step_.tables : some.tables.data(), step_.table_stride,
                            all ? step_.contexts : some.contexts.data(), all ? step_.starts : some.starts.data(),
                            static_cast<int64_t>(sequences.size()), step_.block_size, layer_.heads, latent(), layer_.rank,
                            layer_.softmax_scale});
    each_head(layer_.values, {mixed, size, nullptr, count, layer_.rank}, layer_.rank,
              {out, layer_.heads * layer_.value, places, nullptr, false}, layer_.value);
  }

  struct Selection {
    std::vector<int32_t> tokens, tables, contexts, starts{0};
  };

  Selection select(const std::vector<int64_t>& sequences) const {
    Selection chosen;
    for (const int64_t s : sequences) {
      for (int32_t t = step_.starts[s]; t < step_.starts[s + 1]; ++t) chosen.tokens.push_back(t);
      const int32_t* table = step_.tables + s * step_.table_stride;
      chosen.tables.insert(chosen.tables.end(), table, table + step_.table_stride);
      chosen.contexts.push_back(step_.contexts[s]);
      chosen.starts.push_back(static_cast<int32_t>(chosen.tokens.size()));
    }
    return chosen;
  }

  // (q_nope Wuk | q_rope) of the tokens at `places` (NULL: of the first `count`), [count, heads, latent].
  void absorb(const float* q, const int32_t* places, int64_t count, float* query) {
    const int64_t width = layer_.heads * head_size();
    for (int64_t i = 0; i < count * layer_.heads; ++i) {
      const int64_t t = places ? places[i / layer_.heads] : i / layer_.heads, h = i % layer_.heads;
      std::memcpy(query + i * latent() + layer_.rank, q + t * width + h * head_size() + layer_.nope,
                  static_cast<size_t>(layer_.rope) * sizeof(float));
      if (!layer_.nope) std::fill_n(query + i * latent(), layer_.rank, 0.0f);
    }
    if (!layer_.nope) return;
    each_head(layer_.absorb, {q, width, places, count, layer_.nope}, head_size(),
              {query, layer_.heads * latent(), nullptr, nullptr, false}, latent());
  }

  // For each head h: out + h * out_step = w[h] (x + h * x_step).
  void each_head(const kvern_packed* w, const Source& x, int64_t x_step, const Output& out, int64_t out_step) {
    std::deque<Arrangement> sources;
    Products products;
    for (int64_t h = 0; h < layer_.heads; ++h) {
      Source source = x;
      source.x += h * x_step;
      Output place = out;
      place.y += h * out_step;
      products.add(w[h], arranged(sources, source, w[h]), place);
    }
    fill_all(sources);
    products.run();
    meter_.read(KVERN_WEIGHT_BYTES, products.bytes());
  }

  static void fill_all(const std::deque<Arrangement>& sources) {
    std::vector<std::pair<const Arrangement*, int64_t>> groups;
    int64_t numbers = 0;
    for (const Arrangement& one : sources) {
      for (int64_t group = 0; group < one.groups(); ++group) groups.emplace_back(&one, group);
      numbers += one.columns.count * one.columns.elements;
    }
    each(static_cast<int64_t>(groups.size()), numbers < kSerialNumbers ? static_cast<int64_t>(groups.size()) : 1,
         [&](int64_t i) { groups[static_cast<size_t>(i)].first->fill(groups[static_cast<size_t>(i)].second); });
  }

  // Keys and values of the whole context of one sequence, some heads at a time, and attention over them.
  void attend_expanded(const float* q, int64_t sequence, float* out) {
    const int64_t first = step_.starts[sequence], count = step_.starts[sequence + 1] - first;
    const int64_t context = step_.contexts[sequence], width = layer_.nope + layer_.value;
    const int dtype = step_.activations;
    const int64_t heads = std::clamp<int64_t>(kExpandedBytes / (context * width * 6), 1, layer_.heads);
    float* latents = arena_.take<float>(context * latent());
    void* rope = arena_.take<float>(context * layer_.rope);
    each(context, 64, [&](int64_t r) {
      const int32_t* table = step_.tables + sequence * step_.table_stride;
      const uint8_t* row = cache_row(table[r / step_.block_size] * step_.block_size + r % step_.block_size);
      float* one = latents + r * latent();
      if (step_.rows_dtype == KVERN_LATENT8) {
        packed_kernels().rows.decode(row, layer_.rank, layer_.rope, one);
      } else {
        for (int64_t d = 0; d < latent(); ++d) one[d] = read_scalar(row, step_.rows_dtype, d);
      }
      write_row(one + layer_.rank, layer_.rope, dtype, element(rope, dtype, r * layer_.rope));
    });
    const Source rows{latents, latent(), nullptr, context, layer_.rank};
    float* wide = arena_.take<float>(context * heads * width);
    void* kv = dtype == KVERN_F32 ? wide : static_cast<void*>(arena_.take<uint16_t>(context * heads * width));
    void* query = arena_.take<float>(count * heads * head_size());
    float* mixed = arena_.take<float>(count * heads * layer_.value);
    // The heads share the rows, so they are arranged once for each kind of weight.
    std::deque<Arrangement> x;
    const Arrangement& for_values = arranged(x, rows, layer_.values[0]);
    const Arrangement& for_keys = arranged(x, rows, layer_.nope ? layer_.keys[0] : layer_.values[0]);
    fill_all(x);
    for (int64_t h = 0; h < layer_.heads; h += heads) {
      const int64_t now = std::min(heads, layer_.heads - h);
      Products products;
      for (int64_t i = 0; i < now; ++i) {
        const Output key{wide + i * width, now * width, nullptr, nullptr, false};
        if (layer_.nope) products.add(layer_.keys[h + i], for_keys, key);
        products.add(layer_.values[h + i], for_values, {key.y + layer_.nope, key.stride, nullptr, nullptr, false});
      }
      products.run();
      meter_.read(KVERN_WEIGHT_BYTES, products.bytes());
      if (dtype == KVERN_BF16) {
        each(context, 16, [&](int64_t r) {
          write_row(wide + r * now * width, now * width, dtype, static_cast<uint16_t*>(kv) + r * now * width);
        });
      }
      each(count, kSerialRows, [&](int64_t t) {
        const float* from = q + ((first + t) * layer_.heads + h) * head_size();
        write_row(from, now * head_size(), dtype, element(query, dtype, t * now * head_size()));
      });
      expanded_attention({mixed, KVERN_F32, query, kv, rope, layer_.rope, dtype, count, context, now, layer_.nope,
                          layer_.rope, layer_.value, layer_.softmax_scale});
      for (int64_t t = 0; t < count; ++t) {
        std::memcpy(out + ((first + t) * layer_.heads + h) * layer_.value, mixed + t * now * layer_.value,
                    static_cast<size_t>(now * layer_.value) * sizeof(float));
      }
    }
  }

  Routes route(const float* normed) {
    if (!layer_.routed) return Routes(layer_, step_.tokens, nullptr, arena_);
    float* scores = arena_.take<float>(step_.tokens * layer_.routed);
    const Arrangement x({normed, layer_.hidden, nullptr, step_.tokens, layer_.hidden}, layer_.gate.kind, KVERN_F32, arena_);
    x.fill_all();
    Products products;
    products.add(layer_.gate, x, {scores, layer_.routed, nullptr, nullptr, false});
    products.run();
    meter_.read(KVERN_WEIGHT_BYTES, products.bytes());
    return Routes(layer_, step_.tokens, scores, arena_);
  }

  void feed_forward(const float* normed, const Routes& routes) {
    const int64_t hidden = layer_.hidden;
    std::deque<Arrangement> sources;
    std::vector<float*> gates, ups;
    Products products;
    for (const Routed& routed : routes) {
      const kvern_expert& expert = layer_.experts[routed.index];
      const int64_t width = expert.gate.n;
      const Source source{normed, hidden, routed.tokens, routed.count, hidden};
      gates.push_back(arena_.take<float>(routed.count * width));
      ups.push_back(arena_.take<float>(routed.count * width));
      products.add(expert.gate, arranged(sources, source, expert.gate), {gates.back(), width, nullptr, nullptr, false});
      products.add(expert.up, arranged(sources, source, expert.up), {ups.back(), width, nullptr, nullptr, false});
    }
    fill_all(sources);
    products.run();
    meter_.read(KVERN_WEIGHT_BYTES, products.bytes());
    add_down(routes, gates, ups);
  }

  // x += down(weight * silu(gate) * up), expert after expert within each chunk of x's columns.
  void add_down(const Routes& routes, const std::vector<float*>& gates, const std::vector<float*>& ups) {
    std::deque<Arrangement> sources;
    Sequence down;
    size_t i = 0;
    for (const Routed& routed : routes) {
      const kvern_packed& w = layer_.experts[routed.index].down;
      float *gate = gates[i], *up = ups[i];
      ++i;
      each(routed.count, kSerialRows, [&](int64_t r) { packed_kernels().rows.gate(gate + r * w.k, up + r * w.k, w.k, routed.weights[r]); });
      down.add(w, arranged(sources, {gate, w.k, nullptr, routed.count, w.k}, w), {step_.x, layer_.hidden, routed.tokens, nullptr, true});
    }
    fill_all(sources);
    down.run();
    meter_.read(KVERN_WEIGHT_BYTES, down.bytes());
  }

  const kvern_layer& layer_;
  const kvern_step& step_;
  void* rows_;
  Arena& arena_;
  Meter meter_;
};

}  // namespace
}  // namespace kvern

using namespace kvern;

int kvern_check_layer(const kvern_layer* layer) { return layer && fits(*layer) ? KVERN_OK : KVERN_BAD_ARGUMENT; }

int kvern_begin_step(const kvern_step* step, const float* frequencies, int64_t rope, float factor, const void* table,
                     int dtype, int64_t vocabulary, int64_t hidden, const int64_t* ids) {
  if (!step || !has_sound_books(*step) || !step->slots || rope % 2 || !is_addressable({step->tokens, rope})) return KVERN_BAD_ARGUMENT;
  if (rope && (!frequencies || !step->rotation)) return KVERN_BAD_ARGUMENT;
  if (table && (!ids || !step->x || (dtype != KVERN_F32 && dtype != KVERN_BF16))) return KVERN_BAD_ARGUMENT;
  if (table && (hidden < 1 || !is_addressable({step->tokens, hidden}) || !is_addressable({vocabulary, hidden}))) return KVERN_BAD_ARGUMENT;
  for (int64_t t = 0; table && t < step->tokens; ++t) {
    if (ids[t] < 0 || ids[t] >= vocabulary) return KVERN_BAD_ARGUMENT;
  }
  for (int64_t s = 0; s < step->sequences; ++s) {
    const int32_t* blocks = step->tables + s * step->table_stride;
    for (int64_t t = step->starts[s]; t < step->starts[s + 1]; ++t) {
      const int64_t position = step->contexts[s] - (step->starts[s + 1] - t);
      step->slots[t] = blocks[position / step->block_size] * step->block_size + position % step->block_size;
      for (int64_t i = 0; i < rope / 2; ++i) {
        const float angle = static_cast<float>(position) * frequencies[i];
        step->rotation[t * rope + 2 * i] = factor * std::cos(angle);
        step->rotation[t * rope + 2 * i + 1] = factor * std::sin(angle);
      }
    }
  }
  for (int64_t t = 0; table && t < step->tokens; ++t) {
    for (int64_t i = 0; i < hidden; ++i) step->x[t * hidden + i] = read_scalar(table, dtype, ids[t] * hidden + i);
  }
  return KVERN_OK;
}

int kvern_run_layers(const kvern_layer* layers, int64_t count, const kvern_step* step, void* rows, int64_t layer_bytes) {
  if (!layers || count < 0 || !step || !rows || layer_bytes < 0) return KVERN_BAD_ARGUMENT;
  if (count && !is_sound(layers[0], *step)) return KVERN_BAD_ARGUMENT;
  if (layer_bytes % row_element_bytes(step->rows_dtype)) return KVERN_BAD_ARGUMENT;
  for (int64_t i = 1; i < count; ++i) {
    if (!are_alike(layers[0], layers[i])) return KVERN_BAD_ARGUMENT;
  }
  thread_local Arena arena;
  for (int64_t i = 0; i < count; ++i) {
    arena.clear();
    Layer(layers[i], *step, static_cast<uint8_t*>(rows) + i * layer_bytes, arena).run();
  }
  return KVERN_OK;
}

int kvern_run_head(const kvern_packed* head, const float* norm, float eps, const kvern_step* step, int64_t hidden,
                   const int64_t* rows, int64_t count, float* out, float* logits) {
  if (!norm || !step || !step->x || !rows || !out || hidden < 1 || count < 0) return KVERN_BAD_ARGUMENT;
  if (!is_addressable({step->tokens, hidden}) || !is_addressable({count, hidden})) return KVERN_BAD_ARGUMENT;
  if (head && (!logits || head->k != hidden || !can_multiply(*head, count, step->activations))) return KVERN_BAD_ARGUMENT;
  for (int64_t i = 0; i < count; ++i) {
    if (rows[i] < 0 || rows[i] >= step->tokens) return KVERN_BAD_ARGUMENT;
  }
  Meter meter(*step);
  each(count, kSerialRows, [&](int64_t i) { packed_kernels().rows.norm(step->x + rows[i] * hidden, norm, eps, hidden, out + i * hidden); });
  const int code = head ? kvern_multiply(head, out, count, step->activations, nullptr, logits) : KVERN_OK;
  if (head) meter.read(KVERN_WEIGHT_BYTES, read_bytes(*head));
  meter.lap(KVERN_STAGE_HEAD);
  return code;
}
