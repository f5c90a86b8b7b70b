// The walks as classes of Python, whose fields are pointers and sizes. Who sets them (kernels/compiled_forward.py and
// compiled_sweep.py) has checked shapes, strides and types, and keeps the tensors alive.
#include "bound.hpp"
#include "converted.hpp"
#include "fields.hpp"
#include "memory.hpp"
#include "selected.hpp"
#include "team.hpp"
#include "walks.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <tuple>
#include <utility>

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

namespace nb = nanobind;
using Address = std::uintptr_t;
using Released = nb::call_guard<nb::gil_scoped_release>;

namespace bptt {
namespace {

template <class V> V *at(Address address) { return reinterpret_cast<V *>(address); }

struct Division {
    int threads;
    Split split;
};

// Multiplications of a step from which on it is shared, where every step has a barrier of about 0.3 us.
constexpr double least_step = 5e4;

// Multiplications that a thread must have: what starting it costs, about 5 us.
constexpr double least_work = 2e5;

// How many threads are worth it, and what they share: `work` is the multiplications of one row and step.
Division division(int threads, long rows, long steps, double work, long weight_bytes) {
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

// A walk, its threads and the scratch memory it asks for.
template <class Arguments> struct Walk {
    Arguments a;
    Division divided;
    long (*bytes)(const Arguments &, int, Split);
    void (*function)(const Arguments &, void *, const Worker &);
    long own = 0; // bytes before what it asks for, which `place` puts to use
    void (*place)(Arguments &, void *) = nullptr;

    long size() const {
        long most = 64;
        for (int workers = 1; workers <= divided.threads; ++workers) // fewer may come than asked for
            most = std::max(most, bytes(a, workers, divided.split));
        return lines(own) + lines(most);
    }

    // What its threads do, with memory of that size.
    Shared on(void *memory) {
        if (place) place(a, memory);
        void *const scratch = static_cast<char *>(memory) + lines(own);
        return {divided.threads, divided.split,
                [this, scratch](const Worker &worker) { function(a, scratch, worker); }};
    }

  private:
    static long lines(long count) { return (count + 63) / 64 * 64; }
};

template <class Arguments> void run(Walk<Arguments> walk) {
    const ScratchMemory memory(walk.size());
    const Shared shared = walk.on(memory.get());
    run(shared.threads, shared.split, shared.work);
}

// Runs two walks at the same time.
template <class Arguments> void run_both(Walk<Arguments> first, Walk<Arguments> second) {
    const long size = first.size();
    const ScratchMemory memory(size + second.size());
    run_both(first.on(memory.get()), second.on(static_cast<char *>(memory.get()) + size));
}

// How many of the threads each of two walks has while both walk at the same time; 0 where that is not worth it. work:
// the multiplications of each.
int threads_of_each(int threads, double work) { return work < least_work ? 0 : threads / 2; }

template <class Stored> Walk<Forward<Stored>> prepared(int variant, const Forward<Stored> &a, int threads) {
    const Walks<Stored> &walks = walks_of<Stored>(variant);
    return {a, division(threads, a.B, a.T, work(a), weight_bytes(a)), walks.forward_bytes, walks.forward};
}

// The last states, and those of all steps once more, where they are wanted.
template <class Stored> void put_outputs(const Forward<Stored> &a) {
    const long last = a.state_after(a.reverse ? 0 : (a.T - 1) * a.B);
    if (a.y) std::copy_n(a.h + a.state_after(0) * a.P, a.T * a.B * a.P, a.y);
    if (a.h_n) std::copy_n(a.h + last * a.P, a.B * a.P, a.h_n);
    if (a.c_n) std::copy_n(a.c + last * a.H, a.B * a.H, a.c_n);
}

template <class Stored> void forward(int variant, Forward<Stored> a, int threads) {
    run(prepared(variant, a, threads));
    put_outputs(a);
}

template <class Stored>
void forward_both(int variant, const Forward<Stored> &a, const Forward<Stored> &b, int threads) {
    const int each = threads_of_each(threads, double(a.rows()) * work(a));
    if (each == 0) return forward(variant, a, threads), forward(variant, b, threads);
    run_both(prepared(variant, a, each), prepared(variant, b, each));
    put_outputs(a);
    put_outputs(b);
}

// Stage 1 of which only the outputs are wanted: the states are those, and what else lies between is kept here.
template <class Real> void infer(int variant, Infer<Real> a, int threads) {
    const auto lines = [](long count) { return (count * long(sizeof(Real)) + 63) / 64 * 64; };
    const bool gated = gates_of(a.cell) > 1;
    const long cells = lines(a.c_0 ? (a.T + 1) * a.B * a.H : 0);
    const long gates = lines(gated ? a.T * a.B * gates_of(a.cell) * a.H : 0);
    const InferredMemory values(cells + gates + 1); // of one that needs none, too
    a.h = std::exchange(a.y, nullptr) - a.state_after(0) * a.P;
    a.initial_apart = true;
    a.c = a.c_0 ? static_cast<Real *>(values.get()) : nullptr;
    a.gates =
        gated ? reinterpret_cast<Real *>(static_cast<char *>(values.get()) + cells) : a.h + a.state_after(0) * a.P;
    a.stride = gates_of(a.cell) * a.H;
    forward<Real>(variant, a, threads);
}

template <class Stored> Walk<Sweep<Stored>> prepared(int variant, const Sweep<Stored> &a, int threads) {
    const Walks<Stored> &walks = walks_of<Stored>(variant);
    const long width = (a.cell == Cell::gru ? 4 : gates_of(a.cell)) * a.H;
    Division divided = division(threads, a.N, a.R, work(a), weight_bytes(a));
    if (a.sums && divided.split == Split::rows && divided.threads > a.B) // the columns of a lane stay together
        divided = a.N * work(a) >= least_step ? Division{divided.threads, Split::panels} : Division{1, Split::rows};
    Walk<Sweep<Stored>> walk{a, divided, walks.sweep_bytes, walks.sweep};
    if (!a.da && !a.sums) {
        walk.own = a.rows() * width * long(sizeof(Stored));
        walk.place = [](Sweep<Stored> &b, void *memory) { b.da = static_cast<Stored *>(memory); };
    }
    return walk;
}

template <class Stored> void sweep(int variant, const Sweep<Stored> &a, int threads) {
    if (a.N > 0) run(prepared(variant, a, threads));
}

template <class Stored> void sweep_both(int variant, const Sweep<Stored> &a, const Sweep<Stored> &b, int threads) {
    const int each = threads_of_each(threads, double(a.N) * double(a.R) * work(a));
    if (each == 0 || a.N == 0 || b.N == 0) return sweep(variant, a, threads), sweep(variant, b, threads);
    run_both(prepared(variant, a, each), prepared(variant, b, each));
}

void whole_forward(int variant, const Whole<Forward<Bfloat16>> &given, int threads) {
    Converted values(walks_of<Bfloat16>(variant));
    Forward<float> a{};
    const ConvertedMemory memory(converted(given, a, values));
    values.place(memory.get());
    if (!a.gates) a.gates = a.h + a.state_after(0) * a.P;
    run(prepared(variant, a, threads));
    put_converted(given, a, values);
}

void whole_sweep(int variant, const Whole<Sweep<Bfloat16>> &given, int threads) {
    Converted values(walks_of<Bfloat16>(variant));
    Sweep<float> a{};
    const ConvertedMemory memory(converted(given, a, values));
    values.place(memory.get());
    sweep<float>(variant, a, threads);
    values.put();
}

template <class Stored> void row_sums(int variant, const RowSums<Stored> &a, int threads) {
    const Walks<Stored> &walks = walks_of<Stored>(variant);
    Division divided = division(threads, a.M, a.N, double(a.K + a.K2), 0);
    divided.split = Split::rows;
    run(Walk<RowSums<Stored>>{a, divided, walks.row_sums_bytes, walks.row_sums});
}

void copy(const Move *moves, long count) {
    for (const Move *move = moves; move != moves + count; ++move)
        std::memcpy(at<void>(move->to), at<const void>(move->from), move->bytes);
}

template <class Real> void program(int variant, Program<Real> a, int threads) {
    const Programs<Real> &programs = programs_of<Real>(variant);
    const long rows = a.back ? a.N : a.B, apart = a.overlaps && a.B < rows ? a.B : rows; // rows of a lane stay together
    Division divided = division(threads, rows, a.back ? a.R : a.T, a.work, 0);
    divided.split = Split::rows;
    if (divided.threads > apart) divided.threads = apart < 1 ? 1 : static_cast<int>(apart);
    copy(a.moves, a.before);
    run(Walk<Program<Real>>{a, divided, programs.bytes, programs.run});
    copy(a.moves + a.before, a.after);
}

// What Python gives for a value of a type: a pointer is an address, a cell its number.
template <class V> struct Given {
    using Type = V;
    static V value(V v) { return v; }
};
template <class V> struct Given<V *> {
    using Type = Address;
    static V *value(Address address) { return at<V>(address); }
};
template <> struct Given<Cell> {
    using Type = int;
    static Cell value(int number) { return static_cast<Cell>(number); }
};

// A class of Python with these fields, to be set one by one, and functions that run the walk, or two of them at the
// same time.
template <class Struct, auto run, auto run_beside = nullptr> void define(nb::module_ &module, const char *name) {
    nb::class_<Struct> defined(module, name);
    defined.def(nb::init<>());
    defined.def("copy", [](const Struct &a) { return a; });
    const auto writable = [&]<class S, class V>(const Field<S, V> &field) {
        defined.def_prop_rw(field.name, nullptr, [member = field.member](Struct &a, typename Given<V>::Type given) {
            a.*member = Given<V>::value(given);
        });
    };
    std::apply([&](const auto &...field) { (writable(field), ...); }, Fields<Struct>::all);
    defined.def(
        "run", [](const Struct &a, int variant, int threads) { run(variant, a, threads); }, nb::kw_only(),
        nb::arg("variant"), nb::arg("threads"), Released());
    if constexpr (run_beside != nullptr)
        defined.def(
            "run_beside",
            [](const Struct &a, const Struct &b, int variant, int threads) { run_beside(variant, a, b, threads); },
            nb::arg("other"), nb::kw_only(), nb::arg("variant"), nb::arg("threads"), Released());
}

template <class Real> void define_bound(nb::module_ &module, const char *name) {
    using Numbers = typename Bound<Real>::Numbers;
    nb::class_<Bound<Real>>(module, name)
        .def(nb::init<const Program<Real> &, Numbers, Numbers, Numbers, long>(), nb::arg("program"),
             nb::arg("addresses"), nb::arg("parts"), nb::arg("moves"), nb::arg("before"))
        .def(
            "run",
            [](const Bound<Real> &bound, const std::vector<Address> &memories, int variant, int threads) {
                bound.run(memories, [&](const Program<Real> &call) { program<Real>(variant, call, threads); });
            },
            nb::arg("memories"), nb::arg("variant"), nb::arg("threads"), Released());
}

template <class Real> void apply(int variant, int cell, long n, Address x, Address y) {
    walks_of<Real>(variant).apply(static_cast<Cell>(cell), n, at<const Real>(x), at<Real>(y));
}

template <class Real>
void apply_operation(int variant, long op, long modes, long n, Address out, Address a, Address b, Address c) {
    programs_of<Real>(variant).apply(op, modes, n, at<Real>(out), at<const Real>(a), at<const Real>(b),
                                     at<const Real>(c));
}

// Where the values of tensors lie, 0 for None; None where one of them is not as it is said to be, or not dense on the
// CPU, and Python has to look. shapes: of each, None for one that is known. Called for every tensor of a small call.
nb::object places(nb::tuple tensors, nb::tuple shapes, nb::handle dtype) {
    static PyObject *const names[] = {PyUnicode_InternFromString("shape"),  PyUnicode_InternFromString("dtype"),
                                      PyUnicode_InternFromString("is_cpu"), PyUnicode_InternFromString("is_contiguous"),
                                      PyUnicode_InternFromString("is_neg"), PyUnicode_InternFromString("data_ptr")};
    const auto attribute = [](nb::handle of, int name) { return nb::steal(PyObject_GetAttr(of.ptr(), names[name])); };
    const auto call = [](nb::handle of, int name) {
        return nb::steal(PyObject_CallMethodObjArgs(of.ptr(), names[name], nullptr));
    };
    const auto count = static_cast<Py_ssize_t>(tensors.size());
    nb::object found = nb::steal(PyTuple_New(count));
    for (Py_ssize_t i = 0; found.is_valid() && i < count; ++i) {
        const nb::handle tensor = PyTuple_GetItem(tensors.ptr(), i), shape = PyTuple_GetItem(shapes.ptr(), i);
        nb::object address;
        if (tensor.is_none()) {
            address = nb::int_(0);
        } else {
            const nb::object own_shape = shape.is_none() ? nb::object() : attribute(tensor, 0);
            const bool fits = shape.is_none() || (own_shape.is_valid() &&
                                                  PyObject_RichCompareBool(own_shape.ptr(), shape.ptr(), Py_EQ) == 1);
            if (fits && attribute(tensor, 1).is(dtype) && attribute(tensor, 2).ptr() == Py_True &&
                call(tensor, 3).ptr() == Py_True && call(tensor, 4).ptr() == Py_False)
                address = call(tensor, 5); // 0 of a tensor that is zero without having memory
            if (!address.is_valid() || PyObject_IsTrue(address.ptr()) != 1) {
                PyErr_Clear();
                return nb::none();
            }
        }
        PyTuple_SetItem(found.ptr(), i, address.release().ptr());
    }
    return found;
}

bool intel() {
#ifdef BPTT_X86
    return __builtin_cpu_is("intel");
#else
    return false;
#endif
}

std::vector<std::string> operations() {
    std::vector<std::string> result;
    for (const char *const *name = portable::interpreter.operation_names; *name; ++name) result.emplace_back(*name);
    return result;
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
    nb::set_leak_warnings(false); // prepared walks and programs are kept until the process ends
    define<Forward<float>, forward<float>, forward_both<float>>(module, "ForwardFloat32");
    define<Forward<double>, forward<double>, forward_both<double>>(module, "ForwardFloat64");
    define<Forward<Bfloat16>, forward<Bfloat16>, forward_both<Bfloat16>>(module, "ForwardBfloat16");
    define<Whole<Forward<Bfloat16>>, whole_forward>(module, "ForwardBfloat16Whole");
    define<Infer<float>, infer<float>>(module, "InferFloat32");
    define<Infer<double>, infer<double>>(module, "InferFloat64");
    define<Sweep<float>, sweep<float>, sweep_both<float>>(module, "SweepFloat32");
    define<Sweep<double>, sweep<double>, sweep_both<double>>(module, "SweepFloat64");
    define<Sweep<Bfloat16>, sweep<Bfloat16>, sweep_both<Bfloat16>>(module, "SweepBfloat16");
    define<Whole<Sweep<Bfloat16>>, whole_sweep>(module, "SweepBfloat16Whole");
    define<RowSums<float>, row_sums<float>>(module, "RowSumsFloat32");
    define<RowSums<double>, row_sums<double>>(module, "RowSumsFloat64");
    define<RowSums<Bfloat16>, row_sums<Bfloat16>>(module, "RowSumsBfloat16");
    define<Program<float>, program<float>>(module, "ProgramFloat32");
    define<Program<double>, program<double>>(module, "ProgramFloat64");
    define_bound<float>(module, "BoundFloat32");
    define_bound<double>(module, "BoundFloat64");
    module.def("places", places, nb::arg("tensors"), nb::arg("shapes"), nb::arg("dtype"));
    module.def("apply_float32", apply<float>, Released());
    module.def("apply_float64", apply<double>, Released());
    module.def("apply_operation_float32", apply_operation<float>, Released());
    module.def("apply_operation_float64", apply_operation<double>, Released());
    module.def("operations", operations, "what an instruction of a program may do, by its number");
    module.def("intel", intel, "whether Intel made this machine's processor");
    module.def("variants", names, "(name, whether this machine runs it), the widest first");
}
