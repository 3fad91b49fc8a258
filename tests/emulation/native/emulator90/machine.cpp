// Fibers and their order, and what they meet at.
#include "machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <numeric>
#include <stdexcept>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

Machine machine;

namespace {

constexpr size_t kStack = 256 << 10;
constexpr int kPatience = 400;  // rounds in which nothing happens before it is a deadlock

jmp_buf scheduler;
bool inside = false;  // a fiber runs
std::vector<std::unique_ptr<Fiber>> pool;
std::vector<std::unique_ptr<char, void (*)(void*)>> memories;
const std::function<void()>* body;

void enter() {
  (*body)();
  Block& block = *machine.block;
  Fiber& fiber = *machine.fiber;
  if (!fiber.products.empty() || !fiber.committed.empty()) fail("a thread leaves with products under way");
  fiber.done = true;
  ++machine.progress;
  --block.live;
  Cluster& cluster = machine.cluster();
  if (--cluster.live > 0 && cluster.arrived >= cluster.live) finish(cluster);
  if (block.live == 0 && block.unfinished_stores > 0) fail("a block leaves while its shared memory is being stored");
  for (;;) give_way();
}

__attribute__((noinline)) void resume(Block& block, Fiber& fiber) {
  machine.block = &block;
  machine.fiber = &fiber;
  threadIdx = {static_cast<unsigned>(fiber.thread), 0, 0};
  blockIdx = block.index;
  inside = true;
  if (_setjmp(scheduler) != 0) {
    inside = false;
    return;
  }
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack;
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter, 0);
  setcontext(&fiber.start);
}

Fiber* new_fiber(size_t number, int thread) {
  while (pool.size() <= number) {
    pool.push_back(std::make_unique<Fiber>());
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::runtime_error("no memory for a fiber");
    pool.back()->stack = static_cast<char*>(stack);
  }
  Fiber& fiber = *pool[number];
  char* stack = fiber.stack;
  fiber = Fiber{};
  fiber.stack = stack;
  fiber.thread = thread;
  fiber.done = false;
  return &fiber;
}

char* new_memory(size_t number) {
  while (memories.size() <= number) {
    memories.emplace_back(static_cast<char*>(std::aligned_alloc(1024, kShared)), std::free);
  }
  std::memset(memories[number].get(), 0xff, kShared);  // NaN, and no barrier
  return memories[number].get();
}

// Each thread of a block once, in an order drawn anew.
void round_of(Block& block) {
  const int n = static_cast<int>(block.fibers.size());
  int step = 1 + static_cast<int>(machine.draw(n));
  while (std::gcd(step, n) != 1) ++step;
  int i = static_cast<int>(machine.draw(n));
  for (int count = 0; count < n && machine.failure.empty(); ++count, i = (i + step) % n) {
    if (!block.fibers[i]->done) resume(block, *block.fibers[i]);
  }
}

// One of the oldest four, and perhaps more of them; late ones only when nothing else happens.
void some_transfers(bool idle) {
  while (!machine.transfers.empty() && (idle || machine.draw(3) == 0)) {
    auto chosen = machine.transfers.begin();
    std::advance(chosen, machine.draw(static_cast<uint32_t>(std::min<size_t>(machine.transfers.size(), 4))));
    if (!idle && chosen->second.late) continue;
    machine.make(chosen->first);
    idle = false;
  }
}

void run() {
  uint64_t seen = machine.progress;
  int idle = 0;
  std::vector<Block*> running;
  for (Block& block : machine.blocks) running.push_back(&block);
  while (!running.empty() && machine.failure.empty()) {
    Block* block = running[machine.draw(static_cast<uint32_t>(running.size()))];
    for (uint32_t rounds = 1 + machine.draw(6); rounds > 0 && block->live > 0 && machine.failure.empty(); --rounds) {
      round_of(*block);
      some_transfers(false);
    }
    if (block->live == 0) running.erase(std::find(running.begin(), running.end(), block));
    if (machine.progress != seen) {
      idle = 0;
      seen = machine.progress;
    } else if (++idle > 8) {
      some_transfers(true);
      if (machine.progress == seen && idle > kPatience) machine.failure = "deadlock: every thread waits";
    }
  }
  while (!machine.transfers.empty() && machine.failure.empty()) some_transfers(true);
}

}  // namespace

int64_t counted(const char* what) { return machine.counts[what]; }

void fail(const char* what) {
  if (machine.failure.empty()) machine.failure = what;
  if (!inside) throw std::runtime_error(what);
  for (;;) give_way();
}

__attribute__((noinline)) void give_way() {
  if (_setjmp(machine.fiber->place) == 0) _longjmp(scheduler, 1);
}

void finish(Rendezvous& at) {
  at.arrived = 0;
  ++at.generation;
  ++machine.progress;
}

void wait(Rendezvous& at, int all) {
  const unsigned generation = at.generation;
  if (++at.arrived >= all) {
    finish(at);
  } else {
    while (generation == at.generation) give_way();
  }
}

unsigned meet(const uint32_t* offered, int count) {
  Warp& warp = machine.warp();
  const unsigned parity = warp.generation & 1;
  for (int i = 0; i < count; ++i) warp.lanes[parity][machine.lane()][i] = offered[i];
  wait(warp, 32);
  return parity;
}

uint32_t shuffle(uint32_t value, int from) {
  const unsigned parity = meet(&value, 1);
  return machine.warp().lanes[parity][from][0];
}
void sync_warp() { meet(nullptr, 0); }
void sync_block() { wait(machine.block->named[0], static_cast<int>(machine.block->fibers.size())); }

char* shared_memory() { return machine.block->shared; }
uint32_t shared_address(const void* pointer) {
  const ptrdiff_t offset = static_cast<const char*>(pointer) - machine.block->shared;
  if (offset < 0 || offset >= static_cast<ptrdiff_t>(kShared)) fail("a pointer that is not into shared memory");
  return kFirst + static_cast<uint32_t>(offset);
}

char* Block::at(uint32_t address, uint32_t bytes) {
  if (address < kFirst || address + bytes > kFirst + kShared) fail("an address outside shared memory");
  return shared + (address - kFirst);
}

Block& Machine::owner(uint32_t& address) {
  const uint32_t rank = address >> kRank;
  address &= (1u << kRank) - 1;
  if (rank == 0) return *block;
  if (rank > cluster().blocks.size()) fail("a block outside the cluster");
  Block& found = *cluster().blocks[rank - 1];
  if (found.live == 0) fail("shared memory of a block that has left");
  return found;
}

uint32_t Machine::draw(uint32_t below) {
  random ^= random << 13;
  random ^= random >> 7;
  random ^= random << 17;
  return static_cast<uint32_t>((random >> 16) % below);
}

void Machine::make(int transfer) {
  const auto found = transfers.find(transfer);
  if (found == transfers.end()) return;
  const std::function<void()> make = std::move(found->second.make);
  transfers.erase(found);
  ++progress;
  make();
}

cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  const int size = config.numAttrs > 0 ? static_cast<int>(config.attrs[0].val.clusterDim.x) : 1;
  const int threads = static_cast<int>(config.blockDim.x);
  if (threads == 0 || threads > 1024 || threads % 32 != 0 || config.dynamicSmemBytes > kShared ||
      config.gridDim.x == 0 || config.gridDim.y == 0 || config.gridDim.z == 0 || config.gridDim.x % size != 0) {
    throw std::runtime_error("a launch that no GPU takes");
  }
  const size_t blocks = static_cast<size_t>(config.gridDim.x) * config.gridDim.y * config.gridDim.z;
  ++machine.counts["launches"];
  machine.counts["blocks"] += static_cast<int64_t>(blocks);
  if (planning) return cudaSuccess;
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  body = &kernel;
  machine.failure.clear();
  machine.transfers.clear();
  machine.blocks = std::vector<Block>(blocks);
  machine.clusters = std::vector<Cluster>(blocks / size);
  for (size_t i = 0; i < blocks; ++i) {
    Block& block = machine.blocks[i];
    const unsigned n = static_cast<unsigned>(i);
    block.index = {n % gridDim.x, n / gridDim.x % gridDim.y, n / gridDim.x / gridDim.y};
    block.cluster = static_cast<int>(i) / size;
    block.rank = static_cast<int>(i) % size;
    block.live = threads;
    block.shared = new_memory(i);
    block.warps = std::vector<Warp>(threads / 32);
    for (int thread = 0; thread < threads; ++thread) block.fibers.push_back(new_fiber(i * threads + thread, thread));
    machine.clusters[block.cluster].blocks.push_back(&block);
    machine.clusters[block.cluster].live += threads;
  }
  run();
  if (!machine.failure.empty()) throw std::runtime_error(machine.failure);
  return cudaSuccess;
}

}  // namespace emulator
