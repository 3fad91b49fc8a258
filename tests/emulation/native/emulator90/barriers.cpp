// mbarrier: a word of shared memory that counts arrivals and bytes.
#include "machine.h"

namespace emulator {

namespace {

struct Word {
  uint64_t pending : 20;
  uint64_t expected : 20;
  int64_t bytes : 21;  // under way; below 0 where they came before they were announced
  uint64_t phase : 1;
  uint64_t magic : 2;
};
static_assert(sizeof(Word) == 8);
constexpr uint64_t kMagic = 2;

Word load(Block& block, uint32_t address) {
  if (address % 8 != 0) fail("an mbarrier that is not aligned");
  Word word;
  std::memcpy(&word, block.at(address, 8), 8);
  if (word.magic != kMagic) fail("an mbarrier before it was initialized");
  return word;
}

void store(Block& block, uint32_t address, Word word) {
  if (word.pending == 0 && word.bytes == 0) {
    word.phase ^= 1;
    word.pending = word.expected;
  }
  std::memcpy(block.at(address, 8), &word, 8);
  ++machine.progress;
}

void arrive(Block& block, uint32_t address, uint32_t bytes) {
  Word word = load(block, address);
  if (word.pending == 0) fail("more arrivals at an mbarrier than it counts");
  word.bytes += bytes;
  word.pending -= 1;
  store(block, address, word);
}

bool complete(uint32_t address, uint32_t parity) {
  uint32_t own = address;
  return load(machine.owner(own), own).phase != (parity & 1);
}

bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

}  // namespace

void complete_bytes(Block& block, uint32_t address, uint32_t bytes) {
  if (block.live == 0) fail("a copy for a block that has left");
  Word word = load(block, address);
  word.bytes -= bytes;
  store(block, address, word);
}

void barrier_instruction(const std::string& text, const Operand* o) {
  const auto address = [&](int i) { return static_cast<uint32_t>(o[i].bits); };
  if (has(text, "mbarrier.init")) {
    const bool first = text.find("%0") < text.find("%1");  // [%0], %1 or [%1], %0
    const uint32_t at = address(first ? 0 : 1), count = address(first ? 1 : 0);
    if (count == 0 || count >= 1u << 20 || at % 8 != 0) fail("mbarrier.init");
    Word word{count, count, 0, 0, kMagic};
    std::memcpy(machine.block->at(at, 8), &word, 8);
  } else if (has(text, "try_wait") && has(text, "bra")) {
    while (!complete(address(0), address(1))) give_way();
    ++machine.progress;
  } else if (has(text, "try_wait")) {  // {result}, [address], parity
    const uint32_t done = complete(address(1), address(2));
    machine.progress += done;
    std::memcpy(o[0].to, &done, 4);
  } else if (has(text, "test_wait")) {  // the same, and a predicate
    const uint32_t done = o[3].bits == 1 && complete(address(1), address(2));
    std::memcpy(o[0].to, &done, 4);
  } else if (has(text, "mapa") && has(text, "expect_tx")) {  // [address], block, predicate, bytes
    if (o[2].bits != 1) return;
    arrive(*machine.cluster().blocks.at(o[1].bits), address(0), address(3));
  } else if (has(text, "mapa") && has(text, "mbarrier.arrive")) {  // [address], block
    if (o[1].bits >= machine.cluster().blocks.size()) fail("an arrival at a block outside the cluster");
    Block& block = *machine.cluster().blocks[o[1].bits];
    if (block.live == 0) fail("an arrival at a block that has left");
    arrive(block, address(0), 0);
  } else if (has(text, "mbarrier.arrive.expect_tx")) {
    const bool first = text.find("%0") < text.find("%1");
    arrive(*machine.block, address(first ? 0 : 1), address(first ? 1 : 0));
  } else if (has(text, "mbarrier.expect_tx")) {  // bytes, [address]
    Word word = load(*machine.block, address(1));
    word.bytes += address(0);
    store(*machine.block, address(1), word);
  } else if (has(text, "mbarrier.complete_tx")) {  // bytes, [address], predicate
    if (o[2].bits != 1) return;
    uint32_t at = address(1);
    Block& block = machine.owner(at);
    complete_bytes(block, at, address(0));
  } else if (has(text, "mbarrier.arrive.shared::cta")) {
    arrive(*machine.block, address(0), 0);
  } else if (has(text, "mbarrier.inval")) {
    std::memset(machine.block->at(address(0), 8), 0xff, 8);
  } else {
    fail(("not emulated: " + text).c_str());
  }
}

}  // namespace emulator
