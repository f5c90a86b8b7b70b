"""The kernels, their registry, and `choose`, which `kernel="auto"` asks.

A new kernel is one file and one entry in `KERNELS`, in order of preference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..cells import Cell
from ..memory import Checkpoints, Memory, keeps_gates
from ..policies import Policy
from ..steps import SplitStep
from .addresses import computed_in as computed_in
from .autocast import autocast_dtype as autocast_dtype
from .autocast import torchs_precision
from .calibration import VARIABLE as VARIABLE
from .calibration import Calibration as Calibration
from .calibration import Measured as Measured
from .calibration import PlainSizes as PlainSizes
from .calibration import gains as gains
from .columns import Blocks as Blocks
from .columns import Columns as Columns
from .cpu import Cpu as Cpu
from .eager import Eager as Eager
from .eager_steps import EagerSteps as EagerSteps
from .edges import scaled as scaled
from .frames import Frames as Frames
from .fused import Fused as Fused
from .interpreter import Interpreter as Interpreter
from .kernel import Edges as Edges
from .kernel import Kernel as Kernel
from .kernel import PackedKernel as PackedKernel
from .kernel import Request as Request
from .kernel import SummingKernel as SummingKernel
from .kernel import Sweep as Sweep
from .kernel import SweepResult as SweepResult
from .kernel import Tape as Tape
from .kernel import TwoWayKernel as TwoWayKernel
from .kernel import Way as Way
from .kernel import WholeKernel as WholeKernel
from .kernel import WholePasses as WholePasses
from .kernel import WholeRequest as WholeRequest
from .packed_rows import PackedRows as PackedRows
from .product import BY_MKL as BY_MKL
from .product import product as product
from .product import summed_product as summed_product
from .row_parts import RowPart as RowPart
from .step import StepKernel as StepKernel
from .step import WholeStepKernel as WholeStepKernel
from .step_memories import StepRequest as StepRequest
from .step_values import Place as Place
from .step_values import StepValues as StepValues
from .sums import Sums as Sums
from .sums import columns_at_once as columns_at_once
from .torch_layers import BY_LIBRARY as BY_LIBRARY
from .torch_layers import keeps_graph as keeps_graph
from .variants import variants as variants
from .whole_net import WholeNet as WholeNet
from .whole_numbers import OutOfBounds as OutOfBounds
from .whole_steps import WholeSteps as WholeSteps
from .whole_torch import WholeTorch as WholeTorch

KERNELS: dict[str, Kernel] = {"cpu": Cpu(), "fused": Fused(), "eager": Eager()}
"""Every kernel by name, the preferred first."""


BY_TORCH = {"RNN_TANH": 400_000, "RNN_RELU": 400_000, "GRU": 1_000_000}
"""By the mode of the cell: the weights from which on a differentiated step of one lane is left to torch's own layer.

Its gradient is the product of two vectors, which a BLAS writes faster: measured at H = 32 to 1024, T = 1 and 2, B = 1
to 8. Of fewer weights, and of more rows, the walk is the faster one.
"""


BY_TORCH_IN_LANES = {"RNN_TANH": 390_000, "RNN_RELU": 390_000} | ({"GRU": 390_000} if BY_MKL else {})
"""The same of one step of 16 lanes or more, without a gradient of up to two, in float32.

The walk would pack the weights, or read them as they lie for every few lanes, and both take longer than they save:
measured at H = 256 to 1024, T = 1 to 8, B = 8 and 32. Of a GRU on a processor that MKL serves well.
"""


@dataclass(frozen=True)
class Choice:
    """The choice of a kernel: which one runs, and why."""

    kernel: Kernel
    reason: str


_NAMED = "named by kernel="
_PREFERRED = "the most preferred of the kernels there are"


def check(name: str) -> str:
    """`name` if it is "auto" or a kernel's name, else ValueError.

    >>> check("eager")
    'eager'
    """
    if name not in ("auto", *KERNELS):
        raise ValueError(f"kernel must be one of {', '.join(map(repr, ('auto', *KERNELS)))}: got {name!r}")
    return name


def choose(name: str, request: Request) -> Choice:
    """The kernel for a request. A named one runs or raises RuntimeError with its reason; only "auto" may choose."""
    if torch.compiler.is_compiling():  # which sees through a cache, and warns of it
        return _choose.__wrapped__(name, request, tuple(KERNELS.values()))
    return _choose(name, request, tuple(KERNELS.values()))


@lru_cache(maxsize=256)
def _choose(name: str, request: Request, kernels: tuple[Kernel, ...]) -> Choice:
    if name != "auto":
        reason = KERNELS[check(name)].refuses(request)
        if reason is not None:
            raise RuntimeError(f"kernel={name!r} cannot run this layer: {reason}")
        return Choice(KERNELS[name], _NAMED)
    passed_over: list[str] = []
    for kernel in kernels:
        reason = kernel.refuses(request)
        unasked = kernel.hesitates(request) if reason is None else None
        if reason is None and unasked is None:
            return Choice(kernel, "; ".join(passed_over) or _PREFERRED)
        passed_over.append(f"{kernel.name!r} cannot: {reason}" if unasked is None else f"{kernel.name!r}: {unasked}")
    raise RuntimeError(f"no kernel can run this layer: {'; '.join(passed_over)}")


STEP_KERNELS: dict[str, StepKernel] = {"interpreter": Interpreter(), "eager": EagerSteps()}
"""Every kernel for steps by name, the preferred first."""


@dataclass(frozen=True)
class StepChoice:
    """The choice of a kernel for a traced step: which one runs, and why."""

    kernel: StepKernel
    reason: str


def choose_step(name: str, step: SplitStep, device: torch.device, dtype: torch.dtype) -> StepChoice:
    """The kernel for a traced step. A named one runs or raises RuntimeError with its reason; only "auto" may choose."""
    if name != "auto":
        reason = STEP_KERNELS[name].refuses(step, device, dtype)
        if reason is not None:
            raise RuntimeError(f"kernel={name!r} cannot run this step: {reason}")
        return StepChoice(STEP_KERNELS[name], _NAMED)
    passed_over: list[str] = []
    for kernel in STEP_KERNELS.values():
        reason = kernel.refuses(step, device, dtype)
        if reason is None:
            return StepChoice(kernel, "; ".join(passed_over) or _PREFERRED)
        passed_over.append(f"{kernel.name!r} cannot: {reason}")
    raise RuntimeError(f"no kernel can run this step: {'; '.join(passed_over)}")


class Layer(Protocol):
    """The part of a layer that `explain` reads; a `bptt.nn` layer has it."""

    input_size: int
    hidden_size: int
    num_layers: int
    bidirectional: bool
    batch_first: bool
    proj_size: int

    @property
    def kernel(self) -> str: ...

    @property
    def memory(self) -> Memory: ...

    @property
    def gradient(self) -> Policy: ...

    def cell(self) -> Cell: ...

    def parameters(self) -> Iterator[Tensor]: ...


def left_to_torch(call: PlainSizes, differentiated: bool) -> bool:
    """Whether kernel="auto" leaves a plain call on the CPU to torch's own layer and, differentiated, to autograd."""
    cell, dtype, T, B, I, H = call
    weights = cell.gates_per_unit * H * (I + H)
    if B >= 16 and (1 if differentiated else 2) >= T and dtype == torch.float32:
        return weights >= BY_TORCH_IN_LANES.get(cell.mode, math.inf)
    return differentiated and T * B == 1 and weights >= BY_TORCH.get(cell.mode, math.inf)


class Precision(NamedTuple):
    """The precision of a layer's call under autocast."""

    walk: torch.dtype  # of x, the states and the weights
    results: tuple[torch.dtype, torch.dtype]  # of y and h, of c


def precision(
    layer: Layer,
    device: torch.device,
    weights: torch.dtype,
    x: torch.dtype,
    states: tuple[torch.dtype, ...],
    packed: bool,
    resets: bool = False,
) -> Precision | None:
    """The precision of a call under autocast; None where that casts nothing on this device.

    Results are of the dtype that torch.nn's would be. The walk goes in the wider one of them, and in float32 where the
    kernel has no walk in that, or a less preferred kernel would have it: so its values are never less exact than those
    of torch.nn's layer, whose products see operands of autocast's precision in any case. weights, x, states: of the
    tensors given, states () where there are none; packed: whether they are packed sequences.

    Raises RuntimeError where float64, which autocast does not cast, meets another dtype.
    """
    lower = autocast_dtype(device)
    if lower is None:
        return None
    cell, given = layer.cell(), (weights, x, *states)
    if torch.float64 in given or not all(dtype.is_floating_point for dtype in given):
        if set(given) != {torch.float64}:
            told = f"parameters {weights}, input {x}" + "".join(f", hx {state}" for state in states)
            raise RuntimeError(
                f"{type(layer).__name__}: parameters, input and hx must be float64 under autocast if one of them is, "
                f"since it casts none of those, and else floating-point numbers: got {told}"
            )
        return Precision(torch.float64, (torch.float64, torch.float64))
    results = torchs_precision(cell, device, lower, (states or (x,))[-1], packed, layer.proj_size > 0)
    request = Request(cell, device, results[1], layer.gradient.draws_factors, resets, projection=layer.proj_size > 0)
    wide = request._replace(dtype=torch.float32)
    if layer.kernel != "auto":
        walks = KERNELS[layer.kernel].refuses(request) is None
    else:
        order = list(KERNELS.values())
        walks = order.index(choose("auto", request).kernel) <= order.index(choose("auto", wide).kernel)
    return Precision(results[1] if walks else torch.float32, results)


def explain(layer: Layer, x: Tensor | PackedSequence, segments: int = 0) -> str:
    """What a layer would do with x, and why: the kernel it runs, what it keeps, how far gradients reach. Of a call with
    a gradient where grad mode is on, else of one without, which keeps nothing.

    segments: how many run again in the backward pass, where the layer's memory is `Checkpoints`; 0 for a whole tape.

    Raises TypeError for a layer that is not of bptt.nn, ValueError for x of another feature size, and RuntimeError
    where a named kernel would.

    >>> import torch, bptt
    >>> print(bptt.explain(bptt.nn.GRU(3, 5, kernel="eager", gradient="chunked:4"), torch.zeros(7, 2, 3)))
    kernel 'eager' for gru, torch.float32 on cpu: named by kernel=
    keeps states and gates: memory='auto', the gates take 1,120 bytes
    gradient chunked:4
    """
    if not hasattr(layer, "cell"):
        raise TypeError(
            f"layer must be a bptt.nn.RNN, GRU or LSTM: got {type(layer).__module__}.{type(layer).__name__}"
        )
    data = x.data if isinstance(x, PackedSequence) else x
    if data.shape[-1] != layer.input_size:
        raise ValueError(f"x must have {layer.input_size} features, the layer's input_size: got {data.shape[-1]}")
    cell = layer.cell()
    rows = data.numel() // data.shape[-1]
    if isinstance(x, PackedSequence):
        T = len(x.batch_sizes)
    else:
        T = data.shape[1] if data.dim() == 3 and layer.batch_first else len(data)
    reach, draws, by_torch = layer.gradient.reach(T), layer.gradient.draws_factors, ""
    cast = precision(layer, data.device, next(iter(layer.parameters())).dtype, data.dtype, (), data is not x)
    dtype = data.dtype if cast is None else cast.walk
    request = Request(cell, data.device, dtype, edge_factors=draws, projection=layer.proj_size > 0)
    alone = data is x and layer.num_layers == 1 and not (layer.bidirectional or layer.proj_size or draws)
    if layer.kernel == "auto" and alone and rows and data.is_cpu:
        plain = PlainSizes(cell, dtype, T, rows // T, layer.input_size, layer.hidden_size)
        if left_to_torch(plain, torch.is_grad_enabled()):
            where = "where it is differentiated without resets" if torch.is_grad_enabled() else "without resets"
            by_torch = f"torch's own layer {where}: faster for so few steps; else "
        if not isinstance(layer.memory, Checkpoints):
            differentiated, threads = torch.is_grad_enabled(), torch.get_num_threads()
            request = request._replace(gains=gains(plain, reach, layer.memory, differentiated, threads))
    choice = choose(layer.kernel, request)
    kernel, walks = choice.kernel, layer.num_layers * (2 if layer.bidirectional else 1)
    per_unit = kernel.taped_per_unit(cell, reach)
    gate_bytes = rows * walks * per_unit * layer.hidden_size * dtype.itemsize
    gates, takes = ("what torch's layer keeps", "takes about") if kernel.own_gradients else ("the gates", "take")
    bytes_taken = f", {gates} {takes} {gate_bytes:,} bytes" if gate_bytes or not kernel.own_gradients else ""
    tapes: Memory = "gates" if isinstance(layer.memory, Checkpoints) else layer.memory
    kept = "states, from which blocks run forward again" if kernel.own_gradients else "states"
    if gate_bytes and keeps_gates(tapes, gate_bytes):
        kept = f"states and {gates.removeprefix('the ')}"
    if segments:
        kept = "a state now and then, and runs segments again" if segments > 1 else "no tape, and runs the call again"
    kept = f"{kept}: memory={str(layer.memory)!r}{bytes_taken}"
    if not torch.is_grad_enabled():
        kept = "nothing: grad mode is off"
    y, c = cast.results if cast is not None else (dtype, dtype)
    results = "" if cast is None else f"autocast makes results {y}" + (f", c {c}" if c != y else "") + "\n"
    compiled = f" ({choice.kernel.variant})" if choice.kernel.variant else ""
    return (
        f"{by_torch}kernel {choice.kernel.name!r}{compiled} for {cell.name}, {dtype} on {data.device}: "
        f"{choice.reason}\n{results}"
        f"keeps {kept}\n"
        f"gradient {layer.gradient}"
    )
