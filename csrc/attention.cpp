// Attention over paged latents: checks, cuts the work into (queries, lanes, part of the context), merges the parts.
//
// Neighbouring queries of a sequence share lanes: with 12 heads, five queries fill 60 of 64. How a context is cut depends
// on its length alone, so the result of a query depends neither on the rest of the batch nor on the number of threads, and
// a single long sequence keeps every core busy.
#include "attention.h"

#include <algorithm>
#include <vector>

#include "attention_common.h"
#include "kernels.h"
#include "kvern.h"
#include "latent8.h"
#include "pool.h"
#include "sound.h"

namespace kvern {
namespace {

constexpr int64_t kPartRows = 256;          // rows in a part: 20 to 40 microseconds for 64 lanes of 512 + 64
constexpr int64_t kPartialBytes = 8 << 20;  // groups gather until their partial results need more than this
constexpr int64_t kMergeColumns = 64;       // merged at a time

struct Problem {
  const PagedAttention& call;
  const Kernels& kernels;
  Form form;
  Attend common;

  int64_t partial_size(int64_t vecs) const { return vecs * (call.rank + 2) * form.lanes; }
};

// Queries [first, first + count) of one sequence; the last sees `seen` rows, each before it one fewer, and all have as
// many parts. Lane i is head i % heads of query first + i / heads.
struct Group {
  int64_t first, count;
  const int32_t* table;
  int64_t seen, part_rows, parts;
  int64_t vecs;
  int64_t q_at, partial_at, seen_at;  // in the slice
};

struct Part {
  int64_t group, vec, vecs, number;
};

struct Columns {
  int64_t group, vec, begin;
};

// Groups computed together, with their scratch.
struct Slice {
  const Problem& problem;
  std::vector<Group> groups;
  std::vector<Part> parts;
  std::vector<Columns> columns;
  float* packed;    // by group [vecs, q_size]
  float* partials;  // by group [parts, vecs, rank + 2, lanes]
  int64_t* seen;    // by group [vecs, lanes]
  int64_t q_size, partial_size, seen_size;

  explicit Slice(const Problem& the_problem) : problem(the_problem) { clear(); }

  void clear() {
    groups.clear();
    parts.clear();
    columns.clear();
    q_size = partial_size = seen_size = 0;
  }
};

int64_t part_rows_of(int64_t seen) { return divide_up(seen, kPartRows * kMergeParts) * kPartRows; }
int64_t parts_of(int64_t seen) { return divide_up(seen, part_rows_of(seen)); }

void add(Slice& slice, Group group) {
  const Problem& problem = slice.problem;
  const int64_t lanes = problem.form.lanes, index = static_cast<int64_t>(slice.groups.size());
  group.vecs = divide_up(group.count * problem.call.heads, lanes);
  group.q_at = slice.q_size;
  group.partial_at = slice.partial_size;
  group.seen_at = slice.seen_size;
  slice.q_size += group.vecs * problem.form.q_size(problem.call.dim);
  slice.partial_size += group.parts * problem.partial_size(group.vecs);
  slice.seen_size += group.vecs * lanes;
  const int64_t together = kAttendLanes / lanes;
  for (int64_t vec = 0; vec < group.vecs; vec += together) {
    const int64_t vecs = std::min(together, group.vecs - vec);
    for (int64_t number = 0; number < group.parts; ++number) slice.parts.push_back({index, vec, vecs, number});
  }
  for (int64_t vec = 0; vec < group.vecs; ++vec) {
    for (int64_t r = 0; r < problem.call.rank; r += kMergeColumns) slice.columns.push_back({index, vec, r});
  }
  slice.groups.push_back(group);
}

// Lanes without a query are zeros that see what the last query sees.
void pack(const Slice& slice, int64_t index) {
  const Problem& problem = slice.problem;
  const PagedAttention& call = problem.call;
  const Group& group = slice.groups[static_cast<size_t>(index)];
  float* q = slice.packed + group.q_at;
  int64_t* seen = slice.seen + group.seen_at;
  std::fill_n(q, group.vecs * problem.form.q_size(call.dim), 0.0f);
  std::fill_n(seen, group.vecs * problem.form.lanes, group.seen);
  for (int64_t lane = 0; lane < group.count * call.heads; ++lane) {
    pack_lane(problem.form, call.q, call.q_dtype, (group.first * call.heads + lane) * call.dim, call.dim, q, lane);
    seen[lane] = group.seen - (group.count - 1 - lane / call.heads);
  }
}

void attend_part(const Slice& slice, int64_t index) {
  thread_local std::vector<float> memory;
  const Problem& problem = slice.problem;
  const Part& part = slice.parts[static_cast<size_t>(index)];
  const Group& group = slice.groups[static_cast<size_t>(part.group)];
  Attend task = problem.common;
  task.q = slice.packed + group.q_at + part.vec * problem.form.q_size(task.dim);
  task.vecs = part.vecs;
  task.context.table = group.table;
  task.seen = slice.seen + group.seen_at + part.vec * problem.form.lanes;
  task.begin = part.number * group.part_rows;
  task.end = std::min(task.begin + group.part_rows, group.seen);
  task.partial = slice.partials + group.partial_at + part.number * problem.partial_size(group.vecs) +
                 problem.partial_size(part.vec);
  task.scratch = room(memory, attend_scratch(task.dim, task.rank));
  problem.form.attend(task);
}

void merge(const Slice& slice, int64_t index) {
  const Problem& problem = slice.problem;
  const PagedAttention& call = problem.call;
  const Columns& columns = slice.columns[static_cast<size_t>(index)];
  const Group& group = slice.groups[static_cast<size_t>(columns.group)];
  const int64_t lanes = problem.form.lanes;
  const int64_t count = std::min(kMergeColumns, call.rank - columns.begin);
  float merged[kMergeColumns * kAttendLanes];
  const float* parts = slice.partials + group.partial_at + problem.partial_size(columns.vec);
  problem.form.merge({parts, group.parts, problem.partial_size(group.vecs), call.rank, columns.begin,
                         columns.begin + count, merged});
  const int64_t used = std::min(lanes, group.count * call.heads - columns.vec * lanes);
  for (int64_t lane = 0; lane < used; ++lane) {
    const int64_t to = (group.first * call.heads + columns.vec * lanes + lane) * call.rank + columns.begin;
    scatter_lane(problem.form, call.out, call.out_dtype, to, merged, lane, count);
  }
}

template <void (*Step)(const Slice&, int64_t)>
void for_each(const Slice& slice, size_t count) {
  parallel_for(
      static_cast<int64_t>(count),
      [](const void* context, int64_t index) { Step(*static_cast<const Slice*>(context), index); }, &slice);
}

void compute(Slice& slice) {
  thread_local std::vector<float> packed, partials;
  thread_local std::vector<int64_t> seen;
  slice.packed = room(packed, slice.q_size);
  slice.partials = room(partials, slice.partial_size);
  slice.seen = room(seen, slice.seen_size);
  for_each<pack>(slice, slice.groups.size());
  for_each<attend_part>(slice, slice.parts.size());
  for_each<merge>(slice, slice.columns.size());
  slice.clear();
}

bool are_sound(const PagedAttention& call) {
  if (!call.starts || (call.sequences > 0 && !call.contexts) || !is_addressable({call.sequences, call.table_stride})) return false;
  if (call.starts[0] != 0 || call.starts[call.sequences] != call.queries) return false;
  for (int64_t s = 0; s < call.sequences; ++s) {
    const int64_t count = int64_t{call.starts[s + 1]} - call.starts[s];
    if (count == 0) continue;
    const int64_t blocks = divide_up(call.contexts[s], call.block_size);
    if (count < 0 || call.contexts[s] < count || !call.tables || blocks > call.table_stride) return false;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t block = call.tables[s * call.table_stride + b];
      if (block < 0 || block >= call.row_count / call.block_size) return false;
    }
  }
  return true;
}

bool are_sizes_sound(const PagedAttention& call) {
  return is_float(call.out_dtype) && is_float(call.q_dtype) && is_rows_dtype(call.rows_dtype) && call.queries >= 0 &&
         call.row_count >= 0 && call.sequences >= 0 && call.block_size >= 1 && call.heads >= 1 && call.dim >= 1 &&
         call.rank >= 1 && call.rank <= call.dim && is_addressable({call.queries, call.heads, call.dim}) &&
         is_addressable({call.heads, call.dim}) && is_addressable({call.row_count, call.row_stride}) &&
         is_addressable({call.block_size}) &&
         call.row_stride >= row_elements(call.rows_dtype, call.rank, call.dim - call.rank);
}

Problem problem_of(const PagedAttention& call) {
  const Kernels& kernels = kernels_in_use();
  Attend common{};
  common.dim = call.dim;
  common.rank = call.rank;
  common.scale = log2_scale(call.scale);
  common.context = {call.rows, call.rows_dtype, call.row_stride, nullptr, call.block_size, nullptr, 0, call.dim, 0, 0,
                    call.rank};
  return {call, kernels, Form(kernels, call.q_dtype, call.rows_dtype, call.dim, call.rank), common};
}

// The largest group from query `index` of sequence `s` on.
Group group_of(const PagedAttention& call, int64_t s, int64_t index) {
  const int64_t stop = call.starts[s + 1], most = std::max<int64_t>(1, kAttendLanes / call.heads);
  const auto seen_by = [&](int64_t query) { return call.contexts[s] - (stop - 1 - query); };
  const int64_t first_seen = seen_by(index);
  int64_t count = 1;
  while (count < most && index + count < stop && part_rows_of(seen_by(index + count)) == part_rows_of(first_seen) &&
         parts_of(seen_by(index + count)) == parts_of(first_seen)) {
    ++count;
  }
  const int32_t* table = call.tables + s * call.table_stride;
  return {index, count, table, first_seen + count - 1, part_rows_of(first_seen), parts_of(first_seen), 0, 0, 0, 0};
}

}  // namespace

void paged_latent_attention(const PagedAttention& call) {
  const Problem problem = problem_of(call);
  Slice slice(problem);
  for (int64_t s = 0; s < call.sequences; ++s) {
    for (int64_t index = call.starts[s]; index < call.starts[s + 1];) {
      const Group group = group_of(call, s, index);
      add(slice, group);
      if (slice.partial_size * static_cast<int64_t>(sizeof(float)) > kPartialBytes) compute(slice);
      index += group.count;
    }
  }
  if (!slice.groups.empty()) compute(slice);
}

}  // namespace kvern

int kvern_paged_latent_attention(void* out, const void* q, int dtype, int64_t queries, const void* rows, int rows_dtype,
                                 int64_t row_count, int64_t row_stride, const int32_t* tables, int64_t table_stride,
                                 const int32_t* contexts, const int32_t* starts, int64_t sequences,
                                 int64_t block_size, int64_t heads, int64_t dim, int64_t rank, float scale) {
  const kvern::PagedAttention call{out, dtype, q, dtype, queries, rows, rows_dtype, row_count, row_stride, tables,
                                   table_stride, contexts, starts, sequences, block_size, heads, dim, rank, scale};
  if (!kvern::are_sizes_sound(call) || !kvern::are_sound(call)) return KVERN_BAD_ARGUMENT;
  if (queries == 0) return KVERN_OK;
  if (!out || !q || !rows) return KVERN_BAD_ARGUMENT;
  kvern::paged_latent_attention(call);
  return KVERN_OK;
}
