// The compiled code of one variant, by its place in the list of all.
#pragma once

#include "variants.hpp"

#include <nanobind/nanobind.h>

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

const Interpreter *const interpreters[] = {
#ifdef BPTT_X86
    &avx512::interpreter,
    &avx2::interpreter,
#endif
    &portable::interpreter,
};

void check_variant(int variant) {
    if (variant < 0 || variant >= variant_count || !variants[variant]->runs())
        throw nanobind::value_error("variant must be the place of one in variants() that runs on this machine");
}

template <class Stored> const Walks<Stored> &walks_of(int variant) {
    check_variant(variant);
    if constexpr (sizeof(Stored) == 2)
        return variants[variant]->half;
    else if constexpr (sizeof(Stored) == 4)
        return variants[variant]->single;
    else
        return variants[variant]->twice;
}

template <class Real> const Programs<Real> &programs_of(int variant) {
    check_variant(variant);
    if constexpr (sizeof(Real) == 4)
        return interpreters[variant]->single;
    else
        return interpreters[variant]->twice;
}

} // namespace
} // namespace bptt
