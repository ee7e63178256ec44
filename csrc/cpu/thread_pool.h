// A pool whose caller can always finish alone. Chunks are claimed by the caller and by whichever workers happen to wake
// up, each from its own share first; the caller waits only for chunks somebody has begun. So a busy machine never
// stalls the step, idle workers sleep (no spinning that would steal from a backward pass), and a forked child simply
// works alone.
#pragma once

#include <cstdint>

namespace gut_fast::cpu {

// body(context, chunk, participant): participant < num_threads is distinct among those running at the same time.
using ChunkBody = void (*)(void* context, std::int64_t chunk, int participant);

// Runs body for every chunk in [0, num_chunks) on up to num_threads threads, the calling one among them. Floating-point
// modes of the caller (rounding, flush-to-zero) hold in the workers. A call made while another one runs works alone.
void parallel_chunks(int num_threads, std::int64_t num_chunks, ChunkBody body, void* context);

}  // namespace gut_fast::cpu
