// The products over all steps of a small layer, whose calls of a BLAS would take longer than the products themselves.
#pragma once

#include "bfloat16.hpp"
#include "product.hpp"
#include "restart.hpp"
#include "scratch.hpp"
#include "walks.hpp"

namespace bptt::BPTT_VARIANT {

BPTT_INLINE long least(long a, long b) { return a < b ? a : b; }

// Bytes of rows that a walk keeps coming back to: what stays in the second-level cache beside the weights.
constexpr long near_bytes = 256 * 1024;

// Rows of a result, where they lie: out + n * stride, or of row at[n].
template <class S> struct RowsOut {
    using T = RealOf<S>;
    S *out;
    long stride, units;
    const long *at = nullptr;

    BPTT_INLINE void operator()(long n, int rows, long unit, int vectors, const T *sums) const {
        for (int i = 0; i < rows; ++i) {
            S *to = out + (at ? at[n + i] : n + i) * stride;
            for (int v = 0; v < vectors; ++v, sums += lanes<T>) {
                const long u = unit + v * lanes<T>;
                store(to + u, load(sums), (int)(units - u < lanes<T> ? units - u : lanes<T>));
            }
        }
    }
};

// Rows of a product that are made Real at a time where they are stored as another type, so many that they stay near.
BPTT_INLINE long widened_rows(long count, long K) {
    const long rows = near_bytes / (K * (long)sizeof(float) + 1) / most_rows * most_rows;
    return least(count, rows < 8 * most_rows ? 8 * most_rows : rows);
}

// Memory of a product of [rows, K], stored as S, and [K, units], shared by all workers.
template <class S> struct SmallMemory {
    using T = RealOf<S>;
    Panels<T> w;
    const T **rows;
    T *near = nullptr; // this worker's, [widened_rows, K]
    long bytes;

    SmallMemory(long count, long units, long K, const Lying<T> &lying, void *memory, int id, int workers)
        : w(1, units, K, count, lying) {
        Scratch scratch(memory);
        w.place(scratch.take<T>(w.values()));
        rows = scratch.take<const T *>(count);
        for (int i = 0; keeps_near<S> && i < workers; ++i) {
            T *own = scratch.take<T>(widened_rows(count, K) * K);
            if (i == id) near = own;
        }
        bytes = scratch.bytes();
    }
};

template <class S> long small_bytes(long count, long units, long K, int workers, const Lying<RealOf<S>> &lying = {}) {
    return SmallMemory<S>(count, units, K, lying, nullptr, 0, workers).bytes;
}

// out[n] = row(n) times the matrix [K, units] that pack(panels, p) packs, for n in [0, count). Every worker calls it.
template <class S, class Row, class Pack, class Out>
void small_product(const Worker &worker, long count, long units, long K, Row row, const Lying<RealOf<S>> &lying,
                   Pack pack, Out *out, long stride, void *memory) {
    SmallMemory<S> s(count, units, K, lying, memory, worker.id, worker.count);
    const auto begin = [&](long n, int id) { return n * id / worker.count; };
    for (long p = begin(s.w.count, worker.id); p < begin(s.w.count, worker.id + 1); ++p) pack(s.w, p);
    const long n0 = begin(count, worker.id), n1 = begin(count, worker.id + 1);
    // A matrix that stays near is gone through again for every few rows, so that the result is written row by row.
    const long few = units * K * (long)sizeof(RealOf<S>) <= near_bytes / 8 ? most_rows : count;
    if constexpr (!keeps_near<S>)
        for (long n = n0; n < n1; ++n) s.rows[n] = row(n);
    worker.wait();
    const long widened = keeps_near<S> ? widened_rows(count, K) : count, together = least(few, widened);
    for (long m = n0; m < n1; m += widened) {
        const long end = least(m + widened, n1);
        if constexpr (keeps_near<S>)
            for (long n = m; n < end; ++n) copy(row(n), K, s.near + (n - m) * K), s.rows[n] = s.near + (n - m) * K;
        for (long n = m; n < end; n += together)
            pass(s.w, s.rows, n, least(n + together, end), 0, s.w.count, RowsOut<Out>{out, stride, units});
    }
    worker.wait();
}

// The input product of some rows of a walk at a time, so that the walk finds them near.
template <class S> struct InputRows {
    using T = RealOf<S>;
    Panels<T> w;
    long most = 0;            // rows at a time: of whole steps
    long *at = nullptr;       // [most] which they are
    const T **rows = nullptr; // [most] x of each
    T *near = nullptr;        // [most, I] the values of x, where they are stored as another type

    InputRows(const Forward<S> &a, long G) : w(1, G * a.H, a.I, a.rows(), lying(a.w_ih, G * a.H * a.I, a.rows())) {}

    // columns: that walk together.
    void place(const Forward<S> &a, long columns, Scratch &scratch, int id, int workers) {
        const long bytes = columns * (a.stride * (long)sizeof(S) + a.I * (long)sizeof(T));
        most = least(near_bytes / (bytes + 1) + 1, a.T) * columns;
        w.place(scratch.take<T>(w.values()));
        for (int i = 0; i < workers; ++i) {
            long *own_at = scratch.take<long>(most);
            const T **own_rows = scratch.take<const T *>(most);
            T *own_near = keeps_near<S> ? scratch.take<T>(most * a.I) : nullptr;
            if (i == id) at = own_at, rows = own_rows, near = own_near;
        }
    }

    // Its share of the weights, by each worker.
    void pack(const Forward<S> &a, const Worker &worker) {
        for (long p = w.count * worker.id / worker.count; p < w.count * (worker.id + 1) / worker.count; ++p)
            w.pack_rows(p, a.w_ih, [](int, long) { return T(0); });
    }

    // Of panels p0 to p1 and `count` rows.
    void multiply(const Forward<S> &a, long count, long p0, long p1) const {
        for (long n = 0; n < count; ++n) {
            const S *x = a.x + at[n] * a.I;
            if constexpr (keeps_near<S>)
                copy(x, a.I, near + n * a.I), rows[n] = near + n * a.I;
            else
                rows[n] = x;
        }
        // Weights that stay near are gone through again for every few rows, so that the result is written row by row.
        const long few = w.units * w.K * (long)sizeof(T) <= near_bytes / 8 ? most_rows : count;
        for (long n = 0; n < count; n += few)
            pass(w, rows, n, least(n + few, count), p0, p1, RowsOut<S>{a.gates, a.stride, w.units, at});
    }
};

template <class S> long small_inputs_bytes(const Sweep<S> &a, long G, int workers) {
    const long values = G * a.H * a.I;
    return a.dx ? small_bytes<S>(a.rows(), a.I, G * a.H, workers, lying(a.w_ih, values, a.rows(), true)) : 0;
}

// dx, from da [T * B, width].
template <class S> void small_inputs(const Sweep<S> &a, long G, long width, void *memory, const Worker &worker) {
    const long rows = a.rows(), GH = G * a.H, skip = width - GH; // a GRU's rows begin with dm
    if (!a.dx) return;
    small_product<S>(
        worker, rows, a.I, GH, [&](long n) { return a.da + n * width + skip; }, lying(a.w_ih, GH * a.I, rows, true),
        [&](Panels<RealOf<S>> &w, long p) { w.pack_columns(p, [&](long k) { return a.w_ih + k * a.I; }); }, a.dx, a.I,
        memory);
}

// Where what is stored is not Real, of the products over all steps dx alone is done with the sweep.
template <class S> long small_sweep_bytes(const Sweep<S> &a, long G, long width, int workers) {
    const long inputs = small_inputs_bytes(a, G, workers), rows = a.rows();
    if (!a.x) return inputs;
    const long weights = small_bytes<RealOf<S>>(G * a.H, a.I > a.P ? a.I : a.P, rows, workers);
    return (rows * width * (long)sizeof(S) + 63) / 64 * 64 + (inputs > weights ? inputs : weights);
}

// across [width, rows] = all [rows, width] with rows and columns exchanged, a register's worth of both at a time. Every
// worker calls it, for columns of its own.
template <class T> void turn_rows(const T *all, long rows, long width, T *across, const Worker &worker) {
    constexpr long L = lanes<T>;
    const long blocks = (width + L - 1) / L;
    for (long b = blocks * worker.id / worker.count; b < blocks * (worker.id + 1) / worker.count; ++b) {
        const long g0 = b * L, g1 = least(g0 + L, width);
        long n = 0;
        for (; g1 - g0 == L && n + L <= rows; n += L) {
            Vec<T> v[L];
#pragma GCC unroll 16
            for (int i = 0; i < L; ++i) v[i] = load(all + (n + i) * width + g0);
            transpose<T>(v);
#pragma GCC unroll 16
            for (int i = 0; i < L; ++i) store(across + (g0 + i) * rows + n, v[i]);
        }
        for (; n < rows; ++n)
            for (long g = g0; g < g1; ++g) across[g * rows + n] = all[n * width + g];
    }
}

// (6.4), from da [T * B, width].
template <class T>
void small_sweep(const Sweep<T> &a, long G, long width, const T *zeros, void *memory, const Worker &worker) {
    const long rows = a.rows(), GH = G * a.H, skip = width - GH; // a GRU's rows begin with dm
    Scratch scratch(memory);
    T *across = scratch.take<T>(rows * width); // da [width, T * B]
    void *rest = scratch.take<char>(0);
    if (a.dw_ih || a.dw_hh) turn_rows(a.da, rows, width, across, worker);
    worker.wait();
    small_inputs(a, G, width, rest, worker);
    if (a.dw_ih)
        small_product<T>(
            worker, GH, a.I, rows, [&](long g) { return across + (g + skip) * rows; }, {},
            [&](Panels<T> &w, long p) { w.pack_columns(p, [&](long k) { return a.x + k * a.I; }); }, a.dw_ih, a.I,
            rest);
    if (a.dw_hh)
        small_product<T>(
            worker, GH, a.P, rows,
            [&](long g) {
                return across + (skip == 0 ? g : g < 2 * a.H ? g + skip : g - 2 * a.H) * rows;
            },
            {},
            [&](Panels<T> &w, long p) {
                w.pack_columns(p, [&](long k) {
                    if (!a.resets || !a.resets[k]) return a.h + a.state_before(k) * a.P;
                    return restart(a.reset_h, a.reset_h_step, k, a.B, a.P, zeros);
                });
            },
            a.dw_hh, a.P, rest);
}

} // namespace bptt::BPTT_VARIANT
