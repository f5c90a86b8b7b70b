// What is left of values along a dimension: the largest or smallest of them.
#pragma once

#include "operations.hpp"
#include "program.hpp"

namespace bptt::BPTT_VARIANT {

template <class T> BPTT_INLINE T worse(Op op, T a, T b) { return (op == Op::most ? a > b : a < b) || a != a ? a : b; }

// The largest or smallest of n values one after the other; NaN if one is.
template <class T> T extreme(Op op, const T *x, long n) {
    constexpr int L = lanes<T>;
    T found = x[0];
    long i = 1;
    if (n >= L) {
        Vec<T> all = load(x);
        for (i = L; i + L <= n; i += L)
            all = op == Op::most ? Maximum::of<T>(all, load(x + i)) : Minimum::of<T>(all, load(x + i));
        T each[L];
        store(each, all);
        found = each[0];
        for (int l = 1; l < L; ++l) found = worse(op, found, each[l]);
    }
    for (; i < n; ++i) found = worse(op, found, x[i]);
    return found;
}

} // namespace bptt::BPTT_VARIANT
