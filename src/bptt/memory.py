"""What is kept: tape policies as pure data.

The tape is what stage 1 (forward) keeps so that stage 3 (the adjoint walk) need not repeat it. A memory policy
changes memory and time, never a value.
"""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["AUTO_BYTES", "Memory", "check", "keeps_gates"]

Memory = Literal["auto", "gates", "states"]

AUTO_BYTES = 256 * 2**20
"""The gate tape of one call above which `"auto"` keeps states only: 256 MiB."""


def check(memory: str) -> Memory:
    """`memory` if it names a tape policy, else ValueError.

    >>> check("states")
    'states'
    """
    if memory not in get_args(Memory):
        raise ValueError(f"memory must be one of {', '.join(map(repr, get_args(Memory)))}: got {memory!r}")
    return memory  # type: ignore[return-value]  # narrowed by the check above


def keeps_gates(memory: Memory, gate_bytes: int) -> bool:
    """Whether the gates are kept, for a call whose gates take `gate_bytes`.

    >>> keeps_gates("auto", 1000), keeps_gates("auto", 2**40), keeps_gates("states", 0)
    (True, False, False)
    """
    return memory == "gates" or (memory == "auto" and gate_bytes <= AUTO_BYTES)
