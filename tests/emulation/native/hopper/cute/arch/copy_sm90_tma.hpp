// Loads of the copy engine: noted in hopper::copies.
#pragma once

#define SM90_TMA_LOAD Device_SM90_TMA_LOAD
#define SM90_TMA_LOAD_IM2COL Device_SM90_TMA_LOAD_IM2COL
#define SM90_TMA_LOAD_MULTICAST Device_SM90_TMA_LOAD_MULTICAST
#include_next <cute/arch/copy_sm90_tma.hpp>
#undef SM90_TMA_LOAD
#undef SM90_TMA_LOAD_IM2COL
#undef SM90_TMA_LOAD_MULTICAST

namespace hopper {

template <int kOffsets, class... Numbers>
void note(const void* descriptor, const uint64_t* barrier, uint16_t multicast, const void* shared,
          const Numbers&... numbers) {
  Copy copy{index_of(descriptor), offset_of(shared), offset_of(barrier), {}, {}, multicast};
  const int64_t given[] = {static_cast<int64_t>(numbers)...};
  constexpr int kCoordinates = static_cast<int>(sizeof...(Numbers)) - kOffsets;
  for (int i = 0; i < kCoordinates; ++i) copy.coordinates[i] = given[i];
  for (int i = 0; i < kOffsets; ++i) copy.offsets[i] = given[kCoordinates + i];
  copies.push_back(copy);
}

}  // namespace hopper

namespace cute {

struct SM90_TMA_LOAD {
  using PREFETCH = Device_SM90_TMA_LOAD::PREFETCH;
  template <class... Coordinates>
  static void copy(const void* descriptor, uint64_t* barrier, uint64_t, void* shared, const Coordinates&... c) {
    hopper::note<0>(descriptor, barrier, 0, shared, c...);
  }
};

struct SM90_TMA_LOAD_MULTICAST {
  using PREFETCH = Device_SM90_TMA_LOAD::PREFETCH;
  template <class... Coordinates>
  static void copy(const void* descriptor, uint64_t* barrier, uint16_t mask, uint64_t, void* shared,
                   const Coordinates&... c) {
    hopper::note<0>(descriptor, barrier, mask, shared, c...);
  }
};

struct SM90_TMA_LOAD_IM2COL {
  using PREFETCH = Device_SM90_TMA_LOAD_IM2COL::PREFETCH;
  template <class... Numbers>  // coordinates, of channels, pixels and images; offsets, of pixels
  static void copy(const void* descriptor, uint64_t* barrier, void* shared, const Numbers&... numbers) {
    hopper::note<(static_cast<int>(sizeof...(Numbers)) - 2) / 2>(descriptor, barrier, 0, shared, numbers...);
  }
};

}  // namespace cute
