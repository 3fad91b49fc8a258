// The copy engine (TMA): tensor maps as the driver encodes them, what it refuses, and copies by their documented
// semantics. A copy is put on a list and made at some later time.
#include <algorithm>
#include <array>
#include <stdexcept>

#include "machine.h"

namespace emulator {

namespace {

struct Map {
  int rank, size;  // size: of an element
  bool im2col;
  char* base;
  int64_t dims[5], strides[5];  // innermost first; strides in bytes
  int64_t box[5];               // im2col: channels, pixels
  int64_t steps[5];             // of elements
  // im2col: corners of the box of pixels, W first like the dimensions: CUTLASS's order, and that of the offsets in PTX,
  // where the driver's manual speaks of {D, H, W}.
  int64_t lower[3], upper[3];
  int swizzle;
  bool rounds;  // loads, to TF32: to the nearest, as cvt.rna does; how is written nowhere

  int64_t lines() const {
    int64_t lines = 1;
    for (int i = 1; i < (im2col ? 2 : rank); ++i) lines *= box[i];
    return lines;
  }
  int64_t line_bytes() const { return box[0] * size; }
};

struct Opaque {
  uint64_t magic, number;
};
constexpr uint64_t kMagic = 0x70616d726f736e65;
std::vector<Map> maps;

const Map& map_at(uint64_t address) {
  Opaque opaque;
  if (address % 64 != 0) fail("a tensor map that is not aligned");
  std::memcpy(&opaque, reinterpret_cast<const void*>(address), sizeof opaque);
  if (opaque.magic != kMagic || opaque.number >= maps.size()) fail("not a tensor map");
  return maps[opaque.number];
}

uint32_t swizzled(uint32_t address, int swizzle) {
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_128B:
      return address ^ (address >> 7 & 7) << 4;
    case CU_TENSOR_MAP_SWIZZLE_64B:
      return address ^ (address >> 7 & 3) << 4;
    case CU_TENSOR_MAP_SWIZZLE_32B:
      return address ^ (address >> 7 & 1) << 4;
    default:
      return address;
  }
}

using Coordinates = std::array<int64_t, 5>;

// Where the lines of a copy begin in the tensor. f(line, coordinates).
template <class F>
void for_each_line(const Map& map, const Coordinates& from, const std::array<int64_t, 3>& offsets, const F& f) {
  if (!map.im2col) {
    for (int64_t line = 0; line < map.lines(); ++line) {
      Coordinates at = from;
      int64_t rest = line;
      for (int i = 1; i < map.rank; rest /= map.box[i], ++i) at[i] += rest % map.box[i];
      f(line, at);
    }
    return;
  }
  Coordinates base = from;
  for (int64_t line = 0; line < map.box[1]; ++line) {
    Coordinates at = base;
    for (int i = 1; i < map.rank - 1; ++i) at[i] += offsets[i - 1];
    f(line, at);
    int i = 1;
    for (; i < map.rank - 1; ++i) {
      base[i] += map.steps[i];
      if (base[i] <= map.dims[i] - 1 + map.upper[i - 1]) break;
      base[i] = map.lower[i - 1];
    }
    if (i == map.rank - 1) base[i] += map.steps[i];
  }
}

// The bytes of a line that are inside the tensor, and where: null for none.
char* inside_of(const Map& map, const Coordinates& at, int64_t& skipped, int64_t& bytes) {
  char* place = map.base;
  for (int i = 1; i < map.rank; ++i) {
    if (at[i] < 0 || at[i] >= map.dims[i]) return nullptr;
    place += at[i] * map.strides[i];
  }
  const int64_t first = std::max<int64_t>(at[0], 0), last = std::min(at[0] + map.box[0], map.dims[0]);
  if (last <= first) return nullptr;
  skipped = (first - at[0]) * map.size;
  bytes = (last - first) * map.size;
  return place + first * map.size;
}

void load(const Map& map, Block& block, uint32_t to, const Coordinates& from, const std::array<int64_t, 3>& offsets) {
  std::vector<char> line(map.line_bytes());
  for_each_line(map, from, offsets, [&](int64_t number, const Coordinates& at) {
    std::fill(line.begin(), line.end(), 0);
    int64_t skipped, bytes;
    if (const char* place = inside_of(map, at, skipped, bytes)) std::memcpy(&line[skipped], place, bytes);
    for (int64_t i = 0; map.rounds && i < map.line_bytes(); i += 4) {
      uint32_t bits;
      std::memcpy(&bits, &line[i], 4);
      if ((bits & 0x7f800000) != 0x7f800000) bits = (bits + 0x1000) & 0xffffe000;
      std::memcpy(&line[i], &bits, 4);
    }
    for (int64_t i = 0; i < map.line_bytes(); i += 16) {
      const uint32_t address = swizzled(static_cast<uint32_t>(to + number * map.line_bytes() + i), map.swizzle);
      std::memcpy(block.at(address, 16), &line[i], 16);
    }
  });
}

void store(const Map& map, Block& block, uint32_t from, const Coordinates& to) {
  std::vector<char> line(map.line_bytes());
  for_each_line(map, to, {}, [&](int64_t number, const Coordinates& at) {
    for (int64_t i = 0; i < map.line_bytes(); i += 16) {
      const uint32_t address = swizzled(static_cast<uint32_t>(from + number * map.line_bytes() + i), map.swizzle);
      std::memcpy(&line[i], block.at(address, 16), 16);
    }
    int64_t skipped, bytes;
    if (char* place = inside_of(map, at, skipped, bytes)) std::memcpy(place, &line[skipped], bytes);
  });
}

int put_on_list(std::function<void()> make) {
  machine.transfers[machine.next_transfer] = {std::move(make), machine.draw(6) == 0};
  return machine.next_transfer++;
}

// The operands of each [...] and {...} in the text, and of those that stand alone, in order.
struct Places {
  std::vector<std::vector<int>> groups;
};
const Places& places_of(const std::string& text) {
  static std::map<std::string, Places> known;
  Places& found = known[text];
  if (!found.groups.empty()) return found;
  int depth = 0;
  for (size_t i = text.find(" ["); i < text.size(); ++i) {
    if (text[i] == '[' || text[i] == '{') {
      if (depth++ == 0) found.groups.emplace_back();
    } else if (text[i] == ']' || text[i] == '}') {
      --depth;
    } else if (text[i] == '%') {
      if (depth == 0) found.groups.emplace_back();
      found.groups.back().push_back(std::atoi(text.c_str() + i + 1));
    }
  }
  return found;
}

Coordinates coordinates_of(const Map& map, const Operand* o, const std::vector<int>& group) {
  if (static_cast<int>(group.size()) != map.rank + 1) fail("a tensor map of another rank than the copy");
  Coordinates at{};
  for (int i = 0; i < map.rank; ++i) at[i] = o[group[1 + i]].number();
  return at;
}

// [to], [map, {coordinates}], [barrier], {offsets}, mask, hint
void ask_load(const std::string& text, const Operand* o) {
  const auto& groups = places_of(text).groups;
  const Map& map = map_at(o[groups[1][0]].bits);
  const bool im2col = text.find(".im2col") != std::string::npos;
  if (im2col != map.im2col) fail("a copy in another mode than its tensor map's");
  const Coordinates from = coordinates_of(map, o, groups[1]);
  std::array<int64_t, 3> offsets{};
  if (im2col) {
    for (size_t i = 0; i < groups[3].size(); ++i) {
      offsets[i] = static_cast<uint16_t>(o[groups[3][i]].bits);
      if (offsets[i] > 255) fail("an offset of more than 8 bits");
    }
  }
  uint32_t to = static_cast<uint32_t>(o[groups[0][0]].bits), barrier = static_cast<uint32_t>(o[groups[2][0]].bits);
  if (to % 128 != 0) fail("a copy to an address that is not aligned");
  std::vector<Block*> blocks;
  if (text.find(".multicast") != std::string::npos) {
    const uint64_t mask = o[groups[im2col ? 4 : 3][0]].bits & 0xffff;
    for (size_t rank = 0; rank < 16; ++rank) {
      if ((mask >> rank & 1) == 0) continue;
      if (rank >= machine.cluster().blocks.size()) fail("a copy to a block outside the cluster");
      blocks.push_back(machine.cluster().blocks[rank]);
    }
    ++machine.counts["copies to several blocks"];
  } else {
    blocks.push_back(machine.block);
  }
  ++machine.counts[im2col ? "im2col loads" : "tiled loads"];
  for (Block* block : blocks) {
    put_on_list([=, &map] {
      load(map, *block, to, from, offsets);
      complete_bytes(*block, barrier, static_cast<uint32_t>(map.lines() * map.line_bytes()));
    });
  }
}

void ask_store(const std::string& text, const Operand* o) {  // [map, {coordinates}], [from]
  const auto& groups = places_of(text).groups;
  const Map& map = map_at(o[groups[0][0]].bits);
  if (map.im2col || text.find("im2col") != std::string::npos) fail(("not emulated: " + text).c_str());
  const Coordinates to = coordinates_of(map, o, groups[0]);
  const uint32_t from = static_cast<uint32_t>(o[groups[1][0]].bits);
  if (from % 128 != 0) fail("a copy from an address that is not aligned");
  Block& block = *machine.block;
  for (int64_t i = 0; i < map.lines() * map.line_bytes(); i += 16) {
    block.at(from + static_cast<uint32_t>(i), 16);
    if (block.unfenced[(from - kFirst + i) / 16] > 0) fail("a store without fence.proxy.async before it");
  }
  ++block.unfinished_stores;
  ++machine.counts["stores"];
  Block* own = &block;
  machine.fiber->stores.push_back(put_on_list([=, &map] {
    store(map, *own, from, to);
    --own->unfinished_stores;
  }));
}

void wait_for_all_but(Fiber& fiber, size_t groups) {
  while (fiber.store_groups.size() > groups) {
    for (const int transfer : fiber.store_groups.front()) machine.make(transfer);
    fiber.store_groups.pop_front();
  }
}

bool encoded(const Map& map, CUtensorMap* to, const void* address, int interleave, int fill) {
  bool good = reinterpret_cast<uintptr_t>(address) % 16 == 0 && reinterpret_cast<uintptr_t>(to) % 64 == 0 &&
              map.size > 0 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && fill == 0;
  for (int i = 0; i < map.rank; ++i) {
    good = good && map.dims[i] >= 1 && map.dims[i] <= int64_t{1} << 32 && map.box[i] >= 1;
    good = good && (i == 0 || (map.strides[i] % 16 == 0 && map.strides[i] < int64_t{1} << 40));
    good = good && (i == 0 || (map.steps[i] >= 1 && map.steps[i] <= (map.im2col ? 8 : 1)));  // tiled: not emulated
  }
  const int64_t widest = map.swizzle == 0 ? 1 << 20 : 16 << map.swizzle;  // 32, 64, 128 bytes
  if (!good || map.line_bytes() % 16 != 0 || map.line_bytes() > widest || map.swizzle > CU_TENSOR_MAP_SWIZZLE_128B) {
    return false;
  }
  const Opaque opaque{kMagic, maps.size()};
  maps.reserve(1 << 16);  // they never move
  maps.push_back(map);
  std::memset(to, 0, sizeof *to);
  std::memcpy(to, &opaque, sizeof opaque);
  return true;
}

Map map_of(CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* dims, const cuuint64_t* strides,
           const cuuint32_t* steps, CUtensorMapSwizzle swizzle) {
  Map map{};
  map.rank = static_cast<int>(rank);
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      map.size = 2;
      break;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32:
      map.size = 4;
      map.rounds = type == CU_TENSOR_MAP_DATA_TYPE_TFLOAT32;
      break;
    default:
      map.size = 0;
  }
  map.base = static_cast<char*>(address);
  map.swizzle = swizzle;
  for (cuuint32_t i = 0; i < rank; ++i) {
    map.dims[i] = static_cast<int64_t>(dims[i]);
    map.strides[i] = i == 0 ? map.size : static_cast<int64_t>(strides[i - 1]);
    map.steps[i] = steps[i];
    map.box[i] = 1;
  }
  return map;
}

}  // namespace

void copy_instruction(const std::string& text, const Operand* o) {
  Fiber& fiber = *machine.fiber;
  if (text.compare(0, 26, "cp.async.bulk.commit_group") == 0) {
    fiber.store_groups.push_back(std::move(fiber.stores));
    fiber.stores.clear();
  } else if (text.compare(0, 24, "cp.async.bulk.wait_group") == 0) {
    wait_for_all_but(fiber, o[0].bits);
  } else if (text.compare(0, 21, "cp.async.bulk.tensor.") == 0 && text.find(".bulk_group") != std::string::npos) {
    ask_store(text, o);
  } else if (text.compare(0, 21, "cp.async.bulk.tensor.") == 0 && text.find(".mbarrier") != std::string::npos) {
    ask_load(text, o);
  } else {
    fail(("not emulated: " + text).c_str());
  }
}

void start(uint64_t seed) {
  machine.random = 2 * seed + 0x9e3779b97f4a7c15;
  machine.counts.clear();
  maps.clear();
}

}  // namespace emulator

// ---- The driver's encoders, and what they refuse.

extern "C" {

CUresult cuTensorMapEncodeTiled(CUtensorMap* to, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  if (rank < 1 || rank > 5) throw std::runtime_error("cuTensorMapEncodeTiled refuses the rank");
  emulator::Map map = emulator::map_of(type, rank, address, dims, strides, steps, swizzle);
  bool good = true;
  for (cuuint32_t i = 0; i < rank; ++i) good = good && (map.box[i] = box[i]) <= 256;
  if (!good || !emulator::encoded(map, to, address, interleave, fill)) {
    throw std::runtime_error("cuTensorMapEncodeTiled refuses");
  }
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeIm2col(CUtensorMap* to, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                 const cuuint64_t* dims, const cuuint64_t* strides, const int* lower, const int* upper,
                                 cuuint32_t channels, cuuint32_t pixels, const cuuint32_t* steps,
                                 CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                 CUtensorMapFloatOOBfill fill) {
  if (rank != 4) throw std::runtime_error("cuTensorMapEncodeIm2col: only images are emulated");
  emulator::Map map = emulator::map_of(type, rank, address, dims, strides, steps, swizzle);
  map.im2col = true;
  map.box[0] = channels;
  map.box[1] = pixels;
  bool good = channels <= 256 && pixels <= 1024;
  for (int i = 0; i < 2; ++i) {
    map.lower[i] = lower[i];
    map.upper[i] = upper[i];
    good = good && lower[i] >= -128 && lower[i] <= 127 && upper[i] >= -128 && upper[i] <= 127;
    good = good && map.dims[i + 1] + upper[i] > lower[i];  // some pixel is inside
  }
  if (!good || !emulator::encoded(map, to, address, interleave, fill)) {
    throw std::runtime_error("cuTensorMapEncodeIm2col refuses");
  }
  return CUDA_SUCCESS;
}

}  // extern "C"
