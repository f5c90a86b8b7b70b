// A row of dL/da, as stage 3 writes it.
#pragma once

#include "bfloat16.hpp"

namespace bptt::BPTT_VARIANT {

// Where a row of da goes: to where the next step's product takes it from, to the sums where several columns add up, and
// to what is asked for where that is another place. The latter two may be null.
template <class S> struct ErrorRow {
    using T = RealOf<S>;
    T *to, *sum;
    S *asked;

    BPTT_INLINE void put(long u, Vec<T> x, int count) const {
        store(to + u, x, count);
        if (sum) store(sum + u, load(sum + u, count) + x, count);
        if constexpr (keeps_near<S>)
            if (asked) store(asked + u, x, count);
    }
};

} // namespace bptt::BPTT_VARIANT
