// The walks for one instruction set: compiled once per variant, with that variant's flags.
#include "forward.hpp"
#include "sweep.hpp"

namespace bptt::BPTT_VARIANT {

namespace {

bool runs() {
#if BPTT_BYTES == 64
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
#elif BPTT_BYTES == 32
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return true;
#endif
}

template <Cell f, class T> void apply_one(long n, const T *x, T *y) {
    for (long i = 0; i < n; i += lanes<T>) {
        const int count = (int)least(n - i, lanes<T>);
        store(y + i, activate<f, T>(load(x + i, count)), count);
    }
}

template <class T> void apply(Cell f, long n, const T *x, T *y) {
    if (f == Cell::tanh) return apply_one<Cell::tanh>(n, x, y);
    if (f == Cell::sigmoid) return apply_one<Cell::sigmoid>(n, x, y);
    if (f == Cell::relu) return apply_one<Cell::relu>(n, x, y);
    apply_one<Cell::identity>(n, x, y);
}

template <class From, class To> void convert(const From *from, long count, To *to) { copy(from, count, to); }

template <class S>
constexpr Walks<S> walks{forward_bytes<S>,     forward<S>,  sweep_bytes<S>,   sweep<S>,
                         row_sums_bytes<S>,    row_sums<S>, apply<RealOf<S>>, convert<S, RealOf<S>>,
                         convert<RealOf<S>, S>};

} // namespace

#define BPTT_TEXT_(x) #x
#define BPTT_TEXT(x) BPTT_TEXT_(x)

extern const Variant variant;
const Variant variant{BPTT_TEXT(BPTT_VARIANT), runs, walks<float>, walks<double>, walks<Bfloat16>};

} // namespace bptt::BPTT_VARIANT
