// A small persistent thread pool. The caller takes part; chunks are claimed one by one, so that a core stolen by
// another process delays one chunk, not the whole call. Idle workers spin a few microseconds (the next matrix of a
// layer comes that soon), then yield, then sleep.
//
// After fork() the child starts without workers and makes its own with its first call; a fork in the middle of a call
// of another thread loses nothing in the child but that call.
#pragma once

#include <cstdint>

namespace kvern {

using ChunkBody = void (*)(const void* context, int64_t chunk);

// Runs body(context, chunk) for every chunk in [0, chunks), in any order, and returns when all are done.
void parallel_for(int64_t chunks, ChunkBody body, const void* context);

void set_threads(int threads);
int threads();

}  // namespace kvern
