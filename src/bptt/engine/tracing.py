"""The observers of a call: tracers, modes that see every operation, and profilers; and what cannot be traced.

`recorder` is the tracer of torch.jit.trace, and of what is built on it, while it records; else None.

Compiled code is opaque to all of them. A call that is observed goes through the operators of `ops`, which they can
record, count and name.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_tracing_state as recorder
from torch._C import _len_torch_dispatch_stack as modes
from torch._C._autograd import _profiler_enabled as is_profiled
from torch.compiler import is_compiling, is_dynamo_compiling, is_exporting
from torch.jit._trace import TracerWarning
from torch.utils._python_dispatch import _get_current_dispatch_mode as innermost_mode

__all__ = [
    "for_onnx",
    "is_profiled",
    "modes",
    "named",
    "recorder",
    "recording",
    "refusal",
    "refuse_onnx",
    "refuse_recording",
    "refuse_tracing_values",
    "seen",
]


def seen(x: Tensor | None) -> bool:
    """Whether a call on x is observed by a compiler, a tracer or a mode of torch's dispatcher such as FlopCounterMode.

    A mode with a true attribute `sees_inside` observes what happens inside an operator, and gets that.
    """
    if is_compiling() or recorder() is not None:
        return True
    if modes() > 0 and not getattr(innermost_mode(), "sees_inside", False):
        return True
    return type(x) is not Tensor and x is not None and torch._C._dispatch_keys(x).has(torch._C.DispatchKey.Python)


def refusal(what: str) -> NotImplementedError:
    """The error for what cannot be traced, with the two ways there are."""
    return NotImplementedError(
        f"{what}. Use torch.export, whose graphs hold a bptt layer as an operator, or put torch.nn's layers back first "
        "with bptt.revert(model)"
    )


def refuse_recording(what: str) -> None:
    """Raise NotImplementedError inside torch.jit.trace, whose record would hold another result for other input."""
    if recorder() is not None:
        raise refusal(f"torch.jit.trace cannot record {what}")


def refuse_tracing_values(where: str, what: str) -> None:
    """Raise NotImplementedError inside torch.func.linearize and make_fx, for whose graph nothing has a value."""
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    if mode is not None and not is_compiling():
        raise NotImplementedError(
            f"{where}: torch.func.linearize and make_fx cannot trace {what}, whose values are sizes of what is "
            "computed: use torch.func.jvp, whose result for a tangent is that of the linearized function"
        )


def for_onnx() -> bool:
    """Whether the graph that a layer's call becomes a part of is one that torch.onnx.export(dynamo=True) asked for."""
    return is_exporting() and torch.onnx.is_in_onnx_export()


def refuse_onnx() -> None:
    """Raise NotImplementedError where ONNX would get an operator of bptt's, and name the ways to ONNX's own."""
    if torch.onnx.is_in_onnx_export():
        raise NotImplementedError(
            "ONNX has no operator bptt::stack_forward. Pass the model itself to torch.onnx.export(model, args, "
            "dynamo=True), which makes ONNX's LSTM, GRU or RNN of a bptt layer; of a program that torch.export has "
            "made, pass program.run_decompositions(bptt.onnx_decompositions()); or put torch.nn's layers back first, "
            "with bptt.revert(model)"
        )


@contextmanager
def recording() -> Iterator[None]:
    """A layer's call inside torch.jit.trace. Its sizes are compared as a check alone, so without torch's warning."""
    if torch._C._are_functorch_transforms_active():
        raise refusal("torch.jit.trace cannot record a bptt layer inside the transforms of torch.func")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracerWarning)
        yield


_UNNAMED: AbstractContextManager[Any] = nullcontext()


def named(program: str, stage: str) -> AbstractContextManager[Any]:
    """What runs inside appears in torch.profiler as `bptt::<program>_<stage>`; without a profiler, nothing happens."""
    if is_dynamo_compiling() or not is_profiled():  # Dynamo of torch 2.8 cannot trace the question of is_profiled
        return _UNNAMED
    return torch.profiler.record_function(f"bptt::{program}_{stage}")
