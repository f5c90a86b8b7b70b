// What the kernels are asked: plain structs of pointers and sizes, and the table of functions each variant fills in.
//
// Legend: T steps, B lanes, H hidden units, P size of h (H, or an LSTM's proj_size), G gates; N columns and R positions
// of a sweep. Tensors are dense and row-major; where a row may be part of a longer one, its stride is given, in values.
//
// The values of step t and lane b lie in row t * B + b of a [T, B, ...] tensor, the state after it B rows further down
// a [T + 1, B, ...] tensor and that before it in its own row there. A reverse walk goes from the last step to the
// first: then the state after a step lies in the step's own row and that before it B rows further down, the initial one
// last. Packed sequences have S rows instead, none of them of padding: those of step t begin at first[t], of the lanes
// that are as long, and the state after a step lies B rows further down in [B + S, ...] either way, where the initial
// states are the first B rows. `before` says in which row the state before each one lies.
#pragma once

#include <cstdint>

namespace bptt {

// The upper half of a float, as values of a tape lie. What is computed with it, sums and states among it, is a float.
struct Bfloat16 {
    std::uint16_t bits;
};

template <class Stored> struct Computed {
    using Type = Stored;
};
template <> struct Computed<Bfloat16> {
    using Type = float;
};

// What values that are stored like this are computed in.
template <class Stored> using RealOf = typename Computed<Stored>::Type;

enum class Cell { tanh, relu, identity, sigmoid, gru, lstm };

// How the threads of a call share it: each some rows for the whole walk, or each some panels of the weights for all
// rows, which takes a barrier a step.
enum class Split { rows, panels };

// A barrier for the threads of one call.
class Barrier;

struct Worker {
    int id, count;
    Split split;
    Barrier *barrier;

    void wait() const; // until all have come
};

// Gates in the weights.
constexpr int gates_of(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }

// Stage 1: the walk forward through time. Lanes come sorted by length, the longest first.
template <class Stored> struct Forward {
    using Real = RealOf<Stored>;
    Cell cell;
    long T, B, I, H, P;
    long reset_h_step;          // from a step of reset_h to the next; 0: the same for every step
    long reset_c_step;          // of reset_c
    long stride;                // of `gates`. RNN: H, and `gates` are h from step 1 on; GRU: 3 H, or 4 H where it keeps
                                // m = W_hn h + b_hn last; LSTM: 4 H
    bool keeps;                 // whether the gates are to be written
    const std::int64_t *lane;   // [B] lane of each column, null: column n is lane n
    const std::int64_t *active; // [T] columns whose sequence has a step t, null: all B
    const std::int64_t *first;  // [T], null: not packed, where `lane` and `active` tell lengths and there are resets
    const std::int64_t *before; // [S], not null where `first` is not
    bool reverse;               // whether the walk goes from the last step to the first; then no `lane`
    Stored *gates;              // [T, B, stride] in: the input product; out: the gates
    const Stored *x;            // [T, B, I] for the input product to be done here; else null, and then w_ih too
    const Real *w_ih;           // [G H, I]
    const Real *h_0, *c_0;      // [B, P], [B, H]
    const std::uint8_t *resets; // [T, B] the state is replaced before the step; null: nowhere
    const Real *reset_h;        // [B, P] by what, of each step; null: by zero
    const Real *reset_c;        // [B, H]
    const Real *w_hh;           // [G H, P]
    const Real *b_ih, *b_hh;    // [G H] or null
    const Real *w_hr;           // [P, H] or null
    Stored *h, *c;              // [T + 1, B, P], [T + 1, B, H] the initial state, then that after each step
    bool initial_apart;         // whether h_0 is read where it lies instead, and nothing lies at its place in h
    Stored *y, *h_n, *c_n;      // [T, B, P], [B, P], [B, H] h after each step, the last state: once more, or null

    // Of all steps and lanes.
    long rows() const { return first ? first[T - 1] + active[T - 1] : T * B; }

    // Of step t and lane b.
    long row(long t, long b) const { return (first ? first[t] : t * B) + b; }

    // Where the states before and after a row's step lie, and the initial one of lane 0.
    bool turned() const { return reverse && !first; }
    long state_before(long row) const { return before ? before[row] : turned() ? row + B : row; }
    long state_after(long row) const { return turned() ? row : row + B; }
    long initial() const { return turned() ? T * B : 0; }

    // The lane whose initial state lies in a row of states; negative where another state does.
    long initial_lane(long row) const { return row - initial() < B ? row - initial() : -1; }
};

// Stage 3: the block sweep. A column is one block of losses and one lane: it starts at step `top` and walks `length`
// steps back. Columns come sorted by length, the longest first; of equally long ones those that reach step 0 first.
// Their steps are numbered as the walk of stage 1 went: of a reverse one the last step in time is step 0.
//
// Values lie by address, row (step, lane) of a [T, B, ...] tensor, or by position, row (r, slot) of [R, N, ...] with
// r = length - 1 - j at the j-th step of the walk, or j where positions are turned. Gates, states and edge factors
// always lie by address.
template <class Stored> struct Sweep {
    using Real = RealOf<Stored>;
    Cell cell;
    long T, B, I, H, P, N, R;
    long reset_h_step, reset_c_step;     // as in Forward
    long error_stride;                   // of `errors`
    bool errors_by_position;             // of `errors`
    bool by_position;                    // of `da` and, where there are no `sums`, of the adjoints
    const std::int64_t *columns;         // [6, N], read by the functions below
    const std::int64_t *counts;          // [R + 1] columns longer than j, for every j
    const std::int64_t *tops;            // [N] the row of each column's first step, null: not packed
    const std::int64_t *before;          // [S], not null where `tops` is not; then no resets, edge factors, positions
    long S;                              // rows of packed sequences
    bool positions_turned;               // whether positions go against the walk of stage 1: r = 0 is its last step
    bool reverse;                        // not packed: whether the walk of stage 1 went from the last step to the first
    const Stored *gates;                 // [T, B, 4 H]; null for an RNN
    const Stored *h, *c;                 // as in Forward
    const std::uint8_t *resets;          // [T, B] or null
    const Stored *reset_h, *reset_c;     // as in Forward
    const Stored *errors;                // local errors of h [.., P] or null
    const Real *arriving_h, *arriving_c; // [.., P], [.., H] lambda with which columns begin, or null
    const Real *edge_factors;            // [T, B] on what passes from step t to t - 1; null: 1
    const Real *w_hh, *w_hr;
    Stored *da; // dL/da [.., G H]; a GRU's rows are (dm, da_r, da_z, da_n). Null: not wanted
    Real *sums; // the same by address, to which the rows of all columns are added, and then the adjoints are too; null
                // where no two columns meet, or nobody wants it
    Real *adjoint_h, *adjoint_c; // lambda [.., P], [.., H] or null
    Real *db_ih, *db_hh;         // [G H] the sums of da by address over rows, for b_ih and b_hh, both or null
    Real *leaving_h, *leaving_c; // [N, P], [N, H], by slot: what reaches the initial state, or null
    // As in Forward, for the products over all steps to be done here; else null. Where what is stored is not Real, dx
    // is the only one of them, and there are no db.
    const Real *x, *w_ih;
    Stored *dx;          // [T, B, I] or null
    Real *dw_ih, *dw_hh; // [G H, I], [G H, P] or null

    // Of all steps and lanes.
    long rows() const { return before ? S : T * B; }

    // Where the states before and after a row's step lie, and the values of column n's first step.
    long state_before(long row) const { return before ? before[row] : reverse ? row + B : row; }
    long state_after(long row) const { return reverse ? row : row + B; }
    long first_row(long n) const { return tops ? tops[n] : (reverse ? T - 1 - top(n) : top(n)) * B + lane(n); }

    // The rows of the steps before and after in the walk of stage 1, from that of a step; of step 0 it is one of none.
    long row_before(long row) const { return before ? before[row] - B : reverse ? row + B : row - B; }
    long row_after(long row) const { return reverse ? row - B : row + B; } // not packed

    // Of column n.
    std::int64_t top(long n) const { return columns[n]; }
    std::int64_t lane(long n) const { return columns[N + n]; }
    std::int64_t length(long n) const { return columns[2 * N + n]; }
    std::int64_t slot(long n) const { return columns[3 * N + n]; }
    std::int64_t own(long n) const { return columns[4 * N + n]; }     // the first so many steps have local errors
    std::int64_t arrives(long n) const { return columns[5 * N + n]; } // row of what arrives at the top; -1: none
};

// Stage 4: the sums over N rows of the products of a's columns with b's and b2's, and of a's columns alone.
//
// Of a GRU's rows (dm, da_r, da_z, da_n) the input's product has the last three parts and the recurrent one the first
// three, of which dm comes last. So the first `inner` columns are not multiplied by b and the last ones not by b2, of
// which the result's rows for the first ones come last.
template <class Stored> struct RowSums {
    using Real = RealOf<Stored>;
    long N, M, K, K2;
    long inner;                         // a multiple of 8, or 0
    long a_stride, b_stride, b2_stride; // from a row to the next
    const std::int64_t *rows;           // [N] which rows count, null: the first N
    const Stored *a, *b, *b2;           // [.., M], [.., K], [.., K2]
    Real *out, *out2;                   // [M - inner, K] = a' b, [M - inner, K2] = a' b2, or null
    Real *sums;                         // [M] or null
};

// What one variant offers. `bytes` is the scratch memory a call needs; every worker of a team calls `run` with the same
// scratch.
template <class Stored> struct Walks {
    using Real = RealOf<Stored>;
    long (*forward_bytes)(const Forward<Stored> &, int workers, Split);
    void (*forward)(const Forward<Stored> &, void *scratch, const Worker &);
    long (*sweep_bytes)(const Sweep<Stored> &, int workers, Split);
    void (*sweep)(const Sweep<Stored> &, void *scratch, const Worker &);
    long (*row_sums_bytes)(const RowSums<Stored> &, int workers, Split);
    void (*row_sums)(const RowSums<Stored> &, void *scratch, const Worker &);
    // y = f(x) for n values: the activation the kernels use, for tests.
    void (*apply)(Cell, long n, const Real *x, Real *y);
    // The same n values in the other type.
    void (*widen)(const Stored *, long n, Real *);
    void (*narrow)(const Real *, long n, Stored *);
};

struct Variant {
    const char *name;
    bool (*runs)(); // whether this machine has the instructions
    Walks<float> single;
    Walks<double> twice;
    Walks<Bfloat16> half;
};

} // namespace bptt
