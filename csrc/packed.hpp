// Products of rows with packed weights, for the interpreter: panels of vectors of units, rows from anywhere to
// anywhere.
#pragma once

#include "product.hpp"

namespace bptt::BPTT_VARIANT {

template <class T>
using Multiply = void (*)(const T *const *rows, long K, const T *panel, const T *const *start, T *const *out, int last);

// out[m] = start[m] + the sum over k of rows[m][k] * panel[k], for M rows and NV vectors, of the last of which only
// `last` values count. start null: 0.
template <class T, int NV, int M>
void multiply(const T *const *rows, long K, const T *panel, const T *const *start, T *const *out, int last) {
    constexpr int L = lanes<T>;
    const auto begin = [&](int m, int v) __attribute__((always_inline)) {
        if (!start) return Vec<T>{};
        return v + 1 < NV ? load(start[m] + v * L) : load(start[m] + v * L, last);
    };
    product_tile<T, NV, M>(rows, K, panel, begin, [&](int m, int v, Vec<T> sum) __attribute__((always_inline)) {
        if (v + 1 < NV)
            store(out[m] + v * L, sum);
        else
            store(out[m] + v * L, sum, last);
    });
}

template <class T, int NV, int M> constexpr Multiply<T> multiply_if_it_fits() {
    if constexpr (NV * M <= accumulators)
        return multiply<T, NV, M>;
    else
        return nullptr;
}

template <class T, int NV>
constexpr Multiply<T> multiply_of[most_rows] = {
    multiply_if_it_fits<T, NV, 1>(), multiply_if_it_fits<T, NV, 2>(), multiply_if_it_fits<T, NV, 3>(),
    multiply_if_it_fits<T, NV, 4>(), multiply_if_it_fits<T, NV, 5>(), multiply_if_it_fits<T, NV, 6>(),
};

template <class T>
constexpr const Multiply<T> *multiplies[9] = {nullptr,           multiply_of<T, 1>, multiply_of<T, 2>,
                                              multiply_of<T, 3>, multiply_of<T, 4>, multiply_of<T, 5>,
                                              multiply_of<T, 6>, multiply_of<T, 7>, multiply_of<T, 8>};

// Into how many sums, added up last, each of a product with NV vectors is divided where few rows are multiplied: one
// alone would wait for itself at every step of K. The same for all numbers of rows, and so is the order of a sum.
constexpr int parts_of[5] = {1, 8, 4, 2, 2};

// `multiply` in such parts.
template <class T, int NV, int M>
void multiply_in_parts(const T *const *rows, long K, const T *panel, const T *const *start, T *const *out, int last) {
    constexpr int L = lanes<T>, S = parts_of[NV];
    Vec<T> sum[S][M][NV] = {};
    const T *row[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) row[m] = rows[m];
    const auto add = [&](long k, int s) __attribute__((always_inline)) {
        Vec<T> w[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) w[v] = load(panel + (k * NV + v) * L);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const Vec<T> x = broadcast(row[m][k]);
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) sum[s][m][v] += x * w[v];
        }
    };
    long k = 0;
    for (; k + S <= K; k += S)
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s) add(k + s, s);
#pragma GCC unroll 8
    for (int s = 0; s < S - 1; ++s)
        if (k + s < K) add(k + s, s);
    const auto halve = [&]<int half>() __attribute__((always_inline)) {
        if constexpr (half < S)
#pragma GCC unroll 4
            for (int s = 0; s < half; ++s)
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
                    for (int v = 0; v < NV; ++v) sum[s][m][v] += sum[s + half][m][v];
    };
    halve.template operator()<4>(), halve.template operator()<2>(), halve.template operator()<1>();
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) {
            const int count = v + 1 < NV ? L : last;
            store(out[m] + v * L, start ? load(start[m] + v * L, count) + sum[0][m][v] : sum[0][m][v], count);
        }
}

template <class T, int NV, int M> constexpr Multiply<T> multiply_in_parts_if_it_fits() {
    if constexpr (NV * M * parts_of[NV] <= accumulators)
        return multiply_in_parts<T, NV, M>;
    else
        return nullptr;
}

// By the vectors of a panel and the rows.
template <class T, int NV>
constexpr Multiply<T> multiply_in_parts_of[3] = {multiply_in_parts_if_it_fits<T, NV, 1>(),
                                                 multiply_in_parts_if_it_fits<T, NV, 2>(),
                                                 multiply_in_parts_if_it_fits<T, NV, 3>()};

template <class T>
constexpr const Multiply<T> *multiplies_in_parts[5] = {nullptr, multiply_in_parts_of<T, 1>, multiply_in_parts_of<T, 2>,
                                                       multiply_in_parts_of<T, 3>, multiply_in_parts_of<T, 4>};

// How weights [K, units] are packed: panels of V vectors of units, each K rows.
template <class T> struct Packing {
    static constexpr int L = lanes<T>;
    bool few;        // rows
    int V, together; // rows at once
    long vectors, panels;

    Packing(long units, long rows) : few(rows < 4) {
        V = few ? 8 : accumulators / 6;
        together = accumulators / V < most_rows ? accumulators / V : most_rows;
        vectors = (units + L - 1) / L;
        panels = (vectors + V - 1) / V;
    }

    static long values(long K, long units) { return (units + L - 1) / L * L * K; }
    int vectors_of(long p) const { return (int)(vectors - p * V < V ? vectors - p * V : V); }
};

// w[k * down + unit * across].
template <class T> void pack_weights(const T *w, long down, long across, long K, long units, long rows, T *out) {
    constexpr int L = lanes<T>;
    const Packing<T> packing(units, rows);
    for (long p = 0; p < packing.panels; ++p) {
        const long width = (long)packing.vectors_of(p) * L, first = p * packing.V * L;
        if (across == 1) {
            for (long k = 0; k < K; ++k)
                for (long i = 0; i < width; i += L) {
                    const long unit = first + i;
                    store(out + k * width + i, load(w + k * down + unit, (int)(units - unit < L ? units - unit : L)));
                }
        } else {
            for (long i = 0; i < width; i += L) {
                long k = 0;
                if (down == 1 && first + i + L <= units)
                    for (; k + L <= K; k += L) {
                        Vec<T> v[L];
#pragma GCC unroll 16
                        for (int r = 0; r < L; ++r) v[r] = load(w + (first + i + r) * across + k);
                        transpose<T>(v);
#pragma GCC unroll 16
                        for (int r = 0; r < L; ++r) store(out + (k + r) * width + i, v[r]);
                    }
                for (; k < K; ++k)
                    for (long r = i; r < i + L; ++r)
                        out[k * width + r] = first + r < units ? w[k * down + (first + r) * across] : T(0);
            }
        }
        out += K * width;
    }
}

} // namespace bptt::BPTT_VARIANT
