"""Chapter 7: stacks and directions against torch, and against stacks restarted from constant states."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from bptt.equations import policies, recurrence, stacks

from .numeric import Array, build, close, complex_step, generator, w_in_torch_order

T, B = 5, 2


def make(name: str, layers: int, directions: int, *, H: int = 2, lanes: int = B, length: int = T) -> tuple[Any, ...]:
    """(layers, x, s_0, dy, ds_T), all random."""
    rng = generator(7)
    cells: list[list[Any]] = []
    inputs = 2
    for l in range(layers):
        cells.append([build(name, inputs, H, seed=10 * l + d) for d in range(directions)])
        inputs = directions * cells[-1][0].output_size
    s_0 = [[rng.normal(size=(lanes, cell.state_size)) for cell in layer] for layer in cells]
    ds_T = [[rng.normal(size=(lanes, cell.state_size)) for cell in layer] for layer in cells]
    return cells, rng.normal(size=(length, lanes, 2)), s_0, rng.normal(size=(length, lanes, inputs)), ds_T


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("name", ["tanh", "relu", "gru", "lstm", "lstm_proj"])
def test_full_gradient_by_torch(name: str, directions: int) -> None:
    L, H = 3, 3
    cells, x, s_0, dy, ds_T = make(name, L, directions, H=H)
    got = stacks.sweep(cells, x, s_0, dy, ds_T, stacks.spans(T, T, T, directions))
    P = cells[0][0].output_size
    options: dict[str, Any] = {"num_layers": L, "bidirectional": directions == 2, "dtype": torch.float64}
    if name == "lstm_proj":
        options["proj_size"] = P
    if name in ("tanh", "relu"):
        options["nonlinearity"] = name
    kind = {"gru": torch.nn.GRU, "lstm": torch.nn.LSTM, "lstm_proj": torch.nn.LSTM}.get(name, torch.nn.RNN)
    layer = kind(2, H, **options)
    flat = [w for row in cells for cell in row for w in w_in_torch_order(recurrence.weights(cell))]
    with torch.no_grad():
        for parameter, value in zip(layer.parameters(), flat, strict=True):
            parameter.copy_(torch.from_numpy(value))
    parts = [slice(0, P), slice(P, None)] if name.startswith("lstm") else [slice(0, P)]
    rows, final_rows = ([z for row in nested for z in row] for nested in (s_0, ds_T))
    initial = [torch.from_numpy(np.stack([z[:, part] for z in rows])).requires_grad_() for part in parts]
    x_t = torch.from_numpy(x).requires_grad_()
    y, final = layer(x_t, tuple(initial) if len(initial) == 2 else initial[0])
    final = final if isinstance(final, tuple) else (final,)
    loss = (y * torch.from_numpy(dy)).sum()
    for z, part in zip(final, parts, strict=True):
        loss = loss + (z * torch.from_numpy(np.stack([dz[:, part] for dz in final_rows]))).sum()
    grads = [g.numpy() for g in torch.autograd.grad(loss, [x_t, *initial, *layer.parameters()])]
    close(got["y"], y.detach().numpy())
    close(
        np.stack([z for row in got["final"] for z in row]), np.concatenate([z.detach().numpy() for z in final], axis=2)
    )
    close(got["x"], grads[0])
    close(np.stack([z for row in got["s_0"] for z in row]), np.concatenate(grads[1 : 1 + len(parts)], axis=2))
    mine = [w for row in got["weights"] for dw in row for w in w_in_torch_order(dw)]
    for a, b in zip(mine, grads[1 + len(parts) :], strict=True):
        close(a, b)


def all_states(cells: Any, x: Array, s_0: Any, resets: Array | None) -> list[list[Array]]:
    """Every layer's and direction's states, in own steps."""
    out = []
    for layer, initial in zip(cells, s_0, strict=True):
        states = [
            recurrence.run(cell, stacks.own(x, d), initial[d], stacks.own_resets(resets, d))[0]
            for d, cell in enumerate(layer)
        ]
        out.append(states)
        x = np.concatenate([stacks.own(z[:, :, : layer[0].output_size], d) for d, z in enumerate(states)], axis=2)
    return out


def restarted_loss(
    cells: Any, x: Array, s_0: Any, dy: Array, ds_T: Any, span: Any, source: int, constant: Any, resets: Array | None
) -> Any:
    """One block's loss, on a stack that runs over the span only, from states held constant at both of its ends."""
    earliest, first, last, latest = span
    low, high = (earliest, latest) if source == 0 else (T - 1 - latest, T - 1 - earliest)
    z, total = x[low : high + 1], 0.0
    for l, layer in enumerate(cells):
        halves = []
        for d, cell in enumerate(layer):
            entry = low if d == 0 else T - 1 - high
            initial = s_0[l][d] if entry == 0 else constant[l][d][entry - 1]
            cut = stacks.own_resets(resets, d)
            cut = None if cut is None else cut[entry : entry + len(z)]
            states, _ = recurrence.run(cell, stacks.own(z, d), initial, cut)
            if d == source and last == T - 1:
                total = total + (states[-1] * ds_T[l][d]).sum()
            halves.append(stacks.own(states[:, :, : cell.output_size], d))
        z = np.concatenate(halves, axis=2)
    P = cells[-1][source].output_size
    for s in range(first, last + 1):
        t = s if source == 0 else T - 1 - s
        half = slice(source * P, (source + 1) * P)
        total = total + (z[t - low, :, half] * dy[t, :, half]).sum()
    return total


@pytest.mark.parametrize(("window", "every"), [(1, 1), (2, 1), (3, 2)])
@pytest.mark.parametrize(
    ("name", "directions", "reset"), [("tanh", 1, 0), ("lstm", 1, 1), ("gru", 2, 0), ("tanh", 2, 1)]
)
def test_a_window_counts_steps_of_the_whole_network(
    name: str, directions: int, reset: int, window: int, every: int
) -> None:
    cells, x, s_0, dy, ds_T = make(name, 2, directions, lanes=1)
    resets = np.array([[0], [0], [1], [0], [0]], dtype=bool) if reset else None
    spans = stacks.spans(T, window, every, directions)
    got = stacks.sweep(cells, x, s_0, dy, ds_T, spans, resets=resets)
    constant = all_states(cells, x, s_0, resets)
    cases = list(itertools.product(spans, range(directions)))

    def total(cells: Any, x: Array, s_0: Any) -> Any:
        return sum(restarted_loss(cells, x, s_0, dy, ds_T, *case, constant, resets) for case in cases)

    close(got["x"], complex_step(lambda z: total(cells, z, s_0), x))
    for l, d in itertools.product(range(2), range(directions)):

        def put(nested: Any, z: Any, l: int = l, d: int = d) -> Any:
            return [[z if (i, j) == (l, d) else old for j, old in enumerate(row)] for i, row in enumerate(nested)]

        close(got["s_0"][l][d], complex_step(lambda z, put=put: total(cells, x, put(s_0, z)), s_0[l][d]))
        for key, value in recurrence.weights(cells[l][d]).items():

            def weight_loss(z: Array, key: str = key, put: Any = put, cell: Any = cells[l][d]) -> Any:
                return total(put(cells, replace(cell, **{key: z})), x, s_0)

            close(got["weights"][l][d][key], complex_step(weight_loss, value))


def test_walking_the_window_anew_in_each_layer_would_reach_too_far() -> None:
    cells, x, s_0, dy, ds_T = make("tanh", 2, 1)
    dy[:-1] = 0
    ds_T = [[np.zeros_like(z) for z in row] for row in ds_T]
    got = stacks.sweep(cells, x, s_0, dy, ds_T, stacks.spans(T, 2, 1))
    assert np.flatnonzero(np.abs(got["x"]).max((1, 2))).tolist() == [3, 4]


def test_a_loss_in_the_middle_reaches_both_ways_in_a_bidirectional_stack() -> None:
    cells, x, s_0, dy, ds_T = make("tanh", 2, 2)
    middle = np.zeros_like(dy)
    middle[2] = dy[2]
    ds_T = [[np.zeros_like(z) for z in row] for row in ds_T]
    for window, reached in ((1, [2]), (2, [1, 2, 3]), (3, [0, 1, 2, 3, 4])):
        got = stacks.sweep(cells, x, s_0, middle, ds_T, stacks.spans(T, window, 1, 2))
        assert np.flatnonzero(np.abs(got["x"]).max((1, 2))).tolist() == reached


def test_one_layer_is_the_sweep_of_its_cell() -> None:
    cells, x, s_0, dy, ds_T = make("lstm", 1, 1)
    e = recurrence.local_error(cells[0][0], dy, ds_T[0][0])
    got = stacks.sweep(cells, x, s_0, dy, ds_T, stacks.spans(T, 3, 2))
    one = policies.sweep(cells[0][0], x, s_0[0][0], e, policies.blocks(T, 3, 2))
    close(got["x"], one["x"])
    close(got["lambda"][0], one["lambda"])
    for key, value in got["weights"][0][0].items():
        close(value, one[key])


def test_the_reverse_direction_is_the_sweep_of_the_reversed_sequence() -> None:
    cells, x, s_0, dy, ds_T = make("gru", 1, 2)
    got = stacks.sweep(cells, x, s_0, dy, ds_T, stacks.spans(T, 3, 2, 2))
    cell = cells[0][1]
    e = recurrence.local_error(cell, dy[::-1, :, cell.output_size :], ds_T[0][1])
    one = policies.sweep(cell, x[::-1], s_0[0][1], e, policies.blocks(T, 3, 2))
    close(got["lambda"][1], one["lambda"][::-1])
    close(got["weights"][0][1]["W_hh"], one["W_hh"])


def test_chunked_cuts_every_edge_in_own_steps() -> None:
    cells, x, s_0, dy, ds_T = make("gru", 2, 1)
    cut = stacks.chunk_edge_factors(T, B, 2)
    got = stacks.sweep(cells, x, s_0, dy, ds_T, stacks.spans(T, T, T), xi=[[cut], [cut]])
    stops_at_start = [(first, first, last, last) for _, first, last in policies.chunks(T, 2)]
    same = stacks.sweep(cells, x, s_0, dy, ds_T, stops_at_start)
    close(got["x"], same["x"])
    for l in range(2):
        close(got["s_0"][l][0], same["s_0"][l][0])
        for key, value in got["weights"][l][0].items():
            close(value, same["weights"][l][0][key])


def gradients_with_xi(case: Any, xi: Any, directions: int) -> list[Array]:
    cells, x, s_0, dy, ds_T = case
    got = stacks.sweep(cells, x, s_0, dy, ds_T, stacks.spans(len(x), len(x), len(x), directions), xi=xi)
    return [
        got["x"],
        *(z for row in got["s_0"] for z in row),
        *(w for r in got["weights"] for dw in r for w in dw.values()),
    ]


def test_layers_of_one_direction_may_share_a_draw() -> None:
    case = make("tanh", 2, 1, lanes=1, length=4)
    p = 0.6
    total = [np.zeros_like(g) for g in gradients_with_xi(case, None, 1)]
    for kept in itertools.product((0, 1), repeat=3):
        xi = np.array([[1.0], *[[k / p] for k in kept]])
        probability = np.prod([p if k else 1 - p for k in kept])
        total = [a + probability * g for a, g in zip(total, gradients_with_xi(case, [[xi], [xi]], 1), strict=True)]
    for a, b in zip(total, gradients_with_xi(case, None, 1), strict=True):
        close(a, b, 1e-12)


def test_directions_must_draw_their_own() -> None:
    case = make("tanh", 2, 2, lanes=1, length=2)
    p = 0.6
    full = gradients_with_xi(case, None, 2)

    def mean(shared: bool) -> list[Array]:
        total = [np.zeros_like(g) for g in full]
        for kept in itertools.product((0, 1), repeat=1 if shared else 4):
            draws = [np.array([[1.0], [k / p]]) for k in (kept * 4 if shared else kept)]
            probability = np.prod([p if k else 1 - p for k in kept])
            for a, g in zip(total, gradients_with_xi(case, [draws[:2], draws[2:]], 2), strict=True):
                a += probability * g
        return total

    for a, b in zip(mean(shared=False), full, strict=True):
        close(a, b, 1e-12)
    assert max(np.abs(a - b).max() for a, b in zip(mean(shared=True), full, strict=True)) > 1e-3


def test_a_reset_separates_both_directions() -> None:
    cells, x, s_0, _, _ = make("gru", 2, 2)
    resets = np.zeros((T, B), dtype=bool)
    resets[2] = True
    y, _, _, _ = stacks.forward(cells, x, s_0, resets)
    zeros = [[np.zeros_like(z) for z in row] for row in s_0]
    early, _, _, _ = stacks.forward(cells, x[:2], [[row[0], z[1]] for row, z in zip(s_0, zeros, strict=True)])
    late, _, _, _ = stacks.forward(cells, x[2:], [[z[0], row[1]] for row, z in zip(s_0, zeros, strict=True)])
    close(y, np.concatenate([early, late]))


@pytest.mark.parametrize("name", ["gru", "lstm_proj"])
def test_dropout_masks_by_complex_steps(name: str) -> None:
    cells, x, s_0, dy, ds_T = make(name, 3, 2)
    rng = generator(11)
    masks = [2.0 * (rng.random((T, B, 2 * row[0].output_size)) < 0.5) for row in cells[:-1]]
    got = stacks.sweep(cells, x, s_0, dy, ds_T, stacks.spans(T, T, T, 2), masks=masks)

    def loss(values: Array) -> Any:
        y, finals, _, _ = stacks.forward(cells, values, s_0, masks=masks)
        return (y * dy).sum() + sum(
            (z * d).sum() for a, b in zip(finals, ds_T, strict=True) for z, d in zip(a, b, strict=True)
        )

    close(got["x"], complex_step(loss, x))
    assert not np.allclose(got["x"], stacks.sweep(cells, x, s_0, dy, ds_T, stacks.spans(T, T, T, 2))["x"])
