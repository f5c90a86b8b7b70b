"""What is not finite is found where it was planted: stage, layer, step, lane, gate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import bptt
from bptt.engine import Asked, Saved, Stack
from bptt.flow import Finding, watch

T, B, I, H = 9, 4, 3, 5

CELLS = ["RNN", "GRU", "LSTM"]
GATES = {"RNN": "h", "GRU": "rzn", "LSTM": "ifgo"}
SHAPES: list[dict[str, Any]] = [
    {},
    {"num_layers": 2},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True},
]
LIBRARIES = [bptt.nn, torch.nn]


class Model(torch.nn.Module):
    """An embedding, a recurrent layer, a linear output."""

    def __init__(self, cell: str, library: Any = bptt.nn, **options: Any) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(7, I)
        self.recurrent = getattr(library, cell)(I, H, **options)
        self.output = torch.nn.Linear(H * (2 if self.recurrent.bidirectional else 1), 2)

    def forward(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        y, state = self.recurrent(self.embedding(ids), state)
        return self.output(y), state


def ids() -> Tensor:
    return torch.arange(T * B).view(T, B) % 7


def found(model: torch.nn.Module, *args: Any, loss: Any = None, **options: Any) -> Finding:
    """The finding of one step of a model (a layer's y, a model's output, by default summed)."""
    with watch(model, **options) as doctor:
        value = (loss or (lambda out: out.sum()))(model(*args)[0])
        value.backward()
        diagnosis = doctor.check(value)
    assert diagnosis is not None
    [finding] = diagnosis.findings
    assert str(diagnosis) == finding.message
    return finding


def place(finding: Finding) -> tuple[Any, ...]:
    return finding.stage, finding.kind, finding.layer, finding.step, finding.lane, finding.gate


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("options", SHAPES)
def test_a_step_without_fault_has_no_diagnosis(cell: str, options: dict[str, Any], library: Any):
    model = Model(cell, library, **options)
    with watch(model) as doctor:
        loss = model(ids())[0].square().sum()
        loss.backward()
        assert doctor.check(loss) is None
        assert doctor.check() is None
        assert doctor.check(float(loss.detach()), grad_norm=1.0) is None


@pytest.mark.parametrize(("value", "kind"), [(math.nan, "nan"), (math.inf, "inf")])
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("options", SHAPES)
def test_in_the_input(cell: str, options: dict[str, Any], library: Any, value: float, kind: str):
    layer, x = getattr(library, cell)(I, H, **options), torch.randn(T, B, I)
    x[6, 2, 1] = value
    x[7, 0, 0] = value
    assert place(found(layer, x)) == ("forward", kind, None, 6, 2, None)


@pytest.mark.parametrize("cell", CELLS)
def test_in_the_initial_state(cell: str):
    layer = getattr(bptt.nn, cell)(I, H, 2)
    h = torch.zeros(2, B, H)
    h[1, 3, 0] = torch.nan
    hx = (h, torch.zeros(2, B, H)) if cell == "LSTM" else h
    finding = found(layer, torch.randn(T, B, I), hx)
    assert place(finding) == ("forward", "nan", "layer 1", 0, 3, None)
    assert "start from zero" in finding.message


@pytest.mark.parametrize(
    ("which", "value"),
    [
        *((which, value) for which in ("weight_ih", "weight_hh") for value in (math.nan, math.inf)),
        ("bias_ih", math.nan),  # an infinite bias shuts or opens its gate, and all else stays finite
    ],
)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_in_a_weight_of_each_gate(cell: str, which: str, library: Any, value: float):
    for g, gate in enumerate(GATES[cell]):
        for k, layer in ((0, "layer 0"), (1, "layer 1")):
            model = Model(cell, library, num_layers=2)
            parameter = getattr(model.recurrent, f"{which}_l{k}")
            with torch.no_grad():
                parameter[(g * H + 3, *[1] * (parameter.dim() - 1))] = value
            finding = found(model, ids())
            kind = "nan" if math.isnan(value) else "inf"
            assert (finding.stage, finding.kind, finding.layer, finding.gate) == ("forward", kind, layer, gate)
            assert finding.parameter == f"recurrent.{which}_l{k}"
            assert f"{layer} of `recurrent`" in finding.message
            if math.isnan(value):
                assert (finding.step, finding.lane) == (0, 0)


def test_in_a_weight_of_the_reverse_direction():
    model = Model("LSTM", bidirectional=True)
    with torch.no_grad():
        model.recurrent.weight_hh_l0_reverse[H + 2, 0] = torch.nan
    finding = found(model, ids())
    assert place(finding) == ("forward", "nan", "layer 0 reversed", T - 1, 0, "f")  # its first step is the last


@pytest.mark.parametrize("name", ["embedding.weight", "output.bias"])
def test_in_a_parameter_that_does_not_recur(name: str):
    model = Model("GRU")
    with torch.no_grad():
        model.get_parameter(name)[1] = torch.nan
    finding = found(model, ids())
    assert (finding.stage, finding.module, finding.parameter) == ("forward", name.split(".")[0], name)
    assert "in row 1" in finding.message


def test_an_overflow_in_the_forward_pass():
    """h_t = 2^t in float32 ends after 127 steps; the second lane starts at 2^8, the third is 0."""
    layer = bptt.nn.init.identity_(bptt.nn.RNN(1, 2, nonlinearity="relu"), 2.0)
    h = torch.tensor([1.0, 256.0, 0.0])[None, :, None].expand(1, 3, 2)
    finding = found(layer, torch.zeros(140, 3, 1), h)
    assert place(finding) == ("forward", "overflow", "layer 0", 119, 1, "h")  # 2^8 * 2^120 = 2^128
    assert finding.value == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("options", SHAPES)
def test_in_a_local_error(cell: str, options: dict[str, Any], value: float):
    layer = getattr(bptt.nn, cell)(I, H, **options)
    dy = torch.ones(T, B, H * (2 if "bidirectional" in options else 1))
    dy[3, 1, 2] = value
    dy[2, 0, 0] = value
    with watch(layer) as doctor:
        layer(torch.randn(T, B, I))[0].backward(dy)
        diagnosis = doctor.check(1.0)
    assert diagnosis is not None
    kind = "nan" if math.isnan(value) else "inf"
    assert place(diagnosis.findings[0]) == ("local error", kind, None, 3, 1, None)


def test_in_the_loss_itself():
    model = Model("GRU")
    nothing = torch.full((T * B,), -100)
    finding = found(model, ids(), loss=lambda out: torch.nn.functional.cross_entropy(out.flatten(0, 1), nothing))
    assert (finding.stage, finding.kind) == ("loss", "nan")


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_an_adjoint_that_overflows(library: Any, layers: int, reverse: bool):
    """At h = 0, tanh' is 1: each step back multiplies the adjoint by 100 in the lane that has an error."""
    layer = library.RNN(I, H, layers, bidirectional=reverse)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.copy_(100 * torch.eye(H) if "weight_hh" in name else 0 * p)
    x, lane, last = torch.zeros(60, B, I), 2, 50
    half = slice(H, None) if reverse else slice(None, H)
    finding = found(layer, x, loss=lambda y: 1e3 * y[59 - last if reverse else last, lane, half].sum())
    overflows = next(n for n in range(60) if 1e3 * 100.0**n > torch.finfo(torch.float32).max)
    step = last - overflows
    name = f"layer {layers - 1}{' reversed' if reverse else ''}"
    assert place(finding) == ("adjoint", "overflow", name, 59 - step if reverse else step, lane, None)
    assert "explodes" in finding.message
    assert "radius_" in finding.message


@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
@pytest.mark.parametrize("policy", ["full", "chunked:30", "truncated:40", "truncated:40/10"])
def test_an_adjoint_that_overflows_in_a_gated_cell(cell: str, policy: str):
    """Against the same adjoints in float64, where they do not overflow."""
    torch.manual_seed(3)
    layer = getattr(bptt.nn, cell)(I, H, gradient=policy)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if "weight_hh" in name:
                p.copy_(torch.cat([200 * torch.linalg.qr(block)[0] for block in p.split(H)]))
            if "bias" in name:
                p.zero_()
    x = torch.zeros(60, 1, I)
    finding = found(layer, x)
    wide = getattr(bptt.nn, cell)(I, H, gradient=policy).double()
    wide.load_state_dict(layer.state_dict())
    adjoints = bptt.gradients(wide, x.double(), torch.ones(60, 1, H, dtype=torch.float64)).adjoints
    over = (adjoints.abs().amax((1, 2)) > torch.finfo(torch.float32).max).nonzero()
    assert finding.stage == "adjoint"
    assert finding.kind in ("overflow", "nan")
    assert finding.step is not None
    assert int(over.max()) <= finding.step <= int(over.max()) + 1  # inside a step, gate errors come before dL/dh


@pytest.mark.parametrize("name", ["recurrent.weight_hh_l0", "recurrent.bias_ih_l1", "embedding.weight"])
def test_in_a_parameter_gradient_alone(name: str):
    model = Model("LSTM", num_layers=2)
    parameter = model.get_parameter(name)

    def spoil(grad: Tensor) -> Tensor:
        spoilt = grad.clone()
        spoilt[6] = torch.nan
        return spoilt

    parameter.register_hook(spoil)
    finding = found(model, ids())
    assert (finding.stage, finding.kind, finding.parameter) == ("parameter gradient", "nan", name)
    assert finding.gate == (None if "embedding" in name else "f")  # rows 5 to 9 of an LSTM with H = 5


def test_gradients_whose_norm_alone_overflows():
    layer = bptt.nn.RNN(I, H)
    finding = found(layer, torch.randn(T, B, I), loss=lambda y: 1e25 * y.sum())
    assert (finding.stage, finding.kind) == ("parameter gradient", "overflow")
    assert "squares overflow" in finding.message


@pytest.mark.parametrize("batch_first", [False, True])
def test_packed_sequences_and_batch_first(batch_first: bool):
    layer, x = bptt.nn.GRU(I, H, batch_first=batch_first), torch.randn(T, B, I)
    x[4, 1] = torch.nan
    given = x.transpose(0, 1) if batch_first else x
    assert place(found(layer, given))[3:5] == (4, 1)
    packed = pack_padded_sequence(given, torch.tensor([3, 7, 5, 9]), batch_first=batch_first, enforce_sorted=False)
    assert place(found(layer, packed, loss=lambda y: y.data.sum()))[3:5] == (4, 1)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("jagged", [False, True])
def test_lanes_are_numbered_as_given_where_some_sequences_have_no_step(cell: str, jagged: bool):
    """Sequences of 0, 5, 0 and 10 steps: the fourth is the second that runs."""
    layer, ends = getattr(bptt.nn, cell)(I, H, bidirectional=True), torch.tensor([0, 0, 5, 5, 15])
    x = torch.randn(15, I)
    x[9, 1] = torch.nan  # step 4 of the fourth
    for network in (layer, bptt.nn.Recurrent(getattr(torch.nn, f"{cell}Cell")(I, H))):
        given = torch.nested.nested_tensor_from_jagged(x, ends) if jagged else x
        with watch(network) as doctor:
            y, _ = network(given, **({} if jagged else {"cu_seqlens": ends}))
            loss = (y.values() if jagged else y).sum()
            loss.backward()
            diagnosis = doctor.check(loss)
        assert diagnosis is not None
        [finding] = diagnosis.findings
        if network is layer:
            assert place(finding) == ("forward", "nan", None, 4, 3, None)
        else:
            assert "its input, at [9, 1], holds NaN" in finding.message


@pytest.mark.parametrize("cell", CELLS)
def test_in_the_error_of_a_final_state_of_either_direction(cell: str):
    for row, name in enumerate(("layer 0", "layer 0 reversed", "layer 1", "layer 1 reversed")):
        layer = getattr(bptt.nn, cell)(I, H, 2, bidirectional=True)
        with watch(layer) as doctor:
            _, final = layer(torch.randn(T, B, I))
            h = final if isinstance(final, Tensor) else final[0]
            loss = h.sum() + (0 * h[row, 1].sum()).sqrt()
            loss.backward()
            diagnosis = doctor.check(loss)
        assert diagnosis is not None
        assert place(diagnosis.findings[0]) == ("local error", "nan", name, None, 1, None)


@pytest.mark.parametrize("own", [False, True], ids=["torch's generator", "a generator of its own"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_what_a_step_drew_is_drawn_again(library: Any, own: bool):
    """Dropout masks and cuts: the replay gives the outputs and gradients of the step, and moves no generator."""
    layer = library.LSTM(I, H, 2, dropout=0.5)
    generator = torch.Generator().manual_seed(3) if own else None
    if library is bptt.nn:
        layer.gradient = bptt.Randomized(0.5, generator=generator)
    with watch(layer) as doctor:
        y, _ = layer(torch.randn(T, B, I))
        y.sum().backward()
        before = torch.get_rng_state(), None if generator is None else generator.get_state()
        _, engine, net = doctor._calls[-1].net()
        assert torch.equal(torch.get_rng_state(), before[0])
        assert generator is None or torch.equal(generator.get_state(), before[1])
    with torch.no_grad():
        program = Stack(net, "gates")
        saved = Saved(engine.tensors, *program.forward(engine.tensors, keep=True))
        asked = Asked((torch.ones_like(y), None, None), (False,) * 3 + (True,) * 8)
        grads = program.backward(saved, asked).inputs
    torch.testing.assert_close(saved.outputs[0], y.detach())
    for grad, parameter in zip(grads[3:], layer.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad)


def test_the_doctor_changes_nothing_and_goes_without_a_trace():
    def train(watched: bool) -> list[Tensor]:
        torch.manual_seed(1)
        model = Model("LSTM", num_layers=2, dropout=0.5, gradient="randomized:0.8")
        optimiser = torch.optim.Adam(model.parameters())
        doctor = watch(model) if watched else None
        for _ in range(5):
            optimiser.zero_grad()
            loss = model(ids())[0].square().sum()
            loss.backward()
            if doctor is not None:
                assert doctor.check(loss) is None
                doctor.examine()
            optimiser.step()
        if doctor is not None:
            doctor.remove()
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        assert not any(getattr(m, name) for m in model.modules() for name in hooks)
        return [*model.parameters(), torch.rand(3)]

    for a, b in zip(train(True), train(False), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_what_cannot_be_watched():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module: got int"):
        watch(3)


def test_a_model_whose_forward_is_not_what_is_called():
    """As a training step that calls the layers itself: each step is looked at alone."""
    model = torch.nn.ModuleDict({"rnn": bptt.nn.GRU(2, 3), "out": torch.nn.Linear(3, 1)})
    found = []
    with bptt.flow.watch(model) as doctor:
        for step in range(3):
            x = torch.zeros(5, 4, 2)
            if step == 0:
                x[3, 1] = torch.nan
            loss = model["out"](model["rnn"](x)[0]).sum()
            model.zero_grad()
            loss.backward()
            found.append(doctor.check(loss))
            assert len(doctor._calls) == 2
    assert found[0] is not None
    assert found[1:] == [None, None]


@pytest.mark.parametrize(
    ("given", "stage", "what"),
    [(math.nan, "forward", "its initial state holds NaN"), (0.0, "local error", "dL/d(final state) is NaN")],
)
def test_the_state_of_a_sequence_without_a_step(given: float, stage: str, what: str) -> None:
    """It goes from hx to the final state past all steps; a root at 0 makes its gradient NaN."""
    layer = bptt.nn.GRU(2, 3)
    layer.first = torch.nn.Parameter(torch.zeros(1, 3, 3))
    given_states = layer.first + torch.tensor([0, given, 0])[:, None]
    with watch(layer) as doctor:
        y, h = layer(torch.randn(5, 2), given_states, cu_seqlens=torch.tensor([0, 3, 3, 5]))
        loss = y[3:].sum() + (h[:, 1].abs().sqrt() * 0).sum()
        loss.backward()
        diagnosis = doctor.check(loss)
    assert diagnosis is not None
    found = diagnosis.findings[0]
    assert (found.stage, found.layer, found.lane) == (stage, "layer 0", 1)
    assert what in str(found)
