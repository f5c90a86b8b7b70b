"""Any cell as a layer on sequences that lie one after the other (cu_seqlens, jagged): as each sequence alone."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import bptt

I, H = 3, 4
LENGTHS = (5, 0, 9, 1, 0, 3)
OFFSETS = torch.tensor([0, *LENGTHS]).cumsum(0)


class Tokens(nn.Module):
    """A cell of tokens, whose sequences are [S] and whose state is one tensor."""

    hidden_size = H

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, H, dtype=torch.float64)

    def forward(self, token: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.table(token) + 0.5 * h)


class OwnStart(nn.Module):
    """A cell that makes a first state that is not zero."""

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        return torch.sin(x + (torch.ones_like(x) if h is None else h))


def layer_of(name: str) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"dtype": torch.float64}
    return {
        "gru": lambda: bptt.nn.Recurrent(nn.GRUCell(I, H, **sizes), gradient="truncated:4/2"),
        "lstm_first": lambda: bptt.nn.Recurrent(
            nn.LSTMCell(I, H, **sizes), batch_first=True, gradient="chunked:3", learn_initial_state=True
        ),
        "both": lambda: bptt.nn.Recurrent(
            lambda n: nn.LSTMCell(2 * H if n else I, H, **sizes), 2, bidirectional=True, gradient="truncated:3"
        ),
        "list": lambda: bptt.nn.Recurrent(
            [nn.GRUCell(I, H, **sizes), nn.LSTMCell(H, H, **sizes)], reverse=True, memory="checkpoints:steps=2"
        ),
        "tokens": lambda: bptt.nn.Recurrent(Tokens(), kernel="replay"),
    }[name]()


def input_of(name: str) -> Tensor:
    torch.manual_seed(1)
    if name == "tokens":
        return torch.randint(5, (sum(LENGTHS),))
    return torch.randn(sum(LENGTHS), I, dtype=torch.float64)


def at(state: Any, i: int, dim: int) -> Any:
    """The state of one sequence: of a list of the cells' states, the lanes come first."""
    return tree_map(lambda t: t.narrow(dim, i, 1), state)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", ["gru", "lstm_first", "both", "list", "tokens"])
def test_flat_sequences_are_each_sequence_alone(name: str, given: bool) -> None:
    layer, x = layer_of(name), input_of(name)
    leaves = [x.requires_grad_()] if name != "tokens" else []
    _, like = layer(x, cu_seqlens=OFFSETS)
    hx = tree_map(lambda t: torch.randn_like(t).requires_grad_(), like) if given else None
    resets = torch.rand(len(x)) < 0.2
    y, final = layer(x, hx, cu_seqlens=OFFSETS.int(), resets=resets)
    dim, time = 0 if name == "list" else 1, 1 if layer.batch_first else 0
    rows, finals = [], []
    for i, own in enumerate(x.split(list(LENGTHS))):
        start = None if hx is None else at(hx, i, dim)
        if len(own):
            cut = resets.split(list(LENGTHS))[i]
            out, last = layer(own.unsqueeze(1 - time), start, resets=cut.unsqueeze(1 - time))
            rows.append(out.squeeze(1 - time))
        else:
            last = start if start is not None else tree_map(torch.zeros_like, at(like, i, dim))
            if name == "lstm_first" and not given:
                last = tuple(p.expand(1, 1, H) for p in layer.initial_states)
        finals.append(tree_leaves(last))
    expected = [torch.cat(rows), *(torch.cat(part, dim) for part in zip(*finals, strict=True))]
    found = [y, *tree_leaves(final)]
    torch.testing.assert_close(found, expected)
    weights = [torch.randn_like(t) for t in found]
    leaves += [*layer.parameters(), *tree_leaves([] if hx is None else hx)]
    results = [torch.autograd.grad(out, leaves, weights, allow_unused=True) for out in (found, expected)]
    torch.testing.assert_close(*results)


def test_a_jagged_tensor_is_a_flat_one() -> None:
    layer, x = layer_of("gru"), input_of("gru")
    y, final = layer(x, cu_seqlens=OFFSETS)
    out, last = layer(torch.nested.nested_tensor_from_jagged(x, offsets=OFFSETS))
    assert out.layout is torch.jagged
    torch.testing.assert_close((out.values(), last), (y, final))


@pytest.mark.parametrize("name", ["both", "list", "tokens"])
def test_no_sequence_with_a_step(name: str) -> None:
    layer, none = layer_of(name), torch.zeros(3, dtype=torch.int64)
    y, final = layer(input_of(name)[:0], cu_seqlens=none)
    assert y.shape == (0, 2 * H if name == "both" else H)
    assert all(not t.any() for t in tree_leaves(final))
    hx = tree_map(torch.randn_like, final)
    _, kept = layer(input_of(name)[:0], hx, cu_seqlens=none)
    torch.testing.assert_close(kept, hx)


def test_a_first_state_that_only_the_cell_knows() -> None:
    layer, x = bptt.nn.Recurrent(OwnStart()), input_of("gru")
    y, _ = layer(x, cu_seqlens=torch.tensor([0, 5, 18]))
    torch.testing.assert_close(y[:5], layer(x[:5, None])[0][:, 0])
    with pytest.raises(ValueError, match="cu_seqlens must give every sequence a step where the cell makes its first"):
        layer(x, cu_seqlens=OFFSETS)


@pytest.mark.parametrize("name", ["gru", "lstm_first", "list", "tokens"])
def test_the_scan_of_flat_sequences_is_the_layers_call(name: str) -> None:
    layer, x = layer_of(name), input_of(name)
    _, like = layer(x, cu_seqlens=OFFSETS)
    hx, restart = (tree_map(torch.randn_like, like) for _ in range(2))
    resets = torch.rand(len(x)) < 0.4
    expected = layer(x, hx, cu_seqlens=OFFSETS, resets=resets, reset_state=restart)
    jagged = torch.nested.nested_tensor_from_jagged(x, offsets=OFFSETS)
    for given, of in ((x, {"cu_seqlens": OFFSETS}), (jagged, {})):
        step, carry, xs, own = layer.as_scan(given, hx, resets=resets, reset_state=restart, **of)
        scanned = bptt.scan(step, carry, xs, resets=own, gradient=layer.gradient)
        y, final = layer.from_scan(scanned, given, hx, **of)
        torch.testing.assert_close((y.values() if y.is_nested else y, final), expected)
    with pytest.raises(ValueError, match="at least one step: got 3 sequences without any"):
        layer.as_scan(x[:0], cu_seqlens=torch.zeros(4, dtype=torch.int64))


def test_what_is_told_of_flat_sequences() -> None:
    layer, x = layer_of("gru"), input_of("gru")
    alone = nn.utils.rnn.pack_sequence([own for own in x.split(list(LENGTHS)) if len(own)], enforce_sorted=False)
    jagged = torch.nested.nested_tensor_from_jagged(x, offsets=OFFSETS)
    own: Any = bptt.nn.GRU(I, H, gradient="truncated:4", memory="checkpoints:steps=2", dtype=torch.float64)
    for subject in (layer, own):
        told = [
            str(bptt.explain(subject, alone)),
            str(bptt.explain(subject, x, cu_seqlens=OFFSETS)),
            str(bptt.explain(subject, jagged)),
        ]
        assert told[1:] == told[:1] * 2
    assert "kernel" in bptt.explain(own, x[:0], cu_seqlens=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to input's 18 rows"):
        bptt.explain(own, x, cu_seqlens=OFFSETS - 1)
    with pytest.raises(TypeError, match="cu_seqlens is for explain"):
        bptt.explain(lambda h, x: (h, h), torch.zeros(2, 4), torch.zeros(2, 3), cu_seqlens=OFFSETS)  # type: ignore[call-overload]


def test_a_plan_knows_the_input_from_any_form_of_a_call() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            cell = nn.Sequential(nn.Identity())  # a cell that does not tell its input
            cell.append(nn.GRUCell(I, H, dtype=torch.float64))
            cell.forward = lambda x, h: cell[1](x, h)  # type: ignore[method-assign]
            cell.hidden_size = H  # type: ignore[assignment]
            self.layer = bptt.nn.Recurrent(cell)

        def forward(self, x: Any) -> Any:
            return self.layer(input=x, **({"cu_seqlens": OFFSETS} if x is flat else {}))

    model, flat = Model(), input_of("gru")
    jagged, packed = (
        torch.nested.nested_tensor_from_jagged(flat, offsets=OFFSETS),
        nn.utils.rnn.pack_sequence([flat[:3], flat[3:5]]),
    )
    inputs: list[Any] = [flat[:5, None].expand(5, 2, I), flat, jagged, packed, flat[:5].clone()]
    assert len({bptt.plan(model, 4, 2, x=x).tape_bytes for x in inputs}) == 1


@pytest.mark.parametrize("name", ["lengths", "cu_seqlens"])
def test_a_stream_refuses_several_lengths(name: str) -> None:
    said = f"{name} must be None for stream_gradients.*one lane, with resets where each begins"
    for layer in (layer_of("gru"), bptt.nn.GRU(I, H)):
        with pytest.raises(TypeError, match=said):
            bptt.stream_gradients(layer, input_of("gru"), lambda _, y: y.sum(), **{name: OFFSETS})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"cu_seqlens": torch.tensor([0, 9])}, ValueError, "Recurrent: cu_seqlens must rise from 0 to input's 18 rows"),
        ({"cu_seqlens": torch.tensor([0, 9, 5, 18])}, ValueError, "cu_seqlens must rise from 0"),
        ({"cu_seqlens": torch.tensor([0.0, 18.0])}, TypeError, "cu_seqlens must be int32 or int64: got torch.float32"),
        ({"cu_seqlens": torch.tensor(18)}, ValueError, r"cu_seqlens must have shape \[N \+ 1\]"),
        ({"lengths": [5]}, ValueError, "lengths must be None for sequences one after the other"),
        ({"hx": torch.zeros(1, 4, H).double()}, ValueError, r"hx must hold tensors \[1, 6, ...\]"),
        ({"resets": torch.zeros(17, dtype=torch.bool)}, ValueError, r"resets must be a bool tensor of shape \(18,\)"),
    ],
)
def test_what_does_not_fit(wrong: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        layer_of("gru")(input_of("gru"), **{"cu_seqlens": OFFSETS, **wrong})
