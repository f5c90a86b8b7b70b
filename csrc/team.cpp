#include "team.hpp"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#include <dlfcn.h>
#include <pthread.h>

namespace bptt {

// Counts arrivals; the last one opens the next round.
class Barrier {
  public:
    void wait(int count) {
        if (count == 1) return;
        const unsigned round = rounds.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
            arrived.store(0, std::memory_order_relaxed);
            rounds.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; rounds.load(std::memory_order_acquire) == round; ++spins) {
            if (spins < patience)
                pause();
            else
                std::this_thread::yield(); // the one we wait for may need this core
        }
    }

  private:
    static constexpr int patience = 4096;

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<unsigned> rounds{0};
};

void Worker::wait() const { barrier->wait(count); }

namespace {

using Work = std::function<void(const Worker &)>;

struct Job {
    Split split;
    const Work &work;
    Barrier barrier;
};

struct OpenMP {
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    int (*id)();
    int (*count)();
};

template <class F> F symbol(const char *name) { return reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name)); }

const OpenMP &openmp() {
    static const OpenMP found{symbol<decltype(OpenMP::parallel)>("GOMP_parallel"),
                              symbol<decltype(OpenMP::id)>("omp_get_thread_num"),
                              symbol<decltype(OpenMP::count)>("omp_get_num_threads")};
    return found;
}

std::atomic<bool> forked{false};
const bool watches = pthread_atfork(nullptr, nullptr, [] { forked.store(true); }) == 0;

void run_on_openmp(int count, Job &job) {
    openmp().parallel(
        [](void *data) {
            Job &shared = *static_cast<Job *>(data);
            shared.work(Worker{openmp().id(), openmp().count(), shared.split, &shared.barrier});
        },
        &job, static_cast<unsigned>(count), 0);
}

void run_on_own(int count, Job &job) {
    std::atomic<int> members{0}; // known once all threads that can be had have started
    std::vector<std::thread> threads;
    const auto member = [&](int id) {
        members.wait(0);
        job.work(Worker{id, members.load(), job.split, &job.barrier});
    };
    try {
        for (int id = 1; id < count; ++id) threads.emplace_back(member, id);
    } catch (const std::system_error &) { // no more threads to be had
    }
    members.store(static_cast<int>(threads.size()) + 1);
    members.notify_all();
    member(0);
    for (std::thread &thread : threads) thread.join();
}

} // namespace

void run(int count, Split split, const Work &work) {
    Job job{split, work, {}};
    if (count <= 1 || forked.load() || !watches)
        work(Worker{0, 1, split, &job.barrier});
    else if (openmp().parallel && openmp().id && openmp().count)
        run_on_openmp(count, job);
    else
        run_on_own(count, job);
}

void run_both(const Shared &first, const Shared &second) {
    Barrier barriers[2];
    const auto both = [&](const Worker &worker) {
        const int count = worker.count;
        if (count == 1) {
            first.work(Worker{0, 1, first.split, &barriers[0]});
            second.work(Worker{0, 1, second.split, &barriers[1]});
            return;
        }
        // Where fewer threads have come than were asked for, both pieces have fewer.
        const int of_first = std::max(1, std::min(first.threads, count / 2));
        const int of_second = std::min(second.threads, count - of_first), id = worker.id - of_first;
        if (id < 0)
            first.work(Worker{worker.id, of_first, first.split, &barriers[0]});
        else if (id < of_second)
            second.work(Worker{id, of_second, second.split, &barriers[1]});
    };
    run(first.threads + second.threads, Split::rows, both);
}

} // namespace bptt
