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

// How weights [K, units] are packed: panels of V vectors of units, each K rows.
template <class T> struct Packing {
    static constexpr int L = lanes<T>;
    int V, together; // rows at once
    long vectors, panels;

    Packing(long units, long rows) {
        V = rows < 4 ? 8 : accumulators / 6;
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
