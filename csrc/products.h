// From FP32 rows to products with packed weights: rounds and arranges x, cuts the products into chunks for the pool.
#pragma once

#include <memory>
#include <vector>

#include "packed.h"

namespace kvern {

// Memory that a step takes pieces of, in order; `clear` makes all of it free again and keeps it for the next step.
class Arena {
 public:
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(bytes(count * static_cast<int64_t>(sizeof(T))));
  }
  const int32_t* copy(const std::vector<int32_t>& numbers);
  void clear();

 private:
  struct Block {
    std::unique_ptr<uint8_t[]> memory;
    int64_t size;
  };
  void* bytes(int64_t count);
  void grow(int64_t size);
  std::vector<Block> blocks_;
  int64_t used_ = 0;  // of the last block
};

constexpr int64_t kSerialNumbers = 1 << 14;  // fewer numbers than this are arranged by one thread

// `rows` rows of FP32 numbers, k of each; row r is x + (place ? place[r] : r) * stride.
struct Source {
  const float* x;
  int64_t stride;
  const int32_t* place;
  int64_t rows, k;
};

// Places for the columns of `source` as a product with a weight of `kind` wants them; `fill` writes a group of them.
struct Arrangement {
  Source source;
  Columns columns;
  int kind;  // of the weight
  Order order;
  int activations;

  Arrangement(const Source& source, int kind, int activations, Arena& arena);
  int64_t groups() const { return (columns.count + columns.group - 1) / columns.group; }
  void fill(int64_t group) const;
  void fill_all() const;  // with all threads where that pays
};

// Bytes of a weight that a product reads.
int64_t read_bytes(const kvern_packed& w);

// Products whose chunks share one round of the pool.
class Products {
 public:
  // y = x w^T for all of w; the source must outlive `run` when w holds picks.
  void add(const kvern_packed& w, const Arrangement& x, const Output& out);
  void run();
  int64_t bytes() const { return bytes_; }  // of the weights

 private:
  struct Chunk {
    Product product;
    Source source;  // for picks
    int64_t first, last;
    int64_t bytes() const;
  };
  struct Work {
    const std::vector<Chunk>& chunks;
    const std::vector<size_t>& starts;  // chunks from which a thread claims
    void run(size_t claim) const;
    const void* tiles(size_t chunk) const;
  };
  std::vector<Chunk> chunks_;
  int64_t bytes_ = 0;
};

// Products that add to the same y, whose order for a row must stay: each chunk of y's columns takes them one after another.
class Sequence {
 public:
  void add(const kvern_packed& w, const Arrangement& x, const Output& out);
  void run() const;
  int64_t bytes() const;

 private:
  struct Link {
    Product product;
    Source source;
  };
  struct Work {
    const std::vector<Link>& links;
    const std::vector<int64_t>& starts;  // panels
    int64_t all;
    void run(size_t claim) const;
  };
  std::vector<Link> links_;
};

}  // namespace kvern
