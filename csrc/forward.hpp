// Stage 1: forward through time. Legend and arguments: walks.hpp. Formula numbers: equations/README.md.
#pragma once

#include "activation.hpp"
#include "bfloat16.hpp"
#include "product.hpp"
#include "restart.hpp"
#include "scratch.hpp"
#include "small.hpp"
#include "walks.hpp"

namespace bptt::BPTT_VARIANT {

// How many rows walk together, each K values wide.
template <class T> long rows_together(long K) {
    const long rows = near_bytes / (K * (long)sizeof(T) + 1);
    return rows < 48 ? 48 : rows;
}

// Where part `i` of `count` equal parts of [0, n) begins.
BPTT_INLINE long part(long n, long i, long count) { return n * i / count; }

// The same for columns of unequal lengths, sorted, of which active[t] are longer than t: parts of equal work.
inline long part(long n, const std::int64_t *active, long steps, long i, long count) {
    if (!active || i == 0 || i == count) return part(n, i, count);
    long total = 0, sum = 0;
    for (long t = 0; t < steps; ++t) total += active[t];
    long length = steps;
    for (long column = 0; column < n; ++column) {
        while (length > 0 && active[length - 1] <= column) --length;
        if (sum >= total * i / count) return column;
        sum += length;
    }
    return n;
}

template <class T> BPTT_INLINE void clear(T *p, long count) {
    for (long i = 0; i < count; ++i) p[i] = T{};
}

template <Cell f, class T> BPTT_INLINE Vec<T> activate(Vec<T> x) {
    if constexpr (f == Cell::tanh)
        return tanh<T>(x);
    else if constexpr (f == Cell::sigmoid)
        return sigmoid<T>(x);
    else if constexpr (f == Cell::relu)
        return x < broadcast(T(0)) ? Vec<T>{} : x; // NaN stays NaN
    else
        return x;
}

// One step's rows: what the cells' formulas are applied to. S is how the tape is stored.
template <class S> struct Step {
    using T = RealOf<S>;
    const Forward<S> &a;
    const long *at;         // row of each column in a [T, B, ...] tensor
    const T *const *h_prev; // the state before the step, resets applied
    const T *const *c_prev;
    T *m; // [rows, H] o * tanh(c) before a projection, else null
    const T *zeros;
    T *near_h, *near_c; // [rows, P], [rows, H] the state after the step once more where it is stored as another type

    // The state after the step, of column n.
    BPTT_INLINE Kept<S> h(long n) const {
        return {a.h + a.state_after(at[n]) * a.P, keeps_near<S> ? near_h + n * a.P : nullptr};
    }
    BPTT_INLINE Kept<S> c(long n) const {
        return {a.c + a.state_after(at[n]) * a.H, keeps_near<S> ? near_c + n * a.H : nullptr};
    }
};

template <Cell f, class S> struct RnnForward : Step<S> {
    using T = RealOf<S>;
    BPTT_INLINE void operator()(long n, int rows, long unit, int vectors, const T *sums) const {
        const auto &a = this->a;
        for (int i = 0; i < rows; ++i) {
            const Kept<S> h = this->h(n + i);
            for (int v = 0; v < vectors; ++v, sums += lanes<T>) {
                const long u = unit + v * lanes<T>;
                const int count = (int)least(a.H - u, lanes<T>);
                h.put(u, activate<f, T>(load(sums) + load(h.tape + u, count)), count); // (3.1), (3.2)
            }
        }
    }
};

template <class S> struct GruForward : Step<S> {
    using T = RealOf<S>;
    BPTT_INLINE void operator()(long n, int rows, long unit, int vectors, const T *sums) const {
        const auto &a = this->a;
        const long H = a.H, width = vectors * lanes<T>;
        const T *b_in = a.b_ih ? a.b_ih + 2 * H : this->zeros;
        for (int i = 0; i < rows; ++i, sums += 3 * width) {
            const long row = this->at[n + i];
            S *g = a.gates + row * a.stride;
            const Kept<S> h = this->h(n + i);
            const T *h_prev = this->h_prev[n + i];
            for (int v = 0; v < vectors; ++v) {
                const long u = unit + v * lanes<T>;
                const int count = (int)least(H - u, lanes<T>);
                const T *s = sums + v * lanes<T>;
                const Vec<T> r = sigmoid<T>(load(s) + load(g + u, count));             // (4.1)
                const Vec<T> z = sigmoid<T>(load(s + width) + load(g + H + u, count)); // (4.2)
                const Vec<T> m = load(s + 2 * width);                                  // (4.3)
                const Vec<T> a_n = load(g + 2 * H + u, count) + load(b_in + u, count);
                const Vec<T> c = tanh<T>(a_n + r * m);                  // (4.4)
                h.put(u, c + z * (load(h_prev + u, count) - c), count); // (4.5)
                if (a.keeps) {
                    store(g + u, r, count);
                    store(g + H + u, z, count);
                    store(g + 2 * H + u, c, count);
                    store(g + 3 * H + u, m, count);
                }
            }
        }
    }
};

template <class S> struct LstmForward : Step<S> {
    using T = RealOf<S>;
    BPTT_INLINE void operator()(long n, int rows, long unit, int vectors, const T *sums) const {
        const auto &a = this->a;
        const long H = a.H, width = vectors * lanes<T>;
        for (int i = 0; i < rows; ++i, sums += 4 * width) {
            const long row = this->at[n + i];
            S *gates = a.gates + row * a.stride;
            T *m = this->m ? this->m + (n + i) * H : nullptr;
            const Kept<S> h = this->h(n + i), c = this->c(n + i);
            const T *c_prev = this->c_prev[n + i];
            for (int v = 0; v < vectors; ++v) {
                const long u = unit + v * lanes<T>;
                const int count = (int)least(H - u, lanes<T>);
                const T *s = sums + v * lanes<T>;
                const Vec<T> in = sigmoid<T>(load(s) + load(gates + u, count));                    // (5.1)
                const Vec<T> f = sigmoid<T>(load(s + width) + load(gates + H + u, count));         // (5.2)
                const Vec<T> g = tanh<T>(load(s + 2 * width) + load(gates + 2 * H + u, count));    // (5.3)
                const Vec<T> o = sigmoid<T>(load(s + 3 * width) + load(gates + 3 * H + u, count)); // (5.4)
                const Vec<T> cell = f * load(c_prev + u, count) + in * g;                          // (5.5)
                const Vec<T> out = o * tanh<T>(cell);                                              // (5.6)
                c.put(u, cell, count);
                if (m)
                    store(m + u, out, count);
                else
                    h.put(u, out, count);
                if (a.keeps) {
                    store(gates + u, in, count);
                    store(gates + H + u, f, count);
                    store(gates + 2 * H + u, g, count);
                    store(gates + 3 * H + u, o, count);
                }
            }
        }
    }
};

// (5.7): h is the projection of m.
template <class S> struct Projected : Step<S> {
    using T = RealOf<S>;
    BPTT_INLINE void operator()(long n, int rows, long unit, int vectors, const T *sums) const {
        const auto &a = this->a;
        for (int i = 0; i < rows; ++i) {
            const Kept<S> h = this->h(n + i);
            for (int v = 0; v < vectors; ++v, sums += lanes<T>) {
                const long u = unit + v * lanes<T>;
                h.put(u, load(sums), (int)least(a.P - u, lanes<T>));
            }
        }
    }
};

// Everything a worker needs besides the arguments, from one scratch memory.
template <class S> struct ForwardMemory {
    using T = RealOf<S>;
    Panels<T> w, projection;
    T *zeros = nullptr;
    long together;      // rows of a group
    long *at = nullptr; // this worker's, [together]
    const T **h_prev = nullptr, **c_prev = nullptr, **m_rows = nullptr;
    void *small = nullptr;
    T *m = nullptr;                       // this worker's, or all workers' where panels are shared, as what follows
    T *near_h[2] = {}, *near_c = nullptr; // [together, P], [together, H] states of this step and the one before
    long bytes;

    ForwardMemory(const Forward<S> &a, int gates, void *memory, int id, int workers, Split split)
        : w(gates, a.H, a.P, split == Split::rows ? a.B / workers : a.B, lying(a.w_hh, gates * a.H * a.P, a.rows())),
          projection(1, a.P, a.H, split == Split::rows ? a.B / workers : a.B, lying(a.w_hr, a.P * a.H, a.rows())) {
        Scratch scratch(memory);
        w.place(scratch.take<T>(w.values()));
        if (a.w_hr) projection.place(scratch.take<T>(projection.values()));
        zeros = scratch.take<T>(a.H > a.P ? a.H : a.P);
        small = scratch.take<char>(small_forward_bytes(a, gates, workers));
        together = least(a.B, rows_together<T>(a.P));
        if (split == Split::panels) together = a.B;
        if (together < 1) together = 1;
        T *shared = a.w_hr ? scratch.take<T>(together * a.H) : nullptr;
        for (int i = 0; keeps_near<S> && i < (split == Split::panels ? 1 : workers); ++i) {
            T *first = scratch.take<T>(together * a.P), *second = scratch.take<T>(together * a.P);
            T *cells = a.c ? scratch.take<T>(together * a.H) : nullptr;
            if (i == id || split == Split::panels) near_h[0] = first, near_h[1] = second, near_c = cells;
        }
        for (int i = 0; i < workers; ++i) {
            long *own_at = scratch.take<long>(together);
            const T **own_h = scratch.take<const T *>(together), **own_c = scratch.take<const T *>(together);
            const T **own_rows = scratch.take<const T *>(together);
            T *own_m = a.w_hr ? (split == Split::panels ? shared : scratch.take<T>(together * a.H)) : nullptr;
            if (i == id) at = own_at, h_prev = own_h, c_prev = own_c, m_rows = own_rows, m = own_m;
        }
        bytes = scratch.bytes();
    }
};

// Past the end of a sequence everything is zero.
template <class S> void clear_padding(const Forward<S> &a, long n0, long n1) {
    for (long t = 0; t < a.T; ++t)
        for (long n = n0 > a.active[t] ? n0 : a.active[t]; n < n1; ++n) {
            const long row = t * a.B + (a.lane ? a.lane[n] : n);
            clear(a.h + (row + a.B) * a.P, a.P);
            if (a.c) clear(a.c + (row + a.B) * a.H, a.H);
            if (a.keeps) clear(a.gates + row * a.stride, a.stride);
        }
}

template <class S, template <class> class Op, int G>
void forward_walk(const Forward<S> &a, void *memory, const Worker &worker) {
    using T = RealOf<S>;
    ForwardMemory<S> s(a, G, memory, worker.id, worker.count, worker.split);
    const bool projects = a.w_hr != nullptr, shares = worker.split == Split::panels;
    if (worker.id == 0) {
        clear(s.zeros, a.H > a.P ? a.H : a.P);
        if (!a.initial_apart) copy(a.h_0, a.B * a.P, a.h + a.initial() * a.P);
        if (a.c) copy(a.c_0, a.B * a.H, a.c + a.initial() * a.H);
    }
    const auto bias = [&](int g, long unit) {
        if (!a.b_ih) return T(0);
        const T recurrent = a.b_hh[g * a.H + unit];
        // (4.3): b_hn is inside the reset gate's product, b_in is not and joins later.
        return a.cell == Cell::gru && g == 2 ? recurrent : recurrent + a.b_ih[g * a.H + unit];
    };
    for (long p = part(s.w.count, worker.id, worker.count); p < part(s.w.count, worker.id + 1, worker.count); ++p)
        s.w.pack_rows(p, a.w_hh, bias);
    if (projects)
        for (long p = part(s.projection.count, worker.id, worker.count);
             p < part(s.projection.count, worker.id + 1, worker.count); ++p)
            s.projection.pack_rows(p, a.w_hr, [](int, long) { return T(0); });
    if (a.x) small_forward(a, G, s.small, worker);
    worker.wait();
    // Panels and rows of this worker.
    const long p0 = shares ? part(s.w.count, worker.id, worker.count) : 0;
    const long p1 = shares ? part(s.w.count, worker.id + 1, worker.count) : s.w.count;
    const long q0 = shares ? part(s.projection.count, worker.id, worker.count) : 0;
    const long q1 = shares ? part(s.projection.count, worker.id + 1, worker.count) : s.projection.count;
    const long b0 = shares ? 0 : part(a.B, a.active, a.T, worker.id, worker.count);
    const long b1 = shares ? a.B : part(a.B, a.active, a.T, worker.id + 1, worker.count);
    if (a.active && !a.first && (!shares || worker.id == 0)) clear_padding(a, b0, b1);
    for (long g0 = b0; g0 < b1; g0 += s.together) {
        const long g1 = least(g0 + s.together, b1);
        for (long i = 0; i < a.T; ++i) {
            const long t = a.reverse ? a.T - 1 - i : i;
            const long n1 = a.active ? least(g1, a.active[t]) : g1;
            if (n1 <= g0) {
                if (a.reverse) continue; // lanes begin one after the other
                break;
            }
            for (long n = g0; n < n1; ++n) {
                const long row = a.row(t, a.lane ? a.lane[n] : n), before = a.state_before(row);
                const long lane = a.initial_lane(before);
                const bool reset = a.resets && a.resets[row];
                s.at[n - g0] = row;
                s.h_prev[n - g0] =
                    reset ? restart(a.reset_h, a.reset_h_step, row, a.B, a.P, s.zeros)
                          : kept_state(a.h, a.h_0, s.near_h[(i + 1) % 2], before, lane, n - g0, a.P, a.initial_apart);
                if (a.c)
                    s.c_prev[n - g0] = reset ? restart(a.reset_c, a.reset_c_step, row, a.B, a.H, s.zeros)
                                             : kept_state(a.c, a.c_0, s.near_c, before, lane, n - g0, a.H);
                if (projects) s.m_rows[n - g0] = s.m + (n - g0) * a.H;
            }
            const Step<S> step{a, s.at, s.h_prev, s.c_prev, s.m, s.zeros, s.near_h[i % 2], s.near_c};
            pass(s.w, s.h_prev, 0, n1 - g0, p0, p1, Op<S>{step});
            if (projects) {
                if (shares) worker.wait();
                pass(s.projection, s.m_rows, 0, n1 - g0, q0, q1, Projected<S>{step});
            }
            if (shares) worker.wait();
        }
    }
}

template <class S> using TanhForward = RnnForward<Cell::tanh, S>;
template <class S> using ReluForward = RnnForward<Cell::relu, S>;
template <class S> using IdentityForward = RnnForward<Cell::identity, S>;
template <class S> using SigmoidForward = RnnForward<Cell::sigmoid, S>;

template <class S> void forward(const Forward<S> &a, void *memory, const Worker &worker) {
    switch (a.cell) {
    case Cell::tanh: return forward_walk<S, TanhForward, 1>(a, memory, worker);
    case Cell::relu: return forward_walk<S, ReluForward, 1>(a, memory, worker);
    case Cell::identity: return forward_walk<S, IdentityForward, 1>(a, memory, worker);
    case Cell::sigmoid: return forward_walk<S, SigmoidForward, 1>(a, memory, worker);
    case Cell::gru: return forward_walk<S, GruForward, 3>(a, memory, worker);
    case Cell::lstm: return forward_walk<S, LstmForward, 4>(a, memory, worker);
    }
}

template <class S> long forward_bytes(const Forward<S> &a, int workers, Split split) {
    return ForwardMemory<S>(a, gates_of(a.cell), nullptr, 0, workers, split).bytes;
}

} // namespace bptt::BPTT_VARIANT
