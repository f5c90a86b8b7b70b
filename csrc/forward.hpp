// Stage 1: forward through time. Legend and arguments: walks.hpp. Formula numbers: equations/README.md.
#pragma once

#include "product.hpp"
#include "restart.hpp"
#include "scratch.hpp"
#include "small.hpp"
#include "tile.hpp"
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

#define BPTT_EACH _Pragma("GCC unroll 8") for (int k = 0; k < N; ++k)

template <Cell f, class S> struct RnnForward : Step<S> {
    using T = RealOf<S>;
    BPTT_INLINE void operator()(long n, int rows, long unit, int vectors, const T *sums) const {
        const Tile<S> t(*this, n);
        in_groups<T, 4>(rows, unit, vectors, t.H, [&](auto at, auto count) __attribute__((always_inline)) {
            constexpr int N = at.size;
            Kept<S> h[N];
            Vec<T> x[N];
            BPTT_EACH {
                const long v = (at.vector + k) * lanes<T>;
                h[k] = t.state(at.row, unit + v);
                x[k] = load(sums + at.row * vectors * lanes<T> + v) + load(h[k].tape, count); // (3.1)
                t.expect(at.row, unit + v);
            }
            activate_all<f, T>(x); // (3.2)
            BPTT_EACH h[k].put(0, x[k], count);
        });
    }
};

template <class S> struct GruForward : Step<S> {
    using T = RealOf<S>;
    BPTT_INLINE void operator()(long n, int rows, long unit, int vectors, const T *sums) const {
        const Tile<S> t(*this, n);
        const long H = t.H, width = vectors * lanes<T>;
        in_groups<T, 2>(rows, unit, vectors, H, [&](auto at, auto count) __attribute__((always_inline)) {
            constexpr int N = at.size;
            long u[N];
            S *g[N];
            const T *s[N];
            Vec<T> rz[2 * N], c[N], m[N];
            BPTT_EACH {
                u[k] = unit + (at.vector + k) * lanes<T>;
                g[k] = t.gates + t.at[at.row] * t.stride + u[k];
                s[k] = sums + at.row * 3 * width + (at.vector + k) * lanes<T>;
                t.expect(at.row, u[k]);
                rz[k] = load(s[k]) + load(g[k], count);                 // (4.1)
                rz[N + k] = load(s[k] + width) + load(g[k] + H, count); // (4.2)
            }
            sigmoids<T>(rz);
            BPTT_EACH {
                m[k] = load(s[k] + 2 * width); // (4.3)
                c[k] = load(g[k] + 2 * H, count) + load(t.b_in + u[k], count) + rz[k] * m[k];
            }
            tanhs<T>(c); // (4.4)
            BPTT_EACH {
                const Vec<T> z = rz[N + k], h_prev = load(t.h_prev[at.row] + u[k], count);
                t.state(at.row, u[k]).put(0, c[k] + z * (h_prev - c[k]), count); // (4.5)
                if (t.keeps) {
                    store(g[k], rz[k], count);
                    store(g[k] + H, z, count);
                    store(g[k] + 2 * H, c[k], count);
                    store(g[k] + 3 * H, m[k], count);
                }
            }
        });
    }
};

template <class S> struct LstmForward : Step<S> {
    using T = RealOf<S>;
    BPTT_INLINE void operator()(long n, int rows, long unit, int vectors, const T *sums) const {
        const Tile<S> t(*this, n);
        const long H = t.H, width = vectors * lanes<T>;
        in_groups<T, 1>(rows, unit, vectors, H, [&](auto at, auto count) __attribute__((always_inline)) {
            const long u = unit + at.vector * lanes<T>;
            S *const gates = t.gates + t.at[at.row] * t.stride + u;
            const T *const s = sums + at.row * 4 * width + at.vector * lanes<T>;
            t.expect(at.row, u);
            Vec<T> in_f[] = {load(s) + load(gates, count),              // (5.1)
                             load(s + width) + load(gates + H, count)}; // (5.2)
            sigmoids<T>(in_f);
            const Vec<T> g = tanh<T>(load(s + 2 * width) + load(gates + 2 * H, count));    // (5.3)
            const Vec<T> o = sigmoid<T>(load(s + 3 * width) + load(gates + 3 * H, count)); // (5.4)
            const Vec<T> cell = in_f[1] * load(t.c_prev[at.row] + u, count) + in_f[0] * g; // (5.5)
            const Vec<T> out = o * tanh<T>(cell);                                          // (5.6)
            t.cell(at.row, u).put(0, cell, count);
            if (t.m)
                store(t.m + at.row * H + u, out, count);
            else
                t.state(at.row, u).put(0, out, count);
            if (t.keeps) {
                store(gates, in_f[0], count);
                store(gates + H, in_f[1], count);
                store(gates + 2 * H, g, count);
                store(gates + 3 * H, o, count);
            }
        });
    }
};

#undef BPTT_EACH

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
    InputRows<S> input;
    T *m = nullptr;                       // this worker's, or all workers' where panels are shared, as what follows
    T *near_h[2] = {}, *near_c = nullptr; // [together, P], [together, H] states of this step and the one before
    long bytes;

    ForwardMemory(const Forward<S> &a, int gates, void *memory, int id, int workers, Split split)
        : w(gates, a.H, a.P, split == Split::rows ? a.B / workers : a.B, lying(a.w_hh, gates * a.H * a.P, a.rows())),
          projection(1, a.P, a.H, split == Split::rows ? a.B / workers : a.B, lying(a.w_hr, a.P * a.H, a.rows())),
          input(a, gates) {
        Scratch scratch(memory);
        w.place(scratch.take<T>(w.values()));
        if (a.w_hr) projection.place(scratch.take<T>(projection.values()));
        zeros = scratch.take<T>(a.H > a.P ? a.H : a.P);
        together = least(a.B, rows_together<T>(a.P));
        if (split == Split::panels) together = a.B;
        if (together < 1) together = 1;
        if (a.x) input.place(a, together, scratch, id, workers);
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
    if (a.x) s.input.pack(a, worker);
    worker.wait();
    // Panels and rows of this worker.
    const long p0 = shares ? part(s.w.count, worker.id, worker.count) : 0;
    const long p1 = shares ? part(s.w.count, worker.id + 1, worker.count) : s.w.count;
    const long i0 = shares ? part(s.input.w.count, worker.id, worker.count) : 0;
    const long i1 = shares ? part(s.input.w.count, worker.id + 1, worker.count) : s.input.w.count;
    const long q0 = shares ? part(s.projection.count, worker.id, worker.count) : 0;
    const long q1 = shares ? part(s.projection.count, worker.id + 1, worker.count) : s.projection.count;
    const long b0 = shares ? 0 : part(a.B, a.active, a.T, worker.id, worker.count);
    const long b1 = shares ? a.B : part(a.B, a.active, a.T, worker.id + 1, worker.count);
    if (a.active && !a.first && (!shares || worker.id == 0)) clear_padding(a, b0, b1);
    for (long g0 = b0; g0 < b1; g0 += s.together) {
        const long g1 = least(g0 + s.together, b1);
        const auto time = [&](long i) { return a.reverse ? a.T - 1 - i : i; };
        const auto end = [&](long t) { return a.active ? least(g1, a.active[t]) : g1; };
        const long steps = s.input.most / s.together;
        for (long i = 0; i < a.T; ++i) {
            const long t = time(i), n1 = end(t);
            if (a.x && i % steps == 0) {
                long count = 0;
                for (long j = i; j < least(i + steps, a.T); ++j)
                    for (long n = g0; n < end(time(j)); ++n)
                        s.input.at[count++] = a.row(time(j), a.lane ? a.lane[n] : n);
                s.input.multiply(a, count, i0, i1);
                if (shares) worker.wait();
            }
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
            const long width = a.B == 1 ? 0 : a.first ? a.active[t] : a.B;
            const Step<S> step{
                a, s.at, s.h_prev, s.c_prev, s.m, s.zeros, s.near_h[i % 2], s.near_c, a.reverse ? -width : width};
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
