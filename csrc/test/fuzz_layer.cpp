// The fuzzer's packed weights, and layers over them.
#include <algorithm>
#include <deque>
#include <numeric>

#include "fuzz.h"

namespace {

// A packed weight in buffers of its own; its bytes come from kvern_pack, or are any at all.
struct Weight {
  Buffer tiles, scales, picks, factors;
  kvern_packed c{};
};

Weight pack_numbers(Fuzz& fuzz, Weight one) {
  kvern_packed& c = one.c;
  const bool is_turned = c.kind == KVERN_INT4_TURNED, is_int4 = c.kind == KVERN_INT4 || is_turned, is_f8 = c.kind == KVERN_F8_E4M3;
  const int64_t columns = is_int4 ? (c.k + 7) / 8 : c.k, groups = is_turned ? c.k : is_int4 ? c.k / c.group : (c.k + 127) / 128;
  const int64_t stride = columns + fuzz.between(0, 3), scale_stride = groups + fuzz.between(0, 2);
  const int64_t scale_rows = is_turned ? c.n / c.group : is_int4 ? c.n : (c.n + 127) / 128;
  const Buffer weight = fuzz.numbers((c.n - 1) * stride + columns, is_int4 ? KVERN_F32 : c.kind);
  const Buffer scale = fuzz.numbers((scale_rows - 1) * scale_stride + groups, is_int4 ? KVERN_BF16 : KVERN_F32);
  const int dtype = c.kind;
  const auto call = [&] {
    one.tiles = Buffer(kvern_packed_bytes(c.kind, c.n, c.k));
    one.scales = Buffer(kvern_scale_bytes(c.kind, c.n, c.k, c.group));
    return kvern_pack(one.tiles.data(), one.scales.size ? one.scales.data() : nullptr, c.kind, weight.data(), dtype, stride,
                      is_int4 || is_f8 ? scale.data() : nullptr, scale_stride, c.group, c.n, c.k);
  };
  int code = call();
  if (is_f8 && code == KVERN_HAS_NAN) {
    require(fuzz.is_wild, "a NaN where none was");
    c.kind = KVERN_F32;
    code = call();
  }
  require(code == KVERN_OK, "pack");
  return one;
}

Weight weight_of(Fuzz& fuzz, int kind, int64_t n, int64_t k) {
  Weight one;
  const int64_t grouped = kind == KVERN_INT4_TURNED ? n : k;
  const bool is_int4 = kind == KVERN_INT4 || kind == KVERN_INT4_TURNED;
  if (is_int4 && grouped % 32) kind = KVERN_F8_E4M3;
  one.c.n = n;
  one.c.k = k;
  one.c.kind = kind;
  one.c.group = is_int4 && grouped % 32 == 0 ? (grouped % 128 || fuzz.chance(2) ? 32 : 128) : 0;
  if (kind == KVERN_PICKS) {
    std::vector<int32_t> picks;
    for (int64_t i = 0; i < n; ++i) picks.push_back(static_cast<int32_t>(fuzz.between(0, k - 1)));
    one.picks = buffer_of(picks);
    one.factors = fuzz.numbers(n, KVERN_F32);
    one.c.picks = reinterpret_cast<const int32_t*>(one.picks.data());
    one.c.factors = one.factors.floats();
    return one;
  }
  if (fuzz.is_wild && fuzz.chance(2)) {
    one.tiles = fuzz.numbers(kvern_packed_bytes(kind, n, k), KVERN_F8_E4M3);
    one.scales = fuzz.numbers(kvern_scale_bytes(kind, n, k, one.c.group), KVERN_F8_E4M3);
  } else {
    one = pack_numbers(fuzz, std::move(one));
  }
  one.c.tiles = one.tiles.data();
  if (one.scales.size) one.c.scales = one.scales.data();
  return one;
}

int any_kind(Fuzz& fuzz) { return static_cast<int>(fuzz.between(KVERN_F32, KVERN_PICKS)); }

// A dimension, often one that 4-bit groups fit.
int64_t width(Fuzz& fuzz, int64_t most) { return fuzz.chance(2) ? fuzz.one_of<int64_t>({32, 64, 128}) : fuzz.size(most); }

// Spoils one value of a weight at a time.
template <class Call>
void must_refuse_weights(Fuzz& fuzz, kvern_packed& w, const Call& call, std::initializer_list<const Buffer*> out) {
  const auto bad = [&](auto& value, auto wrong) {
    must_refuse_with(value, static_cast<std::decay_t<decltype(value)>>(wrong), call, out, "a bad weight");
  };
  bad(w.n, 0); bad(w.n, -1); bad(w.k, 0); bad(w.k, -5); bad(w.n, kHuge); bad(w.k, kHuge); bad(w.n, kWide);
  bad(w.kind, fuzz.one_of({-1, KVERN_PICKS + 1, 99, INT32_MAX, INT32_MIN}));
  if (w.kind == KVERN_PICKS) {
    bad(w.picks, nullptr); bad(w.factors, nullptr);
    auto& pick = const_cast<int32_t*>(w.picks)[fuzz.between(0, w.n - 1)];
    bad(pick, -1); bad(pick, w.k); bad(pick, INT32_MAX);
    return;
  }
  bad(w.tiles, nullptr);
  if (w.kind >= KVERN_F8_E4M3) bad(w.scales, nullptr);
  if (w.kind >= KVERN_INT4) bad(w.group, fuzz.one_of({0, -32, 16, 64, INT32_MAX}));
}

// A layer of random sizes with everything that it points to.
struct Model {
  std::deque<Weight> kept;
  std::deque<Buffer> buffers;
  std::vector<kvern_packed> absorb, keys, values;
  std::vector<kvern_expert> experts;
  kvern_layer layer{};

  explicit Model(Fuzz& fuzz) {
    layer.hidden = width(fuzz, 100);
    layer.heads = fuzz.between(1, 5);
    layer.nope = fuzz.chance(4) ? 0 : width(fuzz, 40);
    layer.rope = fuzz.chance(4) && layer.nope ? 0 : 2 * fuzz.between(1, 20);
    layer.value = width(fuzz, 40);
    layer.rank = width(fuzz, 80);
    layer.q_rank = fuzz.chance(2) ? 0 : width(fuzz, 60);
    layer.norm_eps = layer.latent_eps = 1e-6f;
    layer.softmax_scale = 0.1f;
    attention(fuzz);
    feed_forward(fuzz);
  }

  kvern_packed make(Fuzz& fuzz, int64_t n, int64_t k) { return kept.emplace_back(weight_of(fuzz, any_kind(fuzz), n, k)).c; }

  const float* floats(Fuzz& fuzz, int64_t count) { return buffers.emplace_back(fuzz.numbers(count, KVERN_F32)).floats(); }

  const float* maybe(Fuzz& fuzz, int64_t count) { return fuzz.chance(2) ? floats(fuzz, count) : nullptr; }

  // One kind for all heads: where one holds a NaN, F32 for all.
  const kvern_packed* heads(Fuzz& fuzz, std::vector<kvern_packed>& all, int64_t n, int64_t k) {
    int kind = any_kind(fuzz);
    if (kind == KVERN_F8_E4M3 && fuzz.is_wild) kind = KVERN_BF16;
    for (int64_t h = 0; h < layer.heads; ++h) all.push_back(kept.emplace_back(weight_of(fuzz, kind, n, k)).c);
    for (size_t h = 1; h < all.size(); ++h) {
      if (all[h].kind != all[0].kind) return all.clear(), heads(fuzz, all, n, k);
    }
    return all.data();
  }

  void attention(Fuzz& fuzz) {
    const int64_t size = layer.heads * (layer.nope + layer.rope), q_width = layer.q_rank ? layer.q_rank : size;
    layer.input_norm = floats(fuzz, layer.hidden);
    layer.post_norm = floats(fuzz, layer.hidden);
    layer.kv_norm = floats(fuzz, layer.rank);
    layer.q_a = make(fuzz, q_width, layer.hidden);
    layer.q_a_bias = maybe(fuzz, q_width);
    layer.kv_a = make(fuzz, layer.rank + layer.rope, layer.hidden);
    layer.kv_a_bias = maybe(fuzz, layer.rank + layer.rope);
    if (layer.q_rank) {
      layer.q_norm = floats(fuzz, layer.q_rank);
      layer.q_b = make(fuzz, size, layer.q_rank);
    }
    if (layer.nope) {
      layer.absorb = heads(fuzz, absorb, layer.rank, layer.nope);
      layer.keys = heads(fuzz, keys, layer.nope, layer.rank);
    }
    layer.values = heads(fuzz, values, layer.value, layer.rank);
    layer.o_proj = make(fuzz, layer.hidden, layer.heads * layer.value);
    layer.o_bias = maybe(fuzz, layer.hidden);
  }

  void feed_forward(Fuzz& fuzz) {
    layer.groups = fuzz.between(1, 4);
    layer.routed = fuzz.chance(3) ? 0 : layer.groups * fuzz.between(1, 4);
    layer.common = layer.routed ? fuzz.between(0, 2) : fuzz.between(1, 2);
    layer.kept_groups = fuzz.between(1, layer.groups);
    layer.top_k = layer.routed ? fuzz.between(1, layer.kept_groups * (layer.routed / layer.groups)) : 0;
    layer.normalise = fuzz.between(0, 1);
    layer.factor = fuzz.number();
    for (int64_t e = 0; e < layer.common + layer.routed; ++e) {
      const int64_t wide = width(fuzz, 50);
      const kvern_packed gate = make(fuzz, wide, layer.hidden), up = make(fuzz, wide, layer.hidden);
      experts.push_back({gate, up, make(fuzz, layer.hidden, wide)});
    }
    layer.experts = experts.data();
    if (!layer.routed) return;
    layer.gate = make(fuzz, layer.routed, layer.hidden);
    layer.gate_bias = floats(fuzz, layer.routed);
  }
};

// Sequences with blocks of their own, in any order, and all that a step points to.
struct Books {
  Buffer tables, contexts, starts, expanded, x, rotation, slots, rows, counters;
  kvern_step step{};

  Books(Fuzz& fuzz, const kvern_layer& layer) {
    step.block_size = fuzz.one_of<int64_t>({1, 3, 16, fuzz.size(20)});
    step.sequences = fuzz.between(1, 4);
    std::vector<int32_t> seen, begin{0};
    for (int64_t s = 0; s < step.sequences; ++s) {
      seen.push_back(static_cast<int32_t>(fuzz.between(1, fuzz.chance(8) ? 300 : 40)));
      const int64_t count = fuzz.chance(6) ? 0 : fuzz.between(1, std::min<int64_t>(seen.back(), 20));
      begin.push_back(begin.back() + static_cast<int32_t>(count));
    }
    if (begin.back() == 0) std::fill(begin.begin() + 1, begin.end(), 1);
    step.table_stride = (*std::max_element(seen.begin(), seen.end()) + step.block_size - 1) / step.block_size + fuzz.between(0, 2);
    std::vector<int32_t> blocks(static_cast<size_t>(step.sequences * step.table_stride));
    std::iota(blocks.begin(), blocks.end(), 0);
    std::shuffle(blocks.begin(), blocks.end(), fuzz.engine);
    step.row_count = static_cast<int64_t>(blocks.size()) * step.block_size + fuzz.between(0, step.block_size - 1);
    step.tokens = begin.back();
    step.rows_dtype = fuzz.one_of<int>({KVERN_F32, KVERN_BF16, KVERN_LATENT8});
    step.row_stride = row_elements(step.rows_dtype, layer.rank, layer.rope) + fuzz.between(0, 3);
    step.activations = fuzz.one_of({KVERN_F32, KVERN_BF16});
    std::vector<uint8_t> flags;
    for (int64_t s = 0; s < step.sequences; ++s) flags.push_back(static_cast<uint8_t>(fuzz.between(0, 1)));
    tables = buffer_of(blocks);
    contexts = buffer_of(seen);
    starts = buffer_of(begin);
    expanded = buffer_of(flags);
    x = fuzz.numbers(step.tokens * layer.hidden, KVERN_F32);
    rotation = Buffer(step.tokens * layer.rope * 4);
    slots = Buffer(step.tokens * 8);
    rows = fuzz.numbers(2 * step.row_count * step.row_stride, step.rows_dtype);
    counters = buffer_of(std::vector<int64_t>(KVERN_COUNTERS));
    step.x = x.floats();
    step.rotation = layer.rope ? rotation.floats() : nullptr;
    step.slots = reinterpret_cast<int64_t*>(slots.data());
    step.tables = reinterpret_cast<const int32_t*>(tables.data());
    step.contexts = reinterpret_cast<const int32_t*>(contexts.data());
    step.starts = reinterpret_cast<const int32_t*>(starts.data());
    step.expanded = fuzz.chance(2) ? expanded.data() : nullptr;
    step.counters = fuzz.chance(2) ? reinterpret_cast<int64_t*>(counters.data()) : nullptr;
  }

  // Whatever `call` is, it must refuse books that do not add up.
  template <class Call>
  void must_refuse_books(Fuzz& fuzz, const Call& call, std::initializer_list<const Buffer*> out) {
    const auto bad = [&](auto& value, auto wrong) {
      must_refuse_with(value, static_cast<std::decay_t<decltype(value)>>(wrong), call, out, "bad books");
    };
    bad(step.tokens, 0); bad(step.tokens, -1); bad(step.tokens, step.tokens + 1); bad(step.tokens, kHuge);
    bad(step.sequences, 0); bad(step.sequences, -1); bad(step.block_size, 0); bad(step.block_size, kHuge); bad(step.block_size, INT64_MIN);
    bad(step.row_count, 0); bad(step.row_count, -1); bad(step.table_stride, 0); bad(step.table_stride, kHuge); bad(step.table_stride, kWide);
    bad(step.tables, nullptr); bad(step.contexts, nullptr); bad(step.starts, nullptr); bad(step.slots, nullptr);
    auto *start = const_cast<int32_t*>(step.starts), *seen = const_cast<int32_t*>(step.contexts), *table = const_cast<int32_t*>(step.tables);
    const int64_t s = fuzz.between(0, step.sequences - 1);
    bad(start[0], fuzz.one_of({-1, 1, INT32_MIN})); bad(start[step.sequences], fuzz.one_of({0, -1, INT32_MAX}));
    if (step.sequences > 1) bad(start[1], fuzz.one_of({-1, INT32_MIN, INT32_MAX, static_cast<int32_t>(step.tokens + 1)}));
    bad(seen[s], start[s + 1] - start[s] - 1); bad(seen[s], fuzz.one_of({-1, INT32_MIN, INT32_MAX}));
    if (start[s + 1] == start[s]) return;
    int32_t& block = table[s * step.table_stride + fuzz.between(0, (seen[s] - 1) / step.block_size)];
    bad(block, fuzz.one_of({-1, INT32_MIN, INT32_MAX})); bad(block, step.row_count / step.block_size);
  }
};

void begin(Fuzz& fuzz, Books& books, const kvern_layer& layer) {
  int64_t rope = layer.rope, hidden = layer.hidden, vocabulary = fuzz.size(20);
  int dtype = fuzz.one_of({KVERN_F32, KVERN_BF16});
  const Buffer table = fuzz.numbers(vocabulary * hidden, dtype), frequencies = fuzz.numbers(rope / 2, KVERN_F32);
  std::vector<int64_t> some;
  for (int64_t t = 0; t < books.step.tokens; ++t) some.push_back(fuzz.between(0, vocabulary - 1));
  const Buffer id = buffer_of(some);
  auto* ids = reinterpret_cast<int64_t*>(id.data());
  const float* at = frequencies.floats();
  const auto call = [&] { return kvern_begin_step(&books.step, at, rope, 1.0f, table.data(), dtype, vocabulary, hidden, ids); };
  const auto bad = [&](auto& value, auto wrong) {
    must_refuse_with(value, static_cast<std::decay_t<decltype(value)>>(wrong), call, {&books.x, &books.rotation, &books.slots}, "a bad beginning");
  };
  require(call() == KVERN_OK, "the beginning of a step");
  bad(rope, -2); bad(rope, rope + 1); bad(rope, kHuge - 1); bad(hidden, 0); bad(hidden, -1); bad(hidden, kHuge); bad(hidden, kWide);
  bad(vocabulary, 0); bad(vocabulary, kHuge); bad(dtype, 2); bad(ids, nullptr); bad(books.step.x, nullptr);
  if (rope) bad(at, nullptr);
  if (rope) bad(books.step.rotation, nullptr);
  bad(ids[fuzz.between(0, books.step.tokens - 1)], fuzz.one_of<int64_t>({-1, vocabulary, kHuge, INT64_MIN}));
  books.must_refuse_books(fuzz, call, {&books.x, &books.rotation, &books.slots});
}

void must_refuse_layers(Fuzz& fuzz, kvern_layer layer) {
  const auto call = [&] { return kvern_check_layer(&layer); };
  const auto bad = [&](auto& value, auto wrong) {
    must_refuse_with(value, static_cast<std::decay_t<decltype(value)>>(wrong), call, {}, "a bad layer");
  };
  for (int64_t* size : {&layer.hidden, &layer.heads, &layer.value, &layer.rank}) {
    for (const int64_t wrong : {int64_t{0}, int64_t{-1}, *size + 1, kHuge, kWide}) bad(*size, wrong);
  }
  for (int64_t* size : {&layer.nope, &layer.rope, &layer.q_rank, &layer.common, &layer.routed}) {
    for (const int64_t wrong : {int64_t{-1}, int64_t{INT64_MIN}, kHuge, kHuge - 1, kWide}) bad(*size, wrong);
  }
  for (const float** norm : {&layer.input_norm, &layer.kv_norm, &layer.post_norm}) bad(*norm, nullptr);
  bad(layer.values, nullptr); bad(layer.experts, nullptr);
  if (layer.nope) bad(layer.absorb, nullptr);
  if (layer.nope) bad(layer.keys, nullptr);
  if (layer.q_rank) bad(layer.q_norm, nullptr);
  if (layer.routed) {
    bad(layer.top_k, 0); bad(layer.top_k, layer.routed + 1); bad(layer.top_k, kHuge); bad(layer.groups, 0); bad(layer.groups, -1);
    bad(layer.kept_groups, 0); bad(layer.kept_groups, layer.groups + 1); bad(layer.kept_groups, kHuge); bad(layer.gate_bias, nullptr);
    if (layer.routed > 1) bad(layer.groups, layer.routed + 1);
    must_refuse_weights(fuzz, layer.gate, call, {});
  }
  must_refuse_weights(fuzz, layer.q_a, call, {});
  must_refuse_weights(fuzz, layer.kv_a, call, {});
  must_refuse_weights(fuzz, layer.o_proj, call, {});
  auto* expert = const_cast<kvern_expert*>(layer.experts) + fuzz.between(0, layer.common + layer.routed - 1);
  for (kvern_packed* one : {&expert->gate, &expert->up, &expert->down}) must_refuse_weights(fuzz, *one, call, {});
  must_refuse_weights(fuzz, const_cast<kvern_packed*>(layer.values)[fuzz.between(0, layer.heads - 1)], call, {});
}

// Each sequence of a step alone: the same rows of x, bit for bit.
void must_be_same_alone(const Books& books, const kvern_layer& layer, const std::vector<uint8_t>& x, std::vector<uint8_t> rows) {
  for (int64_t s = 0; s < books.step.sequences; ++s) {
    const int64_t first = books.step.starts[s], count = books.step.starts[s + 1] - first;
    if (!count) continue;
    const int32_t starts[2] = {0, static_cast<int32_t>(count)};
    kvern_step alone = books.step;
    std::vector<float> numbers(static_cast<size_t>(count * layer.hidden));
    std::memcpy(numbers.data(), x.data() + first * layer.hidden * 4, numbers.size() * 4);
    alone.tokens = count;
    alone.sequences = 1;
    alone.x = numbers.data();
    alone.starts = starts;
    alone.slots += first;
    if (layer.rope) alone.rotation += first * layer.rope;
    alone.contexts += s;
    alone.tables += s * alone.table_stride;
    if (alone.expanded) alone.expanded += s;
    require(kvern_run_layers(&layer, 1, &alone, rows.data(), 0) == KVERN_OK, "a sequence alone");
    for (size_t i = 0; i < numbers.size(); ++i) {
      require(same(numbers[i], books.x.floats()[static_cast<size_t>(first * layer.hidden) + i]), "a sequence alone and among others");
    }
  }
}

void run(Fuzz& fuzz, Books& books, const kvern_layer& layer) {
  kvern_layer layers[2] = {layer, layer};
  int64_t count = 1, bytes = books.step.row_count * books.step.row_stride * bytes_of(books.step.rows_dtype);
  void* rows = books.rows.data();
  const auto call = [&] { return kvern_run_layers(layers, count, &books.step, rows, bytes); };
  const auto before_x = books.x.copy(), before_rows = books.rows.copy();
  require(call() == KVERN_OK, "layers");
  must_be_same_alone(books, layer, before_x, before_rows);
  count = 2;
  require(call() == KVERN_OK, "two layers");
  const auto bad = [&](auto& value, auto wrong) {
    must_refuse_with(value, static_cast<std::decay_t<decltype(value)>>(wrong), call, {&books.x, &books.rows}, "layers with a bad argument");
  };
  kvern_step& step = books.step;
  bad(count, -1); bad(bytes, -4); bad(rows, nullptr); bad(step.x, nullptr); bad(step.rows_dtype, fuzz.one_of({-1, 77, 99}));
  if (step.rows_dtype != KVERN_LATENT8) bad(bytes, bytes + 1);
  bad(step.activations, fuzz.one_of({-1, 2, 4})); bad(step.row_stride, row_elements(step.rows_dtype, layer.rank, layer.rope) - 1); bad(step.row_stride, kHuge); bad(step.row_count, kHuge);
  bad(step.slots[fuzz.between(0, step.tokens - 1)], fuzz.one_of<int64_t>({-1, step.row_count, kHuge, INT64_MIN}));
  bad(layers[1].rank, layer.rank + 4); bad(layers[1].hidden, layer.hidden + 1); bad(layers[1].rope, layer.rope + 2);
  if (layer.rope) bad(step.rotation, nullptr);
  books.must_refuse_books(fuzz, call, {&books.x, &books.rows});
}

void run_head(Fuzz& fuzz, Books& books, int64_t hidden) {
  int64_t count = fuzz.between(1, 20);
  const int64_t wanted = count;
  Weight head = weight_of(fuzz, any_kind(fuzz), fuzz.size(150), hidden);
  std::vector<int64_t> some;
  for (int64_t i = 0; i < count; ++i) some.push_back(fuzz.between(0, books.step.tokens - 1));
  const Buffer norm = fuzz.numbers(hidden, KVERN_F32), row = buffer_of(some), out(count * hidden * 4), logits(count * head.c.n * 4);
  auto* rows = reinterpret_cast<int64_t*>(row.data());
  float *to = out.floats(), *scores = logits.floats();
  const float* by = norm.floats();
  const auto call = [&] { return kvern_run_head(&head.c, by, 1e-6f, &books.step, hidden, rows, count, to, scores); };
  require(call() == KVERN_OK, "head");
  require(kvern_run_head(nullptr, by, 1e-6f, &books.step, hidden, rows, count, to, nullptr) == KVERN_OK, "norm alone");
  const auto bad = [&](auto& value, auto wrong) {
    must_refuse_with(value, static_cast<std::decay_t<decltype(value)>>(wrong), call, {&out, &logits}, "a bad head");
  };
  bad(count, -1); bad(count, kHuge); bad(hidden, 0); bad(hidden, hidden + 1); bad(hidden, kHuge); bad(books.step.activations, 2);
  bad(by, nullptr); bad(rows, nullptr); bad(to, nullptr); bad(scores, nullptr); bad(books.step.x, nullptr);
  bad(rows[fuzz.between(0, wanted - 1)], fuzz.one_of<int64_t>({-1, books.step.tokens, kHuge}));
  must_refuse_weights(fuzz, head.c, call, {&out, &logits});
  count = 0;
  require(call() == KVERN_OK, "no rows wanted");
}

}  // namespace

void fuzz_product(Fuzz& fuzz) {
  int64_t m = fuzz.size(50);
  Weight w = weight_of(fuzz, any_kind(fuzz), fuzz.size(300), width(fuzz, 300));
  const int64_t n = w.c.n, k = w.c.k;
  int activations = fuzz.one_of({KVERN_F32, KVERN_BF16});
  const Buffer x = fuzz.numbers(m * k, KVERN_F32), bias = fuzz.numbers(n, KVERN_F32), y(m * n * 4), one(n * 4);
  const float *from = x.floats(), *by = fuzz.chance(2) ? bias.floats() : nullptr;
  float* to = y.floats();
  const auto call = [&] { return kvern_multiply(&w.c, from, m, activations, by, to); };
  require(call() == KVERN_OK, "multiply");
  const int64_t row = fuzz.between(0, m - 1);
  require(kvern_multiply(&w.c, from + row * k, 1, activations, by, one.floats()) == KVERN_OK, "multiply a row");
  for (int64_t i = 0; i < n; ++i) require(same(one.floats()[i], to[row * n + i]), "a row alone and among others");
  const auto bad = [&](auto& value, auto wrong) {
    must_refuse_with(value, static_cast<std::decay_t<decltype(value)>>(wrong), call, {&y}, "multiply with a bad argument");
  };
  bad(m, -1); bad(m, kHuge); bad(m, kWide); bad(activations, fuzz.one_of({-1, 2, 99})); bad(from, nullptr); bad(to, nullptr);
  must_refuse_weights(fuzz, w.c, call, {&y});
  m = 0;
  require(call() == KVERN_OK, "no rows");
}

void fuzz_pack(Fuzz& fuzz) {
  int kind = static_cast<int>(fuzz.between(KVERN_F32, KVERN_INT4_TURNED)), dtype = kind;
  const bool is_turned = kind == KVERN_INT4_TURNED, is_int4 = kind == KVERN_INT4 || is_turned, is_scaled = is_int4 || kind == KVERN_F8_E4M3;
  int64_t n = is_turned ? 32 * fuzz.between(1, 4) : fuzz.size(80), k = kind == KVERN_INT4 ? 128 : fuzz.size(200), group = is_int4 ? 32 : 0;
  int64_t stride = is_int4 ? (k + 7) / 8 : k, scale_stride = is_turned ? k : is_int4 ? 4 : (k + 127) / 128;
  const int64_t scale_rows = is_turned ? n / 32 : is_int4 ? n : (n + 127) / 128;
  const Buffer weight = fuzz.numbers(n * stride, is_int4 ? KVERN_F32 : kind);
  const Buffer scale = fuzz.numbers(scale_rows * scale_stride, is_int4 ? KVERN_BF16 : KVERN_F32);
  const Buffer tiles(kvern_packed_bytes(kind, n, k)), scales(kvern_scale_bytes(kind, n, k, group));
  void *to = tiles.data(), *scales_to = scales.data();
  const void *from = weight.data(), *scale_from = is_scaled ? scale.data() : nullptr;
  const auto call = [&] { return kvern_pack(to, scales_to, kind, from, dtype, stride, scale_from, scale_stride, group, n, k); };
  const auto bad = [&](auto& value, auto wrong) {
    must_refuse_with(value, static_cast<std::decay_t<decltype(value)>>(wrong), call, {&tiles, &scales}, "pack with a bad argument");
  };
  const int code = call();
  require(code == KVERN_OK || (kind == KVERN_F8_E4M3 && fuzz.is_wild && code == KVERN_HAS_NAN), "pack");
  bad(n, 0); bad(n, -1); bad(n, kHuge); bad(n, kWide); bad(k, 0); bad(k, -1); bad(k, kHuge); bad(k, kWide); bad(stride, stride - 1); bad(stride, kHuge);
  bad(kind, fuzz.one_of<int>({-1, KVERN_PICKS, 99})); bad(dtype, fuzz.one_of<int>({-1, KVERN_PICKS, 99})); bad(to, nullptr); bad(from, nullptr);
  if (is_scaled) {
    bad(scale_from, nullptr); bad(scales_to, nullptr); bad(scale_stride, scale_stride - 1); bad(scale_stride, kHuge);
  }
  if (is_int4) bad(group, fuzz.one_of<int64_t>({0, -32, 16, 64, kHuge}));
  for (const int64_t wrong : {int64_t{0}, int64_t{-1}, kHuge, kWide, int64_t{INT64_MIN}}) {
    require(kvern_packed_bytes(kind, wrong, k) == 0 && kvern_packed_bytes(kind, n, wrong) == 0, "bytes of an impossible weight");
    require(kvern_scale_bytes(kind, wrong, k, group) == 0 && kvern_scale_bytes(kind, n, wrong, group) == 0, "scales of an impossible weight");
  }
}

void fuzz_layer(Fuzz& fuzz) {
  const Model model(fuzz);
  require(kvern_check_layer(&model.layer) == KVERN_OK, "a layer that fits");
  if (fuzz.chance(4)) must_refuse_layers(fuzz, model.layer);
  Books books(fuzz, model.layer);
  begin(fuzz, books, model.layer);
  run(fuzz, books, model.layer);
  run_head(fuzz, books, model.layer.hidden);
}
