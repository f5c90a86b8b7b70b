"""The processes that train one model together, and who of them has which lanes.

Legend: N processes, B lanes of the whole batch. Process r has the lanes from ceil(r B / N) to ceil((r + 1) B / N), so
that shares differ by at most one lane and the first process never has fewer than another.
"""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from time import monotonic, sleep
from typing import Any, Protocol, get_args, runtime_checkable

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from ..flow import Diagnosis, Stage
from .batches import Batch, Batches
from .config import Config
from .errors import InputError

__all__ = [
    "ALONE",
    "ElsewhereError",
    "Processes",
    "Shared",
    "first_cause",
    "joined",
    "may_restart",
    "own_part",
    "quiet",
]

PATIENCE = timedelta(minutes=30)
"""With processes that do not come: torch's own limit."""


class ElsewhereError(RuntimeError):
    """Another process of the run raised; it says what."""


@runtime_checkable
class _Sharing(Protocol):
    """Batches that give a process its lanes without reading the others'."""

    def of_rank(self, rank: int, world: int) -> Batches: ...


@dataclass(frozen=True)
class Processes:
    """One process among those that train together; `joined` gives the one that torchrun started.

    rank: its number, from 0. world: how many there are. restarted: whether torchrun has started them again, after one
    ended before its time.

    With a world of 1 nothing is communicated, and every method gives back what it was given. The methods that
    communicate must be called by all processes, in the same order.

    >>> [Processes(rank, 3).lanes(5) for rank in range(3)]
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """

    rank: int = 0
    world: int = 1
    restarted: bool = False
    _replicas: list[DistributedDataParallel] = field(default_factory=list, repr=False, compare=False)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and shows."""
        return self.rank == 0

    def lanes(self, total: int) -> slice:
        """The share of this process, of `total` lanes."""
        return slice(-(-self.rank * total // self.world), -(-(self.rank + 1) * total // self.world))

    def check(self, config: Config) -> None:
        """Raise InputError for options with which these processes cannot train."""
        if config.batch < self.world:
            raise InputError(f"batch must be at least the number of processes, {self.world}: got {config.batch}")
        device = torch.device(config.device)
        if self.world > 1 and device.type not in ("cpu", "cuda"):
            raise InputError(f"device must be cpu or cuda for several processes: got {config.device!r}")
        if self.world > 1 and device.type == "cuda" and device.index is not None:
            raise InputError(f"device must be cuda, without a number, for several processes: got {config.device!r}")

    def take_device(self, config: Config) -> None:
        """Make this process's own GPU of its machine the one that `cuda` means. Raises InputError where it has none."""
        if self.world > 1 and torch.device(config.device).type == "cuda":
            local, there = int(os.environ.get("LOCAL_RANK", self.rank)), torch.cuda.device_count()
            if local >= there:
                raise InputError(f"process {local} of this machine needs a GPU of its own: there are {there}")
            torch.cuda.set_device(local)

    def sums(self, *values: float) -> list[float]:
        """Each value's sum over all processes, the same bits on each."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device="cpu")
        dist.all_reduce(tensor)
        found: list[float] = tensor.tolist()
        return found

    def largest(self, value: int) -> int:
        """The largest value over all processes."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value, device="cpu")
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def any(self, flag: bool) -> bool:
        """Whether the flag is raised on any process."""
        return bool(self.largest(int(flag)))

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes by rank. Tensors are to lie on the CPU."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def of_first(self, value: Any) -> Any:
        """The first process's value, its tensors on the CPU: anything `torch.load` reads with weights_only=True."""
        if self.world == 1:
            return value
        buffer = io.BytesIO()
        if self.first:
            torch.save(value, buffer)
        packed = [buffer.getvalue()]
        dist.broadcast_object_list(packed)
        return value if self.first else torch.load(io.BytesIO(packed[0]), map_location="cpu", weights_only=True)

    def share(self, whole: Batches) -> Batches:
        """The lanes of this process, of all windows; read alone where `whole` can do that."""
        if self.world == 1:
            return whole
        return whole.of_rank(self.rank, self.world) if isinstance(whole, _Sharing) else Shared(whole, self)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave a `with` as all processes do: where another one raised in it, raise ElsewhereError.

        What is inside must not communicate.
        """
        try:
            yield
        except BaseException:
            self.any(True)
            raise
        if self.any(False):
            raise ElsewhereError("another process of this run could not go on: it says why")

    def replica(self, model: torch.nn.Module, trial: tuple[Any, ...]) -> torch.nn.Module:
        """What to call in the model's place, so that a backward pass leaves the mean gradient over all processes.

        trial: arguments to call it with.

        DistributedDataParallel lays its buckets out anew after the first backward pass, and a sum of three or more
        floating-point numbers depends on where in a bucket they stand. One pass without any effect is made here, so
        that a resumed run adds in the order of one that never stopped.
        """
        if self.world == 1:
            return model
        replica = DistributedDataParallel(model)
        weight = next(model.parameters())
        training = model.training
        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            predicted, _ = replica.eval()(*trial)
            (0 * predicted.sum()).backward()
        model.zero_grad()
        replica.train(training)
        self._replicas.append(replica)
        return replica

    def part(self) -> None:
        """Leave the others: the replicas cannot be called any more.

        Whatever is the last to let go of the process group ends the threads of gloo. A replica does so while it holds
        Python's lock, which such a thread may be waiting for to free a tensor: then neither goes on.
        """
        for replica in self._replicas:
            del replica.reducer, replica.logger
        self._replicas.clear()
        dist.destroy_process_group()


ALONE = Processes()
"""The only process."""


def quiet(replica: torch.nn.Module) -> AbstractContextManager[None]:
    """Inside `with`, forward and backward passes add to this process's gradient alone."""
    return replica.no_sync() if isinstance(replica, DistributedDataParallel) else nullcontext()


def first_cause(mine: Diagnosis | None, processes: Processes) -> tuple[Diagnosis, str]:
    """Of what the processes found not finite, the first in the order of computation; and whose it is, in words.

    mine: this process's, or None; not None on all.
    """
    order = get_args(Stage)
    found = {rank: each for rank, each in enumerate(processes.gather(mine)) if each is not None}
    rank = min(found, key=lambda rank: (order.index(found[rank].findings[0].stage), rank))
    return found[rank], f" in process {rank}, which counts lanes from its own first" if processes.world > 1 else ""


class Shared:
    """One process's lanes of the windows of a whole batch.

    A process that has no lane of a window, since a last batch of random windows may have fewer lanes than there are
    processes, reads its first lane without a target: its gradient is zero.
    """

    def __init__(self, whole: Batches, processes: Processes) -> None:
        self.whole, self.processes = whole, processes

    @property
    def full(self) -> int:
        return self.whole.full

    def windows(self, epoch: int) -> int:
        return self.whole.windows(epoch)

    def window(self, epoch: int, index: int) -> Batch:
        """The lanes of this process; `total` counts the targets of all."""
        window = self.whole.window(epoch, index)
        return window.part(self.processes.lanes(window.lanes))


@contextmanager
def joined() -> Iterator[Processes]:
    """Inside `with`, the processes that torchrun started are connected: by gloo, and on GPUs by nccl as well.

    Without torchrun, or with one process, nothing is connected.
    """
    begun_again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if not dist.is_available() or not dist.is_torchelastic_launched() or os.environ.get("WORLD_SIZE", "1") == "1":
        yield Processes(restarted=begun_again)
        return
    shared, rank, world = next(rendezvous("env://"))
    if rank == 0 and shared.add("bptt/attempts", 1) > 1:
        begun_again = True
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    own = own_part(shared, rank, world)
    dist.init_process_group(backend, store=own, rank=rank, world_size=world)
    processes = Processes(rank, world)
    try:
        processes = replace(processes, restarted=processes.any(begun_again))
        yield processes
        own.set(f"done/{rank}", "")
        with suppress(RuntimeError):  # nobody closes a connection from which another still reads; but not for ever
            own.wait([f"done/{other}" for other in range(world)], timedelta(seconds=10))
    finally:
        processes.part()


def own_part(store: Store, rank: int, world: int) -> Store:
    """A part of a store that only the processes of this start write to. To be called by all of them.

    torchrun gives restarted processes the store of those before, where these find the addresses of the dead, and a
    restart count that is not the same on every machine (https://github.com/pytorch/pytorch/issues/135712). So every
    other process asks under a name drawn by itself, and the first answers with one drawn by itself. Raises TimeoutError
    after half an hour.
    """
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"bptt/asks/{rank}", mine)
        store.wait([f"bptt/answer/{mine}"], PATIENCE)
        name = store.get(f"bptt/answer/{mine}").decode()
        store.set(f"bptt/{name}/{rank}", "here")
        return PrefixStore(name, store)
    until = monotonic() + PATIENCE.total_seconds()
    missing, answered = set(range(1, world)), set[bytes]()
    while missing:
        if monotonic() > until:
            raise TimeoutError(f"of {world} processes {sorted(missing)} did not come")
        for other in sorted(missing):
            if store.check([f"bptt/{mine}/{other}"]):
                missing.remove(other)
            elif store.check([f"bptt/asks/{other}"]) and (asked := store.get(f"bptt/asks/{other}")) not in answered:
                answered.add(asked)
                store.set(f"bptt/answer/{asked.decode()}", mine)
        sleep(0.01)
    return PrefixStore(mine, store)


def may_restart() -> bool:
    """Whether torchrun would start these processes again."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
