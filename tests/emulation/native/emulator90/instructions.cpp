// Inline PTX, by its text, and what CUDA's runtime does for a launch.
#include <cstdlib>
#include <unordered_map>

#include "machine.h"

namespace emulator {

namespace {

// A statement once looked at.
struct Statement {
  std::string text;  // from the instruction on, without the braces and declarations before it
  void (*run)(const std::string& text, const Operand* operands, size_t count);
};

bool starts(const std::string& text, const char* with) { return text.compare(0, std::strlen(with), with) == 0; }

void write(const Operand& to, uint64_t bits) { std::memcpy(to.to, &bits, size_of(to.kind)); }

void nothing(const std::string&, const Operand*, size_t) {}
void mbarrier(const std::string& text, const Operand* o, size_t) { barrier_instruction(text, o); }
void copy(const std::string& text, const Operand* o, size_t) { copy_instruction(text, o); }
void matrix(const std::string& text, const Operand* o, size_t) { matrix_instruction(text, o); }

void named_sync(const std::string&, const Operand* o, size_t count) {
  if (count != 2 || o[0].bits >= kNamed || o[1].bits % 32 != 0) fail("bar.sync");
  wait(machine.block->named[o[0].bits], o[1].number());
}
void named_arrive(const std::string&, const Operand* o, size_t count) {
  if (count != 2 || o[0].bits >= kNamed || o[1].bits % 32 != 0) fail("bar.arrive");
  Rendezvous& at = machine.block->named[o[0].bits];
  if (++at.arrived >= o[1].number()) finish(at);
}

void elect(const std::string&, const Operand* o, size_t) {  // lane elected, whether it is the own
  sync_warp();
  write(o[0], 0);
  if (machine.lane() == 0) write(o[1], 1);
}

void cluster_arrive(const std::string&, const Operand*, size_t) {
  Cluster& cluster = machine.cluster();
  machine.fiber->cluster_phase = cluster.generation;
  if (++cluster.arrived >= cluster.live) finish(cluster);
}
void cluster_wait(const std::string&, const Operand*, size_t) {
  while (machine.fiber->cluster_phase == machine.cluster().generation) give_way();
}

void fence_async(const std::string&, const Operand*, size_t) {
  for (const uint32_t place : machine.fiber->unfenced) --machine.block->unfenced[place];
  machine.fiber->unfenced.clear();
}

void map_address(const std::string&, const Operand* o, size_t) {  // result, address, rank
  if (o[2].bits >= machine.cluster().blocks.size()) fail("mapa: a block outside the cluster");
  const uint64_t own = o[1].bits & ((1u << kRank) - 1);
  write(o[0], own | (o[2].bits + 1) << kRank);
}

void special(const std::string& text, const Operand* o, size_t) {
  const auto is = [&](const char* name) { return text.find(name) != std::string::npos; };
  const unsigned size = static_cast<unsigned>(machine.cluster().blocks.size());
  const unsigned rank = static_cast<unsigned>(machine.block->rank);
  if (is("%cluster_ctarank")) return write(o[0], rank);
  if (is("%cluster_ctaid.x")) return write(o[0], rank);
  if (is("%cluster_ctaid.")) return write(o[0], 0);
  if (is("%cluster_nctaid.x")) return write(o[0], size);
  if (is("%cluster_nctaid.")) return write(o[0], 1);
  if (is("%nclusterid.x")) return write(o[0], gridDim.x / size);
  if (is("%nclusterid.y")) return write(o[0], gridDim.y);
  if (is("%nclusterid.z")) return write(o[0], gridDim.z);
  if (is("%clusterid.x")) return write(o[0], blockIdx.x / size);
  if (is("%clusterid.y")) return write(o[0], blockIdx.y);
  if (is("%clusterid.z")) return write(o[0], blockIdx.z);
  fail(("not emulated: " + text).c_str());
}

void load_flag(const std::string&, const Operand* o, size_t) {
  give_way();  // somebody spins on it
  write(o[0], *reinterpret_cast<const uint32_t*>(o[1].bits));
}
void add_to_flag(const std::string&, const Operand* o, size_t) {
  *reinterpret_cast<int32_t*>(o[0].bits) += o[1].number();
  ++machine.progress;
  ++machine.counts["additions to a flag"];
}

void stop(const std::string& text, const Operand*, size_t) { fail(("the kernel gives up: " + text).c_str()); }
void unknown(const std::string& text, const Operand*, size_t) { fail(("not emulated: " + text).c_str()); }

const struct {
  const char* with;
  void (*run)(const std::string&, const Operand*, size_t);
} kInstructions[] = {
    {"mbarrier.", mbarrier},
    {"setp.eq.u32 P2, %3, 1;\n\t@P2 mbarrier.test_wait", mbarrier},
    {"setp.eq.u32 p, %2, 1;\n\t@p mapa", mbarrier},
    {"setp.eq.u32 p, %2, 1;\n\t@p mbarrier", mbarrier},
    {"mapa.shared::cluster.u32  remAddr32", mbarrier},
    {"LAB_WAIT", mbarrier},
    {"mapa.", map_address},
    {"bar.sync", named_sync},
    {"barrier.sync", named_sync},
    {"bar.arrive", named_arrive},
    {"barrier.arrive", named_arrive},
    {"barrier.cluster.arrive", cluster_arrive},
    {"barrier.cluster.wait", cluster_wait},
    {"elect.sync", elect},
    {"cp.async.bulk.", copy},
    {"wgmma.", product_instruction},
    {"setp.ne.b32 p", product_instruction},
    {"ldmatrix", matrix},
    {"stmatrix", matrix},
    {"fence.proxy.async", fence_async},
    {"fence.", nothing},
    {"prefetch.tensormap", nothing},
    {"setmaxnreg", nothing},
    {"griddepcontrol", nothing},
    {"mov.u32 %0, %%", special},
    {"ld.global.acquire.gpu.b32", load_flag},
    {"red.relaxed.gpu.global.add.s32", add_to_flag},
    {"brkpt", stop},
};

Statement look_at(const char* text) {
  Statement found{text, unknown};
  for (bool again = true; again;) {  // past braces and declarations
    again = false;
    const size_t first = found.text.find_first_not_of(" \t\n{");
    if (first == std::string::npos) return found;
    found.text = found.text.substr(first);
    if (starts(found.text, ".reg")) {
      found.text = found.text.substr(found.text.find(';') + 1);
      again = true;
    }
  }
  for (const auto& instruction : kInstructions) {
    if (!starts(found.text, instruction.with)) continue;
    found.run = instruction.run;
    break;
  }
  return found;
}

}  // namespace

void add(float* to, float value) {
  if (machine.draw(16) == 0) give_way();
  *to += value;
  ++machine.counts["additions to memory"];
}

void ptx(const char* text, std::initializer_list<Operand> operands) {
  static std::unordered_map<const char*, Statement> known;
  auto at = known.find(text);
  if (at == known.end()) at = known.emplace(text, look_at(text)).first;
  if (machine.fiber == nullptr) fail("an instruction outside a kernel");
  if (machine.draw(16) == 0) give_way();
  at->second.run(at->second.text, operands.begin(), operands.size());
}

}  // namespace emulator

extern "C" {

void __assert_fail(const char* what, const char* file, unsigned line, const char* function) noexcept {
  emulator::fail((std::string(file) + ":" + std::to_string(line) + ": " + function + ": " + what).c_str());
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error"; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? device : 0;  // a device's number: of its multiprocessors
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t*) {
  *clusters = 1 << 10;
  return cudaSuccess;
}

}  // extern "C"
