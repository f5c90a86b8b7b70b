"""What is learned, from which data: all that differs between a language model and a forecast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor

from ...flow import Recording, Scanned, record, record_scan
from ...nn import Recurrent
from ..batches import Batches
from ..carried import State
from ..config import Config
from ..model import Network

__all__ = ["Stored", "Task", "record_window"]


class Stored(Protocol):
    """What a run directory keeps of its data: what the network's numbers mean. Two that are equal mean the same."""

    def to_json(self) -> str:
        """The text form that `Task.read` reads."""
        ...


class Task(Protocol):
    """Data that are read, split and numbered, and what is to be learned from them.

    The trainer, the run directory, the doctor and the commands know a task by this alone. A new one takes a file in
    `train/tasks/` with its row in `TASKS`, and its options in `Config`, each of which names the task it is for.

    name: in `TASKS` and as `Config.task`. file: of the run directory, with `stored` in it. what, data: what these are
    called in messages. units: what is predicted, in the plural.

    train, heldout: the two parts of the data, in a form of the task's own. sha256: tells these data from others when a
    run is resumed. stored: what the run keeps of them.
    """

    name: ClassVar[str]
    file: ClassVar[str]
    what: ClassVar[str]
    data: ClassVar[str]
    units: ClassVar[str]

    @property
    def train(self) -> Any: ...

    @property
    def heldout(self) -> Any | None: ...

    @property
    def sha256(self) -> str: ...

    @property
    def stored(self) -> Any: ...

    @classmethod
    def prepare(cls, config: Config) -> Task:
        """Read the data that a configuration names. Raises InputError for what cannot be learned from."""
        ...

    @classmethod
    def read(cls, text: str) -> Any:
        """The inverse of `stored.to_json()`. Raises InputError for anything else."""
        ...

    @classmethod
    def network(cls, config: Config, stored: Any) -> Network:
        """The network, untrained; raises as torch and the layers do."""
        ...

    @classmethod
    def trial(cls, stored: Any) -> tuple[Tensor, ...]:
        """Arguments for a network's shortest call: inputs of one step and one lane, on the CPU."""
        ...

    def batches(self, config: Config) -> Batches:
        """What to train on. Raises InputError where there is too little of it."""
        ...

    def in_order(self, part: Any, config: Config) -> Batches:
        """A part in its order, each prediction once, to measure on."""
        ...

    def carries(self, config: Config) -> bool:
        """Whether a batch begins with the state that the one before it ended with."""
        ...

    def longest(self, config: Config) -> int:
        """Steps of the longest batch."""
        ...

    def arguments(self, batch: Any, state: State, like: Tensor) -> tuple[Any, ...]:
        """What the network is called with for a batch. state: before it, None for zero. like: a weight."""
        ...

    def loss(self, output: Any, batch: Any) -> Tensor:
        """The loss `[]` of what the network returned for a batch, summed over its `tokens`."""
        ...

    def counts(self, output: Any, batch: Any) -> Tensor:
        """Sums over a batch from which `measures` follow once all are added up: float64 `[n]`."""
        ...

    def measures(self, counts: list[float]) -> dict[str, float]:
        """The task's own measures beside the loss, by name; {} where there are none."""
        ...

    def pictures(self, counts: list[float]) -> Iterator[tuple[str, Any]]:
        """(name, figure) of what such counts show, for the run directory; none where there is nothing to see.

        Raises ImportError where there is, and matplotlib is missing.
        """
        ...

    def perplexity(self, loss: float) -> float | None:
        """exp(loss) where the loss is in nats per token; else None."""
        ...

    def about(self) -> str:
        """How much there is, in words."""
        ...

    def baseline(self) -> str:
        """What the network must beat, in words and a number."""
        ...

    def shortfall(self, loss: float, measures: Mapping[str, float | None]) -> str:
        """What held-out loss and measures did not beat, in words and numbers; "" where they beat the baseline."""
        ...

    def hints(self, config: Config) -> list[str]:
        """What a user should hear before training."""
        ...

    def inspected(self, config: Config, steps: int | None, lanes: int | None) -> tuple[list[Any], str]:
        """(batches in order of which the last is to be measured, what they are of in words), for `bptt flow`.

        steps, lanes: as many as asked for; None: as the configuration says. Raises InputError for too many.
        """
        ...


def record_window(task: Task, model: Network, batch: Any, state: State) -> Recording | Scanned:
    """The recurrent layers' part in the mean loss of a batch: of a cell without kernels of its own as a scan, of one in
    both directions the forward one. state: before it, None for zero.
    """
    arguments = task.arguments(batch, state, next(model.parameters()))

    def loss(output: Any) -> Tensor:
        return task.loss(output, batch) / max(1, batch.tokens)

    if not isinstance(model.recurrent, Recurrent):
        return record(model, arguments, loss)
    return record_scan(model, arguments, loss, direction="forward" if model.recurrent.bidirectional else None)
