// Random calls of the whole C interface, for the sanitizers: shapes, strides, block tables, weights and layers of every
// kind, numbers that no model has, and books and sizes that no call may accept. Every buffer has exactly the size that the
// interface asks for. Valid calls must succeed, and a row must come out the same, bit for bit, alone and among others;
// invalid ones must be refused and write nothing.
//
//   fuzz [cases] [seed]      case i has seed + i, so `fuzz 1 N` repeats the one that failed
#include "fuzz.h"

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>

// A finding ends the run at once, through abort, whichever sanitizer has it.
extern "C" const char* __asan_default_options() { return "abort_on_error=1"; }
extern "C" const char* __ubsan_default_options() { return "abort_on_error=1:print_stacktrace=1"; }
extern "C" const char* __tsan_default_options() { return "abort_on_error=1:halt_on_error=1"; }

namespace {

uint64_t running = 0;  // the seed of this case, for the report

void report() { std::fprintf(stderr, "fuzz: repeat with `fuzz 1 %llu`\n", static_cast<unsigned long long>(running)); }

void fuzz_linear(Fuzz& fuzz) {
  int64_t m = fuzz.size(40), n = fuzz.size(150), k = fuzz.chance(20) ? 0 : fuzz.size(300);
  int dtype = fuzz.one_of({KVERN_F32, KVERN_BF16, KVERN_F8_E4M3}), x_dtype = fuzz.one_of({KVERN_F32, KVERN_BF16});
  int y_dtype = fuzz.one_of({KVERN_F32, KVERN_BF16}), bias_dtype = fuzz.one_of({KVERN_F32, KVERN_BF16});
  int64_t stride = k + fuzz.between(0, 3), scale_stride = (k + 127) / 128 + fuzz.between(0, 2);
  const bool is_f8 = dtype == KVERN_F8_E4M3;
  const Buffer x = fuzz.numbers(m * k, x_dtype), w = fuzz.numbers((n - 1) * stride + k, dtype), bias = fuzz.numbers(n, bias_dtype);
  const Buffer scale = fuzz.numbers((n - 1) / 128 * scale_stride + (k + 127) / 128, KVERN_F32);
  const Buffer y(m * n * bytes_of(y_dtype)), one(n * bytes_of(y_dtype));
  const void *at_x = x.data(), *at_w = w.data(), *at_bias = fuzz.chance(2) ? bias.data() : nullptr;
  const float* at_scale = is_f8 ? scale.floats() : nullptr;
  void* at_y = y.data();
  const auto call = [&] {
    return kvern_linear(at_y, y_dtype, at_x, x_dtype, at_w, dtype, stride, at_scale, scale_stride, at_bias, bias_dtype, m, n, k);
  };
  require(call() == KVERN_OK, "linear");
  const auto bad = [&](auto& value, auto wrong) {
    must_refuse_with(value, static_cast<std::decay_t<decltype(value)>>(wrong), call, {&y}, "linear with a bad argument");
  };
  bad(m, -1); bad(n, -1); bad(k, -1); bad(m, kHuge); bad(n, kHuge); bad(k, kHuge); bad(m, kWide); bad(n, kWide); bad(k, kWide);
  bad(y_dtype, 2); bad(x_dtype, 2); bad(dtype, fuzz.one_of({-1, 3, 99}));
  bad(stride, k - 1); bad(stride, INT64_MIN); bad(stride, kHuge);
  bad(at_scale, is_f8 ? nullptr : scale.floats()); bad(at_y, nullptr);
  if (is_f8 && k) bad(scale_stride, (k + 127) / 128 - 1);
  if (is_f8) bad(scale_stride, kHuge);
  if (at_bias) bad(bias_dtype, -1);
  if (k) bad(at_x, nullptr);
  if (k) bad(at_w, nullptr);
}

void fuzz_dequantize(Fuzz& fuzz) {
  int64_t n = fuzz.size(150), k = fuzz.size(300), stride = k + fuzz.between(0, 3), scale_stride = (k + 127) / 128 + fuzz.between(0, 2);
  int dtype = fuzz.one_of({KVERN_F32, KVERN_BF16});
  const Buffer w = fuzz.numbers((n - 1) * stride + k, KVERN_F8_E4M3), out(n * k * bytes_of(dtype));
  const Buffer scale = fuzz.numbers((n - 1) / 128 * scale_stride + (k + 127) / 128, KVERN_F32);
  void* to = out.data();
  const auto call = [&] { return kvern_dequantize(to, dtype, w.data(), stride, scale.floats(), scale_stride, n, k); };
  require(call() == KVERN_OK, "dequantize");
  const auto bad = [&](auto& value, auto wrong) {
    must_refuse_with(value, static_cast<std::decay_t<decltype(value)>>(wrong), call, {&out}, "dequantize with a bad argument");
  };
  bad(n, -1); bad(k, -1); bad(n, kHuge); bad(k, kHuge); bad(stride, k - 1); bad(stride, kHuge);
  bad(scale_stride, (k + 127) / 128 - 1); bad(scale_stride, kHuge); bad(dtype, 2); bad(to, nullptr);
}

// Latents in blocks that are scattered and may be shared, sequences of any length, some without a query.
void fuzz_paged(Fuzz& fuzz) {
  int dtype = fuzz.one_of({KVERN_F32, KVERN_BF16}), rows_dtype = fuzz.one_of<int>({KVERN_F32, KVERN_BF16, KVERN_LATENT8});
  int64_t heads = fuzz.size(fuzz.chance(4) ? 140 : 12), dim = fuzz.size(150), rank = fuzz.between(1, dim);
  int64_t block_size = fuzz.one_of<int64_t>({1, 3, 16, fuzz.size(40)}), sequences = fuzz.between(1, 5);
  const int64_t longest = fuzz.chance(6) ? 700 : 90;
  std::vector<int32_t> contexts, starts{0};
  for (int64_t s = 0; s < sequences; ++s) {
    contexts.push_back(static_cast<int32_t>(fuzz.between(1, longest)));
    const int64_t most = std::min<int64_t>(contexts.back(), heads > 12 ? 3 : 20);
    starts.push_back(starts.back() + static_cast<int32_t>(fuzz.chance(5) ? 0 : fuzz.between(1, most)));
  }
  int64_t stride = (*std::max_element(contexts.begin(), contexts.end()) + block_size - 1) / block_size + fuzz.between(0, 2);
  int64_t row_count = fuzz.between(1, 30) * block_size + fuzz.between(0, block_size - 1), row_stride = row_elements(rows_dtype, rank, dim - rank) + fuzz.between(0, 3);
  std::vector<int32_t> tables(static_cast<size_t>(sequences * stride));
  for (int32_t& block : tables) block = static_cast<int32_t>(fuzz.between(0, row_count / block_size - 1));
  int64_t queries = starts.back();
  Buffer t = buffer_of(tables), c = buffer_of(contexts), s = buffer_of(starts);
  auto* table = reinterpret_cast<int32_t*>(t.data());
  auto *context = reinterpret_cast<int32_t*>(c.data()), *start = reinterpret_cast<int32_t*>(s.data());
  const Buffer q = fuzz.numbers(queries * heads * dim, dtype), out(queries * heads * rank * bytes_of(dtype));
  const Buffer rows = fuzz.numbers((row_count - 1) * row_stride + row_elements(rows_dtype, rank, dim - rank), rows_dtype);
  const void *at_q = q.data(), *at_rows = rows.data();
  const auto call = [&] {
    return kvern_paged_latent_attention(out.data(), at_q, dtype, queries, at_rows, rows_dtype, row_count, row_stride, table,
                                        stride, context, start, sequences, block_size, heads, dim, rank, fuzz.is_wild ? NAN : 0.1f);
  };
  require(call() == KVERN_OK, "attention");
  const auto bad = [&](auto& value, auto wrong) {
    must_refuse_with(value, static_cast<std::decay_t<decltype(value)>>(wrong), call, {&out}, "attention with a bad argument");
  };
  bad(queries, queries + 1); bad(queries, -1); bad(dtype, 2); bad(rows_dtype, 77); bad(row_stride, row_elements(rows_dtype, rank, dim - rank) - 1); bad(row_stride, kHuge);
  bad(row_count, -1); bad(row_count, kHuge); bad(sequences, -1); bad(block_size, 0); bad(block_size, kHuge); bad(block_size, INT64_MIN);
  bad(heads, 0); bad(heads, kHuge); bad(heads, kWide); bad(dim, 0); bad(rank, 0); bad(rank, dim + 1); bad(stride, kHuge);
  bad(start, nullptr); bad(context, nullptr); bad(start[0], 1); bad(start[sequences], queries + 1);
  if (!queries) return;
  bad(at_q, nullptr); bad(at_rows, nullptr); bad(table, nullptr);
  const int64_t one = std::find_if(starts.begin(), starts.end(), [](int32_t i) { return i > 0; }) - starts.begin() - 1;
  bad(context[one], start[one + 1] - start[one] - 1); bad(context[one], INT32_MIN); bad(context[one], stride * block_size + 1);
  int32_t& block = table[one * stride + fuzz.between(0, (context[one] - 1) / block_size)];
  bad(block, -1); bad(block, row_count / block_size); bad(block, INT32_MAX); bad(block, INT32_MIN);
  if (sequences > 1) bad(start[1], fuzz.one_of({-1, INT32_MIN, INT32_MAX, static_cast<int32_t>(queries + 1)}));
}

void fuzz_expanded(Fuzz& fuzz) {
  int dtype = fuzz.one_of({KVERN_F32, KVERN_BF16});
  int64_t context = fuzz.size(200), tokens = fuzz.between(1, context), heads = fuzz.between(1, 5), value = fuzz.size(80);
  int64_t nope = fuzz.chance(4) ? 0 : fuzz.size(80), rope = fuzz.chance(4) ? 0 : fuzz.size(40), stride = rope + fuzz.between(0, 3);
  const Buffer q = fuzz.numbers(tokens * heads * (nope + rope), dtype), kv = fuzz.numbers(context * heads * (nope + value), dtype);
  const Buffer ropes = fuzz.numbers((context - 1) * stride + rope, dtype), out(tokens * heads * value * bytes_of(dtype));
  const void *at_q = q.data(), *at_kv = kv.data(), *at_rope = ropes.data();
  const auto call = [&] {
    return kvern_expanded_attention(out.data(), at_q, at_kv, at_rope, stride, dtype, tokens, context, heads, nope, rope, value, 0.1f);
  };
  require(call() == KVERN_OK, "expanded attention");
  const auto bad = [&](auto& one, auto wrong) {
    must_refuse_with(one, static_cast<std::decay_t<decltype(one)>>(wrong), call, {&out}, "expanded attention with a bad argument");
  };
  bad(tokens, -1); bad(tokens, context + 1); bad(context, tokens - 1); bad(context, kHuge); bad(heads, 0); bad(heads, kHuge);
  bad(nope, -1); bad(nope, kHuge); bad(rope, -1); bad(rope, kHuge); bad(value, 0); bad(value, kHuge); bad(value, kWide);
  bad(stride, rope - 1); bad(stride, kHuge); bad(dtype, 2); bad(at_kv, nullptr);
  if (nope + rope) bad(at_q, nullptr);
  if (rope) bad(at_rope, nullptr);
}

// Whole documents and their gradients: each comes out the same among the others and alone.
void fuzz_documents(Fuzz& fuzz) {
  int64_t documents = fuzz.between(1, 4), heads = fuzz.between(1, 3), value = fuzz.size(80), nope = fuzz.chance(4) ? 0 : fuzz.size(80);
  int64_t rope = nope && fuzz.chance(3) ? 0 : fuzz.size(40), stride = rope + fuzz.between(0, 3);
  std::vector<int64_t> starts{0};
  for (int64_t d = 0; d < documents; ++d) starts.push_back(starts.back() + (d && fuzz.chance(5) ? 0 : fuzz.size(150)));
  int64_t tokens = starts.back(), size = nope + rope, row = nope + value;
  const auto numbers = [&](int64_t count) { return fuzz.numbers(count, KVERN_BF16); };
  const Buffer q = numbers(tokens * heads * size), kv = numbers(tokens * heads * row), ropes = numbers((tokens - 1) * stride + rope);
  const Buffer dout = numbers(tokens * heads * value);
  struct Results {
    Buffer out, lse, dq, dkv, drope;
    Results(int64_t rows, int64_t size, int64_t row, int64_t rope, int64_t value)
        : out(2 * rows * value), lse(4 * rows), dq(2 * rows * size), dkv(2 * rows * row), drope(4 * rows * rope) {}
  };
  const auto words = [](const Buffer& buffer, int64_t skipped = 0) { return reinterpret_cast<uint16_t*>(buffer.data()) + skipped; };
  const Results all(tokens * heads, size, row, rope, value);
  const uint16_t *at_q = words(q), *at_kv = words(kv), *at_rope = words(ropes), *at_dout = words(dout);
  const int64_t* at_starts = starts.data();
  const auto forward = [&] {
    return kvern_document_attention(words(all.out), all.lse.floats(), at_q, at_kv, at_rope, stride, at_starts, documents, tokens, heads,
                                    nope, rope, value, 0.1f);
  };
  const auto backward = [&] {
    return kvern_document_attention_backward(words(all.dq), words(all.dkv), all.drope.floats(), at_dout, words(all.out), all.lse.floats(),
                                             at_q, at_kv, at_rope, stride, at_starts, documents, tokens, heads, nope, rope, value, 0.1f);
  };
  if (forward() == KVERN_UNSUPPORTED_ISA) return;
  require(forward() == KVERN_OK && backward() == KVERN_OK, "attention of documents");
  const int64_t d = fuzz.between(0, documents - 1), first = starts[static_cast<size_t>(d)], count = starts[static_cast<size_t>(d) + 1] - first;
  if (count) {
    const Results alone(count * heads, size, row, rope, value);
    const int64_t span[] = {0, count}, skipped = first * heads;
    const uint16_t* my_rope = words(ropes, first * stride);
    require(kvern_document_attention(words(alone.out), alone.lse.floats(), words(q, skipped * size), words(kv, skipped * row), my_rope, stride,
                                     span, 1, count, heads, nope, rope, value, 0.1f) == KVERN_OK &&
                kvern_document_attention_backward(words(alone.dq), words(alone.dkv), alone.drope.floats(), words(dout, skipped * value),
                                                  words(alone.out), alone.lse.floats(), words(q, skipped * size), words(kv, skipped * row),
                                                  my_rope, stride, span, 1, count, heads, nope, rope, value, 0.1f) == KVERN_OK,
            "a document alone");
    const auto equal = [&](const Buffer& one, const Buffer& among, int64_t width, int dtype) {
      for (int64_t i = 0; i < count * heads * width; ++i) {
        require(same(read_scalar(one.data(), dtype, i), read_scalar(among.data(), dtype, skipped * width + i)), "a document among others");
      }
    };
    equal(alone.out, all.out, value, KVERN_BF16);
    equal(alone.dq, all.dq, size, KVERN_BF16);
    equal(alone.dkv, all.dkv, row, KVERN_BF16);
    equal(alone.drope, all.drope, rope, KVERN_F32);
  }
  const auto bad = [&](auto& one, auto wrong) {
    const auto value_of = static_cast<std::decay_t<decltype(one)>>(wrong);
    must_refuse_with(one, value_of, forward, {&all.out, &all.lse}, "attention of documents with a bad argument");
    must_refuse_with(one, value_of, backward, {&all.dq, &all.dkv, &all.drope}, "attention's gradients with a bad argument");
  };
  bad(tokens, -1); bad(tokens, tokens + 1); bad(tokens, kHuge); bad(documents, -1); bad(heads, 0); bad(heads, kHuge);
  bad(nope, -1); bad(nope, kHuge); bad(rope, -1); bad(rope, kHuge); bad(value, 0); bad(value, kHuge); bad(value, kWide);
  bad(stride, rope - 1); bad(stride, kHuge); bad(at_q, nullptr); bad(at_kv, nullptr); bad(at_starts, nullptr);
  bad(starts[0], 1); bad(starts.back(), tokens + 1);
  if (documents > 1) bad(starts[1], fuzz.one_of<int64_t>({-1, INT64_MIN, INT64_MAX, tokens + 1}));
  if (rope) bad(at_rope, nullptr);
  must_refuse_with(at_dout, static_cast<const uint16_t*>(nullptr), backward, {&all.dq, &all.dkv, &all.drope}, "no gradient");
}

// A row of logits, edits, and what is drawn from it: an id of the row, or why there is none.
void fuzz_sample(Fuzz& fuzz) {
  const int64_t size = fuzz.chance(3) ? fuzz.between(1, 3000) : fuzz.size(200), edits = fuzz.chance(2) ? 0 : fuzz.between(1, 9);
  const Buffer logits = fuzz.numbers(size, KVERN_F32), token(edits * 8), score(edits * 8), drawn(8);
  auto* edited = reinterpret_cast<int64_t*>(token.data());
  auto* scores = reinterpret_cast<double*>(score.data());
  for (int64_t i = 0; i < edits; ++i) {
    edited[i] = fuzz.between(0, size - 1);
    scores[i] = fuzz.chance(4) ? -INFINITY : static_cast<double>(fuzz.number());
  }
  const auto share = [&] { return static_cast<double>(fuzz.between(0, 100)) / 100; };
  kvern_draw row{logits.floats(), edited, scores, size, edits, fuzz.chance(2) ? 0 : fuzz.between(1, 2 * size),
                 fuzz.one_of({0.0, 1.0, 0.01, 100.0, 1e-300, 1e300}), share(), share(), share() * 0.999};
  int64_t n = 1;
  auto* ids = reinterpret_cast<int64_t*>(drawn.data());
  const auto call = [&] { return kvern_sample(&row, n, ids); };
  require(call() == KVERN_OK && *ids < size && *ids >= KVERN_NOTHING_LEFT, "a draw");
  const auto bad = [&](auto& value, auto wrong) {
    must_refuse_with(value, static_cast<std::decay_t<decltype(value)>>(wrong), call, {&drawn}, "a bad draw");
  };
  bad(n, -1); bad(ids, nullptr); bad(row.logits, nullptr); bad(row.size, 0); bad(row.size, -1); bad(row.size, int64_t{1} << 31); bad(row.edits, -1);
  bad(row.top_k, -1); bad(row.uniform, fuzz.one_of({-0.1, 1.0, double{NAN}}));
  for (double* value : {&row.top_p, &row.min_p}) bad(*value, fuzz.one_of({-0.1, 1.01, double{NAN}, double{INFINITY}}));
  bad(row.temperature, fuzz.one_of({-1.0, 1e-320, double{NAN}, double{INFINITY}}));
  if (!edits) return;
  bad(row.edited, nullptr); bad(row.scores, nullptr);
  bad(edited[fuzz.between(0, edits - 1)], fuzz.one_of<int64_t>({-1, size, kHuge, INT64_MIN}));
}

void fuzz_logprobs(Fuzz& fuzz) {
  const int64_t size = fuzz.chance(3) ? fuzz.between(1, 3000) : fuzz.size(200), best = fuzz.chance(2) ? 0 : fuzz.between(1, size);
  const Buffer logits = fuzz.numbers(size, KVERN_F32), id(best * 8), out((1 + best) * 8);
  kvern_scored row{logits.floats(), size, fuzz.one_of<int64_t>({0, size - 1, size, -1, kHuge, INT64_MIN}), best,
                   reinterpret_cast<int64_t*>(id.data()), reinterpret_cast<double*>(out.data())};
  int64_t n = 1;
  const auto call = [&] { return kvern_logprobs(&row, n); };
  require(call() == KVERN_OK, "log-probabilities");
  const auto bad = [&](auto& value, auto wrong) {
    must_refuse_with(value, static_cast<std::decay_t<decltype(value)>>(wrong), call, {&id, &out}, "bad log-probabilities");
  };
  bad(n, -1); bad(row.logits, nullptr); bad(row.logprobs, nullptr); bad(row.size, 0); bad(row.size, int64_t{1} << 31); bad(row.best, -1); bad(row.best, size + 1);
  if (best) bad(row.ids, nullptr);
}

void fuzz_latents(Fuzz& fuzz) {
  int64_t count = fuzz.size(40), rank = fuzz.size(300), rope = fuzz.between(0, 70), stride = latent8_bytes(rank, rope) + fuzz.between(0, 3);
  const Buffer latents = fuzz.numbers(count * (rank + rope), KVERN_F32), records((count - 1) * stride + latent8_bytes(rank, rope));
  const Buffer decoded(count * (rank + rope) * 4);
  uint8_t* at = records.data();
  float* to = decoded.floats();
  const auto encode = [&] { return kvern_encode_latents(at, stride, latents.floats(), count, rank, rope); };
  const auto decode = [&] { return kvern_decode_latents(to, at, stride, count, rank, rope); };
  require(encode() == KVERN_OK && decode() == KVERN_OK, "latents in 8 bits");
  const auto bad = [&](auto& value, auto wrong) {
    must_refuse_with(value, static_cast<std::decay_t<decltype(value)>>(wrong), encode, {&records}, "bad latents to encode");
    must_refuse_with(value, static_cast<std::decay_t<decltype(value)>>(wrong), decode, {&decoded}, "bad latents to decode");
  };
  bad(count, -1); bad(count, kHuge); bad(count, kWide); bad(rank, 0); bad(rank, -1); bad(rank, kHuge); bad(rope, -1); bad(rope, kHuge);
  bad(stride, latent8_bytes(rank, rope) - 1); bad(stride, kHuge); bad(at, nullptr);
  const Buffer any = fuzz.numbers(static_cast<int64_t>(records.size), KVERN_F8_E4M3);
  at = any.data();
  require(decode() == KVERN_OK, "any bytes as latents");
}

void fuzz_bytes(Fuzz& fuzz) {
  const int64_t size = fuzz.chance(4) ? fuzz.between(1 << 20, 3 << 20) : fuzz.between(0, 300), skipped = fuzz.between(0, std::min<int64_t>(size, 9));
  const Buffer data(size);
  const uint64_t hash = kvern_hash(data.data() + skipped, size - skipped);
  kvern_read(data.data() + skipped, size - skipped);
  require(hash == kvern_hash(data.copy().data() + skipped, size - skipped), "hash");
}

void run_case(uint64_t seed) {
  running = seed;
  Fuzz fuzz(seed);
  const char* isa = fuzz.one_of({"scalar", "avx2", "avx512", "avx512bf16", "amx"});
  if (kvern_select_isa(isa) != KVERN_OK) kvern_select_isa(nullptr);
  require(kvern_set_threads(static_cast<int>(fuzz.between(1, 4))) == KVERN_OK, "threads");
  using Part = void (*)(Fuzz&);
  fuzz.one_of<Part>({fuzz_linear, fuzz_dequantize, fuzz_paged, fuzz_paged, fuzz_expanded, fuzz_documents, fuzz_latents, fuzz_sample, fuzz_logprobs, fuzz_bytes, fuzz_pack, fuzz_product, fuzz_product,
                     fuzz_layer, fuzz_layer, fuzz_layer})(fuzz);
}

}  // namespace

int main(int count, char** arguments) {
  const uint64_t cases = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 1000;
  const uint64_t seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1;
  std::signal(SIGABRT, [](int) { report(); });
  std::atexit([] { if (running) report(); });
  for (const int threads : {0, -1, 1025, INT32_MAX}) require(kvern_set_threads(threads) == KVERN_BAD_ARGUMENT, "a bad number of threads");
  require(kvern_select_isa("") == KVERN_BAD_ARGUMENT, "an unknown instruction set");
  for (uint64_t i = 0; i < cases; ++i) {
    run_case(seed + i);
    if (i % 5000 == 4999) std::fprintf(stderr, "fuzz: %llu cases\n", static_cast<unsigned long long>(i + 1));
  }
  running = 0;
  std::printf("fuzz: %llu cases from seed %llu, fine\n", static_cast<unsigned long long>(cases), static_cast<unsigned long long>(seed));
  return 0;
}
