"""`Recurrent`: any cell as a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from .. import policies
from ..memory import Checkpoints
from ..scan import scan
from ..scan.arguments import check_not_traced
from ..scan.eager import kept_eager
from ..scan.pytrees import Step
from ._autocast_cells import cells_under_autocast
from ._by_length import scan_by_length
from ._cell_list import cells_of, learnable_state, learned_state, sample, unlike
from ._flat_recurrent import FlatCall, flat_recurrent
from ._forms import FORMS, CellCall, Form, Start, described, first_lane
from ._known_call import MOST_KNOWN, kind_of, remember
from ._layered import restarted, split_hidden, split_restarts, stack_hidden, step_and_carry
from ._overlapping import Layers, StackCall, overlapping
from ._sequences import Sequences
from ._settings import Settings
from ._trial import declared_starts, try_cells
from .flat import is_flat

__all__ = ["Recurrent"]


class Recurrent(Settings, nn.Module):
    """Any cell as a layer over time, with a choice of gradient: h_t = cell(x_t, h_{t-1}).

    cell: a module that is called with (x_t, state) and returns either its new state (h, or a tuple whose first tensor
        is the output, such as (h, c)), or the pair (output, new state). Every tensor of a state, a pytree, is
        `[B, ...]`. For several layers or two directions: a list of such modules, one per layer, or one per layer and
        direction in torch's order (layer 0 forward, layer 0 reverse, layer 1 forward, ...); or a function of the number
        of a layer, called once per layer and direction: `lambda n: torch.nn.GRUCell(64 if n == 0 else 128, 128)`. Their
        parameters are `cells.0.*`, `cells.1.*`, ... in the state_dict, in this order, also where there is one.
    num_layers: the number of layers; a list tells it.
    batch_first: whether x and y are `[B, T, ...]`.
    dropout: the probability of dropout on the outputs of each layer but the last; drawn anew for every step.
    reverse: run from each sequence's last step to its first; y stays in place.
    bidirectional: run a forward and a reverse cell per layer, whose outputs `[T, B, F, ...]` are concatenated along F.
    form: "state" for a cell that returns its new state, "pair" for one that returns (output, new state), "spread" for
        one with an argument for each tensor of its state, `cell(x, h, c)`, that returns (h, c) or (output, h, c);
        "auto" to find out by calling it, before the first sequence and whenever x's shape or type changes: without
        recording, on irregular numbers, and its attributes, buffers and torch's random generators are put back.
    learn_initial_state: whether the initial state is a parameter, one for each tensor of each cell's state
        (`initial_states.*`), the same for every lane. It begins as the state below, and the cell must tell its shape:
        by `initial_state`, or by `input_size` and `hidden_size`.
    gradient, memory: as in `bptt.scan`. kernel: "auto", or a kernel for steps, "interpreter", "eager" or "replay",
        which then runs or raises.

    A sequence starts from hx; else from a learned state; else from `cell.initial_state(batch_size)` (or of a tensor of
    zeros of x_0's shape), or from an attribute `cell.initial_state` that is the state of one lane; else from zeros of
    `cell.hidden_size` or `cell.state_size`, as many tensors, one or two, as the cell takes; else from what the cell
    makes where it is given no state. If that gives another result than zeros (found out likewise), the first
    step is called so, and under a policy of several blocks rows are coupled (see `bptt.scan`), which is slower.

    Call: `y, state = layer(input, hx=None, *, lengths=None, cu_seqlens=None, resets=None, reset_state=None)`.

    input: `[T, B, ...]` (`[B, T, ...]` with batch_first), `[T, F]` unbatched, or a PackedSequence. Integers are tokens:
        `[T, B]`, `[T]` unbatched.
    hx: the initial state, in the form in which the layer returns the final one: the cell's pytree with tensors
        `[K, B, ...]` (`[K, ...]` unbatched), where K counts layers and directions; or, where the cells' states are not
        alike or hold something else than tensors with a row for each lane, a list of K states.
    lengths: whole numbers `[B]` from 1 to T: the sequences' lengths. y is zero beyond them, and the final state is that
        after each sequence's last step. The same as for a PackedSequence.
    cu_seqlens: the ends `[N + 1]` of N sequences, after a 0, in an input `[S, ...]` that holds one after the other; or
        none for a jagged nested tensor `[N, j, ...]`. y has the form of the input, states are `[K, N, ...]`, resets
        `[S]`, reset_state like hx; a sequence without a step keeps its first state.
    resets: bool `[T, B]` (`[B, T]` with batch_first, `[T]` unbatched): all tensors of the state are zeroed before step
        t of a lane, so nothing passes the edge between t-1 and t in either direction.
    reset_state: the state that a reset restarts from instead of zero: in the form of hx, the same for all resets, or
        each tensor with T before its other dimensions, where row t belongs to the reset at t: the forward direction
        starts step t from it, the reverse one step t-1. For cells that are given, or tell, a first state.

    The layers of one direction run in one scan, so that a window counts steps of the whole network; in the reverse
    direction time, policy included, runs from each sequence's last step. The policy of a sequence is that of the same
    sequence alone: of unequal lengths under `Truncated(window, every)` with every > 1, each has a scan of its own.
    Random edge factors are drawn per direction and, where bidirectional, per layer.

    Of several bidirectional layers under a policy whose blocks overlap, each block of losses is a call of its own on
    the steps that it reaches, as a lane beside the others where rows are known to be independent.

    Raises TypeError and ValueError for arguments that do not fit, and for a cell whose call cannot be made out;
    NotImplementedError for cells that draw random numbers in such a stack; and as `bptt.scan` does.

    >>> import torch, bptt
    >>> layer = bptt.nn.Recurrent(torch.nn.LSTMCell(3, 5), gradient=bptt.Truncated(10))
    >>> y, (h_n, c_n) = layer(torch.zeros(20, 2, 3))
    >>> y.shape, h_n.shape, c_n.shape
    (torch.Size([20, 2, 5]), torch.Size([1, 2, 5]), torch.Size([1, 2, 5]))
    >>> layer
    Recurrent(
      gradient=truncated:10
      (cells): ModuleList(
        (0): LSTMCell(3, 5)
      )
    )

    Source: the arguments are those of torch.nn's layers; the policies, equations/README.md, chapter 6.
    """

    def __init__(
        self,
        cell: nn.Module | Sequence[nn.Module] | Callable[[int], nn.Module],
        num_layers: int | None = None,
        *,
        batch_first: bool = False,
        dropout: float = 0.0,
        reverse: bool = False,
        bidirectional: bool = False,
        form: Form = "auto",
        learn_initial_state: bool = False,
        gradient: str | policies.Policy = "full",
        memory: str | Checkpoints = "auto",
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(map(repr, FORMS))}: got {form!r}")
        if reverse and bidirectional:
            raise ValueError("reverse must be False for a bidirectional layer, which has both directions")
        D = 2 if bidirectional else 1
        self.cells = nn.ModuleList(cells_of(cell, num_layers, D))
        self.num_layers = len(self.cells) // D
        if isinstance(dropout, bool) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be a probability from 0 to 1: got {dropout!r}")
        if dropout and self.num_layers == 1:
            raise ValueError(f"dropout must be 0 for one layer, since it acts between layers: got {dropout}")
        self.batch_first, self.dropout, self.form = bool(batch_first), float(dropout), form
        self.reverse, self.bidirectional = bool(reverse), bool(bidirectional)
        self.gradient, self.memory, self.kernel = gradient, memory, kernel
        self._steps: dict[Any, Any] = {}  # of scans, and calls whose kind is known
        self._trials: tuple[Any, list[CellCall]] | None = None
        self._learned: list[Any] = []  # for each cell a state that holds the places of its tensors in initial_states
        if learn_initial_state:
            states = [learnable_state(k, cell, form) for k, cell in enumerate(self.cells)]
            self.initial_states = nn.ParameterList(tree_leaves(states))
            places = count()
            self._learned = [tree_map(lambda _: next(places), state) for state in states]

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: not what was found out by calling the cells."""
        return {**vars(self), "_steps": {}, "_trials": None}

    def extra_repr(self) -> str:
        flags = ("batch_first", "reverse", "bidirectional")
        said = [f"gradient={self.gradient}", *(f"{flag}=True" for flag in flags if getattr(self, flag))]
        said += [f"dropout={self.dropout}"] if self.dropout else []
        said += [f"{name}={value}" for name in ("form", "memory", "kernel") if (value := getattr(self, name)) != "auto"]
        return ", ".join(said)

    @kept_eager("bptt.nn.Recurrent runs any Python that its cell holds")
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        cu_seqlens: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Any = None,
    ) -> tuple[Tensor | PackedSequence, Any]:
        """(y, final state) of the sequences: see the class."""
        if torch._C._is_any_autocast_enabled():
            others = {"lengths": lengths, "cu_seqlens": cu_seqlens, "resets": resets}
            found = cells_under_autocast(self, input, hx, reset_state, others)
            if found is not None:
                return found
        kind = kind_of(self, input, (hx, lengths, cu_seqlens, resets, reset_state))
        if kind in self._steps:
            return self._steps[kind](self, input)
        check_not_traced(input, hx, lengths, resets, reset_state)
        if is_flat(input, cu_seqlens):
            return flat_recurrent(self, input, hx, lengths, cu_seqlens, resets, reset_state)
        sequences, calls, states, masks = self._prepared(input, hx, lengths, resets)
        remember(self, kind, sequences, calls, states)
        restarts = None if reset_state is None else split_restarts(reset_state, sequences, calls, states)
        if not self.bidirectional:
            xs = (sequences.x, *masks)
            y, finals = self._run(sequences, range(len(self.cells)), xs, calls, states, restarts, int(self.reverse))
        elif (
            self.num_layers > 1
            and torch.is_grad_enabled()
            and sequences.blocks_overlap(self.gradient.reach(sequences.T))
        ):
            whole = partial(self._both, calls=calls, gradient=policies.Full())
            both = Layers(calls, whole, self._arguments, partial(self._scan, gradient=None), self.kernel)
            y, finals = overlapping(StackCall(both, sequences, masks, states, restarts), self.gradient)
        else:
            y, finals = self._both(sequences, masks, states, restarts, calls)
        return sequences.restore(y), stack_hidden(finals, sequences.B, sequences.batched)

    _own_forward = forward  # for a call within the call, which a subclass's forward is not to be a part of again

    def as_scan(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        cu_seqlens: Tensor | None = None,
        resets: Tensor | None = None,
        reset_state: Any = None,
    ) -> tuple[Step, Any, tuple[Any, ...], Tensor | None]:
        """(step, carry, xs, resets) with which a call of the layer calls `bptt.scan`, for what takes any step.

        Of cu_seqlens or a jagged nested tensor: the scan over the sequences that have a step, as lanes. Raises
        ValueError where none has, and for a bidirectional layer, which calls it for each layer and direction.

        >>> import torch, bptt
        >>> layer = bptt.nn.Recurrent(torch.nn.GRUCell(3, 5))
        >>> step, carry, xs, resets = layer.as_scan(torch.zeros(20, 2, 3))
        >>> (h,), (y, _) = bptt.scan(step, carry, xs, resets=resets)
        """
        if self.bidirectional:
            raise ValueError("as_scan is for a layer of one direction: got a bidirectional one")
        if is_flat(input, cu_seqlens):
            flat = FlatCall(self, input, hx, lengths, cu_seqlens)
            input, hx, resets, reset_state = flat.as_packed(resets, reset_state)
        sequences, calls, states, masks = self._prepared(input, hx, lengths, resets)
        ks, d = range(len(self.cells)), int(self.reverse)
        arguments = self._arguments(sequences, ks, (sequences.x, *masks), calls, states, d)
        if reset_state is None:
            return arguments
        return restarted(arguments, split_restarts(reset_state, sequences, calls, states), sequences, d)

    def from_scan(
        self,
        scanned: tuple[Any, Any],
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Any]:
        """(y, final state), as `forward` returns them, from what `bptt.scan` returned for `as_scan`'s arguments."""
        if is_flat(input, cu_seqlens):
            flat = FlatCall(self, input, hx, lengths, cu_seqlens)
            return flat.of_all(*self.from_scan(scanned, *flat.as_packed()[:2]))
        sequences, (final, (y, kept)) = Sequences.of(input, lengths, None, self.batch_first), scanned
        states = self._entered(sequences, hx)[1]
        if sequences.lengths is not None:
            final = tree_map(sequences.last, kept)
        else:
            final = [s if states[k] is not None else s[1] for k, s in enumerate(final)]
        y = sequences.restore(sequences.forward_time(y, int(self.reverse)))
        return y, stack_hidden(list(final), sequences.B, sequences.batched)

    def top_input(
        self, input: Tensor | PackedSequence, hx: Any = None, *, lengths: Any = None, resets: Tensor | None = None
    ) -> Tensor | PackedSequence:
        """What the top layer reads in a call, `[T, B, F, ...]`, in the form of the input; ValueError in one direction.

        >>> import torch, bptt
        >>> layer = bptt.nn.Recurrent(lambda n: torch.nn.GRUCell(10 if n else 3, 5), 2, bidirectional=True)
        >>> layer.top_input(torch.zeros(20, 2, 3)).shape
        torch.Size([20, 2, 10])
        """
        if not self.bidirectional:
            raise ValueError("top_input is for a bidirectional layer: got one of one direction")
        sequences, calls, states, masks = self._prepared(input, hx, lengths, resets)
        y, _ = self._both(sequences, masks, states, None, calls, layers=self.num_layers - 1)
        return sequences.restore(y * masks[-1] if masks else y)

    def _prepared(
        self, input: Tensor | PackedSequence, hx: Any, lengths: Tensor | Sequence[int] | None, resets: Tensor | None
    ) -> tuple[Sequences, list[CellCall], list[Any], list[Tensor]]:
        """The sequences of a call; how each cell is called; its first state, None if it makes it; dropout masks."""
        sequences = Sequences.of(input, lengths, resets, self.batch_first)
        calls, states = self._entered(sequences, hx)
        D, drops = 2 if self.bidirectional else 1, self.dropout and self.training
        masks = [sequences.dropout_mask(call.output, self.dropout, D) for call in calls[:-D:D] if drops]
        return sequences, calls, states, masks

    def _entered(self, sequences: Sequences, hx: Any) -> tuple[list[CellCall], list[Any]]:
        """How each cell is called, and its first state, None if it makes it."""
        given = None if hx is None else split_hidden(hx, len(self.cells), sequences.B, sequences.batched)
        calls = self._calls(sequences, given)
        return calls, given or [self._start(k, call, sequences.B) for k, call in enumerate(calls)]

    def _start(self, k: int, call: CellCall, B: int) -> Any:
        """The state that cell k starts from where none is given; None where the cell makes it."""
        if self._learned:
            return learned_state(self.initial_states, self._learned[k], B)
        return None if call.start is None else call.start(B)

    def _both(
        self,
        sequences: Sequences,
        masks: Sequence[Tensor],
        states: Sequence[Any],
        restarts: Sequence[Any] | None,
        calls: Sequence[CellCall],
        gradient: policies.Policy | None = None,
        layers: int | None = None,
    ) -> tuple[Tensor, list[Any]]:
        """(output in forward time, final states) of all layers, or the lowest so many, both directions scans apart."""
        y, finals = sequences.x, list[Any]()
        for k in range(0, 2 * (self.num_layers if layers is None else layers), 2):
            x = y * masks[k // 2 - 1] if k and masks else y
            found = [
                self._run(sequences, range(k + d, k + d + 1), (x,), calls, states, restarts, d, gradient)
                for d in (0, 1)
            ]
            finals += [final for _, own in found for final in own]
            y = torch.cat([half for half, _ in found], 2)
        return y, finals

    def _run(
        self,
        sequences: Sequences,
        ks: range,
        xs: tuple[Tensor, ...],
        calls: Sequence[CellCall],
        states: Sequence[Any],
        restarts: Sequence[Any] | None,
        d: int,
        gradient: policies.Policy | None = None,
    ) -> tuple[Tensor, list[Any]]:
        """Some cells on top of one another in direction d: (output in forward time, final states).

        xs: the input and the masks, in forward time. restarts: the states of resets, of all cells.
        """
        own = None if restarts is None else tuple(restarts[k] for k in ks)
        restart = tree_map_only(Tensor, lambda t: sequences.own_restarts(t, d), own)
        scanned = *self._arguments(sequences, ks, xs, calls, states, d), restart, gradient
        if sequences.lengths is None:
            final, (y, _) = self._scan(*scanned)
            finals = [state if states[k] is not None else state[1] for k, state in zip(ks, final, strict=True)]
        elif gradient is None and torch.is_grad_enabled() and sequences.blocks_differ(self.gradient.reach(sequences.T)):
            y, finals = scan_by_length(sequences, partial(self._scan, gradient=None), *scanned[:-1])
        else:
            # From the outputs, so that the cotangent of a final state arrives at the sequence's last step.
            _, (y, kept) = self._scan(*scanned)
            finals = list(tree_map(sequences.last, kept))
        return sequences.forward_time(y, d), finals

    def _arguments(
        self,
        sequences: Sequences,
        ks: range,
        xs: tuple[Tensor, ...],
        calls: Sequence[CellCall],
        states: Sequence[Any],
        d: int,
        keeps: bool = False,
    ) -> tuple[Step, Any, tuple[Tensor, ...], Tensor | None]:
        """(step, carry, xs, resets) of the scan over some cells, in direction d's own time: see `_run`."""
        of = [self.cells[k] for k in ks], [calls[k] for k in ks], [states[k] for k in ks]
        step, carry = step_and_carry(self._steps, MOST_KNOWN * len(self.cells), *of, sequences, keeps)
        return step, carry, tuple(sequences.own_time(x, d) for x in xs), sequences.own_resets(d)

    def _scan(
        self,
        step: Step,
        carry: Any,
        xs: tuple[Tensor, ...],
        resets: Tensor | None,
        restart: Any,
        gradient: policies.Policy | None,
    ) -> tuple[Any, Any]:
        settings: dict[str, Any] = {"gradient": gradient or self.gradient, "memory": self.memory, "kernel": self.kernel}
        return scan(step, carry, xs, resets=resets, reset_state=restart, **settings)

    def _calls(self, sequences: Sequences, given: Sequence[Any] | None) -> list[CellCall]:
        """How each cell is called: found out by calling it, once for each kind of input."""
        x, kind = sequences.x, sequences.x.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        key = (x.shape[2:], x.dtype, x.device, autocast, [*map(id, self.cells)], self.form, described(given))
        if self._trials is None or self._trials[0] != key:
            self._trials = key, self._tried(x[0], given)
        return self._trials[1]

    def _tried(self, x: Tensor, given: Sequence[Any] | None) -> list[CellCall]:
        x = sample(x, unlike(self.cells, x, given))
        D, starts = 2 if self.bidirectional else 1, partial(self._starts, given=given)
        calls = try_cells(list(self.cells), D, x, starts, self.form)
        # Nothing is held of a state that was given, and no layer by itself.
        return calls if given is None and not self._learned else [replace(call, start=None) for call in calls]

    def _starts(self, k: int, cell: nn.Module, x: Tensor, given: Sequence[Any] | None) -> tuple[list[Start], bool]:
        """The states to try with cell k, and whether one of them has to fit."""
        if given is not None:
            return [lambda B: first_lane(given[k], B)], True
        if self._learned:
            return [lambda B: learned_state(self.initial_states, self._learned[k], B)], True
        return declared_starts(cell, x)
