// Conversions; for TF32, of which CUTLASS rounds halves to even on newer chips and on the host, as for sm_80.
#pragma once

#include_next <cutlass/numeric_conversion.h>

namespace cutlass {

template <>
struct PreferredRoundingMode<tfloat32_t, float> {
  static constexpr FloatRoundStyle kRound = FloatRoundStyle::round_half_ulp_truncate;
};

}  // namespace cutlass
