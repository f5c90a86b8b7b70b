"""The heap of the process, from which the tensors of a large call come and to which they go back."""

from __future__ import annotations

__all__ = ["keep_heap"]

LARGE = 2**19
"""Bytes of a tensor from which on calls are large: below, what glibc keeps from the start is enough."""

MAPPED = 2**25 - 2**16
"""Bytes of the block that tells glibc so: its limits follow blocks of up to 2**25 bytes, its own header included."""

_told = False


def keep_heap(size: int) -> None:
    """Let what a call frees stay with the process for the next call: from the first call with a tensor of that size on.

    glibc maps a large block of memory by itself and gives the rest of its heap back to the system where more of it than
    a limit is free. Both limits follow the largest block, up to 32 MiB, that has been mapped and freed: this size and
    twice this size. A call frees several tensors, none of them half of all, so that it gave everything back and the
    system had to make every page again for the next one: 1,800 to 3,400 pages, a tenth to a third of a call's time.
    So one block of the largest such size is mapped and freed, without being touched: up to 64 MiB that calls have used
    then stay with the process. Where the limits are set (MALLOC_TRIM_THRESHOLD_ and its like), and in other C
    libraries, it changes nothing.

    Source: mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD.
    """
    global _told
    if size < LARGE or _told:
        return
    _told = True
    bytes(MAPPED)  # zeros from the system, of which no page is written
