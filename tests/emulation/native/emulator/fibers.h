// The threads of a block as fibers: what both emulators of CUDA on a machine without a GPU are made of. Blocks run one
// after the other; a thread gives way at barriers and at what its warp does together, and they take turns in ascending or
// (emulator::backwards) descending order: what depends on the order between two barriers gives different results in the
// two. dim3 is whatever the includer has for it.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr int kThreads = 1024;  // of the largest block
constexpr size_t kStack = 64 << 10;
inline bool backwards = false;
inline int launches = 0;
inline uint64_t last_blocks = 0;  // of a grid, that alone are run; 0: all are

struct Fiber {
  ucontext_t start;
  jmp_buf place;  // where it gave way: a jump there asks the system for nothing, unlike swapcontext
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool started = false, done = false;
};
struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};

inline jmp_buf scheduler;
inline std::vector<Fiber> fibers;
inline std::function<void()> body;
inline Barrier block;
inline std::vector<Barrier> warps;
inline int current = 0, live = 0;
inline int moves = 0;  // of a block: where none happens while all threads have a turn, none ever will

__attribute__((noinline)) inline void give_way() {
  if (_setjmp(fibers[current].place) == 0) _longjmp(scheduler, 1);
}

inline void wait(Barrier& barrier, int all) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived >= all) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    while (generation == barrier.generation) give_way();
  }
  ++moves;
}

inline void enter() {
  for (;;) {  // a block after the other
    body();
    fibers[current].done = true;
    --live;
    ++moves;
    if (block.arrived > 0 && block.arrived >= live) {  // those that have left no longer count
      block.arrived = 0;
      ++block.generation;
    }
    give_way();
  }
}

__attribute__((noinline)) inline void resume(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStack;
  makecontext(&fiber.start, enter, 0);
  setcontext(&fiber.start);
}

inline void run_block(int threads) {
  if (fibers.empty()) fibers = std::vector<Fiber>(kThreads);  // they never move
  warps.assign(threads / 32, {});
  block = {};
  live = threads;
  for (int i = 0; i < threads; ++i) fibers[i].done = false;
  while (live > 0) {
    const int before = moves;
    for (int i = 0; i < threads; ++i) {
      current = backwards ? threads - 1 - i : i;
      if (fibers[current].done) continue;
      threadIdx.x = current;
      resume(fibers[current]);
    }
    if (moves == before) {
      std::fprintf(stderr, "emulator: %d threads wait for each other\n", live);
      std::abort();
    }
  }
}

// Calls the kernel with every thread of every block, `before` ahead of each block. False: no such grid.
template <class Kernel, class Before>
bool run_grid(const dim3& grid, const dim3& block, const Kernel& kernel, const Before& before) {
  const unsigned threads = block.x * block.y * block.z;
  if (threads != block.x || threads == 0 || threads > kThreads || threads % 32 || grid.x == 0 || grid.y == 0 ||
      grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
    return false;
  }
  ++launches;
  blockDim = block;
  gridDim = grid;
  body = kernel;
  const uint64_t plane = uint64_t{grid.x} * grid.y, blocks = plane * grid.z;
  for (uint64_t i = last_blocks == 0 || last_blocks > blocks ? 0 : blocks - last_blocks; i < blocks; ++i) {
    blockIdx.x = static_cast<unsigned>(i % grid.x);
    blockIdx.y = static_cast<unsigned>(i % plane / grid.x);
    blockIdx.z = static_cast<unsigned>(i / plane);
    before();
    run_block(static_cast<int>(threads));
  }
  return true;
}

inline int lane() { return current % 32; }
inline int warp() { return current / 32; }

// A rendezvous of a warp: every lane offers a value, and gets those of all 32. They lie in one of two places in turn: who
// comes first to the next rendezvous overwrites nothing that another still reads.
template <class T>
const T* exchange(const T& mine) {
  static T offers[kThreads / 32][2][32];
  T* all = offers[warp()][warps[warp()].generation % 2];
  all[lane()] = mine;
  wait(warps[warp()], 32);
  return all;
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::block, emulator::live); }
