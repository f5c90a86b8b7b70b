// A tile of the recurrent product as stage 1 finds it: where its rows lie, and its registers in groups. Legend:
// walks.hpp.
#pragma once

#include "activation.hpp"
#include "bfloat16.hpp"
#include "walks.hpp"

namespace bptt::BPTT_VARIANT {

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

template <Cell f, class T, int N> BPTT_INLINE void activate_all(Vec<T> (&x)[N]) {
    if constexpr (f == Cell::tanh)
        tanhs<T>(x);
    else if constexpr (f == Cell::sigmoid)
        sigmoids<T>(x);
    else
        for (Vec<T> &each : x) each = activate<f, T>(each);
}

// N registers of a row of a tile, the first of which is number `vector`.
template <int N> struct Group {
    static constexpr int size = N;
    int row, vector;
};

// f(group, count) of all registers of a tile, `vectors` of each row from `unit` on: by N where a row has so many and
// none reaches beyond `end`, one by one else, and then `count` values of each count.
template <class T, int N, class F> BPTT_INLINE void in_groups(int rows, long unit, int vectors, long end, F f) {
    const bool whole = vectors % N == 0 && unit + vectors * lanes<T> <= end;
    for (int i = 0; i < rows; ++i) {
        if (whole) {
            for (int v = 0; v < vectors; v += N) f(Group<N>{i, v}, All{});
            continue;
        }
        for (int v = 0; v < vectors; ++v)
            with_count<T>(unit + v * lanes<T>, end,
                          [&](auto count) __attribute__((always_inline)) { f(Group<1>{i, v}, count); });
    }
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
    long ahead;         // rows from the row of a step to that of the next one; 0: of one lane, which stays near

    // The state after the step, of column n.
    BPTT_INLINE Kept<S> h(long n) const {
        return {a.h + a.state_after(at[n]) * a.P, keeps_near<S> ? near_h + n * a.P : nullptr};
    }
};

// The same, of the registers of a tile: what would be read anew after every register written lies in here.
template <class S> struct Tile {
    using T = RealOf<S>;
    const long *at;
    const T *const *h_prev, *const *c_prev;
    S *h, *c, *gates; // of column 0, as if it were in row 0
    T *near_h, *near_c, *m;
    const T *zeros, *b_in;
    long H, P, stride, ahead;
    bool keeps, gated;

    BPTT_INLINE Tile(const Step<S> &s, long n)
        : at(s.at + n), h_prev(s.h_prev + n), c_prev(s.c_prev + n), h(s.a.h + s.a.state_after(0) * s.a.P),
          c(s.a.c ? s.a.c + s.a.state_after(0) * s.a.H : nullptr), gates(s.a.gates),
          near_h(keeps_near<S> ? s.near_h + n * s.a.P : nullptr),
          near_c(keeps_near<S> ? s.near_c + n * s.a.H : nullptr), m(s.m ? s.m + n * s.a.H : nullptr), zeros(s.zeros),
          b_in(s.a.b_ih ? s.a.b_ih + 2 * s.a.H : s.zeros), H(s.a.H), P(s.a.P), stride(s.a.stride), ahead(s.ahead),
          keeps(s.a.keeps), gated(s.a.cell >= Cell::gru) {}

    BPTT_INLINE Kept<S> state(int i, long u) const {
        return {h + at[i] * P + u, keeps_near<S> ? near_h + i * P + u : nullptr};
    }
    BPTT_INLINE Kept<S> cell(int i, long u) const {
        return {c + at[i] * H + u, keeps_near<S> ? near_c + i * H + u : nullptr};
    }

    // Asks for what the next step reads and writes in row i at units u, while there is time.
    BPTT_INLINE void expect(int i, long u) const {
        if (!ahead) return;
        const long row = at[i] + ahead;
        fetch(h + row * P + u);
        if (!gated) return;
        if (c) fetch(c + row * H + u);
        for (long g = u; g < stride; g += H) fetch(gates + row * stride + g);
    }
};

} // namespace bptt::BPTT_VARIANT
