// Scratch memory of a call.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

namespace bptt {

struct Free {
    void operator()(void *p) const { std::free(p); }
};

// Scratch memory of at least so many bytes, of the calling thread. What a small call needs it keeps for the next one:
// malloc gives back such a piece at once and has to make it again. A call has one piece of each purpose at a time.
template <int purpose> class ScratchMemoryFor {
  public:
    explicit ScratchMemoryFor(long size) {
        static thread_local std::unique_ptr<void, Free> kept;
        static thread_local long kept_size = 0;
        if (size > most_kept) {
            own.reset(std::aligned_alloc(64, (size + 63) / 64 * 64));
            memory = own.get();
        } else {
            if (size > kept_size) {
                kept_size = 0;
                kept.reset(); // before the larger one is there
                kept.reset(std::aligned_alloc(64, (size + 63) / 64 * 64));
                kept_size = kept ? size : 0;
            }
            memory = kept.get();
        }
        if (!memory) throw std::bad_alloc();
    }
    void *get() const { return memory; }

  private:
    static constexpr long most_kept = 512 * 1024;
    std::unique_ptr<void, Free> own;
    void *memory;
};

using ScratchMemory = ScratchMemoryFor<0>;   // of walks
using ConvertedMemory = ScratchMemoryFor<1>; // for the values of a call in the type that it is computed in
using InferredMemory = ScratchMemoryFor<2>;  // for what lies between the inputs and outputs of a call

} // namespace bptt
