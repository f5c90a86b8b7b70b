// Rows of fewer values than a register holds, one after the other, taken as many at a time as fill one.
#pragma once

#include "operations.hpp"
#include "program.hpp"

namespace bptt::BPTT_VARIANT {

constexpr long spread_most = 256; // values that are spread out at a time

// Whether whole rows of n values fill a register, more than one of them.
template <class T> BPTT_INLINE bool fill_registers(long n) { return n > 1 && n < lanes<T> && lanes<T> % n == 0; }

// One value for each of `count` rows of N, one after the other, is repeated along its row.
template <class T, int N> BPTT_INLINE void repeat_values(T *to, const T *from, long count) {
    constexpr long in_one = lanes<T> / N;
    for (long k = 0; k < count; k += in_one)
        store(to + k * N, shuffled<T>(load(from + k, (int)(count - k < in_one ? count - k : in_one)),
                                      [](int i) __attribute__((always_inline)) { return i / N; }));
}

// One row of N values is repeated `count` times.
template <class T, int N> BPTT_INLINE void repeat_row(T *to, const T *from, long count) {
    constexpr long in_one = lanes<T> / N;
    const Vec<T> rows = shuffled<T>(load(from, N), [](int i) __attribute__((always_inline)) { return i % N; });
    for (long k = 0; k < count; k += in_one) store(to + k * N, rows);
}

// `count` rows of n values, whose beginnings lie s apart, are written one after the other; `same`: of each the first
// value is all of its row. Up to a register too many is written.
template <class T> void spread_rows(T *to, const T *from, long s, bool same, long count, long n) {
    constexpr int L = lanes<T>;
    const bool values = same && s == 1, row = !same && s == 0;
    if ((values || row) && fill_registers<T>(n)) {
        const auto repeat = [&]<int N>() {
            if constexpr (N < L) values ? repeat_values<T, N>(to, from, count) : repeat_row<T, N>(to, from, count);
        };
        if (n == 2) return repeat.template operator()<2>();
        if (n == 4) return repeat.template operator()<4>();
        if (n == 8) return repeat.template operator()<8>();
    }
    // A register too long for a row is overwritten by the next row.
    for (long k = 0; k < count; ++k)
        for (long l = 0; l < n; l += L)
            store(to + k * n + l, same ? broadcast(from[k * s]) : load(from + k * s + l, (int)(n - l < L ? n - l : L)));
}

// n[2] rows of so few values each that they are computed as one: what does not lie so is spread out first.
template <class T> void narrow_rows(const Instruction &in, const Each<T> *all, T *to, const T *const *from) {
    constexpr int L = lanes<T>;
    alignas(BPTT_BYTES) T spread[3][spread_most + L];
    const long n = in.n[3], most = spread_most / n;
    for (long i = 0; i < in.n[2]; i += most) {
        const long count = in.n[2] - i < most ? in.n[2] - i : most;
        const T *p[3];
        long modes = 0;
        for (int j = 0; j < 3; ++j) {
            const Operand &x = in.x[j + 1];
            const long s = x.strides[2];
            const bool same = in.modes & (1 << j);
            p[j] = from[j] + i * s;
            if (x.place < 0 || (!same && s == n)) continue;
            if (same && s == 0) {
                modes |= 1 << j;
                continue;
            }
            if (i == 0 || same || s != 0) spread_rows<T>(spread[j], p[j], s, same, count, n);
            p[j] = spread[j];
        }
        all[modes](1, count * n, to + i * n, 0, p[0], 0, p[1], 0, p[2], 0);
    }
}

// to[k] = the sum of row k of `count` rows of N values one after the other, or their mean.
template <class T, int N> void sums_of_rows_of(T *to, const T *from, long count, bool mean) {
    constexpr int L = lanes<T>;
    for (long k = 0; k < count; k += L) {
        const long left = (count - k) * N;
        Vec<T> v[N];
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) {
            const long rest = left - i * L;
            v[i] = rest > 0 ? load(from + k * N + i * L, (int)(rest < L ? rest : L)) : Vec<T>{};
            if (mean) v[i] = v[i] / T(N);
        }
        store(to + k, sums_of_groups<T, N>(v), (int)(count - k < L ? count - k : L));
    }
}

// The same for n values, which fill registers.
template <class T> void sums_of_narrow_rows(T *to, const T *from, long count, long n, bool mean) {
    constexpr int L = lanes<T>;
    if constexpr (L > 2)
        if (n == 2) return sums_of_rows_of<T, 2>(to, from, count, mean);
    if constexpr (L > 4)
        if (n == 4) return sums_of_rows_of<T, 4>(to, from, count, mean);
    if constexpr (L > 8)
        if (n == 8) return sums_of_rows_of<T, 8>(to, from, count, mean);
}

} // namespace bptt::BPTT_VARIANT
