"""After a backward call that does not retain the graph, nothing of a call is alive but what the caller holds."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from reference import NETS, as_tuple, build, ours
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bptt
from bptt.kernels import KERNELS, frames
from bptt.policies import parse

MEMORIES = ("gates", "states", "checkpoints:steps=3")
POLICIES = ("full", "chunked:4", "truncated:4", "truncated:4/3", "randomized:0.6")
FORMS = ("plain", "batch_first", "packed", "unbatched")


class Storages(TorchDispatchMode):
    """Every storage that an operation has made or used, by its bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def alive(self, but: Any) -> int:
        """Bytes of those that are still there, except for those of some tensors and of addresses kept by design."""
        kept = [getattr(f, name) for f in frames._KEPT.values() for name in ("start", "lane", "first", "last", "end")]
        kept += [t for f in frames._KEPT.values() for t in (f.top, f.arrives, *f.walks[:3])]
        held = {t.untyped_storage()._cdata for t in tree_leaves((but, kept)) if isinstance(t, Tensor)}
        return sum(size for at, (ref, size) in self.seen.items() if at not in held and not ref.expired())


def arguments(layer: Any, form: str, T: int, B: int) -> tuple[Any, dict[str, Any]]:
    x = torch.randn(T, B, layer.input_size, dtype=torch.float64)
    resets = torch.rand(T, B) < 0.2
    if form == "batch_first":
        return x.transpose(0, 1), {"resets": resets.t()}
    if form == "packed":
        return pack_padded_sequence(x, [T, *[T - 3] * (B - 1)]), {}
    return (x[:, 0], {"resets": resets[:, 0]}) if form == "unbatched" else (x, {"resets": resets})


def run(layer: Any, form: str, T: int = 9, B: int = 3) -> tuple[Tensor, Any]:
    """(the loss, all that the caller holds) of a call."""
    x, options = arguments(layer, form, T, B)
    y, final = layer(x, **options)
    data = y if isinstance(y, Tensor) else y.data
    loss = data.square().sum() + sum(s.square().sum() for s in as_tuple(final))
    return loss, (loss, x, options, list(layer.parameters()))


@pytest.fixture(scope="module", autouse=True)
def imported() -> Iterator[None]:
    """The first operation under a dispatch mode imports modules of torch, which leave frames in a cycle.

    What is there by then is no test's: the collector passes over it, and has little to look at.
    """
    with Storages():
        run(ours(build("tanh")), "plain")[0].backward()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def left(layer: Any, form: str, backward: Callable[[Tensor], Any]) -> int:
    gc.collect()
    gc.disable()  # a cycle would hold it as well
    try:
        with Storages() as storages:
            loss, mine = run(layer, form)
            results = backward(loss)
        return storages.alive((mine, results, [p.grad for p in layer.parameters()]))
    finally:
        gc.enable()


@pytest.mark.parametrize(("cell", "net"), [("tanh", "one"), ("gru", "two"), ("lstm_proj", "bi_two")])
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_left_after_backward(cell: str, net: str, memory: str, policy: str) -> None:
    for form in FORMS:
        for kernel in KERNELS if form == "plain" and memory == "gates" else ["cpu"]:
            if kernel == "fused" and parse(policy).draws_factors:  # which it refuses
                continue
            theirs = build(cell, **NETS[net], dropout=0.3 * (net != "one"), batch_first=form == "batch_first")
            layer = ours(theirs, gradient=policy, memory=memory, kernel=kernel)
            assert left(layer, form, Tensor.backward) == 0, (form, kernel)
            if form == "plain" and policy == "full":
                assert left(layer, form, lambda loss: loss.backward(retain_graph=True)) > 0


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("net", ["two", "bi_two"])
def test_all_that_is_kept_passes_the_hooks(memory: str, net: str) -> None:
    """What saved_tensors_hooks move elsewhere is not left in its place, and the gradient is the same."""
    layer = ours(build("lstm", **NETS[net], dropout=0.3), gradient="randomized:0.6", memory=memory)
    for form in FORMS[:1] + FORMS[2:3]:
        found = []
        for moved in (False, True):
            torch.manual_seed(3)
            pack = (lambda t: t.detach().numpy().copy()) if moved else (lambda t: t)  # an array, which nobody counts
            unpack = torch.from_numpy if moved else (lambda t: t)
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack), Storages() as storages:
                x, options = arguments(layer, form, 13, 3)
                y, final = layer(x, **options)
                outputs = [y if isinstance(y, Tensor) else y.data, *as_tuple(final)]
            if moved:
                gc.collect()
                assert storages.alive((x, options, y, final, list(layer.parameters()))) == 0
            found.append(torch.autograd.grad([o.square().sum() for o in outputs], list(layer.parameters())))
        torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("policy", ["full", "truncated:4/3", "randomized:0.6"])
def test_a_graph_that_is_retained(memory: str, policy: str) -> None:
    """Twice, and once more for good: the same each time, then torch's own error, and everything is let go."""
    layer = ours(build("gru", num_layers=2, dropout=0.3), gradient=policy, memory=memory)
    weights = list(layer.parameters())
    for form in FORMS:
        layer.batch_first = form == "batch_first"
        with Storages() as storages:
            loss, mine = run(layer, form)
            first = torch.autograd.grad(loss, weights, retain_graph=True)
            second = torch.autograd.grad(loss, weights, create_graph=True)
            third = torch.autograd.grad(loss, weights)
        torch.testing.assert_close(second, first)
        torch.testing.assert_close(third, first, rtol=0, atol=0)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, weights)
        del second
        assert storages.alive((mine, first, third)) == 0


@pytest.mark.parametrize("policy", ["full", "truncated:4/3"])
@pytest.mark.parametrize("resets", [False, True])
def test_nothing_is_left_of_a_stream(policy: str, resets: bool) -> None:
    layer = ours(build("gru", num_layers=2), gradient=policy)
    x, where = torch.randn(40, 3, 5, dtype=torch.float64), torch.rand(40, 3) < 0.2
    with Storages() as storages:
        found = bptt.stream_gradients(
            layer, x, lambda _, y: y.square().sum(), memory="checkpoints:steps=6", resets=where if resets else None
        )
    assert storages.alive((x, where, list(layer.parameters()), found.parameters, found.hx, found.final)) == 0


@pytest.mark.parametrize("memory", ["states", "checkpoints:steps=3"])
@pytest.mark.parametrize("policy", ["full", "truncated:4/3", "randomized:0.6"])
def test_nothing_is_left_of_a_scan(policy: str, memory: str) -> None:
    """Not even what the step captured, nor the states of generators that dropout has drawn from."""
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)

    def loss() -> tuple[Tensor, Any]:
        captured, resets = weight * 1.0, torch.rand(13, 3) < 0.2
        carry, xs = torch.randn(3, 4, dtype=torch.float64), torch.randn(13, 3, 4, dtype=torch.float64)

        def step(carry: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            after = torch.dropout(torch.tanh(carry @ captured + x), 0.2, True)
            return after, after

        _, ys = bptt.scan(step, carry, xs, gradient=policy, resets=resets, memory=memory)
        return ys.square().sum(), weight

    gc.collect()
    gc.disable()
    try:
        with Storages() as storages:
            value, mine = loss()
            value.backward(retain_graph=True)
            value.backward()
        with pytest.raises(RuntimeError, match="second time"):
            value.backward()
        assert storages.alive((value, mine, weight.grad)) == 0
    finally:
        gc.enable()
