// cp.async.
#pragma once

#include <cutlass/arch/cache_operation.h>
#include <cutlass/arch/memory.h>
#include <cutlass/cutlass.h>

namespace cutlass {
namespace arch {

template <int kBytes, CacheOperation::Kind = CacheOperation::Always>
struct cp_async {
  cp_async(void* to, const void* from, bool wanted = true) {
    if (wanted) emulator::copy_async({to, from, kBytes, false});
  }
};
template <int kBytes, CacheOperation::Kind = CacheOperation::Always>
struct cp_async_zfill {
  cp_async_zfill(void* to, const void* from, bool wanted = true) {
    emulator::copy_async({to, from, kBytes, !wanted});
  }
};
template <int kBytes, CacheOperation::Kind = CacheOperation::Always>
struct cp_async_nan;

inline void cp_async_fence() { emulator::commit_group(); }
template <int kGroups>
void cp_async_wait() {  // 0 also waits for what is not committed
  emulator::wait_group(kGroups == 0 ? 0 : kGroups + 1);
}

}  // namespace arch
}  // namespace cutlass
