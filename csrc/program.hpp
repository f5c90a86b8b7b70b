// What the interpreter is asked: a program, the core of a traced step, and the rows it is run for.
//
// Legend: T steps, B lanes; N columns and R positions of a sweep (see walks.hpp). A row is what belongs to one lane and
// step, `width` values one after the other. A *place* is where values lie; an instruction names places, and distances
// within a row of them.
#pragma once

#include "walks.hpp"

namespace bptt {

// What lies in a place, and where it is in a step of the walk.
enum class Kind : std::int64_t {
    outside, // without rows, the caller's
    once,    // without rows, computed once a call
    packed,  // weights packed for products, once a call
    tile,    // by row, of this tile and step alone
    input,   // by row, the caller's [T, B, width]
    owned,   // the same; zero beyond a column's own losses
    output,  // by row, the caller's [T, B, width]: written, or in a sweep whose columns meet, added to
    carry,   // the caller's [T + 1, B, width], at the step: zero where it is reset
    next,    // the same tensor, one step on
    adjoint, // the adjoint that arrives
    back,    // the adjoint that goes on to the step before
    sum,     // without rows, sums over all rows
    lane,    // by row, the caller's [B, width], of a lane the same at every step
};

struct Place {
    Kind kind;
    std::int64_t width;   // values of a row, or of all where there are no rows
    std::int64_t at;      // distance of its buffer in a row of the tile's memory; -1: none
    std::int64_t partner; // of an adjoint: the place of what the step after sends back; -1: none
};

struct Operand {
    std::int64_t place, offset; // place -1: none
    std::int64_t strides[4];    // within a row, by dimension of the instruction
};

// Operands: the result, then what it is computed from.
struct Instruction {
    std::int64_t op;
    std::int64_t modes; // bit i: operand i + 1 is the same along the innermost dimension
    std::int64_t n[4];  // dimensions within a row; of products and reductions see `Op`
    Operand x[4];
};

constexpr int most_unknowns = 16;

// Operations that are not element-wise come first; the names of all are `operation_names`.
enum class Op : std::int64_t {
    copy,        // any strides
    product,     // n: rows of the left operand's that belong to a row, K, units, 0 or how many of these rows lie in a
                 // row of a grid, with strides[1] between rows of it and [2] within; x: left, packed, start
    pack,        // n: K, units; x[1].strides: of both
    small,       // n: batch, I, K, J; out[b, i, j] = sum over k of x1[b, i, k] x2[b, k, j]
    solve,       // n: batch, unknowns (at most `most_unknowns`), columns; x: matrices [b, i, k], right sides [b, i, j]
    sum,         // n: three dimensions that stay, one that is added up; if that has another stride than 1, n[2] has 1
    mean,        //
    most,        //
    least,       //
    cumsum,      // n: three dimensions of their own, one along which is added up
    cumprod,     // likewise multiplied
    gather,      // out[.., i, ..] = x1[.., x2[.., i, ..], ..]; modes: the size of the dimension that is indexed, times
                 // 2^32, and its stride; x1.strides: 0 there
    scatter,     // out[.., x2[.., i, ..], ..] = x1[.., i, ..], likewise with out in the place of x1
    scatter_add, // the same, added to what out holds
    argmax,      // n: three dimensions that stay, one along which the index of the extreme is found
    argmin,      //
    order,       // n: likewise; the indices in the order of the values, by modes the largest first
    add_rows,    // n: as element-wise
    add_outer,   // n: 1, rows of a value that belong to a row, I, J; sums[i, j] += x1[i] x2[j]
    convolve,  // n: O, C, OH, OW; modes: the kernel's h and v, and the distances down and right between what it finds,
               // 16 bits each; out[o, y, x] = sum over c, i, j of x1[c, y + down i, x + right j] x2[o, c, i, j], by
               // planes; x: padded image, kernel, a start [o]
    correlate, // likewise sums[o, c, i, j] += sum over y, x of x1[o, y, x] x2[c, y + down i, x + right j]
    element_wise, // the first of these
};

// Bytes that are copied from one place to another before the walk or after it.
struct Move {
    std::uintptr_t to, from;
    std::int64_t bytes;
};

template <class Real> struct Program {
    long T, B, N, R;
    bool back;                      // whether this is a sweep
    bool overlaps;                  // of a sweep: whether rows of several columns add up
    long places, count, once;       // instructions, of which the first `once` have no rows
    long row_values;                // values of a tile's memory for each row
    double work;                    // multiplications of a row and step, roughly
    const Place *place;             // [places]
    const Instruction *code;        // [count]
    const std::uintptr_t *outside;  // [places] addresses, of the caller's
    const std::uintptr_t *arriving; // [places] of an adjoint: rows with which columns begin, or 0
    const std::uintptr_t *leaving;  // [places] of `back`: [N, width] what leaves each column, or 0
    const std::uint8_t *resets;     // [T, B] or null
    const Real *edge_factors;       // [T, B] or null
    const std::int64_t *columns;    // [6, N] as in Sweep
    const Move *moves;              // [before + after]
    long before, after;
};

template <class Real> struct Programs {
    long (*bytes)(const Program<Real> &, int workers, Split);
    void (*run)(const Program<Real> &, void *scratch, const Worker &);
    // The element-wise operation `op` of n values, for tests: its operands are a, b, c.
    void (*apply)(long op, long modes, long n, Real *out, const Real *a, const Real *b, const Real *c);
};

struct Interpreter {
    Programs<float> single;
    Programs<double> twice;
    const char *const *operation_names; // ends with null
};

} // namespace bptt
