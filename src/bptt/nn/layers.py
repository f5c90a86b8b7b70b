"""The drop-in layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .. import cells, kernels, policies
from ..engine import (
    Net,
    for_onnx,
    needs_gradient,
    recorder,
    recording,
    refusal,
    run,
    through_operators,
    transformed,
)
from ..memory import Checkpoints, Memory
from ..memory import parse as parse_memory
from ._autocast import plain_under_autocast
from ._fx import fx_node
from ._packed import padded_call
from ._settings import Settings
from .call import Call, Hidden, by_onnx, net_of, program, whole_tape
from .flat import flat_call, is_flat
from .undrawn import at_once, plain, undrawn

__all__ = ["GRU", "LAYERS", "LSTM", "RNN", "DropInLayer"]

TORCH_MODES = ("RNN_TANH", "RNN_RELU", "GRU", "LSTM")
"""The modes that torch.nn.RNNBase knows."""


class DropInLayer(Settings, torch.nn.RNNBase):
    """The base class of the layers: our keywords, torch's argument conventions, and the call of the engine.

    mode: the cell that the layer repeats, a name in `cells.CELLS`; then torch.nn.RNNBase's arguments, and ours.
    """

    torchs: ClassVar[type[torch.nn.RNNBase] | None] = None
    """The torch.nn layer that it replaces, with the same parameters; None where torch has none."""
    nonlinearities: ClassVar[tuple[str, ...]] = ()
    """The values of its argument `nonlinearity`; empty where it has no such argument."""

    def __init__(
        self,
        mode: str,
        *args: Any,
        gradient: str | policies.Policy = "full",
        memory: str | Checkpoints = "auto",
        kernel: str = "auto",
        **kwargs: Any,
    ) -> None:
        if mode not in cells.CELLS:
            raise ValueError(f"mode must be one of {', '.join(map(repr, cells.CELLS))}: got {mode!r}")
        cell = cells.CELLS[mode]
        if "proj_size" in kwargs and not cell.projects:  # torch.nn says so too, more than of an unexpected keyword
            raise _no_projection(type(self).__name__)
        # torch builds a layer of its own modes only, of which the simple RNN has one row of weights a unit.
        super().__init__(mode if mode in TORCH_MODES else "RNN_TANH", *args, **kwargs)
        self.mode = mode
        if self.proj_size and not cell.projects:
            raise _no_projection(type(self).__name__)
        if mode not in TORCH_MODES and cell.gated:
            for name, weight in self.named_parameters():
                rows = cell.gates_per_unit * self.hidden_size
                if "weight_hr" not in name:
                    setattr(self, name, torch.nn.Parameter(weight.new_empty(rows, *weight.shape[1:])))
            self._init_flat_weights()
            self.reset_parameters()
        self.gradient, self.memory, self.kernel = gradient, memory, kernel

    def _checked_memory(self, value: str | Checkpoints) -> Memory:
        memory = parse_memory(value)
        if isinstance(memory, Checkpoints):  # not at import: this loads the compiler
            _OUTSIDE[:] = _OUTSIDE or [torch.compiler.disable(_checkpointed)]
        return memory

    def _checked_kernel(self, value: str) -> str:
        return kernels.check(value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.memory = self._memory

    def cell(self) -> cells.Cell:
        """The cell this layer repeats."""
        return cells.CELLS[self.mode]

    def extra_repr(self) -> str:
        ours = f", gradient={self.gradient}"
        ours += f", memory={self.memory}" if self.memory != "auto" else ""
        ours += f", kernel={self.kernel}" if self.kernel != "auto" else ""
        return super().extra_repr() + ours

    def __prepare_scriptable__(self) -> Any:
        """The first method of a module that torch.jit.script calls."""
        raise refusal(f"torch.jit.script cannot compile a bptt layer: got {self}")

    def flatten_parameters(self) -> None:
        """Flatten the parameters as torch.nn does, for the modes that cuDNN knows."""
        if self.mode in TORCH_MODES:
            super().flatten_parameters()

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        like: Any = torch.nn.RNNBase if isinstance(hidden, Tensor) else torch.nn.LSTM
        like.check_forward_args(self, input, hidden, batch_sizes)

    get_expected_cell_size: Any = torch.nn.LSTM.get_expected_cell_size

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Hidden | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        cu_seqlens: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Hidden | None = None,
    ) -> tuple[Tensor | PackedSequence, Hidden]:
        """torch.nn's forward, with resets: bool `[T, B]` (`[B, T]` with batch_first, `[T]` unbatched), each of which
        zeroes the state before step t of a lane, so nothing passes the edge between t-1 and t in either direction.

        reset_state: the state that a reset restarts from instead of zero; h, for an LSTM (h, c). Its shape is hx's,
        `[L*D, B, .]` (`[L*D, .]` unbatched), the same for all resets, or `[T, L*D, B, .]` (`[T, L*D, .]`), time first
        also with batch_first, where row t belongs to the reset at t: the forward direction starts step t from it, the
        reverse one step t-1. Its gradient at a reset is the one that hx would get if step t were the first: all that
        reaches that edge within the policy's window, without a random factor; summed over resets that share the state.

        Sequences of several lengths, besides a PackedSequence: padded, with lengths `[B]` from 1 to T, where y is zero
        after each end; or one after the other without padding, as a jagged nested tensor `[N, j, I]` or a flat one
        `[S, I]` with cu_seqlens `[N + 1]`, the ends of the N sequences after a 0. Of these y has the form of the input
        and the states are `[L*D, N, .]`; resets are `[S]`, reset_state like hx; a sequence without a step keeps its
        first state.
        """
        plainly = reset_state is None and lengths is None and cu_seqlens is None
        if plainly and type(input) in (Tensor, PackedSequence):
            result = plain(self, input, hx, resets)
            if result is None and torch._C._is_any_autocast_enabled():
                result = plain_under_autocast(self, input, hx, resets)
            if result is not None:
                return result
        elif lengths is not None and resets is None and reset_state is None and type(input) is Tensor:
            padded = None if cu_seqlens is not None else padded_call(self, input, hx, lengths)
            if padded is not None:
                return padded
        if type(input) is not Tensor or not (plainly and resets is None and type(hx) in (type(None), Tensor)):
            keywords: dict[str, Any] = {"resets": resets, "reset_state": reset_state}
            keywords |= {"lengths": lengths, "cu_seqlens": cu_seqlens}
            node = fx_node(self, input, hx, keywords)
            if node is not None:
                return node
            if is_flat(input, cu_seqlens):
                return flat_call(self, input, hx, **keywords)
        if recorder() is not None:  # by torch.jit.trace: whether there or later a gradient is asked for, at any size
            with recording():
                call = Call.of(self, input, hx, resets, reset_state, lengths)
                net = net_of(self, call, self.gradient, differentiated=True)
                y, *final = through_operators(net, self.memory, call.tensors)
                return call.returned(y, final)
        call = Call.of(self, input, hx, resets, reset_state, lengths, tangents=True)
        if for_onnx():
            return by_onnx(self, call)
        tensors, inside = call.tensors, transformed()
        # Inside a transform tensors do not tell whether one of those around it asks for their gradient.
        differentiated = torch.is_grad_enabled() and (inside or needs_gradient(tensors))
        stack = undrawn(self, call, differentiated)
        if stack is not None:
            outputs = None if differentiated or inside else at_once(stack, call)
            outputs = run(stack, *tensors) if outputs is None else outputs
            return call.returned(outputs[0], outputs[1:])
        net = net_of(self, call, self.gradient, differentiated)
        if differentiated and isinstance(self.memory, Checkpoints):
            if torch.compiler.is_exporting():
                raise NotImplementedError(
                    f"memory={str(self.memory)!r} cannot be exported with a gradient: call torch.export under "
                    "torch.no_grad(), set memory to 'auto', 'gates' or 'states', or put torch.nn's layers back first "
                    "with bptt.revert(model)"
                )
            y, *final = (_OUTSIDE or [_checkpointed])[0](self, call, net)
        else:
            y, *final = run(whole_tape(self, net), *tensors)
        return call.returned(y, final)

    _own_forward = forward  # for a call within the call, which a subclass's forward is not to be a part of again


_OUTSIDE: list[Callable[..., tuple[Tensor, ...]]] = []
"""`_checkpointed` as a function outside of a compiler's graphs; empty until a layer has checkpoints."""


def _checkpointed(layer: DropInLayer, call: Call, net: Net) -> tuple[Tensor, ...]:
    """The outputs of a call whose tape consists of checkpoints, outside of a compiler's graph."""
    return run(program(layer, call, net), *call.tensors)


class RNN(DropInLayer):
    """torch.nn.RNN with a choice of gradient: h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh).

    Arguments: those of torch.nn.RNN (input_size, hidden_size, num_layers=1, nonlinearity="tanh", bias=True,
    batch_first=False, dropout=0.0, bidirectional=False, device=None, dtype=None), where nonlinearity may also be
    "relu", as there, "sigmoid" or "identity" (a linear network); then by keyword

    gradient: how far gradients reach: `Full()`, `Chunked(k)`, `Truncated(window, every=1)`, `Randomized(p)`, or the
        text form, such as "truncated:35". Default full.
    memory: what is kept for the backward pass, "gates", "states", "auto" or `Checkpoints(...)` ("checkpoints",
        "checkpoints:steps=100", "checkpoints:bytes=1000000"). It changes no value.
    kernel: "auto", or the name of a kernel, which then runs or raises: "cpu" (compiled; float32, float64 and bfloat16),
        "fused" (torch's own layers: cuDNN on a GPU, which "auto" takes there; on a CPU it does where a table measured
        by `bptt bench --calibrate` says that they are faster) or "eager" (torch operations, a step at a time).

    Raises ValueError for an unknown policy, memory or kernel; torch.nn's own checks raise torch.nn's errors.

    A policy acts within one forward call: the caller detaches a state hx that is carried from call to call. Under
    autocast results have the dtype that torch.nn's would have: on a GPU autocast's; on a CPU that too, but for a GRU,
    and for an LSTM that is packed or projected, the wider one of it and the initial state's, which is the input's where
    hx is not given (h, where it is projected, has autocast's). The layer computes in that precision, or a finer one;
    gradients have that of what they are of; float64 stays. Outputs may be changed in place, as in torch.nn; where y
    was, the backward pass runs the layer forward once more (`y = y + residual` avoids it, `y += residual` does not).
    Resets are copied: their tensor may be used again at once.
    A policy is a graph, whose cut edges are `detach`, and double backward differentiates that graph: `Full()` is exact,
    `Chunked(k)` equals a loop that detaches every k steps, to every order (equations/README.md, 6.7).
    The transforms of torch.func (grad, vjp, jacrev, jvp, jacfwd, hessian, vmap; linearize of sequences of one length),
    dual tensors and is_grads_batched work in any nesting. A tangent is the full one under any policy, which changes
    adjoints alone; so a tangent of a gradient, or a gradient of a tangent, raises NotImplementedError under a policy
    that cuts time edges.
    vmap over x and states adds lanes, and gradients of weights for each sample are made side by side; over weights it
    calls the kernel once for each. Tangents and second derivatives are torch operations, a step at a time.

    torch.compile and torch.export take the layer as one operator of the graph, forward and backward; a graph breaks
    only at a PackedSequence, at a policy with a generator of its own, inside torch.func's transforms and, where a
    gradient is asked for, at `Checkpoints`, which torch.export then refuses. A compiled backward cannot be
    differentiated again: torch raises RuntimeError.

    torch.jit.trace, and what is built on it, records the same operator, correct at any size and differentiable; a saved
    trace loads where bptt is imported. torch.fx makes one node of the layer. torch.onnx.export(dynamo=True) makes
    ONNX's LSTM, GRU or RNN of each layer (`bptt.onnx_decompositions`). torch.jit.script and torch.onnx.export with
    dynamo=False raise NotImplementedError: they take torch.nn's layers, which bptt.revert(model) puts back.
    FlopCounterMode counts, and torch.profiler shows, `bptt::stack_forward` and `bptt::stack_backward`.

    >>> import torch, bptt
    >>> layer = bptt.nn.RNN(3, 5, gradient=bptt.Truncated(10))
    >>> y, h_n = layer(torch.zeros(20, 2, 3))
    >>> y.shape, h_n.shape
    (torch.Size([20, 2, 5]), torch.Size([1, 2, 5]))
    >>> layer
    RNN(3, 5, gradient=truncated:10)

    Source: Elman 1990, "Finding structure in time"; equations/README.md, chapter 3.
    """

    torchs = torch.nn.RNN
    nonlinearities = tuple(cells.ACTIVATIONS)
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        gradient: str | policies.Policy = "full",
        memory: str | Checkpoints = "auto",
        kernel: str = "auto",
        **kwargs: Any,
    ) -> None:
        if nonlinearity not in self.nonlinearities:
            names = ", ".join(map(repr, self.nonlinearities))
            raise ValueError(f"nonlinearity must be one of {names}: got {nonlinearity!r}")
        shape = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        where = {"device": device, "dtype": dtype, **kwargs}
        mode = f"RNN_{nonlinearity.upper()}"
        super().__init__(mode, *shape, **where, gradient=gradient, memory=memory, kernel=kernel)
        self.nonlinearity = nonlinearity


class GRU(DropInLayer):
    """torch.nn.GRU with a choice of gradient; the reset gate acts after the matrix product, as in torch.

    Arguments: those of torch.nn.GRU (input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0,
    bidirectional=False, device=None, dtype=None), then gradient, memory and kernel as in `RNN`.

    >>> import torch, bptt
    >>> layer = bptt.nn.GRU(3, 5, gradient="chunked:10")
    >>> y, h_n = layer(torch.zeros(20, 2, 3))
    >>> y.shape, h_n.shape
    (torch.Size([20, 2, 5]), torch.Size([1, 2, 5]))

    Source: Cho et al. 2014 (arXiv 1406.1078, equations 5 to 8); equations/README.md, chapter 4.
    """

    torchs = torch.nn.GRU

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        gradient: str | policies.Policy = "full",
        memory: str | Checkpoints = "auto",
        kernel: str = "auto",
        **kwargs: Any,
    ) -> None:
        shape = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        where = {"device": device, "dtype": dtype, **kwargs}
        super().__init__("GRU", *shape, **where, gradient=gradient, memory=memory, kernel=kernel)


class LSTM(DropInLayer):
    """torch.nn.LSTM with a choice of gradient.

    Arguments: those of torch.nn.LSTM (input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0,
    bidirectional=False, proj_size=0, device=None, dtype=None), then gradient, memory and kernel as in `RNN`.

    >>> import torch, bptt
    >>> layer = bptt.nn.LSTM(3, 5, num_layers=2, gradient=bptt.Randomized(0.9))
    >>> y, (h_n, c_n) = layer(torch.zeros(20, 2, 3))
    >>> y.shape, h_n.shape, c_n.shape
    (torch.Size([20, 2, 5]), torch.Size([2, 2, 5]), torch.Size([2, 2, 5]))

    Source: Gers, Schmidhuber and Cummins 2000, "Learning to forget"; projection: Sak et al. 2014 (arXiv 1402.1128);
    equations/README.md, chapter 5.
    """

    torchs = torch.nn.LSTM

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        gradient: str | policies.Policy = "full",
        memory: str | Checkpoints = "auto",
        kernel: str = "auto",
    ) -> None:
        shape = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        super().__init__("LSTM", *shape, device=device, dtype=dtype, gradient=gradient, memory=memory, kernel=kernel)


def _no_projection(name: str) -> ValueError:
    able = dict.fromkeys(cell.name.upper() for cell in cells.CELLS.values() if cell.projects)
    return ValueError(f"proj_size is for {' or '.join(able)} only, not for {name}")


LAYERS: dict[str, type[DropInLayer]] = {"rnn": RNN, "gru": GRU, "lstm": LSTM}
"""The layer of each cell, by the cell's name; the trainer, the bench and the commands choose from these."""
