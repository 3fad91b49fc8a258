// The emulated GPU: blocks, all of which run at once, their threads, which are fibers, and what the copy engine and the
// tensor cores still have to do. Order is drawn at random, from a seed: of the threads and blocks at every step, when a
// copy takes place, whether a product is formed when it is asked for or when it is waited for.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "prelude.h"

namespace emulator {

constexpr uint32_t kShared = 227 << 10, kFirst = 1 << 10;  // bytes a block may have, and the address where they begin
constexpr int kNamed = 16;
constexpr uint32_t kRank = 24;  // from this bit on an address holds a block of the cluster, plus 1, or 0: the own block

// wgmma as one thread sees it: its elements of the accumulator, and where the operands lie.
struct Product {
  int columns, element;  // element: 2 bytes, 4, or 3 for bfloat16
  uint64_t a, b;
  bool adds;
  std::vector<float*> to;
};

struct Fiber {
  ucontext_t start;
  jmp_buf place;  // where it gave way
  char* stack = nullptr;
  int thread = 0;
  bool started = false, done = true;

  std::vector<Product> products;               // not committed yet
  std::deque<std::vector<Product>> committed;  // groups that are not formed yet
  size_t formed = 0;                           // groups before those
  size_t asked() const { return formed + committed.size(); }
  bool fenced = false;                         // since accumulators were its own
  std::vector<int> stores;                     // of the copy engine, not committed yet
  std::deque<std::vector<int>> store_groups;
  unsigned cluster_phase = 0;
  std::vector<uint32_t> unfenced;              // what it wrote by stmatrix and the copy engine may not see: places / 16
};

struct Rendezvous {
  int arrived = 0;
  unsigned generation = 0;
};
struct Warp : Rendezvous {
  uint32_t lanes[2][32][4];  // what each lane offers, by the generation's parity
};

struct Block {
  uint3 index;
  int cluster, rank, live;
  char* shared;
  std::vector<Fiber*> fibers;
  std::vector<Warp> warps;
  Rendezvous named[kNamed];
  int unfinished_stores = 0;
  std::vector<uint16_t> unfenced = std::vector<uint16_t>(kShared / 16);  // how many threads wrote here without a fence

  char* at(uint32_t address, uint32_t bytes);  // fails where that is outside
};
struct Cluster : Rendezvous {
  std::vector<Block*> blocks;
  int live = 0;
};

// A copy. Those that are late are made when they are waited for, or when nothing else happens any more.
struct Transfer {
  std::function<void()> make;
  bool late;
};

struct Machine {
  std::vector<Block> blocks;
  std::vector<Cluster> clusters;
  std::map<int, Transfer> transfers;  // not made yet; by number, in the order in which they were asked for
  int next_transfer = 0;
  Block* block = nullptr;  // that runs
  Fiber* fiber = nullptr;
  uint64_t progress = 0;  // grows whenever something happens that others may wait for
  uint64_t random = 1;
  std::string failure;
  std::map<std::string, int64_t> counts;  // of what has run: kinds of instruction

  uint32_t draw(uint32_t below);
  void make(int transfer);
  Warp& warp() { return block->warps[fiber->thread / 32]; }
  int lane() const { return fiber->thread % 32; }
  Cluster& cluster() { return clusters[block->cluster]; }
  Block& owner(uint32_t& address);  // whose shared memory; the rank is taken out of the address
};

extern Machine machine;


void give_way();
void wait(Rendezvous& at, int all);
void finish(Rendezvous& at);
unsigned meet(const uint32_t* offered, int count);  // of the lanes of a warp; the parity under which all offers stand

// ---- By unit.

void barrier_instruction(const std::string& text, const Operand* operands);  // mbarrier.*
void complete_bytes(Block& block, uint32_t address, uint32_t bytes);
void copy_instruction(const std::string& text, const Operand* operands);  // cp.async.bulk.*
void product_instruction(const std::string& text, const Operand* operands, size_t count);  // wgmma.*
void matrix_instruction(const std::string& text, const Operand* operands);                 // ldmatrix, stmatrix

}  // namespace emulator
