"""TorchRL itself: values and gradients of its own back ends, with stored states, in a rollout and in a loss."""

from typing import Any

import pytest
import torch
from torch import nn

import bptt

modules = pytest.importorskip("torchrl.modules", reason="needs the extra torchrl", exc_type=ImportError)
adaptor = pytest.importorskip("bptt.adaptors.torchrl", reason="needs the extra torchrl", exc_type=ImportError)
tensordict = pytest.importorskip("tensordict")

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

B, T, I, H, L = 3, 11, 2, 4, 2
NAMES = {"lstm": ["h", "c"], "gru": ["h"]}


def pair(kind: str, **options: Any) -> tuple[Any, Any]:
    """Ours and TorchRL's, with the same weights."""
    states = NAMES[kind]
    keys = {"in_keys": ["x", *states], "out_keys": ["y", *(("next", s) for s in states)]}
    name = f"{kind.upper()}Module"
    shape = {"input_size": I, "hidden_size": H, "num_layers": L, **keys}
    ours = getattr(adaptor, name)(**shape, **options).double()
    theirs = getattr(modules, name)(**shape).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def data(kind: str, shape: tuple[int, ...] = (B, T), starts: float = 0.3, stored: bool = True) -> Any:
    torch.manual_seed(2)
    held = {"x": torch.randn(*shape, I, dtype=torch.float64, requires_grad=True)}
    held["is_init"] = torch.rand(*shape, 1) < starts
    for name in NAMES[kind] if stored else ():
        held[name] = torch.randn(*shape, L, H, dtype=torch.float64, requires_grad=True)
    return tensordict.TensorDict(held, shape)


def results(module: Any, given: Any) -> dict[str, Any]:
    leaves = {key: given[key] for key in list(given.keys()) if given[key].requires_grad}
    module.zero_grad()
    with modules.set_recurrent_mode(True):
        out = module(given.copy())
    y, final = out["y"], [out["next", name] for name in NAMES[module_kind(module)]]
    (y.square().sum() + sum(state[..., -1, :, :].sum() for state in final)).backward()
    found = {"y": y, "final": [state[..., -1, :, :] for state in final]}
    found |= {"weights": [p.grad for p in module.parameters()]}
    found |= {f"d{key}": leaf.grad for key, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.grad = None
    return found


def module_kind(module: Any) -> str:
    return "lstm" if hasattr(module, "lstm") else "gru"


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("shape", [(B, T), (T,), (2, B, T), (B, 1)])
@pytest.mark.parametrize("starts", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("stored", [True, False])
def test_values_and_gradients_are_torchrls(agree, kind, shape, starts, stored):
    ours, theirs = pair(kind)
    assert type(getattr(ours, kind)) is getattr(bptt.nn, kind.upper())
    given = data(kind, shape, starts, stored)
    mine, expected = results(ours, given), results(theirs, given)
    agree(mine, expected)


@pytest.mark.parametrize("kind", NAMES)
def test_what_is_written_has_torchrls_shapes(kind):
    ours, theirs = pair(kind)
    given = data(kind)
    with modules.set_recurrent_mode(True):
        mine, expected = ours(given.copy()), theirs(given.copy())
    assert mine.shape == expected.shape
    assert {k: v.shape for k, v in mine.items(True, True)} == {k: v.shape for k, v in expected.items(True, True)}
    for name in NAMES[kind]:
        assert (mine["next", name][:, :-1] == 0).all()


@pytest.mark.parametrize("kind", NAMES)
def test_steps_of_a_rollout_are_the_call(agree, kind):
    ours, _ = pair(kind)
    given = data(kind, stored=False)
    states = {name: torch.zeros(B, L, H, dtype=torch.float64) for name in NAMES[kind]}
    outputs = []
    for t in range(T):
        step = ours(tensordict.TensorDict({**given[:, t], **states}, [B]))
        outputs.append(step["y"])
        states = {name: step["next", name] for name in NAMES[kind]}
    with modules.set_recurrent_mode(True):
        whole = ours(given.copy())
    agree(torch.stack(outputs, 1), whole["y"])
    agree([states[name] for name in NAMES[kind]], [whole["next", name][:, -1] for name in NAMES[kind]])


def test_a_policy_is_set_and_kept():
    ours, _ = pair("lstm", gradient="chunked:2", memory="states", kernel="eager")
    assert (str(ours.lstm.gradient), ours.lstm.memory, ours.lstm.kernel) == ("chunked:2", "states", "eager")
    layer = bptt.nn.GRU(I, H, batch_first=True, gradient="truncated:3")
    module = adaptor.GRUModule(gru=layer, in_key="x", out_key="y")
    assert module.gru is layer
    assert str(module.gru.gradient) == "truncated:3"


def test_its_parameters_can_be_swapped():
    """As TorchRL's losses do, for target networks."""
    ours, _ = pair("gru")
    given = data("gru")
    with modules.set_recurrent_mode(True):
        before = ours(given.copy())["y"]
        other = tensordict.from_module(ours).data.apply(lambda p: p * 0.5)
        with other.to_module(ours):
            between = ours(given.copy())["y"]
        torch.testing.assert_close(ours(given.copy())["y"], before)
    assert not torch.allclose(between, before)


def test_the_primer_is_torchrls():
    ours, theirs = pair("lstm")
    mine, expected = ours.make_tensordict_primer(), theirs.make_tensordict_primer()
    shapes = [{name: primer.primers[name].shape for name in ("h", "c")} for primer in (mine, expected)]
    assert shapes[0] == shapes[1]


def test_what_is_wrong_is_said():
    keys = {"in_key": "x", "out_key": "y"}
    with pytest.raises(ValueError, match="recurrent_backend must be left out, the layer takes its place: got 'scan'"):
        adaptor.LSTMModule(I, H, recurrent_backend="scan", **keys)
    with pytest.raises(ValueError, match="bidirectional must be False"):
        adaptor.LSTMModule(I, H, bidirectional=True, **keys)
    with pytest.raises(TypeError, match=r"gru must be of torch.nn or bptt.nn, not python_based"):
        adaptor.GRUModule(I, H, python_based=True, **keys)
    module = adaptor.LSTMModule(I, H, **keys)
    given = {"x": torch.zeros(1, 2, I), "is_init": torch.zeros(1, 2, 1, dtype=torch.bool)}
    half = tensordict.TensorDict({**given, "recurrent_state_h": torch.zeros(1, 2, 1, H)}, [1, 2])
    with modules.set_recurrent_mode(True):
        with pytest.raises(ValueError, match="must hold all of"):
            module(half)
        with pytest.raises(ValueError, match="must have a batch dimension"):
            module(half[0, 0])
    assert isinstance(module, nn.Module)
