// The values of a call whose tensors are stored as bfloat16, as the floats that it is computed with.
#pragma once

#include "fields.hpp"
#include "walks.hpp"

namespace bptt {

// Pieces of one memory, each a tensor's values: those that are read are made floats by `place`, those that are written
// are put back by `put`.
class Converted {
  public:
    explicit Converted(const Walks<Bfloat16> &walks) : walks(walks) {}

    // Values that are read from a tensor, whatever type a field gives it; no piece for none.
    template <class V> void from(const V *tensor, long count, const float *&at) {
        if (tensor) add({reinterpret_cast<const Bfloat16 *>(tensor), nullptr, count, const_cast<float **>(&at)});
    }

    // Values that go to a tensor, or for none to nowhere.
    template <class V> void to(V *tensor, long count, float *&at) {
        add({nullptr, reinterpret_cast<Bfloat16 *>(tensor), count, &at});
    }

    // Values that go to a tensor; no piece for none.
    template <class V> void wanted(V *tensor, long count, float *&at) {
        if (tensor) to(tensor, count, at);
    }

    long bytes() const { return used; }

    void place(void *memory) {
        float *next = static_cast<float *>(memory);
        for (Piece *piece = pieces; piece != pieces + count; ++piece) {
            if (piece->from) walks.widen(piece->from, piece->count, next);
            *piece->at = next;
            next += values_of(piece->count);
        }
    }

    void put() const {
        for (const Piece *piece = pieces; piece != pieces + count; ++piece)
            if (piece->to) narrow(*piece->at, piece->count, piece->to);
    }

    // Part of a piece, once more.
    void narrow(const float *values, long count, Bfloat16 *to) const { walks.narrow(values, count, to); }

  private:
    struct Piece {
        const Bfloat16 *from;
        Bfloat16 *to;
        long count;
        float **at;
    };

    static constexpr int most = 16;

    static long values_of(long count) { return (count + 15) / 16 * 16; } // whole lines

    void add(const Piece &piece) {
        pieces[count++] = piece;
        used += values_of(piece.count) * long(sizeof(float));
    }

    const Walks<Bfloat16> &walks;
    Piece pieces[most];
    int count = 0;
    long used = 0;
};

// The arguments `a` of a small call of stage 1 as floats; returns the bytes of their memory. Without `h` only the
// outputs are wanted, and without `keeps` no gates: those of a cell that has none are its states, for `a` to say.
inline long converted(const Whole<Forward<Bfloat16>> &given, Forward<float> &a, Converted &values) {
    const long H = given.H, P = given.P, G = gates_of(given.cell), lanes = given.B, rows = given.T * lanes;
    a.cell = given.cell, a.T = given.T, a.B = lanes, a.I = given.I, a.H = H, a.P = P;
    a.stride = given.keeps ? given.stride : G * H, a.keeps = given.keeps;
    a.reverse = given.reverse, a.resets = given.resets;
    values.from(given.x, rows * given.I, a.x);
    values.from(given.w_ih, G * H * given.I, a.w_ih);
    values.from(given.h_0, lanes * P, a.h_0);
    values.from(given.c_0, lanes * H, a.c_0);
    values.from(given.w_hh, G * H * P, a.w_hh);
    values.from(given.b_ih, G * H, a.b_ih);
    values.from(given.b_hh, G * H, a.b_hh);
    values.from(given.w_hr, P * H, a.w_hr);
    values.to(given.h, (rows + lanes) * P, a.h);
    if (given.c_0) values.to(given.c, (rows + lanes) * H, a.c);
    if (G > 1) values.to(given.keeps ? given.gates : nullptr, rows * a.stride, a.gates);
    return values.bytes();
}

// What comes of it.
inline void put_converted(const Whole<Forward<Bfloat16>> &given, const Forward<float> &a, const Converted &values) {
    const long last = a.state_after(a.reverse ? 0 : (a.T - 1) * a.B);
    values.put();
    if (given.y) values.narrow(a.h + a.state_after(0) * a.P, a.T * a.B * a.P, given.y);
    if (given.h_n) values.narrow(a.h + last * a.P, a.B * a.P, given.h_n);
    if (given.c_n) values.narrow(a.c + last * a.H, a.B * a.H, given.c_n);
}

// The arguments of stages 3 and 4 of a small call; edge factors are floats all the same.
inline long converted(const Whole<Sweep<Bfloat16>> &given, Sweep<float> &a, Converted &values) {
    const long H = given.H, P = given.P, G = gates_of(given.cell), lanes = given.B, rows = given.T * lanes;
    a.cell = given.cell, a.T = given.T, a.B = lanes, a.I = given.I, a.H = H, a.P = P, a.N = given.N, a.R = given.R;
    a.error_stride = P, a.columns = given.columns, a.counts = given.counts, a.reverse = given.reverse;
    a.resets = given.resets, a.edge_factors = given.edge_factors;
    values.from(given.gates, rows * 4 * H, a.gates);
    values.from(given.h, (rows + lanes) * P, a.h);
    values.from(given.c, (rows + lanes) * H, a.c);
    values.from(given.errors, rows * P, a.errors);
    values.from(given.arriving_h, lanes * P, a.arriving_h);
    values.from(given.arriving_c, lanes * H, a.arriving_c);
    values.from(given.w_hh, G * H * P, a.w_hh);
    values.from(given.x, rows * given.I, a.x);
    values.from(given.w_ih, G * H * given.I, a.w_ih);
    values.wanted(given.dx, rows * given.I, a.dx);
    values.wanted(given.dw_ih, G * H * given.I, a.dw_ih);
    values.wanted(given.dw_hh, G * H * P, a.dw_hh);
    values.wanted(given.db_ih, G * H, a.db_ih);
    values.wanted(given.db_hh, G * H, a.db_hh);
    values.wanted(given.leaving_h, given.N * P, a.leaving_h);
    values.wanted(given.leaving_c, given.N * H, a.leaving_c);
    return values.bytes();
}

} // namespace bptt
