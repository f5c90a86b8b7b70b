// Elements that are taken, or written to, by an index: whole numbers of 0 on, held as real ones. Values along a
// dimension, one after the other.
#pragma once

#include "program.hpp"
#include "simd.hpp"

namespace bptt::BPTT_VARIANT {

// The place of an element along the dimension that is indexed, of `size` elements; the first one's for an index beyond
// it, which whoever runs the program finds (kernels/whole_numbers.py), so that no pointer may lead beyond a place.
template <class T> BPTT_INLINE long indexed(T index, long size) {
    return index >= T(0) && index < T(size) ? (long)index : 0;
}

// For every index of the instruction's first three dimensions f(distances of the operands).
template <class F> BPTT_INLINE void each_line(const Instruction &in, F f) {
    for (long i0 = 0; i0 < in.n[0]; ++i0)
        for (long i1 = 0; i1 < in.n[1]; ++i1)
            for (long i2 = 0; i2 < in.n[2]; ++i2) {
                long d[3];
                for (int x = 0; x < 3; ++x)
                    d[x] = i0 * in.x[x].strides[0] + i1 * in.x[x].strides[1] + i2 * in.x[x].strides[2];
                f(d);
            }
}

// out[.., i, ..] = x[.., index[.., i, ..], ..]; in.modes: the size of the indexed dimension and its stride, see `Op`.
template <class T> void gather_row(const Instruction &in, T *out, const T *x, const T *index) {
    const long size = in.modes >> 32, along = in.modes & 0xffffffff, n = in.n[3];
    const long to = in.x[0].strides[3], from = in.x[1].strides[3], by = in.x[2].strides[3];
    each_line(in, [&](const long *d) __attribute__((always_inline)) {
        T *p = out + d[0];
        const T *q = x + d[1], *k = index + d[2];
        if (by == 0) {
            q += indexed(*k, size) * along;
            for (long i = 0; i < n; ++i) p[i * to] = q[i * from];
        } else {
            for (long i = 0; i < n; ++i) p[i * to] = q[i * from + indexed(k[i * by], size) * along];
        }
    });
}

// out[.., index[.., i, ..], ..] = x[.., i, ..], or added to.
template <class T> void scatter_row(const Instruction &in, T *out, const T *x, const T *index) {
    const long size = in.modes >> 32, along = in.modes & 0xffffffff, n = in.n[3];
    const long to = in.x[0].strides[3], from = in.x[1].strides[3], by = in.x[2].strides[3];
    const bool adds = in.op == (long)Op::scatter_add;
    each_line(in, [&](const long *d) __attribute__((always_inline)) {
        const T *q = x + d[1], *k = index + d[2];
        for (long i = 0; i < n; ++i) {
            T &p = out[d[0] + i * to + indexed(k[i * by], size) * along];
            p = adds ? p + q[i * from] : q[i * from];
        }
    });
}

// The index of the largest or smallest of n[3] values, of the first of several; that of NaN if there is one.
template <class T> void extreme_index(const Instruction &in, T *out, const T *x) {
    const long along = in.x[1].strides[3];
    each_line(in, [&](const long *d) __attribute__((always_inline)) {
        const T *q = x + d[1];
        long found = 0;
        for (long i = 1; i < in.n[3]; ++i) {
            const T a = q[i * along], b = q[found * along];
            const bool better = in.op == (long)Op::argmax ? a > b : a < b;
            if (b == b && (better || a != a)) found = i;
        }
        out[d[0]] = T(found);
    });
}

// Sums or products of all values up to each of n[3], in double precision as torch has them, whatever T is.
template <class T> void cumulated_row(const Instruction &in, T *out, const T *x) {
    const long to = in.x[0].strides[3], from = in.x[1].strides[3];
    const bool sums = in.op == (long)Op::cumsum;
    each_line(in, [&](const long *d) __attribute__((always_inline)) {
        T *p = out + d[0];
        const T *q = x + d[1];
        double all = sums ? 0 : 1;
        for (long i = 0; i < in.n[3]; ++i) {
            all = sums ? all + q[i * from] : all * q[i * from];
            p[i * to] = T(all);
        }
    });
}

// The order of n[3] values: the index of the smallest first, or of the largest (in.modes); equal ones as they lie, and
// NaN above all. By insertion: for few of them.
template <class T> void order_row(const Instruction &in, T *out, const T *x) {
    const long to = in.x[0].strides[3], along = in.x[1].strides[3];
    const auto above = [](T a, T b) { return a > b || (a != a && b == b); };
    each_line(in, [&](const long *d) __attribute__((always_inline)) {
        T *p = out + d[0];
        const T *q = x + d[1];
        for (long i = 0; i < in.n[3]; ++i) {
            const T value = q[i * along];
            long j = i;
            for (; j > 0; --j) {
                const T before = p[(j - 1) * to], other = q[(long)before * along];
                if (!(in.modes ? above(value, other) : above(other, value))) break;
                p[j * to] = before;
            }
            p[j * to] = T(i);
        }
    });
}

} // namespace bptt::BPTT_VARIANT
