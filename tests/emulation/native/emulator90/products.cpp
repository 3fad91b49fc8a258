// wgmma: products of 64 rows by N columns, both operands in shared memory in the 128-byte swizzle, both with the depth
// innermost. Each thread forms its own elements. ldmatrix and stmatrix: 8x8 matrices spread over a warp.
#pragma GCC optimize("O3")  // the flags ask for what compiles CUTLASS in little time
#include <algorithm>
#include <cstdlib>

#include "cuda_fp16.h"
#include "machine.h"

namespace emulator {

namespace {

const float* halves() {
  static const std::vector<float> table = [] {
    std::vector<float> values(1 << 16);
    for (uint32_t bits = 0; bits < 1 << 16; ++bits) {
      const __half_raw raw{static_cast<unsigned short>(bits)};
      values[bits] = __half2float(__half(raw));
    }
    return values;
  }();
  return table.data();
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The depth of one instruction is 32 bytes.
void read_line(Block& block, uint64_t descriptor, int line, int element, float* values) {
  const uint32_t start = (descriptor & 0x3fff) << 4, groups = (descriptor >> 32 & 0x3fff) << 4;
  const uint32_t address = start + line / 8 * groups + line % 8 * 128;
  for (uint32_t half = 0; half < 32; half += 16) {
    uint32_t at = address + half;
    at ^= (at >> 7 & 7) << 4;
    const char* from = block.at(at, 16);
    if (element == 4) {
      for (int i = 0; i < 4; ++i) {
        uint32_t bits;
        std::memcpy(&bits, from + 4 * i, 4);
        *values++ = float_of(bits & 0xffffe000);  // TF32 has 10 bits behind the point, the others are not looked at
      }
    } else {
      const float* table = halves();
      for (int i = 0; i < 8; ++i) {
        uint16_t bits;
        std::memcpy(&bits, from + 2 * i, 2);
        *values++ = element == 2 ? table[bits] : float_of(static_cast<uint32_t>(bits) << 16);
      }
    }
  }
}

template <int kDepth>
float dot(const float* a, const float* b) {
  float sum = 0;
  for (int i = 0; i < kDepth; ++i) sum += a[i] * b[i];
  return sum;
}

void form(Block& block, const Fiber& fiber, const Product& p) {
  const int thread = fiber.thread % 128, lane = thread % 32;
  float a[2][16], b[16];
  for (int i = 0; i < 2; ++i) read_line(block, p.a, thread / 32 * 16 + lane / 4 + 8 * i, p.element, a[i]);
  for (int column = 0; column < p.columns / 4; ++column) {  // pairs of columns of every 8
    read_line(block, p.b, column / 2 * 8 + lane % 4 * 2 + column % 2, p.element, b);
    for (int i = 0; i < 2; ++i) {
      const float sum = p.element == 4 ? dot<8>(a[i], b) : dot<16>(a[i], b);
      float& to = *p.to[column / 2 * 4 + 2 * i + column % 2];
      to = p.adds ? to + sum : sum;
    }
  }
}

// Groups are those of a warpgroup: who waits for one waits for all 128 threads' parts of it.
bool all_asked(size_t group) {
  const int first = machine.fiber->thread / 128 * 128;
  for (int i = first; i < first + 128; ++i) {
    if (machine.block->fibers.at(i)->asked() < group) return false;
  }
  return true;
}

void form_until(size_t group) {
  Block& block = *machine.block;
  const int first = machine.fiber->thread / 128 * 128;
  for (int i = first; i < first + 128; ++i) {
    for (Fiber& fiber = *block.fibers[i]; fiber.formed < group; ++fiber.formed) {
      for (const Product& p : fiber.committed.front()) form(block, fiber, p);
      fiber.committed.pop_front();
      ++machine.progress;
    }
  }
}

void check_descriptor(uint64_t descriptor) {
  if (descriptor >> 62 != 1) fail("wgmma: not the swizzle of 128 bytes");
  if ((descriptor >> 49 & 7) != 0) fail("wgmma: a base offset");
}

void ask(const std::string& text, const Operand* o, size_t count) {
  const size_t shape = text.find("m64n"), types = text.find(".f32.", shape);
  if (shape == std::string::npos || types == std::string::npos) fail(("not emulated: " + text).c_str());
  Product p;
  p.columns = std::atoi(text.c_str() + shape + 4);
  p.element = text.compare(types, 13, ".f32.f16.f16 ") == 0     ? 2
              : text.compare(types, 15, ".f32.bf16.bf16 ") == 0 ? 3
              : text.compare(types, 15, ".f32.tf32.tf32 ") == 0 ? 4
                                                                : 0;
  const size_t elements = p.columns / 2;
  // {d...}, a, b, adds, sign of a, sign of b [, the order of a, of b: 0 is the depth innermost]
  if (p.element == 0 || count != elements + (p.element == 4 ? 5 : 7)) fail(("not emulated: " + text).c_str());
  const Operand* rest = o + elements;
  if (rest[0].kind != 'l' || rest[1].kind != 'l' || rest[3].number() != 1 || rest[4].number() != 1) {
    fail(("not emulated: " + text).c_str());
  }
  if (p.element != 4 && (rest[5].number() != 0 || rest[6].number() != 0)) fail("wgmma: not the depth innermost");
  p.a = rest[0].bits;
  p.b = rest[1].bits;
  p.adds = rest[2].number() != 0;
  check_descriptor(p.a);
  check_descriptor(p.b);
  p.to.reserve(elements);
  for (size_t i = 0; i < elements; ++i) p.to.push_back(static_cast<float*>(o[i].to));
  Fiber& fiber = *machine.fiber;
  if (!fiber.fenced) fail("wgmma without wgmma.fence before it");
  fiber.products.push_back(std::move(p));
}

}  // namespace

void product_instruction(const std::string& text, const Operand* operands, size_t count) {
  Fiber& fiber = *machine.fiber;
  if (text.compare(0, 11, "wgmma.fence") == 0) {
    fiber.fenced = true;
  } else if (text.compare(0, 18, "wgmma.commit_group") == 0) {
    fiber.committed.push_back(std::move(fiber.products));
    fiber.products.clear();
    if (all_asked(fiber.asked()) && machine.draw(3) == 0) form_until(fiber.asked());
  } else if (text.compare(0, 16, "wgmma.wait_group") == 0) {
    const size_t group = fiber.asked() - std::min<size_t>(fiber.asked(), operands[0].bits);
    while (!all_asked(group)) give_way();
    form_until(group);
    if (operands[0].bits == 0) fiber.fenced = false;
  } else {
    ask(text, operands, count);
  }
}

void matrix_instruction(const std::string& text, const Operand* o) {
  const size_t x = text.find(".x");
  const int matrices = text[x + 2] - '0';
  if (text.find(".trans") != std::string::npos || text.find("m8n8") == std::string::npos) {
    fail(("not emulated: " + text).c_str());
  }
  Block& block = *machine.block;
  const int lane = machine.lane();
  const bool load = text.compare(0, 8, "ldmatrix") == 0;
  const auto line = [&](uint32_t address) {
    if (address % 16 != 0) fail("ldmatrix, stmatrix: an address that is not aligned");
    return block.at(address, 16);
  };
  if (load) {
    const uint32_t own = static_cast<uint32_t>(o[matrices].bits);
    const unsigned parity = meet(&own, 1);
    for (int i = 0; i < matrices; ++i) {
      std::memcpy(o[i].to, line(machine.warp().lanes[parity][8 * i + lane / 4][0]) + lane % 4 * 4, 4);
    }
    sync_warp();
  } else {
    const uint32_t own = static_cast<uint32_t>(o[0].bits);
    if (lane < 8 * matrices) {
      line(own);
      ++block.unfenced[(own - kFirst) / 16];
      machine.fiber->unfenced.push_back((own - kFirst) / 16);
    }
    const unsigned parity = meet(&own, 1);
    for (int i = 0; i < matrices; ++i) {
      const uint32_t bits = static_cast<uint32_t>(o[1 + i].bits);
      std::memcpy(line(machine.warp().lanes[parity][8 * i + lane / 4][0]) + lane % 4 * 4, &bits, 4);
    }
    sync_warp();
  }
}

}  // namespace emulator
