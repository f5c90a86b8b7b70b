// The walks as functions of Python: pointers and sizes in, nothing out. Who calls them (kernels/cpu.py) has checked
// shapes, strides and types, and keeps the tensors alive.
#include "team.hpp"
#include "variants.hpp"
#include "walks.hpp"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

namespace nb = nanobind;
using Address = std::uintptr_t;

namespace bptt {
namespace {

const Variant *const variants[] = {
#ifdef BPTT_X86
    &avx512::variant,
    &avx2::variant,
#endif
    &portable::variant,
};

constexpr int variant_count = sizeof variants / sizeof variants[0];

template <class Real> const Walks<Real> &walks_of(int variant) {
    if (variant < 0 || variant >= variant_count || !variants[variant]->runs())
        throw nb::value_error("variant must be the place of one in variants() that runs on this machine");
    if constexpr (sizeof(Real) == 4)
        return variants[variant]->single;
    else
        return variants[variant]->twice;
}

template <class V> V *at(Address address) { return reinterpret_cast<V *>(address); }

struct Plan {
    int threads;
    Split split;
};

// How many threads are worth it, and what they share: `work` is the multiplications of one row and step.
Plan plan(int threads, long rows, long steps, double work, long weight_bytes) {
    constexpr double least_work = 2e5;       // of a thread: what starting it costs, about 5 us
    constexpr double least_step = 5e4;       // of a step, where every step has a barrier of about 0.3 us
    constexpr long near_bytes = 1024 * 1024; // weights beyond that are read from far for every group of rows
    if (threads <= 1 || rows < 1 || rows * steps * work < threads * least_work) return {1, Split::rows};
    if (rows >= threads * (weight_bytes > near_bytes ? 16 : 4)) return {threads, Split::rows};
    if (rows * work >= least_step) return {threads, Split::panels};
    return {static_cast<int>(rows < threads ? rows : threads), Split::rows};
}

// Multiplications of a row and step.
template <class Arguments> double work(const Arguments &a) {
    return double(gates_of(a.cell) * a.H) * double(a.P) + (a.w_hr ? double(a.H) * double(a.P) : 0);
}

template <class Arguments> long weight_bytes(const Arguments &a) {
    return gates_of(a.cell) * a.H * a.P * long(sizeof *a.w_hh);
}

struct Free {
    void operator()(void *p) const { std::free(p); }
};

// Runs a walk on its threads with the scratch memory it asks for.
template <class Arguments>
void walk(const Arguments &a, const Plan &plan, long (*bytes)(const Arguments &, int, Split),
          void (*function)(const Arguments &, void *, const Worker &)) {
    long size = 64;
    for (int workers = 1; workers <= plan.threads; ++workers) { // fewer may come than asked for
        const long needed = bytes(a, workers, plan.split);
        if (needed > size) size = needed;
    }
    const std::unique_ptr<void, Free> scratch(std::aligned_alloc(64, (size + 63) / 64 * 64));
    if (!scratch) throw std::bad_alloc();
    run(plan.threads, plan.split, [&](const Worker &worker) { function(a, scratch.get(), worker); });
}

template <class Real>
void forward(int variant, int cell, long T, long B, long I, long H, long P, long reset_h_step, long reset_c_step,
             long stride, bool keeps, Address lane, Address active, Address gates, Address x, Address w_ih, Address h_0,
             Address c_0, Address resets, Address reset_h, Address reset_c, Address w_hh, Address b_ih, Address b_hh,
             Address w_hr, Address h, Address c, int threads) {
    const Walks<Real> &walks = walks_of<Real>(variant);
    const Forward<Real> a{.cell = static_cast<Cell>(cell),
                          .T = T,
                          .B = B,
                          .I = I,
                          .H = H,
                          .P = P,
                          .reset_h_step = reset_h_step,
                          .reset_c_step = reset_c_step,
                          .stride = stride,
                          .keeps = keeps,
                          .lane = at<const std::int64_t>(lane),
                          .active = at<const std::int64_t>(active),
                          .gates = at<Real>(gates),
                          .x = at<const Real>(x),
                          .w_ih = at<const Real>(w_ih),
                          .h_0 = at<const Real>(h_0),
                          .c_0 = at<const Real>(c_0),
                          .resets = at<const std::uint8_t>(resets),
                          .reset_h = at<const Real>(reset_h),
                          .reset_c = at<const Real>(reset_c),
                          .w_hh = at<const Real>(w_hh),
                          .b_ih = at<const Real>(b_ih),
                          .b_hh = at<const Real>(b_hh),
                          .w_hr = at<const Real>(w_hr),
                          .h = at<Real>(h),
                          .c = at<Real>(c)};
    walk(a, plan(threads, B, T, work(a), weight_bytes(a)), walks.forward_bytes, walks.forward);
}

// Stage 1 of a small layer of which only y [T, B, P] and the final state are wanted: what lies between is kept here.
template <class Real>
void infer(int variant, int cell, long T, long B, long I, long H, long P, Address x, Address w_ih, Address h_0,
           Address c_0, Address w_hh, Address b_ih, Address b_hh, Address w_hr, Address y, Address h_n, Address c_n,
           int threads) {
    const Walks<Real> &walks = walks_of<Real>(variant);
    const Cell kind = static_cast<Cell>(cell);
    const bool gated = gates_of(kind) > 1;
    const long states = (T + 1) * B * P, cells = c_0 ? (T + 1) * B * H : 0;
    const long gates = gated ? T * B * gates_of(kind) * H : 0;
    const std::unique_ptr<Real, Free> values(static_cast<Real *>(std::malloc((states + cells + gates) * sizeof(Real))));
    if (!values) throw std::bad_alloc();
    Real *const h = values.get(), *const c = h + states;
    const Forward<Real> a{.cell = kind,
                          .T = T,
                          .B = B,
                          .I = I,
                          .H = H,
                          .P = P,
                          .reset_h_step = 0,
                          .reset_c_step = 0,
                          .stride = gates_of(kind) * H,
                          .keeps = false,
                          .lane = nullptr,
                          .active = nullptr,
                          .gates = gated ? c + cells : h + B * H,
                          .x = at<const Real>(x),
                          .w_ih = at<const Real>(w_ih),
                          .h_0 = at<const Real>(h_0),
                          .c_0 = at<const Real>(c_0),
                          .resets = nullptr,
                          .reset_h = nullptr,
                          .reset_c = nullptr,
                          .w_hh = at<const Real>(w_hh),
                          .b_ih = at<const Real>(b_ih),
                          .b_hh = at<const Real>(b_hh),
                          .w_hr = at<const Real>(w_hr),
                          .h = h,
                          .c = c_0 ? c : nullptr};
    walk(a, plan(threads, B, T, work(a), weight_bytes(a)), walks.forward_bytes, walks.forward);
    std::copy_n(h + B * P, T * B * P, at<Real>(y));
    std::copy_n(h + T * B * P, B * P, at<Real>(h_n));
    if (c_0) std::copy_n(c + T * B * H, B * H, at<Real>(c_n));
}

template <class Real>
void sweep(int variant, int cell, long T, long B, long I, long H, long P, long N, long R, long reset_h_step,
           long reset_c_step, long error_stride, bool framed, bool overlaps, Address columns, Address counts,
           Address gates, Address h, Address c, Address resets, Address reset_h, Address reset_c, Address errors,
           Address arriving_h, Address arriving_c, Address edge_factors, Address w_hh, Address w_hr, Address da,
           Address adjoint, Address adjoint_c, Address bias, Address initial_h, Address initial_c, Address x,
           Address w_ih, Address dx, Address dw_ih, Address dw_hh, int threads) {
    if (N == 0) return;
    const Walks<Real> &walks = walks_of<Real>(variant);
    const std::int64_t *column = at<const std::int64_t>(columns), *count = at<const std::int64_t>(counts);
    const Sweep<Real> a{.cell = static_cast<Cell>(cell),
                        .T = T,
                        .B = B,
                        .I = I,
                        .H = H,
                        .P = P,
                        .N = N,
                        .R = R,
                        .reset_h_step = reset_h_step,
                        .reset_c_step = reset_c_step,
                        .error_stride = error_stride,
                        .framed = framed,
                        .overlaps = overlaps,
                        .top = column,
                        .lane = column + N,
                        .length = column + 2 * N,
                        .slot = column + 3 * N,
                        .own = column + 4 * N,
                        .arrives = column + 5 * N,
                        .active = count,
                        .leaving = count + R + 1,
                        .gates = at<const Real>(gates),
                        .h = at<const Real>(h),
                        .c = at<const Real>(c),
                        .resets = at<const std::uint8_t>(resets),
                        .reset_h = at<const Real>(reset_h),
                        .reset_c = at<const Real>(reset_c),
                        .errors = at<const Real>(errors),
                        .arriving_h = at<const Real>(arriving_h),
                        .arriving_c = at<const Real>(arriving_c),
                        .edge_factors = at<const Real>(edge_factors),
                        .w_hh = at<const Real>(w_hh),
                        .w_hr = at<const Real>(w_hr),
                        .da = at<Real>(da),
                        .adjoint = at<Real>(adjoint),
                        .adjoint_c = at<Real>(adjoint_c),
                        .bias = at<Real>(bias),
                        .initial_h = at<Real>(initial_h),
                        .initial_c = at<Real>(initial_c),
                        .x = at<const Real>(x),
                        .w_ih = at<const Real>(w_ih),
                        .dx = at<Real>(dx),
                        .dw_ih = at<Real>(dw_ih),
                        .dw_hh = at<Real>(dw_hh)};
    walk(a, plan(threads, N, R, work(a), weight_bytes(a)), walks.sweep_bytes, walks.sweep);
}

template <class Real> void apply(int variant, int cell, long n, Address x, Address y) {
    walks_of<Real>(variant).apply(static_cast<Cell>(cell), n, at<const Real>(x), at<Real>(y));
}

std::vector<std::pair<std::string, bool>> names() {
    std::vector<std::pair<std::string, bool>> result;
    for (const Variant *variant : variants) result.emplace_back(variant->name, variant->runs());
    return result;
}

} // namespace
} // namespace bptt

NB_MODULE(_walks, module) {
    using namespace bptt;
    using Released = nb::call_guard<nb::gil_scoped_release>;
    module.def("forward_float32", forward<float>, Released());
    module.def("forward_float64", forward<double>, Released());
    module.def("infer_float32", infer<float>, Released());
    module.def("infer_float64", infer<double>, Released());
    module.def("sweep_float32", sweep<float>, Released());
    module.def("sweep_float64", sweep<double>, Released());
    module.def("apply_float32", apply<float>, Released());
    module.def("apply_float64", apply<double>, Released());
    module.def("variants", names, "(name, whether this machine runs it), the widest first");
}
