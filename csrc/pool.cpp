#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvern {
namespace {

constexpr std::chrono::microseconds kSpin{5};
constexpr std::chrono::microseconds kYield{100};

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// So that `top -H` tells the workers from other threads, and who pins them to cores can find them.
void name_worker(std::thread& worker, int number) {
#if defined(__linux__)
  char name[24];  // the system takes 15 characters, enough for 1024 threads
  std::snprintf(name, sizeof name, "kvern-%d", number);
  pthread_setname_np(worker.native_handle(), name);
#else
  (void)worker, (void)number;
#endif
}

// Waits for ready() without sleeping. False: it took longer than kSpin + kYield, the caller should sleep.
template <class Ready>
bool wait_awake(Ready ready) {
  const auto start = std::chrono::steady_clock::now();
  for (;;) {
    for (int i = 0; i < 16; ++i) {
      if (ready()) return true;
      relax();
    }
    const auto waited = std::chrono::steady_clock::now() - start;
    if (waited > kSpin + kYield) return false;
    if (waited > kSpin) std::this_thread::yield();
  }
}

class Pool {
 public:
  explicit Pool(int workers) {
    for (int i = 1; i <= workers; ++i) {
      workers_.emplace_back([this] { work(); });
      name_worker(workers_.back(), i);
    }
  }

  ~Pool() {
    stopping_.store(true);
    announce();
    for (auto& worker : workers_) worker.join();
  }

  void run(int64_t chunks, ChunkBody body, const void* context) {
    body_ = body;
    context_ = context;
    chunks_ = chunks;
    done_.store(0, std::memory_order_relaxed);
    remaining_.store(chunks, std::memory_order_release);  // publishes the four fields above
    announce();
    drain();
    const auto finished = [this, chunks] { return done_.load(std::memory_order_acquire) == chunks; };
    if (wait_awake(finished)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    caller_sleeps_.store(true);
    all_done_.wait(lock, [this, chunks] { return done_.load() == chunks; });
    caller_sleeps_.store(false);
  }

 private:
  void announce() {
    epoch_.fetch_add(1);
    if (sleepers_.load() == 0) return;
    { const std::lock_guard<std::mutex> lock(mutex_); }
    wake_.notify_all();
  }

  // A claim is a positive remaining_ before the decrement. The fields are read only after a claim, and run() does not
  // rewrite them before every claimed chunk is done, so a worker that comes late can never see a mixture of two calls.
  void drain() {
    while (remaining_.load(std::memory_order_relaxed) > 0) {
      const int64_t left = remaining_.fetch_sub(1, std::memory_order_acq_rel);
      if (left <= 0) return;
      const int64_t chunks = chunks_;
      body_(context_, chunks - left);
      if (done_.fetch_add(1) + 1 == chunks && caller_sleeps_.load()) {
        { const std::lock_guard<std::mutex> lock(mutex_); }
        all_done_.notify_one();
      }
    }
  }

  void work() {
    uint64_t seen = 0;
    while (!stopping_.load()) {
      wait_for_epoch_after(seen);
      seen = epoch_.load();
      drain();
    }
  }

  void wait_for_epoch_after(uint64_t seen) {
    const auto changed = [this, seen] { return epoch_.load() != seen; };
    if (wait_awake(changed)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, changed);
    sleepers_.fetch_sub(1);
  }

  ChunkBody body_ = nullptr;
  const void* context_ = nullptr;
  int64_t chunks_ = 0;
  alignas(64) std::atomic<int64_t> remaining_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<uint64_t> epoch_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> caller_sleeps_{false};
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable all_done_;
  std::vector<std::thread> workers_;
};

// Never freed: workers may still sleep in it while the process exits.
struct State {
  std::mutex busy;
  std::unique_ptr<Pool> pool;
  std::atomic<int> threads{1};
};

State* state = nullptr;

// The child has one thread and, possibly, locks that nobody will release: it starts from a fresh state.
void forget_workers() {
  const int threads = state->threads.load();
  state = new State;
  state->threads.store(threads);
}

State& the_state() {
  static const bool ready = [] {
    state = new State;
    pthread_atfork(nullptr, nullptr, forget_workers);
    return true;
  }();
  (void)ready;
  return *state;
}

}  // namespace

void parallel_for(int64_t chunks, ChunkBody body, const void* context) {
  State& now = the_state();
  std::unique_lock<std::mutex> lock(now.busy, std::defer_lock);
  const int workers = now.threads.load() - 1;
  if (chunks < 2 || workers < 1 || !lock.try_lock()) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) body(context, chunk);
    return;
  }
  if (!now.pool) now.pool = std::make_unique<Pool>(workers);
  now.pool->run(chunks, body, context);
}

void set_threads(int threads) {
  State& now = the_state();
  const std::lock_guard<std::mutex> lock(now.busy);
  if (threads == now.threads.load()) return;
  now.pool.reset();
  now.threads.store(threads);
}

int threads() { return the_state().threads.load(); }

}  // namespace kvern
