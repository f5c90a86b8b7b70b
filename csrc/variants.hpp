// The variants this build has, the widest first.
#pragma once

#include "walks.hpp"

namespace bptt {

#define BPTT_DECLARE(name)                                                                                             \
    namespace name {                                                                                                   \
    extern const Variant variant;                                                                                      \
    }
#ifdef BPTT_X86
BPTT_DECLARE(avx512)
BPTT_DECLARE(avx2)
#endif
BPTT_DECLARE(portable)
#undef BPTT_DECLARE

} // namespace bptt
