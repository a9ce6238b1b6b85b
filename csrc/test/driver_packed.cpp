// Packed products of every kind against plain loops, and whole layers: in buffers of exactly the stated size, and the
// same numbers for a token alone and among others.
#include <algorithm>
#include <cstring>

#include "../kvern_layer.h"
#include "check.h"

namespace {

struct Packed {
  std::vector<uint8_t> weight, scale, tiles, scales;
  std::vector<int32_t> picks;
  std::vector<float> factors;
  kvern_packed c{};
  int64_t blocks = 0;

  int value(int64_t row, int64_t column) const {  // of 4 bits
    const int64_t word = row * ((c.k + 7) / 8) + column / 8;
    return weight[static_cast<size_t>(word * 4 + column % 8 / 2)] >> (4 * (column % 2)) & 15;
  }

  double at(int64_t row, int64_t column) const {
    if (c.kind == KVERN_PICKS) return picks[static_cast<size_t>(row)] == column ? factors[static_cast<size_t>(row)] : 0.0f;
    if (c.kind == KVERN_INT4) {
      return (value(row, column) - 8) * double{read_scalar(scale.data(), KVERN_BF16, row * (c.k / c.group) + column / c.group)};
    }
    if (c.kind == KVERN_INT4_TURNED) {
      return (value(row, column) - 8) * double{read_scalar(scale.data(), KVERN_BF16, row / c.group * c.k + column)};
    }
    const double number = weight_at(weight, c.kind, row * c.k + column);
    if (c.kind != KVERN_F8_E4M3) return number;
    return number * read_scalar(scale.data(), KVERN_F32, row / 128 * blocks + column / 128);
  }
};

void pack(Packed& one, int64_t stride, int64_t scale_stride) {
  const kvern_packed& c = one.c;
  one.tiles.resize(static_cast<size_t>(kvern_packed_bytes(c.kind, c.n, c.k)));
  one.scales.resize(static_cast<size_t>(kvern_scale_bytes(c.kind, c.n, c.k, c.group)));
  require(kvern_pack(one.tiles.data(), one.scales.data(), c.kind, one.weight.data(), c.kind, stride, one.scale.data(),
                     scale_stride, c.group, c.n, c.k) == KVERN_OK, "pack");
  one.c.tiles = one.tiles.data();
  one.c.scales = one.scales.data();
}

Packed packed(Random& random, int kind, int64_t n, int64_t k) {
  Packed one;
  one.c.n = n;
  one.c.k = k;
  one.c.kind = kind;
  if (kind == KVERN_PICKS) {
    for (int64_t i = 0; i < n; ++i) {
      one.picks.push_back(static_cast<int32_t>(random.engine() % static_cast<uint64_t>(k)));
      one.factors.push_back(random.number());
    }
    one.c.picks = one.picks.data();
    one.c.factors = one.factors.data();
    return one;
  }
  int64_t stride = k, scale_stride = 0;
  if (kind == KVERN_INT4) {
    one.c.group = 32;
    one.weight = random.stored(n * k / 4, KVERN_BF16);  // any bits will do
    one.scale = random.stored(n * k / 32, KVERN_BF16);
    stride = k / 8;
    scale_stride = k / 32;
  } else if (kind == KVERN_INT4_TURNED) {
    one.c.group = 32;
    stride = (k + 7) / 8;
    scale_stride = k;
    one.weight = random.stored(n * stride * 2, KVERN_BF16);
    one.scale = random.stored(n / 32 * k, KVERN_BF16);
  } else {
    one.weight = random.stored(n * k, kind);
  }
  if (kind == KVERN_F8_E4M3) {
    one.blocks = scale_stride = (k + 127) / 128;
    one.scale = random.stored((n + 127) / 128 * one.blocks, KVERN_F32);
    for (int64_t i = 0; i < (n + 127) / 128 * one.blocks; ++i) {
      write_scalar(one.scale.data(), KVERN_F32, i, read_scalar(one.scale.data(), KVERN_F32, i) / 128);
    }
  }
  pack(one, stride, scale_stride);
  return one;
}

// Of 4-bit groups.
Packed turned_int4(const Packed& one) {
  Packed turned;
  const int64_t n = one.c.k, k = one.c.n, words = (k + 7) / 8, groups = n / one.c.group;
  turned.c = {nullptr, nullptr, nullptr, nullptr, n, k, KVERN_INT4_TURNED, one.c.group};
  turned.weight.resize(static_cast<size_t>(n * words * 4));
  turned.scale.resize(static_cast<size_t>(groups * k * 2));
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t c = 0; c < k; ++c) {
      turned.weight[static_cast<size_t>(r * words * 4 + c / 2)] |= static_cast<uint8_t>(one.value(c, r) << (4 * (c % 2)));
      std::memcpy(&turned.scale[static_cast<size_t>((r / one.c.group * k + c) * 2)],
                  &one.scale[static_cast<size_t>((c * groups + r / one.c.group) * 2)], 2);
    }
  }
  pack(turned, words, k);
  return turned;
}

// Of a weight in one scale block, or in 4-bit groups.
Packed transposed(const Packed& one) {
  if (one.c.kind == KVERN_INT4) return turned_int4(one);
  Packed turned;
  turned.c = {nullptr, nullptr, nullptr, nullptr, one.c.k, one.c.n, one.c.kind, 0};
  const size_t size = one.weight.size() / static_cast<size_t>(one.c.n * one.c.k);
  for (int64_t c = 0; c < one.c.k; ++c) {
    for (int64_t r = 0; r < one.c.n; ++r) {
      const auto* from = one.weight.data() + static_cast<size_t>(r * one.c.k + c) * size;
      turned.weight.insert(turned.weight.end(), from, from + size);
    }
  }
  turned.scale = one.scale;
  pack(turned, turned.c.k, 1);
  return turned;
}

void check_product(Random& random, int kind, int64_t m, int64_t n, int64_t k) {
  if (kind == KVERN_INT4) k = (k + 31) / 32 * 32;
  if (kind == KVERN_INT4_TURNED) n = (n + 31) / 32 * 32;
  const Packed w = packed(random, kind, n, k);
  const auto x = random.stored(m * k, KVERN_F32);
  const auto bias = random.stored(n, KVERN_F32);
  const auto* numbers = reinterpret_cast<const float*>(x.data());
  std::vector<float> y(static_cast<size_t>(m * n));
  require(kvern_multiply(&w.c, numbers, m, KVERN_F32, reinterpret_cast<const float*>(bias.data()), y.data()) == KVERN_OK,
          "multiply");
  for (int64_t i = 0; i < m * n; ++i) {
    double sum = read_scalar(bias.data(), KVERN_F32, i % n), bound = std::abs(sum);
    for (int64_t c = 0; c < k; ++c) {
      const double product = double{numbers[i / n * k + c]} * w.at(i % n, c);
      sum += product;
      bound += std::abs(product);
    }
    close(y[static_cast<size_t>(i)], sum, 2 * bound, "packed product");
  }
}

// A layer of random weights, routed or dense, and the step that runs it.
struct Model {
  static constexpr int64_t heads = 3, nope = 9, rope = 6, routed = 6, block = 4;
  int64_t hidden = 40, value = 5, rank = 33, q_rank = 21, width = 19;
  std::vector<Packed> kept;
  std::vector<kvern_packed> absorb, keys, values;
  std::vector<kvern_expert> experts;
  std::vector<float> ones = std::vector<float>(128, 1.0f);
  kvern_layer layer{};

  Model(Random& random, int kind, bool is_routed) {
    kept.reserve(64);
    if (kind == KVERN_INT4) hidden = value = rank = q_rank = width = 32;  // whole groups
    const auto make = [&](int64_t n, int64_t k) {
      kept.push_back(packed(random, kind, n, k));
      return kept.back().c;
    };
    layer.hidden = hidden;
    layer.heads = heads;
    layer.nope = nope;
    layer.rope = rope;
    layer.value = value;
    layer.rank = rank;
    layer.q_rank = q_rank;
    layer.norm_eps = layer.latent_eps = 1e-6f;
    layer.softmax_scale = 0.01f;
    layer.input_norm = layer.q_norm = layer.kv_norm = layer.post_norm = ones.data();
    layer.q_a = make(q_rank, hidden);
    layer.kv_a = make(rank + rope, hidden);
    layer.q_b = make(heads * (nope + rope), q_rank);
    layer.q_a_bias = layer.kv_a_bias = layer.o_bias = ones.data();
    for (int64_t h = 0; h < heads; ++h) {
      keys.push_back(make(nope, rank));
      kept.push_back(transposed(kept.back()));
      absorb.push_back(kept.back().c);
      values.push_back(make(value, rank));
    }
    layer.absorb = absorb.data();
    layer.keys = keys.data();
    layer.values = values.data();
    layer.o_proj = make(hidden, heads * value);
    layer.common = 1;
    layer.routed = is_routed ? routed : 0;
    for (int64_t e = 0; e < layer.common + layer.routed; ++e) {
      const kvern_packed gate = make(width, hidden), up = make(width, hidden);
      experts.push_back({gate, up, make(hidden, width)});
    }
    layer.experts = experts.data();
    layer.gate = make(routed, hidden);
    layer.gate_bias = ones.data();
    layer.top_k = 2;
    layer.groups = 3;
    layer.kept_groups = 2;
    layer.normalise = 1;
    layer.factor = 2.5f;
    require(kvern_check_layer(&layer) == KVERN_OK, "a layer that fits");
  }

  // x after a step of sequences of `counts` new tokens; blocks of the cache lie backwards.
  std::vector<float> run(const std::vector<float>& x, const std::vector<int32_t>& counts, int activations, int rows_dtype, bool expands) {
    std::vector<float> out = x;
    const auto tokens = static_cast<int64_t>(x.size()) / hidden;
    std::vector<int32_t> starts{0}, tables;
    const int64_t stride = (tokens + block - 1) / block, rows = static_cast<int64_t>(counts.size()) * stride * block;
    for (size_t s = 0; s < counts.size(); ++s) {
      starts.push_back(starts.back() + counts[s]);
      for (int64_t b = 0; b < stride; ++b) {
        tables.push_back(static_cast<int32_t>(rows / block - 1 - static_cast<int64_t>(s) * stride - b));
      }
    }
    std::vector<int64_t> slots(static_cast<size_t>(tokens)), ids(slots);
    std::vector<float> rotation(static_cast<size_t>(tokens * rope)), table(x.begin(), x.begin() + hidden);
    const std::vector<float> frequencies(static_cast<size_t>(rope / 2), 0.5f);
    std::vector<uint8_t> cache(static_cast<size_t>(rows * row_elements(rows_dtype, rank, rope) * row_element_bytes(rows_dtype)));
    const std::vector<uint8_t> flags(counts.size(), 1);
    std::vector<int64_t> counters(KVERN_COUNTERS);
    kvern_step step{};
    step.tokens = tokens;
    step.x = out.data();
    step.rotation = rotation.data();
    step.slots = slots.data();
    step.tables = tables.data();
    step.contexts = counts.data();
    step.starts = starts.data();
    step.expanded = expands ? flags.data() : nullptr;
    step.table_stride = stride;
    step.sequences = static_cast<int64_t>(counts.size());
    step.block_size = block;
    step.row_count = rows;
    step.row_stride = row_elements(rows_dtype, rank, rope);
    step.rows_dtype = rows_dtype;
    step.activations = activations;
    step.counters = counters.data();
    require(kvern_begin_step(&step, frequencies.data(), rope, 1.0f, table.data(), KVERN_F32, 1, hidden, ids.data()) == KVERN_OK,
            "the beginning of a step");
    require(std::equal(table.begin(), table.end(), out.end() - hidden), "the embedding");
    ids.back() = 1;
    require(kvern_begin_step(&step, frequencies.data(), rope, 1.0f, table.data(), KVERN_F32, 1, hidden, ids.data()) ==
                KVERN_BAD_ARGUMENT, "an id outside the vocabulary");
    out = x;
    step.x = out.data();
    require(kvern_run_layers(&layer, 1, &step, cache.data(), 0) == KVERN_OK, "layer");
    const std::vector<float> whole = out;
    slots.back() = rows;
    require(kvern_run_layers(&layer, 1, &step, cache.data(), 0) == KVERN_BAD_ARGUMENT && out == whole, "a slot outside the cache");
    return out;
  }
};

void check_layer(Random& random, int kind, bool is_routed) {
  Model model(random, kind, is_routed);
  const std::vector<int32_t> counts{1, 9, 17};
  std::vector<float> x(static_cast<size_t>(27 * model.hidden));
  for (float& number : x) number = random.number();
  const int forms[][2]{{KVERN_F32, KVERN_F32}, {KVERN_BF16, KVERN_BF16}, {KVERN_F32, KVERN_LATENT8}, {KVERN_BF16, KVERN_LATENT8}};
  for (const auto& [activations, rows] : forms) {
    const auto absorbed = model.run(x, counts, activations, rows, false), expanded = model.run(x, counts, activations, rows, true);
    double most = 0, apart = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      most = std::max(most, std::abs(double{absorbed[i]}));
      apart = std::max(apart, std::abs(double{absorbed[i]} - expanded[i]));
    }
    if (activations == KVERN_F32) require(apart < 1e-3 * most, "both forms of attention");
    const std::vector<float> middle(x.begin() + model.hidden, x.begin() + 10 * model.hidden);
    const auto alone = model.run(middle, {9}, activations, rows, false);
    require(std::equal(alone.begin(), alone.end(), absorbed.begin() + model.hidden), "a sequence alone");
  }
}

}  // namespace

void check_packed() {
  Random random;
  for (int kind = KVERN_F32; kind <= KVERN_PICKS; ++kind) {
    for (const int64_t m : {1, 2, 5, 12, 13, 40}) {
      check_product(random, kind, m, 7, 1);
      check_product(random, kind, m, 49, 191);
    }
    check_product(random, kind, 3, 300, 260);
  }
  for (const int kind : {int{KVERN_F32}, int{KVERN_BF16}, int{KVERN_F8_E4M3}, int{KVERN_INT4}}) {
    check_layer(random, kind, false);
    check_layer(random, kind, true);
  }
}
