// Attention over paged latents: checks, cuts the work into (query, heads, part of the context), merges the parts.
//
// How a context is cut depends on its length alone, so the result of a query depends neither on the rest of the batch nor
// on the number of threads, and a single long sequence keeps every core busy.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "kvern.h"
#include "pool.h"
#include "scalars.h"

namespace kvern {
namespace {

constexpr int64_t kPartRows = 256;          // rows in a part: about 30 microseconds for 14 heads of 256
constexpr int64_t kParts = 32;              // at most; longer contexts get longer parts
constexpr int64_t kPartialBytes = 8 << 20;  // partial results held at a time, unless one query needs more

struct Problem {
  void* out;
  const void* q;
  int dtype;
  int64_t heads, dim, rank;
  const Kernels* kernels;
  int64_t lanes, vecs;
  Attend common;
};

struct Query {
  int64_t index, part_rows, parts;
  const int32_t* table;
  int64_t seen;
  int64_t first_part;  // of the slice
};

struct Part {
  const Query* query;
  int64_t vec, vecs, number;
};

// Queries computed together, with their scratch.
struct Slice {
  const Problem& problem;
  std::vector<Query> queries;
  std::vector<Part> parts;
  float* packed;    // [queries, vecs, dim, lanes]
  float* partials;  // [parts, vecs, rank + 2, lanes]
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

float* room(std::vector<float>& memory, int64_t numbers) {
  if (memory.size() < static_cast<size_t>(numbers)) memory.resize(static_cast<size_t>(numbers));
  return memory.data();
}

int64_t partial_size(const Problem& problem) { return problem.vecs * (problem.rank + 2) * problem.lanes; }

float* packed_of(const Slice& slice, const Query& query) {
  const Problem& problem = slice.problem;
  return slice.packed + (&query - slice.queries.data()) * problem.vecs * problem.dim * problem.lanes;
}

// q of one query as [vecs, dim, lanes] in FP32; lanes without a head are zeros.
void pack(const Slice& slice, const Query& query) {
  const Problem& problem = slice.problem;
  float* to = packed_of(slice, query);
  std::fill_n(to, problem.vecs * problem.dim * problem.lanes, 0.0f);
  for (int64_t head = 0; head < problem.heads; ++head) {
    float* lane = to + head / problem.lanes * problem.dim * problem.lanes + head % problem.lanes;
    const int64_t from = (query.index * problem.heads + head) * problem.dim;
    for (int64_t d = 0; d < problem.dim; ++d) lane[d * problem.lanes] = read_scalar(problem.q, problem.dtype, from + d);
  }
}

void attend_part(const Slice& slice, const Part& part) {
  thread_local std::vector<float> memory;
  const Problem& problem = slice.problem;
  const Query& query = *part.query;
  Attend task = problem.common;
  task.q = packed_of(slice, query) + part.vec * problem.dim * problem.lanes;
  task.vecs = part.vecs;
  task.table = query.table;
  task.begin = part.number * query.part_rows;
  task.end = std::min(task.begin + query.part_rows, query.seen);
  task.partial = slice.partials + (query.first_part + part.number) * partial_size(problem) +
                 part.vec * (problem.rank + 2) * problem.lanes;
  task.scratch = room(memory, kAttendRows * (divide_up(problem.dim, kStep) * kStep + kAttendHeads));
  problem.kernels->attend(task);
}

// out = sum_i w_i sums_i / sum_i w_i total_i with w_i = 2^(top_i - max top), for each head.
void merge(const Slice& slice, const Query& query) {
  const Problem& problem = slice.problem;
  const float* parts = slice.partials + query.first_part * partial_size(problem);
  for (int64_t head = 0; head < problem.heads; ++head) {
    const float* sums = parts + head / problem.lanes * (problem.rank + 2) * problem.lanes + head % problem.lanes;
    const auto number = [&](int64_t part, int64_t r) { return sums[part * partial_size(problem) + r * problem.lanes]; };
    float top = -FLT_MAX;
    for (int64_t part = 0; part < query.parts; ++part) top = std::max(top, number(part, problem.rank));
    float weights[kParts];
    float total = 0.0f;
    for (int64_t part = 0; part < query.parts; ++part) {
      weights[part] = std::exp2(number(part, problem.rank) - top);
      total += weights[part] * number(part, problem.rank + 1);
    }
    const float share = 1.0f / total;
    for (int64_t r = 0; r < problem.rank; ++r) {
      float sum = 0.0f;
      for (int64_t part = 0; part < query.parts; ++part) sum += weights[part] * number(part, r);
      write_scalar(problem.out, problem.dtype, (query.index * problem.heads + head) * problem.rank + r, sum * share);
    }
  }
}

template <void (*Step)(const Slice&, const Query&)>
void for_each_query(const Slice& slice) {
  parallel_for(
      static_cast<int64_t>(slice.queries.size()),
      [](const void* context, int64_t index) {
        const Slice& mine = *static_cast<const Slice*>(context);
        Step(mine, mine.queries[static_cast<size_t>(index)]);
      },
      &slice);
}

void compute(Slice& slice) {
  thread_local std::vector<float> packed, partials;
  const Problem& problem = slice.problem;
  const int64_t group = kAttendHeads / problem.lanes;
  int64_t parts = 0;
  for (Query& query : slice.queries) {
    query.first_part = parts;
    parts += query.parts;
    for (int64_t vec = 0; vec < problem.vecs; vec += group) {
      const int64_t vecs = std::min(group, problem.vecs - vec);
      for (int64_t number = 0; number < query.parts; ++number) slice.parts.push_back({&query, vec, vecs, number});
    }
  }
  const auto count = static_cast<int64_t>(slice.queries.size());
  slice.packed = room(packed, count * problem.vecs * problem.dim * problem.lanes);
  slice.partials = room(partials, parts * partial_size(problem));
  for_each_query<pack>(slice);
  parallel_for(
      static_cast<int64_t>(slice.parts.size()),
      [](const void* context, int64_t index) {
        const Slice& mine = *static_cast<const Slice*>(context);
        attend_part(mine, mine.parts[static_cast<size_t>(index)]);
      },
      &slice);
  for_each_query<merge>(slice);
}

Query query_of(int64_t index, int64_t seen, const int32_t* table) {
  const int64_t part_rows = divide_up(seen, kPartRows * kParts) * kPartRows;
  return {index, part_rows, divide_up(seen, part_rows), table, seen, 0};
}

struct Books {
  const int32_t* tables;
  int64_t table_stride;
  const int32_t* contexts;
  const int32_t* starts;
  int64_t sequences, block_size;
};

bool are_sound(const Books& books, int64_t queries, int64_t row_count) {
  if (!books.starts || (books.sequences > 0 && !books.contexts)) return false;
  if (books.starts[0] != 0 || books.starts[books.sequences] != queries) return false;
  for (int64_t s = 0; s < books.sequences; ++s) {
    const int64_t count = int64_t{books.starts[s + 1]} - books.starts[s];
    if (count == 0) continue;
    const int64_t blocks = divide_up(books.contexts[s], books.block_size);
    if (count < 0 || books.contexts[s] < count || !books.tables || blocks > books.table_stride) return false;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t block = books.tables[s * books.table_stride + b];
      if (block < 0 || block >= row_count / books.block_size) return false;
    }
  }
  return true;
}

bool is_float(int dtype) { return dtype == KVERN_F32 || dtype == KVERN_BF16; }

}  // namespace
}  // namespace kvern

using namespace kvern;

int kvern_paged_latent_attention(void* out, const void* q, int dtype, int64_t queries, const void* rows, int rows_dtype,
                                 int64_t row_count, int64_t row_stride, const int32_t* tables, int64_t table_stride,
                                 const int32_t* contexts, const int32_t* starts, int64_t sequences,
                                 int64_t block_size, int64_t heads, int64_t dim, int64_t rank, float scale) {
  if (!is_float(dtype) || !is_float(rows_dtype) || queries < 0 || row_count < 0 || row_stride < dim || sequences < 0 ||
      block_size < 1 || heads < 1 || dim < 1 || rank < 1 || rank > dim) {
    return KVERN_BAD_ARGUMENT;
  }
  const Books books{tables, table_stride, contexts, starts, sequences, block_size};
  if (!are_sound(books, queries, row_count)) return KVERN_BAD_ARGUMENT;
  if (queries == 0) return KVERN_OK;
  if (!out || !q || !rows) return KVERN_BAD_ARGUMENT;
  const Kernels& kernels = kernels_in_use();
  const int64_t lanes = kernels.lanes;
  Attend common{};
  common.dim = dim;
  common.rank = rank;
  common.scale = static_cast<float>(double{scale} * 1.4426950408889634);
  common.rows = rows;
  common.rows_dtype = rows_dtype;
  common.row_stride = row_stride;
  common.block_size = block_size;
  const Problem problem{out, q, dtype, heads, dim, rank, &kernels, lanes, divide_up(heads, lanes), common};
  const int64_t bytes = partial_size(problem) * static_cast<int64_t>(sizeof(float));
  Slice slice{problem, {}, {}, nullptr, nullptr};
  int64_t held = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    for (int64_t index = starts[s]; index < starts[s + 1]; ++index) {
      const Query query = query_of(index, contexts[s] - (starts[s + 1] - 1 - index), tables + s * table_stride);
      if (held + query.parts * bytes > kPartialBytes && !slice.queries.empty()) {
        compute(slice);
        slice.queries.clear();
        slice.parts.clear();
        held = 0;
      }
      held += query.parts * bytes;
      slice.queries.push_back(query);
    }
  }
  if (!slice.queries.empty()) compute(slice);
  return KVERN_OK;
}
