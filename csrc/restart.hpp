// The state that a sequence restarts from at a reset.
#pragma once

#include "simd.hpp"

namespace bptt::BPTT_VARIANT {

// Of row (step, lane) of a [T, B, ...] tensor, from `states` [B, size] of each step; zeros where there are none.
template <class T>
BPTT_INLINE const T *restart(const T *states, long distance, long row, long B, long size, const T *zeros) {
    return states ? states + row / B * distance + row % B * size : zeros;
}

} // namespace bptt::BPTT_VARIANT
