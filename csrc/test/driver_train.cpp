// The loops of a training step in buffers of exactly their size, against their formulas.
#include <algorithm>
#include <array>
#include <initializer_list>
#include <numeric>

#include "check.h"

namespace {

constexpr int64_t kRows = 37, kSize = 45, kTopK = 3;

double at(const std::vector<uint8_t>& bytes, int dtype, int64_t index) { return read_scalar(bytes.data(), dtype, index); }
double step_of(int dtype) { return dtype == KVERN_BF16 ? 1e3 : 1; }  // `close` in units of 1e-5

std::vector<float> weights_of(Random& random, int64_t count) {
  std::vector<float> weights(static_cast<size_t>(count));
  for (float& w : weights) w = random.number();
  return weights;
}

void check_norm(Random& random, int dtype) {
  const auto x = random.stored(kRows * kSize, dtype), dy = random.stored(kRows * kSize, dtype);
  const auto weight = weights_of(random, kSize);
  auto y = x, dx = x;
  std::vector<float> inverse(kRows), dw(static_cast<size_t>(4 * kSize));
  require(kvern_rms_norm(y.data(), inverse.data(), x.data(), kSize, weight.data(), dtype, kRows, kSize, 1e-6f) == KVERN_OK, "norm");
  require(kvern_rms_norm_backward(dx.data(), dw.data(), 4, dy.data(), x.data(), kSize, weight.data(), inverse.data(), dtype, kRows,
                                  kSize) == KVERN_OK,
          "norm's gradient");
  double first = 0;
  for (int64_t r = 0; r < kRows; ++r) {
    double sum = 0;
    for (int64_t i = 0; i < kSize; ++i) sum += at(x, dtype, r * kSize + i) * at(x, dtype, r * kSize + i);
    const double by = 1 / std::sqrt(sum / kSize + 1e-6);
    close(at(y, dtype, r * kSize), at(x, dtype, r * kSize) * by * weight[0], 10 * step_of(dtype), "y");
    first += at(dy, dtype, r * kSize) * at(x, dtype, r * kSize) * by;
  }
  close(dw[0] + dw[kSize] + dw[2 * kSize] + dw[3 * kSize], first, 100, "dw");
  require(kvern_rms_norm(y.data(), inverse.data(), x.data(), kSize - 1, weight.data(), dtype, kRows, kSize, 0) == KVERN_BAD_ARGUMENT,
          "rows that overlap");
}

void check_swiglu(Random& random, int dtype) {
  const auto x = random.stored(kRows * 2 * kSize, dtype), dy = random.stored(kRows * kSize, dtype);
  auto y = dy, dx = x;
  const int64_t half = kSize * (dtype == KVERN_F32 ? 4 : 2);
  require(kvern_swiglu(y.data(), x.data(), x.data() + half, 2 * kSize, dtype, kRows, kSize) == KVERN_OK, "swiglu");
  require(kvern_swiglu_backward(dx.data(), dx.data() + half, 2 * kSize, dy.data(), x.data(), x.data() + half, 2 * kSize, dtype, kRows,
                                kSize) == KVERN_OK,
          "swiglu's gradient");
  for (int64_t r = 0; r < kRows; ++r) {
    const double gate = at(x, dtype, 2 * r * kSize), up = at(x, dtype, (2 * r + 1) * kSize), s = 1 / (1 + std::exp(-gate));
    close(at(y, dtype, r * kSize), gate * s * up, 10 * step_of(dtype), "swiglu");
    close(at(dx, dtype, (2 * r + 1) * kSize), at(dy, dtype, r * kSize) * gate * s, 10 * step_of(dtype), "dup");
  }
}

void check_rotate(Random& random, int dtype) {
  const int64_t heads = 3, pairs = 5;
  const auto x = random.stored(kRows * heads * pairs * 2, dtype);
  auto turned = x, back = x;
  std::vector<float> rotation(static_cast<size_t>(kRows * pairs * 2));
  for (size_t i = 0; i < rotation.size(); i += 2) {
    const float angle = random.number();
    rotation[i] = std::cos(angle), rotation[i + 1] = std::sin(angle);
  }
  const int64_t stride = heads * pairs * 2;
  const auto rotate = [&](std::vector<uint8_t>& to, const std::vector<uint8_t>& from, int is_back) {
    require(kvern_rotate(to.data(), from.data(), stride, pairs * 2, rotation.data(), is_back, dtype, kRows, heads, pairs) == KVERN_OK,
            "rotate");
  };
  rotate(turned, x, 0);
  rotate(back, turned, 1);
  for (int64_t i = 0; i < kRows * stride; ++i) close(at(back, dtype, i), at(x, dtype, i), 10 * step_of(dtype), "there and back");
}

void check_combine(Random& random, int dtype) {
  const auto rows = random.stored(kRows * kTopK * kSize, dtype), dy = random.stored(kRows * kSize, dtype);
  const auto weights = weights_of(random, kRows * kTopK);
  std::vector<int64_t> places(static_cast<size_t>(kRows * kTopK));
  std::iota(places.begin(), places.end(), 0);
  std::shuffle(places.begin(), places.end(), random.engine);
  auto out = dy, drows = rows;
  std::vector<float> dweights(weights.size());
  require(kvern_combine(out.data(), rows.data(), weights.data(), places.data(), dtype, kRows, kTopK, kSize) == KVERN_OK, "combine");
  require(kvern_combine(out.data(), rows.data(), nullptr, places.data(), dtype, kRows, kTopK, kSize) == KVERN_OK, "combine ones");
  require(kvern_combine_backward(drows.data(), dweights.data(), dy.data(), rows.data(), weights.data(), places.data(), dtype, kRows,
                                 kTopK, kSize) == KVERN_OK,
          "combine's gradient");
  for (int64_t t = 0; t < kRows; ++t) {
    double sum = 0;
    for (int64_t k = 0; k < kTopK; ++k) sum += at(rows, dtype, places[static_cast<size_t>(t * kTopK + k)] * kSize);
    close(at(out, dtype, t * kSize), sum, 10 * step_of(dtype), "combine");
  }
}

void check_entropy(Random& random, int dtype) {
  auto logits = random.stored(kRows * kSize, dtype);
  const auto before = logits;
  std::vector<int64_t> targets(kRows, 7);
  targets[2] = -100;
  std::vector<float> losses(kRows);
  require(kvern_cross_entropy(losses.data(), logits.data(), targets.data(), 1, dtype, kRows, kSize) == KVERN_OK, "cross entropy");
  for (int64_t r = 0; r < kRows; ++r) {
    double sum = 0;
    for (int64_t i = 0; i < kSize; ++i) sum += std::exp(at(before, dtype, r * kSize + i));
    const bool counts = r != 2;
    const double loss = std::log(sum) - at(before, dtype, r * kSize + 7), slope = std::exp(at(before, dtype, r * kSize + 7)) / sum - 1;
    close(losses[static_cast<size_t>(r)], counts ? loss : 0, 10, "loss");
    close(at(logits, dtype, r * kSize + 7), counts ? slope : 0, 10 * step_of(dtype), "slope");
  }
  targets[5] = kSize;
  require(kvern_cross_entropy(losses.data(), logits.data(), targets.data(), 1, dtype, kRows, kSize) == KVERN_BAD_ARGUMENT, "target");
}

void check_adamw(Random& random, int dtype) {
  const int64_t count = 40001;
  auto parameter = weights_of(random, count), before = parameter, gradient = weights_of(random, count);
  std::vector<uint8_t> mean(static_cast<size_t>(count) * (dtype == KVERN_F32 ? 4 : 2)), square = mean;
  require(kvern_adamw(parameter.data(), gradient.data(), mean.data(), square.data(), dtype, count, 0.1f, 0.95f, 0.9f, 0.1f, 20.0f, 1e-8f) ==
              KVERN_OK,
          "adamw");
  for (int64_t i = 0; i < count; i += 1000) {
    const double sign = gradient[static_cast<size_t>(i)] < 0 ? -1 : 1;
    close(parameter[static_cast<size_t>(i)], before[static_cast<size_t>(i)] * 0.9 - 0.1 * 0.1 * sign, 10, "adamw");
  }
}

void check_tiles(Random& random, int dtype) {
  for (const auto& [rows, columns, tile_rows, tile_columns] : std::initializer_list<std::array<int64_t, 4>>{
           {kRows, kSize, 1, 16}, {kRows, kSize, 16, 1}, {kRows, 1100, 16, 16}, {3, 1100, 1, 512}, {1, 1, 128, 128}}) {
    const int64_t bands = (rows + tile_rows - 1) / tile_rows, tiles = (columns + tile_columns - 1) / tile_columns;
    auto x = random.stored(rows * columns, dtype);
    std::vector<uint8_t> codes(static_cast<size_t>(rows * columns));
    std::vector<float> scale(static_cast<size_t>(bands * tiles)), out(codes.size());
    const auto quantize = [&](int64_t stride, int64_t widest) {
      return kvern_quantize_tiles(codes.data(), scale.data(), x.data(), stride, dtype, rows, columns, tile_rows, widest, 1, 1e-30f);
    };
    require(quantize(columns, tile_columns) == KVERN_OK, "quantize");
    require(kvern_dequantize_tiles(out.data(), codes.data(), columns, scale.data(), rows, columns, tile_rows, tile_columns) == KVERN_OK,
            "dequantize");
    for (int64_t i = 0; i < rows * columns; ++i) {
      const double by = scale[static_cast<size_t>(i / columns / tile_rows * tiles + i % columns / tile_columns)];
      const double number = at(x, dtype, i), got = out[static_cast<size_t>(i)];
      require(std::abs(got - number) <= std::max(std::abs(number) / 16, by * 0x1p-10), "within half a step of E4M3");
    }
    require(quantize(columns - 1, tile_columns) == KVERN_BAD_ARGUMENT, "rows that overlap");
    require(quantize(columns, 513) == KVERN_BAD_ARGUMENT, "a tile that is too wide");
  }
}

// Of one head and query t: what each token before it adds to the result and to every gradient, by the formula.
struct HeadByFormula {
  const std::vector<uint8_t>&q, &kv, &rope, &dout;
  int64_t nope, shared, value;
  double scale;

  double key(int64_t c, int64_t i) const {
    return i < nope ? at(kv, KVERN_BF16, c * (nope + value) + i) : at(rope, KVERN_BF16, c * shared + i - nope);
  }
  double value_at(int64_t c, int64_t i) const { return at(kv, KVERN_BF16, c * (nope + value) + nope + i); }

  void add(int64_t first, int64_t t, std::vector<double>& out, std::vector<double>& dq, std::vector<double>& dk, std::vector<double>& dv) const {
    const int64_t size = nope + shared;
    std::vector<double> p, slopes;
    double total = 0, mean = 0;
    for (int64_t c = first; c <= t; ++c) {
      double score = 0, slope = 0;
      for (int64_t i = 0; i < size; ++i) score += at(q, KVERN_BF16, t * size + i) * key(c, i);
      for (int64_t i = 0; i < value; ++i) slope += at(dout, KVERN_BF16, t * value + i) * value_at(c, i);
      p.push_back(std::exp(score * scale));
      slopes.push_back(slope);
      total += p.back();
    }
    for (size_t c = 0; c < p.size(); ++c) p[c] /= total, mean += p[c] * slopes[c];
    for (int64_t c = first; c <= t; ++c) {
      const double weight = p[static_cast<size_t>(c - first)], ds = weight * (slopes[static_cast<size_t>(c - first)] - mean) * scale;
      for (int64_t i = 0; i < value; ++i) {
        out[static_cast<size_t>(t * value + i)] += weight * value_at(c, i);
        dv[static_cast<size_t>(c * value + i)] += weight * at(dout, KVERN_BF16, t * value + i);
      }
      for (int64_t i = 0; i < size; ++i) {
        dq[static_cast<size_t>(t * size + i)] += ds * key(c, i);
        dk[static_cast<size_t>(c * size + i)] += ds * at(q, KVERN_BF16, t * size + i);
      }
    }
  }
};

// Of one head, so that its gradients lie as the formula's do.
void check_documents(Random& random, int64_t nope, int64_t shared, int64_t value, std::vector<int64_t> starts) {
  const int64_t tokens = starts.back(), documents = static_cast<int64_t>(starts.size()) - 1, size = nope + shared;
  const auto stored = [&](int64_t width) { return random.stored(tokens * width, KVERN_BF16); };
  const auto q = stored(size), kv = stored(nope + value), rope = stored(shared), dout = stored(value);
  auto out = dout, dq = q, dkv = kv;
  std::vector<float> lse(static_cast<size_t>(tokens)), drope(static_cast<size_t>(tokens * shared));
  const auto bits = [](const std::vector<uint8_t>& bytes) { return reinterpret_cast<const uint16_t*>(bytes.data()); };
  const auto room = [](std::vector<uint8_t>& bytes) { return reinterpret_cast<uint16_t*>(bytes.data()); };
  const auto forward = [&](int64_t stride) {
    return kvern_document_attention(room(out), lse.data(), bits(q), bits(kv), bits(rope), stride, starts.data(), documents, tokens, 1,
                                    nope, shared, value, 0.2f);
  };
  if (forward(shared) == KVERN_UNSUPPORTED_ISA) return;
  require(forward(shared) == KVERN_OK, "attention of documents");
  require(shared == 0 || forward(shared - 1) == KVERN_BAD_ARGUMENT, "rows of rope that overlap");
  require(kvern_document_attention_backward(room(dq), room(dkv), drope.data(), bits(dout), bits(out), lse.data(), bits(q), bits(kv),
                                            bits(rope), shared, starts.data(), documents, tokens, 1, nope, shared, value, 0.2f) == KVERN_OK,
          "attention's gradients");
  const HeadByFormula formula{q, kv, rope, dout, nope, shared, value, 0.2f};
  std::vector<double> exact_out(static_cast<size_t>(tokens * value)), exact_dq(static_cast<size_t>(tokens * size)), exact_dk(exact_dq),
      exact_dv(exact_out);
  for (int64_t d = 0; d < documents; ++d) {
    for (int64_t t = starts[static_cast<size_t>(d)]; t < starts[static_cast<size_t>(d) + 1]; ++t) {
      formula.add(starts[static_cast<size_t>(d)], t, exact_out, exact_dq, exact_dk, exact_dv);
    }
  }
  const auto near = [](double got, double exact, const char* what) { close(got, exact, 2e3 * (1 + std::abs(exact)), what); };
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < value; ++i) {
      near(at(out, KVERN_BF16, t * value + i), exact_out[static_cast<size_t>(t * value + i)], "attention");
      near(at(dkv, KVERN_BF16, t * (nope + value) + nope + i), exact_dv[static_cast<size_t>(t * value + i)], "dv");
    }
    for (int64_t i = 0; i < size; ++i) {
      const double dk = i < nope ? at(dkv, KVERN_BF16, t * (nope + value) + i) : drope[static_cast<size_t>(t * shared + i - nope)];
      near(at(dq, KVERN_BF16, t * size + i), exact_dq[static_cast<size_t>(t * size + i)], "dq");
      near(dk, exact_dk[static_cast<size_t>(t * size + i)], "dk");
    }
  }
}

}  // namespace

void check_train() {
  Random random;
  for (const int dtype : {KVERN_F32, KVERN_BF16}) {
    check_norm(random, dtype);
    check_swiglu(random, dtype);
    check_rotate(random, dtype);
    check_combine(random, dtype);
    check_entropy(random, dtype);
    check_adamw(random, dtype);
    check_tiles(random, dtype);
  }
  check_documents(random, 1, 0, 1, {0, 1});
  check_documents(random, 5, 2, 3, {0, 63, 63, 128, 193});
  check_documents(random, 0, 33, 31, {0, 65});
  check_documents(random, 64, 32, 64, {0, 64, 70, 200});
}
