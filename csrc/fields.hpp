// The fields of what the kernels are asked, by the names under which Python sets them.
#pragma once

#include "program.hpp"
#include "walks.hpp"

#include <tuple>

namespace bptt {

// Stage 1 of which only the outputs are wanted: what lies between is kept by who runs it.
template <class Real> struct Infer : Forward<Real> {};

// A walk of a small call whose tensors are all stored as that type, whatever type the fields have: it converts them,
// computes from what it gets, and converts what comes of it.
template <class Walk> struct Whole : Walk {};

// A field that Python sets, by its name.
template <class S, class V> struct Field {
    const char *name;
    V S::*member;
};
template <class S, class V> constexpr Field<S, V> field(const char *name, V S::*member) { return {name, member}; }

// Each struct's fields, in any order; those that are not here, and those that are not set, are zero.
template <class Struct> struct Fields;

#define BPTT_FIELD(name) field(#name, &S::name)
template <class Stored> struct Fields<Forward<Stored>> {
    using S = Forward<Stored>;
    static constexpr auto all = std::make_tuple(
        BPTT_FIELD(cell), BPTT_FIELD(T), BPTT_FIELD(B), BPTT_FIELD(I), BPTT_FIELD(H), BPTT_FIELD(P),
        BPTT_FIELD(reset_h_step), BPTT_FIELD(reset_c_step), BPTT_FIELD(stride), BPTT_FIELD(keeps), BPTT_FIELD(lane),
        BPTT_FIELD(active), BPTT_FIELD(first), BPTT_FIELD(before), BPTT_FIELD(reverse), BPTT_FIELD(gates),
        BPTT_FIELD(x), BPTT_FIELD(w_ih), BPTT_FIELD(h_0), BPTT_FIELD(c_0), BPTT_FIELD(resets), BPTT_FIELD(reset_h),
        BPTT_FIELD(reset_c), BPTT_FIELD(w_hh), BPTT_FIELD(b_ih), BPTT_FIELD(b_hh), BPTT_FIELD(w_hr), BPTT_FIELD(h),
        BPTT_FIELD(c), BPTT_FIELD(y), BPTT_FIELD(h_n), BPTT_FIELD(c_n));
};

template <class Real> struct Fields<Infer<Real>> {
    using S = Infer<Real>;
    static constexpr auto all = std::make_tuple(
        BPTT_FIELD(cell), BPTT_FIELD(T), BPTT_FIELD(B), BPTT_FIELD(I), BPTT_FIELD(H), BPTT_FIELD(P), BPTT_FIELD(x),
        BPTT_FIELD(w_ih), BPTT_FIELD(h_0), BPTT_FIELD(c_0), BPTT_FIELD(w_hh), BPTT_FIELD(b_ih), BPTT_FIELD(b_hh),
        BPTT_FIELD(w_hr), BPTT_FIELD(resets), BPTT_FIELD(reverse), BPTT_FIELD(y), BPTT_FIELD(h_n), BPTT_FIELD(c_n));
};

template <class Stored> struct Fields<Sweep<Stored>> {
    using S = Sweep<Stored>;
    static constexpr auto all = std::make_tuple(
        BPTT_FIELD(cell), BPTT_FIELD(T), BPTT_FIELD(B), BPTT_FIELD(I), BPTT_FIELD(H), BPTT_FIELD(P), BPTT_FIELD(N),
        BPTT_FIELD(R), BPTT_FIELD(reset_h_step), BPTT_FIELD(reset_c_step), BPTT_FIELD(error_stride),
        BPTT_FIELD(errors_by_position), BPTT_FIELD(by_position), BPTT_FIELD(sums), BPTT_FIELD(columns),
        BPTT_FIELD(counts), BPTT_FIELD(tops), BPTT_FIELD(before), BPTT_FIELD(S), BPTT_FIELD(positions_turned),
        BPTT_FIELD(reverse), BPTT_FIELD(gates), BPTT_FIELD(h), BPTT_FIELD(c), BPTT_FIELD(resets), BPTT_FIELD(reset_h),
        BPTT_FIELD(reset_c), BPTT_FIELD(errors), BPTT_FIELD(arriving_h), BPTT_FIELD(arriving_c),
        BPTT_FIELD(edge_factors), BPTT_FIELD(w_hh), BPTT_FIELD(w_hr), BPTT_FIELD(da), BPTT_FIELD(adjoint_h),
        BPTT_FIELD(adjoint_c), BPTT_FIELD(db_ih), BPTT_FIELD(db_hh), BPTT_FIELD(leaving_h), BPTT_FIELD(leaving_c),
        BPTT_FIELD(x), BPTT_FIELD(w_ih), BPTT_FIELD(dx), BPTT_FIELD(dw_ih), BPTT_FIELD(dw_hh));
};

template <class Walk> struct Fields<Whole<Walk>> : Fields<Walk> {};

template <class Stored> struct Fields<RowSums<Stored>> {
    using S = RowSums<Stored>;
    static constexpr auto all = std::make_tuple(BPTT_FIELD(N), BPTT_FIELD(M), BPTT_FIELD(K), BPTT_FIELD(K2),
                                                BPTT_FIELD(inner), BPTT_FIELD(a_stride), BPTT_FIELD(b_stride),
                                                BPTT_FIELD(b2_stride), BPTT_FIELD(rows), BPTT_FIELD(a), BPTT_FIELD(b),
                                                BPTT_FIELD(b2), BPTT_FIELD(out), BPTT_FIELD(out2), BPTT_FIELD(sums));
};

template <class Real> struct Fields<Program<Real>> {
    using S = Program<Real>;
    static constexpr auto all = std::make_tuple(
        BPTT_FIELD(T), BPTT_FIELD(B), BPTT_FIELD(N), BPTT_FIELD(R), BPTT_FIELD(back), BPTT_FIELD(overlaps),
        BPTT_FIELD(places), BPTT_FIELD(count), BPTT_FIELD(once), BPTT_FIELD(row_values), BPTT_FIELD(work),
        BPTT_FIELD(place), BPTT_FIELD(code), BPTT_FIELD(outside), BPTT_FIELD(arriving), BPTT_FIELD(leaving),
        BPTT_FIELD(resets), BPTT_FIELD(edge_factors), BPTT_FIELD(columns), BPTT_FIELD(moves), BPTT_FIELD(before),
        BPTT_FIELD(after));
};
#undef BPTT_FIELD

} // namespace bptt
