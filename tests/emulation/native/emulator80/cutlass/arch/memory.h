// Loads and stores of global memory.
#pragma once

#include <cutlass/arch/cache_operation.h>
#include <cutlass/cutlass.h>

namespace cutlass {
namespace arch {

template <class Access, int kBytes, CacheOperation::Kind = CacheOperation::Always>
struct global_load {
  global_load(Access& to, const void* from, bool wanted) { emulator::load<kBytes>(&to, from, wanted); }
};
template <class Access, int kBytes>
struct global_store {
  global_store(const Access& from, void* to, bool wanted) { emulator::store<kBytes>(to, &from, wanted); }
};

}  // namespace arch
}  // namespace cutlass

#include <cutlass/arch/memory_sm75.h>
#include <cutlass/arch/memory_sm80.h>
