// The element-wise operations of the interpreter. A truth value is 1 or 0.
#pragma once

#include "functions.hpp"

namespace bptt::BPTT_VARIANT {

template <class T, class Mask> BPTT_INLINE Vec<T> truth(Mask mask) {
    return (Vec<T>)((UInts<T>)mask & (UInts<T>)broadcast(T(1)));
}

// Each is a type with the function `of` of a register for each operand. quick: whether a loop round it is too.
#define BPTT_OPERATION(name, operands, is_quick, parameters, ...)                                                      \
    struct name {                                                                                                      \
        static constexpr int arity = operands;                                                                         \
        static constexpr bool quick = is_quick;                                                                        \
        template <class T> static BPTT_INLINE Vec<T> of parameters { return __VA_ARGS__; }                             \
    };
#define BPTT_1(name, quick, ...) BPTT_OPERATION(name, 1, quick, (Vec<T> a), __VA_ARGS__)
#define BPTT_2(name, ...) BPTT_OPERATION(name, 2, true, (Vec<T> a, Vec<T> b), __VA_ARGS__)
#define BPTT_3(name, ...) BPTT_OPERATION(name, 3, true, (Vec<T> a, Vec<T> b, Vec<T> c), __VA_ARGS__)

BPTT_1(Same, true, a)
BPTT_1(Neg, true, -a)
BPTT_1(Abs, true, absolute<T>(a))
BPTT_1(Sign, true, truth<T>(a > Vec<T>{}) - truth<T>(a < Vec<T>{}))
BPTT_1(Exp, false, exponential<T>(a))
BPTT_1(Expm1, false, exponential_minus_1<T>(a))
BPTT_1(Log, false, logarithm<T>(a))
BPTT_1(Log1p, false, logarithm_of_1_plus<T>(a))
BPTT_1(Tanh, false, tanh<T>(a))
BPTT_1(Sigmoid, false, sigmoid<T>(a))
BPTT_1(Sin, false, wave<false, T>(a))
BPTT_1(Cos, false, wave<true, T>(a))
BPTT_1(Erf, false, error_function<T>(a))
BPTT_1(Sqrt, false, root<T>(a))
BPTT_1(Rsqrt, false, T(1) / root<T>(a))
BPTT_1(Reciprocal, false, T(1) / a)
BPTT_1(Relu, true, a < Vec<T>{} ? Vec<T>{} : a) // NaN stays NaN
BPTT_1(Floor, true, floored<T>(a))
BPTT_1(Square, true, a *a)
BPTT_1(Not, true, truth<T>(a == Vec<T>{}))
BPTT_1(Truth, true, truth<T>(a != Vec<T>{}))
BPTT_2(Add, a + b)
BPTT_2(Sub, a - b)
BPTT_2(Mul, a *b)
BPTT_2(Div, a / b)
BPTT_2(Maximum, ((a > b) | (a != a)) ? a : b) // NaN if either is
BPTT_2(Minimum, ((a < b) | (a != a)) ? a : b)
BPTT_2(Eq, truth<T>(a == b))
BPTT_2(Ne, truth<T>(a != b))
BPTT_2(Lt, truth<T>(a < b))
BPTT_2(Le, truth<T>(a <= b))
BPTT_2(Gt, truth<T>(a > b))
BPTT_2(Ge, truth<T>(a >= b))
BPTT_2(And, truth<T>((a != Vec<T>{}) & (b != Vec<T>{})))
BPTT_2(Or, truth<T>((a != Vec<T>{}) | (b != Vec<T>{})))
BPTT_2(Xor, truth<T>((a != Vec<T>{}) ^ (b != Vec<T>{})))
BPTT_2(TanhBackward, a *(T(1) - b * b))
BPTT_2(SigmoidBackward, a *(b *(T(1) - b)))
BPTT_2(Pow, exponential<T>(logarithm<T>(a) * b))
BPTT_3(Where, a != Vec<T>{} ? b : c)
BPTT_3(MulAdd, a *b + c)
BPTT_3(MulSub, a *b - c)
BPTT_3(SubMul, c - a * b)

#undef BPTT_OPERATION
#undef BPTT_1
#undef BPTT_2
#undef BPTT_3

// out[r][i] = f(a[r][i], b[r][i], c[r][i]), rows r at distances o, as, bs, cs; where bit j of `modes` is set, operand j
// is the same for all i.
template <class T, class F, int modes>
void each(long rows, long n, T *out, long o, const T *a, long as, const T *b, long bs, const T *c, long cs) {
    constexpr int L = lanes<T>;
    for (; rows > 0; --rows, out += o, a += as, b += bs, c += cs) {
        const Vec<T> x = modes & 1 ? broadcast(*a) : Vec<T>{};
        const Vec<T> y = F::arity > 1 && modes & 2 ? broadcast(*b) : Vec<T>{};
        const Vec<T> z = F::arity > 2 && modes & 4 ? broadcast(*c) : Vec<T>{};
        const auto one = [&](auto read) __attribute__((always_inline)) {
            const Vec<T> p = modes & 1 ? x : read(a);
            if constexpr (F::arity == 1) {
                return F::template of<T>(p);
            } else {
                const Vec<T> q = modes & 2 ? y : read(b);
                if constexpr (F::arity == 2)
                    return F::template of<T>(p, q);
                else
                    return F::template of<T>(p, q, modes & 4 ? z : read(c));
            }
        };
        long i = 0;
        if constexpr (F::quick)
            for (; i + L <= n; i += L)
                store(out + i, one([&](const T *p) __attribute__((always_inline)) { return load(p + i); }));
        for (; i < n; i += L) {
            const int count = (int)(n - i < L ? n - i : L);
            store(out + i, one([&](const T *p) __attribute__((always_inline)) { return load(p + i, count); }), count);
        }
    }
}

template <class T>
using Each = void (*)(long rows, long n, T *out, long o, const T *a, long as, const T *b, long bs, const T *c, long cs);

template <class T> struct Operation {
    const char *name;
    Each<T> each[8]; // by modes
};

template <class T, class F> constexpr Operation<T> operation(const char *name) {
    if constexpr (F::arity == 1)
        return {name, {each<T, F, 0>, each<T, F, 1>}};
    else if constexpr (F::arity == 2)
        return {name, {each<T, F, 0>, each<T, F, 1>, each<T, F, 2>, each<T, F, 3>}};
    else
        return {name,
                {each<T, F, 0>, each<T, F, 1>, each<T, F, 2>, each<T, F, 3>, each<T, F, 4>, each<T, F, 5>,
                 each<T, F, 6>, each<T, F, 7>}};
}

template <class T>
constexpr Operation<T> operations[] = {
    operation<T, Same>("same"),
    operation<T, Neg>("neg"),
    operation<T, Abs>("abs"),
    operation<T, Sign>("sign"),
    operation<T, Exp>("exp"),
    operation<T, Expm1>("expm1"),
    operation<T, Log>("log"),
    operation<T, Log1p>("log1p"),
    operation<T, Tanh>("tanh"),
    operation<T, Sigmoid>("sigmoid"),
    operation<T, Sin>("sin"),
    operation<T, Cos>("cos"),
    operation<T, Erf>("erf"),
    operation<T, Sqrt>("sqrt"),
    operation<T, Rsqrt>("rsqrt"),
    operation<T, Reciprocal>("reciprocal"),
    operation<T, Relu>("relu"),
    operation<T, Floor>("floor"),
    operation<T, Square>("square"),
    operation<T, Not>("not"),
    operation<T, Truth>("truth"),
    operation<T, Add>("add"),
    operation<T, Sub>("sub"),
    operation<T, Mul>("mul"),
    operation<T, Div>("div"),
    operation<T, Maximum>("maximum"),
    operation<T, Minimum>("minimum"),
    operation<T, Eq>("eq"),
    operation<T, Ne>("ne"),
    operation<T, Lt>("lt"),
    operation<T, Le>("le"),
    operation<T, Gt>("gt"),
    operation<T, Ge>("ge"),
    operation<T, And>("and"),
    operation<T, Or>("or"),
    operation<T, Xor>("xor"),
    operation<T, TanhBackward>("tanh_backward"),
    operation<T, SigmoidBackward>("sigmoid_backward"),
    operation<T, Pow>("pow"),
    operation<T, Where>("where"),
    operation<T, MulAdd>("mul_add"),
    operation<T, MulSub>("mul_sub"),
    operation<T, SubMul>("sub_mul"),
};

} // namespace bptt::BPTT_VARIANT
