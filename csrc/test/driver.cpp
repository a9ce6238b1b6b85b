// Calls every kernel of the library, on every instruction set of this CPU, on shapes with ragged edges in buffers of
// exactly the stated size, and compares with plain loops. Made for the sanitizers (`make sanitize`): a read or write past
// a buffer, undefined behaviour or a race ends the run.
#include <algorithm>
#include <cstring>
#include <thread>

#include "check.h"

namespace {

void check_linear(Random& random, int dtype, int64_t m, int64_t n, int64_t k) {
  const int64_t blocks = (k + 127) / 128;
  const auto x = random.stored(m * k, KVERN_F32);
  const auto weight = random.stored(n * k, dtype);
  const auto bias = random.stored(n, KVERN_BF16);
  std::vector<float> scale(static_cast<size_t>((n + 127) / 128 * blocks));
  for (auto& one : scale) one = std::abs(random.number()) + 0.1f;
  std::vector<float> y(static_cast<size_t>(m * n));
  const float* scales = dtype == KVERN_F8_E4M3 ? scale.data() : nullptr;
  const int code = kvern_linear(y.data(), KVERN_F32, x.data(), KVERN_F32, weight.data(), dtype, k, scales, blocks,
                                bias.data(), KVERN_BF16, m, n, k);
  require(code == KVERN_OK, "linear's code");
  for (int64_t i = 0; i < m * n; ++i) {
    double sum = read_scalar(bias.data(), KVERN_BF16, i % n), bound = std::abs(sum);
    for (int64_t c = 0; c < k; ++c) {
      double product = double{read_scalar(x.data(), KVERN_F32, i / n * k + c)} * weight_at(weight, dtype, i % n * k + c);
      if (scales) product *= scale[static_cast<size_t>(i % n / 128 * blocks + c / 128)];
      sum += product;
      bound += std::abs(product);
    }
    close(y[static_cast<size_t>(i)], sum, bound, "linear");
  }
}

void check_dequantize(Random& random, int64_t n, int64_t k) {
  const auto weight = random.stored(n * k, KVERN_F8_E4M3);
  const std::vector<float> scale(static_cast<size_t>((n + 127) / 128 * ((k + 127) / 128)), 0.5f);
  std::vector<float> out(static_cast<size_t>(n * k));
  std::vector<uint16_t> short_out(out.size());
  require(!kvern_dequantize(out.data(), KVERN_F32, weight.data(), k, scale.data(), (k + 127) / 128, n, k), "code");
  require(!kvern_dequantize(short_out.data(), KVERN_BF16, weight.data(), k, scale.data(), (k + 127) / 128, n, k), "code");
  for (int64_t i = 0; i < n * k; ++i) {
    const float expected = float_of_e4m3(weight[static_cast<size_t>(i)]) * 0.5f;
    require(out[static_cast<size_t>(i)] == expected, "dequantize");
    require(float_of_bf16(short_out[static_cast<size_t>(i)]) == expected, "dequantize to BF16");
  }
}

// Records of random latents, one block of which holds a NaN; and what plain loops make of each number.
void check_latents(Random& random, int64_t count, int64_t rank, int64_t rope) {
  const int64_t dim = rank + rope, bytes = latent8_bytes(rank, rope);
  std::vector<float> latents(static_cast<size_t>(count * dim)), back(latents.size());
  for (auto& one : latents) one = random.number() * std::exp2(10 * random.number());
  latents.back() = rope ? std::nanf("") : latents.back();
  latents[0] = std::nanf("");
  std::vector<uint8_t> records(static_cast<size_t>(count * bytes));
  require(!kvern_encode_latents(records.data(), bytes, latents.data(), count, rank, rope), "code of latents");
  require(!kvern_decode_latents(back.data(), records.data(), bytes, count, rank, rope), "code of latents");
  require(kvern_encode_latents(records.data(), bytes - 1, latents.data(), count, rank, rope), "a stride too short");
  for (int64_t i = 0; i < count * dim; ++i) {
    const int64_t row = i / dim, d = i % dim;
    const float number = latents[static_cast<size_t>(i)], found = back[static_cast<size_t>(i)];
    if (d >= rank) {
      const float kept = float_of_bf16(bf16_of_float(number));
      require(kept == found || (kept != kept && found != found), "the rope part of a record");
      continue;
    }
    const int64_t block = d / kLatentBlock;
    if (row == 0 && block == 0) {
      require(found != found, "a block with a NaN");
      continue;
    }
    const uint8_t* record = records.data() + row * bytes;
    const float scale = latent_scale(record, rank, block);
    require(found == float_of_e4m3(record[d]) * scale, "a number of a record");
    double nearest = 1e30;
    for (int code = 0; code < 256; ++code) {
      if ((code & 0x7f) == 0x7f) continue;
      nearest = std::min(nearest, std::abs(double{float_of_e4m3(static_cast<uint8_t>(code))} - double{number} / scale));
    }
    require(std::abs(double{float_of_e4m3(record[d])} - double{number} / scale) <= nearest + 1e-5, "the nearest code");
  }
}

// Rows of a cache in a block of exactly their size, and the numbers that they hold.
struct Rows {
  std::vector<uint8_t> bytes;
  std::vector<float> numbers;
  int64_t stride;

  Rows(Random& random, int dtype, int64_t count, int64_t rank, int64_t rope)
      : numbers(static_cast<size_t>(count * (rank + rope))), stride(row_elements(dtype, rank, rope)) {
    if (dtype != KVERN_LATENT8) {
      bytes = random.stored(count * (rank + rope), dtype);
      for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = read_scalar(bytes.data(), dtype, static_cast<int64_t>(i));
      return;
    }
    for (auto& one : numbers) one = random.number();
    bytes.resize(static_cast<size_t>(count * stride));
    require(!kvern_encode_latents(bytes.data(), stride, numbers.data(), count, rank, rope), "code of latents");
    require(!kvern_decode_latents(numbers.data(), bytes.data(), stride, count, rank, rope), "code of latents");
  }
};

struct Attention {
  int dtype, rows_dtype;
  int64_t heads, dim, rank, block_size;
  std::vector<int32_t> contexts, starts;
};

void check_attention(Random& random, const Attention& one) {
  const auto sequences = static_cast<int64_t>(one.contexts.size());
  int64_t width = 0;
  for (const int32_t context : one.contexts) width = std::max<int64_t>(width, (context + one.block_size - 1) / one.block_size);
  const int64_t row_count = sequences * width * one.block_size, queries = one.starts.back();
  std::vector<int32_t> tables(static_cast<size_t>(sequences * width));
  for (size_t i = 0; i < tables.size(); ++i) tables[i] = static_cast<int32_t>(tables.size() - 1 - i);
  const auto q = random.stored(queries * one.heads * one.dim, one.dtype);
  Rows rows(random, one.rows_dtype, row_count, one.rank, one.dim - one.rank);
  const bool has_dots = std::strcmp(kvern_isa(), "avx512bf16") == 0 || std::strcmp(kvern_isa(), "amx") == 0;
  if (one.dtype == KVERN_BF16 && has_dots) {
    for (auto& number : rows.numbers) number = float_of_bf16(bf16_of_float(number));  // as the dot products take them
  }
  std::vector<uint8_t> out(static_cast<size_t>(queries * one.heads * one.rank) * (one.dtype == KVERN_F32 ? 4 : 2));
  const auto call = [&] {
    return kvern_paged_latent_attention(out.data(), q.data(), one.dtype, queries, rows.bytes.data(), one.rows_dtype, row_count,
                                        rows.stride, tables.data(), width, one.contexts.data(), one.starts.data(), sequences,
                                        one.block_size, one.heads, one.dim, one.rank, 0.2f);
  };
  require(call() == KVERN_OK, "attention's code");
  for (int64_t s = 0; s < sequences; ++s) {
    const int32_t* offset = one.starts.data() + s;
    for (int64_t query = offset[0]; query < offset[1]; ++query) {
      const int64_t seen = one.contexts[static_cast<size_t>(s)] - (offset[1] - 1 - query);
      const auto number = [&](int64_t row, int64_t d) {
        const int64_t block = tables[static_cast<size_t>(s * width + row / one.block_size)];
        return rows.numbers[static_cast<size_t>((block * one.block_size + row % one.block_size) * one.dim + d)];
      };
      for (int64_t head = 0; head < one.heads; ++head) {
        std::vector<double> sums(static_cast<size_t>(one.rank)), bounds(sums);
        double total = 0;
        for (int64_t row = 0; row < seen; ++row) {
          double score = 0;
          for (int64_t d = 0; d < one.dim; ++d) {
            score += double{read_scalar(q.data(), one.dtype, (query * one.heads + head) * one.dim + d)} *
                     number(row, d);
          }
          const double weight = std::exp(score * 0.2);
          total += weight;
          for (int64_t r = 0; r < one.rank; ++r) {
            const double value = weight * number(row, r);
            sums[static_cast<size_t>(r)] += value;
            bounds[static_cast<size_t>(r)] += std::abs(value);
          }
        }
        for (int64_t r = 0; r < one.rank; ++r) {
          const auto at = static_cast<size_t>(r);
          const double rounding = one.dtype == KVERN_BF16 ? 1000.0 : 1.0;  // of the output, and of the weights
          close(read_scalar(out.data(), one.dtype, (query * one.heads + head) * one.rank + r), sums[at] / total,
                rounding * bounds[at] / total, "attention");
        }
      }
    }
  }
  tables[0] = static_cast<int32_t>(row_count / one.block_size);
  require(call() == KVERN_BAD_ARGUMENT, "a block outside the cache");
}

struct Expanded {
  int dtype;
  int64_t tokens, context, heads, nope, rope, value;
};

void check_expanded(Random& random, const Expanded& one) {
  const int64_t size = one.nope + one.rope, row = one.nope + one.value;
  const auto q = random.stored(one.tokens * one.heads * size, one.dtype);
  const auto kv = random.stored(one.context * one.heads * row, one.dtype);
  const auto rope = random.stored(one.context * one.rope, one.dtype);
  std::vector<uint8_t> out(static_cast<size_t>(one.tokens * one.heads * one.value) * (one.dtype == KVERN_F32 ? 4 : 2));
  const int code = kvern_expanded_attention(out.data(), q.data(), kv.data(), rope.data(), one.rope, one.dtype, one.tokens,
                                            one.context, one.heads, one.nope, one.rope, one.value, 0.2f);
  require(code == KVERN_OK, "expanded attention's code");
  for (int64_t at = 0; at < one.tokens * one.heads; ++at) {
    const int64_t head = at % one.heads, seen = one.context - one.tokens + at / one.heads + 1;
    std::vector<double> sums(static_cast<size_t>(one.value)), bounds(sums);
    double total = 0;
    for (int64_t c = 0; c < seen; ++c) {
      const auto number = [&](int64_t i) { return read_scalar(kv.data(), one.dtype, (c * one.heads + head) * row + i); };
      double score = 0;
      for (int64_t d = 0; d < size; ++d) {
        const float key = d < one.nope ? number(d) : read_scalar(rope.data(), one.dtype, c * one.rope + d - one.nope);
        score += double{read_scalar(q.data(), one.dtype, at * size + d)} * key;
      }
      const double weight = std::exp(score * 0.2);
      total += weight;
      for (int64_t r = 0; r < one.value; ++r) {
        sums[static_cast<size_t>(r)] += weight * number(one.nope + r);
        bounds[static_cast<size_t>(r)] += weight * std::abs(number(one.nope + r));
      }
    }
    for (int64_t r = 0; r < one.value; ++r) {
      const auto i = static_cast<size_t>(r);
      const double rounding = one.dtype == KVERN_BF16 ? 1000.0 : 1.0;
      close(read_scalar(out.data(), one.dtype, at * one.value + r), sums[i] / total, rounding * bounds[i] / total,
            "expanded attention");
    }
  }
}

void check_all() {
  Random random;
  for (const int dtype : {KVERN_F32, KVERN_BF16, KVERN_F8_E4M3}) {
    for (const int64_t m : {1, 2, 3, 4, 5, 9, 33}) {
      check_linear(random, dtype, m, 7, 1);
      check_linear(random, dtype, m, 130, 191);
      check_linear(random, dtype, m, 5, 1090);
    }
    check_linear(random, dtype, 2, 900, 256);  // several chunks
  }
  for (const int64_t k : {1, 65, 300}) check_dequantize(random, 131, k);
  for (const int64_t rank : {1, 64, 128, 129, 300}) {
    for (const int64_t rope : {0, 1, 64}) check_latents(random, 19, rank, rope);
  }
  for (const int rows_dtype : {int{KVERN_F32}, int{KVERN_BF16}, int{KVERN_LATENT8}}) {
    check_attention(random, {KVERN_F32, rows_dtype, 14, 70, 33, 16, {1, 600, 40}, {0, 1, 3, 4}});
    check_attention(random, {KVERN_F32, rows_dtype, 130, 20, 20, 3, {17}, {0, 2}});
    check_attention(random, {KVERN_F32, rows_dtype, 1, 1, 1, 1, {9}, {0, 1}});
  }
  for (const int rows_dtype : {int{KVERN_BF16}, int{KVERN_LATENT8}}) {
    for (const int64_t heads : {1, 9, 12, 70}) {
      check_attention(random, {KVERN_BF16, rows_dtype, heads, 64, 48, 16, {300, 5}, {0, 1, 2}});
      check_attention(random, {KVERN_BF16, rows_dtype, heads, 37, 21, 3, {31, 66}, {0, 7, 9}});
      check_attention(random, {KVERN_BF16, rows_dtype, heads, 1, 1, 1, {259}, {0, 5}});
      check_attention(random, {KVERN_BF16, rows_dtype, heads, 195, 130, 4, {41}, {0, 2}});
    }
  }
  for (const int dtype : {KVERN_F32, KVERN_BF16}) {
    check_expanded(random, {dtype, 1, 1, 1, 0, 0, 1});
    check_expanded(random, {dtype, 70, 133, 3, 16, 8, 24});
    check_expanded(random, {dtype, 33, 33, 2, 65, 3, 71});
    check_expanded(random, {dtype, 5, 100, 2, 0, 7, 33});
    check_expanded(random, {dtype, 130, 130, 1, 5, 0, 1});
  }
  check_packed();
  check_sample();
  check_train();
}

}  // namespace

int main() {
  for (const char* name : {"scalar", "avx2", "avx512", "avx512bf16", "amx"}) {
    if (kvern_select_isa(name) != KVERN_OK) continue;
    for (const int threads : {1, 3}) {
      require(kvern_set_threads(threads) == KVERN_OK, "threads");
      check_all();
    }
    std::thread other(check_all);  // two callers at once: one owns the pool, the other works alone
    check_all();
    other.join();
    std::printf("%s: fine\n", name);
  }
  const std::vector<uint64_t> words(1000, 3);
  require(kvern_read(words.data(), 8000) == 3000, "read");
  return 0;
}
