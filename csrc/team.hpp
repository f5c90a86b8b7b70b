// The threads of one call.
#pragma once

#include "walks.hpp"

#include <functional>

namespace bptt {

// Runs work(worker) on `count` threads, the caller's among them, or on fewer where fewer are to be had.
//
// They are the threads of the OpenMP runtime that torch has already loaded, if there is one: threads of our own would
// share the cores with its threads, which spin for a while after each of torch's products. In a forked child, whose
// runtime may wait for threads that were not copied, the caller works alone.
void run(int count, Split split, const std::function<void(const Worker &)> &work);

// Work for so many threads that share it in one way.
struct Shared {
    int threads;
    Split split;
    std::function<void(const Worker &)> work;
};

// Runs two pieces of work, which do not wait for each other, at the same time on threads of their own, or one after the
// other where there is one thread.
void run_both(const Shared &first, const Shared &second);

} // namespace bptt
