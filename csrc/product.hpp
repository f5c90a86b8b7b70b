// The recurrent product, tile by tile: rows of the state times a packed panel of the weights.
//
// A panel holds the weights of V vectors of units, for all G gates of these units, K rows of G * V vectors, read from
// front to back. A tile is a panel times up to `rows_at_once` rows; its sums stay in registers until the end.
#pragma once

#include "simd.hpp"

namespace bptt::BPTT_VARIANT {

// Sums a tile may have: most of the registers, the others hold a row of the panel and a value of the state.
#if BPTT_BYTES == 64 || defined(__aarch64__)
constexpr int accumulators = 24;
#else
constexpr int accumulators = 12;
#endif

constexpr int most_rows = 6;

// out[m][v] = init[v] + sum over k of rows[m][k] * panel[k][v], for M rows and NV vectors.
template <class T, int NV, int M> void product(const T *const *rows, long K, const T *panel, const T *init, T *out) {
    constexpr int L = lanes<T>;
    Vec<T> sum[M][NV];
    const T *row[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        row[m] = rows[m];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) sum[m][v] = load(init + v * L);
    }
    for (long k = 0; k < K; ++k, panel += NV * L) {
        Vec<T> w[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) w[v] = load(panel + v * L);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const Vec<T> x = broadcast(row[m][k]);
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) sum[m][v] += x * w[v];
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) store(out + (m * NV + v) * L, sum[m][v]);
}

template <class T> using Product = void (*)(const T *const *, long, const T *, const T *, T *);

template <class T, int NV, int M> constexpr Product<T> product_if_it_fits() {
    if constexpr (NV * M <= accumulators)
        return product<T, NV, M>;
    else
        return nullptr;
}

template <class T, int NV>
constexpr Product<T> products_of[most_rows] = {
    product_if_it_fits<T, NV, 1>(), product_if_it_fits<T, NV, 2>(), product_if_it_fits<T, NV, 3>(),
    product_if_it_fits<T, NV, 4>(), product_if_it_fits<T, NV, 5>(), product_if_it_fits<T, NV, 6>(),
};

// By the number of vectors in a row of the panel, G * V.
template <class T>
constexpr const Product<T> *products[9] = {nullptr,           products_of<T, 1>, products_of<T, 2>,
                                           products_of<T, 3>, products_of<T, 4>, products_of<T, 5>,
                                           products_of<T, 6>, products_of<T, 7>, products_of<T, 8>};

// Weights packed for `G` gates of `units` outputs each from K inputs.
template <class T> struct Panels {
    static constexpr int L = lanes<T>;
    int G, V, rows_at_once;
    long units, K, vectors, count;
    T *data = nullptr, *init = nullptr;

    // Many rows: as wide as 6 rows (RNN) or 4 rows (GRU) of sums fit. Few rows: wider, so that enough sums are on their
    // way to hide how long each takes.
    Panels(int gates, long outputs, long inputs, long rows) : G(gates), units(outputs), K(inputs) {
        const bool few = rows < 4;
        V = G == 1 ? (few ? 8 : accumulators / 6) : G == 3 ? (few ? 2 : accumulators / 12) : few ? 2 : 1;
        rows_at_once = accumulators / (G * V);
        if (rows_at_once > most_rows) rows_at_once = most_rows;
        vectors = (units + L - 1) / L;
        count = (vectors + V - 1) / V;
    }

    long panel_values() const { return (long)G * V * L * K; }
    long values() const { return count * (panel_values() + (long)G * V * L); }

    // Where the weights lie; returns what follows them.
    T *place(T *memory) {
        data = memory;
        init = data + count * panel_values();
        return init + count * G * V * L;
    }

    int vectors_of(long p) const { return (int)(vectors - p * V < V ? vectors - p * V : V); }
    const T *panel(long p) const { return data + p * panel_values(); }
    const T *start(long p) const { return init + p * G * V * L; }

    // Panel p from rows: w [G * units, K], one row per gate and unit; bias(g, unit) is where its sums start.
    template <class Bias> void pack_rows(long p, const T *w, Bias bias) {
        const int v_count = vectors_of(p), width = G * v_count * L;
        T *out = data + p * panel_values(), *first = init + p * G * V * L;
        for (int g = 0; g < G; ++g)
            for (int i = 0; i < v_count * L; ++i) {
                const long unit = p * V * L + i;
                const int column = g * v_count * L + i;
                first[column] = unit < units ? bias(g, unit) : T(0);
            }
        constexpr long block = 16; // steps of K at a time, so that what is written stays near
        for (long k0 = 0; k0 < K; k0 += block) {
            const long k1 = k0 + block < K ? k0 + block : K;
            for (int g = 0; g < G; ++g)
                for (int i = 0; i < v_count * L; ++i) {
                    const long unit = p * V * L + i;
                    T *to = out + g * v_count * L + i;
                    if (unit < units) {
                        const T *from = w + (g * units + unit) * K;
                        for (long k = k0; k < k1; ++k) to[k * width] = from[k];
                    } else {
                        for (long k = k0; k < k1; ++k) to[k * width] = T(0);
                    }
                }
        }
    }

    // Panel p from columns: row(k) is where row k of [K, units] lies. G is 1.
    template <class Row> void pack_columns(long p, Row row) {
        const int v_count = vectors_of(p);
        T *out = data + p * panel_values(), *first = init + p * V * L;
        for (int i = 0; i < v_count * L; ++i) first[i] = T(0);
        for (long k = 0; k < K; ++k) {
            const T *from = row(k);
            for (int v = 0; v < v_count; ++v, out += L) {
                const long unit = (p * V + v) * L;
                store(out, load(from + unit, (int)(units - unit < L ? units - unit : L)));
            }
        }
    }
};

// The product of rows n0 to n1 with panels p0 to p1; what is done with a tile, op(n, m, unit, v, sums) says: rows n to
// n + m, v vectors of units from `unit` on, sums [m][G][v] vectors. No rows: the sums are zero.
template <class T, class Op>
BPTT_INLINE void pass(const Panels<T> &w, const T *const *rows, long n0, long n1, long p0, long p1, const Op &op) {
    alignas(BPTT_BYTES) T sums[accumulators * lanes<T>];
    if (!rows)
        for (T &sum : sums) sum = T(0);
    for (long p = p0; p < p1; ++p) {
        const int v_count = w.vectors_of(p);
        for (long n = n0; n < n1;) {
            const long tiles = (n1 - n + w.rows_at_once - 1) / w.rows_at_once;
            const int m = (int)((n1 - n + tiles - 1) / tiles);
            if (rows) products<T>[w.G * v_count][m - 1](rows + n, w.K, w.panel(p), w.start(p), sums);
            op(n, m, p * w.V * lanes<T>, v_count, sums);
            n += m;
        }
    }
}

} // namespace bptt::BPTT_VARIANT
