// Small matrices of each row: products of vectors with them, sums of lanes, and linear systems.
#pragma once

#include "program.hpp"
#include "simd.hpp"

namespace bptt::BPTT_VARIANT {

// to[j] = the sum over k of x[k * sx] * rows[k * s + j], for V registers; of one alone, `last` values count.
template <class T, int V>
BPTT_INLINE void combine_vectors(T *to, const T *x, long sx, const T *rows, long s, long K, int last) {
    constexpr int L = lanes<T>;
    Vec<T> sum[V] = {};
    for (long k = 0; k < K; ++k) {
        const Vec<T> factor = broadcast(x[k * sx]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sum[v] += factor * (V > 1 ? load(rows + k * s + v * L) : load(rows + k * s, last));
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
        if (V > 1)
            store(to + v * L, sum[v]);
        else
            store(to, sum[v], last);
}

// to[j] = the sum over k of x[k * sx] * rows[k * s + j].
template <class T> void combine(T *to, const T *x, long sx, const T *rows, long s, long K, long J) {
    constexpr int L = lanes<T>, V = 8;
    long j = 0;
    for (; j + V * L <= J; j += V * L) combine_vectors<T, V>(to + j, x, sx, rows + j, s, K, L);
    for (; j + 4 * L <= J; j += 4 * L) combine_vectors<T, 4>(to + j, x, sx, rows + j, s, K, L);
    for (; j + 2 * L <= J; j += 2 * L) combine_vectors<T, 2>(to + j, x, sx, rows + j, s, K, L);
    for (; j < J; j += L) combine_vectors<T, 1>(to + j, x, sx, rows + j, s, K, (int)(J - j < L ? J - j : L));
}

// Registers whose lanes are added up, as many of them at once as one holds lanes.
template <class T> struct LanesOfSums {
    static constexpr int L = lanes<T>;
    Vec<T> sums[L];
    T *to[L];
    int count = 0;

    BPTT_INLINE void add(Vec<T> sum, T *where) {
        sums[count] = sum, to[count] = where;
        if (++count == L) write();
    }

    BPTT_INLINE void finish() {
        if (!count) return;
        for (int i = count; i < L; ++i) sums[i] = Vec<T>{};
        write();
    }

    void write() {
        const Vec<T> all = sums_of<T>(sums);
        T each[L];
        store(each, all);
        for (int i = 0; i < count; ++i) *to[i] = each[i];
        count = 0;
    }
};

// A matrix as a product of triangular ones, of which the lower has ones in its diagonal; row i is row from[i].
template <class T> void factor(T (*lu)[most_unknowns], int *from, int n) {
    for (int i = 0; i < n; ++i) from[i] = i;
    for (int k = 0; k < n; ++k) {
        int best = k;
        for (int i = k + 1; i < n; ++i)
            if ((lu[i][k] < 0 ? -lu[i][k] : lu[i][k]) > (lu[best][k] < 0 ? -lu[best][k] : lu[best][k])) best = i;
        for (int j = 0; best != k && j < n; ++j) {
            const T kept = lu[k][j];
            lu[k][j] = lu[best][j], lu[best][j] = kept;
        }
        const int kept = from[k];
        from[k] = from[best], from[best] = kept;
        for (int i = k + 1; i < n; ++i) {
            const T share = lu[i][k] /= lu[k][k];
            for (int j = k + 1; j < n; ++j) lu[i][j] -= share * lu[k][j];
        }
    }
}

// The linear systems of one row, see Op::solve, by elimination with the largest pivots; a singular matrix gives what is
// not finite.
template <class T> void solve_systems(const Instruction &in, T *out, const T *matrices, const T *sides) {
    constexpr int L = lanes<T>;
    const auto &so = in.x[0].strides, &sa = in.x[1].strides, &sb = in.x[2].strides;
    const int n = (int)in.n[1];
    T lu[most_unknowns][most_unknowns];
    int from[most_unknowns];
    for (long k = 0; k < in.n[0]; ++k) {
        for (int i = 0; i < n; ++i)
            for (int j = 0; j < n; ++j) lu[i][j] = matrices[k * sa[0] + i * sa[1] + j * sa[2]];
        factor<T>(lu, from, n);
        const T *right = sides + k * sb[0];
        T *to = out + k * so[0];
        for (long j = 0; j < in.n[2]; j += L) {
            const int count = (int)(in.n[2] - j < L ? in.n[2] - j : L);
            Vec<T> x[most_unknowns];
            for (int i = 0; i < n; ++i) {
                const T *row = right + from[i] * sb[1] + j * sb[2];
                if (sb[2] == 1)
                    x[i] = load(row, count);
                else {
                    T values[L] = {};
                    for (int l = 0; l < count; ++l) values[l] = row[l * sb[2]];
                    x[i] = load(values);
                }
                for (int l = 0; l < i; ++l) x[i] -= lu[i][l] * x[l];
            }
            for (int i = n - 1; i >= 0; --i) {
                for (int l = i + 1; l < n; ++l) x[i] -= lu[i][l] * x[l];
                x[i] = x[i] / lu[i][i];
                store(to + i * so[1] + j, x[i], count);
            }
        }
    }
}

template <class T> struct WideOf {
    typedef double Type __attribute__((vector_size(sizeof(double) * lanes<T>), aligned(sizeof(double)), may_alias));
};

// A vector's values as doubles.
template <class T> using Wide = typename WideOf<T>::Type;

// to[m * down + j] += the sum over rows r of p[r * p_row + m * along] q[r * q_row + j], for M values m and V vectors
// of j, of the last of which only `last` values count. Where `sets`, `to` are values of T, and are set.
template <class T, int M, int V, bool sets>
void outer_of(void *to, long down, const T *p, long p_row, long along, const T *q, long q_row, long rows, int last) {
    constexpr int L = lanes<T>;
    Vec<T> sum[M][V] = {};
    for (long r = 0; r < rows; ++r, p += p_row, q += q_row) {
        Vec<T> w[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) w[v] = v + 1 < V ? load(q + v * L) : load(q + v * L, last);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const Vec<T> x = broadcast(p[m * along]);
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) sum[m][v] += x * w[v];
        }
    }
    // Not a loop: of sums that are numbered while it runs, each would be kept in memory all the way.
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
            if constexpr (sets) {
                store(static_cast<T *>(to) + m * down + v * L, sum[m][v], v + 1 < V ? L : last);
            } else {
                double *out = static_cast<double *>(to) + m * down + v * L;
                const Wide<T> wide = __builtin_convertvector(sum[m][v], Wide<T>);
                if (v + 1 < V || last == L)
                    *reinterpret_cast<Wide<T> *>(out) += wide;
                else
                    for (int l = 0; l < last; ++l) out[l] += wide[l];
            }
        }
}

} // namespace bptt::BPTT_VARIANT
