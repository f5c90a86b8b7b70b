// The interpreter for one instruction set: compiled once per variant, with that variant's flags.
#include "interpreter.hpp"

namespace bptt::BPTT_VARIANT {

namespace {

constexpr int structural = (int)Op::element_wise;
constexpr int element_wise = sizeof operations<float> / sizeof operations<float>[0];

struct Names {
    const char *names[structural + element_wise + 1];
};

constexpr Names all_names() {
    Names all{{"copy",   "product", "pack",   "small",    "solve",     "sum",      "mean",
               "amax",   "amin",    "cumsum", "cumprod",  "gather",    "scatter",  "scatter_add",
               "argmax", "argmin",  "order",  "add_rows", "add_outer", "convolve", "correlate"}};
    for (int i = 0; i < element_wise; ++i) all.names[structural + i] = operations<float>[i].name;
    return all;
}

constexpr Names names = all_names();

template <class T> void apply(long op, long modes, long n, T *out, const T *a, const T *b, const T *c) {
    operations<T>[op - structural].each[modes](1, n, out, 0, a, 0, b, 0, c, 0);
}

template <class T> constexpr Programs<T> programs{program_bytes<T>, program_run<T>, apply<T>};

} // namespace

extern const Interpreter interpreter;
const Interpreter interpreter{programs<float>, programs<double>, names.names};

} // namespace bptt::BPTT_VARIANT
