// The recurrent product, tile by tile: rows of the state times a panel of the weights.
//
// A panel is the weights of V vectors of units, for all G gates of these units. Packed, it holds K rows of G * V
// vectors, read from front to back. A tile is a panel times up to `rows_at_once` rows; its sums stay in registers until
// the end. Where there are few rows in all steps together, packing would take longer than the products, and the weights
// are read as they lie: rows of K weights of one unit, by `dots`, or rows of one input's weights, by `combination`.
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

// M rows times a panel of NV vectors: the sums over k of rows[m][k] * panel[k], whose registers begin as start(m, v)
// says and end in end(m, v, sum). The order of a sum is the same whatever M and NV are.
template <class T, int NV, int M, class Start, class End>
BPTT_INLINE void product_tile(const T *const *rows, long K, const T *panel, Start start, End end) {
    constexpr int L = lanes<T>;
    Vec<T> sum[M][NV];
    const T *row[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        row[m] = rows[m];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) sum[m][v] = start(m, v);
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
        for (int v = 0; v < NV; ++v) end(m, v, sum[m][v]);
}

// out[m][v] = init[v] + sum over k of rows[m][k] * panel[k][v], for M rows and NV vectors.
template <class T, int NV, int M> void product(const T *const *rows, long K, const T *panel, const T *init, T *out) {
    constexpr int L = lanes<T>;
    product_tile<T, NV, M>(
        rows, K, panel, [&](int, int v) __attribute__((always_inline)) { return load(init + v * L); },
        [&](int m, int v, Vec<T> sum) __attribute__((always_inline)) { store(out + (m * NV + v) * L, sum); });
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

// out[m][v] vectors of units: init[v] + the sums over k of rows[m][k] * w[unit][k], for M rows and `units` units, of
// which v holds `lanes`. A sum of products of whole vectors comes first, then that vector's lanes are added up.
template <class T, int M>
void dots(const T *const *rows, long K, const T *w, long units, const T *init, T *out, long out_row) {
    constexpr int L = lanes<T>, most = M == 1 ? 8 : 4, R = L < most ? L : most; // units at once
    Vec<T> sums[M][L];
    for (int i = 0; i < L; i += R) {
        const T *of[R], *row[M];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) of[r] = w + (i + r < units ? i + r : units - 1) * K;
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) row[m] = rows[m];
        Vec<T> sum[M][R] = {};
        const auto add = [&](auto read) __attribute__((always_inline)) {
            Vec<T> x[M];
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) x[m] = read(row[m]);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const Vec<T> weights = read(of[r]);
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) sum[m][r] += x[m] * weights;
            }
        };
        long k = 0;
        for (; k + L <= K; k += L) add([&](const T *p) __attribute__((always_inline)) { return load(p + k); });
        if (k < K) {
            const int count = (int)(K - k);
            add([&](const T *p) __attribute__((always_inline)) { return load(p + k, count); });
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sums[m][i + r] = sum[m][r];
    }
    for (int m = 0; m < M; ++m) store(out + m * out_row, load(init) + sums_of<T>(sums[m]));
}

// out[m] += the sum over r of rows[m][r] * w[r], for M rows and R rows w of `units` values.
template <class T, int M, int R>
BPTT_INLINE void combine(const T *const *rows, long k, const T *const *w, long units, T *out, long out_row) {
    constexpr int L = lanes<T>;
    Vec<T> x[M][R];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) x[m][r] = broadcast(rows[m][k + r]);
    const auto one = [&](long u, auto read) __attribute__((always_inline)) {
        Vec<T> sum[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) sum[m] = load(out + m * out_row + u);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const Vec<T> weights = read(w[r] + u);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) sum[m] += x[m][r] * weights;
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) store(out + m * out_row + u, sum[m]);
    };
    long u = 0;
    for (; u + L <= units; u += L) one(u, [](const T *p) __attribute__((always_inline)) { return load(p); });
    const int rest = (int)(units - u);
    if (rest) one(u, [&](const T *p) __attribute__((always_inline)) { return load(p, rest); });
}

// out[m] = the sum over k of rows[m][k] * row(k), for M rows of `units` values.
template <class T, int M, class Row>
void combination(const T *const *rows, long K, Row row, long units, T *out, long out_row) {
    constexpr int R = M == 1 ? 8 : 4;
    for (int m = 0; m < M; ++m)
        for (long u = 0; u < units; u += lanes<T>) store(out + m * out_row + u, Vec<T>{});
    const T *w[R];
    long k = 0;
    for (; k + R <= K; k += R) {
        for (int r = 0; r < R; ++r) w[r] = row(k + r);
        combine<T, M, R>(rows, k, w, units, out, out_row);
    }
    for (; k < K; ++k) {
        w[0] = row(k);
        combine<T, M, 1>(rows, k, w, units, out, out_row);
    }
}

// Weights where they lie, of a product too small for them to be packed. w null: they are packed.
template <class T> struct Lying {
    const T *w = nullptr;
    bool across = false; // [K, units]: a row of w is of one input; else [G units, K]: of one unit
    long turn = 0;       // across: the row of input k is k + turn, round the end
};

// Rows to be multiplied by the same weights, in all steps together, up to which packing takes longer than it saves:
// more for a matrix of so many values that it comes from far away for every step.
constexpr long few_rows = 16, few_rows_of_many = 64, many_values = 1L << 19;

// The weights as they lie where so few rows are to be multiplied by them that they need not be packed.
template <class T> Lying<T> lying(const T *w, long values, long rows, bool across = false, long turn = 0) {
    return rows <= (values < many_values ? few_rows : few_rows_of_many) ? Lying<T>{w, across, turn} : Lying<T>{};
}

// Weights packed for `G` gates of `units` outputs each from K inputs.
template <class T> struct Panels {
    static constexpr int L = lanes<T>;
    int G, V, rows_at_once;
    long units, K, vectors, count;
    Lying<T> lying;
    T *data = nullptr, *init = nullptr;

    static constexpr int lying_rows = 3, lying_vectors = 32; // of a tile at most, where weights are not packed

    // Many rows: as wide as 6 rows (RNN) or 4 rows (GRU) of sums fit. Few rows: wider, so that enough sums are on their
    // way to hide how long each takes.
    Panels(int gates, long outputs, long inputs, long rows, const Lying<T> &lying = {})
        : G(gates), units(outputs), K(inputs), lying(lying) {
        const bool few = rows < 4;
        V = lying.w  ? (lying.across ? lying_vectors : 1)
            : G == 1 ? (few ? 8 : accumulators / 6)
            : G == 3 ? (few ? 2 : accumulators / 12)
            : few    ? 2
                     : 1;
        rows_at_once = lying.w ? lying_rows : accumulators / (G * V);
        if (rows_at_once > most_rows) rows_at_once = most_rows;
        vectors = (units + L - 1) / L;
        count = (vectors + V - 1) / V;
    }

    long panel_values() const { return lying.w ? 0 : (long)G * V * L * K; }
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
        if (lying.w) return;
        constexpr long block = 16; // steps of K at a time, so that what is written stays near
        for (long k0 = 0; k0 < K; k0 += block) {
            const long k1 = k0 + block < K ? k0 + block : K;
            for (int g = 0; g < G; ++g)
                for (int i = 0; i < v_count * L; ++i) {
                    if (i % L == 0 && k1 - k0 == block && p * V * L + i + L <= units) {
                        const T *from = w + (g * units + p * V * L + i) * K;
                        for (long k = k0; k < k1; k += L) {
                            Vec<T> rows[L];
#pragma GCC unroll 16
                            for (int r = 0; r < L; ++r) rows[r] = load(from + r * K + k);
                            transpose<T>(rows);
#pragma GCC unroll 16
                            for (int r = 0; r < L; ++r) store(out + (k + r) * width + g * v_count * L + i, rows[r]);
                        }
                        i += L - 1;
                        continue;
                    }
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
        if (lying.w) return;
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

// A tile of M rows with panel p of weights that are not packed.
template <class T, int M> void lying_product(const Panels<T> &w, const T *const *rows, long p, T *sums) {
    const Lying<T> &lying = w.lying;
    const long unit = p * w.V * lanes<T>, width = w.vectors_of(p) * lanes<T>;
    if (!lying.across) {
        for (int g = 0; g < w.G; ++g)
            dots<T, M>(rows, w.K, lying.w + (g * w.units + unit) * w.K, w.units - unit, w.start(p) + g * width,
                       sums + g * width, w.G * width);
    } else {
        const auto row = [&](long k) {
            const long turned = k + lying.turn;
            return lying.w + (turned < w.K ? turned : turned - w.K) * w.units + unit;
        };
        combination<T, M>(rows, w.K, row, w.units - unit < width ? w.units - unit : width, sums, width);
    }
}

// The product of rows n0 to n1 with panels p0 to p1; what is done with a tile, op(n, m, unit, v, sums) says: rows n to
// n + m, v vectors of units from `unit` on, sums [m][G][v] vectors. No rows: the sums are zero.
template <class T, class Op>
BPTT_INLINE void pass(const Panels<T> &w, const T *const *rows, long n0, long n1, long p0, long p1, const Op &op) {
    constexpr int lying = Panels<T>::lying_rows * Panels<T>::lying_vectors;
    alignas(BPTT_BYTES) T sums[(lying > accumulators ? lying : accumulators) * lanes<T>];
    if (!rows)
        for (T &sum : sums) sum = T(0);
    for (long p = p0; p < p1; ++p) {
        const int v_count = w.vectors_of(p);
        for (long n = n0; n < n1;) {
            const long tiles = (n1 - n + w.rows_at_once - 1) / w.rows_at_once;
            const int m = (int)((n1 - n + tiles - 1) / tiles);
            if (rows && w.lying.w)
                (m == 1   ? lying_product<T, 1>
                 : m == 2 ? lying_product<T, 2>
                          : lying_product<T, 3>)(w, rows + n, p, sums);
            else if (rows)
                products<T>[w.G * v_count][m - 1](rows + n, w.K, w.panel(p), w.start(p), sums);
            op(n, m, p * w.V * lanes<T>, v_count, sums);
            n += m;
        }
    }
}

} // namespace bptt::BPTT_VARIANT
