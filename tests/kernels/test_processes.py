"""The kernel in forked processes, and under several Python threads at once."""

import multiprocessing
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from reference import build, case, measure, ours
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bptt.kernels import cpu

from .forks import PATIENCE, forking, needs_fork

Agree = Callable[..., None]
Walkers = Callable[[int], None]

each_cell = pytest.mark.parametrize("cell", ["tanh", "gru", "lstm_proj"])


def large(cell: str, policy: str = "truncated:5") -> Callable[[], dict[str, Any]]:
    """A call whose walks are worth several threads, with a barrier at every step of the sweep."""
    theirs = build(cell, 3, 65)
    layer, data = ours(theirs, gradient=policy, kernel="cpu"), case(theirs, T=40, B=9)
    return lambda: measure(layer, data).values()


def send(connection: Connection, call: Callable[[], dict[str, Any]]) -> None:
    values = call()
    connection.send({name: _as_numbers(value) for name, value in values.items()})


def _as_numbers(value: Any) -> Any:
    """NumPy arrays, which need no shared memory to be sent."""
    if isinstance(value, Tensor):
        return value.numpy()
    if isinstance(value, dict):
        return {name: _as_numbers(v) for name, v in value.items()}
    return tuple(map(_as_numbers, value))


def _as_tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_tensors(v) for name, v in value.items()}
    return tuple(map(_as_tensors, value)) if isinstance(value, tuple) else torch.from_numpy(value)


@needs_fork
@each_cell
def test_a_forked_child_computes_alone(cell: str, agree: Agree, walkers: Walkers) -> None:
    """Threads are not copied by a fork: a child that waited for those of its parent would wait for ever."""
    call = large(cell)
    walkers(2)
    expected = call()
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=send, args=(there, call), daemon=True)
    with forking():
        child.start()
    try:
        assert here.poll(PATIENCE), "the child hangs"
        agree(_as_tensors(here.recv()), expected)
    finally:
        child.kill()
        child.join()
    agree(call(), expected, "the parent afterwards", tolerance=0)


class Encoded(Dataset):  # type: ignore[type-arg]
    """Items made by a recurrent layer."""

    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        self.layer, self.x = layer, x

    def __len__(self) -> int:
        return len(self.x)

    @torch.no_grad()
    def __getitem__(self, i: int) -> Tensor:
        return self.layer(self.x[i])[0]


@needs_fork
def test_in_the_workers_of_a_data_loader(agree: Agree, walkers: Walkers) -> None:
    torch.manual_seed(1)
    layer = ours(build("lstm", 3, 65), kernel="cpu")
    x = torch.randn(4, 40, 9, 3, dtype=torch.float64)
    walkers(2)
    data = Encoded(layer, x)
    expected = torch.stack([data[i] for i in range(4)])
    loader = DataLoader(data, batch_size=1, num_workers=2, multiprocessing_context="fork", timeout=PATIENCE)
    with forking():
        actual = torch.cat(list(loader))
    agree(actual, expected)


@each_cell
@pytest.mark.parametrize("policy", ["full", "truncated:5"])
def test_several_callers_at_once(cell: str, policy: str, agree: Agree, walkers: Walkers) -> None:
    """Four Python threads, each of which asks for two of its own, several times."""
    call = large(cell, policy)
    walkers(2)
    expected = call()
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(call) for _ in range(12)]
        for future in futures:
            agree(future.result(timeout=PATIENCE), expected, tolerance=0)


def test_backward_in_another_thread(agree: Agree, walkers: Walkers) -> None:
    """Forward in one thread, backward in several others, one after the other."""
    layer = ours(build("gru", 3, 65), kernel="cpu", gradient="truncated:5")
    data = case(layer, T=40, B=9)
    walkers(2)
    y, _ = layer(data.x)
    loss = (y * data.dy).sum()

    def grads() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)

    expected = grads()
    for _ in range(3):
        with ThreadPoolExecutor(1) as pool:
            agree(pool.submit(grads).result(timeout=PATIENCE), expected, tolerance=0)


def test_other_python_threads_run_meanwhile(use: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter lock is released during a walk: another thread counts while this one is in it.

    Nothing else makes this one give the lock away, so that one tick is enough, however late it comes.
    """
    use(cpu.variants()[-1])
    ticks, stop = [0], threading.Event()
    for limit in ("SMALL", "INFERRED"):
        monkeypatch.setattr(cpu, limit, 0)

    def count() -> None:
        while not stop.wait(0.001):
            ticks[0] += 1

    during: list[int] = []

    class Watched(cpu.FORWARD[torch.float64]):
        def run(self, **how: int) -> None:
            before = ticks[0]
            super().run(**how)
            during.append(ticks[0] - before)

    monkeypatch.setitem(cpu.FORWARD, torch.float64, Watched)
    layer, x = ours(build("tanh", 1, 400), kernel="cpu"), torch.zeros(200, 8, 1, dtype=torch.float64)
    counter, interval = threading.Thread(target=count), sys.getswitchinterval()
    counter.start()
    sys.setswitchinterval(1000)
    try:
        with torch.no_grad():
            for _ in range(1000):
                layer(x)
                if any(during):
                    break
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        counter.join()
    assert any(during)
