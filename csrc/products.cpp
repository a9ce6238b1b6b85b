#include "products.h"

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "pool.h"
#include "sound.h"

namespace kvern {
namespace {

constexpr int64_t kArenaBytes = 1 << 20;
constexpr int64_t kChunkBytes = 96 * 1024;  // of weights: 3 to 6 microseconds of memory traffic
constexpr int64_t kMostBytes = 1 << 20;     // that a thread claims at a time
constexpr int64_t kClaimsEach = 2;          // a claim is what is left, shared between so many claims for each thread
constexpr int64_t kChunkPanels = 2;         // panels lie in pairs

void multiply_picks(const Product& product, const Source& source, int64_t first, int64_t last) {
  const kvern_packed& w = product.w;
  const Output& out = product.out;
  for (int64_t r = 0; r < source.rows; ++r) {
    const float* x = source.x + (source.place ? source.place[r] : r) * source.stride;
    float* y = out.y + (out.place ? out.place[r] : r) * out.stride;
    for (int64_t i = first * kLanes; i < std::min(last * kLanes, w.n); ++i) {
      float value = w.factors[i] * x[w.picks[i]];
      if (out.bias) value += out.bias[i];
      y[i] = out.adds ? y[i] + value : value;
    }
  }
}

// `next`: the tiles that the thread goes on with.
void run_chunk(Product product, const Source& source, int64_t first, int64_t last, const void* next) {
  if (product.w.kind == KVERN_PICKS) return multiply_picks(product, source, first, last);
  product.next = next;
  packed_kernels().multiply[product.w.kind](product, first, last);
}

int64_t panel_bytes(const kvern_packed& w) {
  return w.kind == KVERN_PICKS ? kLanes * 8 : kvern_packed_bytes(w.kind, kLanes, w.k);
}

// `first` is even.
const void* tiles_at(const kvern_packed& w, int64_t first) {
  return w.kind == KVERN_PICKS ? nullptr : static_cast<const uint8_t*>(w.tiles) + first * panel_bytes(w);
}

// Large claims first, so that a thread reads one stream, and small ones last, so that all threads end together.
int64_t claim_of(int64_t left, int64_t least) { return std::max(least, left / (kClaimsEach * threads())); }

int64_t chunk_panels(int64_t bytes) { return std::max<int64_t>(1, kChunkBytes / bytes / kChunkPanels) * kChunkPanels; }

int copies_of(Order order, int activations) { return order != Order::kSingles && activations == KVERN_F32 ? 2 : 1; }

// As many columns in each group as in the others, and whole rows.
int64_t group_of(int64_t columns, int64_t most, int copies) {
  most = most / copies * copies;
  const int64_t groups = std::max<int64_t>(1, (columns + most - 1) / most);
  return round_up((columns + groups - 1) / groups, copies);
}

}  // namespace

#if defined(KVERN_X86)
const PackedKernels& amx_kernels() {
  static const PackedKernels kernels = [] {
    PackedKernels table = kAvx512Bf16Packed;
    table.rows.arrange_tiles = kAmxPacked.arrange;
    for (const int kind : {int{KVERN_BF16}, int{KVERN_F8_E4M3}, int{KVERN_INT4}}) {
      table.order[kind] = Order::kTiles;
      table.group[kind] = kAmxPacked.group;
    }
    table.multiply[KVERN_BF16] = kAmxPacked.bf16;
    table.multiply[KVERN_F8_E4M3] = kAmxPacked.e4m3;
    table.multiply[KVERN_INT4] = kAmxInt4;
    return table;
  }();
  return kernels;
}
#endif

const PackedKernels& packed_kernels() {
#if defined(KVERN_X86)
  const char* name = kernels_in_use().name;
  if (std::strcmp(name, "amx") == 0) return amx_kernels();
  if (std::strcmp(name, "avx512bf16") == 0) return kAvx512Bf16Packed;
  if (std::strcmp(name, "avx512") == 0) return kAvx512Packed;
  if (std::strcmp(name, "avx2") == 0) return kAvx2Packed;
#endif
  return kScalarPacked;
}

void Arena::grow(int64_t size) {
  blocks_.push_back({std::unique_ptr<uint8_t[]>(new uint8_t[static_cast<size_t>(size + 64)]), size});
}

void* Arena::bytes(int64_t count) {
  count = round_up(count, 64);
  if (blocks_.empty() || used_ + count > blocks_.back().size) {
    grow(std::max(count, kArenaBytes));
    used_ = 0;
  }
  auto* start = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(blocks_.back().memory.get()) + 63) / 64 * 64);
  void* piece = start + used_;
  used_ += count;
  return piece;
}

const int32_t* Arena::copy(const std::vector<int32_t>& numbers) {
  auto* to = take<int32_t>(static_cast<int64_t>(numbers.size()));
  std::copy(numbers.begin(), numbers.end(), to);
  return to;
}

// Several blocks become one of their size, so that a step like the last needs no more.
void Arena::clear() {
  used_ = 0;
  if (blocks_.size() < 2) return;
  int64_t size = 0;
  for (const Block& block : blocks_) size += block.size;
  blocks_.clear();
  grow(size);
}

Arrangement::Arrangement(const Source& from, int of, int rounding, Arena& arena)
    : source(from), kind(of), activations(rounding) {
  order = kind == KVERN_PICKS ? Order::kSingles : packed_kernels().order[kind];
  const int copies = copies_of(order, activations);
  const int64_t elements = round_up(from.k, kPadding) / (order == Order::kSingles ? 1 : 2);
  const int64_t most = kind == KVERN_PICKS ? 1 : packed_kernels().group[kind];
  columns = {nullptr, from.rows * copies, group_of(from.rows * copies, most, copies), elements, copies};
  if (kind == KVERN_PICKS) columns.count = 0;
  const int64_t room = order == Order::kTiles ? round_up(columns.count, columns.group) : columns.count;
  columns.data = arena.take<uint32_t>(room * elements);
}

void Arrangement::fill(int64_t group) const {
  const RowKernels& rows = packed_kernels().rows;
  const int64_t first = group * columns.group, count = std::min(columns.group, columns.count - first);
  auto* to = const_cast<uint32_t*>(columns.data) + first * columns.elements;
  for (int64_t c = 0; c < count; c += columns.copies) {
    const int64_t row = (first + c) / columns.copies;
    const float* x = source.x + (source.place ? source.place[row] : row) * source.stride;
    if (order == Order::kTiles) {
      rows.arrange_tiles(x, source.k, columns.elements, columns.copies, columns.group, to + c * kTileElements);
    } else if (order == Order::kPairs) {
      rows.arrange_pairs(x, source.k, columns.elements, columns.copies, count, to + c);
    } else {
      rows.arrange_singles(x, source.k, columns.elements, activations != KVERN_F32, count, to + c);
    }
  }
}

void Arrangement::fill_all() const {
  if (columns.count * columns.elements < kSerialNumbers) {
    for (int64_t group = 0; group < groups(); ++group) fill(group);
    return;
  }
  parallel_for(
      groups(), [](const void* context, int64_t group) { static_cast<const Arrangement*>(context)->fill(group); }, this);
}

int64_t read_bytes(const kvern_packed& w) {
  if (w.kind == KVERN_PICKS) return w.n * 8;
  return kvern_packed_bytes(w.kind, w.n, w.k) + kvern_scale_bytes(w.kind, w.n, w.k, w.group);
}

void Products::add(const kvern_packed& w, const Arrangement& x, const Output& out) {
  if (x.source.rows == 0) return;
  const int64_t all = panels(w), step = chunk_panels(panel_bytes(w));
  bytes_ += read_bytes(w);
  for (int64_t first = 0; first < all; first += step) {
    chunks_.push_back({{w, x.columns, out}, x.source, first, std::min(first + step, all)});
  }
}

void Products::run() {
  std::vector<size_t> starts;  // of claims
  int64_t left = 0, room = 0;
  for (const Chunk& chunk : chunks_) left += chunk.bytes();
  for (size_t i = 0; i < chunks_.size(); ++i) {
    if (room <= 0) {
      starts.push_back(i);
      room = std::min(claim_of(left, 0), kMostBytes);
    }
    room -= chunks_[i].bytes();
    left -= chunks_[i].bytes();
  }
  const Work work{chunks_, starts};
  parallel_for(
      static_cast<int64_t>(starts.size()),
      [](const void* context, int64_t claim) { static_cast<const Work*>(context)->run(static_cast<size_t>(claim)); }, &work);
  chunks_.clear();
}

int64_t Products::Chunk::bytes() const { return (last - first) * panel_bytes(product.w); }

const void* Products::Work::tiles(size_t chunk) const {
  return chunk < chunks.size() ? tiles_at(chunks[chunk].product.w, chunks[chunk].first) : nullptr;
}

// Chunks that follow each other in one weight are one call. The claim behind the last chunk is most likely another
// thread's, so this one goes on further behind.
void Products::Work::run(size_t claim) const {
  const auto start_of = [&](size_t at) { return at < starts.size() ? starts[at] : chunks.size(); };
  const size_t end = start_of(claim + 1), then = start_of(claim + static_cast<size_t>(threads()));
  for (size_t i = starts[claim], after; i < end; i = after) {
    const Chunk& chunk = chunks[i];
    for (after = i + 1; after < end && chunks[after].first == chunks[after - 1].last;) ++after;
    run_chunk(chunk.product, chunk.source, chunk.first, chunks[after - 1].last, tiles(after < end ? after : then));
  }
}

void Sequence::add(const kvern_packed& w, const Arrangement& x, const Output& out) {
  links_.push_back({{w, x.columns, out}, x.source});
}

int64_t Sequence::bytes() const {
  int64_t sum = 0;
  for (const Link& link : links_) sum += read_bytes(link.product.w);
  return sum;
}

void Sequence::run() const {
  if (links_.empty()) return;
  std::vector<int64_t> starts;  // of claims, in panels
  const int64_t all = panels(links_[0].product.w);
  for (int64_t first = 0; first < all; first += round_up(claim_of(all - first, 1), kChunkPanels)) starts.push_back(first);
  const Work work{links_, starts, all};
  parallel_for(
      static_cast<int64_t>(starts.size()),
      [](const void* context, int64_t claim) { static_cast<const Work*>(context)->run(static_cast<size_t>(claim)); }, &work);
}

void Sequence::Work::run(size_t claim) const {
  const auto start_of = [&](size_t at) { return at < starts.size() ? starts[at] : all; };
  const int64_t first = starts[claim], last = start_of(claim + 1), then = start_of(claim + static_cast<size_t>(threads()));
  for (size_t i = 0; i < links.size(); ++i) {
    const bool is_last = i + 1 == links.size();
    const void* next = is_last ? (then < all ? tiles_at(links[0].product.w, then) : nullptr) : tiles_at(links[i + 1].product.w, first);
    run_chunk(links[i].product, links[i].source, first, last, next);
  }
}

}  // namespace kvern

using namespace kvern;

int kvern_multiply(const kvern_packed* w, const float* x, int64_t m, int activations, const float* bias, float* y) {
  if (!w || !x || !y || !can_multiply(*w, m, activations)) return KVERN_BAD_ARGUMENT;
  if (m == 0) return KVERN_OK;
  thread_local Arena arena;
  arena.clear();
  const Arrangement columns({x, w->k, nullptr, m, w->k}, w->kind, activations, arena);
  columns.fill_all();
  Products products;
  products.add(*w, columns, {y, w->n, nullptr, bias, false});
  products.run();
  return KVERN_OK;
}
