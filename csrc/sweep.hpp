// Stage 3: the block sweep, back through time. Legend and arguments: walks.hpp. Formula numbers: equations/README.md.
#pragma once

#include "error_row.hpp"
#include "forward.hpp"
#include "summed.hpp"

namespace bptt::BPTT_VARIANT {

// (3.4): dL/da from dL/dh and h.
template <Cell f, class T> BPTT_INLINE Vec<T> pull(Vec<T> dh, Vec<T> h) {
    const Vec<T> one = broadcast(T(1));
    if constexpr (f == Cell::tanh)
        return dh * (one - h * h);
    else if constexpr (f == Cell::sigmoid)
        return dh * h * (one - h);
    else if constexpr (f == Cell::relu)
        return h <= Vec<T>{} ? Vec<T>{} : dh; // a closed unit stops NaN too
    else
        return dh;
}

// One step of the walk for a group of columns, numbered from the group's first. S is how the tape is stored.
template <class S> struct Back {
    using T = RealOf<S>;
    const Sweep<S> &a;
    long width;          // of a row of da: G H
    long j;              // steps before this one
    const long *columns; // the group's, by their numbers in `a`
    const long *at;      // [columns] row of the step in a [T, B, ...] tensor; before step 0: see row_before
    T *const *to;        // [columns] where da goes, from where the next step's product takes it
    T *carried;          // [columns, H] what passes to the step before beside the product: an LSTM's dc, a GRU's dh z
    T *lambda;           // [columns, P] where a projection follows, lambda of h
    const T *zeros;

    BPTT_INLINE const S *nothing() const { return reinterpret_cast<const S *>(zeros); }

    // Where column n's values of this step lie, of those by position.
    BPTT_INLINE long position(long n) const {
        return (a.positions_turned ? j : a.length(columns[n]) - 1 - j) * a.N + a.slot(columns[n]);
    }

    // Where its da and its adjoints lie.
    BPTT_INLINE long place(long n) const { return a.by_position ? position(n) : at[n]; }
    BPTT_INLINE long adjoint_place(long n) const { return a.by_position && !a.sums ? position(n) : at[n]; }

    // The factor on what comes from the step after.
    BPTT_INLINE T factor(long n) const { return a.edge_factors && j ? a.edge_factors[a.row_after(at[n])] : T(1); }

    // The step's own error of h, or zeros.
    BPTT_INLINE const S *error(long n) const {
        if (!a.errors || (!a.errors_by_position && j >= a.own(columns[n]))) return nothing();
        return a.errors + (a.errors_by_position ? position(n) : at[n]) * a.error_stride;
    }

    // The adjoint of h or c that the column begins with at its top; zeros where it has none, and later.
    BPTT_INLINE const T *arrived(const T *arriving, long size, long n) const {
        if (!arriving || j != 0 || a.arrives(columns[n]) < 0) return zeros;
        return arriving + a.arrives(columns[n]) * size;
    }

    // The state before the step.
    BPTT_INLINE const S *before(const S *states, const S *reset, long step, long size, long n) const {
        if (!a.resets || !a.resets[at[n]]) return states + a.state_before(at[n]) * size;
        return restart(reset, step, at[n], a.B, size, nothing());
    }

    BPTT_INLINE T *adjoint(long n) const { return a.adjoint_h ? a.adjoint_h + adjoint_place(n) * a.P : nullptr; }

    // Its da. Without a copy near the next step's product takes it from what is asked for.
    BPTT_INLINE ErrorRow<S> row(long n) const {
        return {to[n], a.sums ? a.sums + at[n] * width : nullptr,
                keeps_near<S> && a.da ? a.da + place(n) * width : nullptr};
    }
};

template <class T> BPTT_INLINE Vec<T> scaled(Vec<T> x, T factor) {
    return factor == T(1) ? x : factor == T(0) ? Vec<T>{} : x * factor; // a closed edge stops NaN too
}

// lambda of h at the units of one row, from the step after, the step's error and what enters at the top: (6.1), (6.2).
template <class S> struct Arriving {
    using T = RealOf<S>;
    T factor;
    const S *error;
    const T *arrived;
    T *adjoint;
    bool adds, begins;

    BPTT_INLINE Arriving(const Back<S> &b, long n)
        : factor(b.factor(n)), error(b.error(n)), arrived(b.arrived(b.a.arriving_h, b.a.P, n)), adjoint(b.adjoint(n)),
          adds(b.a.sums), begins(arrived != b.zeros) {}

    BPTT_INLINE Vec<T> operator()(Vec<T> through, long u, int count) const {
        Vec<T> lambda = scaled(through, factor) + load(error + u, count);
        if (begins) lambda += load(arrived + u, count);
        if (adjoint) store(adjoint + u, adds ? load(adjoint + u, count) + lambda : lambda, count);
        return lambda;
    }
};

template <Cell f, class S> struct RnnBack : Back<S> {
    using T = RealOf<S>;
    BPTT_INLINE void operator()(long n, int rows, long unit, int vectors, const T *sums) const {
        const auto &a = this->a;
        for (int i = 0; i < rows; ++i) {
            const Arriving<S> arriving(*this, n + i);
            const S *h = a.h + a.state_after(this->at[n + i]) * a.H;
            const ErrorRow<S> row = this->row(n + i);
            for (int v = 0; v < vectors; ++v, sums += lanes<T>) {
                const long u = unit + v * lanes<T>;
                const int count = (int)least(a.H - u, lanes<T>);
                const Vec<T> lambda = arriving(load(sums), u, count);
                row.put(u, pull<f, T>(lambda, load(h + u, count)), count);
            }
        }
    }
};

template <class S> struct GruBack : Back<S> {
    using T = RealOf<S>;
    BPTT_INLINE void operator()(long n, int rows, long unit, int vectors, const T *sums) const {
        const auto &a = this->a;
        const long H = a.H;
        const Vec<T> one = broadcast(T(1));
        for (int i = 0; i < rows; ++i) {
            const Arriving<S> arriving(*this, n + i);
            const S *gates = a.gates + this->at[n + i] * 4 * H;
            const S *h_prev = this->before(a.h, a.reset_h, a.reset_h_step, H, n + i);
            const ErrorRow<S> row = this->row(n + i);
            T *carried = this->carried + (n + i) * H;
            for (int v = 0; v < vectors; ++v, sums += lanes<T>) {
                const long u = unit + v * lanes<T>;
                const int count = (int)least(H - u, lanes<T>);
                const Vec<T> r = load(gates + u, count), z = load(gates + H + u, count);
                const Vec<T> c = load(gates + 2 * H + u, count), m = load(gates + 3 * H + u, count);
                Vec<T> through = load(sums);
                if (this->j) through += load(carried + u, count);
                const Vec<T> dh = arriving(through, u, count);
                const Vec<T> da_n = dh * (one - z) * (one - c * c);                     // (4.7), (4.8)
                const Vec<T> da_r = da_n * m * r * (one - r);                           // (4.9), (4.11)
                const Vec<T> da_z = dh * (load(h_prev + u, count) - c) * z * (one - z); // (4.6), (4.12)
                row.put(u, da_n * r, count);                                            // (4.10)
                row.put(H + u, da_r, count);
                row.put(2 * H + u, da_z, count);
                row.put(3 * H + u, da_n, count);
                store(carried + u, dh * z, count); // (4.13), first term
            }
        }
    }
};

template <class S> struct LstmBack : Back<S> {
    using T = RealOf<S>;
    BPTT_INLINE void operator()(long n, int rows, long unit, int vectors, const T *sums) const {
        const auto &a = this->a;
        const long H = a.H;
        const Vec<T> one = broadcast(T(1));
        const bool projects = a.w_hr != nullptr;
        for (int i = 0; i < rows; ++i) {
            const long at = this->at[n + i];
            const S *gates = a.gates + at * 4 * H, *c = a.c + a.state_after(at) * H;
            const S *c_prev = this->before(a.c, a.reset_c, a.reset_c_step, H, n + i);
            const T *arrived = this->arrived(a.arriving_c, H, n + i);
            const T factor = this->factor(n + i);
            const ErrorRow<S> row = this->row(n + i);
            T *carried = this->carried + (n + i) * H;
            T *adjoint_c = a.adjoint_c ? a.adjoint_c + this->adjoint_place(n + i) * H : nullptr;
            const auto each = [&](auto dm_of) __attribute__((always_inline)) {
                for (int v = 0; v < vectors; ++v, sums += lanes<T>) {
                    const long u = unit + v * lanes<T>;
                    const int count = (int)least(H - u, lanes<T>);
                    const Vec<T> in = load(gates + u, count), f = load(gates + H + u, count);
                    const Vec<T> g = load(gates + 2 * H + u, count), o = load(gates + 3 * H + u, count);
                    const Vec<T> tanh_c = tanh<T>(load(c + u, count));
                    const Vec<T> dm = dm_of(load(sums), u, count); // (5.9)
                    Vec<T> dc = load(arrived + u, count);
                    if (this->j) dc += scaled(load(carried + u, count), factor); // (5.8)
                    if (adjoint_c) store(adjoint_c + u, a.sums ? load(adjoint_c + u, count) + dc : dc, count);
                    dc += dm * o * (one - tanh_c * tanh_c);                              // (5.11)
                    row.put(u, dc * g * in * (one - in), count);                         // (5.13), (5.16)
                    row.put(H + u, dc * load(c_prev + u, count) * f * (one - f), count); // (5.12), (5.17)
                    row.put(2 * H + u, dc * in * (one - g * g), count);                  // (5.14), (5.18)
                    row.put(3 * H + u, dm * tanh_c * o * (one - o), count);              // (5.10), (5.19)
                    store(carried + u, dc * f, count);                                   // (5.15)
                }
            };
            if (projects)
                each([](Vec<T> through, long, int) { return through; }); // lambda is applied where it arrives
            else
                each(Arriving<S>(*this, n + i));
        }
    }
};

// lambda of h before the pull through a projection.
template <class S> struct ArrivingRows : Back<S> {
    using T = RealOf<S>;
    BPTT_INLINE void operator()(long n, int rows, long unit, int vectors, const T *sums) const {
        const auto &a = this->a;
        for (int i = 0; i < rows; ++i) {
            const Arriving<S> arriving(*this, n + i);
            T *lambda = this->lambda + (n + i) * a.P;
            for (int v = 0; v < vectors; ++v, sums += lanes<T>) {
                const long u = unit + v * lanes<T>;
                const int count = (int)least(a.P - u, lanes<T>);
                store(lambda + u, arriving(load(sums), u, count), count);
            }
        }
    }
};

// What reaches the initial state of h; (4.13) for a GRU.
template <class S> struct Leaving : Back<S> {
    using T = RealOf<S>;
    BPTT_INLINE void operator()(long n, int rows, long unit, int vectors, const T *sums) const {
        const auto &a = this->a;
        for (int i = 0; i < rows; ++i) {
            const T factor = this->factor(n + i);
            const T *carried = a.cell == Cell::gru ? this->carried + (n + i) * a.H : nullptr;
            T *initial = a.leaving_h + a.slot(this->columns[n + i]) * a.P;
            for (int v = 0; v < vectors; ++v, sums += lanes<T>) {
                const long u = unit + v * lanes<T>;
                const int count = (int)least(a.P - u, lanes<T>);
                const Vec<T> through = carried ? load(sums) + load(carried + u, count) : load(sums);
                store(initial + u, scaled(through, factor), count);
            }
        }
    }
};

// Rows that are multiplied by the recurrent weights: one less a column where its first step's adjoint goes nowhere.
template <class S> long multiplied_rows(const Sweep<S> &a) { return (a.leaving_h ? a.R : a.R - 1) * a.N; }

template <class S> struct SweepMemory {
    using T = RealOf<S>;
    Panels<T> w, projection; // the recurrent weights; an LSTM's projection
    T *zeros = nullptr;
    void *small = nullptr;
    bool ring;                          // whether the product takes a column's own da from `rows`
    long together;                      // columns of a group
    long *at = nullptr;                 // this worker's, [together]
    long *columns = nullptr;            // its columns, [N] at most
    T **to = nullptr, **from = nullptr; // [together] da rows of this step and of the one after
    const T **lambda_rows = nullptr;
    T *rows[2] = {};                         // [together, width] da of the group's columns, of this step and the next
    T *carried = nullptr, *lambda = nullptr; // [together, H], [together, P]
    long bytes;

    SweepMemory(const Sweep<S> &a, void *memory, int id, int workers, bool apart)
        : w(1, a.P, gates_of(a.cell) * a.H, apart ? a.N / workers : a.N,
            lying(a.w_hh, gates_of(a.cell) * a.H * a.P, multiplied_rows(a), true, a.cell == Cell::gru ? 2 * a.H : 0)),
          projection(1, a.H, a.P, apart ? a.N / workers : a.N, lying(a.w_hr, a.P * a.H, a.R * a.N, true)),
          ring(keeps_near<S> || (a.sums && !a.da)) {
        Scratch scratch(memory);
        const long width = (a.cell == Cell::gru ? 4 : gates_of(a.cell)) * a.H;
        w.place(scratch.take<T>(w.values()));
        if (a.w_hr) projection.place(scratch.take<T>(projection.values()));
        zeros = scratch.take<T>(a.H > a.P ? a.H : a.P);
        small = scratch.take<char>(small_sweep_bytes(a, gates_of(a.cell), width, workers));
        together = rows_together<T>(ring ? 2 * width : width) * (apart ? 1 : workers);
        if (!apart && !ring) together = a.N;
        together = least(together, a.N);
        if (together < 1) together = 1;
        // Where workers walk apart each has its own; else all share the first's, but for the pointers.
        for (int i = 0; i < workers; ++i) {
            long *own_at = scratch.take<long>(together);
            T **own_to = scratch.take<T *>(together), **own_from = scratch.take<T *>(together);
            const T **own_lambda = scratch.take<const T *>(together);
            long *own_columns = scratch.take<long>(a.N);
            if (i == id) at = own_at, to = own_to, from = own_from, lambda_rows = own_lambda, columns = own_columns;
            if (apart || i == 0) {
                T *first = ring ? scratch.take<T>(together * width) : nullptr;
                T *second = ring ? scratch.take<T>(together * width) : nullptr;
                T *kept = a.cell >= Cell::gru ? scratch.take<T>(together * a.H) : nullptr;
                T *arrived = a.w_hr ? scratch.take<T>(together * a.P) : nullptr;
                if (i == id || !apart) rows[0] = first, rows[1] = second, carried = kept, lambda = arrived;
            }
        }
        bytes = scratch.bytes();
    }
};

// The columns of a worker, the longest first; returns how many. Where rows of several add up, those of one lane are one
// worker's: two may be at the same step at once.
template <class S> long own_columns(const Sweep<S> &a, const Worker &worker, bool apart, long *columns) {
    const bool by_lane = apart && a.sums;
    const long n0 = apart && !by_lane ? part(a.N, a.counts, a.R, worker.id, worker.count) : 0;
    const long n1 = apart && !by_lane ? part(a.N, a.counts, a.R, worker.id + 1, worker.count) : a.N;
    long count = 0;
    for (long n = n0; n < n1; ++n)
        if (!by_lane || a.lane(n) % worker.count == worker.id) columns[count++] = n;
    return count;
}

template <class S, template <class> class Op> void sweep_walk(const Sweep<S> &a, void *memory, const Worker &worker) {
    using T = RealOf<S>;
    const bool panels = worker.split == Split::panels, apart = !panels;
    SweepMemory<S> s(a, memory, worker.id, worker.count, apart);
    const int G = gates_of(a.cell);
    const long width = (a.cell == Cell::gru ? 4 : G) * a.H;
    if (worker.id == 0) clear(s.zeros, a.H > a.P ? a.H : a.P);
    const long p0 = part(s.w.count, worker.id, worker.count), p1 = part(s.w.count, worker.id + 1, worker.count);
    const long q0 = part(s.projection.count, worker.id, worker.count);
    const long q1 = part(s.projection.count, worker.id + 1, worker.count);
    // A GRU's rows of da begin with dm, the third gate of the recurrent product.
    const long turn = a.cell == Cell::gru ? 2 * a.H : 0;
    const auto row_of_w = [&](long k) { return a.w_hh + (k + turn < G * a.H ? k + turn : k + turn - G * a.H) * a.P; };
    for (long p = p0; p < p1; ++p) s.w.pack_columns(p, row_of_w);
    if (a.w_hr)
        for (long q = q0; q < q1; ++q) s.projection.pack_columns(q, [&](long k) { return a.w_hr + k * a.H; });
    worker.wait();
    const long w0 = panels ? p0 : 0, w1 = panels ? p1 : s.w.count;
    const long r0 = panels ? q0 : 0, r1 = panels ? q1 : s.projection.count;
    const long own = own_columns(a, worker, apart, s.columns);
    for (long g0 = 0; g0 < own; g0 += s.together) {
        const long size = least(s.together, own - g0), *columns = s.columns + g0;
        for (long n = 0; n < size; ++n) {
            s.at[n] = a.first_row(columns[n]);
            s.from[n] = nullptr;
        }
        long longer = size; // those that are longer than j; then those that are at the initial state
        for (long j = 0; j <= a.length(columns[0]); ++j) {
            while (longer > 0 && a.length(columns[longer - 1]) <= j) --longer;
            long left = longer;
            while (left < size && a.length(columns[left]) == j && a.top(columns[left]) + 1 == j) ++left;
            const Back<S> back{a, width, j, columns, s.at, s.to, s.carried, s.lambda, s.zeros};
            for (long n = 0; n < left; ++n) {
                if (j) s.at[n] = a.row_before(s.at[n]);
                if (s.ring) {
                    s.from[n] = s.rows[(j + 1) % 2] + n * width, s.to[n] = s.rows[j % 2] + n * width;
                } else if constexpr (!keeps_near<S>) {
                    s.from[n] = s.to[n];
                    s.to[n] = n < longer ? a.da + back.place(n) * width : nullptr;
                }
                if (a.w_hr) s.lambda_rows[n] = s.lambda + n * a.P;
            }
            const T *const *from = j ? s.from : nullptr;
            if (a.w_hr) {
                pass(s.w, from, 0, longer, w0, w1, ArrivingRows<S>{back});
                if (panels) worker.wait();
                pass(s.projection, s.lambda_rows, 0, longer, r0, r1, Op<S>{back});
            } else {
                pass(s.w, from, 0, longer, w0, w1, Op<S>{back});
            }
            if (a.leaving_h && left > longer && j) {
                pass(s.w, from, longer, left, w0, w1, Leaving<S>{back});
                if (a.c && (!panels || worker.id == 0))
                    for (long n = longer; n < left; ++n) {
                        T *initial = a.leaving_c + a.slot(columns[n]) * a.H;
                        const T factor = back.factor(n), *carried = s.carried + n * a.H;
                        for (long u = 0; u < a.H; ++u) initial[u] = factor == T(0) ? T(0) : carried[u] * factor;
                    }
            }
            if (panels) worker.wait();
        }
    }
    if (a.db_ih || a.w_ih) worker.wait();
    if constexpr (keeps_near<S>) {
        small_inputs(a, G, width, s.small, worker);
    } else {
        if (a.x) small_sweep(a, G, width, s.zeros, s.small, worker);
        if (a.db_ih) {
            const long blocks = (width + 63) / 64;
            bias_sums(a, width, part(blocks, worker.id, worker.count) * 64,
                      least(width, part(blocks, worker.id + 1, worker.count) * 64));
        }
    }
}

template <class S> using TanhBack = RnnBack<Cell::tanh, S>;
template <class S> using ReluBack = RnnBack<Cell::relu, S>;
template <class S> using IdentityBack = RnnBack<Cell::identity, S>;
template <class S> using SigmoidBack = RnnBack<Cell::sigmoid, S>;

template <class S> void sweep(const Sweep<S> &a, void *memory, const Worker &worker) {
    switch (a.cell) {
    case Cell::tanh: return sweep_walk<S, TanhBack>(a, memory, worker);
    case Cell::relu: return sweep_walk<S, ReluBack>(a, memory, worker);
    case Cell::identity: return sweep_walk<S, IdentityBack>(a, memory, worker);
    case Cell::sigmoid: return sweep_walk<S, SigmoidBack>(a, memory, worker);
    case Cell::gru: return sweep_walk<S, GruBack>(a, memory, worker);
    case Cell::lstm: return sweep_walk<S, LstmBack>(a, memory, worker);
    }
}

template <class S> long sweep_bytes(const Sweep<S> &a, int workers, Split split) {
    return SweepMemory<S>(a, nullptr, 0, workers, split == Split::rows).bytes;
}

} // namespace bptt::BPTT_VARIANT
